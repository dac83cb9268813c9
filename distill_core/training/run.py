"""A training run: a folder from which training can resume after any step, with exactly the same result.

run/recipe.toml               training settings, and fingerprints of models and data
run/metrics.csv               one row per step
run/samples/                  optional sample images by student and teacher
run/checkpoints/00000300/     student.safetensors (or lora.safetensors): the result; training.safetensors: what else is
                              needed to resume; checksums.json
run/.lock                     held by the training process
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..base.documents import check_regular, expect, lines, one_line, parse_json, read_toml
from ..base.locks import locked
from ..base.settings import from_mapping, to_toml
from ..base.storage import WriteError, atomic, read_header, write_tensors, write_text
from .checkpoints import TRAINING, checkpoints_in, drop, own, result_in, settle, step_in, write_checksums
from .exports import Trained
from .settings import TrainingSettings

log = logging.getLogger("distill")

METRICS, RECIPE = "metrics.csv", "recipe.toml"
_SETTINGS = "distill.run"
OWN = {"checkpoints", "samples", "tensorboard", "wandb", METRICS, RECIPE}
"""What a run writes into its folder."""


LONGEST_NUMBER = 32
"""Characters of a metric: more than any number takes."""


class State(NamedTuple):
    """The state of a run in a checkpoint."""

    step: int
    weights: dict[str, Tensor]
    """The trained weights by name, as exported."""
    tensors: dict[str, Tensor]
    """Other tensors the next step needs."""
    rest: dict[str, Any]
    """Other values the next step needs, as JSON."""


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Metrics of each step of a run: ``step``, ``lr``, ``total``, the losses (`objective.LOSSES`), and each feature layer and local block.

    Also the gradient ``norm``, the mean total by timestep such as ``timesteps/0-99``, and ``validation``. Each row has only
    what was measured in its step. Empty if there are no metrics.
    """
    if not own(folder / METRICS).exists():
        return []
    check_regular(folder / METRICS)
    with open(folder / METRICS, newline="", encoding="utf-8", errors="replace") as file:
        text = file.read()
    header, *written = lines(text[: text.rfind("\n") + 1])[:-1] or [""]  # skips a row that is still being written
    names = header.split(",")
    rows = [_row(names, line.split(",")) for line in written]
    if unreadable := rows.count(None):
        log.warning("%d of %d rows of %s cannot be read and are skipped", unreadable, len(rows), folder / METRICS)
    return [row for row in rows if row is not None]


def _row(names: Sequence[str], values: Sequence[str]) -> dict[str, float] | None:
    """A row of metrics; None if it is damaged."""
    try:
        measured = {name: float(value) for name, value in zip(names, values, strict=False) if value}
    except ValueError:
        return None
    is_one = len(values) <= len(names) and max(map(len, values)) <= LONGEST_NUMBER
    return measured if is_one and math.isfinite(measured.get("step", math.nan)) else None


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run starts with besides its settings, as fingerprints that identify it."""

    teachers: tuple[str, ...] = ()
    student: str = ""
    plan: str = ""
    """The plan the student was pruned with: its name, or the whole plan."""
    data: str = ""
    joint: str = ""
    """The student an expert starts from."""
    sampling: str = ""
    """Sampling settings of the model the LoRA is for."""
    null_caption: str = ""

    def to_mapping(self) -> dict[str, Any]:
        """As a TOML table without empty values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items() if value}


class Started(NamedTuple):
    """What a run was started with, as read from its folder."""

    settings: Mapping[str, Any]
    inputs: Inputs

    @classmethod
    def of_table(cls, table: Mapping[str, Any], where: str) -> Started:
        inputs = from_mapping(Inputs, expect(table.get("inputs", {}), dict, f"inputs of {where}"), where)
        return cls({name: value for name, value in table.items() if name != "inputs"}, inputs)


