"""Which blocks of a transformer go, by their places alone: contiguous runs, each folded into its middle block.

The first blocks and the last one stay: leaving out early ones hurts most in every published student (Flux.1-lite, Flux-Mini,
PPCL). Contiguous runs beat scattered blocks in large text-to-image transformers (PPCL, OPPO 2025); longer runs lie in the
middle third. This rule is ours, and unproven until a student cut by it has been taught again.
"""

from __future__ import annotations

from collections.abc import Sequence

HEAD, TAIL = 3, 1
"""Blocks at the ends of a list that stay."""


def between(numbers: Sequence[int], head: int, tail: int) -> Sequence[int]:
    """The numbers without so many at each end; none if the ends meet."""
    return numbers[head : max(0, len(numbers) - tail)]


def runs(numbers: Sequence[int], num_removed: int, *, head: int = HEAD, tail: int = TAIL) -> list[list[int]]:
    """Runs of two or three blocks that each become one, so that so many blocks go.

    numbers: of a list's blocks. head, tail: how many at its ends stay. Runs of three lie in the middle third, those of two
    around them. ``ValueError`` if so many cannot go.
    """
    free = between(numbers, head, tail)
    third = len(free) // 3
    num_long = min(third // 3, num_removed // 2)
    num_short = num_removed - 2 * num_long
    before, after = num_short // 2, num_short - num_short // 2
    first = (len(free) - 3 * num_long) // 2
    if first < 2 * before or len(free) - first - 3 * num_long < 2 * after:
        raise ValueError(
            f"cannot remove {num_removed} of {len(numbers)} blocks in runs of two or three while both ends stay; remove fewer"
        )
    lengths = [2] * before + [3] * num_long + [2] * after
    at, found = first - 2 * before, []
    for length in lengths:
        found.append([*free[at : at + length]])
        at += length
    return found


def middle(run: Sequence[int]) -> int:
    """The block that a run becomes: its middle one, the earlier of two."""
    return run[(len(run) - 1) // 2]
