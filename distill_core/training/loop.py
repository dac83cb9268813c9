"""The training loop: a student learns from its teachers, and training can stop after any step."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..base.precision import DTYPES
from ..base.seeding import generator
from ..base.storage import fingerprint
from ..data.dataset import Batch, Dataset, draw, held_out_batches, num_examples
from ..diffusion.conditioning import Label
from ..diffusion.denoiser import Denoiser, check_trainable, checkpointing, tap
from ..diffusion.schedule import prediction
from ..networks.architecture import Architecture
from ..networks.name_map import NameMap
from ..pruning.plan import PruningPlan, name_map
from .consistency import Course, course, jump, landing
from .dmd import Draws, FakeScore, Matching, drawn
from .ema import EMA
from .exports import trained
from .learner import Learner, lent
from .local import local_terms
from .losses import pseudo_huber_loss
from .memory import MemorySettings, changes
from .objective import Objective, Outputs
from .previews import Previews
from .processes import ALONE, Processes
from .run import Run, State
from .settings import TrainingSettings
from .sharding import shared_like, whole
from .step import StepInputs, ask, student_outputs, teacher_outputs
from .teachers import Teachers
from .trackers import open_trackers
from .weighting import example_weights

if TYPE_CHECKING:
    from ..lora.layers import Lora

log = logging.getLogger("distill")
NUM_TIMESTEP_BINS = 10
MAX_VALIDATION_BATCHES = 8
NOTHING_FOLDED = (
    "the student's plan folds no run of blocks, so none can learn by itself; fold some, as in the plan 'fold single 5-7', or set "
    "local_steps to 0 and choose the objective output"
)
FEATURES_OF_UNETS = "objective {} compares layers of UNets; for a transformer choose blocks, output or local"
PUBLISHED_EXAMPLES, PUBLISHED_EPOCHS = 212_776, 60  # BK-SDM: 50,000 steps of batch 256


class Progress(NamedTuple):
    """What a run reports after each step."""

    step: int
    """Steps done."""
    total_steps: int
    losses: Mapping[str, float]
    """Metrics of the step, as in `run.Run.metrics`."""
    seconds_per_step: float


class OutOfMemory(MemoryError):
    """The device is out of memory; the message says which settings to change."""


def distill(
    run: Run,
    *,
    student: Denoiser,
    teacher: Denoiser | Teachers,
    plan: PruningPlan | None,
    dataset: Dataset,
    num_steps: int | None = None,
    previews: Previews | None = None,
    on_step: Callable[[Progress], None] = lambda progress: None,
    processes: Processes = ALONE,
) -> None:
    """Train the student for ``num_steps`` more steps, or until the run is complete.

    Trains the student's network in place; teachers are only read. ``plan`` is the plan that pruned the teacher to the
    student, None if both have the same shape. ``on_step`` is called after each step; any exception it raises (such as a
    cancel) ends the training, and the run keeps every completed step. Raises `OutOfMemory`, ``FloatingPointError`` for a
    loss or gradient that is not finite, and ``ValueError`` if student, teachers or data do not match.
    """
    teachers = teacher if isinstance(teacher, Teachers) else Teachers.single(teacher, run.settings)
    processes.check(run.settings)
    if run.complete or num_steps == 0:
        return
    with run.training():
        processes.wait()  # until the main process has checked the run's folder
        _distill(run, student, teachers, plan, dataset, num_steps, previews, on_step, processes)


def _distill(
    run: Run,
    student: Denoiser,
    teachers: Teachers,
    plan: PruningPlan | None,
    dataset: Dataset,
    num_steps: int | None,
    previews: Previews | None,
    on_step: Callable[[Progress], None],
    processes: Processes,
) -> None:
    training, first = Training(run, student, teachers, plan, dataset, processes), run.step
    last = min(run.settings.total_steps, first + (run.settings.total_steps if num_steps is None else num_steps))
    _warn_if_seen_too_often(num_examples(dataset), run.settings.total_steps * run.settings.batch_size)
    started = time.monotonic()
    with training.open(), contextlib.ExitStack() as stack:
        columns = training.columns(first)
        metrics = stack.enter_context(run.open_metrics(first, columns)) if processes.main else None
        trackers = open_trackers(run, stack) if processes.main else []
        try:
            for step in range(first, last):
                values = training.step(step)
                done = step + 1
                if run.settings.validate_every_steps and done % run.settings.validate_every_steps == 0:
                    values["validation"] = training.validate(step)
                row = {"step": done, "lr": training.learning_rate(step), **values}
                if metrics is not None:
                    metrics.write(row)
                    for track in trackers:
                        track(row)
                if done < last and (
                    done % run.settings.save_every_steps == 0 or (run.settings.keep_best and "validation" in row)
                ):
                    training.save()
                if (
                    previews
                    and run.settings.sample_every_steps
                    and done % run.settings.sample_every_steps == 0
                    and training.keeps
                ):
                    with training.exported():
                        folder, taught_by = run.folder / "samples", teachers.at(step)
                        previews.draw(folder, done, student, taught_by, run.settings, write=processes.main)
                on_step(Progress(done, run.settings.total_steps, row, (time.monotonic() - started) / (done - first)))
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(_what_to_lower(run.settings, processes)) from error
        finally:
            # A cancel or an error loses only the current step; a second Ctrl+C waits until the checkpoint is saved.
            with _uninterrupted():
                training.save_if_sound()


class Training:
    """The state of a run while it trains."""

    def __init__(
        self, run: Run, student: Denoiser, teachers: Teachers, plan: PruningPlan | None, dataset: Dataset, processes: Processes
    ):
        settings = run.settings
        self.run, self.settings, self.student, self.teachers = run, settings, student, teachers
        self.plan, self.dataset, self.processes = plan, dataset, processes
        self.objective = settings.weighted_objective  # after the local steps
        if student.noise_levels is None:  # otherwise the caller has checked the model already
            check_trainable(student.architecture, student.sampling)
        if settings.guidance != 1 and dataset.null is None:
            raise ValueError("guidance needs the empty caption, which this dataset lacks; connect null_caption")
        check_trajectories(settings, dataset)
        self.in_fp16 = settings.precision == "fp16" or student.computes_in_fp16
        compute = settings.compute_dtype
        self.autocast = torch.autocast(student.device.type, DTYPES[compute], enabled=compute != "fp32", cache_enabled=True)
        self.done, self.sound = 0, True  # sound: no update was interrupted, all weights are finite
        self._theirs: dict[int, dict[str, Tensor]] = {}
        self._next: tuple[int, Future[Batch]] | None = None
        self._held_out: list[Batch] | None = None

    # --- opening and closing

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Prepare the networks for training at the run's current step; set them back to inference afterwards."""
        network, settings = self.student.network, self.settings
        if settings.weight_dtype == "bf16":
            nn.Module.to(network, torch.bfloat16)  # diffusers' own `to` warns about modules to keep in fp32; there are none
        if self.settings.uses_teacher:
            # Load it first: if it shares the student's network, loading freezes the weights that are trained.
            teacher = self.teachers.at(self.run.step)
            if not self.run.step:
                same = len(self.teachers) == 1 and _same(teacher, self.student)
                check_lesson(settings, teacher.architecture, self.student.architecture, same)
        network.train()
        self.trained = trained(self.student, settings, self.plan)
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._reader = stack.enter_context(ThreadPoolExecutor(1))
            if settings.gradient_checkpointing:
                stack.enter_context(checkpointing(self.student))
            stack.callback(setattr, self.student, "forward", self.student.forward)
            if settings.compile:
                self.student.forward = torch.compile(network)
            self.processes.share(self.student)
            self.parameters = self.trained.parameters()
            self.learner = Learner(self.parameters, settings, scaled=self.in_fp16)
            self.optimizer = self.learner.optimizer
            self.average = EMA(self.parameters, settings.ema_decay) if settings.ema_decay else None
            jumps = settings.objective_at(self.run.step).consistency
            self.target = EMA(self.parameters, settings.target_decay) if jumps else None
            self.fake = FakeScore(self.parameters, settings, scaled=self.in_fp16) if self.objective.dmd else None
            self._restore()
            self.layers = self._feature_layers(self.teachers.at(self.done)) if settings.uses_teacher else {}
            self._ours = stack.enter_context(tap(self.student, self.layers.values()))
            try:
                yield
            finally:
                self.optimizer.zero_grad()
                self._theirs.clear()
                self._put_on(None)
                network.eval().requires_grad_(False)

    def _feature_layers(self, teacher: Denoiser) -> dict[str, str]:
        """Teacher module -> student module whose outputs are compared; ``ValueError`` if the networks do not match."""
        if self.student.schedule != teacher.schedule:
            raise ValueError("teacher and student must use the same noise schedule; give both the same sampling settings")
        _check_belong_together(self.student, teacher)
        if self.settings.learns_locally and not self.student.runs:
            raise ValueError(NOTHING_FOLDED)
        if not self.objective.feature:
            return {}
        if self.objective.layers == "blocks":
            layers = dict(self.student.kept_blocks)
        elif self.student.architecture is None:
            raise ValueError(FEATURES_OF_UNETS.format(self.settings.objective))
        else:
            mapping = name_map(teacher.architecture, self.plan) if self.plan else NameMap.identity(teacher.architecture)
            layers = self.objective.feature_layers(teacher.architecture, self.student.architecture, mapping)
        if not layers:
            raise ValueError(
                f"objective {self.settings.objective} compares {self.objective.layers}, but this student has none; choose another"
            )
        return layers

    def columns(self, step: int) -> list[str]:
        """Names of all metrics, in order."""
        layers = [f"feature/{name}" for name in self.layers.values()]
        layers += [f"local/{block}" for block in self.student.runs if self.settings.learns_locally]
        used = self.settings.objectives
        losses = [
            name
            for name in ("task", "output", "consistency", "dmd", "diversity")
            if any(objective.weights[name] for objective in used)
        ]
        losses += dict.fromkeys(name.split("/")[0] for name in layers)
        losses += ["fake", "cosine_distance"] * bool(self.objective.dmd)
        extra = ["teacher"] * (len(self.teachers) > 1) + ["scale"] * self.learner.scaler.is_enabled()
        validation = ["validation"] * bool(self.settings.validate_every_steps)
        return ["step", "lr", "total", *losses, "norm", *extra, *validation, *layers, *self._bins]

    @property
    def _bins(self) -> list[str]:
        size = math.ceil(self.student.schedule.num_timesteps / NUM_TIMESTEP_BINS)
        ends = range(0, self.student.schedule.num_timesteps, size)
        return [f"timesteps/{start}-{min(start + size, self.student.schedule.num_timesteps) - 1}" for start in ends]

    # --- one step

    def learning_rate(self, step: int) -> float:
        return self.settings.learning_rate * self.settings.lr_factor(step)

    def step(self, step: int) -> dict[str, float]:
        """Train one step, counted from 0; returns its metrics."""
        objective = self.settings.objective_at(step)
        if not objective.dmd:
            return self._student_step(step, objective)
        with _uninterrupted():  # the fake score never goes ahead of the student
            of_fake = self._fake_step(step)
            if step >= self.settings.first_drawn_step:
                return self._student_step(step, objective) | of_fake
            self.done = step + 1
            return {"total": of_fake["fake"], **of_fake}

    def _student_step(self, step: int, objective: Objective) -> dict[str, float]:
        batch = self._batch(step)
        draws = self._drawn(batch, step) if objective.dmd else None
        measured = []
        for i, which in enumerate(self._parts()):
            more = i + 1 < self.settings.accumulation_steps
            with self.processes.accumulating(self.student, more=more):
                terms, total = self.losses(batch.part(which), step, objective, draws and draws.part(which))
                self.learner.backward(total.mean() / self.settings.accumulation_steps)
            measured.append({"total": total.detach(), **{name: value.detach() for name, value in terms.items()}})
        del terms, total
        values = self._readable(measured, None if objective.dmd else batch.t, self.learner.clip())
        self._check_finite(values, step)
        if len(self.teachers) > 1:
            values["teacher"] = self.teachers.number_at(step)
        if self.learner.scaler.is_enabled():
            values["scale"] = self.learner.scaler.get_scale()
        self.sound = False
        with _uninterrupted():
            if self.learner.update(values["norm"], self.learning_rate(step), self._rounding(step)):
                for lagging in filter(None, (self.average, self.target)):
                    lagging.update(self.parameters, step)
            if step + 1 < self.settings.total_steps and not self.settings.objective_at(step + 1).consistency:
                self.target = None  # nothing aims at it any more
            self.done, self.sound = step + 1, True
        return values

    def _fake_step(self, step: int) -> dict[str, float]:
        """The updates of the fake score in a step, each with captions and noise of its own; returns its mean loss."""
        assert self.fake is not None  # the objective has one
        drawing = self.settings.drawing._replace(seed=generator(self.settings.seed, 0, "fake score").initial_seed())
        updates, losses = self.settings.fake_updates, list[Tensor]()
        for number in range(step * updates, (step + 1) * updates):
            batch = draw(self.dataset, number, self.student.schedule, drawing)
            draws = self._drawn(batch, number, of_fake=True)
            for which in self._parts():
                matching, part = self._matching(batch.part(which), step), draws.part(which)
                drawings = matching.drawings(part, self.student.device)
                loss = partial(self._fake_loss, matching, drawings, part)
                losses.append(self.fake.add_gradients(loss))
            norm = self.fake.update(self.learning_rate(step))
            if self.fake.learner.overflowed(norm):
                raise FloatingPointError(_not_finite("the gradient of the fake score", step))
        mean = torch.cat(losses).mean().item() * self.settings.accumulation_steps
        if not math.isfinite(mean):
            raise FloatingPointError(_not_finite("the loss of the fake score", step))
        return {"fake": mean}

    def _fake_loss(self, matching: Matching, drawings: Tensor, draws: Draws) -> Tensor:
        return matching.denoising_loss(drawings, draws) / self.settings.accumulation_steps

    def _drawn(self, batch: Batch, number: int, of_fake: bool = False) -> Draws:
        """Random numbers of a batch for `dmd`. The fake score sees what the steps after the first draw."""
        return drawn(
            batch.x0.shape,
            self.student.schedule,
            phases=self.settings.phases,
            first=1 if of_fake else 0,
            seed=self.settings.seed,
            turn=number,
            purpose="fake score's draws" if of_fake else "draws",
        )

    def _matching(self, batch: Batch, step: int) -> Matching:
        """The student and both scores, for the captions of a batch."""
        assert self.fake is not None  # the objective has one
        device, settings = self.student.device, self.settings
        context, label = batch.context.to(device), batch.label
        scale = settings.guidance if batch.scale is None else batch.scale

        def inputs(x: Tensor, t: Tensor, examples: Tensor) -> StepInputs:
            its_label = None if label is None else Label(*(entry[examples] for entry in label))
            return x, t.to(device), context[examples.to(device)], its_label

        def student(x: Tensor, t: Tensor, examples: Tensor) -> Tensor:
            with self.autocast:
                return ask(self.student, inputs(x, t, examples)).float()

        def real(x: Tensor, t: Tensor, examples: Tensor) -> Tensor:
            each = scale[examples] if isinstance(scale, Tensor) else scale
            return self._teach(step, inputs(x, t, examples), each).prediction.float()

        return Matching(
            student=student,
            real=real,
            as_fake=self.fake.on,
            schedule=self.student.schedule,
            prediction=self.student.prediction,
            phases=settings.phases,
            anchor_steps=settings.anchor_steps,
        )

    def _parts(self) -> list[slice]:
        """This process's parts of a batch, which it computes one after another."""
        parts = self.settings.accumulation_steps
        size = self.processes.part_size(self.settings.batch_size, parts)
        starts = ((i * self.processes.count + self.processes.rank) * size for i in range(parts))
        return [slice(start, start + size) for start in starts]

    def _batch(self, step: int) -> Batch:
        """The batch of a step; the next one is prepared in the background."""
        batch = self._next[1].result() if self._next and self._next[0] == step else self._draw(step)
        self._next = step + 1, self._reader.submit(self._draw, step + 1)
        return batch

    def _draw(self, step: int) -> Batch:
        return draw(self.dataset, step, self.student.schedule, self.settings.drawing)

    def _rounding(self, step: int) -> torch.Generator | None:
        if not self.optimizer.rounding:
            return None
        seed = generator(self.settings.seed, step, "rounding").initial_seed()
        return torch.Generator(self.student.device).manual_seed(seed)

    def losses(
        self, batch: Batch, step: int, objective: Objective, draws: Draws | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Every term of the loss and what is measured beside it, and the weighted loss of each example, (B,) each.

        draws: random numbers for `dmd`, if the objective has it.
        """
        terms = dict[str, Tensor]()
        if objective.compares or objective.local:
            terms = self._compared(batch, step, objective)
        weights = example_weights(
            self.settings.weighting, self.student.prediction, self.student.schedule, batch.t, self.settings.snr_gamma
        )
        if draws is not None:
            terms |= self._matching(batch, step).losses(draws, self.student.device)
        total = objective.total(terms)
        return terms, weights.to(total) * total

    def _compared(self, batch: Batch, step: int, objective: Objective) -> dict[str, Tensor]:
        """Terms of the loss at noised examples, (B,) each."""
        student, device = self.student, self.student.device
        x0, eps, x_t, t, context = (tensor.to(device, non_blocking=True) for tensor in batch[:5])
        kind, coefficients = prediction(student.prediction), student.schedule.at(batch.t, x0)
        scale = self.settings.guidance if batch.scale is None else batch.scale
        self._put_on(None if batch.scale is None else (batch.scale - 1) / (self.settings.guidance - 1))
        inputs, terms = (x_t, t, context, batch.label), dict[str, Tensor]()
        if objective.local:
            terms = local_terms(student, self.teachers.at(step), inputs, objective.feature_loss, self.autocast)
        if objective.compares:
            from_teacher = self._teach(step, inputs, scale) if objective.uses_teacher else None
            aimed = self._aim(from_teacher, inputs, batch.t) if objective.consistency else None
            outputs = student_outputs(student, self._ours, inputs, self.layers, self.autocast)
            for seen in self._theirs.values():
                seen.clear()  # what the student left there, if both are one network
            if self.done == 0:
                for name, feature in outputs.features.items():
                    if torch.is_grad_enabled() and not feature.requires_grad:
                        raise RuntimeError(f"feature layer {name} has no gradient, so its loss would train nothing")
            terms |= objective.terms(kind.target(x0, eps, coefficients), outputs, from_teacher)
            if aimed is not None:
                way, aim = aimed
                terms["consistency"] = pseudo_huber_loss(jump(student, outputs.prediction, x_t, way), aim)
        return terms

    def _teach(self, step: int, inputs: StepInputs, scale: float | Tensor) -> Outputs:
        """The outputs of the teacher of a step."""
        teacher, number = self.teachers.at(step), self.teachers.number_at(step)
        if number not in self._theirs:
            if self._theirs and self._feature_layers(teacher) != self.layers:
                raise ValueError("the teachers have different shapes; all teachers of a run must have one architecture")
            if self.settings.teacher_mode == "sequence":
                self._theirs.clear()
            self._theirs[number] = self._stack.enter_context(tap(teacher, self.layers))
        features = self._theirs[number]
        return teacher_outputs(teacher, features, inputs, self.layers, self.student, null=self.dataset.null, scale=scale)

    def _aim(self, from_teacher: Outputs | None, inputs: StepInputs, t: Tensor) -> tuple[Course, Tensor]:
        """Where states at timesteps (B,) go that the student jumps from, and where it should land."""
        assert from_teacher is not None and self.target is not None  # the objective has both
        settings = self.settings
        way = course(
            t,
            self.student.schedule,
            phases=settings.phases,
            solver_steps=settings.solver_steps,
            lowest=settings.timestep_range[0] if settings.timestep_range else 0,
        )
        with lent(self.parameters, self.target.weights):
            return way, landing(self.student, from_teacher.prediction, inputs, way, self.autocast)

    def _readable(self, measured: list[dict[str, Tensor]], t: Tensor | None, norm: Tensor) -> dict[str, float]:
        """Means over the batch as numbers, with one device synchronisation; also the sum over feature layers.

        t: timesteps of the examples, for the loss by timestep; None where it has none.
        """
        names = list(measured[0])
        table = torch.stack([torch.cat([part[name].float() for part in measured]) for name in names])  # (terms, examples)
        table = self.processes.gathered(table, len(measured))
        *means, norm = torch.cat([table.mean(1), table[0], norm.reshape(1).float()]).tolist()
        means, totals = means[: len(names)], means[len(names) :]
        values = dict(zip(names, means, strict=True))
        summed: dict[str, float] = {}
        for name, value in values.items():
            if (term := name.split("/")[0]) != name:
                summed[term] = summed.get(term, 0) + value
        bins: dict[str, list[float]] = {}
        for timestep, total in [] if t is None else zip(t.tolist(), totals, strict=True):
            bins.setdefault(self._bins[timestep * len(self._bins) // self.student.schedule.num_timesteps], []).append(total)
        return {**values, **summed, "norm": norm, **{name: sum(part) / len(part) for name, part in bins.items()}}

    def _check_finite(self, values: Mapping[str, float], step: int) -> None:
        """Raise ``FloatingPointError`` naming the term and block; the loss scaler handles gradients that overflow."""
        if not math.isfinite(values["total"]):
            terms = (
                (n, v)
                for n, v in values.items()
                if n not in ("total", "feature", "local", "norm") and not n.startswith("timesteps")
            )
            culprit = next((name for name, value in terms if not math.isfinite(value)), "total")
            self.sound = False  # the previous step damaged the weights; the last checkpoint stays
            raise FloatingPointError(_not_finite(f"the loss ({culprit})", step, keeps="its last checkpoint"))
        if self.learner.overflowed(values["norm"]):
            raise FloatingPointError(_not_finite("the gradient", step))

    @torch.no_grad()
    def validate(self, step: int) -> float:
        """Mean loss of the exported weights over held-out examples."""
        if self._held_out is None:
            self._held_out = held_out_batches(self.dataset, self.student.schedule, self.settings.drawing, MAX_VALIDATION_BATCHES)
        if not self._held_out:
            raise ValueError("validation_share holds out no example of this small dataset; raise it, or turn validation off")
        with self.exported():
            totals = [self.losses(batch, step, self.objective)[1] for batch in self._held_out]
        return torch.cat(totals).mean().item()

    # --- exports and checkpoints

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """While open, the network has the exported weights and is in eval mode."""
        network = self.student.network.eval()
        self._put_on(None)
        with self.optimizer.exported():
            own = {name: weight.detach().cpu().clone() for name, weight in self.parameters.items()} if self.average else {}
            self._put(self.average.weights if self.average else {})
            try:
                yield
            finally:
                self._put(own)
                network.train()

    def _put_on(self, strengths: Tensor | None) -> None:
        """Set the LoRA strength of each example of a batch if it chooses the scale; None for full strength."""
        if self.settings.strength_is_scale:
            cast("Lora", self.trained).strengths = strengths

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.parameters[name].copy_(weight)

    @property
    def keeps(self) -> bool:
        """Whether this process takes part in saving: the main one, and all that hold a shard of the student."""
        return self.processes.main or self.processes.shards

    def save(self) -> None:
        """Write a checkpoint."""
        if self.keeps:
            tensors, rest = self.learner.state()
            tensors = _under("optimizer", tensors)
            if self.average or self.optimizer.averages:
                tensors |= {f"weights/{name}": whole(weight.detach()).cpu().clone() for name, weight in self.parameters.items()}
            if self.target:
                tensors |= _under("target", self.target.weights)
            if self.fake:
                of_fake, rest["fake"] = self.fake.state()
                tensors |= _under("fake", of_fake)
            with self.optimizer.exported():
                exported = self.average.weights if self.average else self.parameters
                state = State(self.done, {name: whole(weight.detach()) for name, weight in exported.items()}, tensors, rest)
                if self.processes.main:
                    self.run.save(state, self.trained)
        self.processes.wait()

    def save_if_sound(self) -> None:
        """Write a checkpoint if there are new steps and the weights are sound."""
        if self.sound and self.done > self.run.step:
            self.save()

    def _restore(self) -> None:
        """Resume from the newest checkpoint, if there is one."""
        if (state := self.run.load(self.trained)) is None:
            return
        try:
            self._take(state)
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:  # each library raises its own errors
            raise ValueError(
                f"checkpoint {state.step} of run {self.run.folder.name!r} does not fit the trained weights ({error}); give the "
                "new run another name"
            ) from error

    def _take(self, state: State) -> None:
        """Load the weights, the optimizer and the rest of a checkpoint."""
        own = _of("weights", state.tensors) or state.weights
        self._put({name: shared_like(weight, self.parameters[name]) for name, weight in own.items()})
        if self.average:
            self.average.load(state.weights)
        if self.target:
            self.target.load(_of("target", state.tensors))
        if self.fake:
            self.fake.load(_of("fake", state.tensors), state.rest["fake"])
        self.learner.load(_of("optimizer", state.tensors), state.rest)
        self.done = state.step


def _under(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}/{name}": tensor for name, tensor in tensors.items()}


def _of(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}/")}


def _not_finite(what: str, step: int, keeps: str = "every step before it") -> str:
    return f"{what} is not finite at step {step + 1}; the run keeps {keeps}; start a new run with a lower learning rate"


def check_lesson(settings: TrainingSettings, teacher: Architecture | None, student: Architecture | None, same: bool) -> None:
    """Raise ``ValueError`` if a student has nothing to learn: it is larger than its teacher, or the same model.

    same: whether all teachers predict exactly what the student predicts before training. Such a student can still learn
    guidance, or to sample in fewer steps; a LoRA or an expert for a range of timesteps can also learn the data, if the task loss counts.
    """
    if not settings.uses_teacher:
        return
    if teacher and settings.of_blocks:
        raise ValueError(
            "the objectives blocks and local, and local_steps, are for transformers; for UNets choose another objective, and local_steps 0"
        )
    if teacher and student and student.num_parameters > teacher.num_parameters:
        raise ValueError(
            f"student and teacher do not match: they are swapped, as the student has {student.num_parameters:,} parameters and "
            f"the teacher {teacher.num_parameters:,}; give the full model as teacher and the pruned one as student"
        )
    specialises = settings.weighted_objective.task and (settings.lora_rank or settings.timestep_range)
    if same and settings.guidance == 1 and not (specialises or settings.weighted_objective.few_steps):
        raise ValueError(
            "student and teacher are the same model, so there is nothing to learn; prune the student, give another teacher, set "
            'guidance above 1 with objective "guidance", or fine-tune with objective "task"'
        )


def _same(teacher: Denoiser, student: Denoiser) -> bool:
    """Whether two models predict the same: equal weights, or one network with the LoRA off in the teacher."""
    if teacher.sampling != student.sampling or teacher.skipped != student.skipped:
        return False
    theirs, ours = (dict(denoiser.network.named_parameters()) for denoiser in (teacher, student))
    return teacher.network is student.network or (theirs.keys() == ours.keys() and fingerprint(theirs) == fingerprint(ours))


def check_trajectories(settings: TrainingSettings, dataset: Dataset) -> None:
    """Raise ``ValueError`` if the stored trajectories were sampled with another guidance than the run learns."""
    if dataset.timesteps is None or settings.guidance == 1 or not settings.uses_images:
        return
    drawn, wanted = dataset.scales, settings.scales
    if settings.guidance_min is None and drawn is None:  # older data do not store it
        return
    if drawn is None or (drawn[0] < drawn[1]) != (wanted[0] < wanted[1]) or drawn[0] < wanted[0] or drawn[1] > wanted[1]:
        theirs = "one unknown guidance" if drawn is None else f"guidance {_scales(drawn)}"
        raise ValueError(
            f"the stored trajectories were sampled with {theirs}, but this run learns guidance {_scales(wanted)}; create them "
            "again, or set trajectory_states to 0"
        )


def _scales(scales: tuple[float, float]) -> str:
    least, largest = scales
    return f"{largest:g}" if least == largest else f"{least:g} to {largest:g}"


def _check_belong_together(student: Denoiser, teacher: Denoiser) -> None:
    """Raise ``ValueError`` if student and teacher cannot take the same inputs."""
    theirs, ours = (
        (denoiser.latent_channels, denoiser.architecture and denoiser.architecture.context_width)
        for denoiser in (teacher, student)
    )
    if theirs != ours:
        raise ValueError(
            f"teacher and student must take the same latents and captions, got {theirs[0]} and {ours[0]} latent channels, "
            f"caption widths {theirs[1]} and {ours[1]}; use models of one family"
        )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay SIGINT (Ctrl+C) and SIGTERM until the block ends, so that they never interrupt it halfway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda *details: received.append(details)) for number in signals}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in received[:1]:
        handler = handlers[number]
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            signal.raise_signal(number)


def _warn_if_seen_too_often(num_examples: int, num_seen: int) -> None:
    if num_seen > PUBLISHED_EPOCHS * num_examples:
        log.warning(
            "each of the %s examples will be seen %s times; BK-SDM's published students saw each of %s about %s times. "
            "Use more examples (the teacher can make them), or fewer steps",
            f"{num_examples:,}",
            f"{num_seen // num_examples:,}",
            f"{PUBLISHED_EXAMPLES:,}",
            PUBLISHED_EPOCHS,
        )


def _what_to_lower(settings: TrainingSettings, processes: Processes) -> str:
    """The out-of-memory message: settings that save memory, least costly first."""
    now = MemorySettings(training=settings, num_processes=processes.count, shards=processes.shards)
    return (
        "the device is out of memory; change, in this order: "
        f"{', '.join(change.what for change in changes(now, of_teacher=False))}; the run keeps every completed step, and "
        "gradient_checkpointing and accumulation_steps can be changed before it resumes"
    )
