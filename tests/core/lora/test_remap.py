"""A LoRA on the teacher, then pruning, is pruning, then the remapped LoRA: in every format, for every preset."""

import functools
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from distill_core.base.storage import read_header
from distill_core.lora.remap import remap_lora, remap_lora_file
from distill_core.networks.layouts import LAYOUTS
from distill_core.pruning.plan import PruningPlan, name_map, preset, pruned
from distill_core.pruning.plan_text import read_plan

pytestmark = pytest.mark.slow

RANK = 2
PRESETS = ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"]


def layers_of(architecture, with_convolutions=True):
    """Layers a LoRA may sit on, by canonical name."""
    weights = {n.removesuffix(".weight"): s for n, s in architecture.shapes.items() if n.endswith(".weight") and len(s) > 1}
    return {n: s for n, s in weights.items() if with_convolutions or (".attn." in n and len(s) == 2)}


# Each format: how a layer is called, and which tensors it has. Written down here a second time, on purpose.


@functools.cache
def paths(layout, shapes):
    names = LAYOUTS[layout].from_canonical(shapes)
    return {name.removesuffix(".weight"): path.removesuffix(".weight") for name, path in names.items()}


def kohya(layout, prefix="lora_unet_"):
    return lambda layer, architecture: prefix + paths(layout, tuple(architecture.shapes))[layer].replace(".", "_")


def dotted(layout, prefix):
    return lambda layer, architecture: prefix + paths(layout, tuple(architecture.shapes))[layer]


def processor(layer, architecture):
    path = dotted("diffusers", "unet.")(layer, architecture).removesuffix(".0" if layer.endswith("to_out.0") else "")
    return path.replace(".to_", ".processor.to_") + "_lora"


FORMATS = {
    "kohya": (kohya("diffusers"), "lora_up", True),
    "kohya, SDXL": (kohya("ldm"), "lora_up", True),
    "lycoris": (kohya("diffusers", "lycoris_"), "loha", True),
    "kohya LoHa": (kohya("ldm"), "loha", True),
    "kohya LoKr": (kohya("diffusers"), "lokr", True),
    "kohya LoKr, SDXL": (kohya("ldm"), "lokr", True),
    "ComfyUI": (dotted("ldm", "diffusion_model."), "lora_up", True),
    "ComfyUI LoKr": (dotted("ldm", "diffusion_model."), "lokr", True),
    "full checkpoint names": (dotted("ldm", "model.diffusion_model."), "lora_up", True),
    "peft": (dotted("diffusers", "unet."), "lora_B", True),
    "peft, wrapped": (dotted("diffusers", "base_model.model."), "lora_B", True),
    "peft, no prefix": (dotted("diffusers", ""), "lora.up", True),
    "diffusers, linear": (dotted("diffusers", "unet."), "lora_linear_layer.up", True),
    "diffusers, old": (processor, "processor", False),
}


