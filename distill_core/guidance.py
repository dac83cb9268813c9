"""Classifier-free guidance: two answers of one network in one pass, combined (Ho & Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

import torch
from torch import Tensor

from .dataset import Caption
from .denoiser import Denoiser, Label


def combined(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """``u + s (c - u)`` (Eq. 6, with s for 1 + w): s of 1 is the conditional answer, beyond it leads away from the other.

    scale: a number, or one for each example, (B,). It is the same in every prediction type, as at a given ``x_t`` each is an
    affine function of any other.
    """
    if isinstance(scale, Tensor):
        scale = scale.to(conditional).reshape(-1, *[1] * (conditional.ndim - 1))
    return unconditional + scale * (conditional - unconditional)


def guided(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None, null: Caption, scale: float | Tensor
) -> Tensor:
    """A denoiser's guided answer (B, C, H, W), float32: by one pass of twice the batch, or where scale is 1 of the batch.

    As `Denoiser.__call__`. null: the empty caption, or a negative prompt, of as many tokens as ``context``; for SDXL it is
    about the same sizes as its example.
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return denoiser(x_t, t, context, label).float()
    both = torch.cat([context, null.context.to(context).expand_as(context)])
    if label is not None:
        pooled = label.pooled if null.pooled is None else null.pooled.to(label.pooled).expand_as(label.pooled)
        label = Label(torch.cat([label.pooled, pooled]), torch.cat([label.sizes, label.sizes]))
    return combined(*denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both, label).float().chunk(2), scale)
