"""Weights that learn: their optimiser, the loss scaling of fp16 and the clipping of gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .optim import Optimizer
from .settings import TrainingSettings
from .sharding import whole


class Learner:
    """Parameters of one device by name, and what a run's settings do with their gradients.

    scaled: whether losses are scaled, for fp16.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: TrainingSettings, *, scaled: bool):
        self.parameters, self._max_norm = dict(parameters), settings.max_grad_norm
        self.optimizer = Optimizer(
            settings.optimizer,
            parameters,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            rounding=settings.rounds,
        )
        device = next(iter(parameters.values())).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self.scaler.scale(loss).backward()

    def clip(self) -> Tensor:
        """Scale the gradients down to the settings' norm; returns the norm they had."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer.parts[0])
        return whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._max_norm))

    def overflowed(self, norm: float) -> bool:
        """Whether a norm says that gradients are not finite for a reason the loss scaling cannot mend."""
        return not math.isfinite(norm) and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1)

    def update(self, norm: float, learning_rate: float, random: torch.Generator | None = None) -> bool:
        """Apply the gradients if their norm is finite, and clear them; returns whether they were applied.

        random: as for `Optimizer.step`.
        """
        sound = math.isfinite(norm)
        if sound:
            self.optimizer.step(learning_rate, random)
        self.optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler.update()
        return sound

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the next step needs besides the parameters: tensors, and the rest as JSON."""
        tensors, rest = self.optimizer.state()
        return {name: whole(tensor) for name, tensor in tensors.items()}, {"optimizer": rest, "scaler": self.scaler.state_dict()}

    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Restore from `state`."""
        self.optimizer.load(tensors, rest["optimizer"])
        self.scaler.load_state_dict(rest["scaler"])


@contextlib.contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, parameters have other values and their gradients, by name; nothing is copied."""
    own = {name: (parameter.data, parameter.grad) for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data, parameter.grad = weights[name].data, weights[name].grad
        yield
    finally:
        for name, parameter in parameters.items():
            weights[name].grad = parameter.grad
            parameter.data, parameter.grad = own[name]


def with_prefix(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint under the name of their kind."""
    return {f"{kind}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint that `with_prefix` put under the name of a kind."""
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}/")}
