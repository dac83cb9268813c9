"""What every benchmark needs to tell its results: tables, intervals, the device in words."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantile of Student's t distribution with 1, 2, ... degrees of freedom."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, a line each."""
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(f"| {' | '.join(row)} |" for row in rows)]


def publish(name: str, lines: Sequence[str]) -> None:
    """Print lines and write them to ``results/NAME.md``."""
    path = RESULTS / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


class Kept:
    """Figures of a benchmark as they come, in ``results/NAME.jsonl``, so that an interrupted one by the same settings goes on.

    complete: all rows are measured; the report of some is printed alone, and leaves that of all as it is.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], complete: bool = True):
        self._name, self._settings, self._complete = name, settings, complete
        self._path = RESULTS / f"{name}.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        entries = [entry for entry in map(json.loads, lines) if entry.pop("settings") == settings]
        self.found = {(entry.pop("row"), entry.pop("seed")): entry for entry in entries}
        """Figures by row and seed."""

    def add(self, row: str, seed: int, figures: Mapping[str, Any]) -> None:
        RESULTS.mkdir(exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"settings": self._settings, "row": row, "seed": seed, **figures}) + "\n")
        self.found[row, seed] = dict(figures)

    def measure(
        self, rows: Iterable[str], num_seeds: int, figures: Callable[[str, int], Mapping[str, Any]]
    ) -> dict[str, list[Mapping[str, Any]]]:
        """Figures of each row, seed by seed; those that are not kept yet come from ``figures(row, seed)``."""
        rows = list(rows)
        for row, seed in tqdm([(row, seed) for seed in range(num_seeds) for row in rows if (row, seed) not in self.found]):
            self.add(row, seed, figures(row, seed))
        return {row: [self.found[row, seed] for seed in range(num_seeds)] for row in rows}

    def publish(self, lines: Sequence[str]) -> None:
        """The report: of all rows it takes the place of the figures, of some it is printed and the figures stay."""
        if self._complete:
            publish(self._name, lines)
            self._path.unlink(missing_ok=True)
        else:
            print(*lines, "", f"Only some rows: not written to results/{self._name}.md", sep="\n")


def device_words() -> str:
    """What it ran on: "CPU, 1 thread", or the name of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def mean_and_margin(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent values, and half the width of its 95 % confidence interval by Student's t."""
    n = len(values)
    if n < 2:
        return values[0], math.nan
    if n - 2 >= len(STUDENT_T):
        raise ValueError(f"intervals are known for up to {len(STUDENT_T) + 1} values, got {n}")
    return statistics.mean(values), STUDENT_T[n - 2] * statistics.stdev(values) / math.sqrt(n)


def with_margin(values: Sequence[float], form: str) -> str:
    """Mean ± half of its interval, both in a format."""
    mean, margin = mean_and_margin(values)
    return f"{mean:{form}} ± {margin:{form.lstrip('+')}}"
