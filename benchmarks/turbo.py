"""Few steps of sampling, by LoRAs on the teacher of scenes: ``python benchmarks/turbo.py``.

How right, how near to real scenes and how varied are pictures in 2, 4 and 8 evaluations by the teacher alone and by LoRAs that
learnt to jump (the objective consistency), against the teacher with 20 guided steps, and what does a picture cost? Writes
``results/turbo.md``, every figure measured in that run; figures are kept in ``results/turbo.jsonl`` as they come, so that an
interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import demo_students as demo
from report import publish, table, with_margin

from distill_core.demo.grammar import random_scenes
from distill_core.demo.teacher import sampled_latents
from distill_core.diffusion.denoiser import Denoiser

TIMED_PICTURES, TIMED_TURNS = 16, 3


class Row(NamedTuple):
    """How pictures are drawn."""

    steps: int
    guidance: float = demo.GUIDANCE
    learns: bool = False
    """Whether a LoRA learns to jump so, its guidance included."""

    @property
    def evaluations(self) -> int:
        return self.steps * (1 if self.guidance == 1 else 2)

    @property
    def how(self) -> dict[str, Any]:
        """As `sampled_latents` takes it."""
        return {"guidance": self.guidance, "num_steps": self.steps}


TEACHER = "teacher, 20 guided steps"
ROWS = {
    TEACHER: Row(demo.NUM_STEPS),
    "teacher, 4 guided steps": Row(4),
    "teacher, 8 steps": Row(8, 1.0),
    "teacher, 4 steps": Row(4, 1.0),
    "teacher, 2 steps": Row(2, 1.0),
    "consistency, 4 phases": Row(4, 1.0, learns=True),
    "consistency, 2 phases": Row(2, 1.0, learns=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="examples of a step (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate (default: %(default)s)")
    arguments = demo.parsed(parser)
    kept, names = demo.kept("turbo", arguments), arguments.rows or ROWS
    found = kept.measure([TEACHER, *(name for name in names if name != TEACHER)], arguments.seeds, partial(_figures, arguments))
    rows = []
    for name, of_name in found.items():
        minutes = with_margin([figures["minutes"] for figures in of_name], ".1f") if ROWS[name].learns else ""
        varied = [ours["diversity"] / theirs["diversity"] for ours, theirs in zip(of_name, found[TEACHER], strict=True)]
        speed = [figures["speed"] for figures in of_name]
        evaluations = str(ROWS[name].evaluations)
        rows.append(
            [name, evaluations, *demo.quality(of_name)[:3], with_margin(varied, ".2f"), with_margin(speed, ".1f"), minutes]
        )
    columns = ["drawn by", "evaluations", *demo.QUALITY[:3], "diversity of the teacher's", "times as fast", "training minutes"]
    publish("turbo", [
        *table(columns, rows), "",
        f"LoRAs of rank {arguments.rank} on every layer, {arguments.steps} steps of batch {arguments.batch}, guidance {demo.GUIDANCE:g} "
        f"learnt; real scenes, noised. {demo.words(arguments)} Speed: medians of {TIMED_TURNS} turns, in each the teacher's 20 guided steps "
        "and the row, with the LoRA not merged.",
    ])  # fmt: skip
    kept.finish()


def _figures(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    row, started = ROWS[name], time.perf_counter()
    drawer = _turbo(row.steps, seed, arguments) if row.learns else demo.teacher()
    minutes = (time.perf_counter() - started) / 60
    return demo.judged(drawer, seed, arguments.prompts, **row.how) | {"minutes": minutes, "speed": _speed(drawer, row.how)}


def _turbo(phases: int, seed: int, arguments: argparse.Namespace) -> Denoiser:
    """The teacher's network with a LoRA on it that learnt to sample in as many steps."""
    return demo.with_lora(demo.real_scenes(), objective="consistency", phases=phases, guidance=demo.GUIDANCE, seed=seed,
                          lora_rank=arguments.rank, total_steps=arguments.steps, batch_size=arguments.batch,
                          learning_rate=arguments.rate)  # fmt: skip


def _speed(drawer: Denoiser, how: dict[str, Any]) -> float:
    """How many times as fast as the teacher's guided sampling some pictures are drawn: of medians, both in turn."""
    scenes, teacher, seconds = random_scenes(TIMED_PICTURES, 0), demo.teacher(), [[], []]
    for _ in range(TIMED_TURNS):
        for each, (denoiser, asked) in zip(seconds, ((teacher, ROWS[TEACHER].how), (drawer, how)), strict=True):
            started = time.perf_counter()
            sampled_latents(denoiser, scenes, seed=0, **asked)
            each.append(time.perf_counter() - started)
    theirs, ours = map(statistics.median, seconds)
    return theirs / ours


if __name__ == "__main__":
    main()
