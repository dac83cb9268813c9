"""Models side by side: what each costs, and how far its answers and its pictures are from those of the first.

Timesteps count from 0, a clean picture, to 1000, noise alone.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import plots, report
from .dataset import Bucket, LatentDataset, generator
from .denoiser import Denoiser, DiffusersDenoiser, Label
from .evaluate import clip_score, count_macs, feature_distances, output_error
from .files import UNetFile
from .memory import Ledger
from .recipe import DTYPES, PRECISIONS, SEEDS, SIDE_PX, check_range, check_settings
from .storage import atomic, write_text
from .unet import build_unet, load_unet

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_BINS = 10
NUM_WARM_UPS = 2
MOST_SHOWN = 8  # pictures of each model in a grid
MEBI = 2**20
COLUMNS = ("model", "parameters", "GMACs", "ms per step", "peak memory (MiB)", "weights (MiB)", "mean distance")
MEANINGS = {
    "GMACs": "billions of multiply-accumulates in one evaluation of the network, for one picture.",
    "ms per step": "median time of a step, the models in turn, so that what slows the machine slows all of them.",
    "peak memory": "most memory at once of a step, its own weights included. On a CPU: of all tensors.",
    "weights": "size of the network's weights as they are kept; a file of them is as large.",
    "mean distance": "mean squared difference of the model's answers from those of the first model, over all timesteps.",
    "in brackets": "share of the first model's.",
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one model costs, and how far its answers are from the first one's."""

    name: str
    parameters: int
    weight_bytes: int
    """Of the weights as they are kept."""
    gmacs: float
    """Multiply-accumulates of one evaluation for one picture, in units of 1e9."""
    ms_per_step: float
    peak_bytes: int
    """Of a step, the model's weights included."""
    distances: tuple[float, ...] | None
    """Mean squared difference from the first model's answers in each bin of timesteps, the least noisy first; None where
    the answers mean different things."""

    @property
    def mean_distance(self) -> float | None:
        return None if self.distances is None else statistics.mean(self.distances)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several models, the first of which the others are held against."""

    models: tuple[Measured, ...]
    settings: Mapping[str, str]
    """What was measured and how, in words."""
    pictures: Mapping[str, Tensor] = field(default_factory=dict)
    """What each model drew, (N, 3, H, W) in [-1, 1], the same noise in the same place; empty where nothing was drawn."""
    seeds: Sequence[str] = ()
    """What tells the N pictures of a model apart."""

    def rows(self) -> list[list[str]]:
        """Texts of the table, a row each model, for `COLUMNS`."""
        first, *_ = self.models
        return [_cells(model, None if model is first else first) for model in self.models]

    def summary(self) -> str:
        """What came out, a sentence a model."""
        first, *others = self.models
        return " ".join(
            f"{model.name} has {model.parameters / first.parameters:.0%} of the parameters of {first.name} and takes "
            f"{model.ms_per_step / first.ms_per_step:.0%} of its time per step."
            for model in others
        )

    def facts(self) -> dict[str, Any]:
        """All figures, for scripts."""
        rows = [asdict(model) | {"mean_distance": model.mean_distance} for model in self.models]
        return {"models": rows, "settings": dict(self.settings)}


def _cells(model: Measured, first: Measured | None) -> list[str]:
    def cell(name: str, unit: float, form: str) -> str:
        value = getattr(model, name) / unit
        told = f"{value:,.0f}" if value >= 1000 else f"{value:{form}}"
        return told if first is None else f"{told} ({getattr(model, name) / getattr(first, name):.0%})"

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
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (columns, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


# --- measuring ------------------------------------------------------------------------------------------------------


def in_rounds(timed: Sequence[Callable[[], float]], num_rounds: int) -> list[float]:
    """The median of the seconds each tells, all of them called once a round in turn."""
    rounds = [[one() for one in timed] for _ in range(num_rounds)]
    return [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """What it takes to do some work on a device, to its end."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


class Peak:
    """The most memory at once, beyond what was there before."""

    num_bytes = 0


