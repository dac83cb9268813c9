"""Losses of a student: each compares two tensors and returns one value per example."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..diffusion.distance import mean_square, squared_error

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(student, teacher)`` of two tensors (B, ...), in float32: (B,)."""


def task_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Denoising loss against the true target (Kim et al. 2023, arXiv 2305.15798, Eq. 1)."""
    return squared_error(prediction, target)


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance to the teacher's prediction (Kim et al. 2023, Eq. 2)."""
    return squared_error(student, teacher)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance to the teacher's feature of one layer; layers are summed (Kim et al. 2023, Eq. 3)."""
    return squared_error(student, teacher)


def normalised_feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The same, divided by the norm of the teacher's feature so that no layer dominates.

    ``|f_S - f_T|^2 / |f_T|^2`` (Zhang et al. 2024, arXiv 2404.11098, normalised feature distillation).
    """
    return squared_error(student, teacher) / mean_square(teacher).clamp(min=1e-12)


def direction_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the tokens' directions, their mean: ``|s / |s| - t / |t||^2`` (PPCL, arXiv 2511.16156). (B, ..., D) each."""
    student, teacher = (F.normalize(tokens.float(), dim=-1) for tokens in (student, teacher))
    return squared_error(student, teacher) * teacher.shape[-1]


HUBER = 1e-3


def pseudo_huber_loss(student: Tensor, target: Tensor) -> Tensor:
    """``sqrt(d^2 + c^2) - c``, mean over the elements d of the difference, c = 0.001: an absolute error, smooth at 0.

    As latent consistency models are trained (Luo et al. 2023, arXiv 2310.04378, their program).
    """
    difference = (student.float() - target.float()).flatten(1)
    return ((difference.square() + HUBER**2).sqrt() - HUBER).mean(1)


def matching_loss(drawing: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """A loss whose gradient moves a drawing from where the fake score sees it to where the real one does, (B,); all (B, C, H, W).

    ``|x - stop(x - (fake - real) / mean |x - real|)|^2 / 2``, so that the gradient of each example has the same size, whatever its
    noise (Yin et al. 2024, arXiv 2311.18828, Eq. 7 and 8). Its value says nothing about quality.
    """
    drawing = drawing.float()
    size = (drawing.detach() - real).abs().flatten(1).mean(1).clamp(min=1e-12).reshape(-1, *[1] * (drawing.ndim - 1))
    return 0.5 * squared_error(drawing, drawing.detach() - (fake - real) / size)


FEATURE_LOSSES: dict[str, Loss] = {
    "squared": feature_loss,
    "normalised": normalised_feature_loss,
    "directions": direction_loss,
}
"""Losses of features and hidden states by name."""
