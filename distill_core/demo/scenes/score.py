"""How well a model draws the scenes it is asked for: the share of right pictures by category, distance and diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grammar import CATEGORIES, Scene, prompts

NUM_RESAMPLES = 2000


def all_prompts(num_prompts: int, seed: int, *, held_out: bool) -> dict[str, list[Scene]]:
    """Prompts of each category that has some."""
    names = [name for name in CATEGORIES if not (held_out and name == "object")]
    return {name: prompts(name, num_prompts, seed, held_out=held_out) for name in names}


@dataclass(frozen=True)
class Score:
    """Shares of pictures that show all their prompt says."""

    by_category: dict[str, float]
    interval: tuple[float, float]
    """95 % of `overall`, by the bootstrap over prompts."""

    @property
    def overall(self) -> float:
        """Mean of the categories, each counting the same."""
        return sum(self.by_category.values()) / len(self.by_category)


def score(right: Mapping[str, Sequence[Tensor] | Tensor], seed: int = 0) -> Score:
    """right: by category, whether each picture is right, bool (prompts,) or (prompts, pictures of each)."""
    by_prompt = {name: torch.as_tensor(values).float().reshape(len(values), -1).mean(1) for name, values in right.items()}
    random = torch.Generator().manual_seed(seed)
    drawn = [
        values[torch.randint(len(values), (NUM_RESAMPLES, len(values)), generator=random)].mean(1)
        for values in by_prompt.values()
    ]
    low, high = torch.stack(drawn).mean(0).quantile(torch.tensor([0.025, 0.975])).tolist()
    return Score({name: values.mean().item() for name, values in by_prompt.items()}, (low, high))


def spread(features: Tensor) -> float:
    """Mean distance between pictures of one prompt. features: (prompts, pictures of each, D)."""
    count = features.shape[1]
    return (torch.cdist(features, features).sum((1, 2)) / (count * (count - 1))).mean().item()
