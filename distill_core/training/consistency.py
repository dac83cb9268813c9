"""Consistency distillation: the student learns to jump along the teacher's path, from any state on it to the end of its phase.

Where the path starts at ``x_t`` and its phase ends at e, the student's jump is ``f(x_t, t) = alpha_e x0 + sigma_e eps``, x0 and eps
by its one prediction (Wang et al. 2024, arXiv 2405.18407, Eq. 8-10). It is x itself where t is e, whatever the network predicts:
the boundary condition. With one phase e is clean data and f the x0 of a latent consistency model (Luo et al. 2023, arXiv
2310.04378). The teacher goes one short step of its solver from ``x_t``; from there a lagged copy of the student jumps, and the student
learns to land where the copy does (Eq. 13 there).

Times are as in `schedule`: phases end at `CLEAN` or at a timestep from which a sampler of as many steps goes on.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..diffusion.schedule import CLEAN, NoiseSchedule, ddim_step
from .step import StepInputs, ask


class Course(NamedTuple):
    """Where to go from some timesteps, (B,) int64 each, on the CPU."""

    start: Tensor
    step: Tensor
    """Where the teacher's solver goes."""
    end: Tensor
    """Where the phase ends, and the student's jump."""


def course(t: Tensor, schedule: NoiseSchedule, *, phases: int, solver_steps: int, lowest: int = 0) -> Course:
    """The course of states at timesteps (B,).

    phases: number of phases, of equal length. solver_steps: steps the teacher's solver would need for the whole path.
    lowest: the lowest timestep of the student's range; no jump goes beyond where the next range begins.
    """
    # rounded up: there samplers begin their next step
    ends = (torch.arange(phases) * schedule.num_timesteps + phases - 1) // phases + CLEAN
    ends = torch.cat([ends[ends >= lowest], ends.new_tensor([lowest - 1])]).sort().values
    end = ends[torch.searchsorted(ends, t) - 1]  # the highest below t
    stride = max(1, schedule.num_timesteps // solver_steps)
    return Course(t, torch.maximum(t - stride, end), end)


@torch.no_grad()
def landing(target: Denoiser, predicted: Tensor, inputs: StepInputs, way: Course, autocast: AbstractContextManager) -> Tensor:
    """Where the student should land, (B, C, H, W), float32.

    target: the student's lagged copy. predicted: the teacher's prediction for the inputs, of the student's type. autocast: what the
    student computes in.
    """
    x_t, t, context, label = inputs
    x_s = ddim_step(predicted.float(), x_t.float(), way.start, way.step, target.schedule, target.prediction)
    asked = way.step.clamp(min=0)  # nothing is asked about clean data
    with autocast:
        output = ask(target, (x_s, asked.to(t), context, label)).float()
    landed = ddim_step(output, x_s, asked, way.end, target.schedule, target.prediction)
    there = (way.step == way.end).reshape(-1, *[1] * (x_s.ndim - 1))
    return torch.where(there.to(x_s.device), x_s, landed)


def jump(student: Denoiser, predicted: Tensor, x_t: Tensor, way: Course) -> Tensor:
    """Where a prediction of the student takes states ``x_t`` (B, C, H, W): float32, with its gradient."""
    return ddim_step(predicted.float(), x_t.float(), way.start, way.end, student.schedule, student.prediction)
