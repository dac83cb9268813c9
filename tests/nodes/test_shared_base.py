"""Shared-Base LoRA: one network that is teacher and student, of any family, in ComfyUI."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from distill_core.base.storage import read_header
from distill_core.demo.teacher import load_denoiser, teacher_file
from distill_core.demo.text import ScenesTextEncoder
from distill_core.diffusion.sampling import sample
from distill_core.lora.layers import attach

from .graphs import PROMPT, newest, recipe, rows, sampled, teacher_data, until

BAKE = {
    "model": ["teacher", 0], "captions": ["teacher", 4], "null_caption": ["empty", 0], "latents": ["teacher", 3],
    "total_steps": 6, "objective": "guidance", "phases": 4, "guidance": 3.0, "rank": 4, "steps_per_queue": 6, "batch_size": 4, "learning_rate": 1e-2,
    "lr_schedule": "constant", "seed": 0, "width": 64, "height": 64, "images_per_caption": 1, "sampler_steps": 4,
    "trajectory_states": 2, "guidance_min": 0.0, "alpha": 0.0, "layers": "*attn*", "warmup_steps": 0, "save_every_steps": 100,
}  # fmt: skip


def bake(run_name, without=(), **changes):
    inputs = {name: value for name, value in (BAKE | {"run_name": run_name} | changes).items() if name not in without}
    return {"class_type": "DistillSharedBaseLoRA", "inputs": inputs}


def baked(server, run_name, nodes=(), **changes):
    """Queue a run; returns its folder, and what came of it."""
    keep = {"class_type": "SaveLoRA", "inputs": {"lora": ["bake", 0], "prefix": f"loras/{run_name}"}}
    shown = sampled(["bake", 1], run_name, cfg=1.0)
    result = server.run({**PROMPT, "bake": bake(run_name, **changes), "keep": keep, **shown, **dict(nodes)})
    assert result.succeeded, result.error
    return server.output / "distill_runs" / run_name, result


def drawn(server, prefix):
    return load_file(newest(server, f"{prefix}_*.latent"))["latent_tensor"]


def by_the_model(server, number):
    """What the demo's teacher draws at cfg 1; another number is drawn anew, of the same empty latent."""
    empty = {"class_type": "LatentMultiply", "inputs": {"samples": ["noise", 0], "multiplier": number}}
    result = server.run(
        {**PROMPT, "empty latent": empty, **sampled(["teacher", 0], "lora plain", cfg=1.0, latent_image=["empty latent", 0])}
    )
    assert result.succeeded and "sample lora plain" not in result.cached, result.error
    return drawn(server, "lora plain")


@pytest.fixture(scope="module")
def plain(server):
    """What it draws before anything is trained."""
    return by_the_model(server, 1.0)


def check(told, tolerance):
    assert told["stock"] < tolerance and told["merged"] < tolerance < told["change"]
    assert told["teacher"] == told["model"] == 0 and told["copied"] == told["not loaded"] == 0
    assert not told.get("without gradient") and told.get("slope", 1) == pytest.approx(1, abs=0.02)


def test_small_models_of_several_families_are_their_own_teachers(found):
    told = found("sharing.small")
    families = told["families"]
    assert {name: (told["kind"], told["prediction"]) for name, told in families.items()} == {
        "demo": ("BaseModel", "eps"), "sd3": ("SD3", "flow"), "fp8": ("SD3", "flow"), "flux": ("Flux", "flow"),
        "demo as dora": ("BaseModel", "eps"), "sd3 as dora": ("SD3", "flow"), "flux cut": ("Flux", "flow"),
        "flux.2 cut": ("Flux2", "flow"), "qwen-image cut": ("QwenImage", "flow"), "sd3 cut": ("SD3", "flow")}  # fmt: skip
    assert [name for name in families if "slope" not in families[name]] == ["demo as dora", "sd3 as dora"]
    again = {name: (told["checkpointing"], told["computes"]) for name, told in families.items()}
    assert set(again.values()) == {(0, 2)}, again  # exact, and computed twice
    cut = [name for name in families if name.endswith(" cut")]
    assert len(cut) == 4 and all((told["cut"] > 0.1) == (name in cut) for name, told in families.items())
    assert families["fp8"]["merged"] < 0.1  # merged weights are rounded to 8 bits
    families["fp8"]["merged"] = 0
    no_gradient = {name: told.pop("without gradient") for name, told in families.items()}
    of_text = no_gradient.pop("qwen-image cut")  # of its last block, whose text nobody reads
    assert not any(no_gradient.values()) and {name.rsplit(".", 1)[0] for name in of_text} == {
        f"transformer_blocks.4.attn.{layer}" for layer in ("add_q_proj", "to_add_out")
    }
    for told in families.values():
        check(told, 1e-5)


