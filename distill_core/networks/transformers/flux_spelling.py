"""Weights of a Flux.1 as ComfyUI spells them and as diffusers does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ENDS = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE = {
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "modulation.lin": "norm.linear",
}
_BLOCKS = {"double_blocks": ("transformer_blocks", _DOUBLE), "single_blocks": ("single_transformer_blocks", _SINGLE)}
_HALVES_SWAPPED = "final_layer.adaLN_modulation.1"  # ComfyUI has shift and scale, diffusers scale and shift


def to_comfyui(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' weights, as ComfyUI's. ``ValueError`` for one that a Flux.1 does not have."""
    import torch

    given = dict(weights)
    made: dict[str, Tensor] = {}
    for ours, theirs in _pairs(given):
        if all(name in given for name in theirs):
            made[ours] = torch.cat([given.pop(name) for name in theirs])
    if given:
        raise ValueError(f"a Flux.1 of diffusers has no {min(given)}")
    return _with_swapped_halves(made)


def to_diffusers(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """ComfyUI's weights, as diffusers'. shapes: of those, by name. ``ValueError`` for one that a Flux.1 does not have."""
    given = _with_swapped_halves(weights)
    made: dict[str, Tensor] = {}
    for ours, theirs in _pairs(shapes):
        if ours in given:
            made |= zip(theirs, given.pop(ours).split([shapes[name][0] for name in theirs]), strict=True)
    if given:
        raise ValueError(f"a Flux.1 of ComfyUI has no {min(given)}")
    return {name: weight.contiguous() for name, weight in made.items()}


def _pairs(theirs: Mapping[str, object]) -> Iterator[tuple[str, list[str]]]:
    """ComfyUI's name of each parameter, and those of diffusers' that it joins. theirs: all names of diffusers'."""
    layers = {ours: [name] for ours, name in _ENDS.items()}
    for ours, (path, table) in _BLOCKS.items():
        for number in sorted({int(name.split(".")[1]) for name in theirs if name.startswith(f"{path}.")}):
            layers |= {
                f"{ours}.{number}.{layer}": [f"{path}.{number}.{name}" for name in names.split()]
                for layer, names in table.items()
            }
    for layer, names in layers.items():
        for kind in ("weight", "bias"):
            own = "scale" if layer.endswith("_norm") else kind
            yield f"{layer}.{own}", [f"{name}.{kind}" for name in names]


def _with_swapped_halves(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    swapped = {name: weight.roll(len(weight) // 2, 0) for name, weight in weights.items() if name.startswith(_HALVES_SWAPPED)}
    return {**weights, **swapped}
