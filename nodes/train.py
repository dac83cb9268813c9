"""The node that distils a student, and what all nodes that train share."""

import logging
import time
from functools import partial

import torch
from comfy_api.latest import io, ui

from ..distill_core.base.sizes import gib
from ..distill_core.evaluation import plots
from ..distill_core.networks.files import open_unet
from ..distill_core.training.live import Live
from ..distill_core.training.loop import Progress, check_lesson, check_trajectories, distill
from ..distill_core.training.memory import Forecast
from ..distill_core.training.preflight import check_run
from ..distill_core.training.previews import Previews
from ..distill_core.training.run import Inputs, Run
from ..distill_core.training.settings import TrainingSettings
from ..distill_core.training.teachers import Teachers
from . import bridge
from .inputs import data_inputs, learning_inputs, run_inputs, run_outputs

log = logging.getLogger("distill")


class DistillTrainStep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillTrainStep",
            display_name="Distill Train Step",
            category="distill",
            description="Trains a pruned student to predict what its teacher predicts. Each execution trains some steps of a "
            "named run and saves it under output/distill_runs; queue again to continue. Cancel at any time: every finished step "
            "is kept. A complete run returns its student at once.",
            search_aliases=["distill", "train student", "knowledge distillation", "BK-SDM", "finetune"],
            is_input_list=True,
            inputs=[
                *data_inputs(),
                io.Model.Input(
                    "teacher_2",
                    optional=True,
                    tooltip="A second teacher of the same architecture, such as a fine-tune; "
                    "Distillation Recipe sets how the teachers take turns.",
                ),
                io.Model.Input("teacher_3", optional=True, tooltip="A third teacher."),
                io.Vae.Input("vae", optional=True, tooltip="For sample images during training, if the recipe asks for them."),
                *run_inputs("student"),
                *learning_inputs(),
            ],
            outputs=[
                io.Model.Output(display_name="student", tooltip="The student as trained so far: an ordinary MODEL."),
                *run_outputs(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return last_step(**inputs)

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
        teacher = teachers[0]
        recipe = TrainingSettings(**{name: values[0] for name, values in settings.items()}, **recipe[0])
        folder = bridge.run_folder(run_name)
        check_run(folder, recipe, student.architecture.shapes)
        check_lesson(recipe, teacher.architecture, student.architecture, same=False)
        plan = student.plan_from(teacher)
        bridge.check_trainable(student, *teachers)
        with torch.inference_mode(False), torch.enable_grad():
            check_lesson(recipe, None, None, same=bridge.predict_alike([student, *teachers]))
            data = bridge.dataset(latents, captions, null_caption, teacher)
            check_trajectories(recipe, data)
            inputs = Inputs(
                teachers=tuple(model.fingerprint for model in teachers),
                student=student.fingerprint,
                plan=plan.name if plan else "",
                data=data.fingerprint,
            )
            run = Run(folder, recipe, inputs)
            if not run.complete:
                previews = bridge.previews(data, vae[0], teacher) if recipe.sample_every_steps else None
                _train(run, teachers, student, plan, data, previews, steps_per_queue, cls.hidden.unique_id)
        weights = open_unet(run.result_file).state_dict
        trained = bridge.make_student(weights, student.architecture, student, student.origin)
        shown = show_run(run, cls.hidden.unique_id)
        return io.NodeOutput(trained, *shown, run.step, run_name, ui=ui.PreviewImage(shown[1], cls=cls))


def show_run(run: Run, node_id: str) -> tuple[dict, torch.Tensor]:
    """Show the progress of a run on the node; returns its losses for Plot Loss Graph, and their curve as an image."""
    metrics = run.metrics()
    curve = bridge.to_image(plots.loss_curve(metrics, title(run)))
    bridge.newest_step(run.folder.name)  # so that the next call notices if they are gone
    state = "complete" if run.complete else "queue again to go on"
    bridge.show_text(f"step {run.step} of {run.settings.total_steps}: {state}", node_id)
    return {"loss": [row["total"] for row in metrics]}, curve


def last_step(run_name, total_steps, steps_per_queue, **_) -> str | float:
    """The step an execution ends at: an unfinished run is executed again, a complete one is not, unless it was deleted.

    NaN, which never equals the last value, if one of the three inputs is linked: its value is not known yet.
    """
    if None in (run_name[0], total_steps[0], steps_per_queue[0]):
        return float("nan")  # a new object each time: ComfyUI takes the same object for the same value
    newest = bridge.newest_step(run_name[0])
    return f"{min(total_steps[0], newest + steps_per_queue[0])}, lost {bridge.times_lost(run_name[0])}"


def _train(run: Run, models, student, plan, data, previews, num_steps: int, node_id: str) -> None:
    last = min(run.settings.total_steps, run.step + num_steps)
    watch = Watch(run.folder.name, run.step, last, node_id, previews)
    tell_memory(bridge.forecast_memory(models, student, plan, data, run.settings), bridge.free_bytes(student), node_id)
    try:
        distill(
            run,
            student=bridge.trainable(student),
            teacher=Teachers([partial(bridge.denoiser, model, student.architecture) for model in models], run.settings),
            plan=plan,
            dataset=data,
            num_steps=num_steps,
            previews=previews,
            on_step=watch,
        )
    finally:
        bridge.release_memory()


class Watch:
    """Called after each step: updates the progress bar and the chart on the node, and stops on Cancel."""

    def __init__(self, run_name: str, first: int, last: int, node_id: str, previews: Previews | None = None):
        self.stage = ""  # what is being trained, when there are several experts
        self._live, self._first, self._node_id, self._previews = Live(run_name, last), first, node_id, previews
        self._progress = bridge.Progress(node_id, total=last - first)

    def __call__(self, progress: Progress) -> None:
        if message := self._live.tell(progress, time.monotonic()):
            sample = None if self._previews is None else self._previews.latest
            memory = bridge.memory_in_use()
            bridge.tell_chart(message | {"stage": self.stage, "memory": memory}, sample, self._node_id)
        self._progress.at(progress.step - self._first)


def tell_memory(forecast: Forecast, free_bytes: int, node_id: str) -> None:
    """Show the total on the node, with advice if it is too much, and write the parts to the log."""
    log.info("%s", forecast.describe())
    shortage = forecast.describe_shortage(free_bytes, of_teacher=False)
    if shortage:
        log.warning("%s", shortage)
    bridge.show_text(shortage or f"a step needs about {gib(forecast.total_bytes)} of memory", node_id)


def title(run: Run) -> str:
    return f"{run.folder.name}, {run.settings.objective}"


NODES = [DistillTrainStep]
