"""Demonstration on the bundled scenes: sample the teacher, prune it, distil the student, compare, and write a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .base.disk import check_writable
from .base.image_grid import save_png
from .base.settings import BATCH, GUIDANCE, SAMPLER_STEPS, SEEDS, STEPS, check_settings, setting
from .base.storage import write_text
from .demo.grammar import NUM_TOKENS, random_scenes
from .demo.score import KINDS, Judged, every_prompt, judged
from .demo.teacher import LATENT_SHAPE, load_dataset, load_denoiser, sampled_latents, teacher_file
from .diffusion.denoiser import Denoiser
from .diffusion.macs import count_macs
from .evaluation import plots, report
from .evaluation.measuring import in_rounds, seconds_of
from .networks.files import UNetFile, open_unet, save_unet
from .pruning.plan import preset
from .pruning.prune import is_pruned_from, pruned_file
from .training.loop import distill
from .training.run import RECIPE, Inputs, Run
from .training.settings import REFIT_EXAMPLES, TrainingSettings

PRUNED = "pruned.safetensors"
SHOWN_OF_EACH = 2  # images of each category in the report
OPTIMIZATION: dict[str, Any] = dict(learning_rate=3e-3, lr_schedule="cosine", warmup_steps=20, weight_decay=1e-3)
"""Settings by which students of the demo are trained, here and in benchmarks."""
TIMED_STEPS, TIMED_ROUNDS, TIMED_BATCH = 2, 5, 36


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a quickstart; the defaults take a few minutes on two CPU cores."""

    preset: str = setting("bk-sdm-base", "Plan to prune with.")
    train_steps: int = setting(200, "Distillation steps.", within=STEPS)
    batch_size: int = setting(64, "Scenes per distillation step.", within=BATCH)
    num_prompts: int = setting(12, "Prompts of each category, trained and held out, to judge a model by.", within=(1, 10_000))
    sample_steps: int = setting(20, "Sampler steps per image.", within=SAMPLER_STEPS)
    guidance: float = setting(3.0, "Classifier-free guidance scale.", within=GUIDANCE)
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
    trained: float
    """Share of images that show all their prompt says, of prompts whose combinations the teacher was trained on."""
    held_out: float
    """The same of prompts with combinations that no model was trained on."""
    trained_interval: tuple[float, float]
    held_out_interval: tuple[float, float]
    """95 % of each share, by the bootstrap over prompts."""
    ms_per_image: float | None = None
    """Time per image when sampling a batch; None if not measured."""


def _may_be_used(out: Path, teacher: UNetFile) -> bool:
    """Whether a folder is new or empty, or holds what an unfinished quickstart has made."""
    if not out.exists() or not any(out.iterdir()):
        return True
    return (out / "run" / RECIPE).exists() or is_pruned_from(teacher, out / PRUNED)


