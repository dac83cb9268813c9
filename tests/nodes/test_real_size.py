"""Random-weight SD1.5, SD2 and SDXL: presets at their real size, from the CLI to stock ComfyUI and to diffusers.

The whole suite takes those that cut in ways of their own, and SD1.5 alone where all families do the same;
DISTILL_ALL_SIZES=1 takes every one.
"""

import gc
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill_core.base.storage import write_tensors
from distill_core.networks.files import open_unet
from distill_core.pruning.plan import name_map, preset
from tests import programs

from .. import standins
from ..students import PUBLISHED
from .test_shared_base import check

CONTEXT_WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
OF_THEIR_OWN = ("bk-sdm-tiny", "bk-sdm-v2-small", "ssd-1b", "koala-700m")
ALL = bool(os.environ.get("DISTILL_ALL_SIZES"))
BY_FAMILY = sorted(PUBLISHED if ALL else OF_THEIR_OWN, key=lambda name: preset(name).teacher)  # each teacher is made once
FREE_GIB = 16


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, published):
    """Full checkpoint files in fp16, one at a time: the UNet under its usual prefix, weights as large as trained ones."""
    folder = tmp_path_factory.mktemp("real_size")
    if shutil.disk_usage(folder).free < FREE_GIB << 30:
        pytest.skip(f"needs {FREE_GIB} GiB of disk")
    made = {}

    def teacher(family):
        if family not in made:
            for old in made.values():
                shutil.rmtree(old)
            made.clear()
            made[family] = folder / family
            made[family].mkdir()
            write_tensors(made[family] / "teacher.safetensors", standins.unet(published[family]))
            _write_inputs(made[family] / "inputs.safetensors", family)
        return made[family]

    yield teacher
    shutil.rmtree(folder)


def _write_inputs(path, family):
    random = torch.Generator().manual_seed(1)
    inputs = {"x": torch.randn(1, 4, 8, 8, generator=random), "t": torch.tensor([400]),
              "context": torch.randn(1, 77, CONTEXT_WIDTHS[family], generator=random)}  # fmt: skip
    if family == "sdxl":
        inputs["pooled"] = torch.randn(1, 1280, generator=random)
        inputs["sizes"] = torch.tensor([[1024.0, 768, 0, 8, 1024, 1024]])
    save_file(inputs, path)


@pytest.mark.parametrize("name", BY_FAMILY)
def test_a_student_opens_and_draws_in_comfyui_and_answers_the_same_in_diffusers(name, teachers, in_comfyui):
    folder = teachers(preset(name).teacher)
    teacher, single, whole = folder / "teacher.safetensors", folder / f"{name}.safetensors", folder / name
    programs.run("prune", teacher, single, "--preset", name)
    programs.run("prune", teacher, whole, "--preset", name, "--layout", "diffusers")
    student, original = open_unet(single), open_unet(teacher)
    assert (student.architecture.num_parameters, student.dtype) == (PUBLISHED[name], "f16")
    # Kept weights are the teacher's, bit for bit.
    with safe_open(teacher, "pt") as theirs, safe_open(single, "pt") as ours:
        for kept, source in name_map(original.architecture, preset(name)).apply({n: n for n in original.names}).items():
            assert torch.equal(ours.get_tensor(student.names[kept]), theirs.get_tensor(original.names[source]))

    in_comfyui("forward_and_sample", single, folder / "inputs.safetensors", folder / "output.safetensors")
    with safe_open(folder / "output.safetensors", "pt") as file:
        answer, drawn = file.get_tensor("output"), file.get_tensor("latent")
        assert int(file.metadata()["parameters"]) == PUBLISHED[name]
    single.unlink()
    assert drawn.isfinite().all() and drawn.std() > 0.05 and answer.std() > 0.05

    torch.testing.assert_close(
        answer, _in_diffusers(whole, load_file(folder / "inputs.safetensors"), PUBLISHED[name]), rtol=0, atol=1e-5
    )
    shutil.rmtree(whole)
    gc.collect()


def _in_diffusers(folder, inputs, num_parameters):
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    assert sum(p.numel() for p in network.parameters()) == num_parameters
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["sizes"]} if "pooled" in inputs else None
    with torch.no_grad():
        return network(inputs["x"], inputs["t"], inputs["context"], added_cond_kwargs=added).sample


