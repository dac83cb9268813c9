"""The one file that knows both ComfyUI (MODEL, CLIP, VAE, LATENT, CONDITIONING) and distill_core."""

from __future__ import annotations

import gc
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import comfy.latent_formats
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..distill_core import plan as plans
from ..distill_core.architecture import Architecture
from ..distill_core.cache import CachedDataset, text_key
from ..distill_core.dataset import Bucket, Caption, LatentDataset, largest_example, tile
from ..distill_core.demo import digits
from ..distill_core.demo.teacher import load_dataset, teacher_file
from ..distill_core.denoiser import Label, LdmDenoiser
from ..distill_core.files import UNetFile, open_unet
from ..distill_core.layouts import layout
from ..distill_core.memory import Forecast, MemorySettings, forecast
from ..distill_core.plan import KeptSkips, NameMap, PruningPlan, name_map
from ..distill_core.previews import Previews
from ..distill_core.prune import prune, pruning_metadata
from ..distill_core.recipe import DTYPES, Recipe
from ..distill_core.run import checkpoints_in
from ..distill_core.schedule import NoiseSchedule, from_noise_ratio
from ..distill_core.storage import WriteError, fingerprint
from ..distill_core.teacher_data import Making, make_dataset
from ..distill_core.train import Progress

TRAINED_TIMESTEPS = 1000  # of every Stable Diffusion model
ORIGIN = "distill_origin"  # attachment of a MODEL: its Origin
LDM = layout("ldm")
_PREDICTIONS = {comfy.model_sampling.V_PREDICTION: "v", comfy.model_sampling.X0: "x0", comfy.model_sampling.EPS: "eps"}


# --- MODEL ----------------------------------------------------------------------------------------------------------


def architecture_of(model: ModelPatcher) -> Architecture:
    """What the UNet of a MODEL is made of; ``ValueError`` if it is no UNet of the Stable Diffusion family."""
    network = model.model.diffusion_model
    head_channels = model.model.model_config.unet_config.get("num_head_channels", -1)
    try:
        return Architecture.from_state_dict(network.state_dict(), head_channels if head_channels > 0 else None)
    except ValueError as error:
        raise ValueError(f"this MODEL ({type(model.model).__name__}) cannot be pruned or distilled here: {error}") from error


def state_dict_of(model: ModelPatcher) -> dict[str, Tensor]:
    """Weights of a MODEL by canonical name, on the CPU, with the patches (LoRA) that are on it."""
    with torch.inference_mode():  # the mode ComfyUI's loaders made the weights in
        # Clones share one network: it may hold the patches of another MODEL until this one is loaded.
        comfy.model_management.load_models_gpu([model])
        weights = model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
        names = LDM.to_canonical(weights)
        return {names[name]: weight.to("cpu").detach() for name, weight in weights.items()}


@dataclass(frozen=True)
class Origin:
    """Where a student comes from."""

    plan: PruningPlan
    """The plan it was pruned with."""
    skips: KeptSkips
    """Which skip connections of the teacher it has."""
    metadata: Mapping[str, str]
    """What its file tells of its teacher."""

    @classmethod
    def of_file(cls, file: UNetFile) -> Origin | None:
        """From the metadata of a file that was pruned here."""
        if file.plan is None or "distill.skips" not in file.metadata:
            return None
        metadata = {name: text for name, text in file.metadata.items() if name.startswith("distill.")}
        return cls(file.plan, KeptSkips.from_text(metadata["distill.skips"]), metadata)


def origin_of(model: ModelPatcher) -> Origin | None:
    """Where a MODEL that was pruned here comes from."""
    return model.get_attachment(ORIGIN)


def plan_of(model: ModelPatcher) -> PruningPlan | None:
    """The plan a MODEL was pruned with."""
    return origin.plan if (origin := origin_of(model)) else None


def prediction_of(model: ModelPatcher) -> str:
    """What the network predicts; ``ValueError`` for families the training engine does not know."""
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) and len(sampling.sigmas) != TRAINED_TIMESTEPS:
        raise ValueError(
            f"this MODEL samples on {len(sampling.sigmas)} timesteps instead of {TRAINED_TIMESTEPS}; take off the "
            "patch that changed it (LCM)"
        )
    for base, name in _PREDICTIONS.items():
        if isinstance(sampling, base) and isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
            return name
    raise ValueError(
        f"a MODEL with {type(sampling).__bases__[-1].__name__} sampling cannot be distilled here; "
        "it takes eps, v or x0 prediction on discrete timesteps, as SD1.x has"
    )


