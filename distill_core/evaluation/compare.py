"""Comparison of models: the cost of each, and the distance of its predictions and images from those of the first.

Timesteps count from 0, a clean image, to 1000, pure noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base.image_grid import image_rows, save_png, stacked
from ..base.precision import DTYPES, PRECISIONS
from ..base.settings import SEEDS, SIDE_PX, check_settings, setting
from ..base.storage import write_text
from ..data.dataset import LatentDataset
from ..diffusion.denoiser import Denoiser, DiffusersDenoiser
from ..networks.build import load_unet
from ..networks.files import UNetFile
from . import plots, report
from .catalog import macs_of
from .comparison import Comparison, Measured
from .measuring import device_words, each_round, peak_of, seconds_of
from .metrics import clip_score, feature_distances, mean_cosine_distance, output_error
from .trial import random_data
from .votes import votes_page

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_BINS = 10
NUM_WARM_UPS = 2
MOST_SHOWN = 8  # images of each model in a grid


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a comparison."""

    size_px: tuple[int, int] = setting((512, 512), "Height and width of the images.", within=(64, SIDE_PX[1]))
    batch_size: int = setting(1, "Images per step.", within=(1, 4096))
    num_tokens: int = setting(77, "Tokens of a caption.", within=(1, 4620))
    num_rounds: int = setting(10, "Timed steps of each model.", within=(1, 10_000))
    num_examples: int = setting(4, "Examples per bin for the distance, rounded up to full batches.", within=(1, 4096))
    dtype: str | None = setting(
        None, "Precision of weights and computation.", unset="fp16 on a GPU, fp32 on a CPU", choices=PRECISIONS
    )
    seed: int = setting(0, "Seed of latents, captions and noise.", within=SEEDS)

    def __post_init__(self):
        check_settings(self)
        if any(side % 64 for side in self.size_px):
            raise ValueError(f"size_px must be multiples of 64 pixels, got {self.size_px[0]} x {self.size_px[1]}")

    @property
    def num_batches(self) -> int:
        """Batches per bin for the distance; each has the size of the timed batch."""
        return math.ceil(self.num_examples / self.batch_size)


def work(num_models: int, settings: Settings) -> int:
    """Number of evaluations in a comparison, for a progress bar."""
    return num_models * (NUM_WARM_UPS + 1 + settings.num_rounds) + (num_models - 1) * NUM_BINS * settings.num_batches


