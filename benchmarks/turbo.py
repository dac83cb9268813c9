"""Few steps of sampling, by LoRAs on the teacher of scenes: ``python benchmarks/turbo.py``.

How right, how near to real scenes and how varied are images in 2, 4 and 8 evaluations by the teacher alone and by LoRAs that
learnt guidance or to sample so (the objectives consistency and dmd), against the teacher with 20 guided steps, and what does a
image cost? Then the same for a pruned and distilled student, and LoRAs on that. Minutes are those of training. Writes ``results/turbo.md``, every figure measured in that run; figures are kept in ``results/turbo.jsonl`` as they come, so that an
interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any, NamedTuple

import demo_students as demo
from report import table, with_margin

from distill_core.demo.grammar import random_scenes
from distill_core.demo.teacher import sampled_latents
from distill_core.diffusion.denoiser import Denoiser
from distill_core.pruning.plan import preset

TIMED_PICTURES, TIMED_TURNS = 16, 3


class Row(NamedTuple):
    """How images are drawn."""

    steps: int
    guidance: float = demo.GUIDANCE
    objective: str = ""
    """That a LoRA learns, its guidance included; empty for none."""
    longer: int = 1
    """How many times as long it learns."""
    by_student: bool = False
    """Whether they are drawn by a pruned and distilled student."""

    @property
    def evaluations(self) -> int:
        return self.steps * (1 if self.guidance == 1 else 2)

    @property
    def how(self) -> dict[str, Any]:
        """As `sampled_latents` takes it."""
        return {"guidance": self.guidance, "num_steps": self.steps}

    def training(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """Settings of the LoRA."""
        steps = self.longer * arguments.steps
        shared = {"objective": self.objective, "total_steps": steps, "learning_rate": arguments.rate, "phases": self.steps}
        if self.objective != "dmd":
            return shared
        begins = steps // 2  # by consistency
        return shared | DMD | {"consistency_steps": begins, "total_steps": begins + arguments.dmd_steps}


TEACHER = "teacher, 20 guided steps"
ROWS = {
    TEACHER: Row(demo.NUM_STEPS),
    "teacher, 4 guided steps": Row(4),
    "teacher, 8 steps": Row(8, 1.0),
    "teacher, 4 steps": Row(4, 1.0),
    "teacher, 2 steps": Row(2, 1.0),
    "guidance LoRA, 4 steps": Row(4, 1.0, "guidance"),
    "consistency, 8 phases": Row(8, 1.0, "consistency"),
    "consistency, 4 phases": Row(4, 1.0, "consistency"),
    "consistency, 4 phases, longer": Row(4, 1.0, "consistency", longer=3),
    "consistency, 2 phases": Row(2, 1.0, "consistency"),
    "dmd, 4 steps": Row(4, 1.0, "dmd"),
    "dmd, 2 steps": Row(2, 1.0, "dmd"),
    "student, 20 guided steps": Row(demo.NUM_STEPS, by_student=True),
    "student, 4 steps": Row(4, 1.0, by_student=True),
    "student, consistency, 4 phases": Row(4, 1.0, "consistency", by_student=True),
}
STUDENT, STUDENT_STEPS, STUDENT_RATE = "bk-sdm-base", 400, 1e-3
"""The student's plan, how long it was distilled, and at which learning rate."""
DMD = {"dmd_rate": 1.0, "fake_updates": 2}
"""What the demo, small as it is, learns faster by than models of true size would."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--dmd-steps", type=int, default=100, help="of these, by dmd after half of them (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="examples of a step (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate (default: %(default)s)")
    arguments = demo.parsed(parser, ROWS)
    kept, names = demo.kept("turbo", arguments), arguments.rows
    found = kept.measure([TEACHER, *(name for name in names if name != TEACHER)], arguments.seeds, partial(_figures, arguments))
    rows = []
    for name, of_name in found.items():
        minutes = with_margin([figures["minutes"] for figures in of_name], ".1f") if ROWS[name].objective else ""
        varied = [ours["diversity"] / theirs["diversity"] for ours, theirs in zip(of_name, found[TEACHER], strict=True)]
        speed = [figures["speed"] for figures in of_name]
        evaluations = str(ROWS[name].evaluations)
        rows.append(
            [name, f"{of_name[0]['parameters']:,}", evaluations, *demo.quality(of_name)[:3], with_margin(varied, ".2f"),
             with_margin(speed, ".1f"), minutes]
        )  # fmt: skip
    columns = [
        "drawn by",
        "parameters",
        "evaluations",
        *demo.QUALITY[:3],
        "diversity of the teacher's",
        "times as fast",
        "training minutes",
    ]
    kept.publish([
        *table(columns, rows), "",
        f"LoRAs of rank {arguments.rank} on every layer, {arguments.steps} steps of batch {arguments.batch}, longer ones three times as many, "
        f"guidance {demo.GUIDANCE:g} learnt; dmd: {arguments.steps // 2} steps of consistency, then {arguments.dmd_steps} of its own. The student: "
        f"{STUDENT}, {STUDENT_STEPS} steps of batch {demo.BATCH_SIZE}. Real scenes, noised. {demo.words(arguments)} Speed: medians of {TIMED_TURNS} turns, in each the teacher's 20 guided steps "
        "and the row, with the LoRA not merged.",
    ])  # fmt: skip


def _figures(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    row, base = ROWS[name], demo.teacher()
    if row.by_student:
        base = demo.pruned_student(original := base, plan := preset(STUDENT))
        demo.train(base, original, plan, demo.real_scenes(), STUDENT_STEPS, seed, learning_rate=STUDENT_RATE)
    parameters, clock = base.architecture.num_parameters, demo.clock(base)
    started = clock()
    if row.objective:
        base = demo.with_lora(demo.real_scenes(), base, guidance=demo.GUIDANCE, seed=seed, lora_rank=arguments.rank,
                              batch_size=arguments.batch, **row.training(arguments))  # fmt: skip
    measured = {"minutes": (clock() - started) / 60, "parameters": parameters, "speed": _speed(base, row.how)}
    return demo.judged(base, seed, arguments.prompts, **row.how) | measured


def _speed(drawer: Denoiser, how: dict[str, Any]) -> float:
    """How many times as fast as the teacher's guided sampling some images are drawn: of medians, both in turn."""
    scenes, teacher, seconds = random_scenes(TIMED_PICTURES, 0), demo.teacher(), [[], []]
    for _ in range(TIMED_TURNS):
        for each, (denoiser, asked) in zip(seconds, ((teacher, ROWS[TEACHER].how), (drawer, how)), strict=True):
            clock = demo.clock(denoiser)
            started = clock()
            sampled_latents(denoiser, scenes, seed=0, **asked)
            each.append(clock() - started)
    theirs, ours = map(statistics.median, seconds)
    return theirs / ours


if __name__ == "__main__":
    main()