def schedule_of(model: ModelPatcher) -> NoiseSchedule:
    return from_noise_ratio(model.get_model_object("model_sampling").sigmas)


def build_model(
    state_dict: Mapping[str, Tensor],
    architecture: Architecture,
    config_class: type | None,
    *,
    dtype: torch.dtype | None = None,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """A MODEL of its own from canonical weights, through ComfyUI's own loader, so that what builds here loads there.

    config_class: class of the teacher's model config; it matters for the demo's alone, which ComfyUI does not detect.
    """
    names = LDM.from_canonical(architecture.shapes)
    weights = {names[name]: weight for name, weight in state_dict.items()}
    if config_class is DigitsModelConfig:
        model = _build_digits(weights, disable_dynamic)
    else:
        options = {} if dtype is None else {"dtype": dtype}
        model = comfy.sd.load_diffusion_model_state_dict(weights, model_options=options, disable_dynamic=disable_dynamic)
        if model is None:
            raise ValueError(
                "ComfyUI does not recognise this UNet; if it is a student, prune the teacher with another plan, or padded"
            )
    return model


def make_student(
    state_dict: Mapping[str, Tensor], architecture: Architecture, teacher: ModelPatcher, origin: Origin | None
) -> ModelPatcher:
    """A finished student MODEL: the teacher's precision and sampling, and ready to be reloaded by ComfyUI."""
    config_class, sampling = type(teacher.model.model_config), teacher.get_model_object("model_sampling")
    dtype = teacher.model.get_dtype_inference()
    state_dict = {name: weight.to(dtype) for name, weight in state_dict.items()}

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        student = build_model(state_dict, architecture, config_class, dtype=dtype, disable_dynamic=disable_dynamic)
        student.add_object_patch("model_sampling", sampling)
        return _with_origin(student, origin)

    return _reloadable(load)


def _with_origin(student: ModelPatcher, origin: Origin | None) -> ModelPatcher:
    """Attach where a student comes from, and lead a ControlNet's residuals to the blocks that stayed."""
    if origin is not None:
        student.set_attachments(ORIGIN, origin)
        student.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, ORIGIN, partial(_remap_control, origin.skips))
    return student


def _remap_control(skips: KeptSkips, executor, x, timesteps, context, y=None, control=None, *args, **kwargs):
    """Around ``UNetModel.forward``: give each kept block the residual that was made for it."""
    return executor(x, timesteps, context, y, control and remapped_control(skips, control), *args, **kwargs)


def remapped_control(skips: KeptSkips, control: Mapping[str, list]) -> dict[str, list]:
    """A ControlNet's or T2I-Adapter's residuals for the teacher as residuals for the student.

    ComfyUI takes them off the ends of its lists: of ``output`` the deepest block's first, of ``input`` the outermost's.
    Residuals that were made for the student are left as they are.
    """
    output, inputs, middle = ([*control.get(key, [])] for key in ("output", "input", "middle"))
    if len(output) == len(skips.kept) or len(inputs) == len(skips.kept):
        return {"input": inputs, "middle": middle, "output": output}
    missing = [None] * skips.num_teacher
    from_conv_in = (missing + output)[-skips.num_teacher :], (inputs[::-1] + missing)[: skips.num_teacher]
    output, inputs = (skips.select(residuals) for residuals in from_conv_in)
    return {"input": inputs[::-1], "middle": middle if skips.mid else [], "output": output}


def _reloadable(load: Callable[..., ModelPatcher]) -> ModelPatcher:
    """A MODEL that ComfyUI can load again, to train a LoRA on it, compile it, or copy it to a second GPU."""
    model = load()
    model.cached_patcher_init = (load, ())
    return model


