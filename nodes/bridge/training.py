"""MODELs as the denoisers that a training run calls, and the memory they need."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import comfy.model_management
import psutil
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...distill_core.base.precision import DTYPES
from ...distill_core.data.dataset import Dataset, largest_example
from ...distill_core.diffusion import denoiser as denoisers
from ...distill_core.diffusion.conditioning import Label
from ...distill_core.diffusion.denoiser import LdmDenoiser
from ...distill_core.networks.architecture import Architecture
from ...distill_core.pruning.plan import PruningPlan
from ...distill_core.training.memory import Forecast, MemorySettings, forecast
from ...distill_core.training.settings import TrainingSettings
from .build import build_model
from .model import Model

PLAIN_ATTENTION = {"optimized_attention_override": lambda chosen, *args, **named: attention_pytorch(*args, **named)}
"""Some of ComfyUI's attentions have no gradient (sage); others split by free memory, so runs would not be reproducible."""


class ComfyDenoiser(LdmDenoiser):
    """The UNet inside a MODEL, on the device and in the precision ComfyUI runs it."""

    patcher: ModelPatcher
    room_bytes: int | None = None
    """Memory to leave free if ComfyUI may unload the network at any time; None for a network that only this object owns."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        # ComfyUI may have unloaded it since, or applied the patches of another MODEL that shares it.
        if self.room_bytes is not None and self.patcher.model.current_weight_patches_uuid != self.patcher.patches_uuid:
            self.load()
        y = None if label is None else label.vector()
        return self.running(x_t, timesteps=t.float(), context=context, y=y, transformer_options=dict(PLAIN_ATTENTION))

    def load(self) -> None:
        """Load the network to its device, with the MODEL's patches."""
        with torch.inference_mode():  # the mode ComfyUI's loaders made the weights in
            comfy.model_management.load_models_gpu([self.patcher], memory_required=self.room_bytes)

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def dtype(self) -> torch.dtype:
        if self.room_bytes is None:  # training may have changed the data type of its weights
            return next(self.network.parameters()).dtype
        return self.patcher.model.get_dtype_inference()


def denoiser(model: Model, beside: Architecture | None = None, batch_shape: tuple[int, ...] | None = None) -> ComfyDenoiser:
    """A MODEL as a denoiser, loaded to its device with its patches applied.

    Leaves memory free to train a student of the architecture ``beside``, or to sample batches of a shape (B, C, H, W).
    """
    wrapped = _wrap(model.patcher, model)
    if beside:
        wrapped.room_bytes = _training_bytes(beside)
    else:
        wrapped.room_bytes = model.patcher.memory_required(batch_shape) if batch_shape else 0
    wrapped.load()
    return wrapped


def trainable(student: Model) -> ComfyDenoiser:
    """A float32 copy of a student's network to train. Call it outside inference mode, or its weights cannot be trained."""
    weights = {name: weight.float() for name, weight in student.state_dict().items()}
    copy = build_model(
        weights,
        student.architecture,
        type(student.patcher.model.model_config),
        dtype=torch.float32,
        disable_dynamic=True,
    )
    device = student.patcher.load_device
    if not comfy.model_management.is_device_cpu(device):
        comfy.model_management.free_memory(_training_bytes(student.architecture), device)
    copy.model.diffusion_model.to(device, torch.float32)
    return _wrap(copy, student)


def check_trainable(*models: Model) -> None:
    """``ValueError`` for a MODEL that the training engine cannot run, before any work starts."""
    for model in models:
        denoisers.check_trainable(model.architecture, model.sampling)


def _wrap(patcher: ModelPatcher, model: Model) -> ComfyDenoiser:
    """A denoiser around a network of a MODEL, its own or a copy; ``ValueError`` for a MODEL that the training engine cannot run."""
    check_trainable(model)
    wrapped = ComfyDenoiser(
        network=patcher.model.diffusion_model,
        architecture=model.architecture,
        sampling=model.sampling,
        noise_levels=model.schedule,
        origin=model.origin_metadata,
    )
    wrapped.patcher = patcher
    return wrapped


def predict_alike(models: Sequence[Model]) -> bool:
    """Whether MODELs have the same weights and the same sampling."""
    return len({model.identity for model in models}) == 1


def _training_bytes(architecture: Architecture) -> int:
    """Memory of a student in training: float32 weights, gradients, and two moments of AdamW; activations not included."""
    return 16 * architecture.num_parameters


def forecast_memory(
    teachers: Sequence[Model],
    student: Model,
    plan: PruningPlan | None,
    data: Dataset,
    recipe: TrainingSettings,
    *,
    shares_base: bool = False,
) -> Forecast:
    """The memory that a training step needs, estimated from diffusers networks of the same architecture.

    shares_base: whether the student is its only teacher with a LoRA.
    """
    example = largest_example(data)
    _, channels, height, width = example.latents.shape
    stored = max((teacher.patcher.model.get_dtype() for teacher in teachers), key=lambda dtype: dtype.itemsize)
    settings = MemorySettings(
        training=recipe,
        teacher_dtype=next(name for name, dtype in DTYPES.items() if dtype.itemsize == stored.itemsize),
        shares_base=shares_base,
        num_teachers=len(teachers),
        device=student.patcher.load_device.type,
    )
    return forecast(
        teacher=teachers[0].architecture,
        student=student.architecture,
        plan=plan,
        latent_shape=(channels, height, width),
        num_tokens=example.contexts.shape[1],
        settings=settings,
    )


def free_bytes(model: Model) -> int:
    """Memory of a MODEL's device that is free, or that ComfyUI can free by unloading MODELs."""
    device, loaded = model.patcher.load_device, comfy.model_management.current_loaded_models
    free = comfy.model_management.get_free_memory(device)
    if comfy.model_management.is_device_cpu(device):  # unloaded MODELs stay there
        return free
    return free + sum(entry.model_loaded_memory() for entry in loaded if entry.model is not None and entry.device == device)


def memory_in_use() -> tuple[int, int]:
    """Bytes in use and in total on the device that trains; on a CPU the bytes in use are this process's."""
    device = comfy.model_management.get_torch_device()
    if comfy.model_management.is_device_cpu(device):
        return psutil.Process().memory_info().rss, psutil.virtual_memory().total
    total = comfy.model_management.get_total_memory(device)
    return total - comfy.model_management.get_free_memory(device), total


def release_memory() -> None:
    """Return the memory that training held to the device."""
    gc.collect()
    comfy.model_management.soft_empty_cache()
