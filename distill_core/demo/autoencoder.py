"""The autoencoder of the demo: images of 64 x 64 pixels to latents of 4 x 8 x 8 and back, as Stable Diffusion's does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import files

WIDTHS = (32, 64, 128)
NUM_CHANNELS, COPIES = 4, 4
"""Latent channels, and how often each comes in the latents of the demo's transformer, which has Flux's sixteen."""


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class ScenesAutoencoder(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] <-> latents (B, 4, 8, 8) of mean 0 and variance 1."""

    mean: Tensor
    std: Tensor

    def __init__(self):
        super().__init__()
        outer, middle, inner = WIDTHS
        self.encoder = nn.Sequential(
            *(nn.PixelUnshuffle(2), nn.Conv2d(12, outer, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(outer, middle, 3, stride=2, padding=1), nn.ReLU(), Residual(middle)),
            *(nn.Conv2d(middle, inner, 3, stride=2, padding=1), nn.ReLU(), Residual(inner)),
            nn.Conv2d(inner, NUM_CHANNELS, 1),
        )
        self.decoder = nn.Sequential(
            *(nn.Conv2d(NUM_CHANNELS, inner, 3, padding=1), nn.ReLU(), Residual(inner), Residual(inner)),
            *(nn.Conv2d(inner, 4 * middle, 1), nn.PixelShuffle(2), nn.ReLU(), Residual(middle), Residual(middle)),
            *(nn.Conv2d(middle, 4 * outer, 1), nn.PixelShuffle(2), nn.ReLU(), Residual(outer)),
            *(nn.Conv2d(outer, 12, 3, padding=1), nn.PixelShuffle(2)),
        )
        self.register_buffer("mean", torch.zeros(NUM_CHANNELS, 1, 1))
        self.register_buffer("std", torch.ones(NUM_CHANNELS, 1, 1))

    def encode(self, pixels: Tensor) -> Tensor:
        return (self.encoder(pixels) - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents * self.std + self.mean)

    @classmethod
    def bundled(cls) -> ScenesAutoencoder:
        return files.bundled(cls(), "autoencoder")


def copied(latents: Tensor) -> Tensor:
    """Latents (B, 4, H, W) of the autoencoder, as (B, 16, H, W) of the transformer."""
    return latents.repeat_interleave(COPIES, dim=1)


def mean_of_copies(latents: Tensor) -> Tensor:
    """Latents (B, 16, H, W) of the transformer, as (B, 4, H, W) of the autoencoder."""
    return latents.unflatten(1, (NUM_CHANNELS, COPIES)).mean(2)
