"""LoRAs of transformers: only the numbers of blocks change, and nothing reaches another block."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_core.lora.metadata import KEY
from distill_core.lora.remap import remap_lora
from distill_core.networks.transformers.architecture import Transformer
from distill_core.pruning.plan import name_map
from distill_core.pruning.plan_text import read_plan

WIDTH = 8
SHAPES = {
    "img_in.weight": (WIDTH, 4),
    **{f"double_blocks.{n}.img_attn.norm.key_norm.scale": (4,) for n in range(4)},
    **{f"double_blocks.{n}.img_attn.qkv.weight": (3 * WIDTH, WIDTH) for n in range(4)},
    **{f"single_blocks.{n}.linear1.weight": (7 * WIDTH, WIDTH) for n in range(12)},
}
TEACHER, _ = Transformer.find(SHAPES)
KEPT = {"double": [0, 2], "single": [1, 10, 11]}
MAPPING = name_map(TEACHER, read_plan("keep double 0,2 single 1,10,11", TEACHER))
FIRST = "lora_unet_double_blocks_0_img_attn_qkv"


def pair(layer, down="lora_down", up="lora_up", outputs=3 * WIDTH, inputs=WIDTH):
    return {f"{layer}.{down}.weight": torch.ones(2, inputs), f"{layer}.{up}.weight": torch.ones(outputs, 2)}


def names(tensors, metadata=None):
    return {*remap_lora(tensors, TEACHER, MAPPING, metadata=metadata).tensors}


@pytest.mark.parametrize(
    "before,after",
    [
        ("lora_unet_double_blocks_2_img_attn_qkv", "lora_unet_double_blocks_1_img_attn_qkv"),
        ("lora_unet_single_blocks_10_linear1", "lora_unet_single_blocks_1_linear1"),
        ("diffusion_model.single_blocks.11.linear1", "diffusion_model.single_blocks.2.linear1"),
        ("transformer.transformer_blocks.2.attn.to_q", "transformer.transformer_blocks.1.attn.to_q"),
        ("transformer.single_transformer_blocks.1.attn.to_q", "transformer.single_transformer_blocks.0.attn.to_q"),
        ("single_transformer_blocks.11.proj_mlp", "single_transformer_blocks.2.proj_mlp"),
        ("lycoris_transformer_blocks_2_attn_to_q", "lycoris_transformer_blocks_1_attn_to_q"),
        ("lora_transformer_single_transformer_blocks_10_attn_to_q", "lora_transformer_single_transformer_blocks_1_attn_to_q"),
        ("transformer.x_embedder", "transformer.x_embedder"),
        ("lora_unet_txt_in_individual_token_refiner_blocks_1_mlp_0", "lora_unet_txt_in_individual_token_refiner_blocks_1_mlp_0"),
        ("transformer.context_embedder.token_refiner.refiner_blocks.1.attn", "transformer.context_embedder.token_refiner.refiner_blocks.1.attn"),
        ("lora_te1_text_model_encoder_layers_3_mlp_fc1", "lora_te1_text_model_encoder_layers_3_mlp_fc1"),
    ],
)  # fmt: skip
def test_the_number_of_a_block_changes_and_the_rest_stays(before, after):
    outputs = 7 * WIDTH if before.endswith("linear1") else 3 * WIDTH
    assert names(pair(FIRST) | pair(before, outputs=outputs)) == {*pair(FIRST), *pair(after)}


@settings(deadline=None)
@given(
    st.sampled_from(["lora_unet_", "diffusion_model.", "transformer.", "lycoris_", ""]),
    st.sampled_from([("double", "double_blocks"), ("double", "transformer_blocks"), ("single", "single_transformer_blocks")]),
    st.data(),
)
def test_every_block_goes_where_the_plan_says(prefix, of_list, data):
    word, head = of_list
    number = data.draw(st.integers(0, 3 if word == "double" else 11))
    separator = "." if prefix in ("diffusion_model.", "transformer.", "") else "_"
    layer = f"{prefix}{head}{separator}{number}{separator}x"
    remapped = remap_lora(pair(FIRST) | pair(layer), TEACHER, MAPPING)
    if number in KEPT[word]:
        new = f"{prefix}{head}{separator}{KEPT[word].index(number)}{separator}x"
        assert {*remapped.tensors} == {*pair(FIRST), *pair(new)} and remapped.num_dropped == 0
    else:
        assert {*remapped.tensors} == {*pair(FIRST)} and remapped.num_dropped == 1


def test_layers_are_counted_as_they_stay_or_go():
    remapped = remap_lora(
        pair(FIRST) | pair("lora_unet_double_blocks_1_img_attn_qkv") | pair("lora_te1_layers_0") | pair("lora_unet_img_in", inputs=4, outputs=WIDTH),
        TEACHER,
        MAPPING,
    )  # fmt: skip
    assert (remapped.num_kept, remapped.num_dropped, remapped.num_text_encoder) == (2, 1, 1)
    assert remapped.describe() == (
        "2 of 3 layers kept; 1 dropped with the blocks the student does not have; 1 of text encoders untouched"
    )


def test_a_lora_of_xlabs_is_named_as_comfyui_reads_it_at_any_depth():
    theirs = {f"double_blocks.2.processor.qkv_lora1.{way}.weight": torch.ones(2, 2) for way in ("down", "up")}
    theirs |= {f"single_blocks.10.processor.proj_lora.{way}.weight": torch.ones(2, 2) for way in ("down", "up")}
    theirs = {name: torch.ones(2, WIDTH) if "qkv_lora1.down" in name else torch.ones(3 * WIDTH, 2) if "qkv_lora1.up" in name else tensor
              for name, tensor in theirs.items()}  # fmt: skip
    assert names(theirs) == {
        *(f"diffusion_model.double_blocks.1.img_attn.qkv.lora_{way}.weight" for way in ("down", "up")),
        *(f"diffusion_model.single_blocks.1.linear2.lora_{way}.weight" for way in ("down", "up")),
    }


def test_a_strength_that_comfyui_does_not_read_is_multiplied_in():
    metadata = {KEY: json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {r"transformer_blocks\.2\.attn\.to_q": 8}}), "ss_x": "y", "sshs_model_hash": "1"}  # fmt: skip
    layers = ("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.2.attn.to_q")
    remapped = remap_lora(
        pair(layers[0], "lora_A", "lora_B") | pair(layers[1], "lora_A", "lora_B"), TEACHER, MAPPING, metadata=metadata
    )
    of = {name.split(".")[2]: tensor.unique().tolist() for name, tensor in remapped.tensors.items() if "lora_B" in name}
    assert of == {"0": [3.0], "1": [4.0]} and remapped.metadata == {"ss_x": "y"}


def test_a_strength_in_a_file_without_prefixes_is_that_of_its_path():
    """The path of the layer is the whole name: no network stands before it."""
    layer = "transformer_blocks.0.attn.to_q"
    metadata = {KEY: json.dumps({"r": 2, "lora_alpha": 2, "alpha_pattern": {r"^transformer_blocks\.0\.attn\.to_q": 1}})}
    remapped = remap_lora(pair(layer, "lora_A", "lora_B"), TEACHER, MAPPING, metadata=metadata)
    assert remapped.tensors[f"{layer}.lora_B.weight"].unique().tolist() == [0.5]


@pytest.mark.parametrize("kind", ["hada_w1_{0} hada_w2_{0}", "lokr_w1_{0} lokr_w2_{0}"])
def test_a_strength_of_what_is_no_plain_lora_becomes_an_alpha(kind):
    before, after = (f"transformer.transformer_blocks.{number}.attn.to_q" for number in (2, 1))
    tensors = {
        f"{before}.{name}": torch.ones(4, 2) if side == "a" else torch.ones(2, 4)
        for side in "ab"
        for name in kind.format(side).split()
    }
    metadata = {KEY: json.dumps({"transformer.r": 2, "transformer.alpha": 3})}
    remapped = remap_lora(tensors, TEACHER, MAPPING, metadata=metadata).tensors
    assert remapped.pop(f"{after}.alpha").item() == 3
    assert remapped.keys() == {key.replace(before, after) for key in tensors}


def test_a_lora_that_widens_a_layer_fits_the_wider_one():
    """As ComfyUI saves Flux's control LoRAs: img_in takes twice the channels."""
    wide = pair("diffusion_model.img_in", outputs=WIDTH, inputs=8) | pair(FIRST)
    marked = wide | {"diffusion_model.img_in.reshape_weight": torch.tensor([WIDTH, 8])}
    assert names(marked) == marked.keys()
    for sizes in ([WIDTH, 6], [WIDTH, 2], [WIDTH]):
        with pytest.raises(ValueError, match="the model's layer has"):
            names(wide | {"diffusion_model.img_in.reshape_weight": torch.tensor(sizes)})