def prune_model(teacher: ModelPatcher, plan: PruningPlan, pad: bool = False) -> ModelPatcher:
    """The teacher less the blocks a plan removes; the teacher is left as it is. pad: see `prune.prune`."""
    architecture, weights = architecture_of(teacher), state_dict_of(teacher)
    pruning = prune(architecture, plan, pad=pad)
    metadata, skips = pruning_metadata(pruning, weights, architecture), pruning.mapping.skips(architecture)
    if before := origin_of(teacher):
        skips = before.skips.then(skips)
        metadata["distill.skips"] = skips.to_text()
    return make_student(pruning.weights(weights), pruning.student, teacher, Origin(pruning.plan, skips, metadata))


def load_student(path: Path) -> tuple[ModelPatcher, dict]:
    """A student's file as a MODEL, with all that ComfyUI's own loaders leave out, and what the file tells of itself."""
    file = open_unet(path)
    config_class = DigitsModelConfig if is_demo(file.architecture) else None

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        weights = {name: tensor.read() for name, tensor in file.tensors.items()}  # not kept beside the MODEL's own
        student = build_model(weights, file.architecture, config_class, disable_dynamic=disable_dynamic)
        if prediction_of(student) != file.prediction or "ztsnr" in file.markers:
            student.add_object_patch("model_sampling", _sampling(student, file.prediction, zsnr="ztsnr" in file.markers))
        return _with_origin(student, Origin.of_file(file))

    return _reloadable(load), file.describe()


def _sampling(model: ModelPatcher, prediction: str, zsnr: bool) -> nn.Module:
    """ComfyUI's sampling on discrete timesteps for a prediction type."""
    kind = {name: base for base, name in _PREDICTIONS.items()}[prediction]
    return type("ModelSampling", (comfy.model_sampling.ModelSamplingDiscrete, kind), {})(model.model.model_config, zsnr=zsnr)


def markers_of(model: ModelPatcher) -> dict[str, Tensor]:
    """Tensors by which ComfyUI knows, when it loads the file again, how the model samples."""
    return {"ztsnr": torch.zeros(0)} if getattr(model.get_model_object("model_sampling"), "zsnr", False) else {}


