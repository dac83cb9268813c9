"""The two passes of a training step, as the loop runs them and the memory forecast simulates them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..diffusion.conditioning import Caption, Label
from ..diffusion.denoiser import Denoiser
from ..diffusion.guidance import guided
from ..diffusion.schedule import convert
from .objective import Outputs

StepInputs = tuple[Tensor, Tensor, Tensor, Label | None]
"""x_t (B, C, H, W), t (B,), context (B, L, D) and the label, as for `Denoiser.__call__`."""


def ask(denoiser: Denoiser, inputs: StepInputs) -> Tensor:
    """The prediction of a network, in the precision it computes in."""
    x_t, t, context, label = inputs
    context = context.to(denoiser.dtype)
    return denoiser(x_t.to(denoiser.dtype), t, context, label and label.to(context))


@torch.no_grad()
def teacher_outputs(
    teacher: Denoiser,
    features: dict[str, Tensor],
    inputs: StepInputs,
    layers: Mapping[str, str],
    student: Denoiser,
    *,
    null: Caption | None,
    scale: float | Tensor,
) -> Outputs:
    """What a student learns from its teacher: its guided prediction, in the student's prediction type, and its features.

    features: where the teacher's `tap` puts the outputs of its layers; it is emptied. layers: teacher layer -> student layer.
    null, scale: as for `guided`.
    """
    x_t, t, context, label = inputs
    context = context.to(teacher.dtype)
    predicted = guided(teacher, x_t.to(teacher.dtype), t, context, label and label.to(context), null, scale)
    named = {layers[name]: feature for name, feature in features.items()}
    features.clear()
    if teacher.prediction != student.prediction:
        predicted = convert(predicted, x_t, t, student.schedule, teacher.prediction, student.prediction)
    return Outputs(predicted, named)


def student_outputs(
    student: Denoiser,
    features: dict[str, Tensor],
    inputs: StepInputs,
    layers: Mapping[str, str],
    autocast: AbstractContextManager,
) -> Outputs:
    """A student's prediction and its features. features: where its `tap` puts them; those of ``layers`` are removed."""
    with autocast:
        predicted = ask(student, inputs)
    return Outputs(predicted, {name: features.pop(name) for name in layers.values()})
