"""Training runs in a running ComfyUI: every input of Distill Train Step and Distillation Recipe, crashes, and teacher-made data."""

import time

import pytest
import tomllib
import torch
from safetensors.torch import load_file, save_file

from distill_core.base.storage import read_header
from distill_core.data.cache import CachedDataset
from distill_core.data.dataset import Batching, Bucket, LatentDataset, draw
from distill_core.demo.autoencoder import ScenesAutoencoder
from distill_core.demo.grammar import random_scenes
from distill_core.demo.judge import ScenesJudge
from distill_core.demo.teacher import load_dataset
from distill_core.demo.text import ScenesTextEncoder
from distill_core.diffusion.conditioning import Caption
from distill_core.networks.files import open_unet
from distill_core.pruning.plan import preset
from distill_core.pruning.prune import prune_file

from .. import comfyui, standins
from .graphs import PROMPT, lora, newest, recipe, remapped, rows, same, save, teacher_data, train, trained, until

STILL = {"learning_rate": 1e-8, "lr_schedule": "constant"}  # the student stays what it is, so that losses can be compared
WHOLE = {"total_steps": 24, "steps_per_queue": 24, "save_every_steps": 4}


def final(folder, step):
    return load_file(folder / "checkpoints" / f"{step:08d}" / "student.safetensors")


@pytest.fixture(scope="module")
def patched(server):
    """A LoRA on the demo's teacher, as a graph that makes the node ``patched``."""
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = lora("diffusers", "_", "lora_unet_", "lora")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "for training.safetensors")
    inputs = {"model": ["teacher", 0], "lora_name": "for training.safetensors", "strength_model": 2.0}
    return {"patched": {"class_type": "LoraLoaderModelOnly", "inputs": inputs}}


# --- the recipe


def test_the_recipe_reaches_the_run(server):
    settings = {"weighting": "min-snr", "snr_gamma": 3.0, "optimizer": "adafactor", "ema_decay": 0.9, "precision": "bf16",
                "gradient_checkpointing": True, "accumulation_steps": 2, "teacher_mode": "mixture", "validate_every_steps": 1,
                "validation_share": 0.25, "timesteps": "logit-normal", "noise_offset": 0.05, "input_perturbation": 0.1,
                "weight_decay": 0.02, "max_grad_norm": 0.5, "keep_checkpoints": 3, "keep_best": 1, "output_weight": 0.25}  # fmt: skip
    folder, _ = trained(server, "settings", {"recipe": recipe(**settings)}, recipe=["recipe", 0], total_steps=2)
    written = tomllib.loads((folder / "recipe.toml").read_text())
    assert {name: written[name] for name in settings} == settings
    assert "task_weight" not in written and written["trackers"] == [] and written["teacher_shares"] == []
    assert [row["step"] for row in rows(folder) if "validation" in row] == [1, 2]


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"accumulation_steps": 3}, "cannot be split into 3 equal parts"),
        ({"teacher_shares": "a half"}, "teacher_shares must be numbers such as 2, 1, 1"),
        ({"teacher_shares": "1, 2"}, "there are 1 teachers"),
        ({"keep_best": 1}, "keep_best needs a validation loss"),
        ({"precision": "fp16", "weight_dtype": "bf16"}, "set precision to bf16"),
        ({"task_weight": 0.0, "output_weight": 0.0, "feature_weight": 0.0}, "at least one loss with a weight above 0"),
        ({"sample_every_steps": 1}, "need a VAE"),
    ],
)
def test_settings_that_do_not_go_together_are_one_clear_sentence(settings, message, server):
    few = {"latents": ["noise", 0], "captions": ["prompt", 0]}  # ComfyUI writes what it was given into its report of an error
    node = train("refused", recipe=["recipe", 0], **few)
    result = server.run({**PROMPT, "recipe": recipe(**settings), "train": node, "x": save(["train", 0], "x")})
    assert message in result.error and "\n" not in result.error


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_trained_in_half_precision(precision, server):
    nodes = {"recipe": recipe(precision=precision, weight_dtype="bf16", optimizer="adafactor")}
    folder, _ = trained(server, f"bf16 weights {precision}", nodes, recipe=["recipe", 0], total_steps=12, steps_per_queue=12)
    assert {weight.dtype for weight in final(folder, 12).values()} == {torch.bfloat16}
    losses = [row["total"] for row in rows(folder)]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_a_fresh_student_is_refitted_and_a_trained_one_is_not(server):
    def start(name, student=("prune", 0), **refit):
        node = train(f"start {name}", **STILL | {"total_steps": 1, "batch_size": 32, "student": [*student]})
        del node["inputs"]["refit_examples"]
        node["inputs"] |= refit
        return node

    nodes = {
        "pruned": start("pruned", refit_examples=0),
        "refitted": start("refitted", refit_examples=64),
        "default": start("default"),
        "again": start("again", student=("refitted", 0), refit_examples=64),
    }
    result = server.run({**PROMPT, **nodes, **{f"save {name}": save([name, 0], "x") for name in nodes}})
    assert result.succeeded, result.error
    folders = {name: server.output / "distill_runs" / f"start {name}" for name in nodes}
    weights = {name: final(folder, 1) for name, folder in folders.items()}

    def changed(one, other):
        return {name for name in weights[one] if not torch.allclose(weights[one][name], weights[other][name], rtol=0, atol=1e-6)}

    layers = {name.rpartition(".")[0] for name in changed("pruned", "refitted")}
    assert len(layers) == 6 and {layer.rpartition(".")[2] for layer in layers} == {"proj_out", "3"}  # of attentions and resnets
    assert changed("refitted", "default") == changed("pruned", "refitted")  # by more examples
    assert not changed("refitted", "again")
    before, after = (rows(folders[name])[0]["output"] for name in ("pruned", "refitted"))
    assert after < 0.6 * before


