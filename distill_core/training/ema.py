"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .sharding import shared_like


class EMA:
    """Exponential moving average of weights, in float32; the decay grows from a small value, so that early weights fade fast.

    ``average <- d average + (1 - d) weights`` with ``d = min(decay, (1 + step) / (10 + step))``.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.weights = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Update the average with the weights after ``step`` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.weights.items():
            average.lerp_(weights[name].detach().float(), 1 - decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from a saved average: unsharded tensors by name."""
        for name, average in self.weights.items():
            average.copy_(shared_like(weights[name], average))
