"""What distillation is worth on the demo: ``python benchmarks/learning.py``.

Students of one size, trained for as many steps on as many examples, several seeds each: by every published objective, without
the teacher's predictions, from random weights, and on images the teacher made. Writes ``results/learning.md``, every
figure measured in that run. Each student's figures are written to ``results/learning.jsonl``, so that an interrupted run
continues; a finished one deletes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import demo_students as demo
from report import table, with_margin

from distill_core.data.dataset import num_examples
from distill_core.demo.grammar import CATEGORIES
from distill_core.demo.score import KINDS
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.pruning.plan import PruningPlan, preset, preset_names

TEACHER, DISTILLED = "teacher", "distilled"
REAL, RANDOM = "real", "random weights"
EXAMPLES = {REAL: "real scenes", "made": "teacher-made, noised", "states": "teacher-made, its trajectory"}


class Student(NamedTuple):
    """How a student comes about, and the words for it."""

    begins: str = "the teacher's weights"
    learns: str = ""
    changes: dict[str, Any] | None = None
    """Of the recipe; None for one that is not trained."""
    examples: str = REAL


STUDENTS = {
    TEACHER: Student(begins=""),
    "pruned only": Student(),
    "from scratch": Student(RANDOM, "data alone", {"objective": "task"}),
    "task only": Student(learns="data alone", changes={"objective": "task"}),
    "output only": Student(learns="the teacher's outputs", changes={"task_weight": 0.0, "feature_weight": 0.0}),
    DISTILLED: Student(learns="bk-sdm: data, outputs, features of stages", changes={}),
    "segmind": Student(learns="the same, teacher at half weight", changes={"objective": "segmind"}),
    "ssd-1b": Student(learns="features of layers", changes={"objective": "ssd-1b"}),
    "koala": Student(learns="features of self-attention", changes={"objective": "koala"}),
    "laptop-diff": Student(learns="features normalised", changes={"objective": "laptop-diff"}),
    "on made data": Student(learns="as distilled", changes={}, examples="made"),
    "on trajectories": Student(learns="as distilled", changes={}, examples="states"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=preset_names("sd1"), default="bk-sdm-base", help="plan (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    arguments = demo.parsed(parser)
    kept = demo.kept("learning", arguments)
    original, plan, real = demo.teacher(), preset(arguments.preset), demo.real_scenes()

    def figures(name: str, seed: int) -> dict[str, Any]:
        student = _student(name, original, plan, arguments.steps, seed)
        return demo.judged(student, seed, arguments.prompts) | {"error": demo.error(student, original, real)}

    found = kept.measure(STUDENTS, arguments.seeds, figures)
    architecture = demo.pruned_student(original, plan).architecture
    kept.publish([
        *_figures(found), "", *_differences(found), "", *_categories(found), "",
        f"Students of {arguments.preset}, {architecture.num_parameters:,} parameters of the teacher's "
        f"{original.architecture.num_parameters:,}; {arguments.steps} steps of batch {demo.BATCH_SIZE} on {num_examples(real):,} real "
        f"or {demo.NUM_MADE:,} teacher-made scenes, all by the same settings. {demo.words(arguments)}",
    ])  # fmt: skip


def _student(name: str, original: DiffusersDenoiser, plan: PruningPlan, steps: int, seed: int) -> DiffusersDenoiser:
    if name == TEACHER:
        return original
    how = STUDENTS[name]
    student = demo.random_student(original, plan, seed) if how.begins == RANDOM else demo.pruned_student(original, plan)
    if how.changes is not None:
        data = demo.real_scenes() if how.examples == REAL else demo.teacher_made(seed)[how.examples]
        demo.train(student, original, plan, data, steps, seed, **how.changes)
    return student


# --- figures

Found = Mapping[str, Sequence[Mapping[str, Any]]]


def _figures(found: Found) -> list[str]:
    rows = [
        [name, how.begins, how.learns, EXAMPLES[how.examples] if how.learns else "", *demo.quality(found[name]),
         with_margin([figures["error"] for figures in found[name]], ".4f")]
        for name, how in STUDENTS.items()
    ]  # fmt: skip
    return table(["student", "begins with", "learns from", "examples", *demo.QUALITY, "output error"], rows)


def _differences(found: Found) -> list[str]:
    """How much others differ from the distilled student of the same seed."""
    rows = []
    for name in (name for name in STUDENTS if name not in (TEACHER, DISTILLED)):
        pairs = list(zip(found[name], found[DISTILLED], strict=True))
        rows.append([
            name,
            *(with_margin([100 * (_share(a, kind) - _share(b, kind)) for a, b in pairs], "+.1f") for kind in KINDS),
            with_margin([a["frechet"] - b["frechet"] for a, b in pairs], "+.2f"),
        ])  # fmt: skip
    columns = [f"against {DISTILLED}, seed by seed", "trained prompts, points", "held-out prompts, points", "Fréchet distance"]
    return table(columns, rows)


def _share(figures: Mapping[str, Any], kind: str) -> float:
    return demo.scored([figures], kind).overall


def _categories(found: Found) -> list[str]:
    columns, rows = [(category, kind) for category in CATEGORIES for kind in KINDS], []
    for name, figures in found.items():
        shares = {kind: demo.scored(figures, kind).by_category for kind in KINDS}
        rows.append([name, *(f"{shares[kind][category]:.0%}" if category in shares[kind] else "" for category, kind in columns)])
    return table(["student", *map(", ".join, columns)], rows)


if __name__ == "__main__":
    main()
