"""Experts of the demo teacher, made and trained the same way in every benchmark."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from distill_core.base.storage import fingerprint
from distill_core.data.dataset import Dataset, LatentDataset, num_examples
from distill_core.data.teacher_data import Making, make_dataset
from distill_core.demo import digits
from distill_core.demo.encoders import DigitsEncoders
from distill_core.demo.teacher import load_denoiser, teacher_file
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.diffusion.schedule import scaled_linear
from distill_core.networks.build import build_unet
from distill_core.pruning.plan import PruningPlan
from distill_core.pruning.prune import prune
from distill_core.quickstart import Settings
from distill_core.training.loop import distill
from distill_core.training.run import Run
from distill_core.training.settings import TrainingSettings

BATCH_SIZE = 64


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
    recipe = TrainingSettings(**settings_of(steps, seed) | changes)
    with tempfile.TemporaryDirectory() as folder:
        distill(Run(Path(folder) / "run", recipe), student=student, teacher=teacher, plan=plan, dataset=dataset)


def settings_of(steps: int, seed: int) -> dict[str, Any]:
    """The quickstart's settings of a recipe."""
    return dict(total_steps=steps, batch_size=BATCH_SIZE, learning_rate=1e-3, lr_schedule="cosine", warmup_steps=20,
                weight_decay=1e-3, seed=seed, save_every_steps=steps)  # fmt: skip


NUM_MADE = 1800
"""Digits the teacher draws for a student, about as many as there are real ones."""


@lru_cache(maxsize=1)
def teacher_made(seed: int, guidance: float | None = None) -> Mapping[str, LatentDataset]:
    """The teacher's digits, sampled as the judge samples: ``made`` to be noised anew, ``states`` with those on the way.

    guidance: another scale than the judge's.
    """
    how, file, prompts = Settings(), teacher_file(), [digits.caption(n) for n in range(10)]
    making = Making(size=(64, 64), guidance=how.guidance if guidance is None else guidance, num_steps=how.sample_steps,
                    num_per_prompt=NUM_MADE // len(prompts), num_states=how.sample_steps, seed=seed)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        made = make_dataset(lambda: load_denoiser(file), fingerprint(file.tensors), DigitsEncoders(), prompts, making,
                            Path(folder) / "cache", schedule=scaled_linear(), batch_size=100)  # fmt: skip
        examples = made.read(0, torch.arange(num_examples(made)))
    plain = LatentDataset.of(examples.latents, examples.contexts, made.null.context)
    (bucket,) = plain.buckets
    states = LatentDataset([type(bucket)(**{**vars(bucket), "states": examples.states})], made.null, made.timesteps)
    return {"made": plain, "states": states}
