"""The folders of runs: how far each is, what it takes on the disk, and how to delete one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from ..base.documents import read_json, read_toml
from ..base.locks import LOCK, locked
from ..base.storage import clear_abandoned, discard
from .checkpoints import checkpoints_in, is_link, own, result_of, step_in
from .run import METRICS, OWN, RECIPE

STAGES = "stages.json"
"""In the folder of a training of several experts: the steps of each of its stages, in order."""
EXPERTS = "experts"
"""In the same folder: the experts, listed in a JSON file once all are complete."""
OWN_OF_EXPERTS = {EXPERTS, "base.safetensors", "ranges.json", STAGES}
_STAGE = re.compile(r"joint(_\d{1,4})?|range_\d{1,4}")
_PRUNED = re.compile(r"pruned(_\d{1,4})?\.safetensors")
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
    """The run, or the training of several experts, in a folder; None if it holds none."""
    try:
        if not is_run(folder):
            return None
        stages = stages_in(folder)
        newest = [kept[-1] for stage in stages if (kept := checkpoints_in(stage))]
        kind, result = "", None
        if len(stages) > 1:
            kind = "experts"
            result = folder / EXPERTS if any((folder / EXPERTS).glob("*.json")) else None
        elif newest:
            result = result_of(newest[-1])
            kind = _KINDS[result.name] if result else ""
        return RunOnDisk(
            name=folder.name,
            kind=kind,
            step=sum(int(checkpoint.name) for checkpoint in newest),
            total_steps=total_steps_of(folder),
            num_bytes=_bytes_in(folder),
            result=result,
            modified_s=max(path.stat().st_mtime for path in (folder, *newest)),
        )
    except OSError:  # it vanished, or is not readable for us
        return None


def steps_kept(folder: Path) -> int:
    """Steps that a run, or all stages of a training of several experts, have kept."""
    return sum(map(step_in, stages_in(folder)))


def is_run(folder: Path) -> bool:
    """Whether a folder holds what only a run, or a training of several experts, writes."""
    marks = (folder / name for name in (RECIPE, METRICS, STAGES, "checkpoints"))
    return len(stages_in(folder)) > 1 or any(mark.exists() for mark in marks)


def stages_in(folder: Path) -> list[Path]:
    """A run's folder and the folders of its stages, in order; links are ignored."""
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if _STAGE.fullmatch(path.name)]
    return [folder, *sorted((path for path in found if path.is_dir() and not is_link(path)), key=_place)]


def _place(stage: Path) -> tuple[str, int]:
    name, _, number = stage.name.partition("_")
    return name, int(number or 0)


def total_steps_of(folder: Path) -> int | None:
    """Steps that a run, or all stages of a training of several experts, will have; None if its files do not say so."""
    stages = _stage_steps(folder)
    if stages:
        return sum(stages.values())
    try:
        total = read_toml(own(folder / RECIPE)).get("total_steps")
    except (ValueError, RecursionError):  # of several experts, or damaged
        return None
    return total if type(total) is int else None


def _stage_steps(folder: Path) -> dict[str, int]:
    """Steps of each stage of a training of several experts; empty for any other run, and if the file is damaged."""
    try:
        steps = read_json(own(folder / STAGES))
    except (ValueError, RecursionError):
        return {}
    sound = all(type(count) is int and 0 <= count < 10**12 for count in steps.values())
    return steps if sound else {}


def delete_run(folder: Path) -> None:
    """Delete what a run, or a training of several experts, wrote in its folder, and the folder if nothing else is in it.

    ``ValueError`` if the folder is a link or holds no run, or if a process trains in it. If a file cannot be deleted, the run is
    as it was.
    """
    own(folder)
    if not folder.is_dir() or not is_run(folder):
        raise ValueError(f"there is no run in {folder}")
    with locked(folder, must=True):
        clear_abandoned(folder)
        discard(_of_a_run(folder))
        if os.name == "posix":  # before the lock is released, so that nobody holds a lock that is gone
            (folder / LOCK).unlink(missing_ok=True)
    try:
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()
    except OSError:  # something else is in it, or another process has locked it since
        pass


def _of_a_run(folder: Path) -> list[Path]:
    """What a run writes into its folder."""
    names = OWN | OWN_OF_EXPERTS
    written = (path for path in folder.iterdir() if path.name in names or _PRUNED.fullmatch(path.name))
    return [*stages_in(folder)[1:], *written]


def _bytes_in(folder: Path) -> int:
    """Size of all files in a folder, each once; links are not followed."""
    sizes: dict[tuple[int, int], int] = {}
    for inside, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(inside, name))
            except FileNotFoundError:  # a write has just ended
                continue
            sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())
