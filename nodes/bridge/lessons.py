"""What the training nodes teach: a whole student of a UNet, a cut transformer, or a LoRA on a MODEL's own weights."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path

from comfy.model_patcher import ModelPatcher

from ...distill_core.base.storage import read_header
from ...distill_core.data.dataset import Dataset
from ...distill_core.lora.layers import without_lora
from ...distill_core.networks.files import open_unet
from ...distill_core.pruning.plan import PruningPlan, name_map
from ...distill_core.training.lesson import check_lesson, on_own_weights
from ...distill_core.training.loop import distill
from ...distill_core.training.preflight import check_run, disk_bytes
from ...distill_core.training.run import Inputs, Run
from ...distill_core.training.settings import TrainingSettings
from ...distill_core.training.teachers import Teachers
from .build import make_student
from .data import previews
from .interface import show_text
from .model import Model, with_lora
from .shared_base import (
    check_healing,
    check_shares_weights,
    describe_memory,
    forecast_base,
    forecast_shared_base,
    opened_base,
    with_gradients,
)
from .training import (
    check_trainable,
    denoiser,
    forecast_memory,
    free_bytes,
    predict_alike,
    release_memory,
    trainable,
)
from .watch import Watch, refit_progress, tell_needs

log = logging.getLogger("distill")
NUM_SAMPLED = 8
"""Times that a run without a recipe makes sample images, about."""


def sampled(total_steps: int, vae, null_caption) -> dict:
    """How often a run without a recipe makes sample images: whenever what they need is connected."""
    return {"sample_every_steps": ceil(total_steps / NUM_SAMPLED)} if vae is not None and null_caption else {}


def lesson_of(teachers: list[Model], student: Model, settings: dict, rank: int) -> WholeStudent | Healing:
    """How a student is taught. rank: of the LoRA by which a transformer learns."""
    if teachers[0].known_transformer:
        return Healing(teachers, student, settings, rank)
    return WholeStudent(teachers, student, settings)


class WholeStudent:
    """A student of a UNet, all of whose weights are trained, beside its teachers."""

    def __init__(self, teachers: list[Model], student: Model, settings: dict):
        self.teachers, self.student, self.settings = teachers, student, TrainingSettings(**settings)
        self.plan: PruningPlan | None = None

    def check(self, folder: Path) -> None:
        """``ValueError`` before any work is done."""
        check_run(folder, self.settings, self.student.architecture.shapes)
        check_lesson(self.settings, self.teachers[0].architecture, self.student.architecture, same=False)
        self.plan = self.student.plan_from(self.teachers[0])
        check_trainable(self.student, *self.teachers)

    def check_something_to_learn(self) -> None:
        check_lesson(self.settings, None, None, same=predict_alike([self.student, *self.teachers]))

    def inputs(self, data: Dataset) -> Inputs:
        return Inputs(
            teachers=tuple(model.fingerprint for model in self.teachers),
            student=self.student.fingerprint,
            plan=self.plan.name if self.plan else "",
            data=data.fingerprint,
        )

    def train(self, run: Run, data: Dataset, vae, num_steps: int, node_id: str) -> None:
        student, last = self.student, min(run.settings.total_steps, run.step + num_steps)
        shown = previews(data, vae, self.teachers[0]) if run.settings.sample_every_steps else None
        watch = Watch(run.folder.name, run.step, last, node_id, shown)
        forecast = forecast_memory(self.teachers, student, self.plan, data, run.settings)
        on_disk_bytes = disk_bytes(student.architecture.shapes, [run.settings])
        needs = tell_needs(forecast, free_bytes(student), node_id, on_disk_bytes)
        load = [partial(denoiser, model, student.architecture) for model in self.teachers]
        try:
            distill(
                run,
                student=trainable(student),
                teacher=Teachers(load, run.settings),
                plan=self.plan,
                dataset=data,
                num_steps=num_steps,
                previews=shown,
                on_step=watch,
                on_refit=refit_progress(node_id, needs),
            )
        finally:
            watch.end()
            release_memory()

    def result(self, run: Run) -> ModelPatcher:
        """The student as trained so far."""
        weights = open_unet(run.result_file).state_dict
        return make_student(weights, self.student.architecture, self.student, self.student.origin)


class Healing:
    """A student of a transformer, taught by a LoRA on the weights that it shares with its teacher.

    The teacher is the network with all its blocks and the LoRA off; the student skips the blocks that were cut, with the LoRA on.
    """

    def __init__(self, teachers: list[Model], student: Model, settings: dict, rank: int):
        self.teacher, *others = teachers
        if others:
            raise ValueError("a transformer learns from one teacher, with which it shares its weights; disconnect the others")
        self.student, self.settings = student, TrainingSettings(**settings, lora_rank=rank, lora_targets=("*",))
        self.settings = on_own_weights(self.settings, student.mapping_from(self.teacher))
        self.plan: PruningPlan | None = None

    def check(self, folder: Path) -> None:
        """``ValueError`` before any work is done."""
        check_run(folder, self.settings, {})
        self.plan = self.student.plan_from(self.teacher)
        if self.plan is None:
            raise ValueError(
                "the student has all blocks of its teacher, so there is nothing to learn; cut it with Prune Transformer Blocks"
            )
        check_healing(self.teacher)

    def check_something_to_learn(self) -> None:
        check_shares_weights(self.student, self.teacher)

    def inputs(self, data: Dataset) -> Inputs:
        assert self.plan is not None  # checked
        return Inputs(
            teachers=(self.teacher.fingerprint,),
            student=self.student.fingerprint,
            plan=self.plan.name,
            data=data.fingerprint,
            sampling=self.teacher.sampling_identity,
        )

    def train(self, run: Run, data: Dataset, vae, num_steps: int, node_id: str) -> None:
        train_on_base(run, self.teacher, None, data, vae, num_steps, node_id, plan=self.plan)

    def result(self, run: Run) -> ModelPatcher:
        """The student with the LoRA as trained so far; saving merges it."""
        lora = {name: tensor.read() for name, tensor in read_header(run.result_file).tensors.items()}
        return with_lora(self.student.patcher, None, lora, 1.0, 0.0)[0]


def train_on_base(
    run: Run,
    model: Model,
    teacher: Model | None,
    data: Dataset,
    vae,
    num_steps: int,
    node_id: str,
    plan: PruningPlan | None = None,
) -> None:
    """Train a LoRA on a MODEL's own weights. teacher: another MODEL; None for the same one, LoRA off.

    plan: of a student; the LoRA is then trained for that, on the way through the network that skips what it lacks.
    """
    mapping = None if plan is None else name_map(model.network, plan)
    last = min(run.settings.total_steps, run.step + num_steps)
    shown = previews(data, vae, model, stays=True) if run.settings.sample_every_steps else None
    watch = Watch(run.folder.name, run.step, last, node_id, shown)
    forecast = forecast_shared_base(model, teacher, data, run.settings)
    with contextlib.ExitStack() as stack:
        stack.callback(release_memory)
        stack.callback(watch.end)
        base = stack.enter_context(opened_base(model))
        load = partial(stack.enter_context, opened_base(teacher)) if teacher else without_lora(base)
        stack.enter_context(with_gradients(base))
        student = replace(base, mapping=mapping)
        if forecast is None and teacher is None:
            forecast = forecast_base(base, mapping, data, run.settings)
        if forecast:
            tell_needs(forecast, free_bytes(model), node_id)
        else:
            told = describe_memory(student, run.settings)
            log.info("%s", told)
            show_text(told, node_id)
        distill(
            run,
            student=student,
            teacher=Teachers([load], run.settings),
            plan=plan,
            dataset=data,
            num_steps=num_steps,
            previews=shown,
            on_step=watch,
        )
