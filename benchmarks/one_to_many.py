"""What experts of their own range are worth on the demo: ``python benchmarks/one_to_many.py``.

One, two and four experts of one size, so that a sampling step costs the same; as many training steps for each student,
and one student trained for as long as four together. Then, at equal total steps: what experts begin as, where the
boundaries are, and one base with an adapter per range in place of whole experts. Writes ``results/one_to_many.md``,
every figure measured in that run. ``--steps 1000`` asks the first four rows of students that were trained for longer, and
writes ``results/one_to_many_1000.md``. Figures are kept in ``results/one_to_many.jsonl`` as they come, and
unfinished runs in ``results/one_to_many.runs``, so that an interrupted benchmark goes on; the finished one deletes both.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import demo_students as demo
from report import RESULTS, mean_and_margin, table, with_margin

from distill_core.base.storage import atomic
from distill_core.evaluation.metrics import output_error
from distill_core.networks.files import open_unet
from distill_core.pruning.plan import preset, preset_names
from distill_core.routing.one_to_many import ExpertsSettings, OneToMany, Start
from distill_core.routing.router import ExpertDenoiser
from distill_core.training.run import Inputs
from distill_core.training.settings import TrainingSettings

NUM_BINS, NUM_STEPS = 10, 200
SAVE_EVERY = 250  # steps; of those that an interrupted benchmark has to repeat


class Row(NamedTuple):
    """Experts of one row; steps are in parts of those one student has."""

    count: int = 4
    joint: float = 0.5
    """Over all timesteps, before the experts part."""
    each: float = 0.5
    """Of each student in its range."""
    split: str = "timesteps"
    lora: dict[str, Any] = {}

    def steps(self, unit: int) -> tuple[int, int]:
        """Steps together, and of each student after them."""
        return round(self.joint * unit), round(self.each * unit)

    def total(self, unit: int) -> int:
        joint, each = self.steps(unit)
        return joint + self.count * each


ONE, TWO, FOUR, LONG = "one student", "two experts", "four experts", "one student, as long as all four"
APART, HALF = "begun apart", "half together"
LOG_SNR, ERROR, LORA = "even log-SNR", "even error", "base and adapters"
ROWS = {
    ONE: Row(count=1, joint=1, each=0),
    FOUR: Row(),
    TWO: Row(count=2),
    LONG: Row(count=1, joint=2.5, each=0),
    APART: Row(joint=0, each=0.625),
    HALF: Row(joint=1.25, each=0.3125),
    ERROR: Row(joint=1.25, each=0.3125, split="error"),
    LOG_SNR: Row(joint=1.25, each=0.3125, split="log-snr"),
    LORA: Row(joint=1.25, each=0.3125, lora={"lora_rank": 8, "lora_targets": ("*",)}),
}
"""One, two and four experts have as many steps behind each, those it had as one with the others included; of four experts
all rows have as many in total, and so has the one that is trained as long."""
MAIN = (ONE, TWO, FOUR, LONG)
"""Asked with any number of steps."""


class Figures(NamedTuple):
    """What was measured of one row with one seed."""

    errors: Sequence[float]
    num_bytes: int
    boundaries: Sequence[float]
    judged: dict[str, Any]

    @property
    def error(self) -> float:
        return sum(self.errors) / len(self.errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=preset_names("sd1"), default="bk-sdm-small", help="plan (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="training steps of a student (default: %(default)s)")
    arguments = demo.parsed(parser, ROWS)
    name = "one_to_many"
    if arguments.steps != NUM_STEPS:
        name += f"_{arguments.steps}"
        arguments.rows = MAIN if arguments.complete else arguments.rows
    kept, students = demo.kept(name, arguments), Students(arguments, RESULTS / f"{name}.runs")
    measured = kept.measure(arguments.rows, arguments.seeds, lambda row, seed: students.figures(row, seed)._asdict())
    found = {row: [Figures(**figures) for figures in of_seeds] for row, of_seeds in measured.items()}
    kept.publish(_report(found, arguments))
    if arguments.complete:
        shutil.rmtree(students.folder, ignore_errors=True)


# --- experts


class Students:
    """The demo's teacher and data, and experts of them."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.arguments, self.unit, self.folder = arguments, arguments.steps, folder
        self.teacher, self.plan, self.dataset = demo.teacher(), preset(arguments.preset), demo.real_scenes()

    def figures(self, name: str, seed: int) -> Figures:
        """Train and measure; runs that others begin with stay."""
        row = ROWS[name]
        training = self.training(name, row, seed)
        if row.count == 1:
            training.train(num_steps=training.stages["joint"])
            file, student = training.run("joint").result_file, demo.pruned_student(self.teacher, self.plan)
            student.load_state_dict(open_unet(file).state_dict)
            num_bytes, boundaries = file.stat().st_size, ()
        else:
            if row.joint == ROWS[HALF].joint:
                self.begin_with(self.training(HALF, ROWS[HALF], seed), training)
            training.train()
            student = ExpertDenoiser.open(training.experts, self.teacher.device)
            num_bytes, boundaries = training.experts.num_bytes, training.experts.ranges.boundaries
        errors = output_error(
            student, self.teacher, self.dataset, num_bins=NUM_BINS, num_batches=demo.ERROR_BATCHES, seed=demo.ERROR_SEED
        )
        images = demo.judged(student, seed, self.arguments.prompts)
        if name != HALF:
            shutil.rmtree(training.folder)
        return Figures(errors.tolist(), num_bytes, boundaries, images)

    def training(self, name: str, row: Row, seed: int) -> OneToMany:
        joint, each = row.steps(self.unit)
        return OneToMany(
            self.folder / f"{name.replace(' ', '_')}_{seed}",
            ExpertsSettings(count=row.count, split=row.split, joint_steps=joint),
            TrainingSettings(**demo.settings_of(max(1, each), seed) | {"save_every_steps": SAVE_EVERY}, **row.lora),
            starts=[Start(self.plan, partial(demo.pruned_student, self.teacher, self.plan))],
            teachers=[lambda: self.teacher],
            inputs=Inputs(teachers=("scenes",)),
            schedule=self.teacher.schedule,
            dataset=self.dataset,
        )

    def begin_with(self, half: OneToMany, several: OneToMany) -> None:
        """The student they begin as is the same in all rows, and trained once."""
        if several.folder == half.folder:
            return
        half.train(num_steps=half.stages["joint"] - half.steps_of("joint"))
        if not (target := several.folder / "joint").exists():
            with atomic(target) as made:
                shutil.copytree(half.folder / "joint", made)