def test_sample_images_are_drawn_while_it_trains(server):
    import numpy as np
    from PIL import Image

    nodes = {"recipe": recipe(sample_every_steps=2)}
    folder, _ = trained(server, "samples", nodes, recipe=["recipe", 0], vae=["teacher", 2], total_steps=4, steps_per_queue=4)
    pictures = sorted((folder / "samples").iterdir())
    assert [picture.name for picture in pictures] == ["00000002.png", "00000004.png"]
    first, second = (np.asarray(Image.open(picture).convert("L")).astype(float) for picture in pictures)
    changed = np.abs(first - second).max(1) > 0
    height = len(first)
    assert first.std() > 20 and not changed[: height // 2].any() and changed[height // 2 :].any()  # above is the teacher


@pytest.mark.parametrize(
    "connected,steps",
    [({"vae": ["teacher", 2]}, [2, 4, 6, 8, 10]), ({"vae": ["teacher", 2], "null_caption": None}, []), ({}, [])],
    ids=["all they need", "no null_caption", "no vae"],
)
def test_without_a_recipe_samples_are_drawn_if_what_they_need_is_connected(connected, steps, server):
    inputs = {name: value for name, value in connected.items() if value}
    prompt = {**PROMPT, "train": train(f"unasked {len(connected)}", total_steps=10, steps_per_queue=10, **inputs)}
    if connected.get("null_caption", True) is None:
        del prompt["train"]["inputs"]["null_caption"]
    result = server.run({**prompt, "show": {"class_type": "PreviewAny", "inputs": {"source": ["train", 3]}}})
    assert result.succeeded, result.error
    drawn = (server.output / "distill_runs" / f"unasked {len(connected)}" / "samples").glob("*.png")
    assert [int(picture.stem) for picture in sorted(drawn)] == steps


# --- teachers and students with patches


@pytest.fixture(scope="module")
def single(server, patched):
    """Losses of a student that stands still, by the teacher as it is and by the teacher with a LoRA."""
    return [
        rows(trained(server, f"by {teacher}", patched, teacher=[teacher, 0], total_steps=6, steps_per_queue=6, **STILL)[0])
        for teacher in ("teacher", "patched")
    ]


def test_a_lora_on_the_teacher_is_learnt(single):
    for plain, patched in zip(*single, strict=True):
        assert plain["task"] == pytest.approx(patched["task"], rel=1e-5)
        assert plain["output"] != pytest.approx(patched["output"], rel=1e-3)


@pytest.mark.parametrize("mode,shares,expected", [("sequence", "1, 2", [0, 0, 1, 1, 1, 1]), ("mixture", "", [0, 1, 1, 1, 0, 1])])
def test_each_step_learns_from_its_teacher(mode, shares, expected, single, patched, server):
    """Both MODELs share one network, on which ComfyUI puts and takes off the LoRA."""
    nodes = {**patched, "recipe": recipe(teacher_mode=mode, teacher_shares=shares)}
    inputs = {"teacher_2": ["patched", 0], "recipe": ["recipe", 0], "total_steps": 6, "steps_per_queue": 6, **STILL}
    folder, _ = trained(server, mode, nodes, **inputs)
    measured = rows(folder)
    assert [row["teacher"] for row in measured] == expected
    for step, (row, teacher) in enumerate(zip(measured, expected, strict=True)):
        assert row["output"] == pytest.approx(single[teacher][step]["output"], rel=1e-5)


def test_a_student_with_a_lora_is_trained_from_its_patched_weights(server, patched):
    nodes = {"remap": remapped("for training.safetensors", strength_model=0.7), "kept": save(["remap", 0], "patched student"),
             "plain": save(["prune", 0], "plain student")}  # fmt: skip
    folder, _ = trained(server, "patched student", nodes, student=["remap", 0], total_steps=1, **STILL)
    after = final(folder, 1)
    patched_student, plain = (load_file(newest(server, f"{who} student_*.safetensors")) for who in ("patched", "plain"))
    assert after.keys() == patched_student.keys()
    for name, weight in after.items():
        torch.testing.assert_close(weight, patched_student[name], rtol=0, atol=1e-6)
    assert any((after[name] - plain[name]).abs().max() > 1e-2 for name in after)


# --- crashes and empty caches


@pytest.fixture(scope="module")
def uninterrupted(server):
    return final(trained(server, "uninterrupted", **WHOLE)[0], 24)


def test_killed_in_the_middle_a_run_comes_to_the_same(uninterrupted, server, comfyui_path, tmp_path):
    """The server that goes on is another than the one that was killed; all they share is the run's folder."""
    with comfyui.Server(comfyui_path, comfyui.python(comfyui_path), tmp_path / "comfyui") as killed:
        folder = killed.output / "distill_runs" / "killed"
        killed.queue({**PROMPT, "train": train("killed", **WHOLE), "s": save(["train", 0], "killed")})
        until(lambda: (folder / "checkpoints" / "00000008").exists(), "no checkpoint was written")
        until(lambda: (folder / "metrics.csv").read_text().count("\n") > 10, "no step after the checkpoint was done")
        killed.process.kill()
        killed.process.wait()
    lost = rows(folder)
    assert 9 < len(lost) < 24 and not list(killed.output.glob("killed_*"))
    folder.rename(server.output / "distill_runs" / "killed")
    folder, _ = trained(server, "killed", **WHOLE)
    assert same(final(folder, 24), uninterrupted)
    assert [row["step"] for row in rows(folder)] == list(range(1, 25))


def empty_memory(server):
    """Until nothing is remembered: ComfyUI overlooks the request while it tidies up after a prompt."""
    keep = {"class_type": "SaveLatent", "inputs": {"samples": ["noise", 0], "filename_prefix": "forgotten"}}
    probe = {"noise": {"class_type": "EmptyLatentImage", "inputs": {"width": 72, "height": 64, "batch_size": 1}}, "keep": keep}
    server.run(probe)
    for _ in range(20):
        server.post("free", {"unload_models": True, "free_memory": True})
        time.sleep(1)
        if "noise" not in server.run(probe).cached:
            return
    raise AssertionError("ComfyUI forgot nothing")


def test_a_run_goes_on_after_comfyui_emptied_its_memory(uninterrupted, server):
    half = WHOLE | {"steps_per_queue": 12}
    trained(server, "evicted", **half)
    empty_memory(server)
    folder, result = trained(server, "evicted", **half)
    assert not {"teacher", "prune"} & result.cached and same(final(folder, 24), uninterrupted)
    # Complete, it answers from its folder, whatever was forgotten.
    empty_memory(server)
    before = (folder / "metrics.csv").stat().st_mtime_ns
    assert "train" not in trained(server, "evicted", **half)[1].cached
    assert (folder / "metrics.csv").stat().st_mtime_ns == before


# --- data


def stored(server, name, latents, conditioning):
    """A dataset for the stock Load Training Dataset."""
    folder = server.base / "datasets" / name
    folder.mkdir(parents=True)
    torch.save({"latents": latents, "conditioning": conditioning}, folder / "shard_0000.pkl")
    (folder / "metadata.json").write_text("{}")
    return {"data": {"class_type": "LoadTrainingDataset", "inputs": {"folder_name": name}}}


def test_latents_of_several_sizes_are_trained_in_buckets(server):
    (bucket,) = load_dataset().buckets
    square, captions = bucket.latents[:5].clone(), bucket.contexts[:8].clone()
    wide = torch.cat([bucket.latents[5:8], bucket.latents[8:11]], 3)
    latents = [{"samples": latent[None]} for latent in [*square[:2], *wide, *square[2:]]]
    conditioning = [[[captions[i : i + 1], {}]] for i in range(8)]
    nodes = stored(server, "two sizes", latents, conditioning)
    nodes["sorted"] = {"class_type": "ResolutionBucket", "inputs": {"latents": ["data", 0], "conditioning": ["data", 1]}}
    (null,) = ScenesTextEncoder.bundled().captions([""])
    expected = LatentDataset(
        [Bucket(latents=square, contexts=captions[[0, 1, 5, 6, 7]]), Bucket(latents=wide, contexts=captions[2:5])], Caption(null)
    )
    for name in ("data", "sorted"):
        inputs = {"latents": [name, 0], "captions": [name, 1], "total_steps": 4, "steps_per_queue": 4, "batch_size": 2}
        folder, _ = trained(server, f"two sizes {name}", nodes, **inputs)
        assert tomllib.loads((folder / "recipe.toml").read_text())["inputs"]["data"] == expected.fingerprint
        assert len(rows(folder)) == 4


def test_sdxl_is_trained_with_its_labels(server):
    """SDXL with narrow lower levels, which ComfyUI knows all the same: losses are those of the network in diffusers."""
    teacher = server.base / "models" / "diffusion_models" / "narrow_sdxl.safetensors"
    teacher.parent.mkdir(parents=True, exist_ok=True)
    save_file(standins.unet(standins.narrow_sdxl()), teacher)
    random = torch.Generator().manual_seed(1)
    latents, contexts, pooled = (torch.randn(2, *shape, generator=random) for shape in ((4, 8, 8), (7, 2048), (1280,)))
    told = {"height": 1024, "width": 768, "crop_h": 16, "crop_w": 8, "target_height": 512, "target_width": 640}
    conditioning = [[[contexts[i : i + 1], {"pooled_output": pooled[i : i + 1], **(told if i else {})}]] for i in range(2)]
    nodes = stored(server, "sdxl", [{"samples": latents}], conditioning)
    nodes |= {
        "teacher": {"class_type": "UNETLoader", "inputs": {"unet_name": teacher.name, "weight_dtype": "default"}},
        "prune": {"class_type": "DistillPruneUNetBlocks", "inputs": {"model": ["teacher", 0], "preset": "koala-700m"}},
    }
    inputs = train("sdxl", latents=["data", 0], captions=["data", 1], objective="koala", total_steps=1, batch_size=2)
    del inputs["inputs"]["null_caption"]
    result = server.run({**nodes, "train": inputs, "image": {"class_type": "PreviewImage", "inputs": {"images": ["train", 2]}}})
    assert result.succeeded, result.error
    (row,) = rows(server.output / "distill_runs" / "sdxl")

    scaled = latents * 0.13025  # SDXL's latents as the network sees them
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64], list(told.values())], dtype=torch.float32)
    data = LatentDataset([Bucket(latents=scaled, contexts=contexts, pooled=pooled, sizes=sizes)])
    student = server.base / "student.safetensors"
    prune_file(open_unet(teacher), student, preset("koala-700m"))
    answers = {}
    for who, path in (("teacher", teacher), ("student", student)):
        denoiser = in_diffusers(path)
        batch = draw(data, 0, denoiser.schedule, Batching(batch_size=2, seed=0))
        with torch.no_grad():
            answers[who] = denoiser(batch.x_t, batch.t, batch.context, batch.label)
    assert row["task"] == pytest.approx((answers["student"] - batch.eps).square().mean().item(), rel=1e-3)
    assert row["output"] == pytest.approx((answers["student"] - answers["teacher"]).square().mean().item(), rel=1e-3)


