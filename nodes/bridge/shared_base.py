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
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...distill_core.cache import CachedDataset
from ...distill_core.dataset import Caption, Dataset
from ...distill_core.denoiser import Denoiser, Label
from ...distill_core.memory import Forecast
from ...distill_core.recipe import Recipe
from ...distill_core.schedule import NoiseSchedule
from ...distill_core.teacher_data import Making, draw_dataset
from .model import PREDICTIONS, architecture_of, model_fingerprint, schedule_of
from .training import forecast_memory

LAST_SIGNAL = 1e-4  # a flow ends in pure noise, where the ratio of noise to data would have no number
FLOW = "flow"


@dataclass(kw_only=True)
class ModelDenoiser(Denoiser):
    """A MODEL of any family, asked as ComfyUI's samplers ask it. Layers have the names ComfyUI gives them."""

    shell: BaseModel
    """What ComfyUI calls, with the network in it; it gives the network's own answer, not the picture that stands for."""
    patcher: ModelPatcher

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        now = self.schedule.at(t, x_t.float())
        flows = self.prediction == FLOW
        sigma = now.sigma if flows else now.sigma / now.alpha
        shown = x_t.float() if flows else x_t.float() / now.alpha
        # Of ComfyUI's attentions some have no gradient (sage), and some cut by free memory, so that no run is like another.
        options = {"optimized_attention_override": lambda chosen, *args, **named: attention_pytorch(*args, **named)}
        return self.shell.apply_model(shown, sigma.flatten(), transformer_options=options, **self._asked(x_t, context, label))

    def _asked(self, x_t: Tensor, context: Tensor, label: Label | None) -> dict[str, Tensor]:
        """What the family makes of captions."""
        told = {"cross_attn": context, "noise": x_t, "device": x_t.device}
        if label is not None:
            told["pooled_output"] = label.pooled
        if self.architecture is not None and label is not None:  # SDXL, each example with sizes of its own
            return {"c_crossattn": context, "y": label.vector()}
        return {name: cond.process_cond(batch_size=len(x_t)).cond for name, cond in self.shell.extra_conds(**told).items()}

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32  # the shell casts

    @property
    def lora_names(self) -> dict[str, str]:
        layers = (path for path, module in self.network.named_modules() if hasattr(module, "weight"))
        own = (path for path in layers if not {"base_layer", "lora_A", "lora_B"} & {*path.split(".")})  # of a LoRA that is on it
        return {path: f"diffusion_model.{path}" for path in own}

    @property
    def inner_blocks(self) -> list[str]:
        # Blocks of Flux and others write over what they are given: computed again they would answer otherwise.
        raise ValueError("gradient_checkpointing is for UNets alone; set it to false in the recipe")

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

    Call it outside inference mode. ``ValueError`` for a MODEL whose sampling has no table of noise levels.
    """
    if model.is_dynamic():
        model = model.get_non_dynamic_delegate()
    with torch.inference_mode():  # the mode ComfyUI's loaders made the weights in
        comfy.model_management.load_models_gpu([model], force_full_load=True)
    if any(type(weight) not in (Tensor, nn.Parameter) for weight in model.model.diffusion_model.parameters()):
        raise ValueError("the weights of this MODEL are quantised; load it in fp32, bf16, fp16 or plain fp8")
    shell = twin(model.model)
    sampling = shell.model_sampling = twin(model.get_model_object("model_sampling"))
    sampling.calculate_denoised = lambda sigma, output, x: output
    kinds = PREDICTIONS | {comfy.model_sampling.CONST: FLOW}
    kind = next((name for base, name in kinds.items() if isinstance(sampling, base)), None)
    if kind is None or not hasattr(sampling, "sigmas"):
        raise ValueError(f"a MODEL with {type(sampling).__bases__[-1].__name__} sampling cannot be trained here")
    try:
        architecture, of_family = architecture_of(model), UNetDenoiser
    except ValueError:
        architecture, of_family = None, ModelDenoiser
    return of_family(
        network=shell.diffusion_model,
        architecture=architecture,
        schedule=_flow_of(sampling) if kind == FLOW else schedule_of(model),
        prediction=kind,
        shell=shell,
        patcher=model,
    )


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
    sampling = model.get_model_object("model_sampling")
    ratio = getattr(model.model.latent_format, "spacial_downscale_ratio", 8)
    making = replace(making, size=tuple(side // ratio * 8 for side in making.size))  # the core's latents are an eighth
    told = f"{model_fingerprint(model)} {type(sampling).__bases__[-1].__name__} {sampling.sigmas.double().sum().item()!r}"
    return draw_dataset(partial(shared_base, model), told, captions, null, making, folder, batch_size=batch_size, on_item=on_item)


def forecast_shared_base(model: ModelPatcher, teacher: ModelPatcher | None, data: Dataset, recipe: Recipe) -> Forecast | None:
    """The memory a step needs where a MODEL learns from itself, or from another; None for families that are not known so well."""
    try:
        architecture_of(model)
    except ValueError:
        return None
    return forecast_memory([teacher or model], model, None, data, recipe, shares_base=teacher is None)


def _flow_of(sampling: nn.Module) -> NoiseSchedule:
    sigmas = sampling.sigmas.detach().cpu().double().clamp(max=1 - LAST_SIGNAL)
    return NoiseSchedule(1 - sigmas, sigmas)


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