@contextlib.contextmanager
def watched_memory(device: torch.device, weights: Sequence[Tensor] = ()) -> Iterator[Peak]:
    """Tell, once it is closed, the most memory that was needed at once while it was open: on CUDA by the allocator's count, else
    that of all tensors that were made and not freed, ``weights`` and views of them left out."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.num_bytes = torch.cuda.max_memory_allocated(device) - before
    else:
        with Ledger(weights) as ledger:
            yield peak
        peak.num_bytes = ledger.most.total()


RANGES = {"batch_size": (1, 4096), "num_tokens": (1, 4620), "num_rounds": (1, 10_000), "num_examples": (1, 4096), "seed": SEEDS}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How files are compared."""

    size_px: tuple[int, int] = (512, 512)
    """Height and width of the pictures."""
    batch_size: int = 1
    """Pictures in a step."""
    num_tokens: int = 77
    num_rounds: int = 10
    """Timed steps of each model."""
    num_examples: int = 4
    """Examples the distance is measured on, in each bin, if they fill the last batch; else some more."""
    dtype: str | None = None
    """One of `PRECISIONS`; None for fp16 on a GPU and fp32 on a CPU."""
    seed: int = 0

    def __post_init__(self):
        check_settings(self, RANGES)
        for side in self.size_px:
            check_range("size_px", side, (64, SIDE_PX[1]))
        if any(side % 64 for side in self.size_px):
            raise ValueError(f"size_px must be multiples of 64 pixels, got {self.size_px[0]} x {self.size_px[1]}")
        if self.dtype not in (None, *PRECISIONS):
            raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, got {self.dtype}")

    @property
    def num_batches(self) -> int:
        """In how many the distance of a bin is measured, none of them larger than what is timed."""
        return math.ceil(self.num_examples / self.batch_size)


def work(num_models: int, settings: Settings) -> int:
    """Length of a comparison in evaluations, for a progress bar."""
    return num_models * (NUM_WARM_UPS + 1 + settings.num_rounds) + (num_models - 1) * NUM_BINS * settings.num_batches


def compare(files: Mapping[str, UNetFile], settings: Settings, on_evaluation: Callable[[], Any] = lambda: None) -> Comparison:
    """Measure UNets by name, all of them loaded at once; distances are from the first one's answers.

    They are asked about random latents and random captions, which follow from the seed. ``on_evaluation`` is called as often
    as `work` tells. ``ValueError`` names a file that does not go with the first.
    """
    _check(files)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = settings.dtype or ("fp16" if device.type == "cuda" else "fp32")
    dataset = random_data(next(iter(files.values())), settings)
    models = {name: _load(file, device, DTYPES[dtype]) for name, file in files.items()}
    asked = {name: _evaluation(model, dataset, settings.batch_size, on_evaluation) for name, model in models.items()}
    peaks = {name: _peak(model, asked[name]) for name, model in models.items()}
    seconds = in_rounds([partial(seconds_of, ask, device) for ask in asked.values()], settings.num_rounds)
    first, measured = next(iter(models.values())), []
    for (name, model), of_a_step in zip(models.items(), seconds, strict=True):
        measured.append(
            Measured(
                name=name,
                parameters=files[name].architecture.num_parameters,
                weight_bytes=sum(tensor.num_bytes for tensor in files[name].tensors.values()),
                gmacs=macs(files[name], dataset) / 1e9,
                ms_per_step=1000 * of_a_step,
                peak_bytes=peaks[name],
                distances=(0.0,) * NUM_BINS if model is first else _distances(model, first, dataset, settings, on_evaluation),
            )
        )
    height, width = settings.size_px
    said = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}",
        "precision": dtype,
        "pictures": f"{width} x {height} px, {settings.batch_size} in a step, captions of {settings.num_tokens} tokens",
        "time": f"median of {settings.num_rounds} rounds",
        "distance": f"{settings.num_batches * settings.batch_size} examples of random latents and captions in each of "
        f"{NUM_BINS} bins of timesteps, seed {settings.seed}",
    }
    return Comparison(models=tuple(measured), settings=said)


