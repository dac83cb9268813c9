"""A MODEL's own network to train a LoRA on: teacher and student share its weights, which are there once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.model_sampling
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...distill_core.architecture import Architecture
from ...distill_core.cache import CachedDataset
from ...distill_core.dataset import Caption, Dataset
from ...distill_core.denoiser import Denoiser, Label
from ...distill_core.memory import Forecast
from ...distill_core.model_sampling import ModelSampling
from ...distill_core.recipe import Recipe
from ...distill_core.teacher_data import Making, draw_dataset
from .model import model_fingerprint, told_of, unet_of
from .sampling import prediction_or_flow, sampling_of, sampling_words, schedule_of
from .training import PLAIN_ATTENTION, forecast_memory

EVERYTHING = 1e20  # bytes: more than there are, so that ComfyUI unloads all else


@dataclass(kw_only=True)
class ModelDenoiser(Denoiser):
    """A MODEL of any family, asked as ComfyUI's samplers ask it. Layers have the names ComfyUI gives them."""

    shell: BaseModel
    """What ComfyUI calls, with the network in it; it gives the network's own answer, not the picture that stands for."""
    patcher: ModelPatcher
    delegate_of: ModelPatcher | None = None
    """The MODEL that stands for this one where ComfyUI loads weights layer by layer, which training cannot do."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        now = self.schedule.at(t, x_t.float())
        flows = self.prediction == "flow"
        sigma = now.sigma if flows else now.sigma / now.alpha
        shown = x_t.float() if flows else x_t.float() / now.alpha
        asked = self._asked(x_t, context, label)
        return self.shell.apply_model(shown, sigma.flatten(), transformer_options=dict(PLAIN_ATTENTION), **asked)

    def _asked(self, x_t: Tensor, context: Tensor, label: Label | None) -> dict[str, Tensor]:
        """What the family makes of captions."""
        if self.architecture is not None and label is not None:  # SDXL, each example with sizes of its own
            return {"c_crossattn": context, "y": label.vector()}
        told = {"cross_attn": context, "noise": x_t, "device": x_t.device}
        if label is not None:
            told["pooled_output"] = label.pooled
        try:
            conditions = self.shell.extra_conds(**told)
        except KeyError as error:
            raise ValueError(f"the captions lack {error}, which this model reads; encode them with its own CLIP") from None
        return {name: cond.process_cond(batch_size=len(x_t)).cond for name, cond in conditions.items()}

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32  # the shell casts

    @property
    def computes_in_fp16(self) -> bool:
        return self.shell.get_dtype_inference() == torch.float16

    @property
    def lora_names(self) -> dict[str, str]:
        layers = (path for path, module in self.network.named_modules() if hasattr(module, "weight"))
        own = (path for path in layers if not {"base_layer", "lora_A", "lora_B"} & {*path.split(".")})  # of a LoRA that is on it
        return {path: f"diffusion_model.{path}" for path in own}

    @property
    def inner_blocks(self) -> list[str]:
        # Blocks of Flux and others write over what they are given: computed again they would answer otherwise.
        if not isinstance(self.network, MMDiT):
            raise ValueError("gradient_checkpointing is for UNets and SD3 alone; set it to false in the recipe")
        return [f"joint_blocks.{number}" for number in range(len(self.network.joint_blocks))]

    @property
    def latent_channels(self) -> int:
        return self.shell.latent_format.latent_channels

    def path(self, name: str) -> str:
        return name


class UNetDenoiser(ModelDenoiser):
    """The same of a UNet of the Stable Diffusion family, whose layers have canonical names, and kohya's in files."""

    spelling = "ldm"
    lora_names, inner_blocks, path = Denoiser.lora_names, Denoiser.inner_blocks, Denoiser.path


def shared_base(model: ModelPatcher) -> ModelDenoiser:
    """A MODEL's own network, with its patches, to put a LoRA on; the MODEL itself stays as it is.

    All else is unloaded to make room. Call it outside inference mode. ``ValueError`` for a MODEL that cannot be trained so.
    """
    architecture = unet_of(model)
    sampling_kind, delegate_of = _trainable_sampling(model, architecture), None
    if model.is_dynamic():
        model, delegate_of = model.get_non_dynamic_delegate(), model
    with torch.inference_mode():  # the mode ComfyUI's loaders made the weights in
        comfy.model_management.load_models_gpu([model], memory_required=EVERYTHING, force_full_load=True)
    if any(type(weight) not in (Tensor, nn.Parameter) for weight in model.model.diffusion_model.parameters()):
        raise ValueError("the weights of this MODEL are quantised; load it in fp32, bf16, fp16 or plain fp8")
    shell = twin(model.model)
    sampling = shell.model_sampling = twin(model.get_model_object("model_sampling"))
    sampling.calculate_denoised = lambda sigma, output, x: output
    return (UNetDenoiser if architecture else ModelDenoiser)(
        network=shell.diffusion_model,
        architecture=architecture,
        sampling=sampling_kind,
        noise_levels=schedule_of(model),
        origin=told_of(model),
        shell=shell,
        patcher=model,
        delegate_of=delegate_of,
    )


