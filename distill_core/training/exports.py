"""What a run trains, all weights of the student or a LoRA on it, and the file it exports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from ..base.storage import read_header, write_tensors
from ..diffusion.denoiser import Denoiser
from ..networks.files import open_unet, save_unet
from ..pruning.plan import PruningPlan
from .settings import TrainingSettings


class Trained(Protocol):
    """The trained part of a network, which has its own file format."""

    file_name: str

    @property
    def exact(self) -> bool:
        """Whether a file gives the very values back that were written."""
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""

    def write(self, path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write values of the parameters to a student or LoRA file."""

    def read(self, path: Path) -> dict[str, Tensor]:
        """Read the values from such a file."""


class WholeUNet:
    """All weights of a student that was pruned with ``plan``."""

    file_name, exact = "student.safetensors", True

    def __init__(self, denoiser: Denoiser, plan: PruningPlan | None):
        self.denoiser, self.plan = denoiser, plan
        denoiser.network.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.denoiser.named_parameters()

    def write(self, path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        about = {**(self.plan.metadata if self.plan else {}), **self.denoiser.origin, **metadata}
        save_unet(path, weights, self.denoiser.architecture, sampling=self.denoiser.sampling, metadata=about)

    def read(self, path: Path) -> dict[str, Tensor]:
        return {name: tensor.read() for name, tensor in open_unet(path).tensors.items()}


class WholeTransformer:
    """All weights of a transformer, in a file under the network's own names."""

    file_name, exact = "student.safetensors", True

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        denoiser.network.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.denoiser.named_parameters()

    def write(self, path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        write_tensors(path, weights, {**self.denoiser.origin, **metadata})

    def read(self, path: Path) -> dict[str, Tensor]:
        return {name: tensor.read() for name, tensor in read_header(path).tensors.items()}


def trained(student: Denoiser, settings: TrainingSettings, plan: PruningPlan | None) -> Trained:
    """The part of a student that the settings train; all other weights have no gradient afterwards."""
    if not settings.lora_rank:
        return WholeUNet(student, plan) if student.architecture else WholeTransformer(student)
    from ..lora.layers import Lora

    return Lora(
        student,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        dora=settings.lora_dora,
        targets=settings.lora_targets,
        seed=settings.seed,
        about=plan.metadata if plan else None,
    )
