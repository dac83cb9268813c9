"""Live view of a run: its losses as a few points, its speed, and its newest samples."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import is_link
from .objective import LOSSES, MEASURED_WITH_DMD
from .run import METRICS, RECIPE, read_metrics
from .run_folders import STAGES, stages_in, total_steps_of

if TYPE_CHECKING:
    from .loop import Progress

MAX_POINTS = 1000
TERMS = ("total", *LOSSES, *MEASURED_WITH_DMD, "validation")
SECONDS_BETWEEN = 1.0


def points(rows: Sequence[Mapping[str, float]], max_points: int = MAX_POINTS) -> dict[str, Any]:
    """Rows of metrics reduced to at most ``max_points`` points, each for the same number of consecutive rows.

    ``step``: the last step of each point; ``mean``, ``min``, ``max``: lists by metric name, None where it was not measured.
    ``min`` and ``max`` cover the losses; losses by timestep have only ``mean``.
    """
    size = max(1, math.ceil(len(rows) / max_points))
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    bins = dict.fromkeys(name for row in rows for name in row if name.startswith("timesteps/"))
    terms = [name for name in TERMS if any(name in row for row in rows)]

    def column(name: str, of: Callable[[list[float]], float]) -> list[float | None]:
        measured = ([row[name] for row in group if math.isfinite(row.get(name, math.nan))] for group in groups)
        return [float(f"{of(values):.6g}") if values else None for values in measured]

    return {
        "step": [int(group[-1]["step"]) for group in groups],
        "mean": {name: column(name, _mean) for name in (*terms, *sorted(bins, key=_first_timestep))},
        "min": {name: column(name, min) for name in terms},
        "max": {name: column(name, max) for name in terms},
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _first_timestep(name: str) -> int:
    return int(name.removeprefix("timesteps/").split("-")[0])


# --- during training


class Live:
    """Collects the progress of each step into messages: at most one per second, and one at the end."""

    def __init__(self, name: str, last_step: int):
        self.name, self.last_step = name, last_step
        self._rows: list[dict[str, float]] = []
        self._told: int | None = None
        self._next = -math.inf

    def tell(self, progress: Progress, now_s: float) -> dict[str, Any] | None:
        """A message with all steps since the previous one, or None if it is too early.

        ``after``: last step of the previous message, None for the first; a client that missed one asks for `history`.
        """
        self._rows.append({**progress.losses, "step": progress.step})
        if now_s < self._next and progress.step < self.last_step:
            return None
        message = {
            "run": self.name,
            "step": progress.step,
            "total_steps": progress.total_steps,
            "seconds_per_step": progress.seconds_per_step,
            "seconds_left": (self.last_step - progress.step) * progress.seconds_per_step,
            "after": self._told,
            "points": points(self._rows),
        }
        self._rows, self._told, self._next = [], progress.step, now_s + SECONDS_BETWEEN
        return message


# --- after training


def history(folder: Path) -> dict[str, Any] | None:
    """History of the run, or of the training of several experts, in a folder; None if it has no steps yet.

    ``run``, ``step``, ``total_steps`` (None if unknown), ``points``, and the ``stages`` of several experts that have begun: the name of
    each, and the step after which it begins. Cached until a file changes.
    """
    written = [folder / RECIPE, folder / STAGES, *(stage / METRICS for stage in stages_in(folder))]
    stamps = tuple((path, stat.st_size, stat.st_mtime_ns) for path in written if (stat := _stat(path)))
    return _history(folder, stamps)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # missing, or not readable for us
        return None


@lru_cache(8)
def _history(folder: Path, stamps: tuple) -> dict[str, Any] | None:
    stages = metrics_by_stage(folder)
    if not (rows := _in_sequence(stages)):
        return None
    begins = zip(stages, accumulate((int(stage[-1]["step"]) for stage in stages.values()), initial=0), strict=False)
    return {
        "run": folder.name,
        "step": int(rows[-1]["step"]),
        "total_steps": total_steps_of(folder),
        "stages": [{"name": name, "after": after} for name, after in begins if name != folder.name],
        "points": points(rows),
    }


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """Metrics of a run; for a training of several experts, those of all its stages in sequence."""
    return _in_sequence(metrics_by_stage(folder))


def _in_sequence(stages: Mapping[str, list[dict[str, float]]]) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for stage in stages.values():
        done = rows[-1]["step"] if rows else 0
        rows += [{**row, "step": done + row["step"]} for row in stage]
    return rows


def metrics_by_stage(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Metrics by folder name: of a run, or of each stage of a training of several experts, in order."""
    return {path.name: rows for path in stages_in(folder) if (rows := read_metrics(path))}


def newest_sample(folder: Path) -> Path | None:
    """The newest sample image of a run."""
    drawn = () if is_link(folder / "samples") else (folder / "samples").glob("*.png")
    return max((path for path in drawn if path.stem.isdecimal() and not is_link(path)), default=None)
