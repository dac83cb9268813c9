"""The whole story on the bundled digits: sample the teacher, prune it, distil the student, compare, report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import plots, report
from .compare import in_rounds, seconds_of
from .dataset import Caption
from .demo import digits
from .demo.teacher import LATENT_SHAPE, load_dataset, load_denoiser, teacher_file
from .denoiser import Denoiser
from .disk import check_writable
from .evaluate import count_macs, frechet_distance
from .files import save_unet
from .plan import preset
from .prune import pruned_file
from .recipe import BATCH, GUIDANCE, SAMPLER_STEPS, SEEDS, STEPS, Recipe, check_settings
from .run import Run
from .sampling import sample
from .storage import atomic, write_text
from .train import distill

NUM_SHOWN = 80  # digits per model in the picture, eight of each
SAMPLE_BATCH = 100
TIMED_STEPS, TIMED_ROUNDS = 2, 5
RANGES = {
    "train_steps": STEPS,
    "batch_size": BATCH,
    "num_samples": (2, 1_000_000),  # a distance needs two
    "sample_steps": SAMPLER_STEPS,
    "guidance": GUIDANCE,
    "seed": SEEDS,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a quickstart does; the defaults take a few minutes on two CPU cores."""

    preset: str = "bk-sdm-base"
    """Plan to prune with."""
    train_steps: int = 800
    """Distillation steps."""
    batch_size: int = 64
    """Digits per distillation step."""
    num_samples: int = 500
    """Digits sampled from each model to judge it."""
    sample_steps: int = 20
    """Sampler steps a digit."""
    guidance: float = 2.0
    """Classifier-free guidance scale."""
    seed: int = 0
    """Decides training and sampling noise."""

    def __post_init__(self):
        check_settings(self, RANGES)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in the table of the report."""

    model: str
    parameters: int
    gmacs: float
    """Multiply-accumulates of one network evaluation, in units of 1e9."""
    accuracy: float
    """Share of samples the digit classifier takes for what was asked."""
    frechet_distance: float
    """Between the classifier's features of samples and of all real digits; lower is closer."""
    ms_per_image: float | None = None
    """Of drawing one in a batch; None where it was not timed."""


