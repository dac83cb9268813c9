"""The memory of a training step, forecast part by part and measured: ``python benchmarks/memory.py``.

Two published students on the smallest GPUs they are meant for, and what the workflows ask for as they are shipped. Where
there is a CUDA device the same steps run on it, with random weights and random data, and the peak that torch allocates is set
beside the forecast; without one nothing is measured. Writes ``results/memory.md``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from distill_core.base.sizes import gib
from distill_core.evaluation.catalog import LATENT_SHAPES, NUM_TOKENS, published_teacher
from distill_core.evaluation.trial import random_data, random_denoiser, training_cost
from distill_core.lora.layers import WithoutLora
from distill_core.networks.architecture import Architecture
from distill_core.pruning.plan import PruningPlan, name_map, preset, pruned
from distill_core.training.memory import Forecast, MemorySettings, forecast
from distill_core.training.settings import TrainingSettings
from distill_core.training.teachers import Teachers

RESULTS = Path(__file__).parent / "results"
NUM_STEPS, NUM_PARTS = 2, 2
"""Further steps, and further parts of a batch, need no more memory."""


class Case(NamedTuple):
    """What is trained, and how."""

    title: str
    family: str
    preset: str | None
    """Of the student; None for a LoRA on the teacher's own weights."""
    recipe: TrainingSettings

    @property
    def heading(self) -> str:
        _, height, width = LATENT_SHAPES[self.family]
        parts = f" in {self.recipe.accumulation_steps} parts" if self.recipe.accumulation_steps > 1 else ""
        return f"{self.title}, {8 * height} x {8 * width} px, batch {self.recipe.batch_size}{parts}"

    @property
    def plan(self) -> PruningPlan | None:
        return self.preset and preset(self.preset)

    @property
    def settings(self) -> MemorySettings:
        return MemorySettings(training=self.recipe, teacher_dtype="fp16", shares_base=self.preset is None)

    @property
    def architectures(self) -> tuple[Architecture, Architecture]:
        """Of teacher and student."""
        teacher = published_teacher(self.family)
        return teacher, pruned(teacher, name_map(teacher, self.plan)) if self.plan else teacher


SMALL_GPU = dict(precision="bf16", optimizer="adamw8bit")
CASES = [
    Case("ssd-1b of sdxl with adamw8bit, for a GPU of 24 GiB", "sdxl", "ssd-1b", TrainingSettings(**SMALL_GPU, batch_size=1)),
    Case("bk-sdm-small of sd1 with adamw8bit, for a GPU of 8 GiB", "sd1", "bk-sdm-small", TrainingSettings(**SMALL_GPU, batch_size=2)),
    Case("workflow prune_distil_sdxl", "sdxl", "ssd-1b",
         TrainingSettings(batch_size=8, accumulation_steps=4, objective="ssd-1b", optimizer="adafactor", precision="bf16", weight_dtype="bf16",
                gradient_checkpointing=True)),
    Case("workflow prune_distil_sd15", "sd1", "bk-sdm-small",
         TrainingSettings(batch_size=8, accumulation_steps=2, precision="bf16", gradient_checkpointing=True)),
    Case("workflow bake_guidance_sd15", "sd1", None,
         TrainingSettings(batch_size=8, objective="guidance", guidance=7.5, caption_dropout=0.0, lora_rank=32, lora_targets=("*attn*",))),
    *(Case(f"a LoRA on {family}, objective {objective}", family, None,
           TrainingSettings(batch_size=8, accumulation_steps=8, objective=objective, guidance=7.5, caption_dropout=0.0, lora_rank=64,
                            lora_targets=("*attn*",), gradient_checkpointing=True))
      for family in ("sd1", "sdxl") for objective in ("guidance", "consistency")),
]  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    RESULTS.mkdir(exist_ok=True)
    sections = []
    for case in CASES:
        architectures, started = case.architectures, time.process_time()
        told = forecast_of(case, *architectures)
        took = f"The forecast took {time.process_time() - started:.1f} s of one processor core."
        sections.append("\n".join([f"## {case.heading}", "", "```", told.describe(), "```", "", took, _measured(case, told)]))
        print(sections[-1], end="\n\n")
    settings = "Teachers in fp16. Students compute in bf16, with weights in float32 (prune_distil_sdxl: bf16); a LoRA as its base, in fp16."
    (RESULTS / "memory.md").write_text("\n\n".join([settings, *sections]) + "\n", encoding="utf-8")


def forecast_of(case: Case, teacher: Architecture, student: Architecture) -> Forecast:
    return forecast(
        teacher=teacher,
        student=student,
        plan=case.plan,
        latent_shape=LATENT_SHAPES[case.family],
        num_tokens=NUM_TOKENS,
        settings=case.settings,
    )


def _measured(case: Case, told: Forecast) -> str:
    if not torch.cuda.is_available():
        return "The real peak was not measured: there is no CUDA device."
    peak = peak_bytes(case, torch.device("cuda"))
    return f"Measured on {torch.cuda.get_device_name()}: {gib(peak)}. Forecast over measured: {told.total_bytes / peak:.3f}."


def peak_bytes(case: Case, device: torch.device) -> int:
    """The most memory that a few steps take at once."""
    (theirs, ours), training = case.architectures, case.settings.training
    teacher = random_denoiser(theirs, device, case.settings.teacher_dtype)
    student = random_denoiser(ours, device, training.weight_dtype) if case.plan else teacher
    teachers = Teachers.single(teacher if case.plan else WithoutLora(student), training)
    _, height, width = LATENT_SHAPES[case.family]
    data = random_data(theirs, 8, (8 * height, 8 * width), NUM_TOKENS, seed=0)
    parts = min(NUM_PARTS, training.accumulation_steps)
    of_part = training.batch_size // training.accumulation_steps
    short = replace(training, total_steps=NUM_STEPS, batch_size=parts * of_part, accumulation_steps=parts)
    return training_cost(short, student=student, teachers=teachers, plan=case.plan, data=data).peak_bytes


if __name__ == "__main__":
    main()
