"""Ranges of timesteps, each of which one student is in charge of (Zhang & Ma 2024, arXiv 2410.04191).

Range 0 is the least noisy. A boundary is a timestep, whole or not, and belongs to the range on its less noisy side: range i
holds ``boundaries[i - 1] < t <= boundaries[i]``. In a sampler that is ``sigma <= sigma(boundary)``, so that the step which
begins at a boundary is made by the less noisy side, as by a sampler that was split there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .documents import one_line
from .schedule import NoiseSchedule

MOST_RANGES = 100
"""Each has a student of its own, which has to be trained, and held in memory."""
_MAX_CHARS = 10_000
"""Of boundaries in words: one at every timestep of a thousand."""


@dataclass(frozen=True)
class TimestepRanges:
    """Ranges that cover each timestep of a schedule exactly once.

    ``ValueError`` for boundaries that leave one empty, or are more than `MOST_RANGES` have between them.
    """

    boundaries: tuple[float, ...]
    """Ascending; one fewer than there are ranges."""
    num_timesteps: int = 1000

    def __post_init__(self):
        _check_number(len(self.boundaries))
        ends = [math.floor(boundary) if math.isfinite(boundary) else -1 for boundary in self.boundaries]
        if any(low >= high for low, high in zip([-1, *ends], [*ends, self.num_timesteps - 1], strict=True)):
            raise ValueError(
                f"boundaries {_words(self.boundaries)} leave a range without a timestep; give ascending timesteps from 0 to "
                f"{self.num_timesteps - 2}"
            )

    def __len__(self) -> int:
        return len(self.boundaries) + 1

    def timesteps(self, number: int, overlap: int = 0) -> range:
        """Whole timesteps of a range, and ``overlap`` more of each neighbour's."""
        inner = [math.floor(boundary) + 1 for boundary in self.boundaries]
        first, end = [0, *inner][number], [*inner, self.num_timesteps][number]
        return range(max(0, first - overlap), min(self.num_timesteps, end + overlap))

    def of(self, t: Tensor) -> Tensor:
        """Number of the range of timesteps of any shape, whole or not."""
        return torch.searchsorted(torch.tensor(self.boundaries, dtype=torch.float64), t.cpu().double()).to(t.device)

    # --- in the units people use

    def sigmas(self, schedule: NoiseSchedule) -> list[float]:
        """Boundaries as noise levels ``sigma / alpha``, between timesteps evenly in their logarithm."""
        return [sigma_at(schedule, boundary) for boundary in self.boundaries]

    @property
    def percents(self) -> list[float]:
        """Boundaries as shares of a sampling, 0 where it begins (all noise) and 1 where it ends, ascending in timesteps."""
        return [1 - boundary / (self.num_timesteps - 1) for boundary in self.boundaries]

    def describe(self, schedule: NoiseSchedule) -> str:
        """A line a range, the noisiest first: timesteps, share of the sampling, noise levels."""
        sigmas = [0.0, *self.sigmas(schedule), math.inf]
        percents = [1.0, *self.percents, 0.0]
        lines = []
        for number in reversed(range(len(self))):
            held = self.timesteps(number)
            lines.append(
                f"{number}: timesteps {held[0]} to {held[-1]}, {percents[number + 1]:.0%} to {percents[number]:.0%} of the "
                f"sampling, sigma {sigmas[number]:.4g} to {sigmas[number + 1]:.4g}"
            )
        return "\n".join(lines)


def sigma_at(schedule: NoiseSchedule, t: float) -> float:
    """Noise level ``sigma / alpha`` at a timestep, whole or not."""
    logs, low = schedule.noise_ratio.log(), min(math.floor(t), schedule.num_timesteps - 1)
    high = min(low + 1, schedule.num_timesteps - 1)
    return math.exp(torch.lerp(logs[low], logs[high], t - low).item())


def timestep_at(schedule: NoiseSchedule, sigma: float) -> float:
    """Timestep, whole or not, of a noise level; beyond the schedule its first or last. The inverse of `sigma_at`."""
    logs, log = schedule.noise_ratio.log(), math.log(max(sigma, 1e-30))
    if log <= logs[0]:
        return 0.0
    if log >= logs[-1]:
        return float(schedule.num_timesteps - 1)
    low = int(torch.searchsorted(logs, log, right=True)) - 1
    return low + ((log - logs[low]) / (logs[low + 1] - logs[low])).item()