def test_the_model_with_the_lora_draws_otherwise_and_the_model_itself_stays(plain, server):
    folder, _ = baked(server, "lora baked")
    assert not torch.allclose(drawn(server, "lora baked"), plain, atol=1e-2)
    assert torch.equal(by_the_model(server, 2.0), plain)
    told = read_header(folder / "checkpoints" / "00000006" / "lora.safetensors").metadata
    assert (
        told["distill.guidance"] == "3.0"
        and told["distill.step"] == "6"
        and json.loads(told["distill.inputs"]).keys() == {"student", "sampling", "data", "null_caption"}
    )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_stock_save_and_load_lora_give_the_same_images(dora, server):
    stock = {
        "class_type": "LoraModelLoader",
        "inputs": {"model": ["teacher", 0], "lora": ["bake", 0], "strength_model": 1.0, "bypass": False},
    }
    run_name = "by stock nodes" + " dora" * dora
    nodes = {"stock": stock, **sampled(["stock", 0], "put on by stock", cfg=1.0)}
    baked(server, run_name, nodes, **{"dora": True} if dora else {})  # absent as from graphs that were saved before
    assert torch.equal(drawn(server, "put on by stock"), drawn(server, run_name))
    saved = newest(server, f"loras/{run_name}_*.safetensors")
    target = server.base / "models" / "loras" / f"{run_name}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(saved.read_bytes())
    load = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["teacher", 0], "lora_name": f"{run_name}.safetensors", "strength_model": 1.0},
    }
    begun = len(server.log.read_text())
    result = server.run({**PROMPT, "load": load, **sampled(["load", 0], "lora loaded", cfg=1.0)})
    assert result.succeeded, result.error
    assert torch.equal(drawn(server, "lora loaded"), drawn(server, run_name))
    assert any(name.endswith(".dora_scale") for name in load_file(target)) == dora
    assert "lora key not loaded" not in server.log.read_text()[begun:] and "NOT LOADED" not in server.log.read_text()[begun:]


AS_DMD = {"objective": "dmd", "consistency_steps": 2, "total_steps": 18, "steps_per_queue": 18}


@pytest.mark.parametrize("how", [{"objective": "consistency"}, AS_DMD], ids=["consistency", "dmd"])
def test_a_lora_for_few_steps_draws_the_same_in_stock_nodes_the_core_and_diffusers(how, server):
    few = {"cfg": 1.0, "steps": 4, "sampler_name": "euler", "scheduler": "simple"}
    folder, _ = baked(server, f"few steps {how['objective']}", **how, nodes=sampled(["bake", 1], "in few steps", **few))
    (file,) = folder.glob("checkpoints/*/lora.safetensors")
    told = read_header(file).metadata
    assert json.loads(told["distill.sampler"]) == {"steps": "4", "sampler": "euler", "scheduler": "simple", "cfg": "1"}
    target = server.base / "models" / "loras" / f"few by {how['objective']}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(file.read_bytes())
    load = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["teacher", 0], "lora_name": target.name, "strength_model": 1.0},
    }
    prefix = f"by stock {how['objective']}"
    result = server.run({**PROMPT, "load": load, **sampled(["load", 0], prefix, **few)})
    assert result.succeeded, result.error
    by_stock, in_more_steps = drawn(server, prefix), drawn(server, f"few steps {how['objective']}")
    assert torch.equal(by_stock, drawn(server, "in few steps")) and not torch.allclose(by_stock, in_more_steps, atol=1e-2)
    by_core, by_diffusers = of_the_core(file, by_stock.shape, phases=4), of_diffusers(file, by_stock.shape, phases=4)
    assert torch.allclose(by_core, by_stock, atol=1e-3) and torch.allclose(by_diffusers, by_stock, atol=1e-3)


