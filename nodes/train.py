"""Distillation inside the graph."""

import logging
import time
from functools import partial

import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..distill_core import plots
from ..distill_core.files import open_unet
from ..distill_core.memory import Forecast, gib
from ..distill_core.objective import OBJECTIVES
from ..distill_core.previews import Previews
from ..distill_core.recipe import LR_SCHEDULES, Recipe
from ..distill_core.run import Run
from ..distill_core.teachers import Teachers
from ..distill_core.train import Progress, distill
from . import bridge
from .recipe import RecipeSettings

log = logging.getLogger("distill")
SECONDS_BETWEEN_CURVES = 1.5
SHARE_OF_TIME_FOR_CURVES = 0.05
SECONDS_FOR_SAMPLES = 6.0


def data_inputs() -> list[io.Input]:
    """Who learns from whom, and on what."""
    return [
        io.Model.Input("teacher", tooltip="The full model, as it went into Prune UNet Blocks. It is only read."),
        io.Model.Input("student", tooltip="The pruned model, as it came out of Prune UNet Blocks."),
        io.Latent.Input("latents", tooltip="Training images as latents: Make Training Dataset, a batch, or the demo's."),
        io.Conditioning.Input("captions", tooltip="The caption of each image, encoded; or one caption for all."),
        io.Conditioning.Input(
            "null_caption",
            optional=True,
            tooltip="The empty prompt, encoded. With it some captions are left out while training, so that the student "
            "learns the unconditional answer that guidance (cfg above 1) needs. Without it captions are never left out.",
        ),
        RecipeSettings.Input("recipe", optional=True, tooltip="Finer settings, from Distillation Recipe."),
    ]


def run_inputs(name: str) -> list[io.Input]:
    """Which run, and how long it is."""
    return [
        io.String.Input(
            "run_name",
            default=name,
            tooltip="Folder of the run under output/distill_runs. The same name goes on with the run; a new name starts anew.",
        ),
        io.Int.Input("total_steps", default=1000, min=1, max=10_000_000, tooltip="Steps until the run is complete."),
    ]


def run_outputs() -> list[io.Output]:
    """How a run went."""
    return [
        io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="Loss of every step, for Plot Loss Graph."),
        io.Image.Output(display_name="loss_curve", tooltip="The loss curve as a picture."),
        io.Int.Output(display_name="step", tooltip="Steps done so far."),
    ]


def learning_inputs() -> list[io.Input]:
    """How a student learns."""
    return [
        *pace_inputs("0.00005 for Stable Diffusion, 0.001 for the demo.", default=5e-5),
        io.Combo.Input(
            "objective",
            options=list(OBJECTIVES),
            default="bk-sdm",
            tooltip="What the student learns by. bk-sdm: images, the teacher's output and the outputs of its stages. segmind: "
            "the same and the mid block, less weight on the teacher. ssd-1b: every layer, for SDXL. koala: self-attention. "
            "laptop-diff: features of even weight. guidance: the teacher's output alone. task: plain fine-tuning without the teacher.",
        ),
        seed_input(),
        io.Float.Input(
            "caption_dropout",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Share of captions replaced by the null caption, where one is connected.",
        ),
        *keeping_inputs(),
    ]


def pace_inputs(usual_rates: str, default: float) -> list[io.Input]:
    """How many steps, of how much."""
    return [
        io.Int.Input(
            "steps_per_queue",
            default=1000,
            min=1,
            max=10_000_000,
            tooltip="Steps each execution trains. Fewer than the total: the graph shows a result sooner, queue it again to go on.",
        ),
        io.Int.Input("batch_size", default=8, min=1, max=4096, tooltip="Images a step. Lower it if memory runs out."),
        io.Float.Input(
            "learning_rate",
            default=default,
            min=1e-8,
            max=1.0,
            step=1e-6,
            round=1e-8,
            tooltip=f"Peak learning rate of AdamW. {usual_rates}",
        ),
        io.Combo.Input(
            "lr_schedule",
            options=list(LR_SCHEDULES),
            default="constant",
            tooltip="How the learning rate goes down over total_steps. With constant, total_steps may be raised later.",
        ),
    ]


def seed_input() -> io.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**63 - 1,
        control_after_generate=False,
        tooltip="Decides data order, noise and timesteps. The same seed gives the same student.",
    )


def keeping_inputs() -> list[io.Input]:
    """Seldom changed: how a run begins, and how often it is kept."""
    return [
        io.Int.Input(
            "warmup_steps",
            default=0,
            min=0,
            max=1_000_000,
            advanced=True,
            tooltip="Steps over which the learning rate rises from 0.",
        ),
        io.Int.Input(
            "save_every_steps",
            default=500,
            min=1,
            max=1_000_000,
            advanced=True,
            tooltip="Steps between checkpoints. The end, Cancel and errors save as well.",
        ),
    ]


