"""The one file that knows both ComfyUI (MODEL, CLIP, VAE, LATENT, CONDITIONING) and distill_core."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

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
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..distill_core.architecture import Architecture
from ..distill_core.dataset import LatentDataset
from ..distill_core.demo import digits
from ..distill_core.demo.teacher import load_dataset, teacher_file
from ..distill_core.denoiser import LdmDenoiser
from ..distill_core.layouts import layout
from ..distill_core.plan import PruningPlan, name_map, pruned
from ..distill_core.run import Progress, checkpoints_in
from ..distill_core.schedule import NoiseSchedule, from_sigmas
from ..distill_core.storage import WriteError, fingerprint

TRAINED_TIMESTEPS = 1000  # of every Stable Diffusion model
PLAN = "distill_plan"  # attachment of a MODEL: the plan it was pruned with
LDM = layout("ldm")


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
        weights = model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
        names = LDM.to_canonical(weights)
        return {names[name]: weight.to("cpu").detach() for name, weight in weights.items()}


def plan_of(model: ModelPatcher) -> PruningPlan | None:
    """The plan a MODEL was pruned with in this graph."""
    return model.get_attachment(PLAN)


def prediction_of(model: ModelPatcher) -> str:
    """What the network predicts; ``ValueError`` for families the training engine does not know."""
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) and len(sampling.sigmas) != TRAINED_TIMESTEPS:
        raise ValueError(
            f"this MODEL samples on {len(sampling.sigmas)} timesteps instead of {TRAINED_TIMESTEPS}; take off the "
            "patch that changed it (LCM)"
        )
    known = {comfy.model_sampling.V_PREDICTION: "v", comfy.model_sampling.X0: "x0", comfy.model_sampling.EPS: "eps"}
    for base, name in known.items():
        if isinstance(sampling, base) and isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
            return name
    raise ValueError(
        f"a MODEL with {type(sampling).__bases__[-1].__name__} sampling cannot be distilled here; "
        "it takes eps, v or x0 prediction on discrete timesteps, as SD1.x has"
    )


def schedule_of(model: ModelPatcher) -> NoiseSchedule:
    return from_sigmas(model.get_model_object("model_sampling").sigmas)


def build_model(
    state_dict: Mapping[str, Tensor],
    architecture: Architecture,
    config_class: type,
    *,
    dtype: torch.dtype | None = None,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """A MODEL of its own from canonical weights, through ComfyUI's own loader, so that what builds here loads there.

    config_class: class of the teacher's model config; the demo's is not one ComfyUI detects.
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
                "ComfyUI does not recognise the pruned UNet, so its own loaders could not open it; choose another plan"
            )
    return model


def make_student(
    state_dict: Mapping[str, Tensor], architecture: Architecture, teacher: ModelPatcher, plan: PruningPlan | None
) -> ModelPatcher:
    """A finished student MODEL: the teacher's precision and sampling, its plan attached, and ready to be reloaded by ComfyUI."""
    config_class, sampling = type(teacher.model.model_config), teacher.get_model_object("model_sampling")
    dtype = teacher.model.get_dtype_inference()
    state_dict = {name: weight.to(dtype) for name, weight in state_dict.items()}

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        student = build_model(state_dict, architecture, config_class, dtype=dtype, disable_dynamic=disable_dynamic)
        student.add_object_patch("model_sampling", sampling)
        student.set_attachments(PLAN, plan)
        return student

    return _reloadable(load)


def _reloadable(load: Callable[..., ModelPatcher]) -> ModelPatcher:
    """A MODEL that ComfyUI can load again, to train a LoRA on it, compile it, or copy it to a second GPU."""
    model = load()
    model.cached_patcher_init = (load, ())
    return model


def prune_model(teacher: ModelPatcher, plan: PruningPlan) -> ModelPatcher:
    """The teacher less the blocks a plan removes; the teacher is left as it is."""
    architecture = architecture_of(teacher)
    mapping = name_map(architecture, plan)
    return make_student(mapping.apply(state_dict_of(teacher)), pruned(architecture, mapping), teacher, plan)


class ComfyDenoiser(LdmDenoiser):
    """The UNet inside a MODEL, on the device and in the precision ComfyUI runs it."""

    patcher: ModelPatcher

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def dtype(self) -> torch.dtype:
        return self.patcher.model.get_dtype_inference()


