"""The training loop: a student learns from its teachers, step by step, and every step can be the last."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .architecture import Architecture
from .dataset import Batch, Dataset, draw, generator, held_out_batches, num_examples
from .denoiser import Denoiser, Label, check_trainable, checkpointing, tap
from .guidance import guided
from .memory import MemorySettings, changes
from .objective import Outputs, example_weights
from .optim import MovingAverage, Optimizer
from .plan import NameMap, PruningPlan, name_map
from .previews import Previews
from .processes import ALONE, Processes, shared_like, whole
from .recipe import DTYPES, Recipe
from .run import Run, State
from .schedule import prediction, restate
from .storage import fingerprint
from .teachers import Teachers
from .trackers import open_trackers
from .trained import trained

log = logging.getLogger("distill")
NUM_TIMESTEP_BINS = 10
MAX_VALIDATION_BATCHES = 8
PUBLISHED_EXAMPLES, PUBLISHED_EPOCHS = 212_776, 60  # BK-SDM: 50,000 steps of batch 256


class Progress(NamedTuple):
    """What a run tells after each step."""

    step: int
    """Steps done."""
    total_steps: int
    losses: Mapping[str, float]
    """What `run.Run.metrics` tells of the step."""
    seconds_per_step: float


class OutOfMemory(MemoryError):
    """The device has not enough memory; one sentence says what to lower."""


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
    """Train the student for ``num_steps`` more steps, or to the end of the recipe.

    The student's network is trained in place; teachers are only read. ``plan`` is the plan the student was pruned from
    the teachers with, None if they are of one shape. ``on_step`` is called after each step; whatever it raises (a cancel)
    ends the training, and the run keeps every step that was completed. Raises `OutOfMemory`, ``FloatingPointError`` where
    a loss or gradient is not finite, ``ValueError`` where student, teachers or data do not belong together.
    """
    teachers = teacher if isinstance(teacher, Teachers) else Teachers.single(teacher, run.recipe)
    processes.check(run.recipe)
    if run.complete or num_steps == 0:
        return
    with run.training():
        processes.wait()  # until the main one has settled where the run stands
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
    last = min(run.recipe.total_steps, first + (run.recipe.total_steps if num_steps is None else num_steps))
    _warn_if_seen_too_often(num_examples(dataset), run.recipe.total_steps * run.recipe.batch_size)
    started = time.monotonic()
    with training.open(), contextlib.ExitStack() as stack:
        columns = training.columns(first)
        metrics = stack.enter_context(run.open_metrics(first, columns)) if processes.main else None
        trackers = open_trackers(run, stack) if processes.main else []
        try:
            for step in range(first, last):
                values = training.step(step)
                done = step + 1
                if run.recipe.validate_every_steps and done % run.recipe.validate_every_steps == 0:
                    values["validation"] = training.validate(step)
                row = {"step": done, "lr": training.learning_rate(step), **values}
                if processes.main:
                    metrics.write(row)
                    for track in trackers:
                        track(row)
                if done < last and (done % run.recipe.save_every_steps == 0 or (run.recipe.keep_best and "validation" in row)):
                    training.save()
                if previews and run.recipe.sample_every_steps and done % run.recipe.sample_every_steps == 0 and training.keeps:
                    with training.given_out():
                        folder, taught_by = run.folder / "samples", teachers.at(step)
                        previews.draw(folder, done, student, taught_by, baked=run.recipe.guidance, write=processes.main)
                on_step(Progress(done, run.recipe.total_steps, row, (time.monotonic() - started) / (done - first)))
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(_what_to_lower(run.recipe, processes)) from error
        finally:
            # A cancel or an error loses the step it fell into and no more; a second Ctrl+C waits until it is saved.
            with _uninterrupted():
                training.save_if_sound()


class Training:
    """What a run holds while it trains."""

    def __init__(
        self, run: Run, student: Denoiser, teachers: Teachers, plan: PruningPlan | None, dataset: Dataset, processes: Processes
    ):
        recipe = run.recipe
        self.run, self.recipe, self.student, self.teachers = run, recipe, student, teachers
        self.plan, self.dataset, self.processes = plan, dataset, processes
        self.aim = recipe.aim
        if student.noise_levels is None:  # otherwise they come from a program that has checked what it asks
            check_trainable(student.architecture, student.sampling)
        if recipe.guidance != 1 and dataset.null is None:
            raise ValueError("guidance leads away from the empty caption, which these data lack; connect null_caption")
        check_trajectories(recipe, dataset)
        in_fp16 = recipe.precision == "fp16" or student.computes_in_fp16
        self.scaler = torch.amp.GradScaler(student.device.type, enabled=in_fp16)
        compute = recipe.compute_dtype
        self.autocast = torch.autocast(student.device.type, DTYPES[compute], enabled=compute != "fp32", cache_enabled=True)
        self.done, self.sound = 0, True  # sound: no update was cut in half, no weight spoilt
        self._theirs: dict[int, Mapping[str, Tensor]] = {}
        self._next: tuple[int, Future[Batch]] | None = None
        self._held_out: list[Batch] | None = None

    # --- opening and closing

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Ready the networks for training where the run stands; afterwards they are as networks are for use."""
        network, recipe = self.student.network, self.recipe
        if recipe.weight_dtype == "bf16":
            nn.Module.to(network, torch.bfloat16)  # that of diffusers warns of modules to keep, of which there are none
        if self.aim.uses_teacher:
            # One that shares the student's network is frozen before what is trained is not.
            teacher = self.teachers.at(self.run.step)
            if not self.run.step:
                same = len(self.teachers) == 1 and _same(teacher, self.student)
                check_lesson(recipe, teacher.architecture, self.student.architecture, same)
        network.train()
        self.trained = trained(self.student, recipe, self.plan)
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._reader = stack.enter_context(ThreadPoolExecutor(1))
            if recipe.gradient_checkpointing:
                stack.enter_context(checkpointing(self.student))
            stack.callback(setattr, self.student, "forward", self.student.forward)
            if recipe.compile:
                self.student.forward = torch.compile(network)
            self.processes.share(self.student)
            self.parameters = self.trained.parameters()
            self.optimizer = Optimizer(
                recipe.optimizer,
                self.parameters,
                learning_rate=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                rounding=recipe.rounds,
            )
            self.average = MovingAverage(self.parameters, recipe.ema_decay) if recipe.ema_decay else None
            self._restore()
            self.points = self._points(self.teachers.at(self.done)) if self.aim.uses_teacher else {}
            self._ours = stack.enter_context(tap(self.student, self.points.values()))
            try:
                yield
            finally:
                self.optimizer.zero_grad()
                self._theirs.clear()
                self._put_on(None)
                network.eval().requires_grad_(False)

    def _points(self, teacher: Denoiser) -> dict[str, str]:
        """Pairs teacher's module -> student's module whose outputs are compared; ``ValueError`` if they do not fit."""
        if self.student.schedule != teacher.schedule:
            raise ValueError("teacher and student must be on the same noise schedule; give both the same sampling settings")
        _check_belong_together(self.student, teacher)
        if not self.aim.feature_loss:
            return {}
        mapping = name_map(teacher.architecture, self.plan) if self.plan else NameMap.identity(teacher.architecture)
        points = self.aim.feature_points(teacher.architecture, self.student.architecture, mapping)
        if not points:
            raise ValueError(
                f"objective {self.recipe.objective} compares {self.aim.points}, of which this student has none; choose another"
            )
        return points

    def columns(self, step: int) -> list[str]:
        """Names of all that may be measured, in order."""
        points = [f"feature/{name}" for name in self.points.values()]
        losses = [name for name in ("task", "output") if self.aim.weights.get(name)] + ["feature"] * bool(points)
        extra = ["teacher"] * (len(self.teachers) > 1) + ["scale"] * self.scaler.is_enabled()
        validation = ["validation"] * bool(self.recipe.validate_every_steps)
        return ["step", "lr", "total", *losses, "norm", *extra, *validation, *points, *self._bins]

    @property
    def _bins(self) -> list[str]:
        size = math.ceil(self.student.schedule.num_timesteps / NUM_TIMESTEP_BINS)
        ends = range(0, self.student.schedule.num_timesteps, size)
        return [f"timesteps/{start}-{min(start + size, self.student.schedule.num_timesteps) - 1}" for start in ends]

    # --- one step

    def learning_rate(self, step: int) -> float:
        return self.recipe.learning_rate * self.recipe.lr_factor(step)

    def step(self, step: int) -> dict[str, float]:
        """Train one step, counted from 0; returns what was measured."""
        batch = self._batch(step)
        parts = self.recipe.accumulation_steps
        size = self.processes.part_size(self.recipe.batch_size, parts)
        measured = []
        for i in range(parts):
            start = (i * self.processes.count + self.processes.rank) * size
            part = batch.part(slice(start, start + size))
            with self.processes.accumulating(self.student, more=i + 1 < parts):
                terms, total = self.losses(part, step)
                self.scaler.scale(total.mean() / parts).backward()
            measured.append({"total": total.detach(), **{name: value.detach() for name, value in terms.items()}})
        del terms, total
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer.parts[0])
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.max_grad_norm))
        values = self._readable(measured, batch.t, norm)
        self._check_finite(values, step)
        if len(self.teachers) > 1:
            values["teacher"] = self.teachers.number_at(step)
        if self.scaler.is_enabled():
            values["scale"] = self.scaler.get_scale()
        self.sound = False
        with _uninterrupted():
            if math.isfinite(values["norm"]):
                self.optimizer.step(self.learning_rate(step), self._rounding(step))
                if self.average is not None:
                    self.average.update(self.parameters, step)
            self.optimizer.zero_grad()
            if self.scaler.is_enabled():
                self.scaler.update()
            self.done, self.sound = step + 1, True
        return values

    def _batch(self, step: int) -> Batch:
        """The batch of a step, and in the background the next."""
        number, future = self._next or (None, None)
        batch = future.result() if number == step else self._draw(step)
        self._next = step + 1, self._reader.submit(self._draw, step + 1)
        return batch

    def _draw(self, step: int) -> Batch:
        return draw(self.dataset, step, self.student.schedule, self.recipe.drawing)

    def _rounding(self, step: int) -> torch.Generator | None:
        if not self.optimizer.rounding:
            return None
        seed = generator(self.recipe.seed, step, "rounding").initial_seed()
        return torch.Generator(self.student.device).manual_seed(seed)

    def losses(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Every term of the loss, and what each example adds to it, (B,) each."""
        student, device = self.student, self.student.device
        x0, eps, x_t, t, context = (tensor.to(device, non_blocking=True) for tensor in batch[:5])
        kind, coefficients = prediction(student.prediction), student.schedule.at(batch.t, x0)
        scale = self.recipe.guidance if batch.scale is None else batch.scale
        self._put_on(None if batch.scale is None else (batch.scale - 1) / (self.recipe.guidance - 1))
        from_teacher = self._teach(step, x_t, t, context, batch.label, scale) if self.aim.uses_teacher else None
        with self.autocast:
            context = context.to(student.dtype)
            answer = student(x_t.to(student.dtype), t, context, batch.label and batch.label.to(context))
        features = {name: self._ours.pop(name) for name in self.points.values()}
        if self.done == 0:
            for name, feature in features.items():
                if torch.is_grad_enabled() and not feature.requires_grad:
                    raise RuntimeError(f"the feature point {name} carries no gradient, so its loss would train nothing")
        terms = self.aim.terms(kind.target(x0, eps, coefficients), Outputs(answer, features), from_teacher)
        weights = example_weights(self.recipe.weighting, student.prediction, student.schedule, t, self.recipe.snr_gamma)
        self._ours.clear()
        return terms, weights * self.aim.total(terms)

    @torch.no_grad()
    def _teach(self, step: int, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None, scale: float | Tensor) -> Outputs:
        """What the teacher of the step answers, in the student's terms."""
        teacher, number = self.teachers.at(step), self.teachers.number_at(step)
        if number not in self._theirs:
            if self._theirs and self._points(teacher) != self.points:
                raise ValueError("the teachers are of different shapes; a run takes teachers of one architecture")
            if self.recipe.teacher_mode == "sequence":
                self._theirs.clear()
            self._theirs[number] = self._stack.enter_context(tap(teacher, self.points))
        context = context.to(teacher.dtype)
        label, null = label and label.to(context), self.dataset.null
        answer = guided(teacher, x_t.to(teacher.dtype), t, context, label, null, scale)
        features = {self.points[name]: feature for name, feature in self._theirs[number].items()}
        self._theirs[number].clear()
        answer = restate(answer, x_t, t, self.student.schedule, teacher.prediction, self.student.prediction)
        return Outputs(answer, features)

    def _readable(self, measured: list[dict[str, Tensor]], t: Tensor, norm: Tensor) -> dict[str, float]:
        """Means over the batch as plain numbers, with one wait for the device; feature points also summed."""
        names = list(measured[0])
        table = torch.stack([torch.cat([part[name].float() for part in measured]) for name in names])  # (terms, examples)
        table = self.processes.gathered(table, len(measured))
        *means, norm = torch.cat([table.mean(1), table[0], norm.reshape(1).float()]).tolist()
        means, totals = means[: len(names)], means[len(names) :]
        values = dict(zip(names, means, strict=True))
        points = {name: value for name, value in values.items() if name.startswith("feature/")}
        summed = {"feature": sum(points.values())} if points else {}
        bins: dict[str, list[float]] = {}
        for timestep, total in zip(t.tolist(), totals, strict=True):
            bins.setdefault(self._bins[timestep * len(self._bins) // self.student.schedule.num_timesteps], []).append(total)
        return {**values, **summed, "norm": norm, **{name: sum(part) / len(part) for name, part in bins.items()}}

    def _check_finite(self, values: Mapping[str, float], step: int) -> None:
        """``FloatingPointError`` naming the term and block; a gradient that overflows is what the loss scaler is for."""
        way_out = "start a new run with a lower learning rate"
        if not math.isfinite(values["total"]):
            terms = ((n, v) for n, v in values.items() if n not in ("total", "feature", "norm") and not n.startswith("timesteps"))
            culprit = next((name for name, value in terms if not math.isfinite(value)), "total")
            self.sound = False  # the step before has spoilt the weights; the last checkpoint stays
            raise FloatingPointError(
                f"the loss is not finite at step {step + 1} ({culprit}); the run keeps its last checkpoint; {way_out}"
            )
        if not math.isfinite(values["norm"]) and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
            raise FloatingPointError(
                f"the gradient is not finite at step {step + 1}; the run keeps every step before it; {way_out}"
            )

    @torch.no_grad()
    def validate(self, step: int) -> float:
        """Mean loss over held-out examples, the student as it is given out."""
        if self._held_out is None:
            self._held_out = held_out_batches(self.dataset, self.student.schedule, self.recipe.drawing, MAX_VALIDATION_BATCHES)
        if not self._held_out:
            raise ValueError("validation_share holds out no example of this small dataset; raise it, or do without validation")
        with self.given_out():
            totals = [self.losses(batch, step)[1] for batch in self._held_out]
        return torch.cat(totals).mean().item()

    # --- what is given out and kept

    @contextlib.contextmanager
    def given_out(self) -> Iterator[None]:
        """While open, the network has the weights the run gives out, and is as networks are for use."""
        network = self.student.network.eval()
        self._put_on(None)
        with self.optimizer.given_out():
            own = {name: weight.detach().cpu().clone() for name, weight in self.parameters.items()} if self.average else {}
            self._put(self.average.weights if self.average else {})
            try:
                yield
            finally:
                self._put(own)
                network.train()

    def _put_on(self, strengths: Tensor | None) -> None:
        """How much of the LoRA each example of a batch has, where a range of scales is learnt; None for all of it."""
        if self.recipe.guidance_min is not None:
            self.trained.strengths = strengths

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.parameters[name].copy_(weight)

    @property
    def keeps(self) -> bool:
        """Whether this process has to do with what is kept: the main one, and all that hold a part of the student."""
        return self.processes.main or self.processes.shards

    def save(self) -> None:
        """Write a checkpoint."""
        if self.keeps:
            tensors, rest = self.optimizer.state()
            tensors = {f"optimizer/{name}": whole(tensor) for name, tensor in tensors.items()}
            if self.average or self.optimizer.averages:
                tensors |= {f"weights/{name}": whole(weight.detach()).cpu().clone() for name, weight in self.parameters.items()}
            rest = {"optimizer": rest, "scaler": self.scaler.state_dict()}
            with self.optimizer.given_out():
                given_out = self.average.weights if self.average else self.parameters
                state = State(self.done, {name: whole(weight.detach()) for name, weight in given_out.items()}, tensors, rest)
                if self.processes.main:
                    self.run.save(state, self.trained)
        self.processes.wait()

    def save_if_sound(self) -> None:
        """Write a checkpoint if there is anything new, and nothing wrong with it."""
        if self.sound and self.done > self.run.step:
            self.save()

    def _restore(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        if (state := self.run.load(self.trained)) is None:
            return
        try:
            self._take(state)
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:  # libraries have errors of their own
            raise ValueError(
                f"checkpoint {state.step} of run {self.run.folder.name!r} does not fit what is trained ({error}); give the new run "
                "another name"
            ) from error

    def _take(self, state: State) -> None:
        """The weights, the optimizer and all else of a checkpoint."""
        own = {name.removeprefix("weights/"): t for name, t in state.tensors.items() if name.startswith("weights/")}
        self._put({name: shared_like(weight, self.parameters[name]) for name, weight in (own or state.weights).items()})
        if self.average:
            self.average.load(state.weights)
        optimizer = {n.removeprefix("optimizer/"): t for n, t in state.tensors.items() if n.startswith("optimizer/")}
        self.optimizer.load(optimizer, state.rest["optimizer"])
        self.scaler.load_state_dict(state.rest["scaler"])
        self.done = state.step


def check_lesson(recipe: Recipe, teacher: Architecture | None, student: Architecture | None, same: bool) -> None:
    """``ValueError`` where a student has nothing to learn from its teachers: the student is the larger, or they are the same.

    same: whether all teachers answer just as the student does before it is trained. Then guidance is to learn all the same;
    and the data are, by a LoRA or an expert for some timesteps, if the loss against them counts.
    """
    if not recipe.aim.uses_teacher:
        return
    if teacher and student and student.num_parameters > teacher.num_parameters:
        raise ValueError(
            f"student and teacher do not belong together: they are swapped, as the student has {student.num_parameters:,} "
            f"parameters and the teacher {teacher.num_parameters:,}; give the full model as teacher, the pruned one as student"
        )
    specialises = recipe.aim.weights.get("task") and (recipe.lora_rank or recipe.timestep_range)
    if same and recipe.guidance == 1 and not specialises:
        raise ValueError(
            "student and teacher are the same model, so there is nothing to learn: prune the student, give another teacher, set "
            'guidance above 1 with objective "guidance", or fine-tune with objective "task"'
        )


def _same(teacher: Denoiser, student: Denoiser) -> bool:
    """Whether two networks answer alike: they have the same weights, or are one network whose LoRA is off in the teacher."""
    if teacher.sampling != student.sampling:
        return False
    theirs, ours = (dict(denoiser.network.named_parameters()) for denoiser in (teacher, student))
    return teacher.network is student.network or (theirs.keys() == ours.keys() and fingerprint(theirs) == fingerprint(ours))


def check_trajectories(recipe: Recipe, dataset: Dataset) -> None:
    """``ValueError`` where guidance is learnt on states that another guidance has led to."""
    if dataset.timesteps is None or recipe.guidance == 1:
        return
    drawn, wanted = dataset.scales, recipe.scales
    if recipe.guidance_min is None and drawn is None:  # older data do not tell
        return
    if drawn is None or (drawn[0] < drawn[1]) != (wanted[0] < wanted[1]) or drawn[0] < wanted[0] or drawn[1] > wanted[1]:
        theirs = "one unknown guidance" if drawn is None else f"guidance {_scales(drawn)}"
        raise ValueError(
            f"the stored trajectories were drawn with {theirs}, but this run learns guidance {_scales(wanted)}; draw them again "
            "for it, or set trajectory_states to 0"
        )


def _scales(scales: tuple[float, float]) -> str:
    least, largest = scales
    return f"{largest:g}" if least == largest else f"{least:g} to {largest:g}"


def _check_belong_together(student: Denoiser, teacher: Denoiser) -> None:
    """``ValueError`` where one could not answer what the other is asked."""
    theirs, ours = (
        (denoiser.latent_channels, denoiser.architecture and denoiser.architecture.context_width)
        for denoiser in (teacher, student)
    )
    if theirs != ours:
        raise ValueError(
            f"teacher and student must read the same latents and captions: {theirs[0]} and {ours[0]} channels, captions "
            f"{theirs[1]} and {ours[1]} wide"
        )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl+C, and a request to end, wait until the block is through, so that what it does is done whole or not at all."""
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
        if callable(handlers[number]):
            handlers[number](number, frame)
        elif handlers[number] == signal.SIG_DFL:
            signal.raise_signal(number)


def _warn_if_seen_too_often(num_examples: int, num_seen: int) -> None:
    if num_seen > PUBLISHED_EPOCHS * num_examples:
        log.warning(
            "each of the %s examples will be seen %s times; the published students saw each of %s about %s times. "
            "Use more examples (the teacher can make them), or fewer steps",
            f"{num_examples:,}",
            f"{num_seen // num_examples:,}",
            f"{PUBLISHED_EXAMPLES:,}",
            PUBLISHED_EPOCHS,
        )


def _what_to_lower(recipe: Recipe, processes: Processes) -> str:
    """The settings that need less memory, the least harmful first."""
    settings = MemorySettings(recipe=recipe, num_processes=processes.count, shards=processes.shards)
    return (
        "the device is out of memory; change, in this order: "
        f"{', '.join(change.what for change in changes(settings, of_teacher=False))}; the run keeps every step before, and "
        "gradient_checkpointing and accumulation_steps may be changed in mid-run"
    )