# --- figures


def _report(found: dict[str, list[Figures]], arguments: argparse.Namespace) -> list[str]:
    unit = arguments.steps

    def of(name: str) -> list[Figures]:
        return found[name]

    def error(name: str) -> str:
        return with_margin([figures.error for figures in of(name)], ".5f")

    def against(name: str, other: str) -> str:
        if name == other:
            return ""
        return with_margin([a.error / b.error - 1 for a, b in zip(of(name), of(other), strict=True)], "+.1%")

    def trained(name: str) -> str:
        (joint, each), count = ROWS[name].steps(unit), ROWS[name].count
        return " + ".join(filter(None, [f"{joint}" if joint else "", f"{count} x {each}" if each else ""]))

    def steps(name: str) -> list[str]:
        return [trained(name), f"{ROWS[name].total(unit):,}"]

    def kib(name: str) -> str:
        return f"{of(name)[0].num_bytes / 1024:,.0f}"

    def bins(name: str) -> list[str]:
        return [name, *(f"{mean_and_margin(errors)[0]:.4f}" for errors in zip(*(f.errors for f in of(name)), strict=True))]

    def boundaries(name: str) -> str:
        return "; ".join(dict.fromkeys(", ".join(f"{b:.0f}" for b in figures.boundaries) for figures in of(name)))

    def row(label: str, name: str, other: str) -> list[str]:
        return [
            label,
            *steps(name),
            error(name),
            against(name, other),
            *demo.quality([figures.judged for figures in of(name)]),
            kib(name),
        ]

    def rows(labels: dict[str, str], other: str) -> list[str]:
        columns = ["", "training steps", "in total", "mean output error", f"against {labels[other]}", *demo.QUALITY,
                   "KiB on disk"]  # fmt: skip
        return table(columns, (row(label, name, other) for name, label in labels.items()))

    each_bin = 1000 // NUM_BINS
    parts = [
        (MAIN, f"Experts at equal cost per sampling step, {unit} training steps behind each but the last:",
         lambda: rows({name: name for name in MAIN}, ONE)),
        (MAIN, "Output error over timesteps:",
         lambda: table(["timesteps", *(f"{i * each_bin} to {(i + 1) * each_bin - 1}" for i in range(NUM_BINS))],
                       map(bins, MAIN))),
        ([APART, FOUR, HALF], "What four experts begin as, by as many steps in total:",
         lambda: rows({APART: "the pruned teacher", FOUR: "one student distilled over all timesteps",
                       HALF: "the same, for half of all steps"}, APART)),
        ([HALF, LOG_SNR, ERROR], "What is even between their boundaries:",
         lambda: [*rows({HALF: "timesteps", LOG_SNR: "log-SNR", ERROR: "error of the one student"}, HALF), "",
                  *table(["what is even", "boundaries, seed by seed where they differ"],
                         [["timesteps", boundaries(HALF)], ["log-SNR", boundaries(LOG_SNR)],
                          ["error of the one student", boundaries(ERROR)]])]),
        ([HALF, LORA], "One base and an adapter for each range in place of whole experts:",
         lambda: rows({HALF: "four whole experts", LORA: _adapter_words()}, HALF)),
    ]  # fmt: skip
    return [
        *(line for needed, title, lines in parts if found.keys() >= set(needed) for line in (title, "", *lines(), "")),
        f"Experts of {arguments.preset}, batch {demo.BATCH_SIZE}, real scenes, all by the same settings; steps are those of one student "
        "over all timesteps, then of each in its range, and in each part the learning rate falls to 0. Output error: mean squared "
        "distance to the teacher's answer, the noise being of no training step, "
        f"{demo.ERROR_BATCHES * demo.BATCH_SIZE} examples in each of {NUM_BINS} bins of timesteps (`metrics.output_error`), and differences "
        f"seed by seed. {demo.words(arguments)}",
    ]


def _adapter_words() -> str:
    return f"base and LoRAs of rank {ROWS[LORA].lora['lora_rank']} on every layer"


if __name__ == "__main__":
    main()
