"""Transformers in recipes: taught in a diffusers folder, by a LoRA on the weights that teacher and student share."""

import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from safetensors.torch import load_file

from distill_core.cli import main
from distill_core.diffusion.schedule import flow
from distill_core.networks.transformers.files import open_transformer
from distill_core.preparation import prepare
from distill_core.recipe import Recipe, example, example_names

from .pipelines import DEPTH, FAMILIES, write_pipeline

pytestmark = pytest.mark.slow

JOB = """
run = "run"

[teacher]
file = "pipeline"

[student]
plan = "PLAN"

[data]
prompts = "prompts.txt"
cache = "images"
resolution = "64"
guidance = 1.0
sampler_steps = 2

[training]
objective = "output"
lora_rank = 4
lora_targets = ["*"]
total_steps = 4
batch_size = 2
learning_rate = 1e-2
caption_dropout = 0.5
"""


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_pipeline(folder / "pipeline", request.param)
    (folder / "prompts.txt").write_text("a cat\ntwo red apples left of a dog\na small flat cake\n")
    return folder, request.param


def job(made, tmp_path, *changes, places=("pipeline", "prompts.txt", "images")):
    folder, family = made
    text = JOB.replace("PLAN", DEPTH[family])
    given = [(f'"{name}"', f'"{folder / name}"') for name in places if f'"{name}"' in text]  # images are drawn once for all tests
    for old, new in [*changes, *given]:
        assert old in text or old == '"images"'
        text = text.replace(old, new)
    (tmp_path / "job.toml").write_text(text)
    return tmp_path / "job.toml"