def adapter(kind, shape, random):
    """Tensors of one layer by suffix, for a weight (out, in, ...)."""
    flat = torch.Size(shape[1:]).numel()

    def noise(*size):
        return torch.randn(size, generator=random) * 0.1

    up, down = noise(shape[0], RANK), noise(RANK, *shape[1:])
    if kind == "lora_up":
        return {".lora_up.weight": up, ".lora_down.weight": down, ".alpha": torch.tensor(1.0)}
    if kind == "lora_B":
        return {".lora_B.weight": up, ".lora_A.weight": down}
    if kind in ("lora.up", "lora_linear_layer.up"):
        return {f".{kind}.weight": up, f".{kind.replace('up', 'down')}.weight": down}
    if kind == "processor":
        return {".up.weight": up, ".down.weight": down}
    if kind == "loha":
        return {".hada_w1_a": noise(shape[0], RANK), ".hada_w1_b": noise(RANK, flat), ".hada_w2_a": noise(shape[0], RANK),
                ".hada_w2_b": noise(RANK, flat), ".dora_scale": noise(shape[0], 1)}  # fmt: skip
    return {".lokr_w1": noise(2, 2), ".lokr_w2": noise(shape[0] // 2, flat // 2)}


def delta(kind, tensors, shape):
    """What an adapter adds to a weight."""
    get = {suffix.lstrip("."): tensor for suffix, tensor in tensors.items()}
    if kind == "loha":
        return ((get["hada_w1_a"] @ get["hada_w1_b"]) * (get["hada_w2_a"] @ get["hada_w2_b"])).reshape(shape) * get[
            "dora_scale"
        ].mean()
    if kind == "lokr":
        return torch.kron(get["lokr_w1"], get["lokr_w2"]).reshape(shape)
    up, down = (next(t for s, t in get.items() if any(w in s for w in words)) for words in (("up", "lora_B"), ("down", "lora_A")))
    return (up @ down.flatten(1)).reshape(shape) * (get["alpha"].item() / RANK if "alpha" in get else 1)


def make(form, architecture, seed=0):
    """A LoRA file in a format, and what it adds by canonical layer."""
    call, kind, with_convolutions = FORMATS[form]
    random = torch.Generator().manual_seed(seed)
    file, deltas = {}, {}
    for layer, shape in layers_of(architecture, with_convolutions).items():
        if kind == "lokr" and (shape[0] % 2 or torch.Size(shape[1:]).numel() % 2):
            continue
        if kind == "processor" and ".to_" not in layer:
            continue
        parts = adapter(kind, shape, random)
        file |= {call(layer, architecture) + suffix: tensor for suffix, tensor in parts.items()}
        deltas[layer] = delta(kind, parts, shape)
    return file, deltas


def read_back(file, form, architecture):
    """What a file in a format adds to a network, by canonical layer."""
    call, kind, with_convolutions = FORMATS[form]
    layers = {call(layer, architecture): (layer, shape) for layer, shape in layers_of(architecture, with_convolutions).items()}
    parts = {}
    for key, tensor in file.items():
        ends = [i for i, letter in enumerate(key) if letter == "."]
        end = next(end for end in reversed(ends) if key[:end] in layers)
        parts.setdefault(key[:end], {})[key[end:]] = tensor
    return {layers[name][0]: delta(kind, tensors, layers[name][1]) for name, tensors in parts.items()}


def check(form, teacher, mapping):
    file, deltas = make(form, teacher)
    remapped = remap_lora(file, teacher, mapping)
    student = pruned(teacher, mapping)
    if remapped.switched_to_ldm:
        form = {"kohya": "kohya, SDXL", "lycoris": "kohya LoHa", "kohya LoKr": "kohya LoKr, SDXL"}[form]
    found = read_back(remapped.tensors, form, student)
    expected = mapping.apply(deltas)
    assert found.keys() == expected.keys()
    for layer, value in expected.items():
        torch.testing.assert_close(found[layer], value, rtol=1e-6, atol=1e-7)
    assert remapped.num_kept == len(expected) and remapped.num_kept + remapped.num_dropped == len(deltas)
    return remapped, file


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", PRESETS)
def test_prune_after_lora_is_remapped_lora_after_prune(name, form, small_teacher):
    remapped, _ = check(form, small_teacher.architecture, name_map(small_teacher.architecture, preset(name)))
    assert remapped.num_dropped > 0 and not remapped.switched_to_ldm


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["ssd-1b", "koala-1b"])
def test_the_same_for_stacks_of_transformer_blocks(name, form, small_xl_teacher):
    teacher = small_xl_teacher.architecture
    text = {"ssd-1b": "keep down 2,2:1,2:[1,3] mid resnet up 3:2,3:1,3", "koala-1b": "keep down 1,1,1:2 mid 2 up 2:2,2,2"}[name]
    check(form, teacher, name_map(teacher, read_plan(text, teacher)))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    blocks=st.lists(
        st.sampled_from(["mid", "down.0.attn.1", "up.1.attn.0", "up.1.attn.2", "up.3.attn.1", "down.2.attn.0"]), min_size=1
    ),
    form=st.sampled_from(sorted(FORMATS)),
)
def test_the_same_for_any_attentions_that_go(blocks, form, small_teacher):
    check(form, small_teacher.architecture, name_map(small_teacher.architecture, PruningPlan(name="any", remove=tuple(blocks))))


