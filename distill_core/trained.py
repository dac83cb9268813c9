"""What a run trains: every weight of the student, or a LoRA on it; and the file that comes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from .denoiser import Denoiser
from .files import open_unet, save_unet
from .plan import PruningPlan
from .recipe import Recipe


class Trained(Protocol):
    """Part of a network that is trained, with a form of its own on disk."""

    file_name: str

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""

    def write(self, path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write values of the parameters as the file people use."""

    def read(self, path: Path) -> dict[str, Tensor]:
        """The values of such a file."""


class WholeUNet:
    """Every weight of a student, which ``plan`` was pruned with."""

    file_name = "student.safetensors"

    def __init__(self, denoiser: Denoiser, plan: PruningPlan | None):
        self.denoiser, self.plan = denoiser, plan
        denoiser.network.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.denoiser.named_parameters()

    def write(self, path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        about = {"plan": self.plan, "sampling": self.denoiser.sampling, "metadata": {**self.denoiser.origin, **metadata}}
        save_unet(path, weights, self.denoiser.architecture, **about)

    def read(self, path: Path) -> dict[str, Tensor]:
        return {name: tensor.read() for name, tensor in open_unet(path).tensors.items()}


def trained(student: Denoiser, recipe: Recipe, plan: PruningPlan | None) -> Trained:
    """What a recipe trains of a student. Weights that are not trained need no gradient afterwards."""
    if not recipe.lora_rank:
        return WholeUNet(student, plan)
    from .adapter import Lora

    options = {"alpha": recipe.lora_alpha, "dora": recipe.lora_dora, "targets": recipe.lora_targets, "seed": recipe.seed}
    return Lora(student, rank=recipe.lora_rank, **options)
