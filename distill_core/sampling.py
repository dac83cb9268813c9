"""Deterministic sampling with classifier-free guidance, for every schedule and prediction a denoiser may have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .denoiser import Denoiser, Label
from .schedule import NoiseSchedule, prediction

OnState = Callable[[Tensor, Tensor], None]


def timesteps(schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Timesteps of a sampler, the noisiest first, evenly spaced with the last at ``num_timesteps / num_steps`` ("trailing")."""
    return (schedule.num_timesteps - torch.arange(num_steps) * schedule.num_timesteps / num_steps).round().long() - 1


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    context: Tensor,
    null_context: Tensor,
    *,
    noise: Tensor,
    label: Label | None = None,
    null_label: Label | None = None,
    num_steps: int = 20,
    guidance: float = 2.0,
    on_step: Callable[[], None] = lambda: None,
    on_state: OnState = lambda x_t, t: None,
) -> Tensor:
    """Guided DDIM samples (Song et al. 2021, arXiv 2010.02502, Eq. 12 with eta 0; Ho & Salimans 2022, arXiv 2207.12598).

    On a straight schedule that is Euler's method on the flow. context: (B, L, D). null_context: (L, D). noise: unit noise
    (B, C, H, W); equal noise gives equal samples. label, null_label: for SDXL, of B and of one. guidance: 1 evaluates the
    network once a step, anything else twice. ``on_state(x_t, t)`` is called with each noisy state (B, C, H, W) before the
    network sees it, t an int64 tensor without dimensions. Returns clean latents (B, C, H, W), float32.
    """
    schedule, kind = denoiser.schedule, prediction(denoiser.prediction)
    context = context.to(denoiser.device, denoiser.dtype)
    label = label and label.to(context)
    if guidance != 1:
        context = torch.cat([context, null_context.to(context).expand_as(context)])
        label = label and label.followed_by((null_label or label).to(context))
    steps = timesteps(schedule, num_steps)
    alpha, sigma = (table.float() for table in schedule.at(steps, torch.zeros(num_steps, dtype=torch.float64)))
    x = noise.to(denoiser.device).float()
    for i, t in enumerate(steps):
        on_state(x, t)
        doubled = torch.cat([x, x]) if guidance != 1 else x
        output = denoiser(doubled.to(denoiser.dtype), t.expand(len(doubled)).to(denoiser.device), context, label).float()
        if guidance != 1:
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        now = schedule.at(t[None], x)
        x0, eps = kind.to_x0(output, x, now), kind.to_eps(output, x, now)
        x = x0 if i + 1 == num_steps else alpha[i + 1].item() * x0 + sigma[i + 1].item() * eps
        on_step()
    return x