@pytest.mark.parametrize("how", [{"objective": "consistency"}, AS_DMD], ids=["consistency", "dmd"])
def test_a_transformer_learns_few_steps_in_the_node(how, server):
    network = {"teacher": {"class_type": "DistillLoadDemoTeacher", "inputs": {"network": "transformer"}}}
    few = {"cfg": 1.0, "steps": 4, "sampler_name": "euler", "scheduler": "simple"}
    run_name = f"a transformer by {how['objective']}"
    shown = {**sampled(["bake", 1], run_name, **few), **sampled(["teacher", 0], f"{run_name}, before", **few)}
    what = bake(run_name, batch_size=2, **how | ({"total_steps": 16, "steps_per_queue": 16} if len(how) > 1 else {}))
    result = server.run({**PROMPT, **network, "bake": what, **shown})
    assert result.succeeded, result.error
    folder = server.output / "distill_runs" / run_name
    terms = {term for row in rows(folder) for term in row}
    assert {"consistency", *(["dmd", "fake"] if how["objective"] == "dmd" else [])} <= terms
    assert not torch.allclose(drawn(server, run_name), drawn(server, f"{run_name}, before"), atol=1e-2)
    (file,) = folder.glob("checkpoints/*/lora.safetensors")
    assert all(name.startswith("diffusion_model.") for name in load_file(file))


def of_the_core(file, shape, phases):
    denoiser, (context, _) = load_denoiser(teacher_file()), captions()
    attach(denoiser, file, "few")
    noise = torch.randn(shape, generator=torch.manual_seed(0))
    return sample(denoiser, context.expand(len(noise), -1, -1), None, noise=noise, num_steps=phases, guidance=1.0)


def of_diffusers(file, shape, phases):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unet, (context, _) = load_denoiser(teacher_file()).network, captions()
    state, alphas = StableDiffusionPipeline.lora_state_dict(file, unet_config=unet.config)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(phases)
    x = torch.randn(shape, generator=torch.manual_seed(0))
    for t in scheduler.timesteps:
        with torch.no_grad():
            predicted = unet(x, t, context.expand(len(x), -1, -1)).sample
        x = scheduler.step(predicted, t, x).prev_sample
    return x


def captions():
    return ScenesTextEncoder.bundled().captions(["a cat, flat", ""])


def test_dmd_from_the_start_needs_no_images(server):
    how = AS_DMD | {"consistency_steps": 0, "total_steps": 14, "steps_per_queue": 14, "without": ["latents"]}
    folder, _ = baked(server, "no images", captions=["prompt", 0], **how)
    assert not (server.output / "distill_data" / "no images").exists()
    learnt = [row["step"] for row in rows(folder) if "dmd" in row]
    assert learnt == [13, 14]  # after twelve in which only the fake score learns
    assert len(rows(folder)) == 14 and all(row["fake"] > 0 for row in rows(folder))


def test_without_latents_the_model_draws_its_own_data(server):
    few = {"without": ["latents"], "captions": ["prompt", 0], "images_per_caption": 6}
    folder, _ = baked(server, "lora own data", **few)
    data = server.output / "distill_data" / "lora own data"
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.safetensors")}
    assert before and len(rows(folder)) == 6
    baked(server, "lora own data", **few | {"total_steps": 8, "steps_per_queue": 2})
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.safetensors")} == before and len(rows(folder)) == 8
    shutil.rmtree(data)
    baked(server, "lora own data", **few | {"total_steps": 8, "steps_per_queue": 3})  # another execution, of a complete run
    assert not data.exists()


def test_queued_in_parts_or_cancelled_it_comes_to_the_same(plain, server):
    whole, _ = baked(server, "lora in one")
    for _ in range(3):
        parts, _ = baked(server, "lora in parts", steps_per_queue=2)
    final = [load_file(folder / "checkpoints" / "00000006" / "lora.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])
    stopped = server.output / "distill_runs" / "lora stopped"
    prompt = {
        **PROMPT,
        "bake": bake("lora stopped", total_steps=2000, steps_per_queue=2000),
        **sampled(["bake", 1], "lora stopped"),
    }
    prompt_id = server.queue(prompt)
    until(lambda: (stopped / "metrics.csv").exists() and len(rows(stopped)) > 5, "the run was not begun")
    server.post("interrupt", {})
    assert server.wait(prompt_id).interrupted
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == [f"{len(rows(stopped)):08d}"]
    failed = server.run({**PROMPT, "bake": bake("lora failed", layers="*nowhere*"), **sampled(["bake", 1], "lora failed")})
    assert not failed.succeeded
    assert torch.equal(by_the_model(server, 3.0), plain)


def test_two_runs_from_one_model_do_not_disturb_each_other(server):
    first, _ = baked(server, "lora the first")
    also = {"also": bake("lora the second", guidance=1.5, seed=1), **sampled(["also", 1], "lora the second")}
    second, _ = baked(server, "lora the first again", nodes=also)
    final = [load_file(server.output / "distill_runs" / name / "checkpoints" / "00000006" / "lora.safetensors")
             for name in ("lora the first", "lora the first again", "lora the second")]  # fmt: skip
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])
    assert not any(torch.equal(final[0][name], final[2][name]) for name in final[0] if name.endswith("lora_up.weight"))


