"""A start for students of UNets in closed form: the layer before a cut makes up for what the removed blocks added.

What a run of removed blocks adds to its input is fitted by ridge regression from the features that the last layer of the kept
block before it reads in the teacher, and the map is added to the weights of that layer. It is the same at every place of the
image. Only the teacher runs, so a few examples are enough, and no gradients are needed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..base.storage import ignore
from ..diffusion.denoiser import Denoiser, tap
from ..networks.architecture import Architecture
from ..networks.layouts import ADDED_BY, kind
from ..networks.name_map import NameMap
from ..pruning.recover import Moments, best_ridge, places
from .step import StepInputs, ask

log = logging.getLogger("distill")
NUM_PLACES = 256
"""Positions sampled per example, evenly spaced."""
RIDGES = (1e-3, 1e-2, 1e-1)
"""Fewer than an analysis tries: the layers of SDXL read up to 5,120 features, and each strength is a system of that size to solve."""


class Cut(NamedTuple):
    """A run of removed blocks behind one that stays, by the teacher's names."""

    block: str
    end: str
    """The last of the run."""

    @property
    def layer(self) -> str:
        """The layer that makes up for the run."""
        return f"{self.block}.{ADDED_BY[kind(self.block)][-1]}"


@dataclass(frozen=True)
class Change:
    """What is added to a layer's weight (out, in) and bias (out,)."""

    weight: Tensor
    bias: Tensor
    explained: float
    """Share of what the removed run adds that it makes up for, in examples it was not fitted to."""

    def add_to(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        """Change a linear layer, or the middle of a convolution's kernel."""
        middle = weight.data[..., weight.shape[-2] // 2, weight.shape[-1] // 2] if weight.ndim == 4 else weight.data
        middle += self.weight.to(middle)
        bias.data += self.bias.to(bias)


def cuts(teacher: Architecture, mapping: NameMap) -> list[Cut]:
    """Every run of removed blocks that a kept block of the same stage, or of the same stack of transformer blocks, can stand for."""
    found = []
    for chain in _chains(teacher):
        block = end = None
        for name in [*chain, None]:
            if name in mapping.removed:
                end = name
                continue
            if block and end:
                found.append(Cut(block, end))
            block, end = name, None
    return found


def _chains(teacher: Architecture) -> Iterator[list[str]]:
    """Blocks that run one after another on tensors of one shape."""
    stages = [*teacher.stages("down"), "mid", *teacher.stages("up")]
    for stage in stages:
        layers = [(f"{stage}.resnet.{number}", f"{stage}.attn.{number}") for number in teacher.numbers(f"{stage}.resnet")]
        yield [block for layer in layers for block in layer if block in teacher.modules]
    for attention in sorted(block for block in teacher.modules if re.search(r"\.attn\.\d+$", block)):
        yield [f"{attention}.block.{number}" for number in teacher.numbers(f"{attention}.block")]


def refit(
    student: Denoiser,
    teacher: Denoiser,
    mapping: NameMap,
    parts: Sequence[Callable[[], StepInputs]],
    on_part: Callable[[int, int], None] = ignore,
) -> dict[Cut, Change]:
    """Change a student that has its teacher's weights so that the layers before its cuts make up for the removed blocks.

    Layers that differ from the teacher's, as those of a student that was trained since, stay as they are. parts: examples, two
    at least. ``on_part(done, total)`` is called before each of them, before each cut is solved, and at the end; an exception it
    raises before the end leaves the student as it was. ``FloatingPointError`` if the teacher's activations are not finite.
    Returns what was changed.
    """
    theirs, ours = teacher.named_parameters(), student.named_parameters()

    def pair(cut: Cut) -> list[nn.Parameter]:
        return [ours[f"{mapping.rename(cut.layer)}.{part}"] for part in ("weight", "bias")]

    def fresh(cut: Cut) -> bool:
        return all(map(_same, (theirs[f"{cut.layer}.{part}"] for part in ("weight", "bias")), pair(cut)))

    there = cuts(teacher.architecture, mapping)
    found = [cut for cut in there if fresh(cut)]
    if len(found) < len(there):
        log.info(
            "%s of %s layers before cuts are not refitted: they differ from the teacher's, or its weights are quantised",
            len(there) - len(found),
            len(there),
        )
    if not found:
        return {}
    total = len(parts) + len(found)
    collected, made = _Collected(found), {}
    for done, part in enumerate(parts):
        on_part(done, total)
        collected.ask(teacher, part())
    for done, cut in enumerate(found, len(parts)):
        on_part(done, total)
        if change := collected.change(cut, teacher.device):
            made[cut] = change
            log.info(
                "%s makes up for %.0f %% of what the removed blocks up to %s add", cut.layer, 100 * change.explained, cut.end
            )
    for cut, change in made.items():
        change.add_to(*pair(cut))
    on_part(total, total)
    return made


class _Collected:
    """What a teacher's layers before cuts read, and what the runs behind them add: in examples with even numbers, and in the others."""

    def __init__(self, found: Sequence[Cut]):
        self._halves = {cut: (Moments(), Moments()) for cut in found}
        self._number = 0

    @torch.no_grad()
    def ask(self, teacher: Denoiser, part: StepInputs) -> None:
        """Collect from some examples more."""
        layers, blocks = {cut.layer for cut in self._halves}, {name for cut in self._halves for name in cut}
        with tap(teacher, layers, of_input=True) as features, tap(teacher, blocks) as outputs:
            ask(teacher, part)
        for cut, halves in self._halves.items():
            read, before, after = (
                places(tensor, NUM_PLACES).float() for tensor in (features[cut.layer], outputs[cut.block], outputs[cut.end])
            )
            if not after.isfinite().all():
                raise FloatingPointError(
                    f"the teacher's {cut.end} is not finite in this precision, so the student cannot be refitted; run the teacher in "
                    "bf16 or fp32, or set refit_examples to 0"
                )
            for half in range(2):
                which = slice((half + self._number) % 2, None, 2)
                halves[half].add(read[which].flatten(0, 1), (after - before)[which].flatten(0, 1))
        self._number += len(part[0])

    def change(self, cut: Cut, device: torch.device) -> Change | None:
        """What to add to the layer before a cut; None if there was only one example. The sums are gone after that.

        device: where to solve, if it is fast in float64.
        """
        halves = self._halves.pop(cut)
        if not all(halves):
            return None
        even, odd = (half.to(device) for half in halves) if device.type == "cuda" else halves
        ridge, missed = best_ridge(even, odd, RIDGES)
        both = even + odd
        fitted = both.fitted(ridge)
        return Change(fitted[:-1].T.float(), fitted[-1].float(), 1 - missed / both.dd if both.dd else 1.0)


def _same(theirs: Tensor, ours: Tensor) -> bool:
    """Whether a weight is the teacher's, one of them being rounded; quantised ones, which cannot be compared, are not."""
    if theirs.shape != ours.shape or not theirs.is_floating_point():
        return False
    theirs, ours = theirs.detach(), ours.detach().to(theirs.device)
    return any(torch.equal(one.to(other.dtype).float(), other.float()) for one, other in ((ours, theirs), (theirs, ours)))