def in_diffusers(path):
    from distill_core.diffusion.denoiser import DiffusersDenoiser
    from distill_core.networks.build import load_unet

    file = open_unet(path)
    return DiffusersDenoiser(network=load_unet(file, torch.float32), architecture=file.architecture, sampling=file.sampling)


# --- data made by the teacher


def test_the_teacher_draws_what_is_asked_for_and_the_student_learns_from_it(server):
    scenes = random_scenes(10, 5)
    prompts = "\n\n".join(f"{scene.caption} " for scene in scenes)
    nodes = {
        "data": teacher_data("scenes", prompts=prompts, images_per_prompt=2, steps=12, guidance=3.0, batch_size=10),
        "keep": {"class_type": "SaveLatent", "inputs": {"samples": ["data", 0], "filename_prefix": "made"}},
    }
    data = {"latents": ["data", 0], "captions": ["data", 1], "null_caption": ["data", 2]}
    folder, _ = trained(server, "made", nodes, **data, total_steps=2)
    made = [load_file(path)["latent_tensor"] for path in sorted(server.output.glob("made_*.latent"))]
    pictures = ScenesAutoencoder.bundled().decode(torch.cat(made)).clamp(-1, 1)
    assert ScenesJudge.bundled().agrees(pictures, [scene for scene in scenes for _ in range(2)]).float().mean() >= 0.9
    assert CachedDataset.open(server.output / "distill_data" / "scenes").bucket_sizes == [20]
    assert len(rows(folder)) == 2


