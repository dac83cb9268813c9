"""The memory of a training step, forecast part by part and measured: ``python benchmarks/memory.py``.

Two published students on the smallest GPUs they are meant for, and what the workflows ask for as they are shipped. Where
there is a CUDA device the same steps run on it, with random weights and random data, and the peak that torch allocates is set
beside the forecast; without one nothing is measured. Writes ``results/memory.md``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from distill_core.base.precision import DTYPES
from distill_core.base.sizes import gib
from distill_core.data.dataset import Bucket, LatentDataset
from distill_core.diffusion.conditioning import Label
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.evaluation.catalog import LATENT_SHAPES, NUM_TOKENS, published_teacher
from distill_core.lora.layers import WithoutLora
from distill_core.networks.architecture import Architecture
from distill_core.networks.build import build_unet
from distill_core.pruning.plan import PruningPlan, name_map, preset, pruned
from distill_core.training.loop import Training
from distill_core.training.memory import Forecast, MemorySettings, forecast
from distill_core.training.processes import ALONE
from distill_core.training.run import Run
from distill_core.training.settings import TrainingSettings
from distill_core.training.teachers import Teachers

RESULTS = Path(__file__).parent / "results"
NUM_STEPS = 3  # the first makes the optimiser's state


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
]  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    RESULTS.mkdir(exist_ok=True)
    sections = []
    for case in CASES:
        architectures, started = case.architectures, time.process_time()
        told = _forecast(case, *architectures)
        took = f"The forecast took {time.process_time() - started:.1f} s of one processor core."
        sections.append("\n".join([f"## {case.heading}", "", "```", told.describe(), "```", "", took, _measured(case, told)]))
        print(sections[-1], end="\n\n")
    settings = "Teachers in fp16. Students compute in bf16, with weights in float32 (prune_distil_sdxl: bf16); a LoRA as its base, in fp16."
    (RESULTS / "memory.md").write_text("\n\n".join([settings, *sections]) + "\n", encoding="utf-8")


def _forecast(case: Case, teacher: Architecture, student: Architecture) -> Forecast:
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
    peak = _peak_bytes(case, torch.device("cuda"))
    device = torch.cuda.get_device_name()
    return f"Measured on {device}: {gib(peak)}. Forecast over measured: {told.total_bytes / peak:.3f}."


def _peak_bytes(case: Case, device: torch.device) -> int:
    """The most torch allocates at once in a few steps."""
    (theirs, ours), recipe = case.architectures, case.settings.training
    teacher = _random(theirs, device, DTYPES[case.settings.teacher_dtype])
    student = _random(ours, device, DTYPES[recipe.weight_dtype]) if case.plan else teacher
    teachers = Teachers.single(teacher if case.plan else WithoutLora(student), recipe)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", recipe)
        data = _data(theirs, LATENT_SHAPES[case.family])
        training = Training(run, student, teachers, case.plan, data, ALONE)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        with training.open():
            for step in range(NUM_STEPS):
                training.step(step)
        return torch.cuda.max_memory_allocated(device)


def _random(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> DiffusersDenoiser:
    with device:
        network = build_unet(architecture).eval().requires_grad_(False)
    torch.nn.Module.to(network, dtype)  # that of diffusers warns
    return DiffusersDenoiser(network=network, architecture=architecture)


def _data(teacher: Architecture, latent_shape: tuple[int, int, int], num_examples: int = 8) -> LatentDataset:
    contexts, label = torch.randn(num_examples, NUM_TOKENS, teacher.context_width), None
    if teacher.label_width:
        size_px = 8 * latent_shape[1], 8 * latent_shape[2]
        label = Label.neutral(teacher.label_width, num_examples, size_px, contexts)
    pooled, sizes = label or (None, None)
    return LatentDataset(
        [Bucket(latents=torch.randn(num_examples, *latent_shape), contexts=contexts, pooled=pooled, sizes=sizes)]
    )


if __name__ == "__main__":
    main()
