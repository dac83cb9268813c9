"""Sample images during a run, by the student and its teacher from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..base.image_grid import image_rows
from ..base.seeding import generator
from ..base.settings import GUIDANCE, SAMPLER_STEPS, SEEDS, check_settings, setting
from ..base.storage import atomic
from ..diffusion.conditioning import Caption, conditions
from ..diffusion.denoiser import Denoiser
from ..diffusion.sampling import sample


@dataclass(kw_only=True)
class Previews:
    """Which sample images are drawn, and how; the noise is the same every time."""

    captions: Sequence[Caption]
    """One for each image."""
    null: Caption
    """The empty caption, for guidance."""
    latent_shape: tuple[int, int, int]
    """(C, H, W)."""
    decode: Callable[[Tensor], Tensor]
    """Latents (B, C, H, W) -> images (B, 3, H, W) in [-1, 1]."""
    guidance: float = setting(7.5, within=(0, GUIDANCE[1]))
    num_steps: int = setting(20, within=SAMPLER_STEPS)
    seed: int = setting(0, within=SEEDS)
    latest: Path | None = None
    """Path of the newest sample image."""
    _by_teacher: Tensor | None = field(default=None, repr=False)

    def __post_init__(self):
        check_settings(self)

    def draw(
        self, folder: Path, step: int, student: Denoiser, teacher: Denoiser, *, baked: float = 1.0, write: bool = True
    ) -> None:
        """Write ``folder/00000500.png``: the teacher's images above, the student's below.

        baked: guidance scale that the student has learnt; unless it is 1, the teacher samples with it and the student without
        guidance. write: False for a process that only takes part because the student is sharded.
        """
        if self._by_teacher is None:
            self._by_teacher = self._images(teacher, self.guidance if baked == 1 else baked)
        path = folder / f"{step:08d}.png"
        rows = {
            "teacher": self._by_teacher,
            f"student, step {step}": self._images(student, self.guidance if baked == 1 else 1.0),
        }
        if write:
            with atomic(path, overwrite=True) as made:
                image_rows(rows).save(made, format="png")
            self.latest = path

    def _images(self, denoiser: Denoiser, guidance: float) -> Tensor:
        noise = torch.randn(len(self.captions), *self.latent_shape, generator=generator(self.seed, 0, "previews"))
        height, width = (8 * side for side in self.latent_shape[1:])
        context, label, null = conditions(self.captions, self.null, (height, width))
        latents = sample(
            denoiser,
            context,
            null,
            noise=noise,
            label=label,
            num_steps=self.num_steps,
            guidance=guidance,
        )
        return self.decode(latents.cpu()).float().cpu()
