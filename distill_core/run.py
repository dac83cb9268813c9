"""A training run: a folder that can be left at any step and taken up again as if nothing had happened.

run/recipe.toml               what is trained, and on what
run/metrics.csv               one row a step
run/checkpoints/00000300/     student.safetensors, optimizer.safetensors
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from .dataset import LatentDataset, draw
from .denoiser import Denoiser, tap
from .files import open_unet, save_unet
from .objective import OBJECTIVES, Objective, Outputs, feature_points, objective
from .plan import NameMap, PruningPlan, name_map
from .schedule import prediction
from .storage import atomic, write_tensors, write_text

LR_SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a run. Defaults are BK-SDM's (arXiv 2305.15798, Sec. 4.1) where it names one."""

    total_steps: int = 50_000
    """Optimiser steps until the run is complete. May be raised later; all else is fixed when the run starts."""
    objective: str = "bk-sdm"
    """Losses and their weights: a key of `objective.OBJECTIVES`."""
    batch_size: int = 64
    """Examples per step."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    lr_schedule: str = "constant"
    """``constant``, ``cosine`` or ``linear`` decay to 0 over ``total_steps``, after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 1e-2
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the null caption, so that guidance is distilled too."""
    seed: int = 0
    """Decides data order, noise and timesteps."""
    save_every_steps: int = 500
    """Steps between checkpoints; the end, a cancel and an error save as well."""

    def __post_init__(self):
        objective(self.objective)
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(f"lr_schedule: unknown {self.lr_schedule!r}; choose from {list(LR_SCHEDULES)}")
        for name, low in {"total_steps": 1, "batch_size": 1, "warmup_steps": 0, "save_every_steps": 1, "weight_decay": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be between 0 and 1, got {self.caption_dropout}")

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[self.lr_schedule]


class Progress(NamedTuple):
    """What a run tells after each step."""

    step: int
    """Steps done."""
    total_steps: int
    losses: Mapping[str, float]
    """``total``, ``task``, ``output``, ``feature``, and every feature point on its own."""
    seconds_per_step: float


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints of a run's folder, oldest first; each is named by its step."""
    return sorted(path for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


class Run:
    """The folder of one run: its recipe, its metrics, its checkpoints."""

    KEEP_CHECKPOINTS = 2

    def __init__(self, folder: Path | str, recipe: Recipe, origin: Mapping[str, str]):
        """Open a run, or start it if the folder does not exist.

        origin: what tells this run from others besides its recipe, such as fingerprints of teacher and data. Raises
        ``ValueError`` naming the setting if the folder holds a run with other settings.
        """
        self.folder, self.recipe, self.origin = Path(folder), recipe, dict(origin)
        path = self.folder / "recipe.toml"
        if path.exists():
            if self.checkpoints:  # nothing is lost by changing a run that never finished a step
                self._check_same(_read_toml(path))
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} exists and is not a run; choose another name")
        write_text(path, _to_toml(asdict(recipe), self.origin))
        for unfinished in (self.folder / "checkpoints").glob(".*"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)

    def _check_same(self, stored: Mapping) -> None:
        now = {**asdict(self.recipe), **{f"origin.{k}": v for k, v in self.origin.items()}}
        then = {
            **{k: v for k, v in stored.items() if k != "origin"},
            **{f"origin.{k}": v for k, v in stored.get("origin", {}).items()},
        }
        free = {"total_steps", "save_every_steps"} if self.recipe.lr_schedule == "constant" else {"save_every_steps"}
        for name in sorted((now.keys() | then.keys()) - free):
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
    def complete(self) -> bool:
        return self.step >= self.recipe.total_steps

    @property
    def student_file(self) -> Path:
        """The newest student; an ordinary checkpoint any loader of the layout opens. ``ValueError`` before the first."""
        if not self.checkpoints:
            raise ValueError(f"run {self.folder.name!r} has no checkpoint yet")
        return self.checkpoints[-1] / "student.safetensors"

    def save(self, step: int, student: Denoiser, optimizer: torch.optim.Optimizer, plan: PruningPlan | None) -> None:
        """Write a checkpoint whole or not at all, then drop the oldest beyond ``KEEP_CHECKPOINTS``."""
        names = list(student.named_parameters())
        state = optimizer.state_dict()["state"]
        tensors = {f"{names[i]}/{key}": value for i, values in state.items() for key, value in values.items()}
        with atomic(self.folder / "checkpoints" / f"{step:08d}", overwrite=True) as folder:
            folder.mkdir()
            save_unet(
                folder / "student.safetensors",
                student.named_parameters(),
                student.architecture,
                plan=plan,
                prediction=student.prediction,
                metadata={"distill.step": str(step)},
            )
            write_tensors(folder / "optimizer.safetensors", tensors)
        for old in self.checkpoints[: -self.KEEP_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, student: Denoiser, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint into student and optimiser; returns its step, 0 if there is none."""
        if not self.checkpoints:
            return 0
        student.load_state_dict(open_unet(self.student_file).state_dict)
        numbers = {name: i for i, name in enumerate(student.named_parameters())}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(self.checkpoints[-1] / "optimizer.safetensors").items():
            name, entry = key.rsplit("/", 1)
            state.setdefault(numbers[name], {})[entry] = value.clone()  # not a view of the file
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return self.step

    # --- metrics

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.csv"

    def metrics(self) -> list[dict[str, float]]:
        """One dictionary a step: ``step``, ``lr``, ``total``, ``task``, ``output``, ``feature``, each feature point."""
        if not self.metrics_file.exists():
            return []
        with open(self.metrics_file, newline="") as file:
            rows = list(csv.DictReader(file))
        return [{name: float(value) for name, value in row.items()} for row in rows if None not in row.values()]

    def _open_metrics(self, step: int) -> io.TextIOWrapper:
        """Open for appending, rows beyond ``step`` (of steps that were lost) cut off."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, rows[0])
            writer.writeheader()
            writer.writerows(row | {"step": int(row["step"])} for row in rows)
        write_text(self.metrics_file, text.getvalue())
        return open(self.metrics_file, "a", newline="")


def _read_toml(path: Path) -> dict:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _to_toml(recipe: Mapping, origin: Mapping[str, str]) -> str:
    import tomli_w

    return tomli_w.dumps({**recipe, "origin": dict(origin)})


# --- training -------------------------------------------------------------------------------------------------------


def distill(
    run: Run,
    *,
    student: Denoiser,
    teacher: Denoiser,
    plan: PruningPlan | None,
    dataset: LatentDataset,
    num_steps: int | None = None,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Train the student for ``num_steps`` more steps, or to the end of the recipe.

    The student's network is trained in place, in its own dtype; the teacher is only read. ``plan`` is the plan the
    student was pruned from the teacher with, None if they are of one shape. ``on_step`` is called after each step;
    whatever it raises (a cancel) ends the training, and the run keeps every step that was completed.
    """
    recipe, aim = run.recipe, OBJECTIVES[run.recipe.objective]
    mapping = name_map(teacher.architecture, plan) if plan else NameMap.identity(teacher.architecture)
    points = feature_points(teacher.architecture, student.architecture, mapping) if aim.uses_features else {}
    if teacher.prediction != student.prediction or not torch.equal(
        teacher.schedule.alphas_cumprod, student.schedule.alphas_cumprod
    ):
        raise ValueError(
            f"teacher ({teacher.prediction}) and student ({student.prediction}) must predict the same on the same "
            "noise schedule; give both the same sampling settings"
        )
    parameters = list(student.named_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    first = done = run.restore(student, optimizer)
    last = min(recipe.total_steps, first + (num_steps if num_steps is not None else recipe.total_steps))
    started, consistent = time.monotonic(), True
    if first >= last:
        return
    teacher.network.eval().requires_grad_(False)
    student.network.train().requires_grad_(True)
    with run._open_metrics(first) as metrics, tap(student, points.values()) as ours, tap(teacher, points) as theirs:
        writer = None
        try:
            for step in range(first, last):
                terms = _losses(recipe, aim, student, teacher, dataset, step, points, ours, theirs)
                total = aim.total(terms)
                total.backward()
                values = _readable(total, terms)
                if not math.isfinite(values["total"]):
                    culprit = next((n for n, v in values.items() if not math.isfinite(v)), "total")
                    consistent = False  # the step before has spoilt the weights; the last checkpoint stays
                    raise FloatingPointError(
                        f"the loss is not finite at step {step + 1} ({culprit}); the run keeps its last checkpoint; "
                        "start a new run with a lower learning rate"
                    )
                norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
                if not math.isfinite(norm):
                    raise FloatingPointError(
                        f"the gradient is not finite at step {step + 1}; the run keeps every step before it; "
                        "start a new run with a lower learning rate"
                    )
                consistent = False
                with _uninterrupted():
                    for group in optimizer.param_groups:
                        group["lr"] = recipe.learning_rate * recipe.lr_factor(step)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    done, consistent = step + 1, True
                if writer is None:
                    writer = csv.DictWriter(metrics, ["step", "lr", *values])
                    if metrics.tell() == 0:
                        writer.writeheader()
                writer.writerow({"step": done, "lr": optimizer.param_groups[0]["lr"], **values})
                metrics.flush()
                if done % recipe.save_every_steps == 0 and done < last:
                    run.save(done, student, optimizer, plan)
                seconds = (time.monotonic() - started) / (done - first)
                on_step(Progress(done, recipe.total_steps, values, seconds))
        finally:
            # A cancel or an error loses the step it fell into and no more.
            optimizer.zero_grad(set_to_none=True)
            if consistent and done > run.step:
                run.save(done, student, optimizer, plan)
            student.network.eval().requires_grad_(False)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block is through, so that an update is made whole or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []
    handler = signal.signal(signal.SIGINT, lambda *details: received.append(details))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received and callable(handler):
        handler(*received[0])


def _losses(recipe, aim: Objective, student, teacher, dataset, step, points, ours, theirs) -> dict[str, Tensor]:
    """Every term of one step's loss, (B,) each."""
    batch = draw(
        dataset,
        step,
        batch_size=recipe.batch_size,
        num_timesteps=student.schedule.num_timesteps,
        caption_dropout=recipe.caption_dropout,
        seed=recipe.seed,
    )
    device = student.device
    x0, eps, context = (tensor.to(device) for tensor in (batch.x0, batch.eps, batch.context))
    t = batch.t.to(device)
    x_t = student.schedule.add_noise(x0, eps, t)
    target = prediction(student.prediction).target(x0, eps, student.schedule.at(t, x0))
    from_teacher = None
    if aim.uses_teacher:
        with torch.no_grad():
            answer = teacher(x_t.to(teacher.dtype), t, context.to(teacher.dtype))
        from_teacher = Outputs(answer, {points[name]: feature for name, feature in theirs.items()})
    answer = student(x_t.to(student.dtype), t, context.to(student.dtype))
    features = {name: ours[name] for name in points.values()}
    if step == 0:
        for name, feature in features.items():
            if not feature.requires_grad:
                raise RuntimeError(f"the feature point {name} carries no gradient, so its loss would train nothing")
    return aim.terms(target, Outputs(answer, features), from_teacher)


def _readable(total: Tensor, terms: Mapping[str, Tensor]) -> dict[str, float]:
    """Terms as plain numbers, means over the batch, with one wait for the device; feature points also summed."""
    names = ["total", *terms]
    values = dict(zip(names, torch.stack([total, *(v.mean() for v in terms.values())]).tolist(), strict=True))
    points = {name: value for name, value in values.items() if name.startswith("feature/")}
    singles = {name: value for name, value in values.items() if name not in points}
    return {**singles, **({"feature": sum(points.values())} if points else {}), **points}