class DistillTrainStep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillTrainStep",
            display_name="Distill Train Step",
            category="distill",
            description="Teaches a pruned student to answer as its teacher does. Each execution trains some steps of a named run "
            "and saves it under output/distill_runs; queue again to go on. Cancel at any time: every finished step is kept. "
            "A run that is complete returns its student at once.",
            search_aliases=["distill", "train student", "knowledge distillation", "BK-SDM", "finetune"],
            is_input_list=True,
            inputs=[
                *data_inputs(),
                io.Model.Input(
                    "teacher_2",
                    optional=True,
                    tooltip="A second teacher of the same architecture, such as a fine-tune; "
                    "Distillation Recipe says who teaches when.",
                ),
                io.Model.Input("teacher_3", optional=True, tooltip="A third teacher."),
                io.Vae.Input(
                    "vae", optional=True, tooltip="For sample pictures while it trains, where the recipe asks for them."
                ),
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
        teacher, student, run_name, steps_per_queue = teacher[0], student[0], run_name[0], steps_per_queue[0]
        teachers = [teacher, *teacher_2, *teacher_3]
        recipe = Recipe(**{name: values[0] for name, values in settings.items()}, **recipe[0])
        plan = bridge.plan_between(student, teacher)
        with torch.inference_mode(False), torch.enable_grad():
            data = bridge.dataset(latents, captions, null_caption, teacher)
            origin = {
                **{f"teacher {n}" if n > 1 else "teacher": bridge.model_fingerprint(m) for n, m in enumerate(teachers, 1)},
                "student": bridge.model_fingerprint(student),
                "data": data.fingerprint,
                "plan": plan.name if plan else "none",
            }
            run = Run(bridge.run_folder(run_name), recipe, origin)
            if not run.complete:
                previews = bridge.previews(data, vae[0], teacher) if recipe.sample_every_steps else None
                _train(run, teachers, student, plan, data, previews, steps_per_queue, cls.hidden.unique_id)
        architecture = bridge.architecture_of(student)
        trained = bridge.make_student(open_unet(run.result_file).state_dict, architecture, student, bridge.origin_of(student))
        shown = show_run(run, cls.hidden.unique_id)
        return io.NodeOutput(trained, *shown, run.step, ui=ui.PreviewImage(shown[1], cls=cls))


def show_run(run: Run, node_id: str) -> tuple[dict, torch.Tensor]:
    """How far a run is, on the node; its losses for Plot Loss Graph, and their curve as a picture."""
    metrics = run.metrics()
    curve = bridge.to_image(plots.loss_curve(metrics, title(run)))
    state = "complete" if run.complete else "queue again to go on"
    bridge.show_text(f"step {run.step} of {run.recipe.total_steps}: {state}", node_id)
    return {"loss": [row["total"] for row in metrics]}, curve


def last_step(run_name, total_steps, steps_per_queue, **_) -> int:
    """The step an execution ends at: a run that can go on is executed again, a complete one is not."""
    return min(total_steps[0], bridge.newest_step(run_name[0]) + steps_per_queue[0])


def _train(run: Run, models, student, plan, data, previews, num_steps: int, node_id: str) -> None:
    last = min(run.recipe.total_steps, run.step + num_steps)
    watch = Watch(run.metrics(), title(run), run.step, last, node_id, previews)
    tell_memory(bridge.forecast_memory(models, student, plan, data, run.recipe), bridge.free_bytes(student), node_id)
    try:
        learning = bridge.trainable(student)
        teachers = Teachers([partial(bridge.denoiser, model, learning.architecture) for model in models], run.recipe)
        distill(
            run,
            student=learning,
            teacher=teachers,
            plan=plan,
            dataset=data,
            num_steps=num_steps,
            previews=previews,
            on_step=watch,
        )
    finally:
        learning = teachers = None
        bridge.release_memory()


class Watch:
    """Called after each step: shows progress, the loss curve and sample pictures on the node, and heeds Cancel."""

    def __init__(self, metrics: list[dict], title: str, first: int, last: int, node_id: str, previews: Previews | None = None):
        self.metrics, self.title, self.first, self.last, self.node_id = metrics, title, first, last, node_id
        self.stage = ""  # of a training of several, in front of its progress
        self._previews, self._shown, self._next_curve = previews, None, 0.0
        self._bar = ProgressBar(last - first, node_id=node_id)

    def __call__(self, progress: Progress) -> None:
        preview, started = None, time.monotonic()
        self.metrics.append({**progress.losses, "step": progress.step})
        if self._previews and self._previews.latest != self._shown:
            self._shown, self._next_curve = self._previews.latest, started + SECONDS_FOR_SAMPLES
            preview = ("PNG", bridge.open_image(self._shown), 1024)
        elif started >= self._next_curve:
            preview = ("JPEG", plots.loss_curve(self.metrics, self.title), 640)
            bridge.show_text(self.stage + bridge.describe_progress(progress, self.last), self.node_id)
            finished = time.monotonic()
            self._next_curve = finished + max(SECONDS_BETWEEN_CURVES, (finished - started) / SHARE_OF_TIME_FOR_CURVES)
        self._bar.update_absolute(progress.step - self.first, preview=preview)
        bridge.throw_if_cancelled()


def tell_memory(told: Forecast, free_bytes: int, node_id: str) -> None:
    """The total on the node, with advice where it is too much; the parts in the log."""
    log.info("%s", told.describe())
    shortage = told.describe_shortage(free_bytes, of_teacher=False)
    if shortage:
        log.warning("%s", shortage)
    bridge.show_text(shortage or f"a step needs about {gib(told.total_bytes)} of memory", node_id)


def title(run: Run) -> str:
    return f"{run.folder.name}, {run.recipe.objective}"


NODES = [DistillTrainStep]