# --- ways to choose boundaries --------------------------------------------------------------------------------------


def even(schedule: NoiseSchedule, count: int) -> TimestepRanges:
    """Ranges of as many timesteps each."""
    num = schedule.num_timesteps
    return TimestepRanges(tuple(float(num * i // count - 1) for i in range(1, count)), num)


def even_log_snr(schedule: NoiseSchedule, count: int) -> TimestepRanges:
    """Ranges of as much logarithm of the signal-to-noise ratio each."""
    first, last = schedule.noise_ratio[[0, -1]].log().tolist()
    levels = (math.exp(first + (last - first) * i / count) for i in range(1, count))
    return TimestepRanges(tuple(timestep_at(schedule, level) for level in levels), schedule.num_timesteps)


def balanced(errors: Sequence[float], num_timesteps: int, count: int) -> TimestepRanges:
    """Ranges whose errors are as even as can be: the largest sum over a range is the smallest possible.

    errors: what a student errs at evenly spaced timesteps, from the least noisy on, each standing for as many timesteps.
    Solved exactly by dynamic programming over all places to cut.
    """
    bins = len(errors)
    if not 1 <= count <= bins:
        raise ValueError(f"{bins} measured errors can be cut into at most as many ranges, got {count}")
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64).cumsum(0)])
    worst = torch.full((count + 1, bins + 1), math.inf, dtype=torch.float64)
    cut = torch.zeros(count + 1, bins + 1, dtype=torch.int64)
    worst[0, 0] = 0
    for ranges in range(1, count + 1):
        for end in range(ranges, bins + 1):
            starts = torch.arange(ranges - 1, end)
            candidates = torch.maximum(worst[ranges - 1, starts], sums[end] - sums[starts])
            best = candidates.argmin()
            worst[ranges, end], cut[ranges, end] = candidates[best], starts[best]
    ends, end = [], bins
    for ranges in range(count, 1, -1):
        end = int(cut[ranges, end])
        ends.append(end)
    return TimestepRanges(tuple(float(num_timesteps * end // bins - 1) for end in reversed(ends)), num_timesteps)


SPLITS: dict[str, Callable[[NoiseSchedule, int], TimestepRanges]] = {"timesteps": even, "log-snr": even_log_snr}
"""Ways to choose boundaries that need no measurement, by what is even."""


class Boundary(NamedTuple):
    """A boundary in the unit it was given in."""

    value: float
    unit: str
    """``timestep``, ``percent`` of the sampling from 0 to 100, or ``sigma``."""

    def timestep(self, schedule: NoiseSchedule) -> float:
        if self.unit == "sigma":
            return timestep_at(schedule, self.value)
        return (1 - self.value / 100) * (schedule.num_timesteps - 1) if self.unit == "percent" else self.value


def read_boundaries(text: str) -> list[Boundary]:
    """Boundaries as people write them: ``500, 250``; ``50%, 75%`` of the sampling; ``sigma 4.5, 1.2``.

    ``ValueError`` for what is no number.
    """
    if len(text) > _MAX_CHARS:
        raise ValueError(f"boundaries may have {_MAX_CHARS:,} characters, got {len(text):,}; give fewer")
    words = text.strip()
    unit = "sigma" if words.startswith("sigma") else "timestep"
    boundaries, parts = [], words.removeprefix("sigma").replace(",", " ").split()
    _check_number(len(parts))
    for word in parts:
        try:
            value = float(word.removesuffix("%"))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"boundaries must be numbers such as '500, 250', '50%, 75%' or 'sigma 4.5, 1.2', got {one_line(text)!r}"
            )
        boundaries.append(Boundary(value, "percent" if word.endswith("%") else unit))
    return boundaries


def read_ranges(text: str, schedule: NoiseSchedule) -> TimestepRanges:
    """Ranges between boundaries as `read_boundaries` takes them, in any order; ``ValueError`` if one is left empty."""
    timesteps = (boundary.timestep(schedule) for boundary in read_boundaries(text))
    return TimestepRanges(tuple(sorted(timesteps)), schedule.num_timesteps)


def _check_number(num_boundaries: int) -> None:
    if num_boundaries >= MOST_RANGES:
        raise ValueError(f"there are {num_boundaries:,} boundaries, but at most {MOST_RANGES - 1} can be used; give fewer")


def _words(boundaries: Sequence[float]) -> str:
    return one_line(", ".join(f"{boundary:g}" for boundary in boundaries))
