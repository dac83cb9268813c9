"""Students of transformers outside ComfyUI: a network of diffusers that is teacher and student at once."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")

from distill_core.data.dataset import draw
from distill_core.diffusion.conditioning import Label
from distill_core.diffusion.pipelines import FluxDenoiser, from_patches, patches
from distill_core.lora.layers import WithoutLora
from distill_core.networks.name_map import NameMap
from distill_core.networks.transformers.architecture import FAMILIES, Transformer
from distill_core.networks.transformers.flux_spelling import to_comfyui, to_diffusers
from distill_core.pruning.plan import name_map
from distill_core.pruning.plan_text import read_plan
from distill_core.training.base_memory import Base, on_meta
from distill_core.training.local import hidden_states, local_terms
from distill_core.training.loop import distill
from distill_core.training.losses import FEATURE_LOSSES
from distill_core.training.memory import MemorySettings
from distill_core.training.run import Run
from distill_core.training.settings import TrainingSettings

PLAN = "fold double 1-2 single 1-3"


def small_flux(doubles=4, singles=5):
    """A Flux.1 with random weights, and pictures to teach it on."""
    from diffusers import FluxTransformer2DModel

    from distill_core.networks.model_sampling import FLOW, ModelSampling

    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=doubles, num_single_layers=singles, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    for weight in network.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    sampling = ModelSampling(prediction="flow", noise=FLOW)
    shapes = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    transformer = Transformer(FAMILIES["flux1"].in_diffusers, shapes)
    from distill_core.diffusion.schedule import of_sampling

    return FluxDenoiser(
        network=network.eval().requires_grad_(False), architecture=None, sampling=sampling,
        noise_levels=of_sampling(sampling), transformer=transformer,
    )  # fmt: skip


def cut(base, plan=PLAN):
    return replace(base, mapping=name_map(base.transformer, read_plan(plan, base.transformer)))


def pictures():
    from distill_core.data.dataset import Bucket, LatentDataset
    from distill_core.diffusion.conditioning import Caption

    random = torch.Generator().manual_seed(0)
    latents, contexts = torch.randn(8, 4, 4, 4, generator=random), torch.randn(8, 3, 8, generator=random)
    bucket = Bucket(latents=latents, contexts=contexts, pooled=contexts.mean(1), sizes=torch.zeros(8, 6))
    return LatentDataset([bucket], Caption(torch.zeros(3, 8), torch.zeros(8)))


def asked():
    random = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 4, 4, generator=random), torch.randn(2, 3, 8, generator=random)
    return x, torch.tensor([100, 800]), context, Label(context.mean(1), torch.zeros(2, 6))


def heal(base, folder, **settings):
    how = dict(objective="output", total_steps=8, batch_size=4, lora_rank=4, lora_targets=("*",), learning_rate=1e-2)
    run = Run(folder, TrainingSettings(**how | settings))
    distill(run, student=cut(base), teacher=WithoutLora(base), plan=None, dataset=pictures())
    return run


def fell(rows, term):
    first, last = (sum(row[term] for row in part) for part in (rows[:5], rows[-5:]))
    return last < 0.8 * first


def test_patches_are_put_together_again():
    latents = torch.randn(2, 4, 6, 8)
    assert patches(latents).shape == (2, 12, 16)
    assert torch.equal(patches(latents)[0, 5], latents[0, :, 2:4, 2:4].flatten())  # second row, second column
    assert torch.equal(from_patches(patches(latents), 6, 8), latents)


def test_both_spellings_hold_the_same_weights():
    base = small_flux()
    theirs = base.network.state_dict()
    ours = to_comfyui(theirs)
    assert Transformer.find({name: tuple(weight.shape) for name, weight in ours.items()})[0].depths == {"double": 4, "single": 5}
    back = to_diffusers(ours, {name: tuple(weight.shape) for name, weight in theirs.items()})
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="has no guidance"):
        to_comfyui(theirs | {"guidance": torch.zeros(1)})
    with pytest.raises(ValueError, match="has no guidance"):
        to_diffusers(ours | {"guidance": torch.zeros(1)}, {name: tuple(weight.shape) for name, weight in theirs.items()})


def test_a_student_is_its_teacher_with_blocks_skipped():
    base = small_flux()
    student, alone = cut(base), small_flux(3, 3)
    alone.network.load_state_dict(student.mapping.apply(base.network.state_dict()))
    assert torch.equal(student(*asked()), alone(*asked())) and not torch.equal(student(*asked()), base(*asked()))


def test_local_terms_are_those_of_a_plain_computation():
    base = small_flux()
    student = cut(base)
    assert student.runs == {
        "transformer_blocks.1": ("transformer_blocks.1", "transformer_blocks.2"),
        "single_transformer_blocks.2": ("single_transformer_blocks.1", "single_transformer_blocks.3"),
    }
    terms = local_terms(student, base, asked(), "directions", torch.autocast("cpu", enabled=False))
    with torch.no_grad(), hidden_states(base, student.runs) as seen:
        base(*asked())
    for block, hidden in seen.items():
        answer = student.module(block)(*hidden.args, **hidden.named)
        far = []
        for ours, theirs in zip(answer, hidden.output, strict=True):
            ours, theirs = (stream / stream.norm(dim=-1, keepdim=True) for stream in (ours, theirs))
            far.append((ours - theirs).square().sum(-1).mean(1))
        torch.testing.assert_close(terms[f"local/{block}"], (far[0] + far[1]) / 2)
    assert terms.keys() == {f"local/{block}" for block in student.runs}


def test_losses_of_hidden_states():
    ours, theirs = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    far = 2 - 2 * torch.cosine_similarity(ours, theirs, dim=-1).mean(1)
    torch.testing.assert_close(FEATURE_LOSSES["directions"](ours, theirs), far)
    torch.testing.assert_close(FEATURE_LOSSES["directions"](7 * ours, theirs), far)


def test_folded_blocks_learn_alone_and_then_the_student_as_a_whole(tmp_path):
    base = small_flux()
    before = {name: weight.clone() for name, weight in base.network.state_dict().items()}
    local = heal(
        base, tmp_path / "local", objective="local", total_steps=60, lora_targets=tuple(f"{b}.*" for b in cut(base).runs)
    )
    rows = local.metrics()
    assert fell(rows, "local") and "output" not in rows[0]
    touched = {key.rsplit(".lora", 1)[0] for key in load_file(local.result_file)}
    assert {name.split(".")[1] + name.split(".")[2] for name in touched} == {"transformer_blocks1", "single_transformer_blocks1"}
    after = {name.replace(".base_layer", ""): weight for name, weight in base.network.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)

    both = heal(small_flux(), tmp_path / "both", local_steps=3).metrics()
    assert ["local" in row for row in both] == [True] * 3 + [False] * 5
    assert ["output" in row for row in both] == [False] * 3 + [True] * 5


def test_no_block_that_is_skipped_has_a_lora(tmp_path):
    """The last layer is called as one of every single block is."""
    base = small_flux()
    heal(base, tmp_path / "run", total_steps=1)
    changed = {name.split(".lora_")[0] for name, _ in base.network.named_parameters() if ".lora_" in name}
    assert {"proj_out", "single_transformer_blocks.0.proj_out"} <= changed
    assert not [name for name in changed if ".".join(name.split(".")[:2]) in cut(base).mapping.removed]


FEW = {"phases": 2, "solver_steps": 4, "fake_warmup_steps": 0, "fake_updates": 1, "anchor_steps": 1}
WAYS = {
    "local first": {"local_steps": 4},
    "local": {"objective": "local"},
    "output": {},
    "an average, and another scale": {"lora_alpha": 3.0, "ema_decay": 0.9},
    "local, then consistency": {"local_steps": 4, "objective": "consistency", **FEW},
    "local, consistency, then dmd": {"local_steps": 2, "consistency_steps": 5, "objective": "dmd", **FEW},
}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_stopped_and_resumed_it_is_as_if_nothing_had_happened(tmp_path, how):
    whole = heal(small_flux(), tmp_path / "whole", **how)

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    base, settings = small_flux(), whole.settings
    with pytest.raises(KeyboardInterrupt):
        parts = Run(tmp_path / "parts", settings)
        distill(parts, student=cut(base), teacher=WithoutLora(base), plan=None, dataset=pictures(), on_step=stop)
    base = small_flux()
    distill(Run(tmp_path / "parts", settings), student=cut(base), teacher=WithoutLora(base), plan=None, dataset=pictures())
    ours, theirs = (load_file(Run(tmp_path / name, settings).result_file) for name in ("whole", "parts"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "whole" / "metrics.csv").read_text() == (tmp_path / "parts" / "metrics.csv").read_text()


def test_checkpointing_changes_nothing(tmp_path):
    plain, again = (
        load_file(heal(small_flux(), tmp_path / str(on), local_steps=4, gradient_checkpointing=on).result_file)
        for on in (False, True)
    )
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_a_whole_student_is_distilled_from_its_teacher(tmp_path):
    base, student = small_flux(), small_flux(3, 3)
    student.network.load_state_dict(cut(base).mapping.apply(base.network.state_dict()))
    run = Run(tmp_path / "run", TrainingSettings(objective="output", total_steps=30, batch_size=4, learning_rate=3e-3))
    distill(run, student=student, teacher=base, plan=None, dataset=pictures())
    assert fell(run.metrics(), "output")
    saved = load_file(run.result_file)
    assert all(torch.equal(saved[name], weight) for name, weight in student.network.state_dict().items())


def test_hidden_states_are_compared_after_every_block_that_stays(tmp_path):
    base = small_flux()
    student = cut(base)
    assert student.kept_blocks == {
        "transformer_blocks.0": "transformer_blocks.0",
        "transformer_blocks.2": "transformer_blocks.1",  # the end of the run it stands for
        "transformer_blocks.3": "transformer_blocks.3",
        "single_transformer_blocks.0": "single_transformer_blocks.0",
        "single_transformer_blocks.3": "single_transformer_blocks.2",
        "single_transformer_blocks.4": "single_transformer_blocks.4",
    }
    alone = small_flux(3, 3)
    alone.network.load_state_dict(student.mapping.apply(base.network.state_dict()))
    made = {}
    for of, denoiser, blocks in (("teacher", base, student.kept_blocks), ("student", alone, student.mapping.table)):
        for block in blocks if of == "teacher" else (block for block in student.mapping.table if "blocks" in block):
            own = block if of == "teacher" else student.mapping.table[block]
            denoiser.network.get_submodule(own).register_forward_hook(
                lambda module, args, output, key=(of, block): made.update({key: torch.cat(output, 1)})
            )
    run = heal(small_flux(), tmp_path / "run", objective="blocks", total_steps=1, caption_dropout=0.0, accumulation_steps=1)
    (row,) = run.metrics()
    batch = draw(pictures(), 0, base.schedule, run.settings.batching)
    with torch.no_grad():
        answers = [denoiser(batch.x_t, batch.t, batch.context, batch.label) for denoiser in (base, alone)]
    expected = {}
    for theirs, ours in student.kept_blocks.items():
        there, here = made["teacher", theirs], made["student", ours]
        square = there.square().flatten(1).mean(1)
        expected[f"feature/{ours}"] = ((here - there).square().flatten(1).mean(1) / square).mean().item()
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-9), name
    output = (answers[0] - answers[1]).square().mean().item()
    assert row["output"] == pytest.approx(output, rel=1e-4)
    assert row["total"] == pytest.approx(output + 0.1 * sum(expected.values()), rel=1e-4)


def test_the_forecast_counts_weights_exactly_and_says_what_saves_memory():
    base = small_flux()
    mapping, held = cut(base).mapping, sum(weight.nbytes for weight in base.network.parameters())

    def empty():
        empty = small_flux()
        for module in empty.network.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, on_meta(weight))
        return empty

    def total(**settings):
        how = dict(objective="output", batch_size=64, lora_rank=4, lora_targets=("*",)) | settings
        asked = MemorySettings(training=TrainingSettings(**how), shares_base=True, device="cpu")
        return Base(empty, mapping, held, (3, 8), 8).forecast(asked, (4, 16, 16))

    plain = total()
    linears = (
        module
        for path, module in base.network.named_modules()
        if isinstance(module, torch.nn.Linear) and ".".join(path.split(".")[:2]) not in mapping.removed
    )
    counted = held + 4 * sum(4 * (linear.in_features + linear.out_features) for linear in linears)
    assert dict(plain.parts)["student weights"] == counted
    assert total(gradient_checkpointing=True).total_bytes < 0.6 * plain.total_bytes < total(objective="blocks").total_bytes
    assert total(objective="local").moment == "a local step" and total(objective="local").total_bytes < plain.total_bytes
    assert total(local_steps=3).total_bytes == plain.total_bytes
    assert "gradient_checkpointing on" in plain.describe_shortage(plain.total_bytes // 2)


def test_objectives_of_unets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="objective ssd-1b compares layers of UNets; for a transformer choose blocks"):
        heal(small_flux(), tmp_path / "run", objective="ssd-1b")


def test_what_folds_nothing_cannot_learn_locally(tmp_path):
    for number, how in enumerate(({"objective": "local"}, {"objective": "output", "local_steps": 2})):
        base = small_flux()
        student = cut(base, "keep double 0,3 single 0,4")
        run = Run(tmp_path / str(number), TrainingSettings(total_steps=4, batch_size=4, lora_rank=4, lora_targets=("*",), **how))
        with pytest.raises(ValueError, match="folds no run of blocks"):
            distill(run, student=student, teacher=WithoutLora(base), plan=None, dataset=pictures())
        assert student.runs == {} and NameMap.identity(base.transformer).folded == {}
