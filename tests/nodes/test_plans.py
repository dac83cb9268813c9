"""Plans in the graph: by hand, made automatically, padded; and students to disk and back."""

import base64
import json
from io import BytesIO

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from distill_core.base.storage import read_header
from distill_core.demo.teacher import teacher_file
from distill_core.networks.files import open_unet
from distill_core.pruning.plan import name_map
from distill_core.pruning.plan_text import read_plan

from .graphs import PROMPT, newest, remapped, sampled, save, train

ANALYSE = {"model": ["teacher", 0], "latents": ["teacher", 3], "captions": ["teacher", 4], "saving": 0.3, "measure": "macs",
           "criterion": "recoverability", "num_timesteps": 2, "num_examples": 4, "seed": 0, "prompt_weight": 1.0}  # fmt: skip


def prune(plan, **changes):
    inputs = {"model": ["teacher", 0], "preset": "bk-sdm-base", "plan": plan} | changes
    return {"class_type": "DistillPruneUNetBlocks", "inputs": inputs}


def analyse(**changes):
    return {"class_type": "DistillAnalyseUNetBlocks", "inputs": ANALYSE | changes}


@pytest.mark.parametrize(
    "plan", ["bk-sdm-tiny", "keep down 1,1,2 mid resnet up 3,2,2", '{"name": "mine", "remove": ["mid", "down.0.attn.*"]}', " "]
)
def test_a_plan_of_ones_own(plan, server):
    result = server.run({**PROMPT, "prune": prune(plan), "save": save(["prune", 0], "own plan"),
                         "show": {"class_type": "PreviewAny", "inputs": {"source": ["prune", 2]}}})  # fmt: skip
    assert result.succeeded, result.error
    teacher = teacher_file()
    student = open_unet(newest(server, "own plan_*.safetensors"))
    mapping = name_map(teacher.architecture, read_plan(plan.strip() or "bk-sdm-base", teacher.architecture))
    assert student.state_dict.keys() == mapping.apply(teacher.state_dict).keys()
    told = result.outputs["show"]["text"][0]
    assert name_map(teacher.architecture, read_plan(told, teacher.architecture)) == mapping


def test_an_automatic_plan_goes_straight_into_prune(server):
    from distill_core.demo.grammar import NUM_TOKENS
    from distill_core.demo.teacher import LATENT_SHAPE, load_denoiser
    from distill_core.diffusion.macs import count_macs

    result = server.run({**PROMPT, "analyse": analyse(), "prune": prune(["analyse", 0]), "save": save(["prune", 0], "automatic")})
    assert result.succeeded, result.error
    text = result.outputs["analyse"]["text"][0]
    assert text.startswith("Chosen by recoverability: saves 3") and "For comparison by similarity" in text
    assert len(result.outputs["analyse"]["images"]) == 1
    student, teacher = open_unet(newest(server, "automatic_*.safetensors")), teacher_file()
    macs = [count_macs(load_denoiser(file), LATENT_SHAPE, NUM_TOKENS) for file in (student, teacher)]
    assert 0.5 < macs[0] / macs[1] <= 0.7
    again = server.run({**PROMPT, "analyse": analyse(), "prune": prune(["analyse", 0]), "save": save(["prune", 0], "automatic")})
    assert "analyse" in again.cached


@pytest.mark.parametrize(
    "node,message",
    [
        (prune("keep down 1"), "down.0 keeps 1 resnets and up.2 3"),
        (prune("half of it"), "cannot read the plan 'half of it'"),
        (prune("", preset="ssd-1b"), "ssd-1b is a plan for SDXL-shaped UNets"),
        (prune("keep conv_in"), "cannot read the plan"),
    ],
)
def test_a_bad_plan_is_one_clear_sentence(node, message, server):
    result = server.run({**PROMPT, "prune": node, "save": save(["prune", 0], "bad")})
    assert message in result.error and "\n" not in result.error


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"saving": 0.95}, "ask for less"),
        ({"latents": ["noise", 0], "captions": ["prompt", 0]}, "the latents are empty"),
    ],
)
def test_what_cannot_be_analysed_is_one_clear_sentence(changes, message, server):
    result = server.run({**PROMPT, "analyse": analyse(**changes)})
    assert message in result.error and "\n" not in result.error


