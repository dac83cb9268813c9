"""A node that trains guidance, or sampling in a few steps, into a LoRA on the model's own weights."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from comfy_api.latest import io, ui

from ..distill_core.base.storage import fingerprint, read_header
from ..distill_core.data.dataset import Dataset
from ..distill_core.data.teacher_data import GenerationSettings
from ..distill_core.diffusion.conditioning import Caption
from ..distill_core.training.lesson import check_lesson, check_own_weights, check_trajectories
from ..distill_core.training.preflight import check_run
from ..distill_core.training.run import Inputs, Run, started
from ..distill_core.training.settings import TrainingSettings
from . import bridge
from .inputs import (
    SEED_OF_TRAINING,
    STEPS,
    RecipeSettings,
    keeping_inputs,
    pace_inputs,
    run_inputs,
    run_outputs,
    seed_input,
    size_inputs,
    vae_input,
)

OBJECTIVES = ("guidance", "consistency", "dmd")
CONSISTENCY_STEPS = 500
LORA_SETTINGS = ("rank", "alpha", "layers")
DATA_SETTINGS = ("width", "height", "images_per_caption", "sampler_steps", "trajectory_states")


class SharedBaseLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillSharedBaseLoRA",
            display_name="Shared-Base LoRA",
            category="distill",
            description="Trains a LoRA that makes your own model faster. guidance: one pass gives what guidance gives in two; sample at "
            "cfg 1, almost twice as fast. consistency and dmd: the same in a few steps, about ten times as fast. Teacher and student share the "
            "same weights, so training needs the memory of one model. "
            "Each execution trains some steps of a named run; queue again to continue. Cancel at any time: every finished step "
            "is kept. Without latents the model makes its own training data.",
            search_aliases=[
                "guidance distillation",
                "cfg distillation",
                "bake cfg",
                "LCM",
                "turbo",
                "lightning",
                "hyper",
                "few steps",
                "faster",
                "加速",
                "consistency distillation",
                "DMD2",
                "distribution matching",
                "train lora",
                "cfg 1",
                "LoRA-enhanced distillation",
                "adapter",
                "distill",
            ],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that learns from itself: SD1.x, SD2, SDXL, SD3, Flux; pruned or "
                               "not. It is only read."),
                io.Conditioning.Input("captions", tooltip="Captions, encoded by the model's own CLIP: the caption of each "
                                      "latent, or prompts to make training data from. More are better."),
                io.Conditioning.Input("null_caption", tooltip="The empty prompt, encoded; guidance leads away from it. With a "
                                      "negative prompt here, the LoRA learns it permanently."),
                io.Latent.Input("latents", optional=True, tooltip="Training images as latents. Those from Teacher Dataset with "
                                "trajectory_states work best. If nothing is connected, the model makes them."),
                io.Model.Input("teacher", optional=True, tooltip="Another model of the same kind to learn from instead of the "
                               "model itself, such as a fine-tune; needs the memory of both."),
                vae_input(),
                RecipeSettings.Input("recipe", optional=True, tooltip="Advanced settings, from Distillation Recipe; guidance "
                                     "and loss weights are set by this node."),
                *run_inputs("baked"),
                io.Combo.Input("objective", options=list(OBJECTIVES), default="guidance", tooltip="What the LoRA learns. guidance: to give the guided "
                               "prediction in one pass, for cfg 1. consistency: also to jump far along the way from noise to image, to "
                               "sample in as many steps as phases says. dmd: the same from its own samples, without images; several "
                               "times slower to train."),
                io.Int.Input("phases", default=4, min=1, max=16, tooltip="For consistency and dmd: the number of steps to sample with later. 4 and 8 are "
                             "usual; with 1 consistency learns to jump to the image from everywhere, for the sampler lcm with 2 to 8 steps."),
                io.Float.Input("guidance", default=7.5, min=1.0, max=100.0, step=0.1, round=0.01, tooltip="The cfg to learn: the "
                               "value you sample with today. 7.5 for Stable Diffusion, 3 for the demo. 1 = no guidance; consistency and dmd then keep "
                               "cfg and negative prompts."),
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip="Rank of the LoRA. 16 to 64 is usual; higher learns "
                             "more and makes a larger file."),
                *pace_inputs("0.0001 for Stable Diffusion, 0.002 for the demo.", default=1e-4),
                seed_input(SEED_OF_TRAINING, advanced=True),
                *size_inputs(),
                # rarely changed
                io.Int.Input("images_per_caption", default=1, min=1, max=10_000, advanced=True, tooltip="Images made for each "
                             "caption, if no latents are connected."),
                io.Int.Input("sampler_steps", default=24, min=1, max=1000, advanced=True, tooltip="Sampling steps for each of "
                             "these images (DDIM)."),
                io.Int.Input("trajectory_states", default=8, min=0, max=1000, advanced=True, tooltip="Noisy states kept from the "
                             "sampling of each image, to train on; at most sampler_steps. 0 trains on added noise instead."),
                io.Float.Input("guidance_min", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01, advanced=True,
                               tooltip="0: the LoRA learns one scale. 1 or more: it learns all scales from here to guidance, and its strength "
                               "chooses one: strength 1 gives guidance, strength (cfg - 1) / (guidance - 1) gives cfg. With consistency and "
                               "dmd it learns their mean."),
                io.Float.Input("alpha", default=0.0, min=0.0, max=1e6, step=1.0, round=0.01, advanced=True, tooltip="LoRA "
                               "alpha; scale = alpha / rank. 0 = alpha equals rank."),
                io.String.Input("layers", default="*attn*", advanced=True, tooltip="Name patterns of the layers that get a LoRA, "
                                "separated by commas: *attn* for attention, * for all, mid.* for the mid block."),
                *keeping_inputs(),
                io.Boolean.Input("dora", default=False, optional=True, advanced=True, tooltip="Train a DoRA: a LoRA that also "
                                 "learns a magnitude for each input of a layer. Slower, and needs more memory. Cannot be "
                                 "combined with guidance_min."),
                io.Int.Input("consistency_steps", default=CONSISTENCY_STEPS, min=0, max=STEPS[1], optional=True, advanced=True, tooltip="For dmd: steps at the "
                             "beginning in which the LoRA learns consistency, so that dmd, which takes over after them at a tenth of the learning "
                             "rate, starts from usable images."),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(display_name="lora", tooltip="The LoRA as trained so far, for Save LoRA Weights "
                                               "and Load LoRA Model."),
                io.Model.Output(display_name="model", tooltip="The model with the LoRA, to sample as the node says. Save Checkpoint "
                                        "merges it."),
                *run_outputs(),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, run_name, total_steps, steps_per_queue, **_):
        return bridge.SEEN_RUNS.fingerprint(run_name[0], total_steps[0], steps_per_queue[0])

    @classmethod
    def execute(
        cls,
        model,
        captions,
        null_caption,
        run_name,
        steps_per_queue,
        latents=None,
        teacher=(None,),
        vae=(None,),
        recipe=({},),
        **settings,
    ) -> io.NodeOutput:
        model, teacher, node_id = bridge.Model(model[0]), teacher[0] and bridge.Model(teacher[0]), cls.hidden.unique_id
        settings = {name: values[0] for name, values in settings.items()}
        of_data = {name: settings.pop(name) for name in DATA_SETTINGS}
        recipe = recipe[0] or bridge.sampled(settings["total_steps"], vae[0], null_caption)
        recipe = TrainingSettings(**recipe | _of_lora(settings))
        check_own_weights(recipe)
        if teacher is None and recipe.objective == "guidance" and recipe.guidance == 1:
            raise ValueError(
                "with guidance 1 a model has nothing to learn from itself; set guidance to your cfg, connect a teacher, or choose the "
                "objective consistency or dmd"
            )
        folder = bridge.run_folder(run_name[0])
        check_run(folder, recipe, {})
        bridge.check_samples(recipe, vae[0], null_caption)
        with torch.inference_mode(False), torch.enable_grad():
            if teacher is not None:
                check_lesson(recipe, None, None, same=bridge.predict_alike([model, teacher]))
            if latents is None and not recipe.uses_images:
                latents = [bridge.blank_latents(model, of_data["width"], of_data["height"], bridge.num_captions(captions, model))]
            inputs = Inputs(
                teachers=() if teacher is None else (teacher.fingerprint,),
                student=model.fingerprint,
                sampling=(teacher or model).sampling_identity,
            )
            if latents is None:
                own = _OwnImages.of(teacher or model, captions, null_caption, recipe, of_data)
                own.check(recipe)
                known = replace(inputs, data=own.fingerprint, null_caption=started(folder).inputs.null_caption)
                run = Run(folder, recipe, known)
                data = None if run.complete else own.draw(folder, recipe, node_id)
            else:
                data = bridge.dataset(latents, captions, null_caption, model)
                check_trajectories(recipe, (teacher or model).schedule, data.timesteps, data.scales)
            if data is not None:
                assert data.null is not None  # null_caption is given
                null = fingerprint({"context": data.null.context})
                run = Run(folder, recipe, replace(inputs, data=data.fingerprint, null_caption=null))
                if not run.complete:
                    bridge.train_on_base(run, model, teacher, data, vae[0], steps_per_queue[0], node_id)
        lora = {name: tensor.read() for name, tensor in read_header(run.result_file).tensors.items()}
        shown = bridge.show_run(run, node_id)
        with_lora, _ = bridge.with_lora(model.patcher, None, lora, 1.0, 0.0)
        return io.NodeOutput(lora, with_lora, *shown, run.step, run_name[0], ui=ui.PreviewImage(shown[1], cls=cls))


def _of_lora(settings: dict) -> dict:
    """This node's settings as training settings."""
    keeps_cfg = settings["objective"] != "guidance" and settings["guidance"] == 1  # so the empty caption is learnt as well
    begins_with = settings.pop("consistency_steps", CONSISTENCY_STEPS)
    rank, alpha, layers = (settings.pop(name) for name in LORA_SETTINGS)
    dora = settings.pop("dora", False)
    return settings | {
        **dict.fromkeys(("task_weight", "output_weight", "feature_weight")),  # the objective's defaults
        "caption_dropout": 0.1 if keeps_cfg else 0.0,
        "consistency_steps": begins_with if settings["objective"] == "dmd" else 0,
        "guidance_min": settings["guidance_min"] or None,
        "lora_rank": rank,
        "lora_alpha": alpha or None,
        "lora_dora": dora,
        "lora_targets": tuple(pattern.strip() for pattern in layers.split(",") if pattern.strip()) or ("*",),
    }


