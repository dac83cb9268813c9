"""Affine maps that stand in for parts of a network.

A part whose output is nearly an affine map of its input is easy to give up: the layers around it learn that map in a few
steps of training. What such a map leaves over has to be learnt anew, or is lost. The maps act on the channels, are the same
at every place of the image, and are fitted by ridge regression to the model's own activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser, tap

Span = tuple[str, str]
"""First and last module of a part of the network."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths of the ridge that are tried, over the mean square of a channel."""


@dataclass(frozen=True)
class AffineMap:
    """``x + x weight + bias`` over the channels of activations (B, C, H, W) or (B, N, C)."""

    weight: Tensor
    """(C, C)"""
    bias: Tensor
    """(C,)"""

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x), self.bias.to(x)
        if x.ndim == 4:
            return x + torch.einsum("bchw,cd->bdhw", x, weight) + bias[:, None, None]
        return x + x @ weight + bias


class Moments:
    """Sums over rows (x, 1) of a part's input and d of what it adds to it."""

    xx: Tensor | None = None
    xd: Tensor | None = None
    dd = 0.0

    def add(self, x: Tensor, d: Tensor) -> None:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        if not len(x):
            return
        xx, xd = ((x.T @ rows).to("cpu", torch.float64) for rows in (x, d))
        self.xx, self.xd = (new if old is None else old + new for old, new in ((self.xx, xx), (self.xd, xd)))
        self.dd += d.square().sum(dtype=torch.float64).item()

    def __bool__(self) -> bool:
        """Whether it holds any rows."""
        return self.xx is not None

    def to(self, device: torch.device) -> Moments:
        """The same sums on a device that has float64."""
        moved = Moments()
        assert self.xx is not None and self.xd is not None
        moved.xx, moved.xd, moved.dd = self.xx.to(device), self.xd.to(device), self.dd
        return moved

    def __add__(self, other: Moments) -> Moments:
        """The sums over the rows of both, neither being empty."""
        assert self.xx is not None and self.xd is not None and other.xx is not None and other.xd is not None
        both = Moments()
        both.xx, both.xd, both.dd = self.xx + other.xx, self.xd + other.xd, self.dd + other.dd
        return both

    def fitted(self, ridge: float) -> Tensor:
        """The map from (x, 1) to d, (C + 1, C); its constant is free."""
        assert self.xx is not None and self.xd is not None
        penalised = self.xx.clone()
        penalised.diagonal()[:-1] += ridge * self.xx.diagonal()[:-1].mean() + 1e-12
        factor, failed = torch.linalg.cholesky_ex(penalised)
        return torch.linalg.solve(penalised, self.xd) if failed else torch.cholesky_solve(self.xd, factor)

    def left_over(self, fitted: Tensor) -> float:
        """Square of what a map misses of d."""
        assert self.xx is not None and self.xd is not None
        return self.dd - 2 * (fitted * self.xd).sum().item() + (fitted * (self.xx @ fitted)).sum().item()


@torch.no_grad()
def affine_maps(denoiser: Denoiser, batches: Sequence[tuple], spans: Iterable[Span]) -> dict[Span, list[AffineMap]]:
    """Two maps for each span: the first for examples with even numbers, fitted to those with odd numbers, and vice versa.

    Examples are numbered through all batches. Of an input joined with a skip connection, only the part before the joint
    counts. A span whose output has another shape than its input has no map, nor has any if there is only one example.
    """
    spans = list(dict.fromkeys(spans))
    halves: dict[Span, tuple[Moments, Moments]] = {span: (Moments(), Moments()) for span in spans}
    firsts, lasts = ({span[i] for span in spans} for i in range(2))
    number = 0
    with tap(denoiser, lasts) as outputs, tap(denoiser, firsts, of_input=True) as inputs:
        for batch in batches:
            denoiser(*batch)
            for first, last in spans:
                x, y = inputs[first], outputs[last]
                if x.ndim == 4:
                    x = x[:, : y.shape[1]]
                if x.shape == y.shape:
                    entering, leaving = rows_of(x), rows_of(y)
                    for half in range(2):
                        which = slice((half + number) % 2, None, 2)
                        rows = entering[which].flatten(0, 1)
                        halves[first, last][half].add(rows, leaving[which].flatten(0, 1) - rows)
            number += len(batch[0])
    return {span: _maps(*both) for span, both in halves.items() if all(both)}


def _maps(even: Moments, odd: Moments) -> list[AffineMap]:
    ridge, _ = best_ridge(even, odd)
    return [AffineMap(fitted[:-1].float(), fitted[-1].float()) for fitted in (odd.fitted(ridge), even.fitted(ridge))]


def best_ridge(even: Moments, odd: Moments, ridges: Sequence[float] = RIDGES) -> tuple[float, float]:
    """The strength with which maps that are fitted to one half of the examples serve the other half best, and what they miss there."""
    missed = {ridge: even.left_over(odd.fitted(ridge)) + odd.left_over(even.fitted(ridge)) for ridge in ridges}
    best = min(missed, key=missed.__getitem__)
    return best, missed[best]


def rows_of(activations: Tensor) -> Tensor:
    """Activations (B, C, H, W) or (B, N, C) as (B, N, C), in float64 where the device has it."""
    return places(activations).to(torch.float32 if activations.device.type == "mps" else torch.float64)


def places(activations: Tensor, most: int | None = None) -> Tensor:
    """Activations (B, C, H, W) or (B, N, C) as (B, N, C). most: N at most, evenly spaced."""
    rows = activations.flatten(2).transpose(1, 2) if activations.ndim == 4 else activations
    return rows if most is None else rows[:, :: -(-rows.shape[1] // most)]
