"""Discrete noise schedules, and exact conversions between prediction types.

Time convention of the whole library: ``t = 0`` is the least noisy timestep, ``t = num_timesteps - 1`` the noisiest, and
``x_t = alpha_t * x0 + sigma_t * eps``; ``t = -1`` is clean data, alpha 1 and sigma 0. Diffusion preserves variance,
``alpha_t**2 + sigma_t**2 = 1`` (Ho et al. 2020, arXiv 2006.11239, Eq. 4); rectified flow takes the straight line, ``alpha_t + sigma_t = 1`` (Liu et al. 2022, arXiv 2209.03003).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.settings import check_choice
from ..networks.model_sampling import FLOW, ZERO_SNR, ModelSampling


class Coefficients(NamedTuple):
    """``alpha_t`` and ``sigma_t``, each shaped to broadcast against a batch ``(B, ...)``."""

    alpha: Tensor
    sigma: Tensor


CLEAN = -1
"""The timestep of clean data."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Amounts of data and of noise at each of the discrete timesteps.

    alphas, sigmas: (num_timesteps,), float64; their ratio sigma / alpha strictly increasing from above 0. ``ValueError``
    for tables that are not a schedule.
    """

    alphas: Tensor
    sigmas: Tensor

    def __post_init__(self):
        one_row = self.alphas.ndim == 1 and self.alphas.shape == self.sigmas.shape
        if not one_row or not bool((self.alphas > 0).all() & (self.sigmas > 0).all() & (self.noise_ratio.diff() > 0).all()):
            raise ValueError("a noise schedule needs one row of alphas and one of sigmas, with sigma / alpha strictly increasing")

    def __eq__(self, other) -> bool:
        return isinstance(other, NoiseSchedule) and torch.equal(self.noise_ratio, other.noise_ratio)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas)

    @property
    def noise_ratio(self) -> Tensor:
        """``sigma_t / alpha_t``, (num_timesteps,): what k-diffusion and ComfyUI call sigma."""
        return self.sigmas / self.alphas

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio ``alpha_t**2 / sigma_t**2`` at integer timesteps (B,), float32, on the device of ``t``."""
        return self.noise_ratio[t.cpu()].pow(-2).float().to(t.device)

    def at(self, t: Tensor, like: Tensor) -> Coefficients:
        """Coefficients at integer timesteps ``t`` (B,), `CLEAN` or above, in the dtype and device of ``like`` (B, ...)."""
        shape = -1, *[1] * (like.ndim - 1)
        index, is_clean = (t := t.cpu()).clamp(min=0), t == CLEAN
        tables = self.alphas[index].masked_fill(is_clean, 1), self.sigmas[index].masked_fill(is_clean, 0)
        # Rounded on the CPU: not every device has float64.
        return Coefficients(*(table.reshape(shape).to(like.dtype).to(like.device) for table in tables))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x_t = alpha_t x0 + sigma_t eps`` for clean ``x0`` and unit noise ``eps``, both (B, ...)."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps


def from_signal_power(alphas_cumprod: Tensor) -> NoiseSchedule:
    """Variance-preserving schedule from the cumulative signal power (num_timesteps,), strictly decreasing in (0, 1)."""
    power = alphas_cumprod.double()
    return NoiseSchedule(power.sqrt(), (1 - power).sqrt())


