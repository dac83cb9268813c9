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
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..base.precision import DTYPES
from ..base.seeding import generator
from ..base.storage import fingerprint
from ..data.dataset import Batch, Dataset, draw, held_out_batches, num_examples
from ..diffusion.denoiser import Denoiser, check_trainable, checkpointing, tap
from ..diffusion.schedule import prediction
from ..networks.architecture import Architecture
from ..networks.name_map import NameMap
from ..pruning.plan import PruningPlan, name_map
from .consistency import Course, course, jump, landing
from .ema import EMA
from .exports import trained
from .local import local_terms
from .losses import pseudo_huber_loss
from .memory import MemorySettings, changes
from .objective import Objective, Outputs
from .optim import Optimizer
from .previews import Previews
from .processes import ALONE, Processes
from .run import Run, State
from .settings import TrainingSettings
from .sharding import shared_like, whole
from .step import StepInputs, student_outputs, teacher_outputs
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
        in_fp16 = settings.precision == "fp16" or student.computes_in_fp16
        self.scaler = torch.amp.GradScaler(student.device.type, enabled=in_fp16)
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
            self.optimizer = Optimizer(
                settings.optimizer,
                self.parameters,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                rounding=settings.rounds,
            )
            self.average = EMA(self.parameters, settings.ema_decay) if settings.ema_decay else None
            self.target = EMA(self.parameters, settings.target_decay) if self.objective.consistency else None
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
        losses = [name for name in ("task", "output", "consistency") if self.objective.weights[name]]
        losses += dict.fromkeys(name.split("/")[0] for name in layers)
        extra = ["teacher"] * (len(self.teachers) > 1) + ["scale"] * self.scaler.is_enabled()
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
        batch = self._batch(step)
        parts = self.settings.accumulation_steps
        size = self.processes.part_size(self.settings.batch_size, parts)
        measured = []
        for i in range(parts):
            start = (i * self.processes.count + self.processes.rank) * size
            part = batch.part(slice(start, start + size))
            with self.processes.accumulating(self.student, more=i + 1 < parts):
                terms, total = self.losses(part, step, self.settings.objective_at(step))
                self.scaler.scale(total.mean() / parts).backward()
            measured.append({"total": total.detach(), **{name: value.detach() for name, value in terms.items()}})
        del terms, total
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer.parts[0])
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm))
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
                for lagging in filter(None, (self.average, self.target)):
                    lagging.update(self.parameters, step)
            self.optimizer.zero_grad()
            if self.scaler.is_enabled():
                self.scaler.update()
            self.done, self.sound = step + 1, True
        return values

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

    def losses(self, batch: Batch, step: int, objective: Objective) -> tuple[dict[str, Tensor], Tensor]:
        """Every term of the loss, and the weighted loss of each example, (B,) each."""
        student, device = self.student, self.student.device
        x0, eps, x_t, t, context = (tensor.to(device, non_blocking=True) for tensor in batch[:5])
        kind, coefficients = prediction(student.prediction), student.schedule.at(batch.t, x0)
        scale = self.settings.guidance if batch.scale is None else batch.scale
        self._put_on(None if batch.scale is None else (batch.scale - 1) / (self.settings.guidance - 1))
        inputs, terms = (x_t, t, context, batch.label), dict[str, Tensor]()
        if objective.local:
            terms = local_terms(student, self.teachers.at(step), inputs, objective.feature_loss, self.autocast)
        if not objective.only_local:
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
        weights = example_weights(self.settings.weighting, student.prediction, student.schedule, t, self.settings.snr_gamma)
        return terms, weights * objective.total(terms)

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
        with self._lent(self.target.weights):
            return way, landing(self.student, from_teacher.prediction, inputs, way, self.autocast)

    @contextlib.contextmanager
    def _lent(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While open, the student computes with other values of what is trained; none are copied."""
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = weights[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]

    def _readable(self, measured: list[dict[str, Tensor]], t: Tensor, norm: Tensor) -> dict[str, float]:
        """Means over the batch as numbers, with one device synchronisation; also the sum over feature layers."""
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
        for timestep, total in zip(t.tolist(), totals, strict=True):
            bins.setdefault(self._bins[timestep * len(self._bins) // self.student.schedule.num_timesteps], []).append(total)
        return {**values, **summed, "norm": norm, **{name: sum(part) / len(part) for name, part in bins.items()}}

    def _check_finite(self, values: Mapping[str, float], step: int) -> None:
        """Raise ``FloatingPointError`` naming the term and block; the loss scaler handles gradients that overflow."""
        way_out = "start a new run with a lower learning rate"
        if not math.isfinite(values["total"]):
            terms = (
                (n, v)
                for n, v in values.items()
                if n not in ("total", "feature", "local", "norm") and not n.startswith("timesteps")
            )
            culprit = next((name for name, value in terms if not math.isfinite(value)), "total")
            self.sound = False  # the previous step damaged the weights; the last checkpoint stays
            raise FloatingPointError(
                f"the loss is not finite at step {step + 1} ({culprit}); the run keeps its last checkpoint; {way_out}"
            )
        if not math.isfinite(values["norm"]) and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
            raise FloatingPointError(
                f"the gradient is not finite at step {step + 1}; the run keeps every step before it; {way_out}"
            )

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
            tensors, rest = self.optimizer.state()
            tensors = {f"optimizer/{name}": whole(tensor) for name, tensor in tensors.items()}
            if self.average or self.optimizer.averages:
                tensors |= {f"weights/{name}": whole(weight.detach()).cpu().clone() for name, weight in self.parameters.items()}
            if self.target:
                tensors |= {f"target/{name}": weight for name, weight in self.target.weights.items()}
            rest = {"optimizer": rest, "scaler": self.scaler.state_dict()}
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
        own = {name.removeprefix("weights/"): t for name, t in state.tensors.items() if name.startswith("weights/")}
        self._put({name: shared_like(weight, self.parameters[name]) for name, weight in (own or state.weights).items()})
        if self.average:
            self.average.load(state.weights)
        if self.target:
            self.target.load({name.removeprefix("target/"): t for name, t in state.tensors.items() if name.startswith("target/")})
        optimizer = {n.removeprefix("optimizer/"): t for n, t in state.tensors.items() if n.startswith("optimizer/")}
        self.optimizer.load(optimizer, state.rest["optimizer"])
        self.scaler.load_state_dict(state.rest["scaler"])
        self.done = state.step


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
    if same and settings.guidance == 1 and not (specialises or settings.weighted_objective.consistency):
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
    if dataset.timesteps is None or settings.guidance == 1:
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
