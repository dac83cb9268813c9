"""Facts about presets and checkpoints, always taken from the network itself."""

from __future__ import annotations

from typing import Any

import torch

from .architecture import Architecture
from .denoiser import DiffusersDenoiser
from .evaluate import count_macs
from .files import UNetFile
from .plan import name_map, preset, preset_names, pruned
from .unet import build_unet

LATENT_SHAPES = {"sd1": (4, 64, 64)}  # a 512 px picture
NUM_TOKENS = 77


def published_teacher(family: str) -> Architecture:
    """The full UNet of a family, from diffusers' own defaults for it, on the meta device."""
    from diffusers import UNet2DConditionModel

    configs = {"sd1": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)}
    with torch.device("meta"):
        return Architecture.from_state_dict(UNet2DConditionModel(**configs[family]).state_dict())


def measure(architecture: Architecture, family: str) -> tuple[int, float]:
    """Parameters and GMACs of the network that is built from an architecture, on the meta device."""
    with torch.device("meta"):
        network = build_unet(architecture)
    denoiser = DiffusersDenoiser(network=network, architecture=architecture)
    macs = count_macs(denoiser, LATENT_SHAPES[family], NUM_TOKENS)
    return sum(parameter.numel() for parameter in network.parameters()), macs / 1e9


def measure_presets() -> list[dict[str, Any]]:
    """One row a preset: name, title, teacher, parameters, GMACs, both also as a share of the teacher's."""
    rows, teachers = [], {}
    for plan in map(preset, preset_names()):
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
            }
        )
    return rows


def describe(file: UNetFile) -> dict[str, Any]:
    """What ``distill inspect`` tells of a checkpoint, from its header alone."""
    architecture = file.architecture
    return {
        "file": str(file.path),
        "family": architecture.family,
        "layout": file.spelling + (f", under the prefix {file.prefix}" if file.prefix else ""),
        "dtype": file.dtype,
        "prediction": file.prediction,
        "parameters": architecture.num_parameters,
        "context_width": architecture.context_width,
        "pruned_by": file.plan.name if file.plan else None,
        "mid": "none" if "mid.resnet.0" not in architecture.modules else f"transformer depth {architecture.depth('mid.attn.0')}",
        "stages": [
            {
                "name": stage,
                "channels": architecture.channels(f"{stage}.resnet.0")[1],
                "resnets": len(numbers := architecture.numbers(f"{stage}.resnet")),
                "transformer_depth": [architecture.depth(f"{stage}.attn.{j}") for j in numbers],
            }
            for stage in (*architecture.stages("down"), *architecture.stages("up"))
        ],
    }
