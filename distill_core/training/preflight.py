"""Checks before a run reads or makes its data: settings, packages, its folder, and disk space."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
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
    check_checkpoints(folder, settings, shapes)


def check_experts_run(folder: Path, settings: TrainingSettings, shapes: Mapping[str, tuple[int, ...]], num_experts: int) -> None:
    """The same for a training of several experts, each with its own checkpoints."""
    check_packages(settings)
    check_writable(folder / RECIPE, overwrite=True)
    check_checkpoints(folder, settings, shapes, num_experts)


def check_packages(settings: TrainingSettings) -> None:
    """Raise ``ValueError`` with the pip command if a package that the settings need is missing."""
    chosen = {f"optimizer {settings.optimizer}": OPTIMIZERS[settings.optimizer].package}
    chosen |= {f"tracker {name}": name for name in settings.trackers} | ({"a LoRA": "peft"} if settings.lora_rank else {})
    for setting, package in chosen.items():
        check_installed([package], setting)


def check_checkpoints(folder: Path, settings: TrainingSettings, shapes: Mapping[str, tuple[int, ...]], num_runs: int = 1) -> None:
    """Raise ``ValueError`` if checkpoints of all weights do not fit on the disk. LoRAs are small and not checked."""
    if settings.lora_rank:
        return
    there = sum(path.stat().st_size for path in folder.glob("**/checkpoints/*/*.safetensors"))
    check_room(
        folder,
        disk_bytes(shapes, settings, num_runs) - there,
        f"{num_runs * _most_kept(settings)} checkpoints",
        "free some space, or lower keep_checkpoints or keep_best",
    )


def disk_bytes(shapes: Mapping[str, tuple[int, ...]], settings: TrainingSettings, num_runs: int = 1) -> int:
    """The most that checkpoints of all weights take on the disk while runs train, one after another."""
    return num_runs * _most_kept(settings) * checkpoint_bytes(shapes, settings)


def _most_kept(settings: TrainingSettings) -> int:
    """Checkpoints of a run that exist at once: the oldest goes only after the next is written."""
    written = ceil(settings.total_steps / settings.save_every_steps)
    return min(written, settings.keep_checkpoints + settings.keep_best) + (written > 1)


def checkpoint_bytes(shapes: Mapping[str, tuple[int, ...]], settings: TrainingSettings) -> int:
    """Size of one checkpoint: the trained weights, the optimizer state, and what else is kept beside them."""
    sizes = [torch.Size(shape) for shape in shapes.values()]
    weights = DTYPES[settings.weight_dtype].itemsize * sum(size.numel() for size in sizes)
    exported_apart = settings.optimizer == "schedulefree" and not settings.ema_decay
    return (1 + exported_apart) * weights + beside_weights(sizes, settings).total()
