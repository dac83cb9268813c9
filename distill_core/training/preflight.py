"""Checks before a run reads or makes its data: settings, packages, its folder, and disk space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from pathlib import Path

import torch

from ..base.disk import check_room, check_writable
from ..base.packages import check_installed
from ..base.precision import DTYPES
from .memory import beside_weights
from .optim import OPTIMIZERS
from .run import RECIPE, Run, started
from .settings import TrainingSettings


def check_run(folder: Path, settings: TrainingSettings, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``ValueError`` if a run cannot start or resume in a folder.

    shapes: shapes of the student's weights.
    """
    check_packages(settings)
    Run(folder, settings, started(folder).inputs, main=False)  # compares the settings, but not the data
    check_writable(folder / RECIPE, overwrite=True)
    check_checkpoints(folder, shapes, [settings])


def check_experts_run(
    folder: Path, settings: TrainingSettings, shapes: Mapping[str, tuple[int, ...]], stages: Sequence[TrainingSettings]
) -> None:
    """The same for a training of several experts. stages: the settings of each of its runs."""
    check_packages(settings)
    check_writable(folder / RECIPE, overwrite=True)
    check_checkpoints(folder, shapes, stages)


def check_packages(settings: TrainingSettings) -> None:
    """Raise ``ValueError`` with the pip command if a package that the settings need is missing."""
    chosen = {f"optimizer {settings.optimizer}": OPTIMIZERS[settings.optimizer].package}
    chosen |= {f"tracker {name}": name for name in settings.trackers} | ({"a LoRA": "peft"} if settings.lora_rank else {})
    for setting, package in chosen.items():
        check_installed([package], setting)


def check_checkpoints(folder: Path, shapes: Mapping[str, tuple[int, ...]], stages: Sequence[TrainingSettings]) -> None:
    """Raise ``ValueError`` if the checkpoints of runs that train one after another do not fit on the disk."""
    there = sum(path.stat().st_size for path in folder.glob("**/checkpoints/*/*.safetensors"))
    check_room(
        folder,
        disk_bytes(shapes, stages) - there,
        f"{sum(map(_most_kept, stages)) + any(map(_drops, stages))} checkpoints",
        "free some space, or lower keep_checkpoints or keep_best",
    )


def disk_bytes(shapes: Mapping[str, tuple[int, ...]], stages: Sequence[TrainingSettings]) -> int:
    """The most that checkpoints take on the disk while runs train one after another. LoRAs are small and not counted."""
    whole = [(stage, checkpoint_bytes(shapes, stage)) for stage in stages if not stage.lora_rank]
    beside = max(
        (num_bytes for stage, num_bytes in whole if _drops(stage)), default=0
    )  # the oldest goes after the next is written
    return sum(_most_kept(stage) * num_bytes for stage, num_bytes in whole) + beside


def _most_kept(settings: TrainingSettings) -> int:
    return min(_num_written(settings), settings.keep_checkpoints + settings.keep_best)


def _drops(settings: TrainingSettings) -> bool:
    """Whether a run writes more checkpoints than it keeps."""
    return _num_written(settings) > _most_kept(settings)


def _num_written(settings: TrainingSettings) -> int:
    """Checkpoints that a run writes: regularly, at every validation if the best are kept, and at the end."""
    intervals = {settings.save_every_steps}
    if settings.keep_best:
        intervals.add(settings.validate_every_steps)
    total, both = settings.total_steps, lcm(*intervals)
    regularly = sum(total // each for each in intervals) - (total // both if len(intervals) > 1 else 0)
    return regularly + all(total % each for each in intervals)


def checkpoint_bytes(shapes: Mapping[str, tuple[int, ...]], settings: TrainingSettings) -> int:
    """Size of one checkpoint: the trained weights, the optimizer state, and what else is kept beside them."""
    sizes = [torch.Size(shape) for shape in shapes.values()]
    weights = DTYPES[settings.weight_dtype].itemsize * sum(size.numel() for size in sizes)
    exported_apart = settings.optimizer == "schedulefree" and not settings.ema_decay
    return (1 + exported_apart) * weights + beside_weights(sizes, settings).total()
