"""Automatic plans against the published positional ones at equal MACs: ``python benchmarks/automatic_plan.py``.

On the demo teacher, several seeds each: accuracy and Fréchet distance straight after pruning, and after the same short
distillation. Writes ``results/automatic_plan.md``, every figure measured in that run.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from demo_students import pruned_student, train
from tqdm import tqdm

from distill_core.data.dataset import num_examples
from distill_core.demo import digits
from distill_core.demo.teacher import LATENT_SHAPE, load_dataset, load_denoiser, teacher_file
from distill_core.diffusion.macs import count_macs
from distill_core.pruning.analyse import CRITERIA, Planner, examples, score
from distill_core.pruning.plan import preset
from distill_core.pruning.plan_text import write_plan
from distill_core.quickstart import Settings, judge

RESULTS = Path(__file__).parent / "results"
PRESETS = ("bk-sdm-base", "bk-sdm-tiny")  # bk-sdm-small saves about as much as bk-sdm-base
POSITIONAL = "positional"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="distillation steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default: %(default)s)")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    teacher, dataset = load_denoiser(teacher_file()), load_dataset()
    analysis = _analysis(teacher, dataset)
    rows, plans = [], []
    with tqdm(total=len(PRESETS) * (1 + len(CRITERIA)) * arguments.seeds) as progress:
        for name in PRESETS:
            budget = _macs(teacher) - _macs(pruned_student(teacher, preset(name)))
            by = {POSITIONAL: preset(name)}
            by |= {c: Planner(analysis, c).plan(budget, f"{name}, by {c}") for c in CRITERIA}
            for who, plan in by.items():
                student = pruned_student(teacher, plan)
                share = _macs(student) / _macs(teacher)
                plans.append(f"| {name} | {who} | `{write_plan(plan, teacher.architecture)}` |")
                found = []
                for seed in range(arguments.seeds):
                    found.append(_judged(teacher, dataset, plan, seed, arguments.steps))
                    progress.update()
                rows.append(_row(name, who, share, student.architecture.num_parameters, found))
    lines = ["| MACs as | chosen by | MACs of teacher | parameters | pruned: accuracy | pruned: Fréchet | distilled: accuracy "
             "| distilled: Fréchet |", "|" + "---|" * 8, *rows, "", "| MACs as | chosen by | plan |", "|" + "---|" * 3, *plans, "",
             f"Mean and range over {arguments.seeds} seeds; {arguments.steps} steps of batch 64, 300 digits judged each."]  # fmt: skip
    (RESULTS / "automatic_plan.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _analysis(teacher, dataset):
    random = torch.Generator().manual_seed(0)
    picked = torch.randperm(num_examples(dataset), generator=random)[:32]
    return score(teacher, examples(teacher, *dataset.read(0, picked)[:2], num_timesteps=8, generator=random))


def _macs(denoiser) -> int:
    return count_macs(denoiser, LATENT_SHAPE, digits.NUM_TOKENS)


def _judged(teacher, dataset, plan, seed: int, steps: int) -> tuple[float, float, float, float]:
    """Accuracy and Fréchet distance, straight after pruning and after distillation."""
    student, settings = pruned_student(teacher, plan), Settings(num_samples=300, seed=seed)
    before, _ = judge("pruned", student, settings)
    train(student, teacher, plan, dataset, steps, seed)
    after, _ = judge("distilled", student, settings)
    return before.accuracy, before.frechet_distance, after.accuracy, after.frechet_distance


def _row(name: str, who: str, share: float, parameters: int, found: list[tuple[float, ...]]) -> str:
    columns = list(zip(*found, strict=True))
    cells = [
        f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
        for values, form in zip(columns, (".1%", ".1f", ".1%", ".2f"), strict=True)
    ]
    return f"| {name} | {who} | {share:.1%} | {parameters:,} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
