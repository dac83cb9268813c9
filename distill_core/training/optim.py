"""Optimisers by name and stochastic rounding, with state that can be saved and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base.interrupts import uninterrupted
from .sharding import shared_like

Parameters = list[nn.Parameter]


class Kind(NamedTuple):
    """One optimiser."""

    make: Callable[[Parameters, float, float], torch.optim.Optimizer]
    """(parameters, learning rate, weight decay)."""
    package: str = "torch"
    """Name of its pip package."""
    one_by_one: bool = True
    """Whether it updates each tensor independently, so that tensors can be updated one at a time."""


def _from(module: str, name: str, **options) -> Callable[[Parameters, float, float], torch.optim.Optimizer]:
    def make(parameters: Parameters, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return getattr(import_module(module), name)(parameters, lr=learning_rate, weight_decay=weight_decay, **options)

    return make


def _prodigy(parameters: Parameters, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    optimizer = import_module("prodigyopt").Prodigy(parameters, lr=learning_rate)
    for group in optimizer.param_groups:  # passed to the constructor, it would print a line
        group["weight_decay"] = weight_decay
    return optimizer


OPTIMIZERS: dict[str, Kind] = {
    # Loshchilov & Hutter 2019, arXiv 1711.05101
    "adamw": Kind(_from("torch.optim", "AdamW")),
    # Dettmers et al. 2022, arXiv 2110.02861
    "adamw8bit": Kind(_from("bitsandbytes.optim", "AdamW8bit"), "bitsandbytes"),
    # Shazeer & Stern 2018, arXiv 1804.04235
    "adafactor": Kind(_from("torch.optim", "Adafactor")),
    # Chen et al. 2023, arXiv 2302.06675
    "lion": Kind(_from("lion_pytorch", "Lion"), "lion-pytorch"),
    # Mishchenko & Defazio 2024, arXiv 2306.06101
    "prodigy": Kind(_prodigy, "prodigyopt", one_by_one=False),
    # Defazio et al. 2024, arXiv 2405.15682
    "schedulefree": Kind(_from("schedulefree", "AdamWScheduleFree"), "schedulefree", one_by_one=False),
}
"""Optimisers by name."""


class Optimizer:
    """An optimiser over named parameters, with one interface for every kind.

    rounding: the parameters are bfloat16; each tensor is updated in float32 and then rounded stochastically, so that
    updates too small for bfloat16 still count on average (Zamirai et al. 2020, arXiv 2010.06192). Raises ``ValueError``
    with the pip command if the optimiser's package is not installed.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        rounding: bool = False,
    ):
        kind = OPTIMIZERS[name]
        self.parameters, self.rounding = dict(parameters), rounding
        groups = [[p] for p in self.parameters.values()] if rounding else [list(self.parameters.values())]
        try:
            self.parts = [kind.make(group, learning_rate, weight_decay) for group in groups]
        except ImportError as error:
            raise ValueError(f"optimizer {name} needs a package: python -m pip install {kind.package}") from error
        self._call("train")

    def step(self, learning_rate: float, random: torch.Generator | None = None) -> None:
        """Apply the gradients and clear them. random: generator for rounding, on the device of the parameters."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            if self.rounding:
                _step_in_float32(part, random)
            else:
                part.step()
            part.zero_grad(set_to_none=True)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    @property
    def averages(self) -> bool:
        """Whether the exported weights differ from the trained ones."""
        return hasattr(self.parts[0], "eval")

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """While open, the parameters hold the weights to export; afterwards exactly the trained ones again."""
        if not self.averages:
            yield
            return
        trained = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}
        try:
            self._call("eval")
            yield
        finally:
            with uninterrupted(), torch.no_grad():
                self._call("train")
                for name, parameter in self.parameters.items():  # converting there and back rounds
                    parameter.copy_(trained[name])

    def _call(self, name: str) -> None:
        for part in self.parts:
            getattr(part, name, lambda: None)()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the next step needs besides the parameters: tensors, and the rest as JSON."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.parameters.items()}
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for part in self.parts:
            for parameter, entries in part.state.items():
                for path, value in _flat(entries):
                    (tensors if isinstance(value, Tensor) else rest)[f"{names[parameter]}/{path}"] = value
        groups = [{k: v for k, v in group.items() if k != "params"} for part in self.parts for group in part.param_groups]
        return tensors, {"state": rest, "groups": groups}

    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Restore from `state`."""
        owner = {parameter: part for part in self.parts for group in part.param_groups for parameter in group["params"]}
        for key, value in {**tensors, **rest["state"]}.items():
            name, path = key.split("/", 1)
            parameter = self.parameters[name]
            if isinstance(value, Tensor):  # counters stay on the CPU, where optimisers keep them
                if value.shape == parameter.shape:
                    value = shared_like(value, parameter)
                value = value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)
            *outer, last = path.split("/")
            entries = owner[parameter].state[parameter]
            for key in outer:
                entries = entries.setdefault(key, {})
            entries[last] = value
        groups = [group for part in self.parts for group in part.param_groups]
        for group, stored in zip(groups, rest["groups"], strict=True):
            group.update({name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _step_in_float32(optimizer: torch.optim.Optimizer, random: torch.Generator | None) -> None:
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        dtype, gradient = parameter.dtype, parameter.grad
        parameter.grad, parameter.data = None, parameter.data.float()
        parameter.grad = gradient.float()
        optimizer.step()
        parameter.grad, parameter.data = None, stochastically_rounded(parameter.data, random).to(dtype)


def stochastically_rounded(values: Tensor, random: torch.Generator | None) -> Tensor:
    """float32 values of any shape, each rounded to one of the two nearest bfloat16 numbers, more likely to the nearer one.

    The mean is unchanged. Returned as float32; infinities and NaN are kept.
    """
    # bfloat16 is float32 without its last 16 bits: noise in them either carries into the higher bits or is cut off.
    noise = torch.randint(1 << 16, values.shape, generator=random, device=values.device, dtype=torch.int32)
    rounded = ((values.view(torch.int32) + noise) & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)
