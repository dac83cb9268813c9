"""Distance between two predictions, per example."""

from __future__ import annotations

import torch
from torch import Tensor


class _MeanSquare(torch.autograd.Function):
    """Mean square of each row, (B, N) -> (B,), without storing a tensor of squares."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return torch.linalg.vector_norm(a, dim=1).square() / a.shape[1]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return a * (2 * gradient / a.shape[1])[:, None]


def finite(prediction: Tensor) -> Tensor:
    """A network's prediction; ``ValueError`` if it holds NaN or Inf, which no distance can be told from."""
    if not prediction.isfinite().all():
        raise ValueError("the model predicts NaN or Inf in the precision it is loaded in; load it in bf16 or fp32")
    return prediction


def mean_square(a: Tensor) -> Tensor:
    """Mean square of each sample, in float32: (B, ...) -> (B,)."""
    return _MeanSquare.apply(a.float().flatten(1))


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32: (B, ...), (B, ...) -> (B,)."""
    return mean_square(a.float() - b.float())
