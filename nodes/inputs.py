"""Inputs and outputs that several nodes have."""

import comfy.samplers
from comfy_api.latest import io

from ..distill_core.objective import OBJECTIVES
from ..distill_core.recipe import LR_SCHEDULES
from .recipe import RecipeSettings

SEED_OF_TRAINING = "Decides data order, noise and timesteps. The same seed gives the same student."


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
        io.String.Output(display_name="run_name", tooltip="The run's name, for Distillation Report."),
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
        seed_input(SEED_OF_TRAINING),
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


def seed_input(tooltip: str, **options) -> io.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**63 - 1,
        control_after_generate=False,
        tooltip=tooltip,
        **options,
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


def size_inputs() -> list[io.Input]:
    """Width and height of the pictures a teacher draws."""
    return [
        io.Int.Input(
            "width",
            default=512,
            min=64,
            max=4096,
            step=8,
            tooltip="Width in pixels: what the teacher was trained at. 512 for SD1.x, 768 or 512 for SD2, 1024 for SDXL, "
            "64 for the demo.",
        ),
        io.Int.Input("height", default=512, min=64, max=4096, step=8, tooltip="Height in pixels, as width."),
    ]


def sampler_inputs() -> list[io.Input]:
    """How KSampler draws, less the seed."""
    return [
        io.Int.Input("steps", default=20, min=1, max=10_000, tooltip="Steps of the sampler."),
        io.Float.Input(
            "cfg",
            default=8.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Strength of the guidance by the prompt.",
        ),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="How the noise is taken off."),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="How the steps are spread."),
    ]
