"""Guidance learnt by a LoRA on the teacher of scenes: ``python benchmarks/guidance.py``.

The student is the teacher with the LoRA on, evaluated once a step. How near are its images to those the teacher draws with
guidance, from the same noise, against how near the teacher's own are without? By LoRAs trained on real scenes that are noised
anew, on the states of the teacher's guided sampling, and on such states with a scale each; asked for prompts whose
combinations were trained on, and for held-out ones. Writes ``results/guidance.md``, every figure measured in that run;
figures are kept in ``results/guidance.jsonl`` as they come, so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple

import demo_students as demo
from report import device_words, table, with_margin
from torch import Tensor

from distill_core.demo.autoencoder import ScenesAutoencoder
from distill_core.demo.grammar import Scene
from distill_core.demo.judge import ScenesJudge
from distill_core.demo.score import KINDS, all_prompts
from distill_core.demo.teacher import sampled_latents
from distill_core.diffusion.denoiser import Denoiser

GUIDED, UNGUIDED = "teacher, guided", "teacher, one pass"


class Lora(NamedTuple):
    """What a LoRA is trained on."""

    states: bool
    """Those of the teacher's guided sampling in place of noised scenes."""
    each_scale: bool = False
    """Every scale from 1 up, each example its own."""


LORAS = {
    "LoRA, real scenes, noised": Lora(states=False),
    "LoRA, guided sampling": Lora(states=True),
    "LoRA, guided sampling, a scale each": Lora(states=True, each_scale=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guidance", type=float, default=3.0, help="scale that is learnt (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    arguments = demo.parsed(parser)
    kept = demo.kept("guidance", arguments)
    found = kept.measure((GUIDED, UNGUIDED, *LORAS), arguments.seeds, partial(_figures, arguments))
    kept.publish(_report(found, arguments))


def _figures(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """By kind of prompt: mean distance of latents to the guided teacher's, and how many images are right."""
    student = demo.teacher() if name in (GUIDED, UNGUIDED) else _student(LORAS[name], seed, arguments)
    figures = {}
    for kind in KINDS:
        scenes, guided = _guided(kind, seed, arguments.guidance, arguments.prompts)
        latents = guided if name == GUIDED else _draw(student, scenes, seed, 1.0)
        right = ScenesJudge.bundled().agrees(ScenesAutoencoder.bundled().decode(latents).clamp(-1, 1), scenes)
        distance = (latents - guided).flatten(1).norm(dim=1).mean()
        figures[kind] = {"distance": distance.item(), "right": right.float().mean().item()}
    return figures


@cache
def _guided(kind: str, seed: int, guidance: float, num_prompts: int) -> tuple[list[Scene], Tensor]:
    scenes = [*chain(*all_prompts(num_prompts, seed, held_out=KINDS[kind]).values())]
    return scenes, _draw(demo.teacher(), scenes, seed, guidance)


def _draw(denoiser: Denoiser, scenes: list[Scene], seed: int, guidance: float) -> Tensor:
    return sampled_latents(denoiser, scenes, seed=10_000 + seed, guidance=guidance, num_steps=demo.NUM_STEPS)


def _student(how: Lora, seed: int, arguments: argparse.Namespace) -> Denoiser:
    """The teacher's network with a LoRA on it that was trained against the same network without."""
    least = 1.0 if how.each_scale else None
    dataset = demo.teacher_made(seed, arguments.guidance, least)["states"] if how.states else demo.real_scenes()
    return demo.with_lora(dataset, objective="guidance", guidance=arguments.guidance, guidance_min=least, seed=seed,
                          lora_rank=arguments.rank, total_steps=arguments.steps, batch_size=demo.BATCH_SIZE,
                          learning_rate=arguments.rate)  # fmt: skip


def _report(found: Mapping[str, Sequence[Mapping[str, Any]]], arguments: argparse.Namespace) -> list[str]:
    rows = []
    for name, of_name in found.items():
        cells = []
        for kind in KINDS:
            figures, unguided = ([each[kind] for each in of_seeds] for of_seeds in (of_name, found[UNGUIDED]))
            shares = [figure["distance"] / whole["distance"] for figure, whole in zip(figures, unguided, strict=True)]
            cells += [with_margin(shares, ".1%"), with_margin([figure["right"] for figure in figures], ".1%")]
        rows.append([name, "2" if name == GUIDED else "1", *cells])
    columns = ["drawn by", "evaluations a step", *(f"{kind}: {what}" for kind in KINDS for what in ("distance", "right"))]
    return [
        *table(columns, rows),
        "",
        f"LoRAs of rank {arguments.rank} on every layer, {arguments.steps} steps of batch {demo.BATCH_SIZE}, guidance {arguments.guidance:g}; "
        "that for every scale is asked at strength 1. Distance of latents to the guided ones from the same noise, in parts of that of "
        f"the teacher in one pass; right: images that show all their prompt says. {arguments.prompts} prompts of each category and "
        f"seed, means over {arguments.seeds} seeds ± half the 95 % interval by Student's t. {device_words()}.",
    ]


if __name__ == "__main__":
    main()