def _check(files: Mapping[str, UNetFile]) -> None:
    if len(files) < 2:
        raise ValueError(f"a comparison needs at least two models, got {len(files)}")
    reads = {
        name: (file.architecture.channels("conv_in")[0], file.architecture.context_width, file.architecture.label_width)
        for name, file in files.items()
    }
    first, *others = reads
    for name, file in files.items():
        try:
            file.sampling.check_trainable()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if file.sampling.noise != files[first].sampling.noise:
            raise ValueError(
                f"{name} does not go with {first}: noise levels differ, {file.sampling.describe()} against "
                f"{files[first].sampling.describe()}; compare models of one noise schedule"
            )
    for name in others:
        if reads[name] != reads[first]:
            raise ValueError(
                f"{name} does not go with {first}: channels of a latent, width of a caption and of a label are "
                f"{reads[name]} against {reads[first]}; compare models of one family"
            )


def random_data(file: UNetFile, settings: Settings) -> LatentDataset:
    """Random latents with random captions of the widths a UNet reads."""
    random, count = generator(settings.seed, 0, "comparison"), max(settings.num_examples, settings.batch_size)
    architecture, (height, width) = file.architecture, settings.size_px
    latents = torch.randn(count, architecture.channels("conv_in")[0], height // 8, width // 8, generator=random)
    contexts = torch.randn(count, settings.num_tokens, architecture.context_width, generator=random)
    told = {}
    if architecture.label_width:
        label = Label.neutral(architecture.label_width, count, settings.size_px, latents)
        told = {"pooled": torch.randn(label.pooled.shape, generator=random), "sizes": label.sizes}
    return LatentDataset([Bucket(latents=latents, contexts=contexts, **told)])


def _load(file: UNetFile, device: torch.device, dtype: torch.dtype) -> Denoiser:
    network = load_unet(file, dtype).requires_grad_(False).to(device)
    return DiffusersDenoiser.of_file(file, network)


def macs(file: UNetFile, dataset: LatentDataset) -> int:
    """Multiply-accumulates of one evaluation for one picture, counted on a network without weights."""
    with torch.device("meta"):
        network = build_unet(file.architecture)
    (bucket,) = dataset.buckets
    denoiser = DiffusersDenoiser(network=network, architecture=file.architecture)
    return count_macs(denoiser, tuple(bucket.latents.shape[1:]), bucket.contexts.shape[1])


def _evaluation(model: Denoiser, dataset: LatentDataset, batch_size: int, on_evaluation: Callable[[], Any]) -> Callable[[], None]:
    """A step of a model: one evaluation of a batch."""
    examples = dataset.read(0, torch.arange(batch_size))
    x, context = (tensor.to(model.device, model.dtype) for tensor in (examples.latents, examples.contexts))
    label = examples.label and examples.label.to(context)
    t = torch.full((batch_size,), model.schedule.num_timesteps // 2, device=model.device)

    @torch.no_grad()
    def evaluate() -> None:
        model(x, t, context, label)
        on_evaluation()

    return evaluate


def _peak(model: Denoiser, evaluate: Callable[[], None]) -> int:
    """Memory of an evaluation, once the device has warmed up."""
    for _ in range(NUM_WARM_UPS):
        evaluate()
    weights = list(model.network.parameters())
    with watched_memory(model.device, weights) as peak:
        evaluate()
    return peak.num_bytes + sum(weight.nbytes for weight in weights)


def _distances(model: Denoiser, first: Denoiser, dataset, settings: Settings, on_batch: Callable[[], Any]) -> tuple[float, ...]:
    """In the first one's terms, so that those of all models mean the same."""
    in_parts = {"num_batches": settings.num_batches, "batch_size": settings.batch_size}
    errors = output_error(first, model, dataset, num_bins=NUM_BINS, **in_parts, seed=settings.seed, on_batch=on_batch)
    return tuple(errors.tolist())


# --- what people look at --------------------------------------------------------------------------------------------


def grid(comparison: Comparison) -> Image:
    """What the models drew: a row each, a column for each seed."""
    shown = {name: pictures[:MOST_SHOWN] for name, pictures in comparison.pictures.items()}
    return plots.picture_rows(shown, comparison.seeds[:MOST_SHOWN])


def chart(comparison: Comparison) -> Image:
    """The table, and the distances over timesteps."""
    return plots.stacked([plots.table_picture(COLUMNS, comparison.rows()), plots.distance_chart(comparison)])


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The pictures of one model, judged by what encoders of pictures and texts see in them."""

    name: str
    frechet_distance: float | None = None
    """To the pictures all are held against; None for those pictures themselves."""
    kernel_distance: float | None = None
    clip_score: float | None = None
    """Mean agreement with the prompt, 0 to 100."""

    COLUMNS = ("model", "Fréchet distance", "kernel distance", "CLIP score")
    MEANINGS = {
        "Fréchet distance": "between the features of the pictures and of those they are held against, Gaussians taken; lower is "
        "closer. It is too high for few pictures, so compare what comes of equally many, of a few hundred or more.",
        "kernel distance": "the same without taking Gaussians, and right on average for few pictures too; around 0 is equal.",
        "CLIP score": "100 times the mean cosine of picture and prompt in CLIP's space, of those below 0 as 0; higher is closer.",
    }  # fmt: skip

    def cells(self) -> dict[str, str]:
        """Texts by column; without the CLIP score where there is none."""
        distances = (self.frechet_distance, self.kernel_distance)
        told = [self.name, *("reference" if value is None else f"{value:.4g}" for value in distances)]
        return dict(zip(self.COLUMNS, told if self.clip_score is None else [*told, f"{self.clip_score:.2f}"], strict=False))


def judge(features: Mapping[str, Tensor], real: Tensor | None = None, text: Tensor | None = None) -> list[Judged]:
    """Judge pictures by their features (N, D), by model: held against ``real`` ones, or else against the first model's.

    text: embedding of the prompt in the same space, (D,); without it there is no CLIP score.
    """
    judged = []
    for number, (name, seen) in enumerate(features.items()):
        held_against = next(iter(features.values())) if real is None else real
        is_reference = real is None and number == 0
        frechet, kernel = (None, None) if is_reference else feature_distances(held_against, seen)
        score = None if text is None else clip_score(seen, text)
        judged.append(Judged(name=name, frechet_distance=frechet, kernel_distance=kernel, clip_score=score))
    return judged


def write_report(
    path: Path,
    comparison: Comparison,
    *,
    title: str,
    judged: Sequence[Judged] = (),
    judged_by: Mapping[str, str] | None = None,
    losses: Image | None = None,
) -> Image:
    """Write a comparison as one HTML file; returns it as one picture.

    judged: each model's pictures, where they were; judged_by: how, in words. losses: a curve of the training.
    """
    parts, pictures = [report.paragraph(comparison.summary())], []

    def show(image: Image, description: str, form: str = "png") -> None:
        parts.append(report.picture(image, description, form))
        pictures.append(image)

    def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], meanings: Mapping[str, str], title: str = "") -> None:
        parts.extend([report.table(columns, rows), report.listing(meanings)])
        pictures.append(plots.table_picture(columns, rows, title))

    if comparison.pictures:
        parts.append(report.heading("The same seeds through every model"))
        show(grid(comparison), "Pictures by each model", "jpeg")
    parts.append(report.heading("Figures"))
    show_table(COLUMNS, comparison.rows(), MEANINGS)
    show(plots.distance_chart(comparison), "Distance of the answers over timesteps")
    if judged:
        parts.append(report.heading("Pictures judged"))
        rows = [one.cells() for one in judged]
        columns = list(rows[0])
        meanings = {name: text for name, text in Judged.MEANINGS.items() if name in columns}
        show_table(columns, [list(row.values()) for row in rows], meanings, "pictures judged")
    if losses:
        parts.append(report.heading("Training"))
        show(losses, "Loss of every step")
    parts.extend([report.heading("Settings"), report.listing({**comparison.settings, **(judged_by or {})})])
    write_text(path, report.page(title, *parts), overwrite=False)
    return plots.stacked(pictures)


def save_chart(path: Path, comparison: Comparison, *, overwrite: bool = False) -> None:
    with atomic(path, overwrite=overwrite) as made:
        chart(comparison).save(made, format="png")
