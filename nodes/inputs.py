"""Inputs and outputs that several nodes share."""

from dataclasses import fields
from typing import get_type_hints

import comfy.samplers
from comfy_api.latest import io

from ..distill_core.base.settings import STEPS, limits_of
from ..distill_core.training.objective import OBJECTIVES
from ..distill_core.training.settings import REFIT_EXAMPLES, TrainingSettings

RecipeSettings = io.Custom("DISTILL_RECIPE")
SEED_OF_TRAINING = limits_of(TrainingSettings)["seed"].words


def setting_input(name: str, kind: type = TrainingSettings, *, more: str = "", **options) -> io.Input:
    """A widget for a field of a settings dataclass, with its default, limits and words.

    more: what to add to its words in a graph. options: of the widget, in place of those of the setting.
    """
    limits, hint = limits_of(kind)[name], get_type_hints(kind)[name]
    types = getattr(hint, "__args__", (hint,))
    options = {
        "default": next(own.default for own in fields(kind) if own.name == name),
        "tooltip": f"{limits.words} {more}".strip(),
        **options,
    }
    if limits.choices:
        return io.Combo.Input(name, **{"options": list(limits.choices)} | options)
    if hint is bool:
        return io.Boolean.Input(name, **options)
    if limits.within is not None:
        options = dict(zip(("min", "max"), limits.within, strict=True)) | options
    return io.Float.Input(name, round=1e-8, **options) if float in types else io.Int.Input(name, **options)


def data_inputs(source: str = "Prune UNet Blocks") -> list[io.Input]:
    """Inputs for the models and the data. source: the nodes that a student comes from."""
    return [
        io.Model.Input("teacher", tooltip=f"The full model: the input of {source}. It is only read."),
        io.Model.Input("student", tooltip=f"The pruned model: the output of {source}."),
        io.Latent.Input("latents", tooltip="Training images as latents: from Make Training Dataset, a batch, or the demo."),
        io.Conditioning.Input("captions", tooltip="The caption of each image, encoded; or one caption for all."),
        io.Conditioning.Input(
            "null_caption",
            optional=True,
            tooltip="The empty prompt, encoded. With it, training drops some captions, so that the student learns the "
            "unconditional prediction that guidance (cfg above 1) needs. Without it, captions are never dropped.",
        ),
        RecipeSettings.Input("recipe", optional=True, tooltip="Advanced settings, from Distillation Recipe."),
    ]


def vae_input() -> io.Input:
    """The input for sample images."""
    return io.Vae.Input(
        "vae",
        optional=True,
        tooltip="For sample images while it trains: about eight times in the run, or with a recipe as often as that says. Needs "
        "null_caption.",
    )


def run_inputs(name: str) -> list[io.Input]:
    """Inputs for the name and the length of a run."""
    return [
        io.String.Input(
            "run_name",
            default=name,
            tooltip="Folder of the run under output/distill_runs. The same name continues the run; a new name starts a new one.",
        ),
        setting_input("total_steps", default=1000),
    ]


def run_outputs() -> list[io.Output]:
    """Outputs that show the progress of a run."""
    return [
        io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="Loss of every step, for Plot Loss Graph."),
        io.Image.Output(display_name="loss_curve", tooltip="The loss curve as an image."),
        io.Int.Output(display_name="step", tooltip="Steps done so far."),
        io.String.Output(display_name="run_name", tooltip="The run's name, for Distillation Report."),
    ]


def learning_inputs() -> list[io.Input]:
    """Inputs that set how a student learns."""
    return [
        *pace_inputs("0.00005 for Stable Diffusion, 0.003 for the demo.", default=5e-5),
        setting_input(
            "objective",
            options=[name for name, objective in OBJECTIVES.items() if not objective.dmd],
            more="dmd is in Shared-Base LoRA.",
        ),
        seed_input(SEED_OF_TRAINING),
        setting_input("caption_dropout", step=0.01, advanced=True, more="Needs null_caption."),
        *keeping_inputs(),
    ]


def refit_input() -> io.Input:
    """The input for a start in closed form."""
    return setting_input("refit_examples", default=REFIT_EXAMPLES, optional=True, advanced=True)


def pace_inputs(usual_rates: str, default: float) -> list[io.Input]:
    """Inputs for steps, batch size and learning rate."""
    return [
        io.Int.Input(
            "steps_per_queue",
            default=1000,
            min=1,
            max=STEPS[1],
            tooltip="Training steps per execution. Fewer than the total show a result sooner; queue again to continue.",
        ),
        setting_input("batch_size", default=8),
        setting_input("learning_rate", default=default, min=1e-8, max=1.0, step=1e-6, more=usual_rates),
        setting_input("lr_schedule"),
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
    """Rarely changed inputs: warm-up and checkpoints."""
    return [setting_input("warmup_steps", advanced=True), setting_input("save_every_steps", advanced=True)]


def size_inputs() -> list[io.Input]:
    """Width and height of the images a teacher makes."""
    return [
        io.Int.Input(
            "width",
            default=512,
            min=64,
            max=4096,
            step=8,
            tooltip="Width in pixels: the size the teacher was trained at. 512 for SD1.x, 768 or 512 for SD2, 1024 for SDXL, "
            "64 for the demo.",
        ),
        io.Int.Input("height", default=512, min=64, max=4096, step=8, tooltip="Height in pixels; choose it like width."),
    ]


def sampler_inputs() -> list[io.Input]:
    """The settings of KSampler, except the seed."""
    return [
        io.Int.Input("steps", default=20, min=1, max=10_000, tooltip="Number of sampling steps."),
        io.Float.Input(
            "cfg",
            default=8.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Guidance scale: how strongly the prompt counts.",
        ),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="Sampling algorithm."),
        io.Combo.Input(
            "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="How the noise levels are spread over the steps."
        ),
    ]
