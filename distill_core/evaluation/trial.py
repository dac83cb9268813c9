"""Trials: networks with random weights on random data, and what a few training steps of them cost.

Nothing is loaded or downloaded: the cost of a network does not depend on its weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..base.precision import DTYPES
from ..base.seeding import generator
from ..data.dataset import Bucket, LatentDataset
from ..diffusion.conditioning import Caption, Label
from ..diffusion.denoiser import DiffusersDenoiser
from ..networks.architecture import Architecture
from ..networks.build import build_unet
from ..pruning.plan import PruningPlan
from ..training.processes import ALONE
from ..training.run import Run
from ..training.settings import TrainingSettings
from ..training.teachers import Teachers
from ..training.trainer import Trainer
from .measuring import seconds_of, watched_memory

WARM_UPS = 1  # the first step makes the optimizer's state
PATTERN_SIZE = 1_000_003  # a prime, so that rows of a layer differ


def random_denoiser(architecture: Architecture, device: torch.device, dtype: str) -> DiffusersDenoiser:
    """A network of small random weights: values like 0 or denormals would be computed faster or slower than real ones."""
    with torch.device("meta"):
        network = build_unet(architecture)
    nn.Module.to(network, DTYPES[dtype])  # diffusers' own `to` warns
    network.to_empty(device=device)
    pattern = torch.rand(PATTERN_SIZE, generator=torch.Generator().manual_seed(0)).to(device, DTYPES[dtype]) * 0.04 - 0.02
    for weight in network.parameters():
        fill(weight, pattern)
    return DiffusersDenoiser(network=network.eval().requires_grad_(False), architecture=architecture)


def fill(weight: Tensor, pattern: Tensor) -> None:
    """Repeat a pattern over a weight, which is much faster than to draw each of its values."""
    flat, whole = weight.data.view(-1), weight.numel() // len(pattern) * len(pattern)
    flat[:whole].view(-1, len(pattern)).copy_(pattern)
    flat[whole:].copy_(pattern[: len(flat) - whole])


def random_data(architecture: Architecture, count: int, size_px: tuple[int, int], num_tokens: int, seed: int) -> LatentDataset:
    """Random latents of images of a size (height, width), random captions of the widths a UNet takes, and an empty one."""
    random, (height, width) = generator(seed, 0, "comparison"), size_px
    if architecture.context_width is None:
        raise ValueError("diffusers builds no UNet of this kind without any attention, so it cannot be compared")
    latents = torch.randn(count, architecture.channels("conv_in")[0], height // 8, width // 8, generator=random)
    contexts = torch.randn(count, num_tokens, architecture.context_width, generator=random)
    conditioning, null = {}, Caption(torch.zeros(num_tokens, architecture.context_width))
    if architecture.label_width:
        label = Label.neutral(architecture.label_width, count, size_px, latents)
        conditioning = {"pooled": torch.randn(label.pooled.shape, generator=random), "sizes": label.sizes}
        null = null._replace(pooled=label.pooled[0])
    return LatentDataset([Bucket(latents=latents, contexts=contexts, **conditioning)], null)


class TrainingCost(NamedTuple):
    """What training steps cost."""

    peak_bytes: int
    """Peak memory of a step, weights and optimizer state included."""
    seconds: list[float]
    """Duration of each timed step."""


def training_cost(
    training: TrainingSettings,
    *,
    student: DiffusersDenoiser,
    teachers: Teachers,
    plan: PruningPlan | None,
    data: LatentDataset,
    on_step: Callable[[], None] = lambda: None,
) -> TrainingCost:
    """Train for ``training.total_steps``: one step to warm up, one for its memory, and the rest timed."""
    with tempfile.TemporaryDirectory() as folder:
        loop = Trainer(Run(Path(folder) / "run", training), student, teachers, plan, data, ALONE)
        with loop.open():
            for step in range(WARM_UPS):
                loop.step(step)
            # What stays between steps is not new memory of a step.
            networks = [student, teachers.at(WARM_UPS)] if loop.settings.uses_teacher else [student]
            weights = {weight for denoiser in networks for weight in denoiser.network.parameters()}
            lasting = [
                tensor
                for tensor in (*weights, *loop.learner.optimizer.state()[0].values())
                if tensor.device.type == student.device.type  # an offloaded teacher's are elsewhere
            ]
            with watched_memory(student.device, lasting) as peak:
                loop.step(WARM_UPS)
            on_step()
            seconds = []
            for step in range(WARM_UPS + 1, training.total_steps):
                seconds.append(seconds_of(partial(loop.step, step), student.device))
                on_step()
    return TrainingCost(peak.num_bytes + sum(tensor.nbytes for tensor in lasting), seconds)