def denoiser(model: ModelPatcher, student: ComfyDenoiser) -> ComfyDenoiser:
    """A teacher MODEL as a denoiser, loaded to its device with its patches applied, room left to train the student."""
    comfy.model_management.load_models_gpu([model], memory_required=_training_bytes(student.architecture))
    return _wrap(model, model)


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
    ours, theirs, plan = architecture_of(student), architecture_of(teacher), plan_of(student)
    if plan is not None and plan != plan_of(teacher):
        expected = pruned(theirs, name_map(theirs, plan))
        if dict(expected.shapes) == dict(ours.shapes):
            return plan
    elif dict(ours.shapes) == dict(theirs.shapes):
        return None
    raise ValueError(
        "student and teacher do not belong together: connect the MODEL that went into Prune UNet Blocks as "
        "teacher, and the MODEL that came out of it as student"
    )


# --- data -----------------------------------------------------------------------------------------------------------


def dataset(latents: list[dict], positive: list, null_caption: list | None, model: ModelPatcher) -> LatentDataset:
    """Training data from ComfyUI's lists: one LATENT of many, many LATENTs of one, or buckets of several each.

    Latents are scaled once as the model's sampler would. ``ValueError`` if sizes or counts do not match.
    """
    pictures = [entry["samples"] for entry in latents]
    if len({tuple(p.shape[1:]) for p in pictures}) != 1:
        sizes = sorted({f"{8 * p.shape[-1]}x{8 * p.shape[-2]}" for p in pictures})
        raise ValueError(f"the latents are of different sizes ({', '.join(sizes)}); resize the images to one size first")
    contexts = _contexts(positive)
    architecture = architecture_of(model)
    if architecture.label_width is not None:
        raise ValueError("models with size and crop conditioning (SDXL) cannot be distilled here")
    wanted = architecture.channels("conv_in")[0]
    if pictures[0].shape[1] != wanted:
        raise ValueError(
            f"the latents have {pictures[0].shape[1]} channels but the model takes {wanted}; "
            "encode the images with the model's own VAE, and do not use inpainting models"
        )
    if contexts.shape[-1] != architecture.context_width:
        raise ValueError(
            f"the captions' conditioning is {contexts.shape[-1]} wide but the model reads "
            f"{architecture.context_width}; encode the captions with the model's own CLIP"
        )
    samples = model.model.process_latent_in(torch.cat(pictures).float().cpu()).clone()
    if len(contexts) not in (1, len(samples)):
        raise ValueError(
            f"there are {len(samples)} latents but {len(contexts)} captions; give one caption for each, or one for all"
        )
    null = None if null_caption is None else _contexts(null_caption)[0].clone()
    if null is not None and null.shape != contexts.shape[1:]:
        raise ValueError(
            "the null caption's conditioning is of another length than the captions'; encode both with the same CLIP"
        )
    return LatentDataset(latents=samples, contexts=contexts.clone(), null_context=null)


def _contexts(conditioning: list) -> Tensor:
    entries = [entry[0] for one in conditioning for entry in one]
    if len({tuple(entry.shape[1:]) for entry in entries}) != 1:
        raise ValueError("the captions' conditionings are of different lengths; keep captions within 75 tokens")
    return torch.cat(entries).float().cpu()


# --- runs, progress, files ------------------------------------------------------------------------------------------


def run_folder(name: str) -> Path:
    """Folder of a run under ComfyUI's output folder; ``ValueError`` for a name that is no plain folder name."""
    root = os.path.join(folder_paths.get_output_directory(), "distill_runs")
    folder = os.path.join(root, name)
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE)  # on Windows
    if reserved or not re.fullmatch(r"\w([\w .-]{0,98}[\w-])?", name) or not folder_paths.is_within_directory(root, folder):
        raise ValueError(f"run_name {name!r} must be a plain name of letters, digits, spaces, dots, dashes and underscores")
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


def throw_if_cancelled() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def show_text(text: str, node_id: str) -> None:
    """A line of text on the node itself, replaced by the next."""
    from server import PromptServer

    PromptServer.instance.send_progress_text(text, node_id)


def describe_progress(progress: Progress, last_step: int) -> str:
    """``step 120 of 500, loss 0.031, 2 min 10 s left``."""
    seconds = round((last_step - progress.step) * progress.seconds_per_step)
    left = f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"
    return f"step {progress.step} of {progress.total_steps}, loss {progress.losses['total']:.4f}, {left} left"


def to_image(picture) -> Tensor:
    """A PIL picture as an IMAGE (1, H, W, 3) in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255


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
    data = load_dataset()
    latents = [{"samples": latent[None]} for latent in data.latents]
    conditioning = [[[context[None], {"pooled_output": context.mean(0, keepdim=True)}]] for context in data.contexts]
    return latents, conditioning
