"""A UNet as a network of diffusers, built from an architecture alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .architecture import Architecture
from .files import UNetFile
from .layouts import to_diffusers

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def diffusers_config(architecture: Architecture) -> dict[str, Any]:
    """``config.json`` of ``UNet2DConditionModel`` for an architecture; ``ValueError`` names what diffusers cannot hold."""
    down, up = architecture.stages("down"), architecture.stages("up")
    widths = [architecture.channels(f"{stage}.resnet.0")[1] for stage in down]
    layers = [len(architecture.numbers(f"{stage}.resnet")) for stage in down]
    depths = {stage: _uniform_attention(architecture, stage) for stage in (*down, *up)}
    has_mid = "mid.resnet.0" in architecture.modules
    mid_depth = architecture.depth("mid.attn.0")
    mid_type = ("UNetMidBlock2DCrossAttn" if mid_depth else "UNetMidBlock2D") if has_mid else None
    label_width = architecture.label_width
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
        "mid_block_type": mid_type,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "sample_size": {"sdxl": 128, "sd1": 64, "sd2": 64}.get(architecture.family, 64),
        "use_linear_projection": architecture.family in ("sd2", "sdxl"),
    }
    if label_width is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": label_width,
        }
    if any(depth > 1 for of_stage in depths.values() for depth in of_stage):
        config["transformer_layers_per_block"] = [depths[s][0] if len(set(depths[s])) == 1 else depths[s] for s in down]
        config["reverse_transformer_layers_per_block"] = [depths[s] for s in up]
    return config


def _uniform_attention(architecture: Architecture, stage: str) -> list[int]:
    """Transformer depth behind each resnet of a stage."""
    depths = [architecture.depth(f"{stage}.attn.{j}") for j in architecture.numbers(f"{stage}.resnet")]
    if any(depths) and not all(depths):
        raise ValueError(
            f"{stage} keeps attention behind some of its resnets only, which the diffusers layout cannot "
            "express; write the ldm layout"
        )
    return depths


def build_unet(architecture: Architecture) -> UNet2DConditionModel:
    """A network with freshly initialised weights; raises if diffusers would build anything else than asked for."""
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel.from_config(diffusers_config(architecture))
    names = to_diffusers(architecture.shapes)
    built = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    wanted = {names[name]: tuple(shape) for name, shape in architecture.shapes.items()}
    if built != wanted:
        different = sorted(set(built.items()) ^ set(wanted.items()))
        raise ValueError(f"diffusers cannot build this UNet; the first parameter that differs is {different[0][0]}")
    return network


def load_unet(file: UNetFile, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The network of a file, in ``dtype``, in evaluation mode."""
    network = build_unet(file.architecture)
    if dtype != torch.float32:
        network = network.to(dtype)
    names = to_diffusers(file.architecture.shapes)
    network.load_state_dict({names[name]: weight for name, weight in file.state_dict.items()})
    return network.eval()
