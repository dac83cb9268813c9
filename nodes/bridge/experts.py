"""Experts for ranges of timesteps as one MODEL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comfy.model_patcher import ModelPatcher

from ...distill_core.base.storage import read_header
from ...distill_core.diffusion.ranges import Boundary, TimestepRanges
from ...distill_core.routing.experts import Experts
from .build import load_student
from .model import with_lora
from .router import route_models


def route_experts(experts: Sequence[ModelPatcher], ranges: TimestepRanges) -> ModelPatcher:
    """One routed MODEL of the experts, the noisiest range first."""
    return route_models(experts, [Boundary(boundary, "timestep") for boundary in ranges.boundaries])


def load_experts(experts: Experts) -> ModelPatcher:
    """A folder of experts as one MODEL; experts with a shared base hold its weights only once."""
    base = experts.base and load_student(experts.base)[0]
    loaded = {path: with_lora_file(base, path) if base else load_student(path)[0] for path in dict.fromkeys(experts.to_load)}
    return route_experts([loaded[path] for path in experts.to_load], experts.ranges)


def with_lora_file(model: ModelPatcher, path: Path) -> ModelPatcher:
    """A MODEL with the LoRA of one range; both MODELs share their weights."""
    lora = {name: tensor.read() for name, tensor in read_header(path).tensors.items()}
    return with_lora(model, None, lora, 1.0, 0.0)[0]
