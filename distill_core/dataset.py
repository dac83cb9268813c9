"""Cached training data, and draws from it that depend on nothing but (seed, step)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .storage import fingerprint


@dataclass(frozen=True, kw_only=True)
class LatentDataset:
    """Latents and text embeddings, computed once."""

    latents: Tensor
    """Clean latents as the network sees them (scaled, about unit variance), (N, C, H, W)."""
    contexts: Tensor
    """Text embeddings, (N, L, D), or (1, L, D) for all."""
    null_context: Tensor | None = None
    """Embedding of the empty caption, (L, D), for caption dropout."""

    def __post_init__(self):
        if self.latents.ndim != 4 or self.contexts.ndim != 3 or len(self.contexts) not in (1, len(self.latents)):
            raise ValueError(
                f"a dataset needs latents (N, C, H, W) and one context (L, D) each, got "
                f"{tuple(self.latents.shape)} and {tuple(self.contexts.shape)}"
            )

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def fingerprint(self) -> str:
        return fingerprint({"latents": self.latents, "contexts": self.contexts})

    def context(self, indices: Tensor) -> Tensor:
        return self.contexts[indices if len(self.contexts) > 1 else torch.zeros_like(indices)]


class Batch(NamedTuple):
    """One training batch, on the CPU."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    context: Tensor


def generator(seed: int, index: int, purpose: str) -> torch.Generator:
    """Random numbers that are a pure function of (seed, index, purpose)."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def indices(step: int, batch_size: int, num_examples: int, seed: int) -> Tensor:
    """Examples of a step, (batch_size,): the data in a new order every epoch, each example once an epoch."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: torch.randperm(num_examples, generator=generator(seed, epoch, "order"))
        for epoch in {p // num_examples for p in positions}
    }
    return torch.stack([orders[p // num_examples][p % num_examples] for p in positions])


def draw(dataset: LatentDataset, step: int, *, batch_size: int, num_timesteps: int, caption_dropout: float, seed: int) -> Batch:
    """The batch of a step: examples, noise, uniform timesteps, some captions replaced by the null caption."""
    random = generator(seed, step, "noise")
    picked = indices(step, batch_size, len(dataset), seed)
    x0, context = dataset.latents[picked].float(), dataset.context(picked).float()
    eps = torch.randn(x0.shape, generator=random)
    t = torch.randint(num_timesteps, (batch_size,), generator=random)
    dropped = torch.rand(batch_size, generator=random) < caption_dropout
    if dataset.null_context is not None:
        context = torch.where(dropped[:, None, None], dataset.null_context.float(), context)
    return Batch(x0, eps, t, context)
