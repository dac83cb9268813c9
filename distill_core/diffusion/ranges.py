"""Ranges of timesteps, each handled by one student (Zhang & Ma 2024, arXiv 2410.04191).

Range 0 is the noisiest, where sampling begins. A boundary is a timestep, whole or not, and belongs to the range on its less
noisy side: range i holds ``boundaries[i] < t <= boundaries[i - 1]``. In a sampler that is ``sigma <= sigma(boundary)``, so
the less noisy side makes the step that begins at a boundary, as in a sampler that is split there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.documents import one_line
from .schedule import NoiseSchedule

MOST_RANGES = 100
"""Each range has its own student, which must be trained and held in memory."""
_MAX_CHARS = 10_000
"""Longest text of boundaries: enough for one at every timestep of a thousand."""


@dataclass(frozen=True)
class TimestepRanges:
    """Ranges that cover each timestep of a schedule exactly once.

    ``ValueError`` for boundaries that leave a range empty, or make more than `MOST_RANGES`.
    """

    boundaries: tuple[float, ...]
    """Descending; one fewer than there are ranges."""
    num_timesteps: int = 1000

    def __post_init__(self):
        _check_number(len(self.boundaries))
        ends = [math.floor(boundary) if math.isfinite(boundary) else -1 for boundary in self.boundaries]
        if any(low >= high for low, high in zip([*ends, -1], [self.num_timesteps - 1, *ends], strict=True)):
            raise ValueError(
                f"boundaries {_words(self.boundaries)} leave a range without a timestep; give descending timesteps from "
                f"{self.num_timesteps - 2} to 0"
            )

    def __len__(self) -> int:
        return len(self.boundaries) + 1

    def timesteps(self, number: int, overlap: int = 0) -> range:
        """Whole timesteps of a range, and ``overlap`` more from each neighbour."""
        inner = [math.floor(boundary) + 1 for boundary in self.boundaries]
        first, end = [*inner, 0][number], [self.num_timesteps, *inner][number]
        return range(max(0, first - overlap), min(self.num_timesteps, end + overlap))

    def of(self, t: Tensor) -> Tensor:
        """Number of the range that holds each timestep, whole or not, in a tensor of any shape."""
        return in_charge(t, self.boundaries)

    # --- in the units people use

    def sigmas(self, schedule: NoiseSchedule) -> list[float]:
        """Boundaries as noise levels ``sigma / alpha``; between timesteps their logarithm is interpolated."""
        return [sigma_at(schedule, boundary) for boundary in self.boundaries]

    @property
    def percents(self) -> list[float]:
        """Boundaries as shares of a sampling, 0 at its start (all noise) and 1 at its end."""
        return [1 - boundary / (self.num_timesteps - 1) for boundary in self.boundaries]

    def describe(self, schedule: NoiseSchedule) -> str:
        """One line per range: timesteps, share of the sampling, noise levels."""
        sigmas = [math.inf, *self.sigmas(schedule), 0.0]
        percents = [0.0, *self.percents, 1.0]
        lines = []
        for number in range(len(self)):
            held = self.timesteps(number)
            lines.append(
                f"{number}: timesteps {held[-1]} to {held[0]}, {percents[number]:.0%} to {percents[number + 1]:.0%} of the "
                f"sampling, sigma {sigmas[number]:.4g} to {sigmas[number + 1]:.4g}"
            )
        return "\n".join(lines)


def in_charge(levels: Tensor, boundaries: Sequence[float]) -> Tensor:
    """Number of the range each noise level is in, counted from the noisiest; levels and boundaries are timesteps, or sigmas.

    levels: any shape. boundaries: descending; each belongs to the range on its less noisy side.
    """
    ascending = torch.tensor(boundaries[::-1], dtype=torch.float64)
    return (len(ascending) - torch.searchsorted(ascending, levels.cpu().double())).to(levels.device)


def sigma_at(schedule: NoiseSchedule, t: float) -> float:
    """Noise level ``sigma / alpha`` at a timestep, whole or not."""
    logs, low = schedule.noise_ratio.log(), min(math.floor(t), schedule.num_timesteps - 1)
    high = min(low + 1, schedule.num_timesteps - 1)
    return math.exp(torch.lerp(logs[low], logs[high], t - low).item())


def timestep_at(schedule: NoiseSchedule, sigma: float) -> float:
    """Timestep, whole or not, of a noise level, limited to the schedule; the inverse of `sigma_at`."""
    logs, log = schedule.noise_ratio.log(), math.log(max(sigma, 1e-30))
    if log <= logs[0]:
        return 0.0
    if log >= logs[-1]:
        return float(schedule.num_timesteps - 1)
    low = int(torch.searchsorted(logs, log, right=True)) - 1
    return low + ((log - logs[low]) / (logs[low + 1] - logs[low])).item()


# --- ways to choose boundaries --------------------------------------------------------------------------------------


def even(schedule: NoiseSchedule, count: int) -> TimestepRanges:
    """Ranges with equal numbers of timesteps."""
    num = schedule.num_timesteps
    return TimestepRanges(tuple(float(num * i // count - 1) for i in reversed(range(1, count))), num)


def even_log_snr(schedule: NoiseSchedule, count: int) -> TimestepRanges:
    """Ranges of as much logarithm of the signal-to-noise ratio each."""
    first, last = schedule.noise_ratio[[0, -1]].log().tolist()
    levels = (math.exp(first + (last - first) * i / count) for i in reversed(range(1, count)))
    return TimestepRanges(tuple(timestep_at(schedule, level) for level in levels), schedule.num_timesteps)


def balanced(errors: Sequence[float], num_timesteps: int, count: int) -> TimestepRanges:
    """Ranges with errors as even as possible: the largest sum over a range is minimal.

    errors: a student's errors at evenly spaced timesteps, least noisy first, each representing equally many timesteps.
    Solved exactly by dynamic programming over all cuts.
    """
    bins = len(errors)
    if not 1 <= count <= bins:
        raise ValueError(f"{bins} measured errors can be split into 1 to {bins} ranges, got {count}")
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
    return TimestepRanges(tuple(float(num_timesteps * end // bins - 1) for end in ends), num_timesteps)


SPLITS: dict[str, Callable[[NoiseSchedule, int], TimestepRanges]] = {"timesteps": even, "log-snr": even_log_snr}
"""Ways to choose boundaries without a measurement, by what they make even."""


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

    ``ValueError`` for anything that is not a number.
    """
    if len(text) > _MAX_CHARS:
        raise ValueError(f"boundaries may have at most {_MAX_CHARS:,} characters, got {len(text):,}; give fewer")
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
    """Ranges between boundaries as `read_boundaries` takes them, in any order; ``ValueError`` if a range is empty."""
    timesteps = (boundary.timestep(schedule) for boundary in read_boundaries(text))
    return TimestepRanges(tuple(sorted(timesteps, reverse=True)), schedule.num_timesteps)


def _check_number(num_boundaries: int) -> None:
    if num_boundaries >= MOST_RANGES:
        raise ValueError(f"there are {num_boundaries:,} boundaries, but at most {MOST_RANGES - 1} can be used; give fewer")


def _words(boundaries: Sequence[float]) -> str:
    return one_line(", ".join(f"{boundary:g}" for boundary in boundaries))
