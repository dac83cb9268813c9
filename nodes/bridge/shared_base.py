"""A MODEL's own network to train a LoRA on: teacher and student share its weights, which exist once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import comfy.model_management
import comfy.model_sampling
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...distill_core.base.sizes import gib
from ...distill_core.base.storage import fingerprint
from ...distill_core.data import teacher_data
from ...distill_core.data.cache import CachedDataset
from ...distill_core.data.dataset import Dataset, largest_example
from ...distill_core.data.teacher_data import GenerationSettings
from ...distill_core.diffusion.conditioning import Caption, Label
from ...distill_core.diffusion.denoiser import Denoiser
from ...distill_core.diffusion.out_of_place import out_of_place
from ...distill_core.diffusion.transformers import TransformerDenoiser
from ...distill_core.lora.layers import trained_shapes
from ...distill_core.networks.name_map import NameMap
from ...distill_core.networks.transformers.architecture import FAMILIES
from ...distill_core.training.base_memory import Base, on_meta
from ...distill_core.training.memory import Forecast, MemorySettings, beside_weights
from ...distill_core.training.settings import TrainingSettings
from .model import Model
from .training import PLAIN_ATTENTION, forecast_memory

_Module = TypeVar("_Module", bound=nn.Module)
EVERYTHING = 1e20  # bytes: more than any device has, so that ComfyUI unloads everything else


@dataclass(kw_only=True)
class ModelDenoiser(TransformerDenoiser):
    """A denoiser around a MODEL of any family, called as ComfyUI's samplers call it. Layers have ComfyUI's names."""

    lora_head = "diffusion_model"
    shell: BaseModel
    """The object that ComfyUI calls, with the network in it; it returns the network's own prediction, not the denoised image."""
    patcher: ModelPatcher
    delegate_of: ModelPatcher | None = None
    """The MODEL that this one replaces if ComfyUI loads its weights layer by layer, which training cannot use."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        now = self.schedule.at(t, x_t.float())
        flows = self.prediction == "flow"
        sigma = now.sigma if flows else now.sigma / now.alpha
        shown = x_t.float() if flows else x_t.float() / now.alpha
        asked = self._asked(x_t, context, label)
        with self.way():
            answer = self.shell.apply_model(
                self._framed(shown), sigma.flatten(), transformer_options=dict(PLAIN_ATTENTION), **asked
            )
        return answer.squeeze(2) if self.has_frames else answer

    @property
    def has_frames(self) -> bool:
        """Whether the network takes images as videos of one frame."""
        return self.shell.latent_format.latent_dimensions == 3

    def _framed(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(2) if self.has_frames else latents

    def _asked(self, x_t: Tensor, context: Tensor, label: Label | None) -> dict[str, Tensor]:
        """The conditions that the model family makes from captions."""
        if self.architecture is not None and label is not None:  # SDXL: each example has its own sizes
            return {"c_crossattn": context, "y": label.vector()}
        given = {"cross_attn": context, "noise": self._framed(x_t), "device": x_t.device}
        if label is not None:
            given["pooled_output"] = label.pooled
        try:
            conditions = self.shell.extra_conds(**given)
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
    def latent_channels(self) -> int:
        return self.shell.latent_format.latent_channels


class UNetDenoiser(ModelDenoiser):
    """A `ModelDenoiser` for UNets of the Stable Diffusion family: canonical layer names, and kohya's names in files."""

    layout = "ldm"
    lora_names, inner_blocks, path = Denoiser.lora_names, Denoiser.inner_blocks, Denoiser.path
    named_parameters, tapped, kept_blocks = Denoiser.named_parameters, Denoiser.tapped, Denoiser.kept_blocks


