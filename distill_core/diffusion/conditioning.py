"""Conditioning: captions, and the sizes and crops of SDXL."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Label(NamedTuple):
    """Conditioning of an SDXL besides the caption (Podell et al. 2023, arXiv 2307.01952, Sec. 2.2)."""

    pooled: Tensor
    """Pooled text embedding, (B, 1280)."""
    sizes: Tensor
    """Original height and width, crop from top and left, target height and width, in pixels, (B, 6)."""

    @classmethod
    def neutral(cls, label_width: int, batch: int, size_px: tuple[int, int], like: Tensor) -> Label:
        """Label of an empty caption, for an uncropped image of a height and width."""
        sizes = like.new_tensor([*size_px, 0, 0, *size_px]).expand(batch, 6)
        return cls(like.new_zeros(batch, label_width - 6 * SIZE_CHANNELS), sizes)

    def to(self, like: Tensor) -> Label:
        """Label on the device of ``like``, with the embedding in its precision; the sizes stay exact in float32."""
        return Label(self.pooled.to(like), self.sizes.to(like.device, torch.float32))

    def vector(self) -> Tensor:
        """The single vector that a network in the LDM layout reads, (B, P + 6 * 256): each size as 256 cosines and sines."""
        half = SIZE_CHANNELS // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=self.sizes.device, dtype=torch.float32) / half)
        angles = self.sizes.float()[..., None] * frequencies
        return torch.cat([self.pooled, torch.cat([angles.cos(), angles.sin()], -1).flatten(1).to(self.pooled)], 1)


class Caption(NamedTuple):
    """One encoded text."""

    context: Tensor
    """Text embedding, (L, D)."""
    pooled: Tensor | None = None
    """Pooled text embedding, (P,), of SDXL and Flux.1."""
    padded: bool = False
    """Whether rows of zeros, which are no tokens, make it as long as others; if not, see `tile`."""


def tile(context: Tensor, length: int) -> Tensor:
    """A text embedding (L, D) repeated to a multiple of its length, (length, D).

    Attention to it does not change: each key occurs equally often, so the softmax gives the same mean of values.
    """
    assert length % len(context) == 0
    return context.repeat(length // len(context), 1)


MAX_TOKENS = 60 * 77
"""Longest embedding that captions of different lengths may be tiled to: enough for lengths of 1 to 6 times 77."""


def tiled_length(lengths: Collection[int]) -> int:
    """Number of tokens to which embeddings of some lengths are tiled; ``ValueError`` if it is too large."""
    if (length := lcm(*{*lengths})) > MAX_TOKENS:
        raise ValueError(
            f"captions of {sorted({*lengths})} tokens need a common length of {length:,} tokens, more than {MAX_TOKENS:,}; shorten "
            "the longest captions"
        )
    return length


def pad(context: Tensor, length: int) -> Tensor:
    """A text embedding (L, D) with rows of zeros after it, (length, D). `num_tokens` counts what is before them."""
    return torch.cat([context, context.new_zeros(length - len(context), context.shape[1])])


def num_tokens(contexts: Tensor) -> list[int]:
    """Tokens of each of some captions (B, L, D), without the rows that `pad` added; all L for a tensor without contents."""
    if isinstance(contexts, FakeTensor):
        return [contexts.shape[1]] * len(contexts)
    numbers = torch.arange(1, contexts.shape[1] + 1, device=contexts.device)
    return ((contexts != 0).any(-1) * numbers).amax(-1).tolist()


def conditions(captions: Sequence[Caption], null: Caption, size_px: tuple[int, int]) -> tuple[Tensor, Label | None, Caption]:
    """Conditioning for uncropped images of a height and width: contexts (B, L, D), for SDXL the label, and ``null``.

    Contexts of different lengths, including that of ``null``, are padded or tiled to one length.
    """
    lengths = [len(caption.context) for caption in [*captions, null]]
    length, stretch = (max(lengths), pad) if null.padded else (tiled_length(lengths), tile)
    contexts = torch.stack([stretch(caption.context, length) for caption in captions])
    label = None
    if null.pooled is not None:
        sizes = torch.tensor([[*size_px, 0, 0, *size_px]], dtype=torch.float32).expand(len(captions), 6)
        pooled = [caption.pooled for caption in captions if caption.pooled is not None]
        if len(pooled) < len(captions):
            raise ValueError("some captions have no pooled embedding, which the empty one has; encode all of them alike")
        label = Label(torch.stack(pooled), sizes)
    return contexts, label, null._replace(context=stretch(null.context, length))


SIZE_CHANNELS = 256
