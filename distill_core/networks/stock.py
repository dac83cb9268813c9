"""Which UNets stock ComfyUI opens.

ComfyUI recognises a UNet by its shapes (comfy/model_detection.py, comfy/supported_models.py of 0.33): the decoder, the mid
block and the number of layers are free, but it identifies the kind of model by the attentions of the encoder, and for SDXL
it knows five lists of their transformer depths.
"""

from __future__ import annotations

from .architecture import Architecture

_CONTEXT_WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
_HEAD_CHANNELS = {"sd1": None, "sd2": 64, "sdxl": 64}
SDXL_DEPTHS = {
    "SDXL": (0, 0, 2, 2, 10, 10),
    "SSD-1B": (0, 0, 2, 2, 4, 4),
    "Segmind Vega": (0, 0, 1, 1, 2, 2),
    "KOALA-700M": (0, 2, 5),
    "KOALA-1B": (0, 2, 6),
}
"""Model -> transformer depth after each resnet of the down stages; an SDXL must have one of these lists."""


def encoder_depths(architecture: Architecture) -> dict[str, int]:
    """Attention after each resnet of the down stages -> its transformer depth, 0 where there is none."""
    layers = (f"{s}.attn.{j}" for s in architecture.stages("down") for j in architecture.numbers(f"{s}.resnet"))
    return {attention: architecture.depth(attention) for attention in layers}


def opens_in_comfyui(architecture: Architecture) -> bool:
    """Whether ComfyUI's own loaders open the network, from a file in the LDM layout."""
    family = architecture.family
    if architecture.channels("conv_in")[1] != 320 or architecture.head_channels != _HEAD_CHANNELS.get(family, -1):
        return False
    depths = tuple(encoder_depths(architecture).values())
    if architecture.context_width != _CONTEXT_WIDTHS[family] or not any(depths):
        return False
    return depths in SDXL_DEPTHS.values() if family == "sdxl" else True
