"""What a run can be refused for before its data are read or drawn: settings, packages, its folder, room on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path

import torch

from .disk import check_room, check_writable
from .memory import STATE_BYTES
from .optim import OPTIMIZERS
from .packages import check_installed
from .recipe import DTYPES, Recipe
from .run import RECIPE, Run, stored_settings


def check_run(folder: Path, recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """``ValueError`` where a run cannot begin or go on in a folder.

    shapes: those of the student's weights.
    """
    check_packages(recipe)
    origin = stored_settings(folder).get("origin", {})
    Run(folder, recipe, origin, main=False)  # which compares the settings, and so not the data
    check_writable(folder / RECIPE, overwrite=True)
    check_checkpoints(folder, recipe, shapes)


def check_students_run(folder: Path, recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], num_students: int) -> None:
    """The same of a training of several students, each of which has checkpoints of its own."""
    check_packages(recipe)
    check_writable(folder / RECIPE, overwrite=True)
    check_checkpoints(folder, recipe, shapes, num_students)


def check_packages(recipe: Recipe) -> None:
    """``ValueError`` with the pip line for what the settings of a recipe ask for by name."""
    chosen = {f"optimizer {recipe.optimizer}": OPTIMIZERS[recipe.optimizer].package}
    chosen |= {f"tracker {name}": name for name in recipe.trackers} | ({"a LoRA": "peft"} if recipe.lora_rank else {})
    for setting, package in chosen.items():
        check_installed([package], setting)


def check_checkpoints(folder: Path, recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], num_runs: int = 1) -> None:
    """``ValueError`` where the disk has no room for the checkpoints of runs that train all weights. LoRAs are small."""
    if recipe.lora_rank:
        return
    written = ceil(recipe.total_steps / recipe.save_every_steps)
    kept = min(written, recipe.keep_checkpoints + recipe.keep_best) + (written > 1)  # the next is written before one goes
    there = sum(path.stat().st_size for path in folder.glob("**/checkpoints/*/*.safetensors"))
    check_room(
        folder,
        num_runs * kept * checkpoint_bytes(shapes, recipe) - there,
        f"{num_runs * kept} checkpoints",
        "free some space, or lower keep_checkpoints or keep_best",
    )


def checkpoint_bytes(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> int:
    """Of what a run keeps to go on: the student, what the optimizer keeps, the weights beside an average of them."""
    sizes = [torch.Size(shape) for shape in shapes.values()]
    weights = DTYPES[recipe.weight_dtype].itemsize * sum(size.numel() for size in sizes)
    averaged = bool(recipe.ema_decay) or recipe.optimizer == "schedulefree"
    return (1 + averaged) * weights + sum(map(STATE_BYTES[recipe.optimizer], sizes))
