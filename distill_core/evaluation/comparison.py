"""Results of a comparison of models: figures, tables, images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

MEBI = 2**20


COLUMNS = ("model", "parameters", "GMACs", "ms per step", "peak memory (MiB)", "weights (MiB)", "mean distance")


MEANINGS = {
    "GMACs": "billions of multiply-accumulates in one evaluation of the network, for one image.",
    "ms per step": "median time of a step; the models take turns, so that a slowdown of the machine affects all of them.",
    "peak memory": "peak memory of a step, including the model's weights. On a CPU: of all tensors.",
    "weights": "size of the stored weights, which is also the size of the file.",
    "mean distance": "mean squared difference between the predictions of the model and of the first model, over all timesteps.",
    "in brackets": "percentage of the first model's value.",
}


UNEVEN_FROM = 1.25
"""Highest over lowest share of the first model's time, from which the times say little."""
UNEVEN = "The times vary too much between rounds to say more; close other programs and measure again."


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Cost of one model, and distance of its predictions from the first model's."""

    name: str
    parameters: int
    weight_bytes: int
    """Size of the stored weights."""
    gmacs: float
    """Multiply-accumulates of one evaluation for one image, in units of 1e9."""
    ms_of_rounds: tuple[float, ...]
    """Milliseconds of a step in each round; in a round all models take a turn."""
    peak_bytes: int
    """Peak memory of a step, including the model's weights."""
    distances: tuple[float, ...] | None
    """Mean squared difference from the first model's predictions in each timestep bin, least noisy first; None if the
    predictions are not comparable."""

    @property
    def ms_per_step(self) -> float:
        return statistics.median(self.ms_of_rounds)

    @property
    def mean_distance(self) -> float | None:
        return None if self.distances is None else statistics.mean(self.distances)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several models, compared with the first."""

    models: tuple[Measured, ...]
    settings: Mapping[str, str]
    """Conditions of the measurement, in words."""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """Images of each model, (N, 3, H, W) in [-1, 1], image n from the same noise for each; empty if none were drawn."""
    seeds: Sequence[str] = ()
    """Labels of the N images of a model."""

    def rows(self) -> list[list[str]]:
        """Cell texts of the table for `COLUMNS`: one row per model."""
        first, *_ = self.models
        return [_cells(model, None if model is first else first) for model in self.models]

    def summary(self) -> str:
        """Result in words: one sentence per model."""
        first, *others = self.models
        told = [
            f"{model.name} has {model.parameters / first.parameters:.0%} of the parameters of {first.name} and takes "
            f"{model.ms_per_step / first.ms_per_step:.0%} of its time per step{_spread(model, first)}."
            for model in others
        ]
        if any(_is_uneven(model, first) for model in others):
            told.append(UNEVEN)
        return " ".join(told)

    def facts(self) -> dict[str, Any]:
        """All figures, for scripts."""
        rows = [asdict(model) | {"ms_per_step": model.ms_per_step, "mean_distance": model.mean_distance} for model in self.models]
        return {"models": rows, "settings": dict(self.settings)}


def _ratios(model: Measured, first: Measured) -> tuple[float, float]:
    """The lowest and the highest share of the first model's time in one round."""
    ratios = [ours / theirs for ours, theirs in zip(model.ms_of_rounds, first.ms_of_rounds, strict=True)]
    return min(ratios), max(ratios)


def _spread(model: Measured, first: Measured) -> str:
    low, high = _ratios(model, first)
    return f" ({low:.0%} to {high:.0%} in {len(model.ms_of_rounds)} rounds)" if len(model.ms_of_rounds) > 1 else ""


def _is_uneven(model: Measured, first: Measured) -> bool:
    low, high = _ratios(model, first)
    return high > UNEVEN_FROM * low


def _cells(model: Measured, first: Measured | None) -> list[str]:
    def cell(name: str, unit: float, form: str) -> str:
        value = getattr(model, name) / unit
        text = f"{value:,.0f}" if value >= 1000 else f"{value:{form}}"
        return text if first is None else f"{text} ({getattr(model, name) / getattr(first, name):.0%})"

    distance = model.mean_distance
    return [
        model.name,
        cell("parameters", 1, ".0f"),
        cell("gmacs", 1, ".4g"),
        cell("ms_per_step", 1, ".4g"),
        cell("peak_bytes", MEBI, ".1f"),
        cell("weight_bytes", MEBI, ".1f"),
        "reference" if first is None else "none" if distance is None else f"{distance:.3g}",
    ]


def table_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (columns, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)
