"""Local healing: each folded block learns to map the teacher's hidden states as its run of blocks does.

The teacher runs without gradients, and each of these blocks is asked by itself, so only single blocks hold activations and
gradients (PPCL, arXiv 2511.16156).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from .losses import FEATURE_LOSSES
from .step import StepInputs, ask


@dataclass
class Hidden:
    """What the first block of a run is given, and what the last one returns."""

    args: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)
    output: Any = None


@contextlib.contextmanager
def hidden_states(denoiser: Denoiser, runs: Mapping[str, tuple[str, str]]) -> Iterator[dict[str, Hidden]]:
    """While open, collect the hidden states around runs of blocks: ``{block: Hidden}``, refilled by every pass.

    runs: as `Denoiser.runs`. The network must compute out of place, or its blocks write over what was collected.
    """
    seen: dict[str, Hidden] = {}

    def enter(block: str):
        return lambda module, args, named: seen.update({block: Hidden(args, dict(named))})

    def leave(block: str):
        return lambda module, args, output: setattr(seen[block], "output", output)

    with contextlib.ExitStack() as stack:
        for block, (first, last) in runs.items():
            hook = denoiser.module(first).register_forward_pre_hook(enter(block), with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(denoiser.module(last).register_forward_hook(leave(block)).remove)
        yield seen


def local_terms(
    student: Denoiser, teacher: Denoiser, inputs: StepInputs, loss: str, autocast: AbstractContextManager
) -> dict[str, Tensor]:
    """How far each block is from the run it stands for, mean over the streams of hidden states: ``{"local/<block>": (B,)}``.

    loss: a key of `FEATURE_LOSSES`. student and teacher share a network.
    """
    with torch.no_grad(), hidden_states(teacher, student.runs) as seen:
        ask(teacher, inputs)
    terms = {}
    for block in list(seen):
        hidden = seen.pop(block)
        with autocast:
            output = student.module(block)(*hidden.args, **hidden.named)
        distances = [FEATURE_LOSSES[loss](*pair) for pair in zip(_streams(output), _streams(hidden.output), strict=True)]
        terms[f"local/{block}"] = torch.stack(distances).mean(0)
    return terms


def _streams(output: Any) -> list[Tensor]:
    return [stream for stream in (output if isinstance(output, tuple) else (output,)) if stream is not None]
