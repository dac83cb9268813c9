"""The advanced settings of a training run, in a node of their own so that users can keep and share them."""

from comfy_api.latest import io

from ..distill_core.base.settings import limits_of
from ..distill_core.training.settings import TRACKERS, TrainingSettings
from .inputs import RecipeSettings, setting_input

OWN = -1.0  # leaves a weight to the objective


def _weight(name: str) -> io.Input:
    default = f"-1: {limits_of(TrainingSettings)[name].unset}."
    return setting_input(name, default=OWN, min=OWN, step=0.05, more=default, advanced=True)


class DistillationRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillRecipe",
            display_name="Distillation Recipe",
            category="distill",
            description="Advanced settings of a training run: loss weights, optimizer, precision, memory, validation. "
            "Connect it to Distill Train Step; without it the defaults below apply, but a connected VAE brings sample images. Settings that affect the result are fixed "
            "once the run has begun.",
            search_aliases=["training settings", "optimizer", "min-snr", "ema", "mixed precision", "hyperparameters"],
            inputs=[
                setting_input("weighting"),
                setting_input("optimizer"),
                setting_input("ema_decay", step=0.0001),
                setting_input("precision"),
                setting_input("weight_dtype"),
                setting_input("gradient_checkpointing"),
                setting_input("accumulation_steps"),
                setting_input("teacher_mode"),
                io.String.Input("teacher_shares", default="", tooltip=limits_of(TrainingSettings)["teacher_shares"].words),
                setting_input("validate_every_steps"),
                setting_input("sample_every_steps", more="Needs a VAE and the null caption on Distill Train Step."),
                io.Combo.Input(
                    "tracker",
                    options=["none", *TRACKERS],
                    default="none",
                    tooltip=limits_of(TrainingSettings)["trackers"].words,
                ),
                # rarely changed
                *map(_weight, ("task_weight", "output_weight", "feature_weight")),
                setting_input("snr_gamma", min=0.1, max=100.0, step=0.5, advanced=True),
                setting_input("timesteps", advanced=True),
                setting_input("noise_offset", step=0.01, advanced=True),
                setting_input("input_perturbation", step=0.01, advanced=True),
                setting_input("weight_decay", step=0.001, advanced=True),
                setting_input("max_grad_norm", min=1e-6, max=1e6, step=0.1, advanced=True),
                setting_input("compile", advanced=True),
                setting_input("validation_share", default=0.05, min=0.01, step=0.01, advanced=True),
                setting_input("keep_checkpoints", advanced=True),
                setting_input("keep_best", advanced=True),
                setting_input("guidance", step=0.5, advanced=True, optional=True, more="Shared-Base LoRA has its own setting."),
                setting_input("local_loss", advanced=True, optional=True),
                setting_input("phases", advanced=True, optional=True, more="Shared-Base LoRA has its own setting."),
                setting_input("fake_updates", advanced=True, optional=True),
                setting_input("dmd_rate", step=0.01, advanced=True, optional=True),
            ],
            outputs=[RecipeSettings.Output(display_name="recipe", tooltip="For Distill Train Step.")],
        )

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
