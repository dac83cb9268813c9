"""The runs in a folder: how far each is, what it takes on the disk, and how to delete one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from ..base.documents import read_json, read_toml
from ..base.locks import LOCK, locked
from .checkpoints import checkpoints_in, is_link, own, result_of
from .run import OWN, RECIPE

STAGES = "stages.json"
"""In the folder of a training of several experts: the steps of each of its stages, in order."""
OWN_OF_EXPERTS = {"experts", "base.safetensors", "ranges.json", STAGES}
_KINDS = {"student.safetensors": "student", "lora.safetensors": "LoRA"}


class RunOnDisk(NamedTuple):
    """A run, or a training of several experts, as its folder has it."""

    name: str
    kind: str
    """``student``, ``LoRA`` or ``experts``; empty before the first checkpoint."""
    step: int
    """Steps kept, summed over the stages."""
    total_steps: int | None
    """None if unknown."""
    num_bytes: int
    result: Path | None
    """The newest student or LoRA, or the folder of finished experts."""
    modified_s: float
    """When its folder last changed, in seconds since 1970."""


def runs_in(folder: Path) -> list[RunOnDisk]:
    """The runs in a folder, newest first. Links, and folders without anything of a run, are no runs."""
    inside = folder.iterdir() if folder.is_dir() else ()
    found = (run_in(path) for path in inside if path.is_dir() and not is_link(path))
    return sorted((run for run in found if run), key=lambda run: -run.modified_s)


def run_in(folder: Path) -> RunOnDisk | None:
    """The run, or the training of several experts, in a folder; None if it holds nothing of one."""
    try:
        if not _of_a_run(folder):
            return None
        stages = stages_in(folder)
        newest = [kept[-1] for stage in stages if (kept := checkpoints_in(stage))]
        result, kind = (result_of(newest[-1]), "") if newest else (None, "")
        if result:
            kind = _KINDS[result.name]
        if len(stages) > 1:
            experts = folder / "experts"
            result, kind = experts if any(experts.glob("*.json")) else None, "experts"  # listed once all are complete
        step, written = (
            sum(int(checkpoint.name) for checkpoint in newest),
            max(path.stat().st_mtime for path in (folder, *newest)),
        )
        return RunOnDisk(folder.name, kind, step, total_steps_of(folder), _bytes_in(folder), result, written)
    except OSError:  # it vanished, or is not readable for us
        return None


def stages_in(folder: Path) -> list[Path]:
    """A run's folder and the folders of its stages, in order; links are ignored."""
    found = (path for stage in ("joint*", "range_*") for path in sorted(folder.glob(stage), key=_number))
    return [folder, *(path for path in found if not is_link(path))]


def _number(stage: Path) -> int:
    number = stage.name.rpartition("_")[2]
    return int(number) if number.isdecimal() else 0


def total_steps_of(folder: Path) -> int | None:
    """Steps that a run, or all stages of a training of several experts, will have; None if its files do not say so."""
    stages = stage_steps(folder)
    if stages:
        return sum(stages.values())
    try:
        total = read_toml(own(folder / RECIPE)).get("total_steps")
    except (ValueError, RecursionError):  # of several experts, or damaged
        return None
    return total if type(total) is int else None


def stage_steps(folder: Path) -> dict[str, int]:
    """Steps of each stage of a training of several experts, by the name of its folder, in order; empty for any other run."""
    try:
        steps = read_json(own(folder / STAGES))
    except (ValueError, RecursionError):  # missing, or damaged
        return {}
    sound = all(type(count) is int and 0 <= count < 10**12 for count in steps.values())
    return steps if sound else {}


def delete_run(folder: Path) -> None:
    """Delete what a run, or a training of several experts, wrote in its folder, and the folder if nothing else is in it.

    ``ValueError`` if the folder is a link or holds no run, or if another process trains in it.
    """
    own(folder)
    if not folder.is_dir() or not _of_a_run(folder):
        raise ValueError(f"there is no run in {folder}")
    with locked(folder):
        for path in _of_a_run(folder):
            if path.is_dir() and not is_link(path):
                shutil.rmtree(path)
            else:
                path.unlink()
    (folder / LOCK).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _of_a_run(folder: Path) -> list[Path]:
    """Files and folders that a run writes into its folder; the recipe, which says what the others are, comes last."""
    stages = stages_in(folder)[1:]
    written = [path for path in folder.iterdir() if path.name in OWN | OWN_OF_EXPERTS or path.name.startswith("pruned")]
    return sorted({*stages, *written}, key=lambda path: (path.name == RECIPE, path.name))


def _bytes_in(folder: Path) -> int:
    """Size of all files in a folder; links are not followed."""
    return sum(os.lstat(os.path.join(inside, name)).st_size for inside, _, names in os.walk(folder) for name in names)