def test_the_student_learns_from_the_teachers_trajectories(server):
    nodes = {"data": teacher_data("trajectories", images_per_prompt=3, trajectory_states=2)}
    data = {"latents": ["data", 0], "captions": ["data", 1], "null_caption": ["data", 2]}
    folder, _ = trained(server, "trajectories", nodes, **data, total_steps=4, steps_per_queue=4)
    measured = {name for row in rows(folder) for name in row if name.startswith("timesteps/")}
    assert measured == {"timesteps/900-999", "timesteps/400-499"}  # 999 and 499, the first and third of four sampler steps


@pytest.mark.parametrize("node", [
    {"class_type": "LatentFlip", "inputs": {"samples": ["data", 0], "flip_method": "y-axis: horizontally"}},
    {"class_type": "RepeatLatentBatch", "inputs": {"samples": ["data", 0], "amount": 2}},
], ids=["flipped", "repeated"])  # fmt: skip
def test_trajectories_of_other_latents_are_refused(node, server):
    """Stock nodes change the samples alone."""
    data = teacher_data("trajectories", images_per_prompt=3, trajectory_states=2)
    given = {"latents": ["changed", 0], "captions": ["prompt", 0], "null_caption": ["data", 2], "total_steps": 1}
    result = server.run(
        {**PROMPT, "data": data, "changed": node, "train": train("changed", **given), "x": save(["train", 0], "x")}
    )
    assert "the latents have trajectories, but another node changed them" in result.error


