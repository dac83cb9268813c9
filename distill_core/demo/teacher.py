"""The teacher of scenes, the data it learnt from, and samples of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import LatentDataset
from ..diffusion.conditioning import Caption, Label
from ..diffusion.denoiser import Denoiser, DiffusersDenoiser
from ..diffusion.sampling import sample
from ..networks.files import UNetFile, open_unet
from . import files
from .autoencoder import COPIES, ScenesAutoencoder, mean_of_copies
from .drawing import as_images, draw
from .grammar import Scene, random_scenes
from .text import ScenesTextEncoder

LATENT_SHAPE = (4, 8, 8)
DATA_SEED = 200  # of the scenes that are trained on
ENCODED_AT_ONCE = 250


def teacher_file() -> UNetFile:
    return open_unet(files.DATA / "teacher.safetensors")


def load_denoiser(file: UNetFile) -> DiffusersDenoiser:
    """A denoiser in float32, on the GPU if there is one."""
    from ..networks.build import load_unet

    network = load_unet(file).to("cuda" if torch.cuda.is_available() else "cpu")
    return DiffusersDenoiser.of_file(file, network)


def latents_of(scenes: Sequence[Scene], seed: int, autoencoder: ScenesAutoencoder) -> Tensor:
    """One image of each scene as latents (N, 4, 8, 8)."""
    rng, parts = random.Random(seed), []
    for start in range(0, len(scenes), ENCODED_AT_ONCE):
        pixels = torch.from_numpy(np.stack([draw(scene, rng) for scene in scenes[start : start + ENCODED_AT_ONCE]]))
        with torch.no_grad():
            parts.append(autoencoder.encode(as_images(pixels.permute(0, 3, 1, 2))))
    return torch.cat(parts).contiguous()


@cache
def load_dataset(num_scenes: int = 4096) -> LatentDataset:
    """Scenes that the teacher was trained on, with their captions; none is held out."""
    scenes, text = random_scenes(num_scenes, DATA_SEED), ScenesTextEncoder.bundled()
    latents = latents_of(scenes, DATA_SEED, ScenesAutoencoder.bundled())
    return LatentDataset.of(latents, text.captions([scene.caption for scene in scenes]), text.captions([""])[0])


def sampled_latents(
    denoiser: Denoiser,
    scenes: Sequence[Scene],
    *,
    seed: int,
    guidance: float,
    num_steps: int = 20,
    batch_size: int = 100,
    transformer: bool = False,
    on_step: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Latents (N, 4, 8, 8) of scenes by a model. The noise of each is decided by its place and the seed.

    transformer: whether it reads what the demo's transformer does.

    ``on_step(count)`` is called after each step with the number of images it was for.
    """
    text = ScenesTextEncoder.bundled()
    channels, *size = LATENT_SHAPE
    shape = len(scenes), channels * COPIES if transformer else channels, *size
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    contexts, empty = text.captions([scene.caption for scene in scenes]), text.captions([""])[0]
    null, parts = Caption(empty, empty.mean(0) if transformer else None), []
    for context, x in zip(contexts.split(batch_size), noise.split(batch_size), strict=True):
        label = Label(context.mean(1), torch.zeros(len(x), 6)) if transformer else None
        counted = partial(on_step, len(x))
        drawn = sample(denoiser, context, null, noise=x, label=label, guidance=guidance, num_steps=num_steps, on_step=counted)
        parts.append((mean_of_copies(drawn) if transformer else drawn).cpu())
    return torch.cat(parts)


def sampled(denoiser: Denoiser, scenes: Sequence[Scene], **how: Any) -> Tensor:
    """Images (N, 3, 64, 64) in [-1, 1] of scenes by a model; ``how`` as for `sampled_latents`."""
    latents = sampled_latents(denoiser, scenes, **how)
    with torch.no_grad():
        return torch.cat([ScenesAutoencoder.bundled().decode(part).clamp(-1, 1) for part in latents.split(ENCODED_AT_ONCE)])
