"""Damaged tensors of a LoRA are refused by their key, before anything is written; all kinds that loaders know pass."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_core.lora.remap import convert_lora_file, remap_lora, remap_lora_file
from distill_core.pruning.plan import name_map, preset

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"  # 32 x 32
CONVOLUTION = "lora_unet_down_blocks_0_resnets_0_conv1"  # 32 x 32 x 3 x 3
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def r(*shape):
    return torch.rand(shape)


def pair(layer=LINEAR, up=(32, 4), down=(4, 32)):
    return {f"{layer}.lora_up.weight": r(*up), f"{layer}.lora_down.weight": r(*down)}


def with_value(key, value):
    tensors = pair()
    tensors[key].view(-1)[5] = value
    return tensors


UP, DOWN, ALPHA = (f"{LINEAR}.{name}" for name in ("lora_up.weight", "lora_down.weight", "alpha"))
DAMAGED = {
    "NaN": (with_value(UP, float("nan")), UP, "NaN or Inf"),
    "Inf": (with_value(DOWN, float("inf")), DOWN, "NaN or Inf"),
    "NaN in fp8": ({**pair(), DOWN: torch.full((4, 32), float("nan")).to(torch.float8_e4m3fn)}, DOWN, "NaN or Inf"),
    "NaN in a text encoder": ({**pair(), **{k: v * float("nan") for k, v in pair(TEXT).items()}}, TEXT, "NaN or Inf"),
    "alpha NaN": ({**pair(), ALPHA: torch.tensor(float("nan"))}, ALPHA, "NaN or Inf"),
    "alpha Inf": ({**pair(), ALPHA: torch.tensor(float("-inf"))}, ALPHA, "NaN or Inf"),
    "alpha of many": ({**pair(), ALPHA: r(4)}, ALPHA, "one number"),
    "alpha of none": ({**pair(), ALPHA: r(0)}, ALPHA, "one number"),
    "rank 0": (pair(up=(32, 0), down=(0, 32)), LINEAR, "is empty"),
    "ranks differ": (pair(up=(32, 4), down=(8, 32)), UP, "their ranks differ"),
    "ranks differ in a text encoder": ({**pair(), **pair(TEXT, (8, 2), (4, 8))}, f"{TEXT}.lora_up.weight", "their ranks differ"),
    "one dimension": (pair(up=(32,), down=(4, 32)), UP, "not a matrix"),
    "no dimension": (pair(up=(), down=(4, 32)), UP, "not a matrix"),
    "lone up": ({UP: r(32, 4)}, UP, "one of the two matrices"),
    "lone down": ({DOWN: r(4, 32)}, DOWN, "one of the two matrices"),
    "lone up in a text encoder": ({**pair(), f"{TEXT}.lora_up.weight": r(8, 4)}, f"{TEXT}.lora_up.weight", "one of the two matrices"),
    "two dialects": ({**pair(), **pair("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q")}, LINEAR, "names a layer twice"),
    "two prefixes": ({**pair(), **pair(LINEAR.replace("lora_unet", "lycoris"))}, LINEAR, "names a layer twice"),
    "two names of a matrix": ({**pair(), f"{LINEAR}.lora_B.weight": r(32, 4)}, LINEAR, "two tensors for one place"),
    "half in each dialect": (
        {UP: r(32, 4), "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight": r(4, 32)}, LINEAR, "names a layer twice"),
    "integers": ({**pair(), UP: torch.ones(32, 4, dtype=torch.uint8)}, UP, "stored as integers"),
    "int8": ({**pair(), DOWN: torch.ones(4, 32, dtype=torch.int8)}, DOWN, "stored as integers"),
    "booleans": ({**pair(), DOWN: torch.ones(4, 32, dtype=torch.bool)}, DOWN, "stored as integers"),
    "kernel": (pair(CONVOLUTION, (32, 4, 1, 1), (4, 32, 1, 1)), f"{CONVOLUTION}.lora_up.weight", "change of shape"),
    "kernel turned": (pair(CONVOLUTION, (32, 4, 1, 1), (4, 32, 1, 9)), f"{CONVOLUTION}.lora_up.weight", "change of shape"),
    "kernel on a linear layer": (pair(down=(4, 32, 3, 3)), UP, "change of shape"),
    "kernel of the second matrix": (pair(CONVOLUTION, (32, 4, 3, 3), (4, 32, 3, 3)), f"{CONVOLUTION}.lora_up.weight", "ranks differ"),
    "LoHa without a half": ({f"{LINEAR}.hada_w1_a": r(32, 4), f"{LINEAR}.hada_w1_b": r(4, 32)}, f"{LINEAR}.hada_w1_b", "no hada_w2_b"),
    "LoKr of one factor": ({f"{LINEAR}.lokr_w1": r(4, 4)}, f"{LINEAR}.lokr_w1", "has 4 inputs|factors"),
    "difference": ({f"{LINEAR}.diff": r(32, 16)}, f"{LINEAR}.diff", "change of shape"),
    "bias": ({f"{CONVOLUTION}.diff_b": r(16)}, f"{CONVOLUTION}.diff_b", "change of shape"),
    "DoRA": ({**pair(), f"{LINEAR}.dora_scale": r(7, 1)}, f"{LINEAR}.dora_scale", "change of shape"),
    "OFT": ({f"{LINEAR}.oft_blocks": r(4, 4, 4)}, f"{LINEAR}.oft_blocks", "change of shape"),
    "GLoRA": ({f"{LINEAR}.a1.weight": r(4, 4)}, f"{LINEAR}.a1.weight", "has no a2"),
}  # fmt: skip
GOOD = {
    "LoRA": pair(),
    "rank 1": pair(up=(32, 1), down=(1, 32)),
    "alpha of one dimension": {**pair(), ALPHA: torch.ones(1)},
    "whole alpha": {**pair(), ALPHA: torch.tensor(4)},
    "alpha 0": {**pair(), ALPHA: torch.tensor(0.0)},
    "fp8": {key: value.to(torch.float8_e4m3fn) for key, value in pair().items()},
    "convolution": pair(CONVOLUTION, (32, 4, 1, 1), (4, 32, 3, 3)),
    "convolution unfolded": pair(CONVOLUTION, (32, 4), (4, 288)),
    "Tucker": {**pair(CONVOLUTION, (32, 4, 1, 1), (4, 32, 1, 1)), f"{CONVOLUTION}.lora_mid.weight": r(4, 4, 3, 3)},
    "LoHa, Tucker": {f"{CONVOLUTION}.{name}": r(*shape) for n in "12" for name, shape in
                     {f"hada_t{n}": (4, 4, 3, 3), f"hada_w{n}_a": (4, 32), f"hada_w{n}_b": (4, 32)}.items()},
    "LoKr": {f"{LINEAR}.lokr_w1": r(4, 4), f"{LINEAR}.lokr_w2_a": r(8, 2), f"{LINEAR}.lokr_w2_b": r(2, 8)},
    "LoKr, Tucker": {f"{CONVOLUTION}.lokr_w1": r(4, 4), f"{CONVOLUTION}.lokr_t2": r(2, 2, 3, 3),
                     f"{CONVOLUTION}.lokr_w2_a": r(2, 8), f"{CONVOLUTION}.lokr_w2_b": r(2, 8)},
    "LoKr, whole kernel": {f"{CONVOLUTION}.lokr_w1": r(4, 4), f"{CONVOLUTION}.lokr_w2": r(8, 8, 3, 3)},
    "DoRA of columns": {**pair(), f"{LINEAR}.dora_scale": r(1, 32)},
    "DoRA of rows": {**pair(CONVOLUTION, (32, 4, 1, 1), (4, 32, 3, 3)), f"{CONVOLUTION}.dora_scale": r(32, 1, 1, 1)},
    "OFT": {f"{LINEAR}.oft_blocks": r(4, 8, 8), f"{LINEAR}.rescale": r(32, 1)},
    "BOFT": {f"{LINEAR}.oft_blocks": r(2, 4, 8, 8)},
    "GLoRA": {f"{LINEAR}.{name}.weight": r(4, 4) for name in ("a1", "a2", "b1", "b2")},
    "difference": {f"{CONVOLUTION}.diff": r(32, 32, 3, 3), f"{CONVOLUTION}.diff_b": r(32)},
    "norm": {"lora_unet_down_blocks_0_resnets_0_norm1.w_norm": r(32), "lora_unet_down_blocks_0_resnets_0_norm1.b_norm": r(32)},
    "text encoder": {**pair(), **pair(TEXT, (8, 2), (2, 8)), f"{TEXT}.alpha": torch.tensor(2.0)},
}  # fmt: skip


@pytest.fixture
def student(small_teacher):
    return small_teacher.architecture, name_map(small_teacher.architecture, preset("bk-sdm-base"))


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused_by_key_in_one_sentence(name, student, tmp_path):
    tensors, key, message = DAMAGED[name]
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        remap_lora_file(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", *student)
    assert key in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ValueError) as caught:
        convert_lora_file(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", student[0])
    assert "\n" not in str(caught.value) and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", GOOD)
def test_what_is_whole_passes_unchanged(name, student, tmp_path):
    save_file(GOOD[name], tmp_path / "lora.safetensors")
    remap_lora_file(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", *student)
    written = load_file(tmp_path / "out.safetensors")
    assert written.keys() == GOOD[name].keys()
    assert all(torch.equal(written[key].float(), tensor.float()) for key, tensor in GOOD[name].items())


def test_what_goes_with_its_block_is_not_looked_at(student):
    gone = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q"
    remapped = remap_lora({**pair(), f"{gone}.lora_up.weight": r(32, 4) * float("nan")}, *student)
    assert remapped.num_dropped == 1 and remapped.tensors.keys() == pair().keys()


def test_alpha_that_overflows_a_half_is_refused_by_convert(student, tmp_path):
    tensors = {key: tensor.half() for key, tensor in pair().items()} | {ALPHA: torch.tensor(1e7)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="overflows"):
        convert_lora_file(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", student[0])


def test_one_tensor_is_read_at_a_time(student, tmp_path, monkeypatch):
    from distill_core.base.storage import StoredTensor

    held, read = [], StoredTensor.read

    def counted(self):
        import weakref

        tensor = read(self)
        held.append(weakref.ref(tensor))
        assert sum(ref() is not None for ref in held) <= 1
        return tensor

    save_file({**pair(), **pair(CONVOLUTION, (32, 4), (4, 288))}, tmp_path / "lora.safetensors")
    monkeypatch.setattr(StoredTensor, "read", counted)
    remap_lora_file(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", *student)
    assert len(held) >= 4


def test_a_control_lora_is_refused_by_name(student):
    with pytest.raises(ValueError, match="is a Control-LoRA"):
        remap_lora({"lora_controlnet": r(0), "input_blocks.0.0.up": r(32, 4), "input_blocks.0.0.down": r(4, 36)}, *student)
