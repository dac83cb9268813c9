"""A training run: a folder that can be left at any step and taken up again as if nothing had happened.

run/recipe.toml               what is trained, and on what
run/metrics.csv               one row a step
run/samples/                  pictures by the student beside the teacher's, where asked for
run/checkpoints/00000300/     student.safetensors (or lora.safetensors): what comes out; training.safetensors: what else
                              going on needs; checksums.json
run/.lock                     held by the process that trains
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .checkpoints import TRAINING, checkpoints_in, drop, own, result_of, settle, write_checksums
from .documents import check_regular, expect, lines, one_line, parse_json, read_toml
from .locks import locked
from .recipe import Recipe, to_toml
from .storage import WriteError, atomic, read_header, write_tensors, write_text
from .trained import Trained

log = logging.getLogger("distill")

METRICS, RECIPE = "metrics.csv", "recipe.toml"
_SETTINGS = "distill.run"
_OWN = {"checkpoints", "samples", "tensorboard", "wandb", METRICS, RECIPE}


class State(NamedTuple):
    """Where a run stands, as a checkpoint holds it."""

    step: int
    weights: dict[str, Tensor]
    """What is trained, by name, as it is given out."""
    tensors: dict[str, Tensor]
    """What else the next step depends on."""
    rest: dict[str, Any]
    """The same that are no tensors."""


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """What a run's folder holds of each step: ``step``, ``lr``, ``total``, ``task``, ``output``, ``feature``, each feature point.

    Also ``norm`` of the gradient, the mean total by timestep as in ``timesteps/0-99``, and ``validation``; what was not
    measured in a step is left out of it. Empty where nothing was written.
    """
    if not own(folder / METRICS).exists():
        return []
    check_regular(folder / METRICS)
    with open(folder / METRICS, newline="", encoding="utf-8", errors="replace") as file:
        text = file.read()
    names, *written = lines(text[: text.rfind("\n") + 1])[:-1] or [""]  # a row that is being written is left out
    rows = [_row(names, line) for line in written]
    if unreadable := rows.count(None):
        log.warning("%d of %d rows of %s cannot be read and are left out", unreadable, len(rows), folder / METRICS)
    return [row for row in rows if row is not None]


def _row(names: str, line: str) -> dict[str, float] | None:
    """A row of metrics; None for one that is damaged."""
    try:
        (row,) = csv.DictReader(io.StringIO(f"{names}\n{line}\n"))
        measured = {name: float(value) for name, value in row.items() if value}
    except (ValueError, TypeError, csv.Error):
        return None
    return measured if math.isfinite(measured.get("step", math.nan)) and None not in row else None


def stored_settings(folder: Path, warn: bool = False) -> Mapping[str, Any]:
    """What a folder says its run was started with: its recipe, or where that is lost or damaged its newest checkpoint.

    Empty where there is neither. ``ValueError`` for a damaged recipe beside checkpoints that do not tell. warn: of a lost recipe.
    """
    try:
        table = read_toml(own(folder / RECIPE))
        if isinstance(table.get("origin", {}), dict):
            return table
        reason = "its origin is no table"
    except ValueError as error:
        reason = str(error)
    if not (checkpoints := checkpoints_in(folder)):
        return {}
    if (text := read_header(checkpoints[-1] / TRAINING).metadata.get(_SETTINGS)) is None:
        raise ValueError(f"{folder / RECIPE} is lost or damaged ({reason}); put it back, or give the new run another name")
    if warn:
        log.warning("%s is lost or damaged; the run goes on by what its checkpoint tells", folder / RECIPE)
    table = parse_json(text, f"{_SETTINGS} of {checkpoints[-1]}")
    expect(table.get("origin", {}), dict, f"origin of {checkpoints[-1]}")
    return table


class Run:
    """The folder of one run: its recipe, its metrics, its checkpoints."""

    def __init__(self, folder: Path | str, recipe: Recipe, origin: Mapping[str, str], *, main: bool = True):
        """Open a run, or start it if the folder does not exist.

        origin: what tells this run from others besides its recipe, such as fingerprints of teacher and data. main: False
        for a process that shares the run with another, which writes. Raises ``ValueError`` naming the setting if the
        folder holds a run with other settings. Nothing is written before `training`.
        """
        self.folder, self.recipe, self.origin, self.main = Path(folder), recipe, dict(origin), main
        self._holds = False
        for name in _OWN:
            own(self.folder / name)
        if self.checkpoints:  # nothing is lost by changing a run that never finished a step
            self._check_same(stored_settings(self.folder))
        elif others := self._others():
            raise ValueError(f"{self.folder} exists and is not a run (it holds {others[0]}); choose another name")

    def _others(self) -> list[str]:
        """What lies in the folder and is of no run, not even one that was killed at its first write."""
        names = sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []
        return [name for name in names if name not in _OWN and not name.startswith((".", "pruned"))]

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Hold the run's folder to train in it: no other process does; what is damaged is set aside, and the recipe is written.

        ``ValueError`` if another process trains in it, or another run was begun there in the meantime.
        """
        if not self.main:
            yield
            return
        with locked(self.folder):
            settle(self.folder)
            if self.checkpoints:
                self._check_same(stored_settings(self.folder, warn=True))
            write_text(self.folder / RECIPE, to_toml(self._settings()))
            self._holds = True
            try:
                yield
            finally:
                self._holds = False

    def _settings(self) -> dict[str, Any]:
        """What the run was started with, as a table."""
        return {**self.recipe.to_mapping(), "origin": self.origin}

    def _check_same(self, stored: Mapping) -> None:
        now = {**self.recipe.to_mapping(), **{f"origin.{k}": v for k, v in self.origin.items()}}
        then = {
            **Recipe().to_mapping(),  # a run may be older than a setting
            **{k: v for k, v in stored.items() if k != "origin"},
            **{f"origin.{k}": v for k, v in stored.get("origin", {}).items()},
        }
        several_teachers = sum(name.startswith("teacher") for name in self.origin) > 1
        for name in sorted((now.keys() | then.keys()) - self.recipe.may_change(several_teachers)):
            if now.get(name) != then.get(name):
                raise ValueError(
                    f"run {self.folder.name!r} was started with {name.removeprefix('origin.')} = {then.get(name)}, but is now "
                    f"{now.get(name)}; give the new run another name, or put the setting back"
                )

    # --- checkpoints

    @property
    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return checkpoints_in(self.folder)

    @property
    def step(self) -> int:
        """Step of the newest checkpoint; 0 before the first."""
        return int(self.checkpoints[-1].name) if self.checkpoints else 0

    @property
    def total_steps(self) -> int:
        return self.recipe.total_steps

    @property
    def complete(self) -> bool:
        return self.step >= self.recipe.total_steps

    @property
    def heaviest_recipe(self) -> Recipe:
        """That which needs the most memory."""
        return self.recipe

    def describe(self) -> str:
        """What is trained besides what the recipe tells, a line each."""
        return ""

    def describe_state(self) -> str:
        """How far it is, and where what came out is."""
        return f"step {self.step}: {self.result_file}"

    @property
    def facts(self) -> dict[str, str | None]:
        """What came out, for scripts."""
        return {"file": str(self.result_file), "best": str(self.best_result_file)}

    @property
    def result_file(self) -> Path:
        """The newest student, or LoRA; an ordinary file any loader opens. ``ValueError`` before the first."""
        if not self.checkpoints:
            raise ValueError(f"run {self.folder.name!r} has no checkpoint yet")
        return result_of(self.checkpoints[-1])

    @property
    def best_result_file(self) -> Path:
        """That with the lowest validation loss of those that are kept; the newest where nothing was validated."""
        best = self._best(1)
        return result_of(best[0]) if best else self.result_file

    def save(self, state: State, trained: Trained) -> None:
        """Write a checkpoint whole or not at all, then drop those that need not stay.

        `WriteError` tells which step is kept where it cannot be written; ``ValueError`` that the folder was deleted.
        """
        if self._holds and not (self.folder / RECIPE).exists():
            raise ValueError(
                f"the folder of run {self.folder.name!r} was deleted or moved while it trained; start it again, which begins at "
                "step 0, or put the folder back first"
            )
        inside, settings = own(self.folder / "checkpoints"), json.dumps(self._settings())
        try:
            with atomic(inside / f"{state.step:08d}", overwrite=True) as folder:
                folder.mkdir()
                trained.write(folder / trained.file_name, state.weights, self._about(state.step))
                write_tensors(folder / TRAINING, state.tensors, {"distill.training": json.dumps(state.rest), _SETTINGS: settings})
                write_checksums(folder)
        except WriteError as error:
            raise WriteError(error.path, error.reason, f"the run keeps step {self.step}") from error
        keep = {*self.checkpoints[-self.recipe.keep_checkpoints :], *self._best(self.recipe.keep_best)}
        for old in set(self.checkpoints) - keep:
            drop(old)

    def _about(self, step: int) -> dict[str, str]:
        """What the file that comes out tells of its training."""
        about = {"distill.step": str(step), "distill.origin": json.dumps(self.origin)}
        if self.recipe.guidance != 1:
            about["distill.guidance"] = str(float(self.recipe.guidance))
        if self.recipe.guidance_min is not None:
            about["distill.guidance_min"] = str(float(self.recipe.guidance_min))
        return about

    def _best(self, count: int) -> list[Path]:
        """Checkpoints with the lowest validation losses, the lowest first."""
        losses = {row["step"]: row["validation"] for row in self.metrics() if "validation" in row} if count else {}
        return sorted((c for c in self.checkpoints if int(c.name) in losses), key=lambda c: losses[int(c.name)])[:count]

    def load(self, trained: Trained) -> State | None:
        """The newest checkpoint; None before the first."""
        if not self.checkpoints:
            return None
        newest = self.checkpoints[-1]
        header = read_header(newest / TRAINING)
        try:  # optimizers keep infinities, which `documents` takes for damage
            rest = json.loads(header.metadata.get("distill.training", ""))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{newest / TRAINING} is damaged ({one_line(error)}); give the new run another name") from error
        tensors = {name: tensor.read() for name, tensor in header.tensors.items()}
        return State(self.step, trained.read(self.result_file), tensors, rest)

    # --- metrics

    @property
    def metrics_file(self) -> Path:
        return self.folder / METRICS

    def metrics(self) -> list[dict[str, float]]:
        """See `read_metrics`."""
        return read_metrics(self.folder)

    def open_metrics(self, step: int, names: list[str]) -> Metrics:
        """Open for appending, rows beyond ``step`` (of steps that were lost) cut off."""
        rows = [row | {"step": int(row["step"])} for row in self.metrics() if row["step"] <= step]
        names = [*names, *(name for row in rows[:1] for name in row if name not in names)]
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.metrics_file, text.getvalue())
        return Metrics(self.metrics_file, names)


class Metrics:
    """The table of metrics, open for appending."""

    def __init__(self, path: Path, names: list[str]):
        self._path, self._file = path, open(path, "a", newline="")
        self._writer = csv.DictWriter(self._file, names)

    def write(self, row: Mapping[str, float]) -> None:
        """``OSError`` in one sentence if the disk is full or gone."""
        try:
            self._writer.writerow(row)
            self._file.flush()
        except OSError as error:
            raise WriteError(self._path, error.strerror or str(error)) from error

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
