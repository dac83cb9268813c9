"""A start for students of UNets in closed form: the layer before a cut makes up for what the removed blocks added.

What a run of removed blocks adds to its input is fitted by ridge regression from the features that the last layer of the kept
block before it reads in the teacher, and the map is added to the weights of that layer. It is the same at every place of the
image. Only the teacher runs, so a few examples are enough, and no gradients are needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..diffusion.denoiser import Denoiser, tap
from ..networks.architecture import Architecture
from ..networks.layouts import kind
from ..networks.name_map import NameMap
from .recover import Moments, best_ridge, rows_of

LAST_LAYERS = {"resnet": "conv2", "attn": "proj_out", "block": "ff.net.2"}
"""The layer of a block that computes what it adds to its input."""
NUM_ROWS = 256
"""Places of an example's image that are looked at, evenly spaced."""
SAME = 0.9
"""Share of values that are alike in weights that were rounded, maybe twice, and not trained."""


class Cut(NamedTuple):
    """A run of removed blocks behind one that stays, by the teacher's names."""

    block: str
    end: str
    """The last of the run."""

    @property
    def layer(self) -> str:
        """The layer that makes up for the run."""
        return f"{self.block}.{LAST_LAYERS['block' if '.block.' in self.block else kind(self.block)]}"


@dataclass(frozen=True)
class Change:
    """What is added to a layer's weight (out, in) and bias (out,)."""

    weight: Tensor
    bias: Tensor
    explained: float
    """Share of what the removed run adds that it makes up for."""

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


@torch.no_grad()
def changes(teacher: Denoiser, batches: Iterable[tuple], found: Sequence[Cut]) -> dict[Cut, Change]:
    """What to add to the layer before each cut.

    batches: arguments of the denoiser; two examples at least. The strength of the ridge is the one that serves examples best to
    which the map was not fitted.
    """
    halves = {cut: (Moments(), Moments()) for cut in found}
    number = 0
    with (
        tap(teacher, {cut.layer for cut in found}, of_input=True) as features,
        tap(teacher, {name for cut in found for name in cut}) as outputs,
    ):
        for batch in batches:
            teacher(*batch)
            for cut, of_cut in halves.items():
                read, before, after = (
                    _few(rows_of(tensor, torch.float32)) for tensor in (features[cut.layer], outputs[cut.block], outputs[cut.end])
                )
                for i, (x, d) in enumerate(zip(read, after - before, strict=True)):
                    of_cut[(number + i) % 2].add(x, d)
            number += len(batch[0])
    return {cut: _change(*of_cut) for cut, of_cut in halves.items() if all(of_cut)}


def _few(rows: Tensor) -> Tensor:
    return rows[:, :: -(-rows.shape[1] // NUM_ROWS)]


def _change(even: Moments, odd: Moments) -> Change:
    both = even + odd
    fitted = both.fitted(best_ridge(even, odd))
    return Change(fitted[:-1].T.float(), fitted[-1].float(), 1 - both.left_over(fitted) / both.dd)


def refit(student: Denoiser, teacher: Denoiser, mapping: NameMap, batches: Iterable[tuple]) -> dict[Cut, Change]:
    """Change a student that has its teacher's weights so that the layers before its cuts make up for the removed blocks.

    Layers that differ from the teacher's, as those of a student that was trained since, stay as they are. batches: as for
    `changes`. Returns what was changed.
    """
    theirs, ours = teacher.named_parameters(), student.named_parameters()

    def pair(cut: Cut) -> tuple[nn.Parameter, nn.Parameter]:
        weight, bias = (ours[f"{mapping.rename(cut.layer)}.{part}"] for part in ("weight", "bias"))
        return weight, bias

    found = [cut for cut in cuts(teacher.architecture, mapping) if _same(theirs[f"{cut.layer}.weight"], pair(cut)[0])]
    made = changes(teacher, batches, found) if found else {}
    for cut, change in made.items():
        change.add_to(*pair(cut))
    return made


def _same(theirs: Tensor, ours: Tensor) -> bool:
    """Whether a weight is the teacher's, either being rounded; quantised ones, which cannot be compared, are not."""
    if theirs.shape != ours.shape or not theirs.is_floating_point():
        return False
    theirs, ours = theirs.detach(), ours.detach().to(theirs.device)
    return any(
        (one.to(coarser.dtype).float() == coarser.float()).float().mean() > SAME
        for one, coarser in ((ours, theirs), (theirs, ours))
    )