def test_a_pruned_student_is_a_base_too_and_another_model_a_teacher(server):
    folders = [baked(server, name, model=["prune", 0], **other)[0] for name, other in {
        "lora student": {}, "lora of its teacher": {"teacher": ["teacher", 0]}}.items()]  # fmt: skip
    own, of_teacher = (rows(folder) for folder in folders)
    assert of_teacher[0]["total"] > 5 * own[0]["total"]  # its guidance is far less than what pruning took away
    assert not (server.output / "distill_runs" / "lora student" / "checkpoints" / "00000006" / "student.safetensors").exists()


def test_a_range_of_guidance_is_learnt_on_trajectories_of_each(server):
    few = {"captions": ["prompt", 0], "images_per_caption": 6, "guidance_min": 1.0}
    folder, _ = baked(server, "lora ranged", without=("latents",), **few)
    shards = (server.output / "distill_data" / "lora ranged").glob("shard-*")
    scales = [
        tensor.read().item() for file in shards for name, tensor in read_header(file).tensors.items() if name.endswith(".scale")
    ]
    assert len({*scales}) == 6 and all(1 <= scale <= 3 for scale in scales) and len(rows(folder)) == 6


@pytest.mark.parametrize("changes,message", [({}, "sampled with guidance 2, but this run learns guidance 3"), ({"guidance": 2.0}, None),
                                             ({"guidance": 2.0, "guidance_min": 1.0}, "guidance 2, but this run learns guidance 1 to 2")])  # fmt: skip
def test_trajectories_teach_the_guidance_they_were_drawn_with(changes, message, server):
    nodes = {"data": teacher_data("guided", images_per_prompt=2, trajectory_states=2)}
    inputs = {"latents": ["data", 0], "captions": ["data", 1], "null_caption": ["data", 2]} | changes
    result = server.run({**PROMPT, **nodes, "bake": bake(f"guided {bool(message)}", **inputs), **sampled(["bake", 1], "guided")})
    assert result.succeeded if message is None else message in result.error


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"guidance": 1.0}, "nothing to learn from itself"),
        ({"guidance": 1.0, "teacher": ["teacher", 0]}, "student and teacher are the same model"),
        ({"model": ["edm", 0]}, "cannot be trained or compared here"),
        ({"layers": "*nowhere*"}, "'*nowhere*' matches no layer"),
        ({"guidance_min": 5.0}, "guidance_min must be below guidance"),
        ({"guidance_min": 1.0, "dora": True}, "turn dora off (lora_dora in a recipe), or remove guidance_min to learn one scale"),
        ({"run_name": "../evil"}, "run_name '../evil' must be a plain name"),
        ({"recipe": ["recipe", 0]}, "set weight_dtype to fp32"),
        ({"recipe": ["compiled", 0]}, "compile works only for students of UNets"),
        ({"null_caption": ["prompt", 0], "run_name": "lora baked", "latents": ["teacher", 3], "captions": ["teacher", 4]}, "was started with null_caption"),
        ({"latents": ["wide", 0]}, "the latents have 16 channels but the model takes 4"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_clear_sentence(changes, message, server):
    few = {"latents": ["noise", 0], "captions": ["prompt", 0], "run_name": "refused lora"}
    wide = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    others = {"recipe": recipe(weight_dtype="bf16", precision="bf16"), "compiled": recipe(compile=True), "wide": wide}
    others["edm"] = {
        "class_type": "ModelSamplingContinuousEDM",
        "inputs": {"model": ["teacher", 0], "sampling": "edm_playground_v2.5", "sigma_max": 120.0, "sigma_min": 0.002},
    }
    result = server.run({**PROMPT, **others, "bake": bake(**few | changes), **sampled(["bake", 1], "x")})
    assert message in result.error and "\n" not in result.error


def test_decoding_a_sample_image_unloads_nothing_that_is_being_trained(found):
    told = found("sharing.decoding")
    loaded, decoding, after, by_others = told["loaded"]
    assert loaded > 0 and decoding == after == loaded and told["kept"]
    assert by_others == 0  # where that is allowed, ComfyUI does make room
