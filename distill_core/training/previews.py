"""Sample images during a run, by the student and its teacher from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..base.image_grid import image_rows, save_png
from ..base.seeding import generator
from ..base.settings import GUIDANCE, SAMPLER_STEPS, SEEDS, check_settings, setting
from ..diffusion.conditioning import Caption, conditions
from ..diffusion.denoiser import Denoiser
from ..diffusion.sampling import sample
from .settings import TrainingSettings


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
    _by_teacher: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        check_settings(self)

    def draw(
        self,
        folder: Path,
        step: int,
        student: Denoiser,
        teacher: Denoiser,
        training: TrainingSettings,
        *,
        of_teacher: str = "teacher",
        write: bool = True,
    ) -> None:
        """Write ``folder/00000500.png``: the teacher's images above, the student's below.

        training: what the student learns; if it learns guidance, the teacher samples with that and the student without, and if it learns
        to sample in a few steps, it samples in as many. of_teacher: the teacher's name; its images are drawn once. write: False for a process that only takes part because the student is sharded.
        """
        learnt = training.guidance != 1
        if of_teacher not in self._by_teacher:
            its_guidance = training.guidance if learnt else self.guidance
            self._by_teacher[of_teacher] = self._images(teacher, training, its_guidance, self.num_steps)
        path, few = folder / f"{step:08d}.png", training.few_steps
        rows = {
            of_teacher + f", {self.num_steps} steps" * bool(few): self._by_teacher[of_teacher],
            f"student, step {step}" + (f", {few} steps" if few else ""): self._images(
                student,
                training,
                1.0 if learnt else self.guidance,
                few or self.num_steps,
                noised_anew=bool(few and training.phases == 1),
            ),
        }
        if write:
            save_png(path, image_rows(rows), overwrite=True)
            self.latest = path

    def _images(
        self, denoiser: Denoiser, training: TrainingSettings, guidance: float, num_steps: int, noised_anew: bool = False
    ) -> Tensor:
        """Drawn in parts, no more at once than are trained on, so that they need no more memory."""
        noise = torch.randn(len(self.captions), *self.latent_shape, generator=generator(self.seed, 0, "previews"))
        anew = generator(self.seed, 1, "previews") if noised_anew else None
        size = max(1, training.batch_size // training.accumulation_steps)
        images = [
            self._part(denoiser, self.captions[first : first + size], noise[first : first + size], guidance, num_steps, anew)
            for first in range(0, len(noise), size)
        ]
        return torch.cat(images)

    def _part(
        self,
        denoiser: Denoiser,
        captions: Sequence[Caption],
        noise: Tensor,
        guidance: float,
        num_steps: int,
        anew: torch.Generator | None,
    ) -> Tensor:
        height, width = (8 * side for side in self.latent_shape[1:])
        context, label, null = conditions(captions, self.null, (height, width))
        latents = sample(denoiser, context, null, noise=noise, label=label, num_steps=num_steps, guidance=guidance, anew=anew)
        return self.decode(latents.cpu()).float().cpu()
