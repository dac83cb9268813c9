"""Loss curves, tables and sample grids, drawn by matplotlib without global state, so that server threads can draw too."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..pruning.folding import middle
from ..pruning.plan import folded, name_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from PIL.Image import Image

    from ..pruning.analyse import Analysis
    from ..pruning.plan import PruningPlan
    from ..pruning.runs import Analysis as RunAnalysis
    from .comparison import Comparison

CHART_WIDTH_IN = 9.5
TIMESTEPS, LEAST_DISTANCE = 1000, 1e-12
REMOVED_COLOR, KEPT_COLOR = "#e45756", "#9ecae9"
TERM_COLORS = {
    "task": "#4c78a8",
    "output": "#f58518",
    "feature": "#54a24b",
    "local": "#b279a2",
    "consistency": "#17a2a2",
    "dmd": "#e45756",
    "diversity": "#eeca3b",
    "fake": "#9d755d",
    "cosine_distance": "#ff9da6",
    "total": "#333333",
}


def figure(width_in: float, height_in: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure((width_in, height_in), layout="constrained", dpi=110)
    FigureCanvasAgg(drawing)
    return drawing


def to_image(drawing: Figure) -> Image:
    from PIL import Image

    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Geometric EMA over about ``span`` values with bias correction (Kingma & Ba 2015, Alg. 1), for log scales."""
    average, weight, out = 0.0, 0.0, []
    keep = 1 - 1 / max(1, span)
    for value in values:
        average = keep * average + (1 - keep) * math.log(max(value, 1e-12))
        weight = keep * weight + (1 - keep)
        out.append(math.exp(average / weight))
    return out


