"""Loss weight of each example by its timestep: min-SNR and others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion.schedule import NoiseSchedule, x0_gain

WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    # Hang et al. 2023, arXiv 2303.09556, Sec. 3.4
    "min-snr": lambda snr, gamma: snr.clamp(max=gamma),
    # Yu et al. 2023, arXiv 2310.08442, Sec. 3.2: 1 / sqrt(SNR) on the error of eps
    "debiased": lambda snr, gamma: snr.sqrt(),
}
"""Weight of an error of x0, as a function of the signal-to-noise ratio (B,) and gamma."""


UNWEIGHTED = "none"


def example_weights(weighting: str, prediction: str, schedule: NoiseSchedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Loss weight of each example at timesteps (B,), (B,) float32, for any prediction type.

    weighting: a key of `WEIGHTINGS`, or ``none`` for 1 everywhere. An error of the prediction is an error of x0 times a
    factor given by the schedule, so one weight of x0 gives each published form: for eps ``min(SNR, gamma) / SNR``, for v
    ``min(SNR, gamma) / (SNR + 1)``.
    """
    if weighting == UNWEIGHTED:
        return torch.ones(len(t), device=t.device)
    return WEIGHTINGS[weighting](schedule.snr(t), gamma) * x0_gain(prediction, schedule, t).square()