def _trainable_sampling(model: ModelPatcher, architecture: Architecture | None) -> ModelSampling:
    """How a MODEL is sampled; ``ValueError`` where its network could not be trained."""
    prediction_or_flow(model)
    form = model.model.latent_format
    if form.latent_dimensions != 2:
        raise ValueError(f"this MODEL ({type(model.model).__name__}) is none of pictures, which alone are trained here")
    if architecture and architecture.channels("conv_in")[0] != form.latent_channels:
        raise ValueError("this MODEL reads more than a latent: inpainting and editing models are not trained here")
    if model.injections:
        raise ValueError(
            "a LoRA is on this MODEL in bypass mode, which training cannot see; use Load LoRA in place of Load LoRA (Bypass)"
        )
    return sampling_of(model)


@contextlib.contextmanager
def opened_base(model: ModelPatcher) -> Iterator[ModelDenoiser]:
    """A MODEL's `shared_base` while it is open; a network that was loaded for that alone is let go of afterwards."""
    base = shared_base(model)
    try:
        yield base
    finally:
        if base.delegate_of is not None:
            base.patcher.detach()
            base.delegate_of.non_dynamic_delegate_model = None


@contextlib.contextmanager
def with_gradients(base: ModelDenoiser) -> Iterator[None]:
    """While open, ComfyUI's networks compute in ways a gradient can pass through, and it may do so."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    # Flux and others write over what the gradient needs; then it keeps a copy.
    writes_over = contextlib.nullcontext() if base.architecture else torch.autograd.graph.allow_mutation_on_saved_tensors()
    try:
        with writes_over:
            yield
    finally:
        comfy.model_management.in_training = before


def draw_latents(
    model: ModelPatcher,
    captions: list[Caption],
    null: Caption,
    making: Making,
    folder: Path,
    batch_size: int,
    on_item: Callable[[int, int], None],
) -> CachedDataset:
    """Pictures a MODEL draws of captions, and their noisy states, as training data on disk; see `teacher_data.draw_dataset`.

    making: its size is in pixels as the MODEL's latents count them.
    """
    ratio = getattr(model.model.latent_format, "spacial_downscale_ratio", 8)
    making = replace(making, size=tuple(side // ratio * 8 for side in making.size))  # the core's latents are an eighth
    told = f"{model_fingerprint(model)} {sampling_words(model)}"
    with contextlib.ExitStack() as stack:
        load = partial(stack.enter_context, opened_base(model))
        options = {"schedule": schedule_of(model), "batch_size": batch_size, "on_item": on_item}
        return draw_dataset(load, told, captions, null, making, folder, **options)


def forecast_shared_base(model: ModelPatcher, teacher: ModelPatcher | None, data: Dataset, recipe: Recipe) -> Forecast | None:
    """The memory a step needs where a UNet's MODEL learns from itself; None for others."""
    if teacher is not None or unet_of(model) is None:
        return None
    return forecast_memory([model], model, None, data, recipe, shares_base=True)


def twin(module: nn.Module, seen: dict[int, nn.Module] | None = None) -> nn.Module:
    """A module of its own on the same weights, through which a gradient can pass to what is put on it.

    Its weights lie in the same memory as the given module's, frozen, as ordinary tensors even where those were made in
    inference mode. What is put on it or hooked to it leaves the given module alone. Call it outside inference mode.
    """
    seen = {} if seen is None else seen
    if id(module) in seen:
        return seen[id(module)]
    own = seen[id(module)] = module.__new__(type(module))
    own.__dict__ = {name: copy.copy(value) if isinstance(value, (dict, list)) else value for name, value in vars(module).items()}
    own.__dict__.pop("forward", None)  # what a LoRA in bypass mode left behind computes with the given module's weights
    own._parameters = {
        name: p if p is None else nn.Parameter(_alias(p), requires_grad=False) for name, p in module._parameters.items()
    }
    own._buffers = {name: buffer if buffer is None else _alias(buffer) for name, buffer in module._buffers.items()}
    own._modules = {name: child if child is None else twin(child, seen) for name, child in module._modules.items()}
    return own


def _alias(tensor: Tensor) -> Tensor:
    """An ordinary tensor in the same memory."""
    place = tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*place)