def vae_and_text_encoders(model: ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> dict[str, Tensor]:
    """What goes beside the UNet in a full checkpoint, by LDM names, on the CPU."""
    config = model.model.model_config
    if isinstance(config, DigitsModelConfig):
        raise ValueError("the demo's CLIP and VAE are no files other programs know; choose the ldm layout")
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([clip.load_model()])
        text = config.process_clip_state_dict_for_saving(clip.state_dict_for_saving())
        pixels = config.process_vae_state_dict_for_saving(vae.get_sd())
        return {name: weight.to("cpu").detach() for name, weight in {**text, **pixels}.items() if isinstance(weight, Tensor)}


class ComfyDenoiser(LdmDenoiser):
    """The UNet inside a MODEL, on the device and in the precision ComfyUI runs it."""

    patcher: ModelPatcher
    room_bytes: int | None = None
    """Memory to leave free where ComfyUI may unload the network at any time; None for one that is in our hands alone."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        # ComfyUI may have unloaded it since, or given it the patches of another MODEL that shares it.
        if self.room_bytes is not None and self.patcher.model.current_weight_patches_uuid != self.patcher.patches_uuid:
            self.load()
        # Of ComfyUI's attentions some have no gradient (sage), and some cut by free memory, so that no run is like another.
        options = {"optimized_attention_override": lambda chosen, *args, **named: attention_pytorch(*args, **named)}
        y = None if label is None else label.vector()
        return self.running(x_t, timesteps=t.float(), context=context, y=y, transformer_options=options)

    def load(self) -> None:
        """Load the network to its device, with the MODEL's patches."""
        with torch.inference_mode():  # the mode ComfyUI's loaders made the weights in
            comfy.model_management.load_models_gpu([self.patcher], memory_required=self.room_bytes)

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def dtype(self) -> torch.dtype:
        return self.patcher.model.get_dtype_inference()


def denoiser(
    model: ModelPatcher, beside: ComfyDenoiser | None = None, batch_shape: tuple[int, ...] | None = None
) -> ComfyDenoiser:
    """A MODEL as a denoiser, loaded to its device with its patches applied.

    Room is left to train the student ``beside`` it, or to draw batches of a shape (B, C, H, W).
    """
    wrapped = _wrap(model, model)
    wrapped.room_bytes = (
        _training_bytes(beside.architecture) if beside else model.memory_required(batch_shape) if batch_shape else 0
    )
    wrapped.load()
    return wrapped


def trainable(student: ModelPatcher) -> ComfyDenoiser:
    """A float32 copy of a student's network to train. Call it outside inference mode, else its weights cannot learn."""
    weights = {name: weight.float() for name, weight in state_dict_of(student).items()}
    architecture = architecture_of(student)
    copy = build_model(
        weights,
        architecture,
        type(student.model.model_config),
        dtype=torch.float32,
        disable_dynamic=True,
    )
    device = student.load_device
    if not comfy.model_management.is_device_cpu(device):
        comfy.model_management.free_memory(_training_bytes(architecture), device)
    copy.model.diffusion_model.to(device, torch.float32)
    return _wrap(copy, student)


def _training_bytes(architecture: Architecture) -> int:
    """Memory of a student in training: float32 weight, gradient, and two moments of AdamW; activations come on top."""
    return 16 * architecture.num_parameters


def forecast_memory(
    teachers: list[ModelPatcher], student: ModelPatcher, plan: PruningPlan | None, data: LatentDataset, recipe: Recipe
) -> Forecast:
    """The memory a run's step needs, as networks of diffusers of the same architecture would need it."""
    example = largest_example(data)
    stored = max((teacher.model.get_dtype() for teacher in teachers), key=lambda dtype: dtype.itemsize)
    settings = MemorySettings(
        recipe=recipe,
        teacher_dtype=next(name for name, dtype in DTYPES.items() if dtype.itemsize == stored.itemsize),
        num_teachers=len(teachers),
        device=student.load_device.type,
    )
    return forecast(
        teacher=architecture_of(teachers[0]),
        student=architecture_of(student),
        plan=plan,
        latent_shape=tuple(example.latents.shape[1:]),
        num_tokens=example.contexts.shape[1],
        settings=settings,
    )


def free_bytes(model: ModelPatcher) -> int:
    """Memory of a MODEL's device that is free, or that ComfyUI makes free by unloading MODELs."""
    device, loaded = model.load_device, comfy.model_management.current_loaded_models
    free = comfy.model_management.get_free_memory(device)
    if comfy.model_management.is_device_cpu(device):  # where unloaded they stay
        return free
    return free + sum(entry.model_loaded_memory() for entry in loaded if entry.model is not None and entry.device == device)


def release_memory() -> None:
    """Hand memory that training held back to the device."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def _wrap(model: ModelPatcher, sampling_of: ModelPatcher) -> ComfyDenoiser:
    wrapped = ComfyDenoiser(
        network=model.model.diffusion_model,
        architecture=architecture_of(model),
        schedule=schedule_of(sampling_of),
        prediction=prediction_of(sampling_of),
    )
    wrapped.patcher = model
    return wrapped


def plan_between(student: ModelPatcher, teacher: ModelPatcher) -> PruningPlan | None:
    """The plan that leads from teacher to student, None if they are of one shape; ``ValueError`` if they do not belong together."""
    return plans.plan_between(architecture_of(teacher), architecture_of(student), plan_of(student))


def mapping_between(student: ModelPatcher, teacher: ModelPatcher) -> NameMap:
    """Name map from teacher to student; ``ValueError`` if they do not belong together."""
    found, architecture = plan_between(student, teacher), architecture_of(teacher)
    return NameMap.identity(architecture) if found is None else name_map(architecture, found)


def with_lora(
    model: ModelPatcher, clip: comfy.sd.CLIP | None, lora: dict[str, Tensor], strength_model: float, strength_clip: float
) -> tuple[ModelPatcher, comfy.sd.CLIP | None]:
    """MODEL and CLIP with a LoRA, by ComfyUI's own loader; both that come in stay as they are."""
    patched_model, patched_clip = comfy.sd.load_lora_for_models(model, clip, dict(lora), strength_model, strength_clip)
    return patched_model, patched_clip


# --- data -----------------------------------------------------------------------------------------------------------


STATES = "distill_states"  # of a LATENT: noisy states of the teacher's sampling (B, K, C, H, W), and their timesteps
TIMESTEPS = "distill_timesteps"


def dataset(latents: list[dict], positive: list, null_caption: list | None, model: ModelPatcher) -> LatentDataset:
    """Training data from ComfyUI's lists: one LATENT of many, many LATENTs of one, or buckets of several each.

    Latents are scaled once as the model's sampler would; those of one size make a bucket. ``ValueError`` if they do not
    fit the model, or there are not as many captions.
    """
    timesteps = next((entry[TIMESTEPS] for entry in latents if TIMESTEPS in entry), None)
    if any(not torch.equal(entry.get(TIMESTEPS, torch.zeros(0)), timesteps) for entry in latents if timesteps is not None):
        raise ValueError(
            "some of the latents have stored trajectories, or of other steps, and some not; give those of one dataset"
        )
    captions = _captions([*positive, *(null_caption or [])], model)
    null = captions.pop() if null_caption else None
    buckets = _buckets(latents, captions, model)
    return LatentDataset(buckets, null and Caption(null.context.clone(), null.pooled), timesteps)


def calibration(
    latents: list[dict], positive: list, model: ModelPatcher, num_examples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Label | None]:
    """A few latents with their captions' conditioning, picked at random: (B, C, H, W), (B, L, D), and the label of an SDXL.

    They are of one size: that of which there are most.
    """
    bucket = max(_buckets(latents, _captions(positive, model), model), key=lambda bucket: len(bucket.latents))
    if not bucket.latents.any():
        raise ValueError("the latents are empty; connect images the model is to draw well: VAE Encode, or a KSampler")
    return bucket.read(torch.randperm(len(bucket.latents), generator=generator)[:num_examples])[:3]


NUM_PREVIEWS = 4


def previews(data: LatentDataset, vae: comfy.sd.VAE | None, model: ModelPatcher) -> Previews:
    """Sample pictures of a few captions while a run trains; ``ValueError`` without a VAE, or the empty caption."""
    if vae is None or data.null is None:
        what = "a VAE" if vae is None else "null_caption (the empty prompt, encoded)"
        raise ValueError(f"sample_every_steps asks for sample pictures, which need {what}; connect it, or set that to 0")
    examples = data.read(0, torch.arange(NUM_PREVIEWS) * data.bucket_sizes[0] // NUM_PREVIEWS)
    pooled = [None] * len(examples.contexts) if examples.label is None else examples.label.pooled
    captions = [Caption(context, of_caption) for context, of_caption in zip(examples.contexts, pooled, strict=True)]

    def decode(latents: Tensor) -> Tensor:
        pictures = vae.decode(model.model.process_latent_out(latents))
        return pictures[..., :3].permute(0, 3, 1, 2) * 2 - 1

    is_small = is_demo(architecture_of(model))
    return Previews(
        captions=captions,
        null=data.null,
        latent_shape=tuple(examples.latents.shape[1:]),
        decode=decode,
        guidance=2.0 if is_small else 7.0,
    )


class _Told(NamedTuple):
    """One caption with all its conditioning tells."""

    context: Tensor
    pooled: Tensor | None
    options: dict

    def sizes(self, height: int, width: int) -> list[int]:
        """SDXL's six numbers, those of the picture itself where none are given."""
        options = self.options
        height, width = options.get("height", height), options.get("width", width)
        target = options.get("target_height", height), options.get("target_width", width)
        return [height, width, options.get("crop_h", 0), options.get("crop_w", 0), *target]


def _captions(conditioning: list, model: ModelPatcher) -> list[_Told]:
    """Captions of all conditioning, of one length: a context that is repeated conditions as before."""
    told = _told(conditioning, architecture_of(model))
    length = math.lcm(*{len(caption.context) for caption in told})
    return [caption._replace(context=tile(caption.context, length)) for caption in told]


def _told(conditioning: list, architecture: Architecture) -> list[_Told]:
    """Captions of all conditioning, if they are for a model."""
    told = []
    for embedding, options in (entry for one in conditioning for entry in one):
        if embedding.shape[-1] != architecture.context_width:
            raise ValueError(
                f"the captions' conditioning is {embedding.shape[-1]} wide but the model reads {architecture.context_width}; "
                "encode the captions with the model's own CLIP"
            )
        pooled = options.get("pooled_output") if architecture.label_width else None
        if architecture.label_width and pooled is None:
            raise ValueError("the captions' conditioning has no pooled output; encode the captions with the model's own CLIP")
        for i, context in enumerate(embedding.float().cpu()):
            told.append(_Told(context, None if pooled is None else pooled[min(i, len(pooled) - 1)].float().cpu(), options))
    return told


def _buckets(latents: list[dict], captions: list[_Told], model: ModelPatcher) -> list[Bucket]:
    """Latents by size, with their captions, if they fit the model."""
    wanted = architecture_of(model).channels("conv_in")[0]
    for samples in (entry["samples"] for entry in latents):
        if samples.ndim != 4 or samples.shape[1] != wanted:
            raise ValueError(
                f"the latents have {samples.shape[1]} channels but the model takes {wanted}; "
                "encode the images with the model's own VAE, and do not use inpainting models"
            )
    num_latents = sum(len(entry["samples"]) for entry in latents)
    if len(captions) not in (1, num_latents):
        raise ValueError(
            f"there are {num_latents} latents but {len(captions)} captions; give one caption for each, or one for all"
        )
    by_size: dict[tuple[int, int], list[tuple[Tensor, Tensor | None, _Told]]] = {}
    told = iter(captions if len(captions) > 1 else captions * num_latents)
    for entry in latents:
        samples = model.model.process_latent_in(entry["samples"].float().cpu())
        states = entry.get(STATES, [None] * len(samples))
        for example in zip(samples, states, told, strict=False):
            by_size.setdefault(tuple(samples.shape[2:]), []).append(example)
    return [
        _bucket(examples, 8 * height, 8 * width, one_for_all=len(captions) == 1) for (height, width), examples in by_size.items()
    ]


def _bucket(examples: list[tuple[Tensor, Tensor | None, _Told]], height: int, width: int, one_for_all: bool) -> Bucket:
    latents, states, captions = zip(*examples, strict=True)
    sizes = [caption.sizes(height, width) for caption in captions]
    captions = captions[:1] if one_for_all else captions
    labelled = captions[0].pooled is not None
    return Bucket(
        latents=torch.stack(latents),
        contexts=torch.stack([caption.context for caption in captions]),
        pooled=torch.stack([caption.pooled for caption in captions]) if labelled else None,
        sizes=torch.tensor(sizes, dtype=torch.float32) if labelled else None,
        states=None if states[0] is None else torch.stack(states),
    )


# --- data made by the teacher ---------------------------------------------------------------------------------------


STORED = "fp16"  # precision on disk


class ClipEncoders:
    """The text encoders of a CLIP, with the LoRA and the clip skip that are on it."""

    def __init__(self, clip: comfy.sd.CLIP, architecture: Architecture):
        self._clip, self._architecture = clip, architecture
        with torch.inference_mode():
            patcher = clip.load_model()
            weights = {name: weight.to("cpu").detach() for name, weight in patcher.model_state_dict_for_saving().items()}
            self.fingerprint = f"{fingerprint(weights)} {clip.layer_idx}"

    def captions(self, captions: list[str]) -> list[Caption]:
        encoded = [self._clip.encode_from_tokens_scheduled(self._clip.tokenize(caption)) for caption in captions]
        return [Caption(told.context, told.pooled) for told in _told(encoded, self._architecture)]


def make_data(
    teacher: ModelPatcher,
    clip: comfy.sd.CLIP,
    prompts: list[str],
    making: Making,
    folder: Path,
    batch_size: int,
    on_caption: Callable[[int, int], None],
    on_item: Callable[[int, int], None],
) -> tuple[list[dict], list, list]:
    """Pictures a teacher draws: LATENTs and CONDITIONINGs of one each, in the order of the prompts, and that of the empty prompt.

    What the folder holds already is not drawn again; see `teacher_data.make_dataset`.
    """
    architecture, sampling = architecture_of(teacher), teacher.get_model_object("model_sampling")
    encoders = ClipEncoders(clip, architecture)
    height, width = (side // 8 for side in making.size)
    data = make_dataset(
        partial(denoiser, teacher, batch_shape=(2 * batch_size, architecture.channels("conv_in")[0], height, width)),
        f"{model_fingerprint(teacher)} {prediction_of(teacher)} {fingerprint({'sigmas': sampling.sigmas})}",
        encoders,
        prompts,
        making,
        folder,
        batch_size=batch_size,
        dtype=STORED,
        on_caption=on_caption,
        on_item=on_item,
    )
    return *_in_order(data, prompts, encoders, teacher), _conditioning(data.null.context.float(), data.null.pooled)


def _in_order(data: CachedDataset, prompts: list[str], encoders: ClipEncoders, teacher: ModelPatcher) -> tuple[list, list]:
    """LATENT and CONDITIONING of each example, in the order of the prompts; those of one prompt share the latter."""
    order = {text_key(prompt.strip(), encoders.fingerprint, STORED): number for number, prompt in enumerate(prompts)}
    latents, captions, of_text = [], [], {}
    for number in sorted(range(len(data.entries)), key=lambda number: order[data.entries[number].text]):
        example, text = data.read(0, torch.tensor([number])), data.entries[number].text
        latent = {"samples": teacher.model.process_latent_out(example.latents.float())}
        if example.states is not None:
            latent |= {STATES: example.states, TIMESTEPS: data.timesteps}
        if text not in of_text:
            of_text[text] = _conditioning(example.contexts[0].float(), example.label and example.label.pooled[0].float())
        latents.append(latent)
        captions.append(of_text[text])
    return latents, captions


def _conditioning(context: Tensor, pooled: Tensor | None) -> list:
    return [[context[None], {} if pooled is None else {"pooled_output": pooled[None].float()}]]


# --- runs, progress, files ------------------------------------------------------------------------------------------


def run_folder(name: str) -> Path:
    """Folder of a run under ComfyUI's output folder; ``ValueError`` for a name that is no plain folder name."""
    return _output_folder("distill_runs", name, "run_name")


def data_folder(name: str) -> Path:
    """Folder of data under ComfyUI's output folder; ``ValueError`` for a name that is no plain folder name."""
    return _output_folder("distill_data", name, "name")


def _output_folder(inside: str, name: str, setting: str) -> Path:
    root = os.path.join(folder_paths.get_output_directory(), inside)
    folder = os.path.join(root, name)
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE)  # on Windows
    if reserved or not re.fullmatch(r"\w([\w .-]{0,98}[\w-])?", name) or not folder_paths.is_within_directory(root, folder):
        raise ValueError(f"{setting} {name!r} must be a plain name of letters, digits, spaces, dots, dashes and underscores")
    return Path(folder)


def newest_step(run_name: str) -> int:
    """Step of a run's newest checkpoint; 0 for a run that has none, or a name that is none."""
    try:
        checkpoints = checkpoints_in(run_folder(run_name))
    except ValueError:  # execute will say what is wrong with the name
        checkpoints = []
    return int(checkpoints[-1].name) if checkpoints else 0


def output_path(prefix: str, suffix: str) -> Path:
    """The next free numbered path under ComfyUI's output folder, as its own Save nodes count."""
    root = folder_paths.get_output_directory()
    if not folder_paths.is_within_directory(root, os.path.join(root, os.path.dirname(os.path.normpath(prefix)))):
        raise ValueError(f"filename_prefix {prefix!r} leads out of the output folder; keep it inside")
    try:
        folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, root)
    except OSError as error:
        raise WriteError(Path(root) / prefix, error.strerror) from error
    return Path(folder) / f"{name}_{counter:05}_{suffix}"


def file_in(folder: str, name: str) -> Path:
    """Path of a file in one of ComfyUI's model folders; ``ValueError`` for a name that leads out of it, or to nothing."""
    for root in folder_paths.get_folder_paths(folder):
        path = os.path.join(root, name)
        if folder_paths.is_within_directory(root, path) and os.path.isfile(path):
            return Path(path)
    raise ValueError(f"there is no file {name!r} under models/{folder}; press R to refresh the list")


def throw_if_cancelled() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def show_text(text: str, node_id: str) -> None:
    """A line of text on the node itself, replaced by the next."""
    from server import PromptServer

    PromptServer.instance.send_progress_text(text, node_id)


def duration(seconds: float) -> str:
    """``2 min 10 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def describe_progress(progress: Progress, last_step: int) -> str:
    """``step 120 of 500, loss 0.031, 2 min 10 s left``."""
    left = duration((last_step - progress.step) * progress.seconds_per_step)
    return f"step {progress.step} of {progress.total_steps}, loss {progress.losses['total']:.4f}, {left} left"


def to_image(picture) -> Tensor:
    """A PIL picture as an IMAGE (1, H, W, 3) in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255


def open_image(path: Path):
    from PIL import Image

    return Image.open(path).convert("RGB")


def model_fingerprint(model: ModelPatcher) -> str:
    return fingerprint(state_dict_of(model))


# --- the demo as MODEL, CLIP and VAE --------------------------------------------------------------------------------


class DigitsLatentFormat(comfy.latent_formats.LatentFormat):
    """Latents of the demo have unit variance already; every channel is a quarter of the grey picture."""

    latent_rgb_factors = [[0.16, 0.16, 0.16]] * 4
    latent_rgb_factors_bias = [-0.39, -0.39, -0.39]


class DigitsModelConfig(comfy.supported_models.SD15):
    """SD1.x in small: heads of 32 channels instead of eight heads."""

    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}
    latent_format = DigitsLatentFormat
    supported_inference_dtypes = [torch.float32]


