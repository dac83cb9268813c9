"""Measurements of the presets, always taken from the built network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..diffusion.denoiser import DiffusersDenoiser
from ..diffusion.macs import count_macs
from ..networks.architecture import Architecture
from ..networks.build import build_unet
from ..pruning.plan import name_map, preset, preset_names, pruned

LATENT_SHAPES = {"sd1": (4, 64, 64), "sd2": (4, 64, 64), "sdxl": (4, 128, 128)}
"""Latents of 512 px and 1024 px images."""
NUM_TOKENS = 77
_SD2 = dict(sample_size=64, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
_SDXL = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=[1, 2, 10],
    cross_attention_dim=2048,
    attention_head_dim=[5, 10, 20],
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
TEACHER_CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sd2": _SD2,
    "sdxl": _SDXL,
}
"""Published diffusers configs of the full UNets."""


def published_teacher(family: str) -> Architecture:
    """The full UNet of a family: a key of `TEACHER_CONFIGS`."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return Architecture.from_state_dict(UNet2DConditionModel(**TEACHER_CONFIGS[family]).state_dict())


def macs_of(architecture: Architecture, latent_shape: tuple[int, int, int], num_tokens: int = NUM_TOKENS) -> int:
    """Multiply-accumulates of one evaluation for one image, counted on a network without weights."""
    with torch.device("meta"):
        network = build_unet(architecture)
    return count_macs(DiffusersDenoiser(network=network, architecture=architecture), latent_shape, num_tokens)


def measure(architecture: Architecture, family: str) -> tuple[int, float]:
    """Parameters and GMACs of an architecture, from its built network."""
    return architecture.num_parameters, macs_of(architecture, LATENT_SHAPES[family]) / 1e9


def measure_presets(on_preset: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """One row per preset: name, title, teacher, parameters and GMACs, both also as a share of the teacher's.

    ``on_preset`` is called after each preset.
    """
    rows, teachers = [], {}
    for plan in map(preset, preset_names()):
        assert plan.teacher is not None  # a preset is for one family
        if plan.teacher not in teachers:
            architecture = published_teacher(plan.teacher)
            teachers[plan.teacher] = architecture, *measure(architecture, plan.teacher)
        architecture, teacher_parameters, teacher_gmacs = teachers[plan.teacher]
        student = pruned(architecture, name_map(architecture, plan))
        parameters, gmacs = measure(student, plan.teacher)
        rows.append(
            {
                "name": plan.name,
                "title": plan.title,
                "teacher": plan.teacher,
                "parameters": parameters,
                "parameters_of_teacher": parameters / teacher_parameters,
                "gmacs": round(gmacs, 1),
                "gmacs_of_teacher": gmacs / teacher_gmacs,
                "source": plan.source,
                "choice": plan.choice,
            }
        )
        on_preset()
    return rows
