"""The finer settings of a training run, apart from the node that trains, so that they can be kept and shared."""

from comfy_api.latest import io

from ..distill_core.recipe import CHOICES, PRECISIONS, TEACHER_MODES, TRACKERS, WEIGHT_DTYPES, Recipe

OWN = -1.0  # a weight that is left to the objective
RecipeSettings = io.Custom("DISTILL_RECIPE")
_default = Recipe()


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
            description="The finer settings of a training run: weights of the losses, optimizer, precision, memory, validation. "
            "Connect it to Distill Train Step; without it the defaults below are used. A setting that decides what is learnt is "
            "fixed once the run has begun.",
            search_aliases=["training settings", "optimizer", "min-snr", "ema", "mixed precision", "hyperparameters"],
            inputs=[
                _choice("weighting", CHOICES["weighting"], "How much each timestep counts, in all losses. min-snr evens them out "
                        "and helps most runs; debiased counts high noise more."),
                _choice("optimizer", CHOICES["optimizer"], "adamw: the standard. adafactor, lion and adamw8bit need less memory. "
                        "prodigy finds its own learning rate: set that to 1. All but adamw and adafactor need a package."),
                _number("ema_decay", 0.999999, 0.0001, "Decay of the moving average of the weights, which is then what comes out. "
                        "0.9999 for long runs, 0 is off. Takes memory for one more student."),
                _choice("precision", PRECISIONS, "What the student computes in; its weights stay float32. bf16 or fp16 is about "
                        "twice as fast on a GPU. bf16 is the safer where the GPU has it."),
                _choice("weight_dtype", WEIGHT_DTYPES, "What the student's weights are kept in. bf16 with stochastic rounding halves "
                        "their memory, for small GPUs."),
                io.Boolean.Input("gradient_checkpointing", default=False, tooltip="Compute activations twice instead of keeping "
                                 "them: a third slower, far less memory, the same result."),
                _count("accumulation_steps", 1024, "Parts a batch is cut into, one after another, to need less memory. Must divide "
                       "batch_size. The result is the same.", 1),
                _choice("teacher_mode", TEACHER_MODES, "With several teachers. sequence: one after another, as SSD-1B was made. "
                        "mixture: one drawn for each step."),
                io.String.Input("teacher_shares", default="", tooltip="Each teacher's share of the steps, such as 2, 1, 1. "
                                "Empty: equal shares."),
                _count("validate_every_steps", 1_000_000, "Steps between validations on images that are held out; 0 is off."),
                _count("sample_every_steps", 1_000_000, "Steps between sample pictures beside the teacher's, shown on Distill Train "
                       "Step; needs a VAE and the null caption there. 0 is off."),
                io.Combo.Input("tracker", options=["none", *TRACKERS], default="none", tooltip="Where metrics go besides "
                               "metrics.csv in the run's folder. wandb stays offline unless WANDB_MODE says otherwise."),
                # seldom changed
                _number("task_weight", 1e3, 0.05, "Weight of the loss against the images. -1: the objective's own.",
                        OWN, default=OWN, advanced=True),
                _number("output_weight", 1e3, 0.05, "Weight of the distance to the teacher's output. -1: the objective's own.",
                        OWN, default=OWN, advanced=True),
                _number("feature_weight", 1e3, 0.05, "Weight of the distance to the teacher's features. -1: the objective's own.",
                        OWN, default=OWN, advanced=True),
                _number("snr_gamma", 100.0, 0.5, "Where min-snr caps the signal-to-noise ratio.", 0.1, advanced=True),
                _choice("timesteps", CHOICES["timesteps"], "How timesteps are drawn. logit-normal draws the middle more often.",
                        advanced=True),
                _number("noise_offset", 1.0, 0.01, "Lets a model learn very dark and very bright pictures; 0.05 is usual, 0 is off.",
                        advanced=True),
                _number("input_perturbation", 1.0, 0.01, "Extra noise in what the models see; 0.1 is usual, 0 is off.",
                        advanced=True),
                _number("weight_decay", 10.0, 0.001, "Decoupled weight decay.", advanced=True),
                _number("max_grad_norm", 1e6, 0.1, "Gradients are scaled down to this norm.", 1e-6, advanced=True),
                io.Boolean.Input("compile", default=False, advanced=True, tooltip="Compile the student with torch.compile: a slow "
                                 "start, then faster steps."),
                _number("validation_share", 0.5, 0.01, "Share of the images held out for validation, where validate_every_steps "
                        "is not 0.", 0.01, default=0.05, advanced=True),
                _count("keep_checkpoints", 1000, "How many of the newest checkpoints stay on disk.", 1, advanced=True),
                _count("keep_best", 1000, "How many of those with the lowest validation loss stay besides.", advanced=True),
                # Later than the first release: last and optional, so that graphs saved without it still run.
                _number("guidance", 100.0, 0.5, "Scale of guidance in the teacher's answers, which the student then gives in one pass, "
                        "for cfg 1; 1 is none. Needs the null caption and the objective guidance. Shared-Base LoRA has its own.", 1.0, advanced=True, optional=True),
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