def quickstart(out: Path, settings: Settings, progress) -> list[Row]:
    """Run the story into the folder ``out``; returns the table.

    progress: anything with ``tqdm``'s ``update`` and ``set_description``, whose total is `work`. An interrupted
    quickstart goes on where it was; ``ValueError`` if ``out`` holds a finished one.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file; --out takes a folder")
    if (out / "report.html").exists():
        raise ValueError(f"{out} holds a finished quickstart; choose another --out, or delete it")
    if out.exists() and any(out.iterdir()) and not (out / "run" / "recipe.toml").exists():
        raise ValueError(f"{out} exists and is not an unfinished quickstart; choose another --out")
    check_writable(out / "report.html")
    file, plan, dataset = teacher_file(), preset(settings.preset), load_dataset()
    teacher = load_denoiser(file)
    recipe = Recipe(
        total_steps=settings.train_steps,
        batch_size=settings.batch_size,
        learning_rate=1e-3,
        lr_schedule="cosine",
        warmup_steps=20,
        weight_decay=1e-3,
        seed=settings.seed,
        save_every_steps=100,
    )
    run = Run(out / "run", recipe, {"plan": plan.name, "data": dataset.fingerprint})
    student = load_denoiser(pruned_file(file, out / "pruned.safetensors", plan))

    rows, pictures = [], {}
    for name, denoiser in (("teacher", teacher), ("pruned only", student), ("distilled", student)):
        if name == "distilled":
            progress.set_description("distilling")
            progress.update(run.step * _train_cost(settings))
            distill(
                run,
                student=student,
                teacher=teacher,
                plan=plan,
                dataset=dataset,
                on_step=lambda _: progress.update(_train_cost(settings)),
            )
        progress.set_description(f"sampling: {name}")
        row, pictures[name] = judge(name, denoiser, settings, on_step=lambda n: progress.update(n))
        rows.append(row)
    progress.set_description("timing")
    of_teacher, of_student = _ms_per_image([teacher, student], settings)
    rows = [replace(row, ms_per_image=ms) for row, ms in zip(rows, (of_teacher, of_student, of_student), strict=True)]
    title = f"Handwritten digits, distilled by {plan.name}"
    save_unet(
        out / "student.safetensors",
        student.named_parameters(),
        student.architecture,
        dtype="fp16",
        title=title,
        metadata=student.origin,
        overwrite=True,
    )
    write_report(out, rows, pictures, run.metrics(), settings)
    return rows


def work(settings: Settings) -> int:
    """Length of the whole story in network evaluations, for a progress bar."""
    return 3 * settings.num_samples * settings.sample_steps * 2 + settings.train_steps * _train_cost(settings)


def _train_cost(settings: Settings) -> int:
    """One evaluation by the teacher; by the student one, and two more for its gradient."""
    return 4 * settings.batch_size


def judge(name: str, denoiser: Denoiser, settings: Settings, on_step=lambda n: None) -> tuple[Row, Tensor]:
    """Sample a digits model and measure it; also returns the pictures (N, 1, 16, 16), labels 0..9 in turn."""
    classifier, asked = digits.DigitsClassifier.bundled(), _Asked.of(settings)
    latents = [
        part.drawn_by(denoiser, settings, settings.sample_steps, partial(on_step, 2 * len(part.noise))).cpu()
        for part in asked.split(SAMPLE_BATCH)
    ]
    pictures = digits.decode(torch.cat(latents)).clamp(-1, 1)
    real, _ = digits.load_digits()
    with torch.no_grad():
        distance = frechet_distance(classifier.features(pictures), classifier.features(real))
    return Row(
        model=name,
        parameters=denoiser.architecture.num_parameters,
        gmacs=count_macs(denoiser, LATENT_SHAPE, digits.NUM_TOKENS) / 1e9,
        accuracy=digits.accuracy(classifier, pictures, asked.labels),
        frechet_distance=distance,
    ), pictures


def _ms_per_image(denoisers: Sequence[Denoiser], settings: Settings) -> list[float]:
    """Median over rounds of drawing a batch by a few steps, the models in turn, so that what slows the machine slows all."""
    asked = next(iter(_Asked.of(settings).split(SAMPLE_BATCH)))
    timed = [partial(seconds_of, partial(asked.drawn_by, one, settings, TIMED_STEPS), one.device) for one in denoisers]
    return [1000 * each / len(asked.noise) * settings.sample_steps / TIMED_STEPS for each in in_rounds(timed, TIMED_ROUNDS)]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What every model is to draw, and from which noise."""

    labels: Tensor
    contexts: Tensor
    null: Caption
    noise: Tensor

    @classmethod
    def of(cls, settings: Settings) -> _Asked:
        text, count = digits.DigitsTextEncoder.bundled(), settings.num_samples
        labels = torch.arange(count) % 10
        return cls(
            labels=labels,
            contexts=text.captions([digits.caption(n) for n in range(10)])[labels],
            null=Caption(text.captions([""])[0]),
            noise=torch.randn(count, *LATENT_SHAPE, generator=torch.Generator().manual_seed(settings.seed)),
        )

    def split(self, size: int) -> Iterator[_Asked]:
        for labels, contexts, noise in zip(*(each.split(size) for each in (self.labels, self.contexts, self.noise)), strict=True):
            yield replace(self, labels=labels, contexts=contexts, noise=noise)

    def drawn_by(self, denoiser: Denoiser, settings: Settings, num_steps: int, on_step=lambda: None) -> Tensor:
        """Latents (N, C, H, W)."""
        options = {"noise": self.noise, "guidance": settings.guidance, "num_steps": num_steps}
        return sample(denoiser, self.contexts, self.null, **options, on_step=on_step)


