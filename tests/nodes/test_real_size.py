"""A random-weight SD1.5: every preset at its real size, from the CLI to stock ComfyUI and to diffusers."""

import gc
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill_core.files import open_unet
from distill_core.layouts import LAYOUTS
from distill_core.plan import name_map, preset

from .. import comfyui
from ..core.test_plan import PUBLISHED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sd15")


@pytest.fixture(scope="module")
def teacher(folder, sd15):
    """A full checkpoint file in fp16, the UNet under its usual prefix, weights of the size a trained network has."""
    random = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in sd15.shapes.items():
        fan_in = max(1, torch.Size(shape[1:]).numel())
        scale = fan_in**-0.5 if len(shape) > 1 else 0.02
        weights[name] = (
            torch.randn(shape, generator=random) * scale + (1.0 if "norm" in name and name.endswith("weight") else 0)
        ).half()
    names = LAYOUTS["ldm"].from_canonical(weights)
    save_file({f"model.diffusion_model.{names[n]}": w for n, w in weights.items()}, folder / "sd15.safetensors")
    random.manual_seed(1)
    inputs = {"x": torch.randn(1, 4, 16, 16, generator=random), "t": torch.tensor([400]),
              "context": torch.randn(1, 77, 768, generator=random)}  # fmt: skip
    save_file(inputs, folder / "inputs.safetensors")
    return folder / "sd15.safetensors"


def distill(*arguments):
    run = subprocess.run(
        [sys.executable, "-m", "distill_core", *map(str, arguments)], cwd=comfyui.ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", PUBLISHED)
def test_student_in_stock_comfyui_equals_student_in_diffusers(name, teacher, folder, comfyui_path):
    from diffusers import UNet2DConditionModel

    single, whole = folder / f"{name}.safetensors", folder / name
    distill("prune", teacher, single, "--preset", name)
    distill("prune", teacher, whole, "--preset", name, "--layout", "diffusers")
    student = open_unet(single)
    assert (student.architecture.num_parameters, student.dtype) == (PUBLISHED[name], "f16")
    # Kept weights are the teacher's, bit for bit.
    original = open_unet(teacher)
    for kept, source in name_map(original.architecture, preset(name)).apply({n: n for n in original.names}).items():
        with safe_open(teacher, "pt") as theirs, safe_open(single, "pt") as ours:
            assert torch.equal(ours.get_tensor(student.names[kept]), theirs.get_tensor(original.names[source]))

    forward = comfyui.ROOT / "tests" / "nodes" / "comfy_forward.py"
    run = [
        comfyui.python(comfyui_path),
        forward,
        comfyui_path,
        single,
        folder / "inputs.safetensors",
        folder / "output.safetensors",
    ]
    subprocess.run(run, check=True, capture_output=True)
    with safe_open(folder / "output.safetensors", "pt") as file:
        in_comfyui = file.get_tensor("output")
        assert int(file.metadata()["parameters"]) == PUBLISHED[name]

    network = UNet2DConditionModel.from_pretrained(whole, torch_dtype=torch.float32).eval()
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED[name]
    inputs = load_file(folder / "inputs.safetensors")
    with torch.no_grad():
        in_diffusers = network(inputs["x"], inputs["t"], inputs["context"]).sample
    assert in_comfyui.std() > 0.05
    torch.testing.assert_close(in_comfyui, in_diffusers, rtol=0, atol=1e-5)
    del network
    gc.collect()


@pytest.fixture(scope="module")
def clip(server):
    """A random CLIP-L, so that stock CLIP Text Encode makes conditioning of SD1.x's width."""
    transformers = pytest.importorskip("transformers", reason="ComfyUI's own requirement, installed elsewhere")
    config = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    weights = {n: w.half().contiguous() for n, w in transformers.CLIPTextModel(config).state_dict().items()}
    weights = {n if n.startswith("text_model.") else f"text_model.{n}": w for n, w in weights.items()}
    folder = server.base / "models" / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "clip_l.safetensors")
    return "clip_l.safetensors"


@pytest.mark.parametrize("name", PUBLISHED)
def test_student_samples_in_stock_nodes(name, teacher, folder, clip, server):
    models = server.base / "models" / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    distill("prune", teacher, models / f"{name}.safetensors", "--preset", name)
    sampler = {"model": ["unet", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["noise", 0], "seed": 0,
               "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}  # fmt: skip
    result = server.run({
        "unet": {"class_type": "UNETLoader", "inputs": {"unet_name": f"{name}.safetensors", "weight_dtype": "default"}},
        "clip": {"class_type": "CLIPLoader", "inputs": {"clip_name": clip, "type": "stable_diffusion", "device": "default"}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["clip", 0]}},
        "noise": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "sample": {"class_type": "KSampler", "inputs": sampler},
        "keep": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": name}},
    })  # fmt: skip
    assert result.succeeded, result.error
    (latent,) = server.output.glob(f"{name}_*.latent")
    assert load_file(latent)["latent_tensor"].isfinite().all()
    (models / f"{name}.safetensors").unlink()