def draw_losses(axes: Axes, metrics: Sequence[Mapping[str, float]]) -> None:
    """Draw each loss term over the steps on a log scale: every step faint, the smoothed curve bold."""
    for term, color in TERM_COLORS.items():
        if measured := [(row["step"], row[term]) for row in metrics if term in row]:
            steps, values = zip(*measured, strict=True)
            axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.7)
            axes.plot(steps, smooth(values, len(values) // 40), color=color, label=term, linewidth=1.8)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.25)
    if metrics:
        axes.legend(loc="best", framealpha=0.9)


def loss_curve(metrics: Sequence[Mapping[str, float]], title: str = "") -> Image:
    drawing = figure(6.4, 4.2)
    axes = drawing.subplots()
    draw_losses(axes, metrics)
    axes.set_title(title, fontsize=11)
    return to_image(drawing)


def score_chart(analysis: Analysis, plan: PruningPlan, criterion: str) -> Image:
    """Bars of every unit by each criterion, in network order; units that a plan removes are coloured."""
    from matplotlib.patches import Patch

    removed = name_map(analysis.teacher, plan).removed
    scores = sorted(analysis.scores, key=lambda score: _place(score.unit.spans[0][0]))
    titles = {
        "recoverability": "error that cannot be recovered",
        "output error": "output error when skipped",
        "similarity": "change from input to output",
    }
    drawing = figure(CHART_WIDTH_IN, 1.4 + 0.17 * len(scores))
    panels = drawing.subplots(1, len(titles), sharey=True)
    colors = [REMOVED_COLOR if score.unit.blocks <= removed else KEPT_COLOR for score in scores]
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        values = [score.by(name) for score in scores]
        lowest = min((value for value in values if value > 0), default=1e-6)
        axes.barh(range(len(scores)), [max(value, lowest / 2) for value in values], color=colors, height=0.75)
        axes.set(xscale="log", xlim=(lowest / 2, None))
        axes.set_title(title, fontsize=10, fontweight="bold" if name == criterion else "normal")
        axes.grid(axis="x", alpha=0.3)
        axes.margins(y=0.01)
    panels[0].set_yticks(range(len(scores)), [score.unit.name for score in scores], fontsize=7.5)
    panels[0].invert_yaxis()
    drawing.suptitle(f"Units of the UNet in network order; plan chosen by {criterion}", fontsize=11)
    handles = [Patch(color=REMOVED_COLOR, label="removed"), Patch(color=KEPT_COLOR, label="kept")]
    drawing.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return to_image(drawing)


def run_chart(analysis: RunAnalysis, plan: PruningPlan) -> Image:
    """Score of every run by the deciding criterion, at the place of its blocks in each list; what a plan folds is shaded."""
    from matplotlib.patches import Patch

    teacher, criterion = analysis.teacher, analysis.settings.criterion
    paths = [path for path in teacher.lists if any(score.run.path == path for score in analysis.scores)]
    drawing = figure(CHART_WIDTH_IN, 1.3 + 2.3 * len(paths))
    folds = folded(teacher, plan)
    for axes, path in zip(drawing.subplots(len(paths), 1, squeeze=False)[:, 0], paths, strict=True):
        for run in folds.get(path, ()):
            axes.axvspan(run[0] - 0.45, run[-1] + 0.45, color=REMOVED_COLOR, alpha=0.25, linewidth=0)
            axes.axvline(middle(run), color=REMOVED_COLOR, linewidth=1.5, linestyle=":")
        lengths = sorted({len(score.run.numbers) for score in analysis.scores if score.run.path == path})
        for length in lengths:
            scores = [score for score in analysis.scores if score.run.path == path and len(score.run.numbers) == length]
            middles = [sum(score.run.numbers) / length for score in scores]
            values = [max(score.by(criterion), LEAST_DISTANCE) for score in scores]
            axes.plot(middles, values, marker="o", markersize=4, label=f"{length} blocks in a row")
        numbers = teacher.numbers(path)
        axes.set(xlabel=f"{teacher.lists[path].word} blocks", yscale="log", xlim=(numbers[0] - 0.5, numbers[-1] + 0.5))
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which("{x:g}")
        axes.locator_params("x", integer=True)
        axes.grid(alpha=0.25)
    handles, labels = drawing.axes[0].get_legend_handles_labels()
    handles += [Patch(color=REMOVED_COLOR, alpha=0.25, label="folded into the dotted block")]
    drawing.legend(handles=handles, loc="outside lower center", ncols=len(labels) + 1, frameon=False)
    drawing.suptitle(f"Runs of blocks of {teacher.title} by {criterion}: the lower, the easier to fold", fontsize=11)
    return to_image(drawing)


def _place(module: str) -> tuple[int, list[int]]:
    """Sort key of a module by its position in the network."""
    side, *rest = module.split(".")
    return ("down", "mid", "up").index(side), [int(part) for part in rest if part.isdigit()]


def draw_prompts(figure: SubFigure, captions: Sequence[str], rows: Mapping[str, Tensor]) -> None:
    """Draw images (N, 3, H, W) in [-1, 1], a row for each name, under their N captions."""
    for row, (name, images) in enumerate(rows.items()):
        for column, image in enumerate(images):
            axes = figure.add_subplot(len(rows), len(captions), row * len(captions) + column + 1, xticks=[], yticks=[])
            axes.imshow((image.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).cpu().numpy())
            if not row:
                axes.set_title(textwrap.fill(captions[column], 16), fontsize=9)
            if not column:
                axes.set_ylabel(name, fontsize=10)


def draw_table(axes: Axes, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Draw a table; long texts and percentages in brackets wrap over several lines."""
    axes.set_axis_off()
    axes.set_title(title, fontsize=11)
    texts = [[textwrap.fill(plain(cell).replace(" (", "\n("), 24, replace_whitespace=False) for cell in row] for row in rows]
    grid = axes.table(texts, colLabels=[name.replace(" ", "\n", 1) for name in columns], loc="center", cellLoc="center")
    grid.auto_set_font_size(False)
    grid.set_fontsize(9.5)
    grid.scale(1, 2.4)


def plain(text: str) -> str:
    """Escape a text so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")


def table_image(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Image:
    drawing = figure(CHART_WIDTH_IN, 1.2 + 0.45 * len(rows))
    draw_table(drawing.subplots(), columns, rows, title)
    return to_image(drawing)


def distance_chart(comparison: Comparison) -> Image:
    """Chart of each model's distance from the first model's predictions, over timesteps, on a log scale."""
    drawing = figure(CHART_WIDTH_IN, 4.0)
    axes = drawing.subplots()
    first, *others = comparison.models
    for number, model in enumerate(others, 1):
        if model.distances:
            size = TIMESTEPS / len(model.distances)
            middles = [size * (place + 0.5) for place in range(len(model.distances))]
            values = [max(value, LEAST_DISTANCE) for value in model.distances]
            axes.plot(middles, values, marker="o", color=f"C{number}", label=plain(model.name))
    axes.set(xlabel="timestep (0: clean image, 1000: pure noise)", ylabel="squared distance", yscale="log", xlim=(0, 1000))
    axes.set_title(f"Distance of the predictions from those of {plain(first.name)}", fontsize=11)
    axes.grid(alpha=0.25)
    if axes.get_lines():
        axes.legend(loc="best", framealpha=0.9)
    return to_image(drawing)


class Evaluation(NamedTuple):
    """One evaluation of a network while sampling."""

    sigma: float
    number: int
    """Index of the model that predicted, from 0."""


def route_chart(evaluations: Sequence[Evaluation], names: Sequence[str], boundaries: Sequence[float], title: str = "") -> Image:
    """Noise level of each evaluation while sampling, coloured by the model that predicted; ``boundaries`` as lines."""
    drawing = figure(7.2, 4.2)
    axes = drawing.subplots()
    axes.plot([e.sigma for e in evaluations], color="#bbbbbb", linewidth=1, zorder=1)
    for number, name in enumerate(names):
        own = [(place, e.sigma) for place, e in enumerate(evaluations) if e.number == number]
        label = f"{name}: {len(own)} evaluation{'s' * (len(own) != 1)}"
        axes.scatter([place for place, _ in own], [sigma for _, sigma in own], s=42, color=f"C{number}", label=label, zorder=2)
    for boundary in boundaries:
        axes.axhline(boundary, color="#555555", linestyle="--", linewidth=1)
    axes.set(xlabel="evaluation of the network", ylabel="noise level sigma", yscale="log")
    axes.locator_params("x", integer=True)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", framealpha=0.9)
    axes.set_title(title, fontsize=11)
    return to_image(drawing)