# --- the report -----------------------------------------------------------------------------------------------------

COLUMNS = {
    "model": "model",
    "parameters": "parameters",
    "gmacs": "GMACs",
    "accuracy": "accuracy",
    "frechet_distance": "Fréchet distance",
    "ms_per_image": "ms per image",
}
MEANINGS = {
    "accuracy": "share of samples that a digit classifier takes for the digit that was asked for.",
    "Fréchet distance": "how far samples lie from the 1,797 real digits in the classifier's features; lower is closer.",
    "GMACs": "billions of multiply-accumulates in one evaluation of the network.",
    "ms per image": "time of drawing one in a batch, the models in turn, so that what slows the machine slows all of them.",
}
FILES = {
    "student.safetensors": "the distilled student, fp16. distill inspect student.safetensors shows what is in it.",
    "pruned.safetensors": "the same network before distillation.",
    "run/": "recipe, loss of every step (metrics.csv), checkpoints.",
    "report.json": "the figures above.",
}


def cells(row: Row) -> list[str]:
    return [
        row.model,
        f"{row.parameters:,}",
        f"{row.gmacs:.4f}",
        f"{row.accuracy:.1%}",
        f"{row.frechet_distance:.2f}",
        "" if row.ms_per_image is None else f"{row.ms_per_image:.1f}",
    ]


def draw_report(rows: Sequence[Row], pictures: Mapping[str, Tensor], metrics, settings: Settings):
    drawing = plots.figure(11, 8)
    drawing.suptitle(f"Distill quickstart: {settings.preset} on handwritten digits, guidance {settings.guidance:g}", fontsize=13)
    top, bottom = drawing.subfigures(2, 1, height_ratios=(1, 0.95))
    for axes, row in zip(top.subplots(1, len(rows)), rows, strict=True):
        subtitle = f"{row.model}\n{row.parameters / 1e6:.2f} M parameters, {row.accuracy:.1%} read right"
        # Ten columns, one for each digit.
        plots.draw_grid(axes, pictures[row.model][:NUM_SHOWN], 10, subtitle)
    curve, table = bottom.subplots(1, 2, width_ratios=(1, 1.25))
    plots.draw_losses(curve, metrics)
    curve.set_title("distillation loss", fontsize=11)
    plots.draw_table(table, list(COLUMNS.values()), [cells(row) for row in rows], "same prompts, same seeds")
    return drawing


def write_report(out: Path, rows: Sequence[Row], pictures: Mapping[str, Tensor], metrics, settings: Settings) -> None:
    """Write ``report.png``, ``report.json`` and, last, ``report.html``."""
    drawn = plots.to_image(draw_report(rows, pictures, metrics, settings))
    with atomic(out / "report.png", overwrite=True) as made:
        drawn.save(made, format="png")
    facts = {"settings": asdict(settings), "models": [asdict(row) for row in rows]}
    write_text(out / "report.json", json.dumps(facts, indent=2))
    page = report.page(
        "Distill quickstart",
        report.paragraph(summary(rows)),
        report.picture(drawn, "Digits of teacher, pruned and distilled model, loss curves and table"),
        report.heading("Figures"),
        report.table(list(COLUMNS.values()), map(cells, rows)),
        report.listing(MEANINGS),
        report.heading("Files beside this page"),
        report.listing(FILES),
        report.heading("Settings"),
        report.listing(asdict(settings)),
    )
    write_text(out / "report.html", page)


def summary(rows: Sequence[Row]) -> str:
    """What came out, in one sentence."""
    teacher, before, after = rows
    return (
        f"The student has {1 - after.parameters / teacher.parameters:.0%} fewer parameters and needs "
        f"{1 - after.gmacs / teacher.gmacs:.0%} less arithmetic; {after.accuracy:.1%} of its digits are read right "
        f"(teacher {teacher.accuracy:.1%}, straight after pruning {before.accuracy:.1%})."
    )