@pytest.mark.parametrize("form", ["kohya", "lycoris", "kohya LoKr"])
def test_names_comfyui_would_misread_become_ldm_names(form, small_teacher):
    """Where the down stages keep unequal numbers of resnets."""
    teacher = small_teacher.architecture
    remapped, _ = check(form, teacher, name_map(teacher, read_plan("keep down 2,1,2,2 up 3,3,2,3", teacher)))
    assert remapped.switched_to_ldm and "LDM layout" in remapped.describe()
    assert not [n for n in remapped.tensors if "down_blocks" in n or "up_blocks" in n or "mid_block" in n]


@pytest.mark.parametrize(
    "form,to,there",
    [
        ("kohya", "ldm", "kohya, SDXL"),
        ("kohya, SDXL", "diffusers", "kohya"),
        ("ComfyUI", "diffusers", "kohya"),
        ("ComfyUI", "ldm", "ComfyUI"),
    ],
)
def test_the_layout_can_be_chosen(form, to, there, small_teacher):
    teacher = small_teacher.architecture
    mapping = name_map(teacher, preset("bk-sdm-base"))
    file, deltas = make(form, teacher)
    found = read_back(remap_lora(file, teacher, mapping, layout=to).tensors, there, pruned(teacher, mapping))
    for layer, value in mapping.apply(deltas).items():
        torch.testing.assert_close(found[layer], value, rtol=1e-6, atol=1e-7)


def test_text_encoders_pass_through(small_teacher):
    teacher = small_teacher.architecture
    file, _ = make("kohya", teacher)
    text = {f"{prefix}text_model_encoder_layers_0_mlp_fc1.lora_{part}.weight": torch.ones(2, 2)
            for prefix in ("lora_te_", "lora_te1_", "lora_te2_") for part in ("up", "down")}  # fmt: skip
    text |= {"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 2)}
    remapped = remap_lora({**file, **text}, teacher, name_map(teacher, preset("bk-sdm-base")))
    assert remapped.num_text_encoder == 4 and all(remapped.tensors[name] is tensor for name, tensor in text.items())
    assert "4 of text encoders" in remapped.describe()


@pytest.mark.parametrize(
    "file,message",
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (2, 2)}, "no layer for lora_unet_double_blocks"),
        ({"diffusion_model.input_blocks.40.1.proj_in.lora_up.weight": (2, 2)}, "made for another model"),
        ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (2, 1024)}, "has 1024 inputs"),
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (64, 2)}, "nothing is left of this LoRA: all 1 layers"),
        ({"lora_te_x.lora_up.weight": (2, 2)}, "none of its tensors belongs to a Stable Diffusion UNet"),
        ({}, "the file is empty"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(file, message, small_teacher):
    teacher = small_teacher.architecture
    with pytest.raises(ValueError, match=message) as caught:
        remap_lora({name: torch.ones(shape) for name, shape in file.items()}, teacher, name_map(teacher, preset("bk-sdm-small")))
    assert "\n" not in str(caught.value)


def test_an_sdxl_lora_is_refused_by_sd1_and_a_students_lora_by_its_teachers_map(small_teacher, small_xl_teacher):
    teacher = small_teacher.architecture
    mapping = name_map(teacher, preset("bk-sdm-tiny"))
    for other in (small_xl_teacher.architecture,):
        with pytest.raises(ValueError, match="made for another model"):
            remap_lora(make("kohya, SDXL", other)[0], teacher, mapping)


def test_from_file_to_file(small_teacher, tmp_path):
    teacher = small_teacher.architecture
    file, _ = make("kohya", teacher)
    save_file(file, tmp_path / "lora.safetensors", {"ss_network_dim": "2"})
    mapping = name_map(teacher, preset("bk-sdm-base"))
    remapped = remap_lora_file(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", teacher, mapping)
    assert load_file(tmp_path / "out.safetensors").keys() == remapped.tensors.keys()
    metadata = read_header(tmp_path / "out.safetensors").metadata
    assert metadata["ss_network_dim"] == "2" and json.loads(metadata["distill.remapped"])["from"] == "lora.safetensors"
    with pytest.raises(ValueError, match="exists already"):
        remap_lora_file(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", teacher, mapping)
    with pytest.raises(ValueError, match="already a LoRA for a student"):
        remap_lora_file(tmp_path / "out.safetensors", tmp_path / "twice.safetensors", teacher, mapping)
