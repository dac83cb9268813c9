"""Discrete noise schedules and exact conversions between the ways a network states its prediction.

Time convention of the whole library: ``t = 0`` is the least noisy timestep, ``t = num_timesteps - 1`` the noisiest, and
``x_t = alpha_t * x0 + sigma_t * eps`` with ``alpha_t**2 + sigma_t**2 = 1`` (variance preserving; Ho et al. 2020,
arXiv 2006.11239, Eq. 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """``alpha_t`` and ``sigma_t``, each shaped to broadcast against a batch ``(B, ...)``."""

    alpha: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """Variance-preserving schedule over discrete timesteps.

    alphas_cumprod: shape ``(num_timesteps,)``, float64, strictly decreasing, in (0, 1); the cumulative signal power.
    """

    alphas_cumprod: Tensor

    def __post_init__(self):
        table = self.alphas_cumprod
        if table.ndim != 1 or not bool((table.diff() < 0).all()) or not bool(((table > 0) & (table < 1)).all()):
            raise ValueError("alphas_cumprod must be one strictly decreasing row of numbers between 0 and 1")

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def at(self, t: Tensor, like: Tensor) -> Coefficients:
        """Coefficients at integer timesteps ``t`` (B,), in the dtype and device of ``like`` (B, ...)."""
        power = self.alphas_cumprod[t.cpu()].reshape(-1, *[1] * (like.ndim - 1))
        # Rounded on the CPU: not every device has float64.
        return Coefficients(*(root.to(like.dtype).to(like.device) for root in (power.sqrt(), (1 - power).sqrt())))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x_t = alpha_t x0 + sigma_t eps`` for clean ``x0`` and unit noise ``eps``, both (B, ...)."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps


def scaled_linear(num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """Stable Diffusion's schedule: betas linear in their square root (Rombach et al. 2022, arXiv 2112.10752)."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
    return NoiseSchedule((1 - betas).cumprod(0))


def from_sigmas(sigmas: Tensor) -> NoiseSchedule:
    """Schedule from the ratio ``sigma_t / alpha_t``, ascending, (num_timesteps,), as k-diffusion and ComfyUI keep it."""
    return NoiseSchedule(1 / (1 + sigmas.detach().cpu().double() ** 2))


class Prediction(NamedTuple):
    """How a network's output relates to clean data and noise: three functions of broadcastable alpha and sigma."""

    target: Callable[[Tensor, Tensor, Coefficients], Tensor]
    """(x0, eps, coefficients) -> what the network should output."""
    to_x0: Callable[[Tensor, Tensor, Coefficients], Tensor]
    """(output, x_t, coefficients) -> x0."""
    to_eps: Callable[[Tensor, Tensor, Coefficients], Tensor]
    """(output, x_t, coefficients) -> eps."""


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(
        target=lambda x0, eps, c: eps,
        to_x0=lambda out, x_t, c: (x_t - c.sigma * out) / c.alpha,
        to_eps=lambda out, x_t, c: out,
    ),
    # v = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv 2202.00512, Sec. 4)
    "v": Prediction(
        target=lambda x0, eps, c: c.alpha * eps - c.sigma * x0,
        to_x0=lambda out, x_t, c: c.alpha * x_t - c.sigma * out,
        to_eps=lambda out, x_t, c: c.sigma * x_t + c.alpha * out,
    ),
    "x0": Prediction(
        target=lambda x0, eps, c: x0,
        to_x0=lambda out, x_t, c: out,
        to_eps=lambda out, x_t, c: (x_t - c.alpha * out) / c.sigma,
    ),
}


def prediction(name: str) -> Prediction:
    """Look a prediction type up by name; ``ValueError`` lists the choices."""
    if name not in PREDICTIONS:
        raise ValueError(f"unknown prediction type {name!r}; choose from {sorted(PREDICTIONS)}")
    return PREDICTIONS[name]