def scaled_linear(num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """Stable Diffusion's schedule: betas linear in their square root (Rombach et al. 2022, arXiv 2112.10752)."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
    return from_signal_power((1 - betas).cumprod(0))


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Variance-preserving schedule rescaled to end in pure noise (Lin et al. 2024, arXiv 2305.08891, Alg. 1).

    The last timestep keeps a trace of signal, as in ComfyUI, because without signal the ratio of noise to data is infinite.
    """
    first, last = schedule.alphas[0], schedule.alphas[-1]
    power = ((schedule.alphas - last) * first / (first - last)) ** 2
    return from_signal_power(torch.cat([power[:-1], power.new_tensor([4.8973451890853435e-08])]))


def from_noise_ratio(noise_ratio: Tensor) -> NoiseSchedule:
    """Variance-preserving schedule from ``sigma_t / alpha_t``, ascending, (num_timesteps,), as ComfyUI keeps it."""
    return from_signal_power(1 / (1 + noise_ratio.detach().cpu().double() ** 2))


def of_sampling(sampling: ModelSampling) -> NoiseSchedule:
    """Noise schedule of a model; for ``edm`` a thousand levels, evenly spaced in their logarithm as in ComfyUI."""
    if sampling.sigmas:  # of edm
        low, high = map(math.log, sampling.sigmas)
        return from_noise_ratio(torch.linspace(low, high, 1000, dtype=torch.float64).exp())
    if sampling.noise == FLOW:
        return flow()
    return zero_terminal_snr(scaled_linear()) if sampling.noise == ZERO_SNR else scaled_linear()


def flow(num_timesteps: int = 1000, shift: float = 1.0) -> NoiseSchedule:
    """Rectified flow; ``shift`` above 1 spends more timesteps at high noise (Esser et al. 2024, arXiv 2403.03206, Eq. 23)."""
    # The last timestep keeps a trace of signal: without it the ratio of noise to data is infinite.
    even = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / (num_timesteps + 1e-3)
    sigmas = shift * even / (1 + (shift - 1) * even)
    return NoiseSchedule(1 - sigmas, sigmas)


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
        to_x0=lambda out, x_t, c: (c.alpha * x_t - c.sigma * out) / (c.alpha**2 + c.sigma**2),
        to_eps=lambda out, x_t, c: (c.sigma * x_t + c.alpha * out) / (c.alpha**2 + c.sigma**2),
    ),
    "x0": Prediction(
        target=lambda x0, eps, c: x0,
        to_x0=lambda out, x_t, c: out,
        to_eps=lambda out, x_t, c: (x_t - c.alpha * out) / c.sigma,
    ),
    # velocity of the straight line, eps - x0 (Liu et al. 2022, Eq. 1, with time from data to noise)
    "flow": Prediction(
        target=lambda x0, eps, c: eps - x0,
        to_x0=lambda out, x_t, c: (x_t - c.sigma * out) / (c.alpha + c.sigma),
        to_eps=lambda out, x_t, c: (x_t + c.alpha * out) / (c.alpha + c.sigma),
    ),
}


def prediction(name: str) -> Prediction:
    """Prediction type by name; ``ValueError`` lists the choices."""
    check_choice(name, PREDICTIONS, "unknown prediction type")
    return PREDICTIONS[name]


def convert(output: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, source: str, target: str) -> Tensor:
    """A prediction (B, ...) converted from type ``source`` to ``target``; both are keys of `PREDICTIONS`."""
    if source == target:
        return output
    theirs, ours, now = prediction(source), prediction(target), schedule.at(t, x_t)
    return ours.target(theirs.to_x0(output, x_t, now), theirs.to_eps(output, x_t, now), now)


def ddim_step(output: Tensor, x_t: Tensor, t: Tensor, end: Tensor, schedule: NoiseSchedule, source: str) -> Tensor:
    """``alpha_end x0 + sigma_end eps`` (B, ...), by the x0 and eps of a prediction at ``x_t`` (Song et al. 2021, arXiv 2010.02502, Eq. 12).

    t, end: timesteps (B,), end at most t and `CLEAN` or above. source: a key of `PREDICTIONS`. Where end is t, it is ``x_t`` but for
    rounding.
    """
    kind, now, then = prediction(source), schedule.at(t, x_t), schedule.at(end, x_t)
    return then.alpha * kind.to_x0(output, x_t, now) + then.sigma * kind.to_eps(output, x_t, now)


def x0_gain(name: str, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Effect of a prediction error on the clean image: |d x0 / d output| at timesteps (B,), (B,)."""
    zero, one = torch.zeros(len(t), dtype=torch.float64), torch.ones(len(t), dtype=torch.float64)
    gain = prediction(name).to_x0(one, zero, schedule.at(t.cpu(), zero)).abs()
    return gain.float().to(t.device)
