"""Classifier-free guidance: two predictions of one network in one pass, combined (Ho & Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

import torch
from torch import Tensor

from .conditioning import Caption, Label
from .denoiser import Predictor


def combined(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """``u + s (c - u)`` (Eq. 6, with s for 1 + w): s = 1 is the conditional prediction; larger s leads away from the other.

    scale: a number, or one for each example, (B,). The formula holds for every prediction type, because at a given ``x_t``
    each is an affine function of any other.
    """
    if isinstance(scale, Tensor):
        scale = scale.to(conditional).reshape(-1, *[1] * (conditional.ndim - 1))
    return unconditional + scale * (conditional - unconditional)


def guided(
    denoiser: Predictor, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None, null: Caption | None, scale: float | Tensor
) -> Tensor:
    """A denoiser's guided prediction (B, C, H, W), float32, from one pass of twice the batch, or of the batch if scale is 1.

    As `Denoiser.__call__`. null: the empty caption, or a negative prompt, with as many tokens as ``context``; for SDXL it
    takes the sizes of its example.
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return denoiser(x_t, t, context, label).float()
    if null is None:
        raise ValueError("guidance needs the empty caption, or a negative prompt")
    both = torch.cat([context, null.context.to(context).expand_as(context)])
    if label is not None:
        pooled = label.pooled if null.pooled is None else null.pooled.to(label.pooled).expand_as(label.pooled)
        label = Label(torch.cat([label.pooled, pooled]), torch.cat([label.sizes, label.sizes]))
    conditional, unconditional = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both, label).float().chunk(2)
    return combined(conditional, unconditional, scale)
