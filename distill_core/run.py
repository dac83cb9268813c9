"""A training run: a folder that can be left at any step and taken up again as if nothing had happened.

run/recipe.toml               what is trained, and on what
run/metrics.csv               one row a step
run/samples/                  pictures by the student beside the teacher's, where asked for
run/checkpoints/00000300/     student.safetensors (or lora.safetensors): what comes out; training.safetensors: what else
                              going on needs
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .recipe import Recipe, read_toml, to_toml
from .storage import atomic, read_header, write_tensors, write_text
from .trained import Trained

TRAINING = "training.safetensors"
METRICS, RECIPE = "metrics.csv", "recipe.toml"


class State(NamedTuple):
    """Where a run stands, as a checkpoint holds it."""

    step: int
    weights: dict[str, Tensor]
    """What is trained, by name, as it is given out."""
    tensors: dict[str, Tensor]
    """What else the next step depends on."""
    rest: dict[str, Any]
    """The same that are no tensors."""


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints of a run's folder, oldest first; each is named by its step."""
    return sorted(path for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """What a run's folder holds of each step: ``step``, ``lr``, ``total``, ``task``, ``output``, ``feature``, each feature point.

    Also ``norm`` of the gradient, the mean total by timestep as in ``timesteps/0-99``, and ``validation``; what was not
    measured in a step is left out of it. Empty where nothing was written.
    """
    if not (folder / METRICS).exists():
        return []
    with open(folder / METRICS, newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]  # a row that is being written is left out
    rows = csv.DictReader(io.StringIO(whole, newline=""))
    return [{name: float(value) for name, value in row.items() if value} for row in rows if None not in row.values()]


class Run:
    """The folder of one run: its recipe, its metrics, its checkpoints."""

    def __init__(self, folder: Path | str, recipe: Recipe, origin: Mapping[str, str], *, main: bool = True):
        """Open a run, or start it if the folder does not exist.

        origin: what tells this run from others besides its recipe, such as fingerprints of teacher and data. main: False
        for a process that shares the run with another, which writes. Raises ``ValueError`` naming the setting if the
        folder holds a run with other settings.
        """
        self.folder, self.recipe, self.origin = Path(folder), recipe, dict(origin)
        path = self.folder / RECIPE
        if path.exists():
            if self.checkpoints:  # nothing is lost by changing a run that never finished a step
                self._check_same(read_toml(path))
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} exists and is not a run; choose another name")
        if main:
            write_text(path, to_toml({**recipe.to_mapping(), "origin": self.origin}))
            for unfinished in (self.folder / "checkpoints").glob(".*"):  # of a process that was killed
                shutil.rmtree(unfinished, ignore_errors=True)

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
                    f"run {self.folder.name!r} was started with {name.removeprefix('origin.')} = {then.get(name)}, now it is "
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
        return self._result(self.checkpoints[-1])

    @property
    def best_result_file(self) -> Path:
        """That with the lowest validation loss of those that are kept; the newest where nothing was validated."""
        best = self._best(1)
        return self._result(best[0]) if best else self.result_file

    def _result(self, checkpoint: Path) -> Path:
        (file,) = (path for path in checkpoint.glob("*.safetensors") if path.name != TRAINING)
        return file

    def save(self, state: State, trained: Trained) -> None:
        """Write a checkpoint whole or not at all, then drop those that need not stay."""
        with atomic(self.folder / "checkpoints" / f"{state.step:08d}", overwrite=True) as folder:
            folder.mkdir()
            trained.write(folder / trained.file_name, state.weights, self._about(state.step))
            write_tensors(folder / TRAINING, state.tensors, {"distill.training": json.dumps(state.rest)})
        keep = {*self.checkpoints[-self.recipe.keep_checkpoints :], *self._best(self.recipe.keep_best)}
        for old in set(self.checkpoints) - keep:
            shutil.rmtree(old, ignore_errors=True)

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
        header = read_header(self.checkpoints[-1] / TRAINING)
        tensors = {name: tensor.read() for name, tensor in header.tensors.items()}
        return State(self.step, trained.read(self.result_file), tensors, json.loads(header.metadata["distill.training"]))

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
        self._file = open(path, "a", newline="")
        self._writer = csv.DictWriter(self._file, names)

    def write(self, row: Mapping[str, float]) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
