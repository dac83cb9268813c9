"""Automatic plans against the published positional ones at equal MACs: ``python benchmarks/automatic_plan.py``.

On the teacher of scenes, several seeds each: straight after pruning, and after the same short distillation. Plans chosen at
random show how much the choice matters, and whether what the analysis measures before training tells what comes after it.
Writes ``results/automatic_plan.md``, every figure measured in that run. Figures are kept in ``results/automatic_plan.jsonl``
as they come, so that an interrupted benchmark goes on; a finished one deletes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import correlation
from typing import Any, NamedTuple

import demo_students as demo
import torch
from report import table, with_margin

from distill_core.data.dataset import num_examples
from distill_core.demo.grammar import NUM_TOKENS
from distill_core.demo.teacher import LATENT_SHAPE
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.diffusion.macs import count_macs
from distill_core.pruning.analyse import (
    CRITERIA,
    Analysis,
    Errors,
    Planner,
    Unit,
    decide,
    errors_together,
    examples,
    references_of,
    score,
)
from distill_core.pruning.plan import PruningPlan, name_map, preset
from distill_core.pruning.plan_text import write_plan

PRESETS = ("bk-sdm-base", "bk-sdm-tiny")  # bk-sdm-small saves about as much as bk-sdm-base
CHANCE_LIKE = PRESETS[0]
BY = ", by "
POSITIONAL, CHANCE = "positional", tuple(f"chance {number}" for number in range(1, 6))
NUM_SCORED = 32  # scenes that units are scored by


class Chosen(NamedTuple):
    """A plan, and what the analysis says of it before training."""

    plan: PruningPlan
    errors: Errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="distillation steps (default: %(default)s)")
    arguments = demo.parsed(parser, (POSITIONAL, *CRITERIA, *CHANCE))
    kept = demo.kept("automatic_plan", arguments)
    original, data = demo.teacher(), demo.real_scenes()
    plans = _plans(original, arguments.rows)

    def figures(row: str, seed: int) -> dict[str, Any]:
        plan = plans[row].plan
        student = demo.pruned_student(original, plan)
        before = demo.error(student, original, data)
        demo.train(student, original, plan, data, arguments.steps, seed)
        judged = demo.judged(student, seed, arguments.prompts)
        return judged | {"pruned error": before, "error": demo.error(student, original, data)}

    rows, written = [], []
    found = kept.measure(plans, arguments.seeds, figures)
    for row, of_seeds in found.items():
        (like, who), (plan, errors), student = row.split(BY), plans[row], demo.pruned_student(original, plans[row].plan)
        distances = (with_margin([figures[name] for figures in of_seeds], ".4f") for name in ("pruned error", "error"))
        rows.append([like, who, f"{_macs(student) / _macs(original):.1%}", f"{student.architecture.num_parameters:,}",
                     f"{errors.recovered:.3f}, {errors.prompt:.3f}", *distances, *demo.quality(of_seeds)])  # fmt: skip
        written.append([like, who, f"`{write_plan(plan, original.architecture)}`"])
    kept.publish([
        *table(["MACs as", "chosen by", "MACs of teacher", "parameters", "measured before: output, prompt", "output error, pruned",
                "output error, distilled", *demo.QUALITY], rows), "",
        *table([f"measured before training, MACs as {CHANCE_LIKE}", "rank correlation with the output error after it"],
               _predictions(found, plans)), "",
        *table(["MACs as", "chosen by", "plan"], written), "",
        "Measured before: error of the output and of what the prompt does to it, with the best linear layers in place of what is removed. "
        f"{arguments.steps} steps of batch {demo.BATCH_SIZE} by bk-sdm on {num_examples(data):,} real scenes. {demo.words(arguments)}",
    ])  # fmt: skip


def _plans(original: DiffusersDenoiser, rows: Sequence[str]) -> dict[str, Chosen]:
    """By the preset whose MACs they save at least, and what chose them."""
    data, random, plans = demo.real_scenes(), torch.Generator().manual_seed(0), {}
    picked = torch.randperm(num_examples(data), generator=random)[:NUM_SCORED]
    batches = examples(original, *data.read(0, picked)[:2], num_timesteps=8, generator=random)
    analysis, references = score(original, batches), references_of(original, batches)
    for name in PRESETS:
        budget = _macs(original) - _macs(demo.pruned_student(original, preset(name)))
        for who in (who for who in rows if who not in CHANCE or name == CHANCE_LIKE):
            row = f"{name}{BY}{who}"
            if who in CRITERIA:
                decision = decide(original, batches, Planner(analysis, who), budget, row)
                plans[row] = Chosen(decision.plan, decision.errors)
                continue
            if who == POSITIONAL:
                plan = preset(name)
                units = _units_of(plan, analysis)
            else:
                planner = Planner(_at_random(analysis, CHANCE.index(who)))
                choice = planner.choose(budget)
                plan, units = planner.plan_of(choice, row), choice.units
            plans[row] = Chosen(plan, errors_together(original, batches, references, units))
    return plans


def _at_random(analysis: Analysis, seed: int) -> Analysis:
    """The same units with scores drawn at random."""
    drawn = torch.rand(len(analysis.scores), generator=torch.Generator().manual_seed(seed)).tolist()
    scores = (replace(each, errors=Errors(value, value, 0.0)) for each, value in zip(analysis.scores, drawn, strict=True))
    return replace(analysis, scores=tuple(scores))


def _units_of(plan: PruningPlan, analysis: Analysis) -> list[Unit]:
    """The units that a plan removes, the largest first."""
    left = {block for block in name_map(analysis.teacher, plan).removed if "sample" not in block}
    units = []
    for unit in sorted((each.unit for each in analysis.scores), key=lambda unit: -len(unit.blocks)):
        blocks = {block for block in unit.blocks if "sample" not in block}
        if blocks and blocks <= left:
            units.append(unit)
            left -= blocks
    if left:
        raise ValueError(f"{plan.name} removes {min(left)}, which is part of no unit")
    return units


def _predictions(found: Mapping[str, Sequence[Mapping[str, Any]]], plans: Mapping[str, Chosen]) -> list[list[str]]:
    """How well what is measured before training tells which plan ends nearer to the teacher."""
    measures = {
        "output error, pruned": lambda row: found[row][0]["pruned error"],
        "output, linear layers in place": lambda row: plans[row].errors.recovered,
        "prompt, linear layers in place": lambda row: plans[row].errors.prompt,
        "both, as recoverability": lambda row: plans[row].errors.recoverability(1.0),
    }
    rows = [row for row in found if row.startswith(CHANCE_LIKE + BY)]
    if len(rows) < 3:  # too few to be ranked
        return []
    after = _ranks([sum(figures["error"] for figures in found[row]) for row in rows])
    return [[words, f"{correlation(_ranks([measure(row) for row in rows]), after):+.2f}"] for words, measure in measures.items()]


def _ranks(values: Sequence[float]) -> list[float]:
    """Places in ascending order; equal values share the mean of theirs."""
    return [sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values]


def _macs(denoiser: DiffusersDenoiser) -> int:
    return count_macs(denoiser, LATENT_SHAPE, NUM_TOKENS)


if __name__ == "__main__":
    main()
