"""One teacher, or several in sequence or as a mixture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..base.seeding import generator
from ..diffusion.denoiser import Denoiser, Load
from .settings import TrainingSettings


def shares_of(settings: TrainingSettings, count: int) -> tuple[float, ...]:
    """The share of each of several teachers in a run; ``ValueError`` if their number differs."""
    shares = settings.teacher_shares or (1.0,) * count
    if len(shares) != count or not count:
        raise ValueError(f"teacher_shares has {len(shares)} entries, but there are {count} teachers; give one for each")
    return shares


class Teachers:
    """Selects the teacher of each step, as a pure function of the step; each teacher is loaded when first needed.

    SSD-1B learnt from SDXL and then from two of its fine-tunes, in sequence (Gupta et al. 2024, arXiv 2401.02677). A sequence
    keeps only one teacher in memory at a time, a mixture all of them.
    """

    def __init__(self, load: Sequence[Load], settings: TrainingSettings):
        shares = shares_of(settings, len(load))
        self._load, self._settings = load, settings
        self._loaded: dict[int, Denoiser] = {}
        total = sum(shares)
        self._until = [done / total for done in itertools.accumulate(shares)]

    @classmethod
    def single(cls, teacher: Denoiser, settings: TrainingSettings) -> Teachers:
        return cls([lambda: teacher], settings)

    def __len__(self) -> int:
        return len(self._load)

    def number_at(self, step: int) -> int:
        """Index of a step's teacher, from 0."""
        if self._settings.teacher_mode == "mixture":
            place = torch.rand(1, generator=generator(self._settings.seed, step, "teacher")).item()
        else:
            place = step / self._settings.total_steps
        return next((i for i, until in enumerate(self._until) if place < until - 1e-9), len(self) - 1)

    def at(self, step: int) -> Denoiser:
        """The teacher of a step, ready to predict."""
        number = self.number_at(step)
        if number not in self._loaded:
            if self._settings.teacher_mode == "sequence":
                self._loaded.clear()
            teacher = self._load[number]()
            teacher.network.eval().requires_grad_(False)
            self._loaded[number] = teacher
        return self._loaded[number]
