"""MODELs as the denoisers that a training run calls, and the memory they need."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence

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
from .model import architecture_of, state_dict_of, told_of
from .sampling import sampling_of, sampling_words, schedule_of

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


def denoiser(
    model: ModelPatcher, beside: Architecture | None = None, batch_shape: tuple[int, ...] | None = None
) -> ComfyDenoiser:
    """A MODEL as a denoiser, loaded to its device with its patches applied.

    Leaves memory free to train a student of the architecture ``beside``, or to sample batches of a shape (B, C, H, W).
    """
    wrapped = _wrap(model, model)
    wrapped.room_bytes = _training_bytes(beside) if beside else model.memory_required(batch_shape) if batch_shape else 0
    wrapped.load()
    return wrapped


def trainable(student: ModelPatcher) -> ComfyDenoiser:
    """A float32 copy of a student's network to train. Call it outside inference mode, or its weights cannot be trained."""
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


def check_trainable(*models: ModelPatcher) -> None:
    """``ValueError`` for a MODEL that the training engine cannot run, before any work starts."""
    for model in models:
        denoisers.check_trainable(architecture_of(model), sampling_of(model))


def _wrap(model: ModelPatcher, sampled_as: ModelPatcher) -> ComfyDenoiser:
    """A denoiser around a MODEL's network; ``ValueError`` for a MODEL that the training engine cannot run."""
    architecture, sampling = architecture_of(model), sampling_of(sampled_as)
    denoisers.check_trainable(architecture, sampling)
    wrapped = ComfyDenoiser(
        network=model.model.diffusion_model,
        architecture=architecture,
        sampling=sampling,
        noise_levels=schedule_of(sampled_as),
        origin=told_of(sampled_as),
    )
    wrapped.patcher = model
    return wrapped


def predict_alike(models: Sequence[ModelPatcher], fingerprints: Iterable[str]) -> bool:
    """Whether MODELs have the same weights, by their fingerprints, and the same sampling."""
    return len({*fingerprints}) == 1 and len({sampling_words(model) for model in models}) == 1


def _training_bytes(architecture: Architecture) -> int:
    """Memory of a student in training: float32 weights, gradients, and two moments of AdamW; activations not included."""
    return 16 * architecture.num_parameters


def forecast_memory(
    teachers: list[ModelPatcher],
    student: ModelPatcher,
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
    stored = max((teacher.model.get_dtype() for teacher in teachers), key=lambda dtype: dtype.itemsize)
    settings = MemorySettings(
        training=recipe,
        teacher_dtype=next(name for name, dtype in DTYPES.items() if dtype.itemsize == stored.itemsize),
        shares_base=shares_base,
        num_teachers=len(teachers),
        device=student.load_device.type,
    )
    return forecast(
        teacher=architecture_of(teachers[0]),
        student=architecture_of(student),
        plan=plan,
        latent_shape=(channels, height, width),
        num_tokens=example.contexts.shape[1],
        settings=settings,
    )


def free_bytes(model: ModelPatcher) -> int:
    """Memory of a MODEL's device that is free, or that ComfyUI can free by unloading MODELs."""
    device, loaded = model.load_device, comfy.model_management.current_loaded_models
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
