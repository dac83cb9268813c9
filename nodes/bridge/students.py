"""Students of ranges of timesteps as one MODEL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comfy.model_patcher import ModelPatcher

from ...distill_core.ranges import Boundary, TimestepRanges
from ...distill_core.storage import read_header
from ...distill_core.students import Students
from .build import load_student
from .model import with_lora
from .router import route_models


def route_students(students: Sequence[ModelPatcher], ranges: TimestepRanges) -> ModelPatcher:
    """One MODEL of the students of ranges, given the least noisy first."""
    return route_models(students[::-1], [Boundary(boundary, "timestep") for boundary in reversed(ranges.boundaries)])


def load_students(students: Students) -> ModelPatcher:
    """A folder of students as one MODEL; with a shared base its weights are there once."""
    base = students.base and load_student(students.base)[0]
    loaded = {path: with_lora_file(base, path) if base else load_student(path)[0] for path in dict.fromkeys(students.to_load)}
    return route_students([loaded[path] for path in students.to_load], students.ranges)


def with_lora_file(model: ModelPatcher, path: Path) -> ModelPatcher:
    """A MODEL with the LoRA of a range, which shares its weights."""
    lora = {name: tensor.read() for name, tensor in read_header(path).tensors.items()}
    return with_lora(model, None, lora, 1.0, 0.0)[0]
