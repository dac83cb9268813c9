"""Students of the teacher of scenes, made, trained and judged the same way in every benchmark."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from report import Kept, device_words, with_margin
from torch import Tensor

from distill_core.base.storage import fingerprint
from distill_core.data.dataset import Dataset, LatentDataset, num_examples
from distill_core.data.teacher_data import GenerationSettings, make_dataset
from distill_core.demo import score
from distill_core.demo.drawing import as_images, draw_all
from distill_core.demo.encoders import ScenesEncoders
from distill_core.demo.grammar import Scene, random_scenes
from distill_core.demo.judge import ScenesJudge
from distill_core.demo.teacher import load_dataset, load_denoiser, sampled, teacher_file
from distill_core.diffusion.denoiser import Denoiser, DiffusersDenoiser
from distill_core.diffusion.schedule import scaled_linear
from distill_core.evaluation.metrics import output_error
from distill_core.lora.layers import WithoutLora
from distill_core.networks.build import build_unet
from distill_core.networks.files import open_unet
from distill_core.pruning.plan import PruningPlan
from distill_core.pruning.prune import prune
from distill_core.quickstart import OPTIMIZATION
from distill_core.training.loop import distill
from distill_core.training.run import Run
from distill_core.training.settings import TrainingSettings

BATCH_SIZE = 64
GUIDANCE, NUM_STEPS = 3.0, 20
ERROR_SEED, ERROR_BATCHES = 999, 2  # of no training
NUM_VARIED, NUM_EACH = 12, 4
"""Prompts, and images of each, that diversity is measured on."""
NUM_MADE = 2048
"""Images the teacher draws for a student, as many as there are real ones."""


# --- students


def teacher() -> DiffusersDenoiser:
    return load_denoiser(teacher_file())


def real_scenes() -> LatentDataset:
    return load_dataset(NUM_MADE)


def pruned_student(teacher: DiffusersDenoiser, plan: PruningPlan) -> DiffusersDenoiser:
    """A student with the teacher's weights."""
    pruning = prune(teacher.architecture, plan)
    student = DiffusersDenoiser(network=build_unet(pruning.student).to(teacher.device).eval(), architecture=pruning.student)
    student.load_state_dict(pruning.weights({name: weight.detach() for name, weight in teacher.named_parameters().items()}))
    return student


def random_student(teacher: DiffusersDenoiser, plan: PruningPlan, seed: int) -> DiffusersDenoiser:
    """A student of the same shape with random weights, as diffusers begins a network."""
    architecture = prune(teacher.architecture, plan).student
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_unet(architecture)
    return DiffusersDenoiser(network=network.to(teacher.device).eval(), architecture=architecture)


def train(
    student: DiffusersDenoiser, teacher: DiffusersDenoiser, plan: PruningPlan, dataset: Dataset, steps: int, seed: int, **changes
) -> None:
    """Train a student in place by the quickstart's settings; ``changes`` are other settings of the recipe."""
    training = TrainingSettings(**settings_of(steps, seed) | changes)
    with tempfile.TemporaryDirectory() as folder:
        distill(run := Run(Path(folder) / "run", training), student=student, teacher=teacher, plan=plan, dataset=dataset)
        student.load_state_dict(open_unet(run.result_file).state_dict)  # the average, if there is one


def with_lora(dataset: Dataset, base: DiffusersDenoiser | None = None, **changes) -> DiffusersDenoiser:
    """A network, the teacher's unless another is given, with a LoRA on every layer that learnt from the network without it.

    ``changes`` are of its settings.
    """
    student = base or teacher()
    settings = dict(caption_dropout=0.0, lora_targets=("*",), lr_schedule="cosine", warmup_steps=20, weight_decay=0.0)
    training = TrainingSettings(**settings | {"save_every_steps": changes["total_steps"]} | changes)
    with tempfile.TemporaryDirectory() as folder:
        distill(Run(Path(folder) / "run", training), student=student, teacher=WithoutLora(student), plan=None, dataset=dataset)
    return student


def clock(denoiser: Denoiser) -> Callable[[], float]:
    """Seconds of work: on a CPU those of this process, which other work on the machine does not lengthen."""
    return time.process_time if denoiser.device.type == "cpu" else time.perf_counter


def settings_of(steps: int, seed: int) -> dict[str, Any]:
    """The quickstart's settings of a recipe."""
    return OPTIMIZATION | dict(total_steps=steps, batch_size=BATCH_SIZE, seed=seed, save_every_steps=steps)


