"""The shipped workflows for a user's own checkpoint, run by comfy-cli on random weights of the real size: small pictures, one step."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_core.base.storage import read_header, write_tensors
from distill_core.networks.files import open_unet
from distill_core.networks.network import open_network
from distill_core.pruning.plan import preset
from distill_core.pruning.prune import prune

from .. import comfyui, standins
from ..nodes.graphs import newest
from .shortened import shortened
from .test_workflows import WORKFLOWS, run

FREE_GIB = 16
SHORT = {
    "DistillTeacherDataset": {"prompts": "a red fox", "width": 64, "height": 64, "images_per_prompt": 1, "steps": 2,
                              "trajectory_states": 0},
    "DistillTrainStep": {"total_steps": 1, "steps_per_queue": 1, "batch_size": 1, "refit_examples": 0},
    "DistillSharedBaseLoRA": {"total_steps": 1, "steps_per_queue": 1, "batch_size": 1},
    "DistillRecipe": {"weight_dtype": "bf16", "optimizer": "adafactor", "accumulation_steps": 1, "sample_every_steps": 0},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "EmptySD3LatentImage": {"width": 64, "height": 64},
    "DistillPruneTransformerBlocks": {"plan": "keep double 0,3 single 0,2,4"},
    "KSampler": {"steps": 1},
}  # fmt: skip
"""What is changed in the workflows, so that two CPU cores and 16 GiB do."""


@pytest.fixture(scope="module")
def server(comfyui_path, tmp_path_factory):
    """One that keeps models in half precision, so that other tests have room beside it."""
    where = tmp_path_factory.mktemp("comfyui")
    with comfyui.Server(comfyui_path, comfyui.python(comfyui_path), where, "--bf16-unet") as running:
        yield running


def checkpoint(server, name, *parts):
    """A checkpoint of these weights where the server finds it."""
    if shutil.disk_usage(server.base).free < FREE_GIB << 30:
        pytest.skip(f"needs {FREE_GIB} GiB of disk")
    path = server.base / "models" / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    vae = {f"first_stage_model.{name}": weight for name, weight in standins.vae().items()}
    write_tensors(path, {**vae, **{name: weight for part in parts for name, weight in part.items()}})
    return path


@pytest.fixture(scope="module")
def files(server, sd15):
    """What the workflows name: an SD1.5 checkpoint, a student of it, a LoRA and a ControlNet for it."""
    models = server.base / "models"
    for folder in ("diffusion_models", "loras", "controlnet"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    paths = {
        "checkpoint": checkpoint(server, "v1-5-pruned-emaonly.safetensors", standins.unet(sd15), standins.clip()),
        "student": models / "diffusion_models" / "sd15_small.safetensors",
        "lora": models / "loras" / "my_style.safetensors",
        "controlnet": models / "controlnet" / "control_v11p_sd15_canny_fp16.safetensors",
        "picture": server.base / "input" / "example.png",
    }
    command = [sys.executable, "-m", "distill_core", "prune", paths["checkpoint"], paths["student"], "--preset", "bk-sdm-small"]
    subprocess.run(command, cwd=comfyui.ROOT, check=True, capture_output=True)
    save_file(standins.lora(sd15), paths["lora"])
    save_file(standins.controlnet(), paths["controlnet"])
    paths["picture"].parent.mkdir(exist_ok=True)
    shutil.copy(WORKFLOWS / "quickstart_scenes.jpg", paths["picture"])
    yield paths
    for path in paths.values():
        path.unlink()


@pytest.fixture
def diffusion_models(server):
    """Where networks lie; what a test puts there, and nothing else, goes when it ends."""
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    before = {*folder.iterdir()}
    yield folder
    for path in {*folder.iterdir()} - before:
        path.unlink()


@pytest.fixture
def run_short(server, tmp_path):
    known = server.get("object_info")

    def run_it(name, change=lambda graph: graph, **shorter):
        graph = shortened(change(json.loads((WORKFLOWS / f"{name}.json").read_text())), known, SHORT, shorter)
        (tmp_path / f"{name}.json").write_text(json.dumps(graph))
        server.post("free", {"unload_models": True, "free_memory": True})  # several GiB of the workflow before
        run(tmp_path / f"{name}.json", server)
        return {path.stem.rpartition("_")[0].rstrip("_0123456789") for path in (server.output / "distill").glob("*.png")}

    return run_it


def test_half_an_sd15(run_short, server, sd15, files):
    assert {"sd15_teacher", "sd15_pruned", "sd15_distilled"} <= run_short(
        "prune_distil_sd15", DistillTrainStep={"refit_examples": 2}
    )
    (saved,) = (server.output / "checkpoints").glob("sd15_small_*.safetensors")
    student = open_unet(saved)
    assert student.architecture.num_parameters < 0.6 * sd15.num_parameters
    assert any(name.startswith("cond_stage_model.") for name in read_header(saved).tensors)
    saved.unlink()


def test_a_lora_and_a_controlnet_on_a_student(run_short, files):
    assert {"sd15_remap_teacher", "sd15_remap_student"} <= run_short("remap_lora_controlnet_sd15")


def test_guidance_baked_into_a_lora(run_short, server, files):
    assert {"sd15_guided", "sd15_baked", "sd15_plain"} <= run_short("bake_guidance_sd15")
    assert list((server.output / "loras").glob("sd15_guided_*.safetensors"))


def test_half_an_sdxl_and_a_whole_one_in_four_steps(run_short, server):
    """Narrow, for memory; its text encoders are of the real size."""
    teacher = standins.narrow_sdxl()
    path = checkpoint(server, "sd_xl_base_1.0.safetensors", standins.unet(teacher), standins.sdxl_clips())
    assert {"sdxl_teacher", "sdxl_pruned", "sdxl_distilled"} <= run_short("prune_distil_sdxl")
    of_lora = {"DistillRecipe": {"weight_dtype": "fp32", "optimizer": "adamw"}, "DistillSharedBaseLoRA": {"rank": 2}}
    assert {"sdxl_turbo_model", "sdxl_turbo_lora", "sdxl_turbo_plain"} <= run_short("turbo_lora_sdxl", **of_lora)
    assert list((server.output / "loras").glob("sdxl_turbo_*.safetensors"))
    path.unlink()
    (saved,) = (server.output / "checkpoints").glob("my_ssd_1b_*.safetensors")
    student = open_unet(saved)
    kept = student.architecture.num_parameters / teacher.num_parameters
    assert student.architecture.modules == prune(teacher, preset("ssd-1b")).student.modules and kept < 0.8
    assert any(name.startswith("conditioner.embedders.1.") for name in read_header(saved).tensors)
    saved.unlink()


def test_a_flux_with_fewer_blocks(run_short, server, in_comfyui, diffusion_models):
    in_comfyui("cutting.write_small_flux", diffusion_models / "flux1-dev.safetensors")
    run_short("prune_flux", without_text_encoders_and_vae)
    (saved,) = (server.output / "diffusion_models").glob("flux_lite_*.safetensors")
    assert open_network(saved).architecture.depths == {"double": 2, "single": 3}
    drawn = [load_file(newest(server, f"{row}_*.latent"))["latent_tensor"] for row in ("row_0", "row_1")]
    assert drawn[0].shape == drawn[1].shape == (1, 16, 8, 8) and not torch.equal(*drawn)


def test_a_z_image_cut_and_taught_again(run_short, server, in_comfyui, diffusion_models):
    """Three layers of true width, by which ComfyUI knows it."""
    in_comfyui("cutting.write_small", diffusion_models)
    (diffusion_models / "small_z_image.safetensors").rename(diffusion_models / "z_image_turbo_bf16.safetensors")
    plan = {"plan": "keep layer 0,2"}
    run_short(
        "heal_z_image",
        without_text_encoders_and_vae,
        DistillPruneTransformerBlocks=plan,
        DistillTrainStep={"total_steps": 2, "lora_rank": 2},
        DistillRecipe={"weight_dtype": "fp32", "optimizer": "adamw"},
    )
    (saved,) = (server.output / "diffusion_models").glob("z_image_small_healed_*.safetensors")
    assert open_network(saved).architecture.depths == {"layer": 2}
    drawn = [load_file(newest(server, f"row_{row}_*.latent"))["latent_tensor"] for row in range(3)]
    assert {latent.shape for latent in drawn} == {(1, 16, 8, 8)} and not torch.equal(drawn[0], drawn[1])


def without_text_encoders_and_vae(graph):
    """The graph with the demo's text encoder in place of Flux's, and latents saved in place of pictures."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    gone = {node["id"] for node in graph["nodes"] if node["type"] in ("VAELoader", "SaveImage")}
    rows = iter(("row_0", "row_1", "row_2"))
    for node in nodes.values():
        if node["type"] in ("DualCLIPLoader", "CLIPLoader"):
            kinds = ("MODEL", "CLIP", "VAE", "LATENT", "CONDITIONING")
            outputs = [{"name": kind, "type": kind, "links": []} for kind in kinds]
            outputs[1]["links"] = node["outputs"][0]["links"]
            for link in graph["links"]:
                link[2] = 1 if link[1] == node["id"] else link[2]
            node |= {"type": "DistillLoadDemoTeacher", "outputs": outputs, "widgets_values": ["unet"]}
        elif node["type"] == "VAEDecode":
            name = {"name": "filename_prefix", "type": "STRING", "widget": {"name": "filename_prefix"}, "link": None}
            node |= {"type": "SaveLatent", "inputs": [node["inputs"][0], name], "outputs": [], "widgets_values": [next(rows)]}
    links = [link for link in graph["links"] if not {link[1], link[3]} & gone]
    kept = {link[0] for link in links}
    for node in nodes.values():
        for entry in node["inputs"]:
            entry["link"] = entry["link"] if entry.get("link") in kept else None
    return graph | {"nodes": [node for id_, node in nodes.items() if id_ not in gone], "links": links}
