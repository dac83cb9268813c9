"""How well a model draws the scenes it is asked for: the share of right images by category, distance and diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..evaluation.metrics import frechet_distance
from .drawing import as_images, draw_all
from .grammar import CATEGORIES, Scene, prompts
from .judge import ScenesJudge
from .teacher import sampled

KINDS = {"trained": False, "held out": True}
"""Prompts whose combinations the teacher was trained on, and others: whether they are held out."""
NUM_RESAMPLES = 2000


def all_prompts(num_prompts: int, seed: int, *, held_out: bool) -> dict[str, list[Scene]]:
    """Prompts of each category that has some."""
    names = [name for name in CATEGORIES if not (held_out and name == "object")]
    return {name: prompts(name, num_prompts, seed, held_out=held_out) for name in names}


@dataclass(frozen=True)
class Score:
    """Shares of images that show all their prompt says."""

    by_category: dict[str, float]
    interval: tuple[float, float]
    """95 % of `overall`, by the bootstrap over prompts."""

    @property
    def overall(self) -> float:
        """Mean of the categories, each counting the same."""
        return sum(self.by_category.values()) / len(self.by_category)


def score(right: Mapping[str, Sequence[Tensor] | Tensor], seed: int = 0) -> Score:
    """right: by category, whether each image is right, bool (prompts,) or (prompts, images of each)."""
    by_prompt = {name: torch.as_tensor(values).float().reshape(len(values), -1).mean(1) for name, values in right.items()}
    random = torch.Generator().manual_seed(seed)
    drawn = [
        values[torch.randint(len(values), (NUM_RESAMPLES, len(values)), generator=random)].mean(1)
        for values in by_prompt.values()
    ]
    low, high = torch.stack(drawn).mean(0).quantile(torch.tensor([0.025, 0.975])).tolist()
    return Score({name: values.mean().item() for name, values in by_prompt.items()}, (low, high))


class Prompt(NamedTuple):
    """A scene that a model is asked for."""

    kind: str
    """Of `KINDS`."""
    category: str
    scene: Scene


@dataclass(frozen=True)
class Judged:
    """Images of a model, and what the judge finds in them."""

    prompts: list[Prompt]
    images: Tensor
    """(N, 3, 64, 64) in [-1, 1]."""
    right: list[bool]
    """Whether an image shows all its prompt says."""
    frechet_distance: float
    """From real scenes of the same prompts, in the judge's features."""

    def by_category(self, kind: str) -> dict[str, list[bool]]:
        """Which images of a kind are right."""
        found: dict[str, list[bool]] = {}
        for prompt, right in zip(self.prompts, self.right, strict=True):
            if prompt.kind == kind:
                found.setdefault(prompt.category, []).append(right)
        return found

    def score(self, kind: str) -> Score:
        return score({category: torch.tensor(right) for category, right in self.by_category(kind).items()})


def judged(denoiser: Denoiser, *, num_prompts: int, seed: int, **how: Any) -> Judged:
    """Ask a model for scenes of every kind and category; ``how`` as for `teacher.sampled_latents`.

    Noise and prompts depend on the seed alone, so that all models are asked for the same. num_prompts: of each category and
    kind.
    """
    judge, asked = ScenesJudge.bundled(), every_prompt(num_prompts, seed)
    scenes = [prompt.scene for prompt in asked]
    images = sampled(denoiser, scenes, seed=seed, **how)
    distance = frechet_distance(judge.features(images), judge.features(as_images(draw_all(scenes, seed))))
    return Judged(asked, images, judge.agrees(images, scenes).tolist(), distance)


def every_prompt(num_prompts: int, seed: int) -> list[Prompt]:
    """Prompts of every kind and category."""
    return [
        Prompt(kind, category, scene)
        for kind, held_out in KINDS.items()
        for category, scenes in all_prompts(num_prompts, seed, held_out=held_out).items()
        for scene in scenes
    ]


def spread(features: Tensor) -> float:
    """Mean distance between images of one prompt. features: (prompts, images of each, D)."""
    count = features.shape[1]
    return (torch.cdist(features, features).sum((1, 2)) / (count * (count - 1))).mean().item()