def shared_base(model: Model) -> ModelDenoiser:
    """A MODEL's own network, with its patches, to put a LoRA on; the MODEL itself does not change.

    Unloads all other models to free memory. Call it outside inference mode. ``ValueError`` for a MODEL that cannot be trained.
    """
    check_base(model)
    patcher, delegate_of = model.patcher, None
    if patcher.is_dynamic():
        patcher, delegate_of = patcher.get_non_dynamic_delegate(), patcher
    with torch.inference_mode():  # the mode ComfyUI's loaders made the weights in
        comfy.model_management.load_models_gpu([patcher], memory_required=EVERYTHING, force_full_load=True)
    if any(type(weight) not in (Tensor, nn.Parameter) for weight in patcher.model.diffusion_model.parameters()):
        raise ValueError("the weights of this MODEL are quantised; load it in fp32, bf16, fp16 or plain fp8")
    shell = alias_of(patcher.model)
    sampling = shell.model_sampling = alias_of(patcher.get_model_object("model_sampling"))
    sampling.calculate_denoised = lambda sigma, output, x: output
    return (UNetDenoiser if model.unet else ModelDenoiser)(
        network=shell.diffusion_model,
        architecture=model.unet,  # type: ignore[arg-type]  # None of other families, whose layers have ComfyUI's names
        sampling=model.sampling,
        noise_levels=model.schedule,
        origin=model.origin_metadata,
        transformer=model.known_transformer,
        shell=shell,
        patcher=patcher,
        delegate_of=delegate_of,
    )


def check_base(model: Model) -> None:
    """``ValueError`` if a LoRA cannot be trained on a MODEL's network."""
    _ = model.prediction  # refuses what is sampled in a way training does not know
    form, transformer = model.patcher.model.latent_format, model.known_transformer
    draws_images = form.latent_dimensions == 2 or (model.has_frames and transformer is not None and transformer.of.learns)
    if not draws_images:
        raise ValueError(f"this MODEL ({model.kind}) is not an image model; only image models can be trained here")
    if model.unet and model.unet.channels("conv_in")[0] != form.latent_channels:
        raise ValueError("this MODEL reads more than a latent: inpainting and editing models cannot be trained here")
    if model.patcher.injections:
        raise ValueError(
            "a LoRA is on this MODEL in bypass mode, which training cannot see; use Load LoRA instead of Load LoRA (Bypass) (For debugging)"
        )


def check_healing(teacher: Model) -> None:
    """``ValueError`` if a student of a transformer cannot be taught on its weights."""
    check_base(teacher)
    if not teacher.transformer.of.learns:
        known = ", ".join(family.title for family in FAMILIES.values() if family.learns)
        raise ValueError(
            f"{teacher.transformer.title} can be cut but not taught here: ComfyUI's network of it gives no gradient that is right; "
            f"these can: {known}"
        )


def check_shares_weights(student: Model, teacher: Model) -> None:
    """``ValueError`` unless a student holds just the weights of its teacher's blocks."""
    if fingerprint(student.mapping_from(teacher).apply(teacher.state_dict())) != student.fingerprint:
        raise ValueError(
            "the student holds other weights than its teacher, but a transformer is taught on the weights that they share: connect the "
            "output of Prune Transformer Blocks, and its input as teacher"
        )


@contextlib.contextmanager
def opened_base(model: Model) -> Iterator[ModelDenoiser]:
    """A MODEL's `shared_base` while it is open; afterwards a network loaded only for it is released."""
    base = shared_base(model)
    try:
        yield base
    finally:
        if base.delegate_of is not None:
            base.patcher.detach()
            base.delegate_of.non_dynamic_delegate_model = None


@contextlib.contextmanager
def with_gradients(base: ModelDenoiser) -> Iterator[None]:
    """While open, ComfyUI's networks compute in ways that let gradients through."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        with _with_old_values(base):
            yield
    finally:
        comfy.model_management.in_training = before


def _with_old_values(base: ModelDenoiser) -> AbstractContextManager:
    """While open, what Flux and others write over is still there for the gradient."""
    if base.architecture:
        return contextlib.nullcontext()
    if base.transformer is not None and base.transformer.of.learns:
        return out_of_place(map(base.network.get_submodule, base.transformer.in_order))
    return torch.autograd.graph.allow_mutation_on_saved_tensors()  # it keeps copies; not with checkpointing


def in_own_pixels(generation: GenerationSettings, model: Model) -> GenerationSettings:
    """The same for a MODEL whose latents are not one eighth of an image's size, as the core's are."""
    height, width = (side // model.pixels_per_latent * 8 for side in generation.size)
    return replace(generation, size=(height, width))


def draw_latents(
    model: Model,
    captions: list[Caption],
    null: Caption,
    generation: GenerationSettings,
    folder: Path,
    batch_size: int,
    on_step: Callable[[int, int], None],
) -> CachedDataset:
    """Images a MODEL samples from captions, and their noisy states, as training data on disk; see `teacher_data.draw_dataset`.

    generation: its size is in pixels; the MODEL's own downscaling ratio converts it to latents.
    """
    generation = in_own_pixels(generation, model)
    with contextlib.ExitStack() as stack:
        load = partial(stack.enter_context, opened_base(model))
        return teacher_data.draw_dataset(
            load,
            model.identity,
            captions,
            null,
            generation,
            folder,
            schedule=model.schedule,
            batch_size=batch_size,
            on_step=on_step,
        )


def drawn_fingerprint(model: Model, captions: list[Caption], null: Caption, generation: GenerationSettings) -> str:
    """The fingerprint of what `draw_latents` makes."""
    return teacher_data.drawn_fingerprint(
        model.identity, captions, null, in_own_pixels(generation, model), schedule=model.schedule
    )


def forecast_shared_base(model: Model, teacher: Model | None, data: Dataset, recipe: TrainingSettings) -> Forecast | None:
    """The memory of a training step if a UNet's MODEL learns from itself; None otherwise."""
    if teacher is not None or model.unet is None:
        return None
    return forecast_memory([model], model, None, data, recipe, shares_base=True)


