"""The node that distils a student, and what all nodes that train share."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ..distill_core.base.sizes import gib
from ..distill_core.base.storage import read_header
from ..distill_core.data.dataset import Dataset
from ..distill_core.evaluation import plots
from ..distill_core.lora.layers import without_lora
from ..distill_core.networks.files import open_unet
from ..distill_core.pruning.plan import PruningPlan, name_map
from ..distill_core.training.lesson import check_lesson, check_trajectories, on_own_weights
from ..distill_core.training.live import Live
from ..distill_core.training.loop import Progress, distill
from ..distill_core.training.memory import Forecast
from ..distill_core.training.preflight import check_run, disk_bytes
from ..distill_core.training.previews import Previews
from ..distill_core.training.run import Inputs, Run
from ..distill_core.training.settings import REFIT_EXAMPLES, TrainingSettings
from ..distill_core.training.teachers import Teachers
from . import bridge
from .inputs import data_inputs, learning_inputs, refit_input, run_inputs, run_outputs, setting_input, vae_input

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

log = logging.getLogger("distill")
DEFAULT_RANK = 64
NUM_SAMPLED = 8
"""Times that a run without a recipe makes sample images, about."""


class DistillTrainStep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillTrainStep",
            display_name="Distill Train Step",
            category="distill",
            description="Trains a pruned student to predict what its teacher predicts. Each execution trains some steps of a "
            "named run and saves it under output/distill_runs; queue again to continue. Cancel at any time: every finished step "
            "is kept. A complete run returns its student at once. A transformer shares its weights with its teacher and learns by a "
            "LoRA, in the memory of one model.",
            search_aliases=[
                "distill",
                "train student",
                "knowledge distillation",
                "BK-SDM",
                "finetune",
                "KOALA",
                "heal",
                "flux",
                "z-image",
            ],
            is_input_list=True,
            inputs=[
                *data_inputs("Prune UNet Blocks or Prune Transformer Blocks"),
                io.Model.Input(
                    "teacher_2",
                    optional=True,
                    tooltip="A second teacher of the same architecture, such as a fine-tune; "
                    "Distillation Recipe sets how the teachers take turns.",
                ),
                io.Model.Input("teacher_3", optional=True, tooltip="A third teacher."),
                vae_input(),
                *run_inputs("student"),
                *learning_inputs(),
                io.Int.Input(
                    "lora_rank",
                    default=DEFAULT_RANK,
                    min=1,
                    max=1024,
                    optional=True,
                    advanced=True,
                    tooltip="For transformers only, which learn by a LoRA on the weights they share with their teacher: its rank. Higher "
                    "learns more and needs more memory. The saved student has it merged.",
                ),
                setting_input("local_steps", optional=True, advanced=True),
                refit_input(),
            ],
            outputs=[
                io.Model.Output(display_name="student", tooltip="The student as trained so far: an ordinary MODEL."),
                *run_outputs(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name, total_steps, steps_per_queue, **_):
        return bridge.SEEN_RUNS.fingerprint(run_name[0], total_steps[0], steps_per_queue[0])

    @classmethod
    def execute(
        cls,
        teacher,
        student,
        latents,
        captions,
        run_name,
        steps_per_queue,
        null_caption=None,
        recipe=({},),
        teacher_2=(),
        teacher_3=(),
        vae=(None,),
        **settings,
    ) -> io.NodeOutput:
        student, run_name, steps_per_queue = bridge.Model(student[0]), run_name[0], steps_per_queue[0]
        teachers = [bridge.Model(model) for model in (teacher[0], *teacher_2, *teacher_3)]
        rank = settings.pop("lora_rank", (DEFAULT_RANK,))[0]
        settings.setdefault("refit_examples", (REFIT_EXAMPLES,))
        settings = {name: values[0] for name, values in settings.items()}
        settings |= recipe[0] or sampled(settings["total_steps"], vae[0], null_caption)
        lesson = (
            Healing(teachers, student, settings, rank)
            if teachers[0].known_transformer
            else WholeStudent(teachers, student, settings)
        )
        folder, node_id = bridge.run_folder(run_name), cls.hidden.unique_id
        lesson.check(folder)
        with torch.inference_mode(False), torch.enable_grad():
            lesson.check_something_to_learn()
            data = bridge.dataset(latents, captions, null_caption, teachers[0])
            check_trajectories(lesson.settings, data, teachers[0].schedule)
            run = Run(folder, lesson.settings, lesson.inputs(data))
            if not run.complete:
                lesson.train(run, data, vae[0], steps_per_queue, node_id)
        trained = lesson.result(run)
        shown = show_run(run, node_id)
        return io.NodeOutput(trained, *shown, run.step, run_name, ui=ui.PreviewImage(shown[1], cls=cls))


class WholeStudent:
    """A student of a UNet, all of whose weights are trained, beside its teachers."""

    def __init__(self, teachers: list[bridge.Model], student: bridge.Model, settings: dict):
        self.teachers, self.student, self.settings = teachers, student, TrainingSettings(**settings)
        self.plan: PruningPlan | None = None

    def check(self, folder: Path) -> None:
        """``ValueError`` before any work is done."""
        check_run(folder, self.settings, self.student.architecture.shapes)
        check_lesson(self.settings, self.teachers[0].architecture, self.student.architecture, same=False)
        self.plan = self.student.plan_from(self.teachers[0])
        bridge.check_trainable(self.student, *self.teachers)

    def check_something_to_learn(self) -> None:
        check_lesson(self.settings, None, None, same=bridge.predict_alike([self.student, *self.teachers]))

    def inputs(self, data: Dataset) -> Inputs:
        return Inputs(
            teachers=tuple(model.fingerprint for model in self.teachers),
            student=self.student.fingerprint,
            plan=self.plan.name if self.plan else "",
            data=data.fingerprint,
        )

    def train(self, run: Run, data: Dataset, vae, num_steps: int, node_id: str) -> None:
        student, last = self.student, min(run.settings.total_steps, run.step + num_steps)
        previews = bridge.previews(data, vae, self.teachers[0]) if run.settings.sample_every_steps else None
        watch = Watch(run.folder.name, run.step, last, node_id, previews)
        forecast = bridge.forecast_memory(self.teachers, student, self.plan, data, run.settings)
        on_disk_bytes = disk_bytes(student.architecture.shapes, [run.settings])
        needs = tell_needs(forecast, bridge.free_bytes(student), node_id, on_disk_bytes)
        load = [partial(bridge.denoiser, model, student.architecture) for model in self.teachers]
        try:
            distill(
                run,
                student=bridge.trainable(student),
                teacher=Teachers(load, run.settings),
                plan=self.plan,
                dataset=data,
                num_steps=num_steps,
                previews=previews,
                on_step=watch,
                on_refit=refit_progress(node_id, needs),
            )
        finally:
            watch.end()
            bridge.release_memory()

    def result(self, run: Run) -> ModelPatcher:
        """The student as trained so far."""
        weights = open_unet(run.result_file).state_dict
        return bridge.make_student(weights, self.student.architecture, self.student, self.student.origin)


class Healing:
    """A student of a transformer, taught by a LoRA on the weights that it shares with its teacher.

    The teacher is the network with all its blocks and the LoRA off; the student skips the blocks that were cut, with the LoRA on.
    """

    def __init__(self, teachers: list[bridge.Model], student: bridge.Model, settings: dict, rank: int):
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
        bridge.check_healing(self.teacher)

    def check_something_to_learn(self) -> None:
        bridge.check_shares_weights(self.student, self.teacher)

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
        return bridge.with_lora(self.student.patcher, None, lora, 1.0, 0.0)[0]


def sampled(total_steps: int, vae, null_caption) -> dict:
    """How often a run without a recipe makes sample images: whenever what they need is connected."""
    return {"sample_every_steps": ceil(total_steps / NUM_SAMPLED)} if vae is not None and null_caption else {}


def train_on_base(
    run: Run,
    model: bridge.Model,
    teacher: bridge.Model | None,
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
    previews = bridge.previews(data, vae, model, stays=True) if run.settings.sample_every_steps else None
    watch = Watch(run.folder.name, run.step, last, node_id, previews)
    forecast = bridge.forecast_shared_base(model, teacher, data, run.settings)
    with contextlib.ExitStack() as stack:
        stack.callback(bridge.release_memory)
        stack.callback(watch.end)
        base = stack.enter_context(bridge.opened_base(model))
        load = partial(stack.enter_context, bridge.opened_base(teacher)) if teacher else without_lora(base)
        stack.enter_context(bridge.with_gradients(base))
        student = replace(base, mapping=mapping)
        if forecast is None and teacher is None:
            forecast = bridge.forecast_base(base, mapping, data, run.settings)
        if forecast:
            tell_needs(forecast, bridge.free_bytes(model), node_id)
        else:
            told = bridge.describe_memory(student, run.settings)
            log.info("%s", told)
            bridge.show_text(told, node_id)
        distill(
            run,
            student=student,
            teacher=Teachers([load], run.settings),
            plan=plan,
            dataset=data,
            num_steps=num_steps,
            previews=previews,
            on_step=watch,
        )


def show_run(run: Run, node_id: str) -> tuple[dict, torch.Tensor]:
    """Show the progress of a run on the node; returns its losses for Plot Loss Graph, and their curve as an image."""
    metrics = run.metrics()
    curve = bridge.to_image(plots.loss_curve(metrics, title(run)))
    bridge.SEEN_RUNS.look(run.folder.name)
    state = "complete" if run.complete else "queue again to go on"
    sampling = ", ".join(f"{name} {value}" for name, value in run.settings.sampling.items())
    hint = f"\nSample with {sampling}" if sampling else ""
    bridge.show_text(f"step {run.step} of {run.settings.total_steps}: {state}{hint}", node_id)
    return {"loss": [row["total"] for row in metrics]}, curve


class Watch:
    """Called after each step: updates the progress bar and the chart on the node, and stops on Cancel."""

    def __init__(self, run_name: str, first: int, last: int, node_id: str, previews: Previews | None = None):
        self.stage = ""  # what is being trained, when there are several experts
        self._live, self._first, self._node_id, self._previews = Live(run_name, last), first, node_id, previews
        self._progress = bridge.Progress(node_id, total=last - first)
        self._run_name = run_name

    def end(self) -> None:
        """Tell all open pages that the training has ended, whichever way."""
        bridge.tell_chart({"run": self._run_name, "ended": True}, None, self._node_id)

    def __call__(self, progress: Progress) -> None:
        if message := self._live.tell(progress, time.monotonic()):
            sample = None if self._previews is None else self._previews.latest
            memory = bridge.memory_in_use()
            bridge.tell_chart(message | {"stage": self.stage, "memory": memory}, sample, self._node_id)
        self._progress.at(progress.step - self._first)


def tell_needs(forecast: Forecast, free_bytes: int, node_id: str, on_disk_bytes: int = 0) -> str:
    """Show on the node, and return, what a step and the run's checkpoints need, with advice if it is too much.

    Writes the parts to the log.
    """
    log.info("%s", forecast.describe())
    shortage = forecast.describe_shortage(free_bytes, of_teacher=False)
    if shortage:
        log.warning("%s", shortage)
    told = [shortage or f"a step needs about {gib(forecast.total_bytes)} of memory"]
    if on_disk_bytes:
        told.append(f"the run's checkpoints take up to {gib(on_disk_bytes)} on the disk")
    needs = "\n".join(told)
    bridge.show_text(needs, node_id)
    return needs


def refit_progress(node_id: str, needs: str) -> Callable[[int, int], None]:
    """Shows the progress of a refit on the node, and after it again what the training needs."""
    progress = bridge.Progress(node_id, "parts of the refit")

    def at(done: int, total: int) -> None:
        progress.at(done, total)
        if done == total:
            bridge.show_text(needs, node_id)

    return at


def title(run: Run) -> str:
    return f"{run.folder.name}, {run.settings.objective}"


NODES = [DistillTrainStep]
