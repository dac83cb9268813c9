"""Automatic plans against the published positional ones at equal MACs: ``python benchmarks/automatic_plan.py``.

On the teacher of scenes, several seeds each: straight after pruning, and after the same short distillation. Writes
``results/automatic_plan.md``, every figure measured in that run. Figures are kept in ``results/automatic_plan.jsonl`` as they
come, so that an interrupted benchmark goes on; a finished one deletes it.
"""

from __future__ import annotations

import argparse
from typing import Any

import demo_students as demo
import torch
from report import publish, table, with_margin

from distill_core.data.dataset import num_examples
from distill_core.demo.grammar import NUM_TOKENS
from distill_core.demo.teacher import LATENT_SHAPE
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.diffusion.macs import count_macs
from distill_core.pruning.analyse import CRITERIA, Planner, decide, examples, score
from distill_core.pruning.plan import PruningPlan, preset
from distill_core.pruning.plan_text import write_plan

PRESETS = ("bk-sdm-base", "bk-sdm-tiny")  # bk-sdm-small saves about as much as bk-sdm-base
BY = ", by "
NUM_SCORED = 32  # scenes that units are scored by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="distillation steps (default: %(default)s)")
    arguments = demo.parsed(parser)
    kept = demo.kept("automatic_plan", arguments)
    original, data = demo.teacher(), demo.real_scenes()
    plans = _plans(original)

    def figures(row: str, seed: int) -> dict[str, Any]:
        student = demo.pruned_student(original, plans[row])
        before = demo.error(student, original, data)
        demo.train(student, original, plans[row], data, arguments.steps, seed)
        judged = demo.judged(student, seed, arguments.prompts)
        return judged | {"pruned error": before, "error": demo.error(student, original, data)}

    rows, written = [], []
    for row, found in kept.measure(plans, arguments.seeds, figures).items():
        (like, who), plan, student = row.split(BY), plans[row], demo.pruned_student(original, plans[row])
        errors = (with_margin([figures[name] for figures in found], ".4f") for name in ("pruned error", "error"))
        rows.append([like, who, f"{_macs(student) / _macs(original):.1%}", f"{student.architecture.num_parameters:,}", *errors,
                     *demo.quality(found)])  # fmt: skip
        written.append([like, who, f"`{write_plan(plan, original.architecture)}`"])
    publish("automatic_plan", [
        *table(["MACs as", "chosen by", "MACs of teacher", "parameters", "output error, pruned", "output error, distilled", *demo.QUALITY],
               rows), "",
        *table(["MACs as", "chosen by", "plan"], written), "",
        f"{arguments.steps} steps of batch {demo.BATCH_SIZE} by bk-sdm on {num_examples(data):,} real scenes. {demo.words(arguments)}",
    ])  # fmt: skip
    kept.finish()


def _plans(original: DiffusersDenoiser) -> dict[str, PruningPlan]:
    """By the preset whose MACs they save at least, and what chose them."""
    data, random, plans = demo.real_scenes(), torch.Generator().manual_seed(0), {}
    picked = torch.randperm(num_examples(data), generator=random)[:NUM_SCORED]
    batches = examples(original, *data.read(0, picked)[:2], num_timesteps=8, generator=random)
    analysis = score(original, batches)
    for name in PRESETS:
        plans[f"{name}{BY}positional"] = preset(name)
        budget = _macs(original) - _macs(demo.pruned_student(original, preset(name)))
        for criterion in CRITERIA:
            decision = decide(original, batches, Planner(analysis, criterion), budget, f"{name}{BY}{criterion}")
            plans[f"{name}{BY}{criterion}"] = decision.plan
    return plans


def _macs(denoiser: DiffusersDenoiser) -> int:
    return count_macs(denoiser, LATENT_SHAPE, NUM_TOKENS)


if __name__ == "__main__":
    main()
