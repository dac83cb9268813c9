"""Guidance learnt by a LoRA on the model's own weights."""

import contextlib
from functools import partial

import torch
from comfy_api.latest import io, ui

from ..distill_core.adapter import WithoutLora
from ..distill_core.dataset import Dataset
from ..distill_core.preflight import check_run
from ..distill_core.recipe import Recipe
from ..distill_core.run import Run
from ..distill_core.storage import fingerprint, read_header
from ..distill_core.teacher_data import Making
from ..distill_core.teachers import Teachers
from ..distill_core.train import check_lesson, check_trajectories, distill
from . import bridge
from .inputs import SEED_OF_TRAINING, keeping_inputs, pace_inputs, run_inputs, run_outputs, seed_input, size_inputs
from .recipe import RecipeSettings
from .teacher_data import DrawingProgress
from .train import Watch, last_step, show_run, tell_memory

LORA_SETTINGS = ("rank", "alpha", "layers")
DATA_SETTINGS = ("width", "height", "images_per_caption", "sampler_steps", "trajectory_states")


class SharedBaseLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillSharedBaseLoRA",
            display_name="Shared-Base LoRA",
            category="distill",
            description="Trains a LoRA that gives in one pass what the model gives with guidance in two: sample with it at cfg 1, "
            "almost twice as fast. Teacher and student are the same weights, so that training needs the memory of one model. "
            "Each execution trains some steps of a named run; queue again to go on. Cancel at any time: every finished step is "
            "kept. Without latents the model draws its own training data.",
            search_aliases=[
                "guidance distillation",
                "cfg distillation",
                "bake cfg",
                "train lora",
                "cfg 1",
                "LoRA-enhanced distillation",
                "adapter",
                "distill",
            ],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that learns its own guidance: SD1.x, SD2, SDXL, SD3, Flux; pruned or not. "
                               "It is only read."),
                io.Conditioning.Input("captions", tooltip="What pictures are of, encoded by the model's own CLIP: the caption of each "
                                      "latent, or prompts to draw training data of. The more, the better."),
                io.Conditioning.Input("null_caption", tooltip="What guidance leads away from: the empty prompt, encoded. A negative "
                                      "prompt here is learnt for good."),
                io.Latent.Input("latents", optional=True, tooltip="Training images as latents. From Teacher Dataset with "
                                "trajectory_states they teach best. Without any the model draws them."),
                io.Model.Input("teacher", optional=True, tooltip="Another model of the same kind to learn from in place of the model "
                               "itself, such as a fine-tune; needs the memory of both."),
                io.Vae.Input("vae", optional=True, tooltip="For sample pictures while it trains, where the recipe asks for them."),
                RecipeSettings.Input("recipe", optional=True, tooltip="Finer settings, from Distillation Recipe; guidance and weights "
                                     "of losses are this node's."),
                *run_inputs("baked"),
                io.Float.Input("guidance", default=7.5, min=1.0, max=100.0, step=0.1, round=0.01, tooltip="The cfg that is learnt: "
                               "what you sample with today. 7.5 for Stable Diffusion, 2 for the demo. 1 learns a teacher without."),
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip="Rank of the LoRA. 16 to 64 is usual; higher learns more and "
                             "makes a larger file."),
                *pace_inputs("0.0001 for Stable Diffusion, 0.002 for the demo.", default=1e-4),
                seed_input(SEED_OF_TRAINING),
                *size_inputs(),
                # seldom changed
                io.Int.Input("images_per_caption", default=1, min=1, max=10_000, advanced=True, tooltip="Pictures drawn of each "
                             "caption, where no latents are connected."),
                io.Int.Input("sampler_steps", default=25, min=1, max=1000, advanced=True, tooltip="Sampler steps of each picture "
                             "that is drawn (DDIM)."),
                io.Int.Input("trajectory_states", default=8, min=0, max=1000, advanced=True, tooltip="Noisy pictures kept of each on "
                             "its way through the sampler, to train on; at most sampler_steps. 0 trains on noise that is added."),
                io.Float.Input("guidance_min", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01, advanced=True, tooltip="0: one "
                               "scale is learnt. From 1 on: all from here to guidance, and the strength of the LoRA chooses: 1 is "
                               "guidance, (cfg - 1) / (guidance - 1) is cfg."),
                io.Float.Input("alpha", default=0.0, min=0.0, max=1e6, step=1.0, round=0.01, advanced=True, tooltip="How much the LoRA "
                               "counts, over its rank. 0: as the rank, which counts it once."),
                io.String.Input("layers", default="*attn*", advanced=True, tooltip="Patterns of the layers the LoRA sits on, with "
                                "commas between: *attn* for attention, * for all, mid.* for the mid block."),
                *keeping_inputs(),
                # Later than the first release: last and optional, so that graphs saved without it still run.
                io.Boolean.Input("dora", default=False, optional=True, advanced=True, tooltip="Train a DoRA: a LoRA that also learns "
                                 "how much each input of a layer counts. Slower, and takes more memory. Not with guidance_min."),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(display_name="lora", tooltip="The LoRA as trained so far, for Save LoRA Weights and "
                                               "Load LoRA Model."),
                io.Model.Output(display_name="model", tooltip="The model with the LoRA: sample at cfg 1. Save Checkpoint merges it."),
                *run_outputs(),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return last_step(**inputs)

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
        model, teacher, node_id = model[0], teacher[0], cls.hidden.unique_id
        settings = {name: values[0] for name, values in settings.items()}
        of_data = {name: settings.pop(name) for name in DATA_SETTINGS}
        recipe = Recipe(**recipe[0] | _of_lora(settings))
        if recipe.weight_dtype != "fp32":
            raise ValueError(
                "the model's weights stay as they are and the LoRA is float32: set weight_dtype to fp32 in the recipe"
            )
        if teacher is None and recipe.guidance == 1:
            raise ValueError(
                "with guidance 1 a model has nothing to learn from itself; set guidance to your cfg, or connect a teacher"
            )
        if recipe.compile:
            raise ValueError("compile is for Distill Train Step alone; set it to false in the recipe")
        folder = bridge.run_folder(run_name[0])
        check_run(folder, recipe, {})
        with torch.inference_mode(False), torch.enable_grad():
            weights = {name: bridge.model_fingerprint(m) for name, m in {"model": model, "teacher": teacher}.items() if m}
            if teacher is not None:
                check_lesson(recipe, None, None, same=bridge.answer_alike([model, teacher], weights.values()))
            if latents is None:
                data = _drawn(teacher or model, captions, null_caption, recipe, of_data, folder, node_id)
            else:
                data = bridge.dataset(latents, captions, null_caption, model)
            check_trajectories(recipe, data)
            origin = {
                **weights,
                "sampling": bridge.sampling_words(teacher or model),
                "data": data.fingerprint,
                "null_caption": fingerprint({"context": data.null.context}),
            }
            run = Run(folder, recipe, origin)
            if not run.complete:
                _train(run, model, teacher, data, vae[0], steps_per_queue[0], node_id)
        lora = {name: tensor.read() for name, tensor in read_header(run.result_file).tensors.items()}
        shown = show_run(run, node_id)
        answers, _ = bridge.with_lora(model, None, lora, 1.0, 0.0)
        return io.NodeOutput(lora, answers, *shown, run.step, run_name[0], ui=ui.PreviewImage(shown[1], cls=cls))