def quickstart(out: Path, settings: Settings, progress) -> list[Row]:
    """Run the quickstart in the folder ``out``; returns the table.

    progress: an object with ``tqdm``'s ``update`` and ``set_description``, whose total is `work`. An interrupted quickstart
    resumes; ``ValueError`` if ``out`` holds a finished one.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file; choose a folder as --out")
    if (out / "report.html").exists():
        raise ValueError(f"{out} holds a finished quickstart; choose another --out, or delete it")
    file, plan, dataset = teacher_file(), preset(settings.preset), load_dataset()
    if not _may_be_used(out, file):
        raise ValueError(f"{out} exists but is not an unfinished quickstart; choose another --out")
    check_writable(out / "report.html")
    teacher = load_denoiser(file)
    training = TrainingSettings(
        total_steps=settings.train_steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        save_every_steps=100,
        refit_examples=REFIT_EXAMPLES,
        **OPTIMIZATION,
    )
    run = Run(out / "run", training, Inputs(plan=plan.name, data=dataset.fingerprint))
    student = load_denoiser(pruned_file(file, out / PRUNED, plan))

    rows, found = [], {}
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
            student.load_state_dict(open_unet(run.result_file).state_dict)  # a complete run is not trained again
        progress.set_description(f"sampling: {name}")
        row, found[name] = judge(name, denoiser, settings, on_step=lambda n: progress.update(n))
        rows.append(row)
    progress.set_description("timing")
    of_teacher, of_student = _ms_per_image([teacher, student], settings)
    rows = [replace(row, ms_per_image=ms) for row, ms in zip(rows, (of_teacher, of_student, of_student), strict=True)]
    save_unet(
        out / "student.safetensors",
        student.named_parameters(),
        student.architecture,
        dtype="fp16",
        metadata={"modelspec.title": f"Scenes of emoji, distilled by {plan.name}", **student.origin},
        overwrite=True,
    )
    write_report(out, rows, found, run.metrics(), settings)
    return rows


def work(settings: Settings) -> int:
    """Length of a quickstart in network evaluations, for a progress bar."""
    num_images = len(every_prompt(settings.num_prompts, settings.seed))
    return 3 * num_images * settings.sample_steps * 2 + settings.train_steps * _train_cost(settings)


def _train_cost(settings: Settings) -> int:
    """Evaluations per training step: one by the teacher, one by the student, and two more for the gradient."""
    return 4 * settings.batch_size


def judge(name: str, denoiser: Denoiser, settings: Settings, on_step=lambda n: None) -> tuple[Row, Judged]:
    """Ask a model for scenes, and measure it."""
    found = judged(
        denoiser,
        num_prompts=settings.num_prompts,
        seed=settings.seed,
        guidance=settings.guidance,
        num_steps=settings.sample_steps,
        on_step=lambda count: on_step(2 * count),
    )
    trained, held_out = (found.score(kind) for kind in KINDS)
    return Row(
        model=name,
        parameters=denoiser.architecture.num_parameters,
        gmacs=count_macs(denoiser, LATENT_SHAPE, NUM_TOKENS) / 1e9,
        trained=trained.overall,
        held_out=held_out.overall,
        trained_interval=trained.interval,
        held_out_interval=held_out.interval,
    ), found


def _ms_per_image(denoisers: Sequence[Denoiser], settings: Settings) -> list[float]:
    """Time per image of each model: the median over rounds in which the models take turns to sample a batch."""
    scenes = random_scenes(TIMED_BATCH, settings.seed)
    draw = partial(sampled_latents, scenes=scenes, seed=settings.seed, guidance=settings.guidance, num_steps=TIMED_STEPS)
    timed = [partial(seconds_of, partial(draw, one), one.device) for one in denoisers]
    return [1000 * each / TIMED_BATCH * settings.sample_steps / TIMED_STEPS for each in in_rounds(timed, TIMED_ROUNDS)]


# --- the report -----------------------------------------------------------------------------------------------------

COLUMNS = {
    "model": "model",
    "parameters": "parameters",
    "gmacs": "GMACs",
    "trained": "trained prompts",
    "held_out": "held-out prompts",
    "ms_per_image": "ms per image",
}
MEANINGS = {
    "trained prompts": "share of images that show all their prompt says, by a judge that reads objects, numbers, colors and "
    "places; prompts whose combinations the teacher was trained on.",
    "held-out prompts": "the same of combinations that no model was trained on. In brackets the 95 % interval, by the bootstrap "
    "over prompts.",
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
        _share(row.trained, row.trained_interval),
        _share(row.held_out, row.held_out_interval),
        "" if row.ms_per_image is None else f"{row.ms_per_image:.1f}",
    ]


def _share(share: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{share:.1%} ({100 * low:.0f} to {100 * high:.0f})"


def draw_report(rows: Sequence[Row], found: Mapping[str, Judged], metrics, settings: Settings):
    drawing = plots.figure(11, 9)
    (top,), (bottom,) = drawing.subfigures(2, 1, squeeze=False, height_ratios=(1.35, 1))
    top.suptitle(
        f"Distill quickstart: {settings.preset}, guidance {settings.guidance:g}. Held-out prompts, from the same noise",
        fontsize=13,
    )
    shown = _shown(found[rows[0].model])
    captions = [found[rows[0].model].prompts[place].scene.caption for place in shown]
    images = {f"{row.model}\n{row.parameters / 1e6:.2f} M": found[row.model].images[shown] for row in rows}
    plots.draw_prompts(top, captions, images)
    curve, table = bottom.subplots(1, 2, width_ratios=(1, 1.4))
    plots.draw_losses(curve, metrics)
    curve.set_title("distillation loss", fontsize=11)
    plots.draw_table(table, list(COLUMNS.values()), [cells(row) for row in rows], "same prompts, same seeds")
    return drawing


def _shown(found: Judged) -> list[int]:
    """Places of some held-out prompts of each category."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(found.prompts):
        if prompt.kind == "held out":
            places.setdefault(prompt.category, []).append(place)
    return [place for of_category in places.values() for place in of_category[:SHOWN_OF_EACH]]


def write_report(out: Path, rows: Sequence[Row], found: Mapping[str, Judged], metrics, settings: Settings) -> None:
    """Write ``report.png``, ``report.json`` and, last, ``report.html``."""
    drawn = plots.to_image(draw_report(rows, found, metrics, settings))
    save_png(out / "report.png", drawn, overwrite=True)
    facts = {"settings": asdict(settings), "models": [asdict(row) for row in rows]}
    write_text(out / "report.json", json.dumps(facts, indent=2))
    page = report.page(
        "Distill quickstart",
        report.paragraph(summary(rows)),
        report.embedded(drawn, "Scenes by the teacher, the pruned and the distilled model, loss curves and table"),
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
        f"{1 - after.gmacs / teacher.gmacs:.0%} fewer multiply-accumulates; {after.held_out:.1%} of its images of held-out prompts "
        f"are right (teacher {teacher.held_out:.1%}, directly after pruning {before.held_out:.1%})."
    )
