"""Results of a comparison of models: figures, tables, images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

MEBI = 2**20


def read_names(text: str, default: Sequence[str], setting: str = "names") -> list[str]:
    """Names of models, from a text with commas between them; empty: the default. ``ValueError`` unless each has one of its own."""
    names = [name.strip() for name in text.split(",")] if text.strip() else [*default]
    if not len({*names} - {""}) == len(names) == len(default):
        raise ValueError(f"{setting}: give one unique name per model ({len(default)}), got {text!r}; or leave it empty")
    return names


COLUMNS = (
    "model", "parameters", "GMACs", "ms per step", "s per image", "peak memory (MiB)", "weights (MiB)", "mean distance",
)  # fmt: skip
PER_IMAGE = "s per image"


MEANINGS = {
    "GMACs": "billions of multiply-accumulates in one evaluation of the network, for one image.",
    "ms per step": "median time of a step; the models take turns, so that a slowdown of the machine affects all of them.",
    "s per image": "median time to sample a batch, divided by its images, without text encoder and VAE.",
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
    steps_per_image: float | None = None
    """Steps of a batch, over its images; None if none were sampled."""

    @property
    def seconds_per_image(self) -> float | None:
        """Seconds of sampling an image, without text encoder and VAE."""
        return None if self.steps_per_image is None else self.ms_per_step * self.steps_per_image / 1000

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

    @property
    def columns(self) -> list[str]:
        """Those of `COLUMNS` that were measured."""
        sampled = self.models[0].steps_per_image is not None
        return [name for name in COLUMNS if sampled or name != PER_IMAGE]

    @property
    def meanings(self) -> dict[str, str]:
        """What the columns mean."""
        return {name: text for name, text in MEANINGS.items() if name != PER_IMAGE or name in self.columns}

    def rows(self) -> list[list[str]]:
        """Cell texts of the table for `columns`: one row per model."""
        first, *_ = self.models
        cells = [_cells(model, None if model is first else first) for model in self.models]
        return [[of_model[name] for name in self.columns] for of_model in cells]

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
        derived = ("ms_per_step", "seconds_per_image", "mean_distance")
        rows = [asdict(model) | {name: getattr(model, name) for name in derived} for model in self.models]
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


def _cells(model: Measured, first: Measured | None) -> dict[str, str]:
    def cell(name: str, unit: float, form: str) -> str:
        value = getattr(model, name) / unit
        text = f"{value:,.0f}" if value >= 1000 else f"{value:{form}}"
        return text if first is None else f"{text} ({getattr(model, name) / getattr(first, name):.0%})"

    distance = model.mean_distance
    cells = (
        model.name,
        cell("parameters", 1, ".0f"),
        cell("gmacs", 1, ".4g"),
        cell("ms_per_step", 1, ".4g"),
        "" if model.steps_per_image is None else cell("seconds_per_image", 1, ".3g"),
        cell("peak_bytes", MEBI, ".1f"),
        cell("weight_bytes", MEBI, ".1f"),
        "reference" if first is None else "none" if distance is None else f"{distance:.3g}",
    )
    return dict(zip(COLUMNS, cells, strict=True))


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
