"""Multiply-accumulate operations of one evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from .conditioning import Label
from .denoiser import Denoiser

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def count_macs(denoiser: Denoiser, latent_shape: tuple[int, int, int], num_tokens: int) -> int:
    """Multiply-accumulates of one forward pass at batch 1, attention included, counted on the running network."""
    return _count(denoiser, latent_shape, num_tokens).get_total_flops() // 2


def macs_by_module(denoiser: Denoiser, latent_shape: tuple[int, int, int], num_tokens: int) -> dict[str, int]:
    """`count_macs` of each module and transformer block, by its canonical name."""
    counted = {
        name.partition(".")[2]: sum(operations.values()) // 2
        for name, operations in _count(denoiser, latent_shape, num_tokens).get_flop_counts().items()
    }
    blocks = sorted(denoiser.architecture.blocks)
    paths = {block: denoiser.path(block) for block in blocks}
    return {block: counted.get(path, 0) for block, path in paths.items()}


@contextlib.contextmanager
def counted_macs() -> Iterator[Callable[[], int]]:
    """While open, count multiply-accumulates, attention included; the function it gives returns the count."""
    with _counter() as counter:
        yield lambda: counter.get_total_flops() // 2


@contextlib.contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Plain matrix products: some versions of torch do not count the fused attention of some devices.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@torch.no_grad()
def _count(denoiser: Denoiser, latent_shape: tuple[int, int, int], num_tokens: int) -> FlopCounterMode:
    x = torch.zeros(1, *latent_shape, device=denoiser.device, dtype=denoiser.dtype)
    context_width, width = denoiser.architecture.context_width, denoiser.architecture.label_width
    assert context_width is not None  # else it could not be built
    context = x.new_zeros(1, num_tokens, context_width)
    label = Label.neutral(width, 1, (8 * x.shape[2], 8 * x.shape[3]), x) if width else None
    with _counter() as counter:
        denoiser(x, torch.zeros(1, dtype=torch.long, device=x.device), context, label)
    return counter
