"""A run while it trains: its networks, optimisers and averages, from one checkpoint to the next."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..base.interrupts import uninterrupted
from ..base.precision import DTYPES
from ..base.seeding import generator
from ..base.storage import ignore
from ..data.dataset import Batch, Dataset, draw, held_out_batches
from ..diffusion.conditioning import Label
from ..diffusion.denoiser import Denoiser, check_trainable, checkpointing, tap
from ..diffusion.schedule import prediction
from ..networks.name_map import NameMap
from ..pruning.plan import PruningPlan, name_map
from .consistency import Course, course, jump, landing
from .dmd import Draws, FakeScore, Matching, drawn
from .ema import EMA
from .exports import trained
from .learner import Learner, swapped, with_prefix, without_prefix
from .lesson import (
    FEATURES_OF_UNETS,
    NOTHING_FOLDED,
    check_belong_together,
    check_lesson,
    check_trajectories,
    predict_the_same,
)
from .local import local_terms
from .losses import pseudo_huber_loss
from .objective import MEASURED_WITH_DMD, Objective, Outputs
from .processes import Processes
from .refit import refit
from .run import Run, State
from .sharding import shared_like, whole
from .step import StepInputs, ask, student_outputs, teacher_outputs
from .teachers import Teachers
from .weighting import example_weights

if TYPE_CHECKING:
    from ..lora.layers import Lora
    from .previews import Previews

NUM_TIMESTEP_BINS = 10
MAX_VALIDATION_BATCHES = 8


class Trainer:
    """The state of a run while it trains."""

    def __init__(
        self,
        run: Run,
        student: Denoiser,
        teachers: Teachers,
        plan: PruningPlan | None,
        dataset: Dataset,
        processes: Processes,
        on_refit: Callable[[int, int], None] = ignore,
    ):
        settings = run.settings
        self.run, self.settings, self.student, self.teachers = run, settings, student, teachers
        self.plan, self.dataset, self.processes, self.on_refit = plan, dataset, processes, on_refit
        self.objective = settings.weighted_objective  # after the local steps
        if student.noise_levels is None:  # otherwise the caller has checked the model already
            check_trainable(student.architecture, student.sampling)
        if settings.guidance != 1 and dataset.null is None:
            raise ValueError("guidance needs the empty caption, which this dataset lacks; connect null_caption")
        check_trajectories(settings, student.schedule, dataset.timesteps, dataset.scales)
        compute = settings.compute_dtype
        self.autocast = torch.autocast(student.device.type, DTYPES[compute], enabled=compute != "fp32", cache_enabled=True)
        self.done, self.saved, self.sound = 0, 0, True  # sound: no update was interrupted, all weights are finite
        self.measured: Mapping[str, float] = {}  # metrics of the newest step that is done
        self._theirs: dict[int, dict[str, Tensor]] = {}
        self._next: tuple[int, Future[Batch]] | None = None
        self._held_out = self._validation_parts() if settings.validate_every_steps else []

    # --- opening and closing

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Prepare the networks for training at the run's current step; set them back to inference afterwards."""
        network, settings = self.student.network, self.settings
        in_half = next(network.parameters()).dtype.itemsize == 2
        if settings.weight_dtype == "bf16" or (in_half and not settings.lora_rank):
            # diffusers' own `to` warns about modules to keep in fp32; there are none
            nn.Module.to(network, DTYPES[settings.weight_dtype])
        if self.settings.uses_teacher:
            # Load it first: if it shares the student's network, loading freezes the weights that are trained.
            teacher = self.teachers.at(self.run.step)
            if not self.run.step:
                same = len(self.teachers) == 1 and predict_the_same(teacher, self.student)
                check_lesson(settings, teacher.architecture, self.student.architecture, same)
                if settings.refits and self.plan is not None and self.student.architecture is not None:
                    self._feature_layers(teacher)  # for its checks
                    self._refit(teacher)
            del teacher  # the next in turn takes its place
        network.train()
        self.trained = trained(self.student, settings, self.plan)
        with contextlib.ExitStack() as stack:
            self._taps = stack.enter_context(contextlib.ExitStack())
            self._reader = stack.enter_context(ThreadPoolExecutor(1))
            if settings.gradient_checkpointing:
                stack.enter_context(checkpointing(self.student))
            stack.callback(setattr, self.student, "forward", self.student.forward)
            if settings.compile:
                self.student.forward = torch.compile(network)
            self.processes.share(self.student)
            self.parameters = self.trained.parameters()
            self.learner = Learner(self.parameters, settings, scaled=self.in_fp16)
            self.average = EMA(self.parameters, settings.ema_decay) if settings.ema_decay else None
            jumps = settings.jumps_from(self.run.step)
            self.target = EMA(self.parameters, settings.target_decay) if jumps else None
            self.fake = FakeScore(self.parameters, settings, scaled=self.in_fp16) if self.objective.dmd else None
            self._restore()
            self.layers = self._feature_layers(self.teachers.at(self.done)) if settings.uses_teacher else {}
            self._ours = stack.enter_context(tap(self.student, self.layers.values()))
            try:
                yield
            finally:
                self.learner.optimizer.zero_grad()
                self._theirs.clear()
                self._put_on(None)
                network.eval().requires_grad_(False)

    def _refit(self, teacher: Denoiser) -> None:
        """Let the layers before the cuts make up for the removed blocks, as `refit` does, by the run's first examples."""
        assert self.plan is not None
        count, of_batch = self.settings.refit_examples, self.settings.batch_size
        size = self.processes.part_size(of_batch, self.settings.accumulation_steps)
        drawn = lru_cache(maxsize=1)(self._draw)  # several parts are of one batch

        def examples(start: int) -> StepInputs:
            number, first = divmod(start, of_batch)
            part = drawn(number).part(slice(first, first + min(size, count - start)))
            x_t, t, context = (tensor.to(teacher.device) for tensor in (part.x_t, part.t, part.context))
            return x_t, t, context, part.label and part.label.to(context)

        parts = [partial(examples, start) for start in range(0, count, size)]
        refit(self.student, teacher, name_map(teacher.architecture, self.plan), parts, self.on_refit)

    def _feature_layers(self, teacher: Denoiser) -> dict[str, str]:
        """Teacher module -> student module whose outputs are compared; ``ValueError`` if the networks do not match."""
        if self.student.schedule != teacher.schedule:
            raise ValueError("teacher and student must use the same noise schedule; give both the same sampling settings")
        check_belong_together(self.student, teacher)
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
        of_layers = ("feature", "local")
        used = {name for objective in self.settings.objectives for name, weight in objective.weights.items() if weight}
        losses = [name for name in self.objective.weights if name in used and name not in of_layers]
        losses += dict.fromkeys(name.split("/")[0] for name in layers)
        losses += MEASURED_WITH_DMD * bool(self.objective.dmd)
        extra = ["teacher"] * (len(self.teachers) > 1) + ["scale"] * self.learner.scaler.is_enabled()
        validation = ["validation"] * bool(self.settings.validate_every_steps)
        return ["step", "lr", "total", *losses, "norm", *extra, *validation, *layers, *self._bins]

    @property
    def in_fp16(self) -> bool:
        """Whether gradients pass through float16, so that they need a loss scale."""
        return self.settings.precision == "fp16" or self.student.computes_in_fp16

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
        with uninterrupted():
            of_fake = self._fake_step(step)
            if step >= self.settings.first_dmd_step:
                self.measured = self._student_step(step, objective) | of_fake
                return self.measured
            values = {"total": of_fake.get("fake", math.nan), **of_fake}
            self.done, self.measured = step + 1, values
            return values

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
        with uninterrupted():
            if self.learner.update(values["norm"], self.learning_rate(step), self._rounding(step)):
                for lagging in filter(None, (self.average, self.target)):
                    lagging.update(self.parameters, step)
            if not (self.settings.jumps_from(step + 1) or self.objective.consistency):  # else validation asks it once more
                self.target = None
            self.done, self.measured, self.sound = step + 1, values, True
        return values

    def _fake_step(self, step: int) -> dict[str, float]:
        """The fake score's updates of a step, each with its own captions and noise; returns its mean loss.

        Those made before an error in this step are not made again.
        """
        assert self.fake is not None  # the objective has one
        batching = self.settings.batching._replace(seed=generator(self.settings.seed, 0, "fake score").initial_seed())
        first, end = (each * self.settings.fake_updates for each in (step, step + 1))
        losses = []
        for number in range(max(first, self.fake.num_updates), end):
            batch = draw(self.dataset, number, self.student.schedule, batching)
            draws = self._drawn(batch, number, of_fake=True)
            for which in self._parts():
                matching, part = self._matching(batch.part(which), draws.part(which), step), draws.part(which)
                samples = matching.samples(part, self.student.device)
                with self.fake.on():
                    loss = matching.denoising_loss(samples, part).mean() / self.settings.accumulation_steps
                    self.fake.learner.backward(loss)
                losses.append(loss.detach())
            self.fake.num_updates = number
            norm = self.fake.update(self.learning_rate(step))
            mean = torch.stack(losses).mean().item() * self.settings.accumulation_steps
            if not math.isfinite(mean):
                self.sound = False  # the student draws what is not finite
                raise FloatingPointError(
                    _not_finite("the loss of the fake score is not finite", step, keeps="its last checkpoint")
                )
            if self.fake.learner.overflowed(norm):
                raise FloatingPointError(_not_finite("the gradient of the fake score is not finite", step))
        return {"fake": mean} if losses else {}

    def _drawn(self, batch: Batch, number: int, of_fake: bool = False) -> Draws:
        """Random numbers of a batch for `dmd`. The fake score learns from the samples that it judges."""
        return drawn(
            batch.x0.shape,
            self.student.schedule,
            phases=self.settings.phases,
            first=1 if of_fake and self.objective.diversity else 0,
            seed=self.settings.seed,
            batch=number,
            purpose="fake score's draws" if of_fake else "draws",
        )

    def _matching(self, batch: Batch, draws: Draws, step: int) -> Matching:
        """The student and both scores, for the captions of a batch."""
        assert self.fake is not None  # the objective has one
        device, settings = self.student.device, self.settings
        context, label = batch.context.to(device), batch.label
        least, largest = settings.scales
        scale = largest if least == largest else least + (largest - least) * draws.share

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
            switched=self.fake.on,
            schedule=self.student.schedule,
            prediction=self.student.prediction,
            phases=settings.phases,
            anchor_steps=settings.anchor_steps if self.objective.diversity else 0,
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
        return draw(self.dataset, step, self.student.schedule, self.settings.batching)

    def _rounding(self, step: int) -> torch.Generator | None:
        if not self.learner.optimizer.rounding:
            return None
        seed = generator(self.settings.seed, step, "rounding").initial_seed()
        return torch.Generator(self.student.device).manual_seed(seed)

    def losses(
        self, batch: Batch, step: int, objective: Objective, draws: Draws | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Every term of the loss and what is measured beside it, and the weighted loss of each example, (B,) each.

        draws: random numbers for `dmd`, if the objective has it.
        """
        if draws is None:
            terms, measured = self._compared(batch, step, objective), dict[str, Tensor]()
        else:
            terms, measured = self._matching(batch, draws, step).losses(draws, self.student.device)
        weights = example_weights(
            self.settings.weighting, self.student.prediction, self.student.schedule, batch.t, self.settings.snr_gamma
        )
        total = objective.total(terms)
        return terms | measured, weights.to(total) * total

    def _compared(self, batch: Batch, step: int, objective: Objective) -> dict[str, Tensor]:
        """Terms of the loss at noised examples, (B,) each."""
        student, device = self.student, self.student.device
        x0, eps, x_t, t, context = (tensor.to(device, non_blocking=True) for tensor in batch[:5])
        kind, coefficients = prediction(student.prediction), student.schedule.at(batch.t, x0)
        scale = self.settings.guidance if batch.scale is None else batch.scale
        self._put_on(None if batch.scale is None else (batch.scale - 1) / (self.settings.guidance - 1))
        inputs, terms = (x_t, t, context, batch.label), dict[str, Tensor]()
        if objective.local:
            terms = local_terms(student, self._teacher(step), inputs, objective.feature_loss, self.autocast)
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

    def _teacher(self, step: int) -> Denoiser:
        """The teacher of a step; of a sequence, the one before it is let go first."""
        if self.settings.teacher_mode == "sequence" and self.teachers.number_at(step) not in self._theirs:
            self._theirs.clear()
            self._taps.close()
        return self.teachers.at(step)

    def _teach(self, step: int, inputs: StepInputs, scale: float | Tensor) -> Outputs:
        """The outputs of the teacher of a step."""
        teacher, number = self._teacher(step), self.teachers.number_at(step)
        if number not in self._theirs:
            if self._feature_layers(teacher) != self.layers:
                raise ValueError("the teachers have different shapes; all teachers of a run must have one architecture")
            self._theirs[number] = self._taps.enter_context(tap(teacher, self.layers))
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
        with swapped(self.parameters, self.target.weights):
            return way, landing(self.student, from_teacher.prediction, inputs, way, self.autocast)

    def _readable(self, measured: list[dict[str, Tensor]], t: Tensor | None, norm: Tensor) -> dict[str, float]:
        """Means over the batch as numbers, with one device synchronisation; also the sum over feature layers.

        t: timesteps of the examples, for the loss by timestep; None where it has none.
        """
        names, none = list(dict.fromkeys(name for part in measured for name in part)), [part["total"] * 0 for part in measured]
        columns = ([part.get(name, zeros).float() for part, zeros in zip(measured, none, strict=True)] for name in names)
        table = torch.stack([torch.cat(column) for column in columns])  # (terms, examples)
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
            raise FloatingPointError(_not_finite("the loss is not finite", step, f" ({culprit})", keeps="its last checkpoint"))
        if self.learner.overflowed(values["norm"]):
            raise FloatingPointError(_not_finite("the gradient is not finite", step))

    def _validation_parts(self) -> list[Batch]:
        """What validation computes one after another, no more at once than is trained on."""
        size = self.processes.part_size(self.settings.batch_size, self.settings.accumulation_steps)
        batches = held_out_batches(self.dataset, self.student.schedule, self.settings.batching, MAX_VALIDATION_BATCHES)
        if not batches:
            raise ValueError("validation_share holds out no example of this small dataset; raise it, or turn validation off")
        return [batch.part(slice(start, start + size)) for batch in batches for start in range(0, len(batch.t), size)]

    @torch.no_grad()
    def validate(self, step: int) -> float:
        """Mean loss of the exported weights over held-out examples."""
        with self.exported():
            totals = [self.losses(part, step, self.objective)[1] for part in self._held_out]
        return torch.cat(totals).mean().item()

    def draw(self, previews: Previews, step: int) -> None:
        """Draw sample images by the teacher of a step and by the exported student."""
        number = f" {self.teachers.number_at(step) + 1}" if len(self.teachers) > 1 else ""
        with self.exported():
            previews.draw(
                self.run.folder / "samples",
                self.done,
                self.student,
                self.teachers.at(step),
                self.settings,
                of_teacher=f"teacher{number}",
                write=self.processes.main,
            )

    # --- exports and checkpoints

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """While open, the network has the exported weights and is in eval mode."""
        network = self.student.network.eval()
        self._put_on(None)
        with self.learner.optimizer.exported():
            own = {name: weight.detach().cpu().clone() for name, weight in self.parameters.items()} if self.average else {}
            try:
                self._put(self.average.weights if self.average else {})
                yield
            finally:
                with uninterrupted():
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
            tensors = with_prefix("optimizer", tensors)
            if self.average or self.learner.optimizer.averages:
                tensors |= {f"weights/{name}": whole(weight.detach()).cpu().clone() for name, weight in self.parameters.items()}
            if self.target:  # also at the end, as the run may be given more steps
                tensors |= with_prefix("target", self.target.weights)
            if self.fake:
                of_fake, rest["fake"] = self.fake.state()
                tensors |= with_prefix("fake", of_fake)
            with self.learner.optimizer.exported():
                exported = self.average.weights if self.average else self.parameters
                weights = {name: whole(weight.detach()) for name, weight in exported.items()}
                tensors |= {} if self.trained.exact else with_prefix("exported", weights)
                state = State(self.done, weights, tensors, rest)
                if self.processes.main:
                    self.run.save(state, self.trained)
        self.saved = self.done
        self.processes.wait()

    def save_if_sound(self) -> None:
        """Write a checkpoint if there are new steps and the weights are sound."""
        if self.sound and self.done > self.saved:  # not as on the disk, where another process may have just written it
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
        exported = without_prefix("exported", state.tensors) or state.weights
        own = without_prefix("weights", state.tensors) or exported
        self._put({name: shared_like(weight, self.parameters[name]) for name, weight in own.items()})
        if self.average:
            self.average.load(exported)
        if self.target:
            self.target.load(without_prefix("target", state.tensors))
        if self.fake:
            self.fake.load(without_prefix("fake", state.tensors), state.rest["fake"])
        self.learner.load(without_prefix("optimizer", state.tensors), state.rest)
        self.done = self.saved = state.step


def _not_finite(what: str, step: int, where: str = "", keeps: str = "every step before it") -> str:
    return f"{what} at step {step + 1}{where}; the run keeps {keeps}; start a new run with a lower learning rate"
