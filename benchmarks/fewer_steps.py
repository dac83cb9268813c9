"""What reaches the quality of plain distillation in half the steps: ``python benchmarks/fewer_steps.py``.

Each recipe trains students of the demo, most for half the steps of the plain one; seconds are those of training
alone, on a CPU the process's own, which other work on the machine does not lengthen. Writes ``results/fewer_steps.md``,
every figure measured in that run; figures are kept in ``results/fewer_steps.jsonl`` as they come, so that an interrupted
benchmark goes on.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, NamedTuple

import demo_students as demo
from report import mean_and_margin, table, with_margin

from distill_core.pruning.plan import preset, preset_names
from distill_core.training.settings import REFIT_EXAMPLES

PLAIN_RATE = 1e-3
REFIT = {"refit_examples": REFIT_EXAMPLES, "learning_rate": 3 * PLAIN_RATE}


class Recipe(NamedTuple):
    """Settings over those of the plain recipe, bk-sdm with the learning rate `PLAIN_RATE`."""

    changes: dict[str, Any] = {}
    share: float = 0.5
    """Of its steps."""


RECIPES = {
    "plain": Recipe(share=1),
    "plain, half": Recipe(),
    "rate x 2": Recipe({"learning_rate": 2 * PLAIN_RATE}),
    "rate x 3": Recipe({"learning_rate": 3 * PLAIN_RATE}),
    "min-snr": Recipe({"weighting": "min-snr"}),
    "normalised features": Recipe({"objective": "laptop-diff"}),
    "layer-level features": Recipe({"objective": "ssd-1b"}),
    "without the task": Recipe({"task_weight": 0.0}),
    "output and features x 4": Recipe({"output_weight": 4.0, "feature_weight": 4.0}),
    "average": Recipe({"ema_decay": 0.99}),
    "refit": Recipe({"refit_examples": REFIT_EXAMPLES}),
    "refit, rate x 3": Recipe(REFIT),
    "refit, rate x 3, a quarter": Recipe(REFIT, share=0.25),
    "refit, rate x 3, normalised features": Recipe(REFIT | {"objective": "laptop-diff"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=preset_names("sd1"), default="bk-sdm-base", help="plan (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="steps of the plain recipe (default: %(default)s)")
    arguments = demo.parsed(parser, RECIPES)
    kept = demo.kept("fewer_steps", arguments)
    rows = []
    for name, found in kept.measure(arguments.rows, arguments.seeds, partial(_figures, arguments)).items():
        seconds, _ = mean_and_margin([figures["seconds"] for figures in found])
        errors = with_margin([figures["error"] for figures in found], ".5f")
        rows.append([name, f"{round(RECIPES[name].share * arguments.steps)}", f"{seconds:.0f}", errors, *demo.quality(found)])
    kept.publish([
        *table(["recipe", "steps", "seconds", "output error", *demo.QUALITY], rows), "",
        f"Students of {arguments.preset}, batch {demo.BATCH_SIZE}, real scenes. {demo.words(arguments)}",
    ])  # fmt: skip


def _figures(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    recipe, original, plan, data = RECIPES[name], demo.teacher(), preset(arguments.preset), demo.real_scenes()
    student, clock = demo.pruned_student(original, plan), demo.clock(original)
    started = clock()
    demo.train(
        student,
        original,
        plan,
        data,
        round(recipe.share * arguments.steps),
        seed,
        **{"learning_rate": PLAIN_RATE} | recipe.changes,
    )
    seconds = clock() - started
    return demo.judged(student, seed, arguments.prompts) | {"error": demo.error(student, original, data), "seconds": seconds}


if __name__ == "__main__":
    main()
