"""The advanced settings of a training run, in a node of their own so that users can keep and share them."""

from comfy_api.latest import io

from ..distill_core.base.precision import PRECISIONS
from ..distill_core.training.settings import CHOICES, TEACHER_MODES, TRACKERS, WEIGHT_DTYPES, TrainingSettings

OWN = -1.0  # leaves a weight to the objective
RecipeSettings = io.Custom("DISTILL_RECIPE")
_default = TrainingSettings()


def _number(name: str, most: float, step: float, tooltip: str, least: float = 0.0, **options):
    default = options.pop("default", getattr(_default, name))
    return io.Float.Input(name, default=default, min=least, max=most, step=step, round=1e-8, tooltip=tooltip, **options)


def _count(name: str, most: int, tooltip: str, least: int = 0, **options):
    return io.Int.Input(name, default=getattr(_default, name), min=least, max=most, tooltip=tooltip, **options)


def _choice(name: str, choices, tooltip: str, **options):
    return io.Combo.Input(name, options=list(choices), default=getattr(_default, name), tooltip=tooltip, **options)


class DistillationRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillRecipe",
            display_name="Distillation Recipe",
            category="distill",
            description="Advanced settings of a training run: loss weights, optimizer, precision, memory, validation. "
            "Connect it to Distill Train Step; without it the defaults below apply. Settings that affect the result are fixed "
            "once the run has begun.",
            search_aliases=["training settings", "optimizer", "min-snr", "ema", "mixed precision", "hyperparameters"],
            inputs=[
                _choice("weighting", CHOICES["weighting"], "Weight of each timestep in all losses. min-snr balances the "
                        "timesteps and helps most runs; debiased gives high noise more weight."),
                _choice("optimizer", CHOICES["optimizer"], "adamw: the standard choice. adafactor, lion and adamw8bit need less "
                        "memory. prodigy finds its own learning rate: set learning_rate to 1. All except adamw and adafactor "
                        "need an extra package."),
                _number("ema_decay", 0.999999, 0.0001, "Decay of the EMA (exponential moving average) of the weights; the "
                        "output is then the EMA. 0.9999 for long runs; 0 turns it off. Needs memory for one more student."),
                _choice("precision", PRECISIONS, "Precision of the student's computation; its weights stay float32. bf16 or "
                        "fp16 is about twice as fast on a GPU. Prefer bf16 if the GPU supports it."),
                _choice("weight_dtype", WEIGHT_DTYPES, "Data type of the student's weights. bf16 with stochastic rounding halves "
                        "their memory, for small GPUs."),
                io.Boolean.Input("gradient_checkpointing", default=False, tooltip="Recomputes activations instead of storing "
                                 "them: a third slower, far less memory, the same result."),
                _count("accumulation_steps", 1024, "Splits a batch into this many parts, one after another, to save memory. Must "
                       "divide batch_size. The result is the same.", 1),
                _choice("teacher_mode", TEACHER_MODES, "How several teachers take turns. sequence: one after another, as for "
                        "SSD-1B. mixture: a random teacher for each step."),
                io.String.Input("teacher_shares", default="", tooltip="Each teacher's share of the steps, such as 2, 1, 1. "
                                "Empty: equal shares."),
                _count("validate_every_steps", 1_000_000, "Steps between validations on held-out images; 0 turns them off."),
                _count("sample_every_steps", 1_000_000, "Steps between sample images, shown with the teacher's on Distill Train "
                       "Step; needs a VAE and the null caption there. 0 turns them off."),
                io.Combo.Input("tracker", options=["none", *TRACKERS], default="none", tooltip="Where to send metrics "
                               "besides metrics.csv in the run's folder. wandb stays offline unless WANDB_MODE says otherwise."),
                # rarely changed
                _number("task_weight", 1e3, 0.05, "Weight of the loss against the images. -1: the objective's default.",
                        OWN, default=OWN, advanced=True),
                _number("output_weight", 1e3, 0.05, "Weight of the distance to the teacher's output. -1: the "
                        "objective's default.", OWN, default=OWN, advanced=True),
                _number("feature_weight", 1e3, 0.05, "Weight of the distance to the teacher's features. -1: the "
                        "objective's default.", OWN, default=OWN, advanced=True),
                _number("snr_gamma", 100.0, 0.5, "Cap on the signal-to-noise ratio for min-snr.", 0.1, advanced=True),
                _choice("timesteps", CHOICES["timesteps"], "How timesteps are sampled. logit-normal samples the middle "
                        "more often.", advanced=True),
                _number("noise_offset", 1.0, 0.01, "Helps a model learn very dark and very bright images; 0.05 is usual, "
                        "0 turns it off.", advanced=True),
                _number("input_perturbation", 1.0, 0.01, "Extra noise in the input of the models; 0.1 is usual, 0 turns it off.",
                        advanced=True),
                _number("weight_decay", 10.0, 0.001, "Decoupled weight decay.", advanced=True),
                _number("max_grad_norm", 1e6, 0.1, "Gradients are scaled down to this norm.", 1e-6, advanced=True),
                io.Boolean.Input("compile", default=False, advanced=True, tooltip="Compile the student with torch.compile: a "
                                 "slow start, then faster steps."),
                _number("validation_share", 0.5, 0.01, "Share of the images held out for validation, if validate_every_steps "
                        "is not 0.", 0.01, default=0.05, advanced=True),
                _count("keep_checkpoints", 1000, "Number of newest checkpoints to keep on disk.", 1, advanced=True),
                _count("keep_best", 1000, "Number of checkpoints with the lowest validation loss to keep as well.",
                       advanced=True),
                # Added after the first release: last and optional, so that graphs saved without it still run.
                _number("guidance", 100.0, 0.5, "Guidance scale of the teacher's predictions; the student learns them in one "
                        "pass, for cfg 1. 1 = no guidance. Needs the null caption and the objective guidance. Shared-Base LoRA "
                        "has its own setting.", 1.0, advanced=True, optional=True),
            ],
            outputs=[RecipeSettings.Output(display_name="recipe", tooltip="For Distill Train Step.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, teacher_shares: str, tracker: str, **settings) -> io.NodeOutput:
        settings = {name: value for name, value in settings.items() if not (name.endswith("_weight") and value == OWN)}
        if not settings["validate_every_steps"]:
            settings["validation_share"] = 0.0
        try:
            shares = tuple(float(share) for share in teacher_shares.replace(",", " ").split())
        except ValueError:
            raise ValueError(f"teacher_shares must be numbers such as 2, 1, 1, got {teacher_shares!r}") from None
        return io.NodeOutput({**settings, "teacher_shares": shares, "trackers": () if tracker == "none" else (tracker,)})


NODES = [DistillationRecipe]
