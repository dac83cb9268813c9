"""Demonstration on the bundled digits: sample the teacher, prune it, distil the student, compare, and write a report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .base.disk import check_writable
from .base.settings import BATCH, GUIDANCE, SAMPLER_STEPS, SEEDS, STEPS, check_settings, setting
from .base.storage import atomic, write_text
from .demo import digits
from .demo.teacher import LATENT_SHAPE, load_dataset, load_denoiser, teacher_file
from .diffusion.conditioning import Caption
from .diffusion.denoiser import Denoiser
from .diffusion.macs import count_macs
from .diffusion.sampling import sample
from .evaluation import plots, report
from .evaluation.measuring import in_rounds, seconds_of
from .evaluation.metrics import frechet_distance
from .networks.files import save_unet
from .pruning.plan import preset
from .pruning.prune import pruned_file
from .training.loop import distill
from .training.run import Inputs, Run
from .training.settings import TrainingSettings

NUM_SHOWN = 80  # digits per model in the image, eight of each
SAMPLE_BATCH = 100
TIMED_STEPS, TIMED_ROUNDS = 2, 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a quickstart; the defaults take a few minutes on two CPU cores."""

    preset: str = setting("bk-sdm-base", "Plan to prune with.")
    train_steps: int = setting(800, "Distillation steps.", within=STEPS)
    batch_size: int = setting(64, "Digits per distillation step.", within=BATCH)
    num_samples: int = setting(500, "Digits sampled from each model to measure it; a distance needs two.", within=(2, 1_000_000))
    sample_steps: int = setting(20, "Sampler steps per digit.", within=SAMPLER_STEPS)
    guidance: float = setting(2.0, "Classifier-free guidance scale.", within=GUIDANCE)
    seed: int = setting(0, "Seed of training and sampling noise.", within=SEEDS)

    def __post_init__(self):
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in the table of the report."""

    model: str
    parameters: int
    gmacs: float
    """Multiply-accumulates of one network evaluation, in units of 1e9."""
    accuracy: float
    """Share of samples that the classifier recognises as the requested digit."""
    frechet_distance: float
    """Distance between the classifier's features of samples and of all real digits; lower is closer."""
    ms_per_image: float | None = None
    """Time per image when sampling a batch; None if not measured."""