def started(folder: Path, warn: bool = False) -> Started:
    """What a run was started with, read from its recipe; if that is lost or damaged, from its newest checkpoint.

    Empty if there is neither. ``ValueError`` if the recipe is damaged and the checkpoint has no copy of it. warn: log a
    warning about a lost recipe.
    """
    try:
        return Started.of_table(read_toml(own(folder / RECIPE)), str(folder / RECIPE))
    except ValueError as error:
        reason = str(error)
    if not (checkpoints := checkpoints_in(folder)):
        return Started({}, Inputs())
    if (text := read_header(checkpoints[-1] / TRAINING).metadata.get(_SETTINGS)) is None:
        raise ValueError(f"{folder / RECIPE} is lost or damaged ({reason}); restore it, or give the new run another name")
    if warn:
        log.warning("%s is lost or damaged; the run resumes with the settings in its checkpoint", folder / RECIPE)
    return Started.of_table(parse_json(text, f"{_SETTINGS} of {checkpoints[-1]}"), str(checkpoints[-1]))


_NO_INPUTS = Inputs()


class Run:
    """The folder of one run: its recipe, metrics and checkpoints."""

    def __init__(self, folder: Path | str, settings: TrainingSettings, inputs: Inputs = _NO_INPUTS, *, main: bool = True):
        """Open a run, or a new one if the folder does not exist.

        main: False for a process that shares the run with a main one, which alone writes. Raises ``ValueError`` naming the
        setting if the folder holds a run with other settings or inputs. Nothing is written before `training`.
        """
        self.folder, self.settings, self.inputs, self.main = Path(folder), settings, inputs, main
        self._holds = False
        for name in OWN:
            own(self.folder / name)
        if self.checkpoints:  # a run without any completed step may change
            self._check_same(started(self.folder))
        elif others := self._others():
            raise ValueError(f"{self.folder} exists and is not a run (it holds {others[0]}); choose another name")

    def _others(self) -> list[str]:
        """Names in the folder that belong to no run, not even to one killed at its first write."""
        names = sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []
        return [name for name in names if name not in OWN and not name.startswith((".", "pruned"))]

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Lock the run's folder for training, set damaged checkpoints aside, and write the recipe.

        ``ValueError`` if another process trains in it, or another run was started there in the meantime.
        """
        if not self.main:
            yield
            return
        with locked(self.folder):
            settle(self.folder)
            if self.checkpoints:
                self._check_same(started(self.folder, warn=True))
            write_text(self.folder / RECIPE, to_toml(self._started()))
            self._holds = True
            try:
                yield
            finally:
                self._holds = False

    def _started(self) -> dict[str, Any]:
        """Settings and inputs of the run, as a table."""
        return {**self.settings.to_mapping(), "inputs": self.inputs.to_mapping()}

    def _check_same(self, other: Started) -> None:
        now = {**self.settings.to_mapping(), **self.inputs.to_mapping()}
        then = {
            **TrainingSettings().to_mapping(),
            **other.settings,
            **other.inputs.to_mapping(),
        }  # an older run lacks newer settings
        for name in sorted((now.keys() | then.keys()) - self.settings.may_change(len(self.inputs.teachers) > 1)):
            if now.get(name) != then.get(name):
                raise ValueError(
                    f"run {self.folder.name!r} was started with {name} = {then.get(name)}, but is now {now.get(name)}; "
                    "give the new run another name, or restore the setting"
                )

    # --- checkpoints

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return checkpoints_in(self.folder)

    @property
    def step(self) -> int:
        """Step of the newest checkpoint; 0 before the first."""
        return step_in(self.folder)

    @property
    def total_steps(self) -> int:
        return self.settings.total_steps

    @property
    def complete(self) -> bool:
        return self.step >= self.settings.total_steps

    @property
    def heaviest_settings(self) -> TrainingSettings:
        """The settings that need the most memory."""
        return self.settings

    def describe(self) -> str:
        """Further lines about what is trained, besides the recipe."""
        return ""

    def describe_state(self) -> str:
        """The step reached, and the path of the result."""
        return f"step {self.step}: {self.result_file}"

    @property
    def facts(self) -> dict[str, str | None]:
        """Paths of the results, for scripts."""
        return {"file": str(self.result_file), "best": str(self.best_result_file)}

    @property
    def result_file(self) -> Path:
        """Path of the newest student or LoRA, which any loader opens. ``ValueError`` before the first checkpoint."""
        if not self.checkpoints:
            raise ValueError(f"run {self.folder.name!r} has no checkpoint yet")
        return result_in(self.checkpoints[-1])

    @property
    def best_result_file(self) -> Path:
        """Path of the kept result with the lowest validation loss; the newest if none was validated."""
        best = self._best(1)
        return result_in(best[0]) if best else self.result_file

    def save(self, state: State, trained: Trained) -> None:
        """Write a checkpoint atomically, then delete those that need not be kept.

        `WriteError` names the step that is kept if writing fails; ``ValueError`` if the folder was deleted.
        """
        if self._holds and not (self.folder / RECIPE).exists():
            raise ValueError(
                f"the folder of run {self.folder.name!r} was deleted or moved while it trained; move it back, or start "
                "again from step 0"
            )
        inside, started = own(self.folder / "checkpoints"), json.dumps(self._started())
        try:
            with atomic(inside / f"{state.step:08d}", overwrite=True) as folder:
                folder.mkdir()
                trained.write(folder / trained.file_name, state.weights, self._about(state.step))
                write_tensors(folder / TRAINING, state.tensors, {"distill.training": json.dumps(state.rest), _SETTINGS: started})
                write_checksums(folder)
        except WriteError as error:
            raise WriteError(error.path, error.reason, f"the run keeps step {self.step}") from error
        keep = {*self.checkpoints[-self.settings.keep_checkpoints :], *self._best(self.settings.keep_best)}
        for old in set(self.checkpoints) - keep:
            drop(old)

    def _about(self, step: int) -> dict[str, str]:
        """Metadata of the exported file about its training."""
        about = {"distill.step": str(step), "distill.inputs": json.dumps(self.inputs.to_mapping())}
        if self.settings.guidance != 1:
            about["distill.guidance"] = str(float(self.settings.guidance))
        if self.settings.sampling:
            about["distill.sampler"] = json.dumps(self.settings.sampling)
        if self.settings.strength_is_scale:
            about["distill.guidance_min"] = str(float(self.settings.scales[0]))
        return about

    def _best(self, count: int) -> list[Path]:
        """Checkpoints with the lowest validation losses, lowest first."""
        losses = {row["step"]: row["validation"] for row in self.metrics() if "validation" in row} if count else {}
        return sorted((c for c in self.checkpoints if int(c.name) in losses), key=lambda c: losses[int(c.name)])[:count]

    def load(self, trained: Trained) -> State | None:
        """State of the newest checkpoint; None before the first."""
        if not self.checkpoints:
            return None
        newest = self.checkpoints[-1]
        header = read_header(newest / TRAINING)
        try:  # optimizers keep infinities, which `documents` rejects as damage
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
        """Open the metrics for appending, after removing rows beyond ``step``, whose steps were lost."""
        rows = [row | {"step": int(row["step"])} for row in self.metrics() if row["step"] <= step]
        names = [*names, *(name for row in rows[:1] for name in row if name not in names)]
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.metrics_file, text.getvalue())
        return Metrics(self.metrics_file, names)


class Metrics:
    """The metrics table, open for appending."""

    def __init__(self, path: Path, names: list[str]):
        self._path, self._file = path, open(path, "a", newline="")
        self._writer = csv.DictWriter(self._file, names)

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; `WriteError` if the disk is full or missing."""
        try:
            self._writer.writerow(row)
            self._file.flush()
        except OSError as error:
            raise WriteError(self._path, error.strerror or str(error)) from error

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