def test_a_recipe_heals_a_cut_transformer(made, tmp_path, capsys):
    path = job(made, tmp_path, ("[training]", "[training]\nsample_every_steps = 4"), ("[data]", '[samples]\nprompts = ["a cat"]\nresolution = "64"\nsteps = 2\nguidance = 1.0\n\n[data]'))  # fmt: skip
    assert main(["train", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"plan {DEPTH[made[1]]}" in out and "student weights" in out and "step 4:" in out
    assert (tmp_path / "run" / "samples" / "00000004.png").exists()
    lora = load_file(tmp_path / "run" / "checkpoints" / "00000004" / "lora.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in lora.items() if name.endswith("lora_B.weight"))


def test_what_was_learnt_is_merged_into_the_student(made, tmp_path, capsys):
    folder, family = made
    prepared = prepare(Recipe.read(job(made, tmp_path)))
    prepared.train(lambda progress: None)
    told = ["prune", str(folder / "pipeline"), str(tmp_path / "student"), "--layout", "diffusers"]
    lora = ["--lora", str(prepared.run.result_file)]
    assert main([*told, "--plan", DEPTH[family], *lora]) == 0
    assert f"{prepared.run.result_file}: merged into it" in capsys.readouterr().out
    student, merged = prepared.models.student(), open_transformer(tmp_path / "student").tensors
    trained, table = load_file(prepared.run.result_file), prepared.models.mapping
    for name, weight in student.network.state_dict().items():
        if (ours := table.rename(name)) is None:
            continue
        key = "transformer." + ours.removesuffix(".weight")
        change = trained[f"{key}.lora_B.weight"] @ trained[f"{key}.lora_A.weight"] if f"{key}.lora_B.weight" in trained else 0
        torch.testing.assert_close(merged[ours].read(), weight + change)

    others = {"flux1": "fold double 0-1 single 1-3", "z-image": "fold layer 0-1,4-5", "qwen-image": "fold block 0-1"}
    assert main([*told, "--overwrite", "--plan", others[family], *lora]) == 2
    assert f"it was trained for the plan {DEPTH[family]}, not for {others[family]}" in capsys.readouterr().err


def test_folded_blocks_learn_alone(made, tmp_path):
    prepared = prepare(Recipe.read(job(made, tmp_path, ('objective = "output"', 'objective = "local"'))))
    assert prepared.forecast().moment == "a local step"
    prepared.train(lambda progress: None)
    (row, *_) = prepared.run.metrics()
    assert "local" in row and "output" not in row
    assert {*prepared.recipe.training.lora_targets} == {f"{block}.*" for block in prepared.models.mapping.folded}


@pytest.mark.parametrize("alpha", [None, 3.0], ids=["alpha as rank", "alpha 3"])
def test_diffusers_opens_the_lora_on_the_student(made, tmp_path, alpha):
    import diffusers

    folder, family = made
    changes = [] if alpha is None else [("[training]", f"[training]\nlora_alpha = {alpha}")]
    prepared = prepare(Recipe.read(job(made, tmp_path, *changes)))
    prepared.train(lambda progress: None)
    told = ["prune", str(folder / "pipeline"), "OUT", "--layout", "diffusers", "--plan", DEPTH[family]]
    networks = []
    for name, more in (("cut", []), ("healed", ["--lora", str(prepared.run.result_file)])):
        assert main([str(tmp_path / name) if word == "OUT" else word for word in told] + more) == 0
        file = open_transformer(tmp_path / name)
        networks.append(getattr(diffusers, file.config["_class_name"]).from_pretrained(tmp_path / name))
    kind = {"flux1": "FluxPipeline", "z-image": "ZImagePipeline", "qwen-image": "QwenImagePipeline"}[family]
    empty = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    empty |= dict.fromkeys(("text_encoder_2", "tokenizer_2")) if family == "flux1" else {}
    getattr(diffusers, kind)(**empty, transformer=networks[0]).load_lora_weights(str(prepared.run.result_file))
    examples = prepared.dataset.read(0, torch.tensor([0, 1]))
    contexts = examples.contexts.float()
    asked = examples.latents.float(), torch.tensor([200, 700]), contexts, examples.label and examples.label.to(contexts)
    with_lora, merged = (prepared.models._denoiser(network)(*asked) for network in networks)
    torch.testing.assert_close(with_lora, merged, atol=1e-4, rtol=1e-3)


def bytes_of(network):
    """Of a network's weights as they are held, scales of 4-bit weights included; the codes of the scales are shared by all layers."""
    states = (
        module.weight.quant_state for module in network.modules() if hasattr(getattr(module, "weight", None), "quant_state")
    )
    scales = (part for state in states for part in (state.absmax, state.code, state.offset, state.state2.absmax))
    return sum(part.nbytes for part in [*scales, *network.parameters()])


@pytest.mark.parametrize("dtype", ["fp8", "nf4"])
def test_the_weights_are_held_in_the_precision_asked_for(made, tmp_path, dtype):
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    changes = [("[student]", f'dtype = "{dtype}"\n\n[student]'), ("[training]", '[training]\nprecision = "bf16"')]
    prepared = prepare(Recipe.read(job(made, tmp_path, *changes)))
    prepared.train(lambda progress: None)
    assert prepared.run.complete
    if made[1] == "flux1":
        forecast = prepared.forecast()
        lora = 4 * sum(weight.numel() for weight in load_file(prepared.run.result_file).values())
        assert dict(forecast.parts)["student weights"] == bytes_of(prepared.models.teacher().network) + lora
        plain = forecast.again(replace(forecast.settings, teacher_dtype="bf16"), forecast.latent_shape)
        assert dict(plain.parts)["student weights"] > dict(forecast.parts)["student weights"]
        assert dict(forecast.parts)["half-precision weights"] > 0
        less = forecast.again(forecast.settings.with_training(gradient_checkpointing=True), forecast.latent_shape)
        widened = [dict(told.parts)["half-precision weights"] for told in (less, forecast)]
        assert widened[0] < widened[1]


FEW = "phases = 2\nsolver_steps = 4\nfake_warmup_steps = 0\nfake_updates = 1\nanchor_steps = 1\n"
OF_THE_WHOLE = {
    "guidance": "guidance = 3.0\n",
    "consistency": "guidance = 3.0\n" + FEW,
    "dmd": "guidance = 3.0\nconsistency_steps = 2\n" + FEW,
}


@pytest.mark.parametrize("objective", OF_THE_WHOLE)
def test_the_whole_network_learns_guidance_and_few_steps(made, tmp_path, objective):
    changes = [
        (f'plan = "{DEPTH[made[1]]}"', ""),
        ('objective = "output"', f'objective = "{objective}"\n{OF_THE_WHOLE[objective]}'),
        ("caption_dropout = 0.5", "caption_dropout = 0.0"),
    ]
    prepared = prepare(Recipe.read(job(made, tmp_path, *changes)))
    prepared.train(lambda progress: None)
    assert prepared.run.complete and prepared.models.plan is None
    ups = [weight for name, weight in load_file(prepared.run.result_file).items() if name.endswith("lora_B.weight")]
    assert any(weight.abs().max() > 0 for weight in ups) and all(weight.isfinite().all() for weight in ups)


@pytest.mark.parametrize("changes,message", [
    ([("lora_rank = 4", "lora_rank = 0")], r"a transformer learns by a LoRA; set lora_rank"),
    ([("[student]", '[experts]\ncount = 2\n\n[student]')], r"\[experts\] are for UNets"),
    ([('objective = "output"', 'objective = "ssd-1b"')], "objective ssd-1b compares layers of UNets"),
    ([('objective = "output"', 'objective = "output"\nweight_dtype = "bf16"\nprecision = "bf16"')], "set weight_dtype to fp32"),
    ([('resolution = "64"', 'resolution = "72"')], r"\[data\]: a transformer needs sides that are multiples of 16 px, got 72"),
    ([("[student]", "offload = true\n\n[student]")], r"\[teacher\]: offload is for a teacher beside its student"),
    ([("[student]", '[student]\nfile = "x"\n# ')], "shares its teacher's weights"),
    ([('lora_targets = ["*"]', "")], r"lora_targets: '\*.attn1.to_\*' matches no layer of this model"),
    ([('lora_targets = ["*"]', 'lora_targets = ["*"]\nlora_dora = true'), ("[student]", 'dtype = "nf4"\n\n[student]')],
     "DoRA does not support int8 or nf4 weights"),
])  # fmt: skip
def test_what_only_unets_can_is_refused_before_images_are_drawn(made, tmp_path, changes, message, capsys):
    if "file" in changes[0][1]:
        changes = [("[student]\nplan", '[student]\nfile = "pipeline"\n# plan')]
    changes = [*changes, ('cache = "images"', 'cache = "own"')]
    assert main(["train", str(job(made, tmp_path, *changes))]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error and not (tmp_path / "own").exists()


def test_a_student_that_was_cut_takes_its_noise_levels_from_its_teachers_pipeline(made, tmp_path, capsys):
    folder, family = made
    told = ["prune", str(folder / "pipeline"), str(tmp_path / "student"), "--layout", "diffusers", "--plan", DEPTH[family]]
    assert main(told) == 0
    changes = [(f'plan = "{DEPTH[family]}"', ""), ('objective = "output"', 'objective = "task"')]
    own = [*changes, ('file = "pipeline"', f'file = "{tmp_path / "student"}"')]
    assert main(["train", str(job(made, tmp_path, *own, places=("prompts.txt", "images")))]) == 2
    assert "name that of its teacher as encoders in [data]" in capsys.readouterr().err
    named = [*own, ("[data]", f'[data]\nencoders = "{folder / "pipeline"}"')]
    prepared = prepare(Recipe.read(job(made, tmp_path, *named, places=("prompts.txt", "images"))))
    assert torch.equal(prepared.models.schedule.sigmas, flow(shift=3.0).sigmas)
    prepared.train(lambda progress: None)
    assert prepared.run.complete

    alone = [
        *changes,
        ('run = "run"', 'run = "alone"'),
        ("[teacher]", ""),
        ('file = "pipeline"', ""),
        ("[student]", f'[student]\nfile = "{tmp_path / "student"}"'),
    ]
    assert main(["train", str(job(made, tmp_path, *alone, places=("prompts.txt", "images")))]) == 2
    assert "give it as [teacher] file, in the dtype to hold it in" in capsys.readouterr().err


def test_a_config_of_no_network_is_refused(made, tmp_path, capsys):
    import shutil

    shutil.copytree(made[0] / "pipeline", tmp_path / "damaged")
    config = tmp_path / "damaged" / "transformer" / "config.json"
    depth = "n_layers" if made[1] == "z-image" else "num_layers"
    for value, said in (("many", "cannot build a network of this config"), (3, "its config and its weights differ, first in")):
        config.write_text(json.dumps(json.loads(config.read_text()) | {depth: value}))
        changes = [('file = "pipeline"', f'file = "{tmp_path / "damaged"}"'), ('cache = "images"', 'cache = "own"')]
        assert main(["train", str(job(made, tmp_path, *changes, places=("prompts.txt",)))]) == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error and not (tmp_path / "own").exists()


def test_a_model_that_reads_more_than_a_latent_is_refused(made, tmp_path, capsys):
    from diffusers import FluxTransformer2DModel

    if made[1] != "flux1":
        return
    filling = FluxTransformer2DModel(
        patch_size=1, in_channels=384, out_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    filling.save_pretrained(tmp_path / "fill" / "transformer")
    changes = [('file = "pipeline"', f'file = "{tmp_path / "fill"}"')]
    assert main(["train", str(job(made, tmp_path, *changes, places=("prompts.txt", "images")))]) == 2
    assert "this model reads 384 channels and predicts 64" in capsys.readouterr().err


def test_the_same_network_is_nothing_to_learn(made, tmp_path, capsys):
    assert main(["train", str(job(made, tmp_path, (f'plan = "{DEPTH[made[1]]}"', "")))]) == 2
    assert "there is nothing to learn" in capsys.readouterr().err


def test_examples_are_for_each_family():
    assert {"heal-flux", "heal-z-image", "heal-qwen"} <= {*example_names()}
    for name in ("heal-flux", "heal-z-image", "heal-qwen"):
        assert "distill prune" in example(name)


def test_a_single_file_is_refused_with_what_to_give(tmp_path, capsys):
    from distill_core.demo import files

    (tmp_path / "prompts.txt").write_text("a cat\n")
    text = JOB.replace('"pipeline"', json.dumps(str(files.TRANSFORMER))).replace("PLAN", "fold single 1-2")
    (tmp_path / "job.toml").write_text(text)
    assert main(["train", str(tmp_path / "job.toml")]) == 2
    assert "is a single file of Flux.1; to train it here, give its diffusers folder" in capsys.readouterr().err