@pytest.mark.parametrize(
    "tensors,message",
    [
        (pair("lora_unet_double_blocks_7_img_attn_qkv"), "the teacher has no block for lora_unet_double_blocks_7"),
        (pair("lora_unet_joint_blocks_0_x_block_attn_qkv"), "made for another model than Flux.1"),
        (pair("lora_unet_down_blocks_0_attentions_0_proj_in"), "made for another model than Flux.1"),
        (pair("lora_te1_layers_0"), "none of its tensors belongs to a block of Flux.1"),
        ({}, "the file is empty"),
        (pair("lora_unet_double_blocks_1_img_attn_qkv"), "nothing is left of this LoRA: all 1 layers"),
        (pair(FIRST, inputs=WIDTH + 1), "but the model's layer has"),
        (pair(FIRST) | {f"{FIRST}.alpha": torch.ones(2)}, "must be one number"),
        ({f"{FIRST}.lora_down.weight": torch.ones(2, WIDTH)}, "has no lora_up beside it"),
        ({name: tensor * float("nan") for name, tensor in pair(FIRST).items()}, "holds NaN or Inf"),
        (pair(FIRST) | pair(FIRST, "lora_A", "lora_B"), "two tensors for one place"),
    ],
)
def test_what_does_not_belong_or_is_damaged_is_one_sentence(tensors, message):
    with pytest.raises(ValueError) as caught:
        remap_lora(tensors, TEACHER, MAPPING)
    assert message in str(caught.value) and "\n" not in str(caught.value)
