"""Deterministic sampling with classifier-free guidance, for every schedule and prediction of a denoiser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .conditioning import Caption, Label
from .denoiser import Predictor
from .guidance import guided
from .schedule import NoiseSchedule, prediction

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
) -> Tensor:
    """Guided DDIM samples (Song et al. 2021, arXiv 2010.02502, Eq. 12 with eta 0; Ho & Salimans 2022, arXiv 2207.12598).

    On a straight schedule this is Euler's method on the flow. context: (B, L, D). null: the empty caption or a negative prompt.
    noise: unit noise (B, C, H, W); equal noise gives equal samples. label: for SDXL. guidance: 1 evaluates the network once
    per step, any other scale twice; a tensor (B,) gives one scale per example. ``on_state(x_t, t)`` is called with each noisy
    state (B, C, H, W) before the network sees it; t is an int64 tensor without dimensions. Returns clean latents (B, C, H, W),
    float32.
    """
    schedule, kind = denoiser.schedule, prediction(denoiser.prediction)
    context = context.to(denoiser.device, denoiser.dtype)
    label = label and label.to(context)
    steps = timesteps(schedule, num_steps)
    alpha, sigma = (table.float() for table in schedule.at(steps, torch.zeros(num_steps, dtype=torch.float64)))
    x = noise.to(denoiser.device).float()
    for i, t in enumerate(steps):
        on_state(x, t)
        each_t = t.expand(len(x)).to(denoiser.device)
        output = guided(denoiser, x.to(denoiser.dtype), each_t, context, label, null, guidance)
        now = schedule.at(t[None], x)
        x0, eps = kind.to_x0(output, x, now), kind.to_eps(output, x, now)
        x = x0 if i + 1 == num_steps else alpha[i + 1].item() * x0 + sigma[i + 1].item() * eps
        on_step()
    return x
