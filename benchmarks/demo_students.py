"""Students of the demo teacher, made and trained the same way in every benchmark."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from distill_core.dataset import Dataset
from distill_core.denoiser import DiffusersDenoiser
from distill_core.plan import PruningPlan
from distill_core.prune import prune
from distill_core.recipe import Recipe
from distill_core.run import Run
from distill_core.train import distill
from distill_core.unet import build_unet

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
    recipe = Recipe(**settings_of(steps, seed), **changes)
    with tempfile.TemporaryDirectory() as folder:
        distill(Run(Path(folder) / "run", recipe, {}), student=student, teacher=teacher, plan=plan, dataset=dataset)


def settings_of(steps: int, seed: int) -> dict[str, Any]:
    """The quickstart's settings of a recipe."""
    return dict(total_steps=steps, batch_size=BATCH_SIZE, learning_rate=1e-3, lr_schedule="cosine", warmup_steps=20,
                weight_decay=1e-3, seed=seed, save_every_steps=steps)  # fmt: skip
