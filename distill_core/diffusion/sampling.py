"""Deterministic sampling with classifier-free guidance, for every schedule and prediction of a denoiser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .conditioning import Caption, Label
from .denoiser import Predictor
from .guidance import guided
from .schedule import CLEAN, NoiseSchedule, ddim_step

OnState = Callable[[Tensor, Tensor], None]


def timesteps(schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Timesteps of a sampler, the noisiest first, evenly spaced with the last at ``num_timesteps / num_steps`` ("trailing")."""
    return (schedule.num_timesteps - torch.arange(num_steps) * schedule.num_timesteps / num_steps).round().long() - 1


@torch.no_grad()
def sample(
    denoiser: Predictor,
    context: Tensor,
    null: Caption,
    *,
    noise: Tensor,
    label: Label | None = None,
    num_steps: int = 20,
    guidance: float | Tensor = 2.0,
    on_step: Callable[[], None] = lambda: None,
    on_state: OnState = lambda x_t, t: None,
    anew: torch.Generator | None = None,
) -> Tensor:
    """Guided DDIM samples (Song et al. 2021, arXiv 2010.02502, Eq. 12 with eta 0; Ho & Salimans 2022, arXiv 2207.12598).

    On a straight schedule this is Euler's method on the flow. context: (B, L, D). null: the empty caption or a negative prompt.
    noise: unit noise (B, C, H, W); equal noise gives equal samples. label: for SDXL. guidance: 1 evaluates the network once
    per step, any other scale twice; a tensor (B,) gives one scale per example. ``on_state(x_t, t)`` is called with each noisy
    state (B, C, H, W) before the network sees it; t is an int64 tensor without dimensions. anew: each step predicts clean latents,
    and noise from this generator is added to them again, as consistency models are sampled (Song et al. 2023, arXiv 2303.01469,
    Alg. 1) and the sampler lcm does. Returns clean latents (B, C, H, W), float32.
    """
    schedule = denoiser.schedule
    context = context.to(denoiser.device, denoiser.dtype)
    label = label and label.to(context)
    steps = timesteps(schedule, num_steps)
    x = noise.to(denoiser.device).float()
    for t, end in zip(steps, [*steps[1:], torch.tensor(CLEAN)], strict=True):
        on_state(x, t)
        each_t = t.expand(len(x)).to(denoiser.device)
        output = guided(denoiser, x.to(denoiser.dtype), each_t, context, label, null, guidance)
        if anew is None:
            x = ddim_step(output, x, t[None], end[None], schedule, denoiser.prediction)
        else:
            x0 = ddim_step(output, x, t[None], torch.tensor([CLEAN]), schedule, denoiser.prediction)
            fresh = torch.randn(x.shape, generator=anew).to(x)
            x = schedule.add_noise(x0, fresh, end[None])
        on_step()
    return x
