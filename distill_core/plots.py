"""Loss curves, tables and sample grids, drawn by matplotlib without any global state, so that a server thread may draw too."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .plan import name_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from .analyse import Analysis
    from .compare import Comparison
    from .plan import PruningPlan

SMALL_PICTURE_PX = 192
"""Pictures whose longer side is at most half of this are enlarged."""
CHART_WIDTH_IN = 9.5
TIMESTEPS, LEAST_DISTANCE = 1000, 1e-12
REMOVED_COLOR, KEPT_COLOR = "#e45756", "#9ecae9"
TERM_COLORS = {"task": "#4c78a8", "output": "#f58518", "feature": "#54a24b", "total": "#333333"}


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
    """Moving geometric average over about ``span`` values, started without bias (Kingma & Ba 2015, Alg. 1), for log scales."""
    average, weight, out = 0.0, 0.0, []
    keep = 1 - 1 / max(1, span)
    for value in values:
        average = keep * average + (1 - keep) * math.log(max(value, 1e-12))
        weight = keep * weight + (1 - keep)
        out.append(math.exp(average / weight))
    return out


def draw_losses(axes: Axes, metrics: Sequence[Mapping[str, float]]) -> None:
    """Each loss term over the steps: every step faint, smoothed bold, on a log scale."""
    steps = [row["step"] for row in metrics]
    for term, color in TERM_COLORS.items():
        if metrics and term in metrics[0]:
            values = [row[term] for row in metrics]
            axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.7)
            axes.plot(steps, smooth(values, len(values) // 40), color=color, label=term, linewidth=1.8)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.25)
    if metrics:
        axes.legend(loc="upper right", framealpha=0.9)


def loss_curve(metrics: Sequence[Mapping[str, float]], title: str = "") -> Image:
    drawing = figure(6.4, 4.2)
    axes = drawing.subplots()
    draw_losses(axes, metrics)
    axes.set_title(title, fontsize=11)
    return to_image(drawing)


def score_chart(analysis: Analysis, plan: PruningPlan, criterion: str) -> Image:
    """Output error and change of every unit as bars, in the order of the network, those that a plan removes in colour."""
    from matplotlib.patches import Patch

    removed = name_map(analysis.teacher, plan).removed
    scores = sorted(analysis.scores, key=lambda score: _place(score.unit.spans[0][0]))
    drawing = figure(10, 1.4 + 0.17 * len(scores))
    panels = drawing.subplots(1, 2, sharey=True)
    colors = [REMOVED_COLOR if score.unit.blocks <= removed else KEPT_COLOR for score in scores]
    for axes, title, values in (
        (panels[0], "output error when passed over", [score.output_error for score in scores]),
        (panels[1], "change of what runs through (1 - cosine)", [score.change for score in scores]),
    ):
        lowest = min((value for value in values if value > 0), default=1e-6)
        axes.barh(range(len(scores)), [max(value, lowest / 2) for value in values], color=colors, height=0.75)
        axes.set(xscale="log", xlim=(lowest / 2, None))
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.margins(y=0.01)
    panels[0].set_yticks(range(len(scores)), [score.unit.name for score in scores], fontsize=7.5)
    panels[0].invert_yaxis()
    drawing.suptitle(f"Units of the UNet, in order; the plan is chosen by {criterion}", fontsize=11)
    handles = [Patch(color=REMOVED_COLOR, label="goes"), Patch(color=KEPT_COLOR, label="stays")]
    drawing.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return to_image(drawing)


def _place(module: str) -> tuple[int, list[int]]:
    """Where a module stands on the way through the network."""
    side, *rest = module.split(".")
    return ("down", "mid", "up").index(side), [int(part) for part in rest if part.isdigit()]


def draw_grid(axes: Axes, pictures: Tensor, columns: int, title: str) -> None:
    """Pictures (N, 1, H, W) in [-1, 1] as one grid with gaps, dark ink on white; a last row that is not full is left out."""
    import torch.nn.functional as F
    from einops import rearrange

    whole = len(pictures) // columns * columns
    framed = F.pad(pictures[:whole].clamp(-1, 1), (1, 1, 1, 1), value=-1)
    axes.imshow(rearrange(framed, "(r c) 1 h w -> (r h) (c w)", c=columns).cpu().numpy(), cmap="gray_r", vmin=-1, vmax=1)
    axes.set_title(title, fontsize=11)
    axes.set_axis_off()


def picture_rows(rows: Mapping[str, Tensor], columns: Sequence[str] = ()) -> Image:
    """Rows of RGB pictures (B, 3, H, W) in [-1, 1], each with its name above it, and the names of columns on top.

    Pictures are of one size, and shown pixel by pixel; small ones are enlarged by a whole factor.
    """
    from PIL import Image, ImageDraw

    height, width = next(iter(rows.values())).shape[-2:]
    factor = max(1, SMALL_PICTURE_PX // max(height, width))
    height, width, count = height * factor, width * factor, max(map(len, rows.values()))
    gap, text_px = max(4, width // 40), max(15, count * width // 64)
    line = 2 * text_px
    sheet = Image.new("RGB", (gap + count * (width + gap), bool(columns) * line + len(rows) * (line + height) + gap), "white")
    drawing, font = ImageDraw.Draw(sheet), _font(text_px)
    for number, name in enumerate(columns[:count]):
        drawing.text((gap + number * (width + gap) + width // 2, line // 2), name, "#555555", font, anchor="mm")
    top = bool(columns) * line
    for name, pictures in rows.items():
        drawing.text((gap, top + line // 2), name, "black", font, anchor="lm")
        top += line
        for number, picture in enumerate(pictures):
            pixels = (picture.detach().cpu().float().permute(1, 2, 0).clamp(-1, 1) + 1).mul(127.5).round().byte().numpy()
            sheet.paste(Image.fromarray(pixels).resize((width, height), 0), (gap + number * (width + gap), top))
        top += height
    return sheet


def _font(size_px: int):
    """The font that comes with matplotlib."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size_px)


