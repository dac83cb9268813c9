"""What distillation is worth on the demo: ``python benchmarks/learning.py``.

Students of one size, trained for as many steps on as many examples, several seeds each: distilled, without the teacher's
predictions, from random weights, and distilled on images the teacher made. Writes ``results/learning.md``, every figure
measured in that run. Each student's figures are written to ``results/learning.jsonl``, so that an interrupted
run continues; a finished one deletes it.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from demo_students import BATCH_SIZE, NUM_MADE, pruned_student, random_student, teacher_made, train
from report import Kept, device_words, mean_and_margin, publish, share_interval, table
from tqdm import tqdm

from distill_core.data.dataset import LatentDataset, num_examples
from distill_core.demo.teacher import load_dataset, load_denoiser, teacher_file
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.pruning.plan import PruningPlan, preset, preset_names
from distill_core.quickstart import Settings, judge

WORDS = {"pruned": "the teacher's weights", "random": "random weights", "bk-sdm": "data and teacher", "task": "data alone",
         "real": "real digits", "made": "teacher-made, noised", "states": "teacher-made, its trajectory"}  # fmt: skip


class Student(NamedTuple):
    """How a student comes about."""

    begins: str
    objective: str | None = None
    """None for one that is not trained."""
    data: str | None = None


STUDENTS = {
    "pruned only": Student("pruned"),
    "distilled": Student("pruned", "bk-sdm", "real"),
    "task only": Student("pruned", "task", "real"),
    "from scratch": Student("random", "task", "real"),
    "distilled on made data": Student("pruned", "bk-sdm", "made"),
    "distilled on trajectories": Student("pruned", "bk-sdm", "states"),
}
AGAINST = "distilled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=preset_names("sd1"), default="bk-sdm-small", help="plan (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, 2 to 10 (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=500, help="digits judged of each student (default: %(default)s)")
    arguments = parser.parse_args()
    settings = vars(arguments) | {"batch_size": BATCH_SIZE, "device": device_words()}
    kept = Kept("learning", settings)
    teacher, plan, real = load_denoiser(teacher_file()), preset(arguments.preset), load_dataset()
    to_do = [(name, seed) for seed in range(arguments.seeds) for name in ("teacher", *STUDENTS) if (name, seed) not in kept.found]
    for name, seed in tqdm(to_do):
        student = teacher if name == "teacher" else _student(STUDENTS[name], teacher, plan, real, arguments.steps, seed)
        row, _ = judge(name, student, Settings(num_samples=arguments.samples, seed=seed))
        kept.add(name, seed, {"accuracy": row.accuracy, "frechet": row.frechet_distance})
    found = {key: (figures["accuracy"], figures["frechet"]) for key, figures in kept.found.items()}
    architecture = pruned_student(teacher, plan).architecture
    publish("learning", [
        *_figures(found, arguments), "", *_differences(found, arguments), "",
        f"Experts of {arguments.preset}, {architecture.num_parameters:,} parameters of the teacher's "
        f"{teacher.architecture.num_parameters:,}; {arguments.steps} steps of batch {BATCH_SIZE} on {num_examples(real):,} real "
        f"or {NUM_MADE:,} teacher-made digits, all by the same settings. Means over {arguments.seeds} seeds, "
        f"± half the 95 % interval by Student's t; {arguments.samples} digits judged for each seed, and for all of them together "
        f"the 95 % interval of the accuracy by Wilson. {settings['device']}.",
    ])  # fmt: skip
    kept.finish()


# --- students


def _student(how: Student, teacher, plan: PruningPlan, real: LatentDataset, steps: int, seed: int) -> DiffusersDenoiser:
    student = random_student(teacher, plan, seed) if how.begins == "random" else pruned_student(teacher, plan)
    if how.objective is not None:
        data = real if how.data == "real" else teacher_made(seed)[how.data]
        train(student, teacher, plan, data, steps, seed, objective=how.objective)
    return student


# --- figures


def _figures(found, arguments) -> list[str]:
    rows = []
    for name, how in {"teacher": Student("", None, None), **STUDENTS}.items():
        accuracies, distances = zip(*(found[name, seed] for seed in range(arguments.seeds)), strict=True)
        num_seen = arguments.samples * arguments.seeds
        low, high = share_interval(round(sum(accuracies) * arguments.samples), num_seen)
        rows.append([name, *(WORDS.get(part, "") for part in how), _share(*mean_and_margin(accuracies)), f"{low:.1%} to {high:.1%}",
                     _number(*mean_and_margin(distances))])  # fmt: skip
    return table(
        ["student", "begins with", "learns from", "examples", "accuracy", "of all samples, 95 %", "Fréchet distance"], rows
    )


def _differences(found, arguments) -> list[str]:
    """How much others differ from the distilled student of the same seed."""
    rows = []
    for name in (name for name in STUDENTS if name != AGAINST):
        pairs = [zip(found[name, seed], found[AGAINST, seed], strict=True) for seed in range(arguments.seeds)]
        accuracies, distances = zip(*([other - own for other, own in pair] for pair in pairs), strict=True)
        mean, margin = mean_and_margin(accuracies)
        rows.append([name, f"{100 * mean:+.1f} ± {100 * margin:.1f}", _number(*mean_and_margin(distances), sign="+")])
    return table([f"against {AGAINST}, seed by seed", "accuracy, points", "Fréchet distance"], rows)


def _share(mean: float, margin: float) -> str:
    return f"{mean:.1%} ± {margin:.1%}"


def _number(mean: float, margin: float, sign: str = "") -> str:
    return f"{mean:{sign}.2f} ± {margin:.2f}"


if __name__ == "__main__":
    main()