def test_a_student_comes_back_from_disk_with_all_it_was(server):
    """It draws the same, trains on against its teacher, and takes the teacher's LoRA."""
    result = server.run(
        {**PROMPT, **sampled(["prune", 0], "before"), "save": save(["prune", 0], "diffusion_models/there and back")}
    )
    assert result.succeeded, result.error
    file = newest(server, "diffusion_models/there and back_*.safetensors")
    loras = server.base / "models" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    tensors = {"lora_unet_up_blocks_1_attentions_2_proj_out.lora_up.weight": torch.randn(64, 2, 1, 1),
               "lora_unet_up_blocks_1_attentions_2_proj_out.lora_down.weight": torch.randn(2, 64, 1, 1)}  # fmt: skip
    save_file(tensors, loras / "one layer.safetensors")
    back = {"class_type": "DistillLoadDistilledModel", "inputs": {"name": file.name}}
    result = server.run({
        **{name: node for name, node in PROMPT.items() if name != "prune"},
        "back": back,
        **sampled(["back", 0], "after"),
        "train": train("from disk", student=["back", 0], total_steps=1),
        "keep": save(["train", 0], "from disk"),
        "remap": remapped("one layer.safetensors", student=["back", 0]),
        "with": save(["remap", 0], "with one layer"),
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["back", 1]}},
    })  # fmt: skip
    assert result.succeeded, result.error
    before, after = (load_file(newest(server, f"{when}_*.latent"))["latent_tensor"] for when in ("before", "after"))
    assert torch.equal(before, after)
    assert "plan: bk-sdm-base" in result.outputs["show"]["text"][0]
    trained, metadata = open_unet(newest(server, "from disk_*.safetensors")), open_unet(file).metadata
    assert trained.origin == open_unet(file).origin
    assert all(trained.metadata[key] == metadata[key] for key in ("distill.teacher", "distill.skips"))
    plain, changed = load_file(file), load_file(newest(server, "with one layer_*.safetensors"))
    assert [name for name in plain if not torch.equal(plain[name], changed[name])] == ["output_blocks.3.1.proj_out.weight"]


def test_each_layout_goes_where_it_belongs(server):
    result = server.run({**PROMPT, "two": save(["prune", 0], "diffusion_models/form", layout="diffusers")})
    assert result.succeeded, result.error
    assert (newest(server, "diffusers/form_*") / "config.json").exists()
    alone = server.run({**PROMPT, "one": save(["prune", 0], "x", layout="checkpoint")})
    assert "connect both" in alone.error
    demo = server.run({**PROMPT, "one": save(["prune", 0], "x", layout="checkpoint", clip=["teacher", 1], vae=["teacher", 2])})
    assert "choose the ldm layout" in demo.error
    hidden = server.run({**PROMPT, "one": save(["prune", 0], "a/diffusion_models/x", layout="diffusers")})
    assert "misreads students in the diffusers layout" in hidden.error


def test_pruning_twice_leads_residuals_all_the_way(server):
    """The second student's file tells of the first teacher's skip connections."""
    result = server.run({
        **PROMPT,
        "again": prune("keep mid none", model=["prune", 0]),
        "save": save(["again", 0], "twice"),
    })  # fmt: skip
    assert result.succeeded, result.error

    skips = json.loads(open_unet(newest(server, "twice_*.safetensors")).metadata["distill.skips"])
    assert skips == {"teacher": 9, "kept": [0, 1, 3, 4, 6, 7], "mid": True}


def test_a_saved_student_carries_its_graph_and_a_thumbnail(server):
    prompt = {
        **PROMPT,
        "image": {"class_type": "EmptyImage", "inputs": {"width": 640, "height": 320, "batch_size": 2, "color": 0xFF0000}},
        "save": save(["prune", 0], "diffusion_models/pictured", thumbnail=["image", 0]),
    }
    result = server.run(prompt)
    assert result.succeeded, result.error
    file = newest(server, "diffusion_models/pictured_*.safetensors")
    metadata = server.get(f"view_metadata/diffusion_models?filename={file.name}")
    assert json.loads(metadata["prompt"]) == prompt and metadata["modelspec.title"] == file.stem
    kind, _, text = metadata["modelspec.thumbnail"].partition(",")
    picture = Image.open(BytesIO(base64.b64decode(text)))
    assert kind == "data:image/jpeg;base64" and picture.size == (256, 128)
    red, green, blue = picture.getpixel((50, 50))
    assert red > 240 and max(green, blue) < 15


def test_a_diffusers_folder_has_neither_graph_nor_thumbnail(server):
    prompt = {
        **PROMPT,
        "image": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
        "mask": {"class_type": "ImageToMask", "inputs": {"image": ["image", 0], "channel": "red"}},
        "grey": {"class_type": "MaskToImage", "inputs": {"mask": ["mask", 0]}},
        "save": save(["prune", 0], "diffusers/plain", layout="diffusers", thumbnail=["grey", 0]),
    }
    assert server.run(prompt).succeeded
    metadata = read_header(newest(server, "diffusers/plain_*") / "diffusion_pytorch_model.safetensors").metadata
    assert not {"prompt", "workflow", "modelspec.thumbnail"} & metadata.keys()