@lru_cache(maxsize=1)
def teacher_made(seed: int, guidance: float = GUIDANCE, guidance_min: float | None = None) -> Mapping[str, LatentDataset]:
    """Scenes the teacher draws of prompts it was trained on: ``made`` to be noised anew, ``states`` with those on the way.

    guidance_min: each scene has a scale of its own, from here to ``guidance``.
    """
    file, prompts = teacher_file(), [scene.caption for scene in random_scenes(NUM_MADE, 10_000 + seed)]
    generation = GenerationSettings(
        size=(64, 64), guidance=guidance, guidance_min=guidance_min, num_steps=NUM_STEPS, num_states=NUM_STEPS, seed=seed
    )
    with tempfile.TemporaryDirectory() as folder:
        made = make_dataset(lambda: load_denoiser(file), fingerprint(file.tensors), ScenesEncoders(), prompts, generation,
                            Path(folder) / "cache", schedule=scaled_linear(), batch_size=100)  # fmt: skip
        examples = made.read(0, torch.arange(num_examples(made)))
    plain = LatentDataset.of(examples.latents, examples.contexts, made.null.context)
    (bucket,) = plain.buckets
    states = LatentDataset(
        [type(bucket)(**{**vars(bucket), "states": examples.states, "scales": examples.scale})], made.null, made.timesteps
    )
    return {"made": plain, "states": states}


# --- judgement


def judged(student: Denoiser, seed: int, num_prompts: int, **how: Any) -> dict[str, Any]:
    """Which images are right, how far all are from real scenes, and how much those of one prompt differ, real ones being 1.

    how: as for `sampled`.
    """
    how = dict(guidance=GUIDANCE, num_steps=NUM_STEPS) | how
    found = score.judged(student, num_prompts=num_prompts, seed=seed, **how)
    right = {kind: found.by_category(kind) for kind in score.KINDS}
    spread = _spread_in(sampled(student, _varied(seed), seed=seed, **how))
    return {"right": right, "frechet": found.frechet_distance, "diversity": spread / _spread_of_real(seed)}


def _varied(seed: int) -> list[Scene]:
    return [scene for scene in random_scenes(NUM_VARIED, 20_000 + seed) for _ in range(NUM_EACH)]


@cache
def _spread_of_real(seed: int) -> float:
    return _spread_in(as_images(draw_all(_varied(seed), seed)))


def _spread_in(images: Tensor) -> float:
    return score.spread(ScenesJudge.bundled().features(images).unflatten(0, (NUM_VARIED, NUM_EACH)))


def error(student: Denoiser, teacher: Denoiser, dataset: Dataset) -> float:
    """Mean squared distance to the teacher's predictions, with noise of no training step."""
    return output_error(student, teacher, dataset, num_batches=ERROR_BATCHES, seed=ERROR_SEED).mean().item()


# --- settings and tables


def parsed(parser: argparse.ArgumentParser, rows: Iterable[str] = ()) -> argparse.Namespace:
    """Arguments, with those of every benchmark of students, and whether all rows are asked for (``complete``).

    rows: of its table, from which a person may choose; default: all.
    """
    if rows := list(rows):
        parser.add_argument("rows", nargs="*", help=f"of {', '.join(rows)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, 2 to 10 (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=24, help="of each category, trained and held out (default: %(default)s)")
    arguments = parser.parse_args()
    chosen = getattr(arguments, "rows", [])
    if unknown := [row for row in chosen if row not in rows]:
        parser.error(f"unknown row {unknown[0]!r}; choose from {', '.join(rows)}")
    arguments.rows, arguments.complete = chosen or rows, not chosen
    return arguments


def kept(name: str, arguments: argparse.Namespace) -> Kept:
    """Figures found so far; those of a row and seed stay true with more seeds and other rows."""
    settings = {name: value for name, value in vars(arguments).items() if name not in ("seeds", "rows", "complete")}
    return Kept(name, settings | {"batch_size": BATCH_SIZE, "device": device_words()}, arguments.complete)


QUALITY = ("trained prompts", "held-out prompts", "Fréchet distance", "diversity")


def quality(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns `QUALITY` of what `judged` found with several seeds."""
    return [
        *map(_share, (scored(found, kind) for kind in score.KINDS)),
        with_margin([figures["frechet"] for figures in found], ".2f"),
        with_margin([figures["diversity"] for figures in found], ".2f"),
    ]


def scored(found: Sequence[Mapping[str, Any]], kind: str) -> score.Score:
    """Over prompts and seeds together: each seed has prompts of its own."""
    rights = [figures["right"][kind] for figures in found]
    return score.score(
        {category: torch.tensor([value for right in rights for value in right[category]]) for category in rights[0]}
    )


def _share(found: score.Score) -> str:
    low, high = found.interval
    return f"{found.overall:.1%} ({low:.1%} to {high:.1%})"


def words(arguments: argparse.Namespace) -> str:
    """What a table of `quality` needs to be read."""
    return (
        f"Images that show all their prompt says, means of the categories, in brackets the 95 % interval by the bootstrap over "
        f"{arguments.prompts} prompts of each category and seed; other figures: means over {arguments.seeds} seeds ± half the 95 % "
        f"interval by Student's t. Guidance {GUIDANCE:g}, {NUM_STEPS} steps of sampling. {device_words()}."
    )