class _OwnImages(NamedTuple):
    """Training data that a model draws itself, stored in a data folder named after the run."""

    model: bridge.Model
    captions: list[Caption]
    null: Caption
    generation: GenerationSettings

    @classmethod
    def of(
        cls, model: bridge.Model, captions: list, null_caption: list, recipe: TrainingSettings, settings: dict
    ) -> "_OwnImages":
        num_states = min(settings["trajectory_states"], settings["sampler_steps"])
        generation = GenerationSettings(
            size=(settings["height"], settings["width"]),
            guidance=recipe.guidance,
            guidance_min=recipe.guidance_min if num_states else None,
            num_steps=settings["sampler_steps"],
            num_per_prompt=settings["images_per_caption"],
            num_states=num_states,
            seed=recipe.seed,
        )
        return cls(model, *bridge.encoded_captions(captions, null_caption, model), generation)

    @property
    def fingerprint(self) -> str:
        """Known before they are drawn, so that a complete run draws none."""
        return bridge.drawn_fingerprint(*self)

    def check(self, recipe: TrainingSettings) -> None:
        """``ValueError`` if a run could not learn from them, before they are drawn."""
        schedule = self.model.schedule
        check_trajectories(recipe, schedule, self.generation.kept(schedule), self.generation.scales)

    def draw(self, folder: Path, recipe: TrainingSettings, node_id: str) -> Dataset:
        progress = bridge.Progress(node_id, "images", each=self.generation.num_steps)
        try:
            return bridge.draw_latents(*self, bridge.data_folder(folder.name), recipe.batch_size, progress.at)
        finally:
            bridge.release_memory()


NODES = [SharedBaseLoRA]