def _of_lora(settings: dict) -> dict:
    """This node's settings as a recipe's."""
    rank, alpha, layers = (settings.pop(name) for name in LORA_SETTINGS)
    dora = settings.pop("dora", False)
    return settings | {
        "objective": "guidance",
        **dict.fromkeys(("task_weight", "output_weight", "feature_weight")),  # the objective's own
        "caption_dropout": 0.0,
        "guidance_min": settings["guidance_min"] or None,
        "lora_rank": rank,
        "lora_alpha": alpha or None,
        "lora_dora": dora,
        "lora_targets": tuple(pattern.strip() for pattern in layers.split(",") if pattern.strip()) or ("*",),
    }


def _drawn(model, captions, null_caption, recipe: Recipe, settings: dict, folder, node_id: str) -> Dataset:
    """Training data the model draws itself, kept beside the run."""
    num_states = min(settings["trajectory_states"], settings["sampler_steps"])
    making = Making(
        size=(settings["height"], settings["width"]),
        guidance=recipe.guidance,
        guidance_min=recipe.guidance_min if num_states else None,
        num_steps=settings["sampler_steps"],
        num_per_prompt=settings["images_per_caption"],
        num_states=num_states,
        seed=recipe.seed,
    )
    told = bridge.told_captions(captions, null_caption, model)
    try:
        return bridge.draw_latents(
            model, *told, making, bridge.data_folder(folder.name), recipe.batch_size, DrawingProgress(node_id).pictures
        )
    finally:
        bridge.release_memory()


def _train(run: Run, model, teacher, data: Dataset, vae, num_steps: int, node_id: str) -> None:
    last = min(run.recipe.total_steps, run.step + num_steps)
    previews = bridge.previews(data, vae, model) if run.recipe.sample_every_steps else None
    watch = Watch(run.folder.name, run.step, last, node_id, previews)
    if told := bridge.forecast_shared_base(model, teacher, data, run.recipe):
        tell_memory(told, bridge.free_bytes(model), node_id)
    with contextlib.ExitStack() as stack:
        stack.callback(bridge.release_memory)
        base = stack.enter_context(bridge.opened_base(model))
        load = partial(stack.enter_context, bridge.opened_base(teacher)) if teacher else partial(WithoutLora, base)
        stack.enter_context(bridge.with_gradients(base))
        distill(
            run,
            student=base,
            teacher=Teachers([load], run.recipe),
            plan=None,
            dataset=data,
            num_steps=num_steps,
            previews=previews,
            on_step=watch,
        )


NODES = [SharedBaseLoRA]
