"""Diffusers configuration of a UNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .architecture import Architecture

LARGEST_SIDE = 4096  # of latents


def diffusers_config(architecture: Architecture) -> dict[str, Any]:
    """``config.json`` of ``UNet2DConditionModel`` for an architecture; ``ValueError`` names what it cannot express."""
    if reason := beyond_diffusers(architecture):
        raise ValueError(f"{reason}, which the diffusers layout cannot express; write the ldm layout")
    return config_of(architecture, {stage: _depths(architecture, stage) for stage in _stages(architecture)})


def kept_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher's config says that no shape tells: the side of its latents, and attention in float32."""
    upcast, side = config.get("upcast_attention"), config.get("sample_size")
    kept: dict[str, Any] = {"upcast_attention": upcast} if type(upcast) is bool else {}
    return kept | ({"sample_size": side} if type(side) is int and 0 < side <= LARGEST_SIDE else {})


def _stages(architecture: Architecture) -> list[str]:
    return [*architecture.stages("down"), *architecture.stages("up")]


def _depths(architecture: Architecture, stage: str) -> list[int]:
    """Transformer depth after each resnet of a stage."""
    return [architecture.depth(f"{stage}.attn.{j}") for j in architecture.numbers(f"{stage}.resnet")]


def beyond_diffusers(architecture: Architecture) -> str | None:
    """What a diffusers config cannot express; None if it can express everything."""
    for stage in _stages(architecture):
        if any(depths := _depths(architecture, stage)) and not all(depths):
            return f"{stage} keeps attention after only some of its resnets"
    mid, inner = architecture.depth("mid.attn.0"), set(_depths(architecture, architecture.stages("down")[-1]))
    if mid and any(inner) and inner != {mid}:
        return f"mid has {mid} transformer blocks and the innermost down stage {sorted(inner)}"
    return None


def config_of(architecture: Architecture, depths: dict[str, list[int]]) -> dict[str, Any]:
    if architecture.context_width is None:
        raise ValueError("diffusers builds no UNet of this kind without any attention; keep one at least")
    down, up = architecture.stages("down"), architecture.stages("up")
    widths = [architecture.channels(f"{stage}.resnet.0")[1] for stage in down]
    layers = [len(architecture.numbers(f"{stage}.resnet")) for stage in down]
    mid_depth = architecture.depth("mid.attn.0")
    mid_type = "UNetMidBlock2DCrossAttn" if mid_depth else "UNetMidBlock2D"
    config = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": [architecture.heads(width) for width in widths],
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": architecture.context_width,
        "down_block_types": ["CrossAttnDownBlock2D" if any(depths[s]) else "DownBlock2D" for s in down],
        "up_block_types": ["CrossAttnUpBlock2D" if any(depths[s]) else "UpBlock2D" for s in up],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": architecture.channels("conv_in")[0],
        "out_channels": architecture.channels("conv_out")[1],
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "mid_block_scale_factor": 1,
        "mid_block_type": mid_type if "mid.resnet.0" in architecture.modules else None,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "sample_size": 128 if architecture.family == "sdxl" else 64,
        "use_linear_projection": architecture.linear_projection,
    }
    if architecture.label_width is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": architecture.label_width,
        }
    if mid_depth > 1 or any(depth > 1 for of_stage in depths.values() for depth in of_stage):
        of_down = [depths[s][0] if len(set(depths[s])) == 1 else depths[s] for s in down]
        # diffusers gives the mid block the depth of the innermost stage, even if that has no attention.
        config["transformer_layers_per_block"] = [*of_down[:-1], of_down[-1] or mid_depth]
        config["reverse_transformer_layers_per_block"] = [depths[s] for s in up]
    return config


def envelope(architecture: Architecture) -> dict[str, list[int]]:
    """Depths a config can express, none below the architecture's: one per stage; the innermost is at least the mid's."""
    depths = {stage: _depths(architecture, stage) for stage in _stages(architecture)}
    inner = architecture.stages("down")[-1]
    depths[inner] = [max(*depths[inner], architecture.depth("mid.attn.0")) for _ in depths[inner]]
    return {stage: [max(of_stage)] * len(of_stage) for stage, of_stage in depths.items()}