def forecast_base(base: ModelDenoiser, mapping: NameMap | None, data: Dataset, settings: TrainingSettings) -> Forecast | None:
    """The memory of a training step if a transformer learns from itself; None for families whose step cannot be simulated.

    mapping: to the student that learns.
    """
    if base.transformer is None or not base.transformer.of.learns:
        return None

    def empty() -> TransformerDenoiser:
        shell = alias_of(base.shell, parameter=on_meta)
        for module in shell.modules():  # to where the step is simulated
            module._buffers.update({name: buffer.cpu() for name, buffer in module._buffers.items() if buffer is not None})
        return replace(base, network=shell.diffusion_model, shell=shell)

    example = largest_example(data)
    _, channels, height, width = example.latents.shape
    what = Base(
        empty,
        mapping,
        sum(weight.nbytes for weight in base.network.parameters()),
        (example.contexts.shape[1], example.contexts.shape[2]),
        None if example.label is None else example.label.pooled.shape[1],
        with_gradients,
    )
    asked = MemorySettings(training=settings, shares_base=True, device=base.device.type)
    try:
        return what.forecast(asked, (channels, height, width))
    except (RuntimeError, NotImplementedError):  # an operation that has no version without contents
        return None


def describe_memory(base: ModelDenoiser, settings: TrainingSettings) -> str:
    """What a step needs besides activations: the weights as they are held, and what is trained, by exact count."""
    weights = sum(weight.nbytes for weight in base.network.parameters())
    shapes = trained_shapes(base, settings.lora_rank, settings.lora_targets, settings.lora_dora)
    learnt = sum(8 * shape.numel() for shape in shapes) + beside_weights(shapes, settings).total()  # 8: gradients too, in float32
    return f"the model takes {gib(weights)}, the LoRA with its gradients and optimizer {gib(learnt)}; activations come on top"


def alias_of(
    module: _Module, seen: dict[int, Any] | None = None, parameter: Callable[[Tensor], nn.Parameter] | None = None
) -> _Module:
    """An alias of a module: a new module on the same weights that lets gradients through to layers added to it.

    Its weights share memory with the given module's. They are frozen, and ordinary tensors even if the given ones were made in
    inference mode. Layers and hooks added to it do not affect the given module. Call it outside inference mode. parameter: makes
    each weight in another way.
    """
    seen, parameter = {} if seen is None else seen, parameter or _frozen_alias
    if id(module) in seen:
        return seen[id(module)]
    own = seen[id(module)] = module.__new__(type(module))
    own.__dict__ = {name: copy.copy(value) if isinstance(value, (dict, list)) else value for name, value in vars(module).items()}
    own.__dict__.pop("forward", None)  # left by a LoRA in bypass mode, it would compute with the given module's weights
    own._parameters = {name: p if p is None else parameter(p) for name, p in module._parameters.items()}
    own._buffers = {name: buffer if buffer is None else _alias(buffer) for name, buffer in module._buffers.items()}
    own._modules = {name: child if child is None else alias_of(child, seen, parameter) for name, child in module._modules.items()}
    return own


def _frozen_alias(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(_alias(weight), requires_grad=False)


def _alias(tensor: Tensor) -> Tensor:
    """An ordinary tensor in the same memory."""
    place = tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*place)