def compare(files: Mapping[str, UNetFile], settings: Settings, on_evaluation: Callable[[], Any] = lambda: None) -> Comparison:
    """Measure UNets by name, all loaded at once; distances are from the predictions of the first.

    Inputs are random latents and random captions, determined by the seed. ``on_evaluation`` is called as many times as `work`
    returns. ``ValueError`` names a file that cannot be compared with the first.
    """
    _check(files)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = settings.dtype or ("fp16" if device.type == "cuda" else "fp32")
    count = max(settings.num_examples, settings.batch_size)
    architecture = next(iter(files.values())).architecture
    dataset = random_data(architecture, count, settings.size_px, settings.num_tokens, settings.seed)
    models = {name: _load(file, device, DTYPES[dtype]) for name, file in files.items()}
    asked = {name: _evaluation(model, dataset, settings.batch_size, on_evaluation) for name, model in models.items()}
    peaks = {name: peak_of(asked[name], list(model.network.parameters()), device, NUM_WARM_UPS) for name, model in models.items()}
    seconds = each_round([partial(seconds_of, ask, device) for ask in asked.values()], settings.num_rounds)
    height, width = settings.size_px
    first, measured = next(iter(models.values())), []
    for (name, model), of_rounds in zip(models.items(), seconds, strict=True):
        measured.append(
            Measured(
                name=name,
                parameters=files[name].architecture.num_parameters,
                weight_bytes=sum(tensor.num_bytes for tensor in files[name].tensors.values()),
                gmacs=macs_of(
                    files[name].architecture, (models[name].latent_channels, height // 8, width // 8), settings.num_tokens
                )
                / 1e9,
                ms_of_rounds=tuple(1000 * of_a_step for of_a_step in of_rounds),
                peak_bytes=peaks[name],
                distances=(0.0,) * NUM_BINS if model is first else _distances(model, first, dataset, settings, on_evaluation),
            )
        )
    said = {
        "device": device_words(device),
        "precision": dtype,
        "images": f"{width} x {height} px, {settings.batch_size} per step, captions of {settings.num_tokens} tokens",
        "time": f"median of {settings.num_rounds} rounds",
        "distance": f"{settings.num_batches * settings.batch_size} examples of random latents and captions in each of "
        f"{NUM_BINS} timestep bins, seed {settings.seed}",
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
                f"{name} cannot be compared with {first}: noise levels differ ({file.sampling.describe()}, "
                f"{files[first].sampling.describe()}); compare models with one noise schedule"
            )
    for name in others:
        if reads[name] != reads[first]:
            raise ValueError(
                f"{name} cannot be compared with {first}: latent channels, caption width and label width are "
                f"{reads[name]}, but those of {first} are {reads[first]}; compare models of one family"
            )


def _load(file: UNetFile, device: torch.device, dtype: torch.dtype) -> Denoiser:
    network = load_unet(file, dtype).requires_grad_(False).to(device)
    return DiffusersDenoiser.of_file(file, network)


def _evaluation(model: Denoiser, dataset: LatentDataset, batch_size: int, on_evaluation: Callable[[], Any]) -> Callable[[], None]:
    """A function that runs one step of a model: one evaluation of a batch."""
    examples = dataset.read(0, torch.arange(batch_size))
    x, context = (tensor.to(model.device, model.dtype) for tensor in (examples.latents, examples.contexts))
    label = examples.label and examples.label.to(context)
    t = torch.full((batch_size,), model.schedule.num_timesteps // 2, device=model.device)

    @torch.no_grad()
    def evaluate() -> None:
        model(x, t, context, label)
        on_evaluation()

    return evaluate


def _distances(model: Denoiser, first: Denoiser, dataset, settings: Settings, on_batch: Callable[[], Any]) -> tuple[float, ...]:
    """Distances in the first model's prediction type, so that those of all models are comparable."""
    in_parts = {"num_batches": settings.num_batches, "batch_size": settings.batch_size}
    errors = output_error(first, model, dataset, num_bins=NUM_BINS, **in_parts, seed=settings.seed, on_batch=on_batch)
    return tuple(errors.tolist())


# --- images and reports ---------------------------------------------------------------------------------------------


def grid(comparison: Comparison) -> Image:
    """Images of the models: one row per model, one column per seed."""
    shown = {name: images[:MOST_SHOWN] for name, images in comparison.images.items()}
    return image_rows(shown, comparison.seeds[:MOST_SHOWN])


def chart(comparison: Comparison) -> Image:
    """The table, and the chart of distances over timesteps."""
    return stacked([plots.table_image(comparison.columns, comparison.rows()), plots.distance_chart(comparison)])


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Quality scores of one model's images, from image and text encoders."""

    name: str
    frechet_distance: float | None = None
    """Distance from the reference images; None for the reference itself."""
    kernel_distance: float | None = None
    clip_score: float | None = None
    """Mean similarity to the prompt, 0 to 100."""
    diversity: float | None = None
    """Mean cosine distance between two of its images, 0 to 2."""

    MEANINGS = {
        "Fréchet distance": "distance between two Gaussians, fitted to the features of the images and of the reference images; "
        "lower is closer. Few images give too high a value: use a few hundred or more, the same number for each model.",
        "kernel distance": "distance of the same features without fitting Gaussians; unbiased also for few images; 0 is equal.",
        "diversity": "mean cosine distance between the features of two images by the model, over all pairs; less than the first "
        "model's: seeds make less of a difference.",
        "CLIP score": "100 times the mean cosine similarity of image and prompt in CLIP's space, negative values counted as 0; "
        "higher is closer.",
    }  # fmt: skip

    def cells(self) -> dict[str, str]:
        """Cell texts by column; diversity and CLIP score only if they were measured."""
        distances = {"Fréchet distance": self.frechet_distance, "kernel distance": self.kernel_distance}
        cells = {"model": self.name} | {
            name: "reference" if value is None else f"{value:.4g}" for name, value in distances.items()
        }
        if self.diversity is not None:
            cells["diversity"] = f"{self.diversity:.3g}"
        if self.clip_score is not None:
            cells["CLIP score"] = f"{self.clip_score:.2f}"
        return cells


def judge(features: Mapping[str, Tensor], real: Tensor | None = None, text: Tensor | None = None) -> list[Judged]:
    """Scores of each model's image features (N, D), compared with ``real`` features, or else with the first model's.

    text: embedding of the prompt in the same space, (D,); None for no CLIP score.
    """
    judged = []
    for number, (name, seen) in enumerate(features.items()):
        reference = next(iter(features.values())) if real is None else real
        is_reference = real is None and number == 0
        frechet, kernel = (None, None) if is_reference else feature_distances(reference, seen)
        score = None if text is None else clip_score(seen, text)
        judged.append(
            Judged(
                name=name,
                frechet_distance=frechet,
                kernel_distance=kernel,
                clip_score=score,
                diversity=mean_cosine_distance(seen),
            )
        )
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
    """Write a comparison as one HTML file; returns it as one image. If it has images, a page for votes on them is written
    beside it, at `votes_path`.

    judged: scores of each model's images, if any; judged_by: how they were measured, in words. losses: a loss curve.
    """
    parts, images = [report.paragraph(comparison.summary())], []

    def show(image: Image, description: str, form: str = "png") -> None:
        parts.append(report.embedded(image, description, form))
        images.append(image)

    def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], meanings: Mapping[str, str], title: str = "") -> None:
        parts.extend([report.table(columns, rows), report.listing(meanings)])
        images.append(plots.table_image(columns, rows, title))

    votable = len(comparison.images) > 1 and len(comparison.seeds) > 0
    if comparison.images:
        parts.append(report.heading("The same seeds through every model"))
        if votable:
            parts.append(report.link(votes_path(path).name, "Vote on them first, without knowing which model is which"))
        show(grid(comparison), "Images by each model", "jpeg")
    device = comparison.settings.get("device")
    parts.append(report.heading(f"Figures on {device}" if device else "Figures"))
    show_table(comparison.columns, comparison.rows(), comparison.meanings)
    show(plots.distance_chart(comparison), "Distance of the predictions over timesteps")
    if judged:
        parts.append(report.heading("Image quality"))
        rows = [one.cells() for one in judged]
        columns = list(rows[0])
        meanings = {name: text for name, text in Judged.MEANINGS.items() if name in columns}
        show_table(columns, [list(row.values()) for row in rows], meanings, "image quality")
    if losses:
        parts.append(report.heading("Training"))
        show(losses, "Loss of every step")
    parts.extend([report.heading("Settings"), report.listing({**comparison.settings, **(judged_by or {})})])
    write_text(path, report.page(title, *parts), overwrite=False)
    if votable:
        write_text(votes_path(path), votes_page(f"{title}: votes", comparison.images, comparison.seeds), overwrite=False)
    return stacked(images)


def votes_path(path: Path) -> Path:
    """Path of the page for votes on the images of a report."""
    return path.with_name(f"{path.stem.rstrip('_')}_votes{path.suffix}")


def save_chart(path: Path, comparison: Comparison, *, overwrite: bool = False) -> None:
    save_png(path, chart(comparison), overwrite=overwrite)