@pytest.mark.parametrize(
    "name,family,prediction",
    [("segmind-vega", "sdxl", "V_PREDICTION"), ("bk-sdm-v2-tiny", "sd2", "V_PREDICTION"), ("bk-sdm-v2-tiny", "sd2", "EPS")],
)
def test_v_prediction_survives_into_the_stock_loader(name, family, prediction, teachers, in_comfyui):
    """ComfyUI decides by what is in the file, of SD2 by one tensor of the full UNet."""
    folder = teachers(family)
    tensors = {n: t for n, t in open_unet(folder / "teacher.safetensors").tensors.items()}
    names = open_unet(folder / "teacher.safetensors").names
    tensors = {names[n]: t for n, t in tensors.items()}
    if prediction == "V_PREDICTION":
        sign = names["up.2.resnet.2.norm1.bias"] if family == "sdxl" else names["up.3.attn.2.block.0.norm1.bias"]
        tensors |= {"v_pred": torch.zeros(0)} if family == "sdxl" else {sign: tensors[sign].read() + torch.linspace(-1, 1, 320)}
    write_tensors(folder / "v.safetensors", tensors)
    programs.run("prune", folder / "v.safetensors", folder / "student.safetensors", "--preset", name)
    (folder / "v.safetensors").unlink()
    in_comfyui("forward_and_sample", folder / "student.safetensors", folder / "inputs.safetensors", folder / "output.safetensors")
    with safe_open(folder / "output.safetensors", "pt") as file:
        assert file.metadata()["prediction"] == prediction
    (folder / "student.safetensors").unlink()


@pytest.mark.parametrize("family,pooled_width", [("sd1", 0), ("sd2", 0), ("sdxl", 1280)][: 3 if ALL else 1])
def test_a_whole_model_is_the_base_of_a_lora(family, pooled_width, teachers, in_comfyui, tmp_path):
    file, out = teachers(family) / "teacher.safetensors", tmp_path / "found.json"
    in_comfyui("sharing.of_file", file, CONTEXT_WIDTHS[family], pooled_width, out)
    told = json.loads(out.read_text())
    check(told | {"merged": 0}, 1e-5)
    assert told["merged"] < 0.1 * told["change"]  # merged weights are rounded to 16 bits


def _drawn(prefix, loader):
    """A picture from a stock checkpoint loader, its VAE replaced where the file has none."""
    sampler = {"model": [loader, 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["noise", 0], "seed": 0,
               "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}  # fmt: skip
    return {
        "text": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": [loader, 1]}},
        "noise": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "sample": {"class_type": "KSampler", "inputs": sampler},
        "keep": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": prefix}},
    }


def test_full_checkpoints_open_in_load_checkpoint(teachers, server):
    """Written by the CLI from one file to another, and by the node from MODEL, CLIP and VAE; drawn from by stock nodes."""
    folder, models = teachers("sd1"), server.base / "models"
    file = open_unet(folder / "teacher.safetensors")
    unet = {file.names[name]: tensor for name, tensor in file.tensors.items()}
    vae = {f"first_stage_model.{name}": tensor for name, tensor in standins.vae().items()}
    write_tensors(folder / "full.safetensors", {**unet, **standins.clip(), **vae})
    (models / "checkpoints").mkdir(parents=True, exist_ok=True)
    (models / "vae").mkdir(parents=True, exist_ok=True)
    save_file(standins.vae(), models / "vae" / "vae.safetensors")
    student = models / "checkpoints" / "student.safetensors"
    programs.run("prune", folder / "full.safetensors", student, "--preset", "bk-sdm-tiny", "--layout", "checkpoint")
    (folder / "full.safetensors").unlink()
    saved = {"model": ["load", 0], "clip": ["load", 1], "vae": ["vae", 0], "layout": "checkpoint", "dtype": "fp16",
             "filename_prefix": "diffusion_models/whole"}  # fmt: skip
    result = server.run({
        "load": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "student.safetensors"}},
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "vae.safetensors"}},
        **_drawn("from the cli", "load"),
        "save": {"class_type": "DistillSaveDistilledModel", "inputs": saved},
    })  # fmt: skip
    assert result.succeeded, result.error
    (whole,) = (server.output / "checkpoints").glob("whole_*.safetensors")
    result = server.run({
        "load": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": whole.name}},
        **_drawn("from the node", "load"),
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["load", 2]}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
    })  # fmt: skip
    assert result.succeeded, result.error
    (one,), (two,) = (server.output.glob(f"from the {who}_*.latent") for who in ("cli", "node"))
    one, two = (load_file(path)["latent_tensor"] for path in (one, two))
    assert one.isfinite().all() and one.std() > 0.05 and torch.equal(one, two)
    student.unlink()
    whole.unlink()
