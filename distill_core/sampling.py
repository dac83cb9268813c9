"""Sampling from a denoiser with classifier-free guidance, on the schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .denoiser import Denoiser

_PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}  # as diffusers' schedulers call them


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    context: Tensor,
    null_context: Tensor,
    *,
    noise: Tensor,
    num_steps: int = 20,
    guidance: float = 2.0,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Guided DDIM samples (Song et al. 2021, arXiv 2010.02502; Ho & Salimans 2022, arXiv 2207.12598).

    context: (B, L, D). null_context: (L, D). noise: unit noise (B, C, H, W); equal noise gives equal samples. guidance:
    1 evaluates the network once a step, anything else twice. Returns clean latents (B, C, H, W), float32.
    """
    from diffusers import DDIMScheduler

    alphas = denoiser.schedule.alphas_cumprod
    betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
    scheduler = DDIMScheduler(
        num_train_timesteps=denoiser.schedule.num_timesteps,
        trained_betas=betas.numpy(),
        prediction_type=_PREDICTION_TYPES[denoiser.prediction],
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(num_steps)
    context = context.to(denoiser.device, denoiser.dtype)
    if guidance != 1:
        context = torch.cat([context, null_context.to(context).expand_as(context)])
    x = noise.to(denoiser.device)
    for t in scheduler.timesteps:
        x_in = (torch.cat([x, x]) if guidance != 1 else x).to(denoiser.dtype)
        output = denoiser(x_in, t.expand(len(x_in)).to(denoiser.device), context).float()
        if guidance != 1:
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        x = scheduler.step(output, t, x).prev_sample
        on_step()
    return x