def is_demo(architecture: Architecture) -> bool:
    """Whether a UNet is the demo's, or a student of it: of its width, which no real model has."""
    return architecture.context_width == digits.CONTEXT_WIDTH and architecture.channels("conv_in")[1] < 320


def _build_digits(weights: dict[str, Tensor], disable_dynamic: bool) -> ModelPatcher:
    config = DigitsModelConfig(comfy.model_detection.detect_unet_config(weights, ""))
    device = comfy.model_management.get_torch_device()
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(weights, "")
    patcher_class = ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    model_patcher = patcher_class(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
    model.load_model_weights({n: w.float() for n, w in weights.items()}, "", assign=model_patcher.is_dynamic())
    return model_patcher


class DigitsTokenizer:
    """Words, not CLIP tokens; weights such as ``(seven:1.2)`` are ignored."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_) -> dict:
        return {"digits": [[(token, 1.0) for token in digits.tokenize(text)]]}


class DigitsClipModel(nn.Module):
    """The demo's text encoder behind the interface of ComfyUI's text encoders."""

    dtypes = (torch.float32,)

    def __init__(self, device="cpu", dtype=torch.float32, model_options=None):
        super().__init__()
        self.encoder = digits.DigitsTextEncoder.bundled().to(device)

    def set_clip_options(self, options: dict) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([[token for token, _ in row] for row in tokens["digits"]], device=self.encoder.positions.device)
        context = self.encoder(ids).to(comfy.model_management.intermediate_device())
        return context, context.mean(1)

    def load_sd(self, state_dict: dict) -> tuple[list, list]:
        return self.load_state_dict(state_dict, strict=False)


class DigitsVAE(comfy.sd.VAE):
    """The demo's change of shape as a VAE."""

    def __init__(self):
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)})
        self.first_stage_model = digits.DigitsAutoencoder().eval().to(self.vae_dtype)
        self.downscale_ratio = self.upscale_ratio = 8
        self.latent_channels = 4
        offload = comfy.model_management.vae_offload_device()
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=offload
        )


def demo_teacher() -> ModelPatcher:
    """The bundled teacher of handwritten digits as a MODEL."""
    file = teacher_file()

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        return build_model(file.state_dict, file.architecture, DigitsModelConfig, disable_dynamic=disable_dynamic)

    return _reloadable(load)


def demo_clip() -> comfy.sd.CLIP:
    return comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(DigitsTokenizer, DigitsClipModel))


def demo_data() -> tuple[list[dict], list]:
    """LATENT and CONDITIONING lists as "Make Training Dataset" gives them: one entry for each of the 1,797 digits."""
    (bucket,) = load_dataset().buckets
    latents = [{"samples": latent[None]} for latent in bucket.latents]
    conditioning = [[[context[None], {"pooled_output": context.mean(0, keepdim=True)}]] for context in bucket.contexts]
    return latents, conditioning
