"""What teaches a cut transformer best, on the demo's: ``python benchmarks/healing.py``.

A quarter and a half of its twelve blocks go. Students of one plan are taught in several ways, and students of several plans in
one way, for as many steps each; core seconds are the CPU time of training alone. Writes ``results/healing.md``, every figure measured
in that run; figures are kept in ``results/healing.jsonl`` as they come, so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import demo_students as demo
import torch
from report import mean_and_margin, table, with_margin
from torch import Tensor

from distill_core.data.dataset import Batching, draw
from distill_core.demo.transformer import load_transformer, load_transformer_dataset, transformer_of
from distill_core.diffusion.pipelines import FluxDenoiser
from distill_core.lora.layers import without_lora
from distill_core.networks.name_map import NameMap
from distill_core.networks.transformers.flux_spelling import to_comfyui
from distill_core.pruning.plan import name_map, pruned
from distill_core.pruning.plan_text import read_plan
from distill_core.pruning.runs import Examples, Planner, Predict, Settings, analyse
from distill_core.training.loop import distill
from distill_core.training.run import Run
from distill_core.training.settings import TrainingSettings

FOLDED, EVEN, REPLACEABLE, ERROR = "contiguous runs", "evenly spaced", "linear replaceability", "output error"
QUARTER, HALF = "a quarter", "half"
PLANS = {
    (QUARTER, FOLDED): "fold single 1-2,3-5",
    (QUARTER, EVEN): "keep double 0-1,3 single 0-1,3-5,7",
    (HALF, FOLDED): "fold double 1-2 single 0-2,3-6",
    (HALF, EVEN): "keep double 0,2 single 0,2,4,7",
}
"""By place alone. The last single block stays in all of them."""
FIRST_STAY = {QUARTER: 3, HALF: 0}
"""Double blocks at the beginning that analyses leave alone: of a quarter only single ones go."""


class Lesson(NamedTuple):
    """How a student is taught."""

    settings: dict[str, Any]
    whole: bool = False
    """All its weights, in a network of its own, in place of a LoRA on the weights that it shares."""
    local: float = 0.0
    """Share of the steps in which folded blocks learn by themselves, at the beginning."""
    share: float = 1.0
    """Of the steps of others."""
    mean: bool = False
    """Folded blocks begin as the mean of their run in place of its middle block."""


def lora(objective: str, rank: int, rate: float) -> dict[str, Any]:
    return dict(objective=objective, lora_rank=rank, lora_targets=("*",), learning_rate=rate, weight_decay=0.0)


CUT, LOCAL, OUTPUT, BOTH, SHORT, WHOLE, MEAN = (
    "cut only", "local", "shared weights", "local, then shared weights", "the same in half the steps", "all weights",
    "all weights, begun as the mean of each run",
)  # fmt: skip


def lessons(arguments: argparse.Namespace) -> dict[str, Lesson]:
    of_output = lora("output", arguments.rank, arguments.rate)
    return {
        LOCAL: Lesson(lora("local", arguments.rank, arguments.rate)),
        OUTPUT: Lesson(of_output),
        BOTH: Lesson(of_output, local=0.5),
        SHORT: Lesson(of_output, local=0.5, share=0.5),
        WHOLE: (whole := Lesson(dict(objective="output", learning_rate=arguments.rate_of_all, weight_decay=0.0), whole=True)),
        MEAN: whole._replace(mean=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="of LoRAs (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of LoRAs (default: %(default)s)")
    parser.add_argument("--rate-of-all", type=float, default=1e-3, help="that of all weights (default: %(default)s)")
    arguments = demo.parsed(parser)
    kept, rows = demo.kept("healing", arguments), ["teacher"]
    for size in FIRST_STAY:
        rows += [f"{size}: {FOLDED}: {how}" for how in (CUT, *lessons(arguments))]
        rows += [f"{size}: {chosen}: {how}" for chosen in (EVEN, REPLACEABLE, ERROR) for how in (CUT, OUTPUT)]
    lines = []
    for name, found in kept.measure(rows, arguments.seeds, partial(_figures, arguments)).items():
        seconds, _ = mean_and_margin([figures["seconds"] for figures in found])
        errors = with_margin([figures["error"] for figures in found], ".4f")
        size, plan, how = (*name.split(": "), "", "")[:3]
        lines.append([size, plan, how, f"{found[0]['steps']}", f"{seconds:.0f}", errors, *demo.quality(found)])
    columns = ["blocks that go", "plan", "taught", "steps", "core seconds", "output error", *demo.QUALITY]
    plans = [
        f"{size}, {chosen}: `{plan_of(size, chosen)}`." for size in FIRST_STAY for chosen in (FOLDED, EVEN, REPLACEABLE, ERROR)
    ]
    kept.publish([
        *table(columns, lines), "", *plans, "",
        f"The demo's transformer, 4 double and 8 single blocks; batch {demo.BATCH_SIZE}, LoRAs of rank {arguments.rank}, real scenes. "
        + demo.words(arguments),
    ])  # fmt: skip


@cache
def plan_of(size: str, chosen: str) -> str:
    """A plan as text; those of analyses save as many parameters as the one of contiguous runs."""
    if plan := PLANS.get((size, chosen)):
        return plan
    teacher = load_transformer()
    transformer = teacher.transformer
    assert transformer is not None
    by_place = pruned(transformer, name_map(transformer, read_plan(PLANS[size, FOLDED], transformer)))
    settings = Settings(
        saving=1 - by_place.num_parameters / transformer.num_parameters - 1e-6,
        criterion=chosen,
        longest_run=4,
        first_stay=FIRST_STAY[size],
        num_timesteps=8,
        num_examples=16,
        num_tokens=4096,
    )
    analysis = analyse(teacher.network, transformer, _examples(teacher, settings), settings)
    return Planner(analysis, chosen).plan().name


def _examples(teacher: FluxDenoiser, settings: Settings) -> Examples:
    """Scenes at even noise levels."""
    batches = draw(load_transformer_dataset(demo.NUM_MADE), 0, teacher.schedule, Batching(settings.num_examples, settings.seed))
    size = teacher.schedule.num_timesteps
    levels = [round(size * (place + 0.5) / settings.num_timesteps) for place in range(settings.num_timesteps)]

    def visit(measure: Callable[[Predict], None]) -> None:
        for number in range(settings.num_examples):
            one = batches.part(slice(number, number + 1))
            for level in levels:
                t = torch.tensor([level])
                x_t = teacher.schedule.add_noise(one.x0, one.eps, t)
                measure(partial(teacher, x_t, t, one.context, one.label))

    return Examples(settings.num_examples, settings.num_timesteps, visit)


def _figures(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    teacher, data = load_transformer(), load_transformer_dataset(demo.NUM_MADE)
    student, steps, seconds = teacher, 0, 0.0
    if name != "teacher":
        size, chosen, how = name.split(": ")
        student = _cut(plan_of(size, chosen))
        if how != CUT:
            lesson = lessons(arguments)[how]
            steps, started = round(lesson.share * arguments.steps), time.process_time()
            student = _taught(lesson, student, teacher, data, steps, seed)
            seconds = time.process_time() - started
    figures = demo.judged(student, seed, arguments.prompts, transformer=True)
    return figures | {"error": demo.error(student, teacher, data), "seconds": seconds, "steps": steps}


def _cut(plan: str) -> FluxDenoiser:
    """A student on weights of its own, which skips what a plan removes."""
    base = load_transformer()
    assert base.transformer is not None
    return replace(base, mapping=name_map(base.transformer, read_plan(plan, base.transformer)))


def _taught(lesson: Lesson, student: FluxDenoiser, teacher: FluxDenoiser, data, steps: int, seed: int) -> FluxDenoiser:
    settings = TrainingSettings(
        **dict(lr_schedule="cosine", warmup_steps=min(20, steps // 2), caption_dropout=0.1) | lesson.settings,
        total_steps=steps,
        local_steps=round(lesson.local * steps),
        batch_size=demo.BATCH_SIZE,
        seed=seed,
        save_every_steps=steps,
    )
    if lesson.whole:
        mapping = student.mapping
        assert mapping is not None
        weights = student.network.state_dict()
        if lesson.mean:
            weights |= _means(mapping, weights)
        student = transformer_of(to_comfyui(mapping.apply(weights)))
    else:
        teacher = without_lora(replace(student, mapping=None))()
    with tempfile.TemporaryDirectory() as folder:
        distill(Run(Path(folder) / "run", settings), student=student, teacher=teacher, plan=None, dataset=data)
    return student


def _means(mapping: NameMap, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of folded blocks, each the mean over its run."""
    found = {}
    for block, (first, last) in mapping.folded.items():
        path, _, start = first.rpartition(".")
        run = [f"{path}.{number}" for number in range(int(start), int(last.rpartition(".")[2]) + 1)]
        for name in (name for name in weights if name.startswith(f"{block}.")):
            found[name] = torch.stack([weights[one + name.removeprefix(block)] for one in run]).mean(0)
    return found


if __name__ == "__main__":
    main()