def draw_table(axes: Axes, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table; long texts go over several lines, and so do shares in brackets."""
    axes.set_axis_off()
    axes.set_title(title, fontsize=11)
    texts = [[textwrap.fill(_plain(cell).replace(" (", "\n("), 24, replace_whitespace=False) for cell in row] for row in rows]
    grid = axes.table(texts, colLabels=[name.replace(" ", "\n", 1) for name in columns], loc="center", cellLoc="center")
    grid.auto_set_font_size(False)
    grid.set_fontsize(9.5)
    grid.scale(1, 2.4)


def _plain(text: str) -> str:
    """A text that matplotlib shows as it is, and does not take for a formula."""
    return text.replace("$", r"\$")


def table_picture(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Image:
    drawing = figure(CHART_WIDTH_IN, 1.2 + 0.45 * len(rows))
    draw_table(drawing.subplots(), columns, rows, title)
    return to_image(drawing)


def distance_chart(comparison: Comparison) -> Image:
    """How far the answers of each model are from the first one's, over timesteps, on a log scale."""
    drawing = figure(CHART_WIDTH_IN, 4.0)
    axes = drawing.subplots()
    first, *others = comparison.models
    for number, model in enumerate(others, 1):
        if model.distances:
            size = TIMESTEPS / len(model.distances)
            middles = [size * (place + 0.5) for place in range(len(model.distances))]
            values = [max(value, LEAST_DISTANCE) for value in model.distances]
            axes.plot(middles, values, marker="o", color=f"C{number}", label=_plain(model.name))
    axes.set(xlabel="timestep: 0 is a clean picture, 1000 noise alone", ylabel="squared distance", yscale="log", xlim=(0, 1000))
    axes.set_title(f"Distance of the answers from those of {_plain(first.name)}", fontsize=11)
    axes.grid(alpha=0.25)
    if axes.get_lines():
        axes.legend(loc="best", framealpha=0.9)
    return to_image(drawing)


def stacked(pictures: Sequence[Image]) -> Image:
    """Pictures one above the other, in the middle of a white sheet."""
    from PIL import Image

    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, ((sheet.width - picture.width) // 2, top))
        top += picture.height
    return sheet


class Evaluation(NamedTuple):
    """One evaluation of a network while sampling."""

    sigma: float
    number: int
    """Of the model that answered, from 0."""


def route_chart(evaluations: Sequence[Evaluation], names: Sequence[str], boundaries: Sequence[float], title: str = "") -> Image:
    """Noise level of each evaluation of a sampling, in the colour of the model that answered; ``boundaries`` as lines."""
    drawing = figure(7.2, 4.2)
    axes = drawing.subplots()
    axes.plot([e.sigma for e in evaluations], color="#bbbbbb", linewidth=1, zorder=1)
    for number, name in enumerate(names):
        own = [(place, e.sigma) for place, e in enumerate(evaluations) if e.number == number]
        label = f"{name}: {len(own)} evaluation{'s' * (len(own) != 1)}"
        axes.scatter(*zip(*own, strict=True) if own else ([], []), s=42, color=f"C{number}", label=label, zorder=2)
    for boundary in boundaries:
        axes.axhline(boundary, color="#555555", linestyle="--", linewidth=1)
    axes.set(xlabel="evaluation of the network", ylabel="noise level sigma", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", framealpha=0.9)
    axes.set_title(title, fontsize=11)
    return to_image(drawing)
