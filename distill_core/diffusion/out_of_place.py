"""Runs the in-place operations of networks out of place, so that gradients are correct."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .denoiser import instead

_NEW: dict[Callable, Callable] = {
    Tensor.__iadd__: torch.add,
    Tensor.add_: torch.add,
    Tensor.__isub__: torch.sub,
    Tensor.sub_: torch.sub,
    Tensor.__imul__: torch.mul,
    Tensor.mul_: torch.mul,
    Tensor.__itruediv__: torch.div,
    Tensor.div_: torch.div,
}
"""``x += y`` and its like, which torch calls ``x.add_(y)`` -> what computes a new tensor."""


class OutOfPlace(TorchFunctionMode):
    """While open, ``x += y`` on a tensor is ``x = x + y``.

    Blocks of Flux and others add to the tensor they are given. A backward pass that needs its old values, and gradient
    checkpointing, which computes the block a second time from its input, then read the new ones, without any error.
    What assigns the result computes the same; a statement ``x.add_(y)`` would be lost, so it is for networks that have none.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _NEW.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def out_of_place(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, modules compute what they do `OutOfPlace`, also when checkpointing computes them again."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(instead(module, _out_of_place(module.forward)))
        yield


def _out_of_place(forward: Callable) -> Callable:
    def computed(*args: Any, **kwargs: Any) -> Any:
        with OutOfPlace():
            return forward(*args, **kwargs)

    return computed