def quickstart(out: Path, settings: Settings, progress) -> list[Row]:
    """Run the quickstart in the folder ``out``; returns the table.

    progress: an object with ``tqdm``'s ``update`` and ``set_description``, whose total is `work`. An interrupted quickstart
    resumes; ``ValueError`` if ``out`` holds a finished one.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file; choose a folder as --out")
    if (out / "report.html").exists():
        raise ValueError(f"{out} holds a finished quickstart; choose another --out, or delete it")
    if out.exists() and any(out.iterdir()) and not (out / "run" / "recipe.toml").exists():
        raise ValueError(f"{out} exists but is not an unfinished quickstart; choose another --out")
    check_writable(out / "report.html")
    file, plan, dataset = teacher_file(), preset(settings.preset), load_dataset()
    teacher = load_denoiser(file)
    training = TrainingSettings(
        total_steps=settings.train_steps,
        batch_size=settings.batch_size,
        learning_rate=1e-3,
        lr_schedule="cosine",
        warmup_steps=20,
        weight_decay=1e-3,
        seed=settings.seed,
        save_every_steps=100,
    )
    run = Run(out / "run", training, Inputs(plan=plan.name, data=dataset.fingerprint))
    student = load_denoiser(pruned_file(file, out / "pruned.safetensors", plan))

    rows, images = [], {}
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
        row, images[name] = judge(name, denoiser, settings, on_step=lambda n: progress.update(n))
        rows.append(row)
    progress.set_description("timing")
    of_teacher, of_student = _ms_per_image([teacher, student], settings)
    rows = [replace(row, ms_per_image=ms) for row, ms in zip(rows, (of_teacher, of_student, of_student), strict=True)]
    save_unet(
        out / "student.safetensors",
        student.named_parameters(),
        student.architecture,
        dtype="fp16",
        metadata={"modelspec.title": f"Handwritten digits, distilled by {plan.name}", **student.origin},
        overwrite=True,
    )
    write_report(out, rows, images, run.metrics(), settings)
    return rows


def work(settings: Settings) -> int:
    """Length of a quickstart in network evaluations, for a progress bar."""
    return 3 * settings.num_samples * settings.sample_steps * 2 + settings.train_steps * _train_cost(settings)


def _train_cost(settings: Settings) -> int:
    """Evaluations per training step: one by the teacher, one by the student, and two more for the gradient."""
    return 4 * settings.batch_size


def judge(name: str, denoiser: Denoiser, settings: Settings, on_step=lambda n: None) -> tuple[Row, Tensor]:
    """Sample a digits model and measure it; also returns the images (N, 1, 16, 16), with labels 0..9 in turn."""
    classifier, asked = digits.DigitsClassifier.bundled(), _Asked.of(settings)
    latents = [
        part.drawn_by(denoiser, settings, settings.sample_steps, partial(on_step, 2 * len(part.noise))).cpu()
        for part in asked.split(SAMPLE_BATCH)
    ]
    images = digits.decode(torch.cat(latents)).clamp(-1, 1)
    real, _ = digits.load_digits()
    with torch.no_grad():
        distance = frechet_distance(classifier.features(images), classifier.features(real))
    return Row(
        model=name,
        parameters=denoiser.architecture.num_parameters,
        gmacs=count_macs(denoiser, LATENT_SHAPE, digits.NUM_TOKENS) / 1e9,
        accuracy=digits.accuracy(classifier, images, asked.labels),
        frechet_distance=distance,
    ), images


def _ms_per_image(denoisers: Sequence[Denoiser], settings: Settings) -> list[float]:
    """Time per image of each model: the median over rounds in which the models take turns to sample a batch."""
    asked = next(iter(_Asked.of(settings).split(SAMPLE_BATCH)))
    timed = [partial(seconds_of, partial(asked.drawn_by, one, settings, TIMED_STEPS), one.device) for one in denoisers]
    return [1000 * each / len(asked.noise) * settings.sample_steps / TIMED_STEPS for each in in_rounds(timed, TIMED_ROUNDS)]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Digits that every model has to draw, and the noise to start from."""

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
        return sample(
            denoiser,
            self.contexts,
            self.null,
            noise=self.noise,
            guidance=settings.guidance,
            num_steps=num_steps,
            on_step=on_step,
        )


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
    "accuracy": "share of samples that a classifier recognises as the requested digit.",
    "Fréchet distance": "distance of the samples from the 1,797 real digits in the classifier's features; lower is closer.",
    "GMACs": "billions of multiply-accumulates in one evaluation of the network.",
    "ms per image": "time per image in a batch; the models take turns, so that a slowdown of the machine affects all of them.",
}
FILES = {
    "student.safetensors": "the distilled student, fp16. distill inspect student.safetensors shows its contents.",
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


def draw_report(rows: Sequence[Row], images: Mapping[str, Tensor], metrics, settings: Settings):
    drawing = plots.figure(11, 8)
    drawing.suptitle(f"Distill quickstart: {settings.preset} on handwritten digits, guidance {settings.guidance:g}", fontsize=13)
    (top,), (bottom,) = drawing.subfigures(2, 1, squeeze=False, height_ratios=(1, 0.95))
    for axes, row in zip(top.subplots(1, len(rows)), rows, strict=True):
        subtitle = f"{row.model}\n{row.parameters / 1e6:.2f} M parameters, {row.accuracy:.1%} correct"
        # Ten columns, one for each digit.
        plots.draw_grid(axes, images[row.model][:NUM_SHOWN], 10, subtitle)
    curve, table = bottom.subplots(1, 2, width_ratios=(1, 1.25))
    plots.draw_losses(curve, metrics)
    curve.set_title("distillation loss", fontsize=11)
    plots.draw_table(table, list(COLUMNS.values()), [cells(row) for row in rows], "same prompts, same seeds")
    return drawing


def write_report(out: Path, rows: Sequence[Row], images: Mapping[str, Tensor], metrics, settings: Settings) -> None:
    """Write ``report.png``, ``report.json`` and, last, ``report.html``."""
    drawn = plots.to_image(draw_report(rows, images, metrics, settings))
    with atomic(out / "report.png", overwrite=True) as made:
        drawn.save(made, format="png")
    facts = {"settings": asdict(settings), "models": [asdict(row) for row in rows]}
    write_text(out / "report.json", json.dumps(facts, indent=2))
    page = report.page(
        "Distill quickstart",
        report.paragraph(summary(rows)),
        report.embedded(drawn, "Digits by the teacher, the pruned and the distilled model, loss curves and table"),
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
    """The result in one sentence."""
    teacher, before, after = rows
    return (
        f"The student has {1 - after.parameters / teacher.parameters:.0%} fewer parameters and needs "
        f"{1 - after.gmacs / teacher.gmacs:.0%} fewer multiply-accumulates; {after.accuracy:.1%} of its digits are correct "
        f"(teacher {teacher.accuracy:.1%}, directly after pruning {before.accuracy:.1%})."
    )
