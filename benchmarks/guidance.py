"""Guidance learnt by a LoRA on the demo's own teacher: ``python benchmarks/guidance.py``.

The student is the teacher with the LoRA on, evaluated once a step. How near are its pictures to those the teacher draws with
guidance, from the same noise, against how near the teacher's own are without? By LoRAs trained on real digits that are noised
anew, and on the states of the teacher's guided sampling. Writes ``results/guidance.md``, every figure measured
in that run; figures are kept in ``results/guidance.jsonl`` as they come, so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from demo_students import BATCH_SIZE, teacher_made
from report import Kept, device_words, mean_and_margin, publish, table
from torch import Tensor
from tqdm import tqdm

from distill_core.demo import digits
from distill_core.demo.teacher import LATENT_SHAPE, load_dataset, load_denoiser, teacher_file
from distill_core.diffusion.conditioning import Caption
from distill_core.diffusion.denoiser import Denoiser
from distill_core.diffusion.sampling import sample
from distill_core.lora.layers import WithoutLora
from distill_core.training.loop import distill
from distill_core.training.run import Run
from distill_core.training.settings import TrainingSettings

DATA = {"real digits, noised": "real", "the teacher's guided sampling": "states"}
UNGUIDED, GUIDED = "teacher, one pass", "teacher, guided"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guidance", type=float, default=2.0, help="scale that is learnt (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, 2 to 10 (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=500, help="digits of each student (default: %(default)s)")
    arguments = parser.parse_args()
    settings = {name: value for name, value in vars(arguments).items() if name != "seeds"}  # figures of each seed stay true
    kept = Kept("guidance", settings | {"batch_size": BATCH_SIZE, "device": device_words()})
    for seed in tqdm(range(arguments.seeds)):
        for name in (GUIDED, UNGUIDED, *DATA):
            if (name, seed) not in kept.found:
                kept.add(name, seed, _figures(name, seed, arguments))
    publish("guidance", _report(kept, arguments))
    kept.finish()


def _figures(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Distance of a student's latents to the guided teacher's and its square, means over digits, and how many digits are right."""
    guided = _guided(seed, arguments.guidance, arguments.samples)
    if name == GUIDED:
        latents = guided
    elif name == UNGUIDED:
        latents = _draw(load_denoiser(teacher_file()), seed, 1.0, arguments.samples)
    else:
        latents = _draw(_student(DATA[name], seed, arguments), seed, 1.0, arguments.samples)
    labels = torch.arange(arguments.samples) % 10
    right = digits.accuracy(digits.DigitsClassifier.bundled(), digits.decode(latents).clamp(-1, 1), labels)
    distances = (latents - guided).flatten(1).norm(dim=1)
    return {"distance": distances.mean().item(), "squared": distances.square().mean().item(), "accuracy": right}


@cache
def _guided(seed: int, guidance: float, count: int) -> Tensor:
    return _draw(load_denoiser(teacher_file()), seed, guidance, count)


def _draw(denoiser: Denoiser, seed: int, guidance: float, count: int) -> Tensor:
    """Digits 0 to 9 in turn, from noise that is the same for all, (count, C, H, W)."""
    text = digits.DigitsTextEncoder.bundled()
    context, null = text.captions([digits.caption(n) for n in range(10)]), Caption(text.captions([""])[0])
    noise = torch.randn(count, *LATENT_SHAPE, generator=torch.Generator().manual_seed(10_000 + seed))
    parts = torch.arange(count).split(100)
    return torch.cat([sample(denoiser, context[p % 10], null, noise=noise[p], guidance=guidance).cpu() for p in parts])


def _student(data: str, seed: int, arguments: argparse.Namespace) -> Denoiser:
    """The teacher's network with a LoRA on it that was trained against the same network without."""
    student = load_denoiser(teacher_file())
    dataset = load_dataset() if data == "real" else teacher_made(seed, arguments.guidance)[data]
    recipe = TrainingSettings(objective="guidance", guidance=arguments.guidance, caption_dropout=0.0, lora_rank=arguments.rank, lora_targets=("*",),
                    total_steps=arguments.steps, batch_size=BATCH_SIZE, learning_rate=arguments.rate, lr_schedule="cosine", warmup_steps=20,
                    weight_decay=0.0, seed=seed, save_every_steps=arguments.steps)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", recipe)
        distill(run, student=student, teacher=WithoutLora(student), plan=None, dataset=dataset)
    return student


def _report(kept: Kept, arguments: argparse.Namespace) -> list[str]:
    rows = []
    for name in (GUIDED, UNGUIDED, *DATA):
        figures = [kept.found[name, seed] for seed in range(arguments.seeds)]
        unguided = [kept.found[UNGUIDED, seed] for seed in range(arguments.seeds)]
        shares = {
            what: [100 * figure[what] / whole[what] for figure, whole in zip(figures, unguided, strict=True)]
            for what in ("distance", "squared")
        }
        cells = (
            _with_margin([figure["distance"] for figure in figures], "{:.4f}"),
            _with_margin(shares["distance"], "{:.1f}", " %"),
            _with_margin(shares["squared"], "{:.1f}", " %"),
            _with_margin([100 * figure["accuracy"] for figure in figures], "{:.1f}", " %"),
        )
        rows.append([name if name in (GUIDED, UNGUIDED) else f"LoRA, {name}", "2" if name == GUIDED else "1", *cells])
    columns = ["drawn by", "evaluations a step", "distance to guided", "of the teacher's in one pass", "squared", "accuracy"]
    return [
        *table(columns, rows),
        "",
        f"LoRAs of rank {arguments.rank} on every layer, {arguments.steps} steps of batch {BATCH_SIZE}, guidance {arguments.guidance:g}. "
        f"Distances between latents from the same noise; {arguments.samples} digits a seed, means over "
        f"{arguments.seeds} seeds ± half the 95 % interval by Student's t. {device_words()}.",
    ]


def _with_margin(values: list[float], form: str, unit: str = "") -> str:
    mean, margin = mean_and_margin(values)
    return f"{form.format(mean)}{unit} ± {form.format(margin)}{unit}"


if __name__ == "__main__":
    main()
