"""One teacher, or several: one after another, or mixed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from .dataset import generator
from .denoiser import Denoiser
from .recipe import Recipe

Load = Callable[[], Denoiser]


class Teachers:
    """Which teacher a step learns from, as a pure function of the step; each is loaded when it is first needed.

    SSD-1B learnt from SDXL and then from two of its fine-tunes, in sequence (Gupta et al. 2024, arXiv 2401.02677). In
    sequence only one teacher is in memory at a time; of a mixture all are.
    """

    def __init__(self, load: Sequence[Load], recipe: Recipe):
        shares = recipe.teacher_shares or (1.0,) * len(load)
        if len(shares) != len(load) or not load:
            raise ValueError(f"teacher_shares has {len(shares)} entries, but there are {len(load)} teachers; give one for each")
        self._load, self._recipe, self._loaded = load, recipe, {}
        total = sum(shares)
        self._until = [done / total for done in itertools.accumulate(shares)]

    @classmethod
    def single(cls, teacher: Denoiser, recipe: Recipe) -> Teachers:
        return cls([lambda: teacher], recipe)

    def __len__(self) -> int:
        return len(self._load)

    def number_at(self, step: int) -> int:
        """The teacher of a step, counted from 0."""
        if self._recipe.teacher_mode == "mixture":
            place = torch.rand(1, generator=generator(self._recipe.seed, step, "teacher")).item()
        else:
            place = step / self._recipe.total_steps
        return next((i for i, until in enumerate(self._until) if place < until - 1e-9), len(self) - 1)

    def at(self, step: int) -> Denoiser:
        """The teacher of a step, ready to answer."""
        number = self.number_at(step)
        if number not in self._loaded:
            if self._recipe.teacher_mode == "sequence":
                self._loaded.clear()
            teacher = self._load[number]()
            teacher.network.eval().requires_grad_(False)
            self._loaded[number] = teacher
        return self._loaded[number]