def test_cancelled_it_keeps_what_was_made_and_goes_on(server):
    folder = server.output / "distill_data" / "drawing_cancelled"

    def pictures():
        shapes = [(file, tensor.shape) for file in folder.glob("shard-*") for tensor in read_header(file).tensors.values()]
        return [file for file, shape in shapes if shape == (4, 8, 8)]

    def prompt(num):
        data = teacher_data("drawing_cancelled", images_per_prompt=num, steps=20, batch_size=2)
        keep = {"class_type": "SaveLatent", "inputs": {"samples": ["data", 0], "filename_prefix": "drawing_cancelled"}}
        return {**PROMPT, "data": data, "keep": keep}

    prompt_id = server.queue(prompt(500))
    until(lambda: len(pictures()) >= 4, "no picture was made")
    server.post("interrupt", {})
    assert server.wait(prompt_id).interrupted
    made = pictures()
    assert 4 <= len(made) < 100 and len(made) % 2 == 0
    written = {file: file.stat().st_mtime_ns for file in made}
    result = server.run(prompt(len(made) // 2 + 1))
    assert result.succeeded, result.error
    again = pictures()
    assert len(again) == len(made) + 2 and all(file.stat().st_mtime_ns == when for file, when in written.items())
    assert len(list(server.output.glob("drawing_cancelled_*.latent"))) == len(again)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"prompts": "\n  \n"}, "there are no prompts"),
        ({"name": "../evil"}, "name '../evil' must be a plain name"),
        ({"trajectory_states": 9}, "num_states must be between 0 and the 4 sampler steps, got 9"),
        ({"images_per_prompt": ["billion", 0]}, "num_per_prompt must be between 1 and 10,000,000, got 1,000,000,000"),
        ({"batch_size": ["billion", 0]}, "batch_size must be between 1 and 65,536, got 1,000,000,000"),
        ({"width": ["billion", 0]}, "width must be between 8 and 16,384, got 1,000,000,000"),
    ],
)
def test_data_that_cannot_be_made_is_one_clear_sentence(changes, message, server):
    keep = {"class_type": "SaveLatent", "inputs": {"samples": ["data", 0], "filename_prefix": "x"}}
    billion = {"class_type": "PrimitiveInt", "inputs": {"value": 10**9}}  # a link passes the widget's bounds by
    result = server.run({**PROMPT, "billion": billion, "data": teacher_data("refused", **changes), "keep": keep})
    assert message in result.error and "\n" not in result.error
    assert not (server.output / "distill_data" / "refused").exists()
