"""All that needs a GPU, in one go: ``python benchmarks/gpu.py``; after eight minutes no further part starts.

Each part stands alone and writes its table as it ends, to ``results/CARD/PART.md``; a part that fails tells why, and the
next one starts. Networks have the true shapes and random weights, so nothing is loaded or downloaded. ``--rehearse`` runs
every part on the CPU with narrow networks, however long it takes, and publishes nothing.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import guidance_cost
import memory
import torch
import training_step
from report import device_words, publish, table

from distill_core.base.precision import DTYPES
from distill_core.base.sizes import gib
from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.diffusion.ranges import TimestepRanges
from distill_core.evaluation import bench as benches
from distill_core.evaluation.bench import device_of_choice
from distill_core.evaluation.catalog import LATENT_SHAPES, NUM_TOKENS, TEACHER_CONFIGS, published_teacher
from distill_core.evaluation.measuring import in_rounds, peak_of, seconds_of
from distill_core.evaluation.trial import WARM_UPS, TrainingCost, random_data, random_denoiser, training_cost
from distill_core.lora.layers import WithoutLora
from distill_core.networks.architecture import Architecture
from distill_core.networks.quantised import QUANTISED, computes, hold
from distill_core.pruning.plan import PruningPlan, name_map, preset, pruned
from distill_core.routing.expert_unet import ExpertUNet
from distill_core.training.memory import MemorySettings, forecast
from distill_core.training.settings import TrainingSettings
from distill_core.training.teachers import Teachers

Result = TypeVar("Result")
CPU = torch.device("cpu")
NARROW = {
    "sd1": {"block_out_channels": (32, 64, 128, 128)},
    "sd2": {"block_out_channels": (64, 64, 128, 128), "attention_head_dim": [1, 1, 2, 2]},
    "sdxl": {"block_out_channels": (64, 128, 128), "attention_head_dim": [1, 2, 2]},
}
"""Configs of a rehearsal, over those of the true size."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="run every part on the CPU with narrow networks")
    parser.add_argument("--rounds", type=int, help="turns of each measurement (default: 5, of a rehearsal 1)")
    parser.add_argument(
        "--minutes", type=float, default=8, help="start no part after so long (default: %(default)s; of a rehearsal: no limit)"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "MatMul8bitLt")  # one for each layer
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if arguments.rehearse:
        _narrow()
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device; to try the battery on the CPU, add --rehearse")
    rounds = arguments.rounds or (1 if arguments.rehearse else 5)
    card, began, failed = re.sub(r"[^a-z0-9]+", "-", device_words().lower()).strip("-"), time.monotonic(), []
    for name in arguments.parts or PARTS:
        if not arguments.rehearse and time.monotonic() - began > 60 * arguments.minutes:
            print(f"## {name}\n\nleft out: {arguments.minutes:g} minutes are over", flush=True)
            failed.append(name)
            continue
        started = time.monotonic()
        try:
            with torch.random.fork_rng():
                lines = [f"# {name}", "", *PARTS[name](rounds)]
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        lines += ["", f"{device_words()}, torch {torch.__version__}; took {time.monotonic() - started:.0f} s."]
        if arguments.rehearse:
            print("\n".join([*lines, ""]), flush=True)
        else:
            publish(f"{card}/{name}", lines)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


def _narrow() -> None:
    """Make the networks and images of the catalog small."""
    for family, config in NARROW.items():
        TEACHER_CONFIGS[family] |= config
        LATENT_SHAPES[family] = (4, 8, 8)
    torch.compile = partial(torch.compile, backend="aot_eager")  # C++ for a CPU takes minutes


# --- a step of training


def step(rounds: int) -> Iterator[str]:
    """What a distillation step costs over the bare sum of its passes."""
    on_gpu = torch.cuda.is_available()
    case = training_step.Case(320, 512, 16) if on_gpu else training_step.Case(32, 64, 2)
    yield from training_step.cost_tables({case: training_step.measure(case, rounds)})


def peaks(rounds: int) -> list[str]:
    """Measured peaks of the shipped workflows beside their forecasts."""
    device, rows = device_of_choice(), []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # each simulates its step on a core of its own
        forecasts = [pool.submit(_forecast_bytes, case, TEACHER_CONFIGS, LATENT_SHAPES) for case in memory.CASES]
        for case, forecast_of_case in zip(memory.CASES, forecasts, strict=True):
            peak, told = _attempt(partial(memory.peak_bytes, case, device)), forecast_of_case.result()
            found = [peak, ""] if isinstance(peak, str) else [gib(peak), f"{told / peak:.2f}"]
            rows.append([case.heading, gib(told), *found])
    return table(["training", "forecast", "peak", "forecast over peak"], rows)


def _forecast_bytes(case: memory.Case, configs: dict, shapes: dict) -> int:
    """Memory that a case is forecast to need. configs, shapes: this run's catalog, since a new process has the published one."""
    TEACHER_CONFIGS.update(configs)
    LATENT_SHAPES.update(shapes)
    return memory.forecast_of(case, *case.architectures).total_bytes


OPTIONS: dict[str, tuple[dict, dict]] = {
    "fp32": ({}, {}),
    "bf16": ({"precision": "bf16"}, {}),
    "fp16": ({"precision": "fp16"}, {}),
    "bf16, gradient_checkpointing": ({"precision": "bf16", "gradient_checkpointing": True}, {}),
    "bf16, accumulation_steps 2": ({"precision": "bf16", "accumulation_steps": 2}, {}),
    "bf16, weight_dtype bf16": ({"precision": "bf16", "weight_dtype": "bf16"}, {}),
    "bf16, optimizer adamw8bit": ({"precision": "bf16", "optimizer": "adamw8bit"}, {}),
    "bf16, teacher in fp8": ({"precision": "bf16"}, {"teacher_dtype": "fp8"}),
    "bf16, teacher offloaded": ({"precision": "bf16"}, {"teacher_offloaded": True}),
}
"""Settings of training, and of the teacher."""


def options(rounds: int) -> list[str]:
    """What each setting costs and saves, of bk-sdm-small at SD1.5's size."""
    return _training_table(OPTIONS, rounds)


def compiled(rounds: int) -> list[str]:
    """What compiling the student brings: it takes minutes, so no other table waits for it."""
    plain = "bf16"
    return _training_table({plain: OPTIONS[plain], f"{plain}, compile": ({"precision": plain, "compile": True}, {})}, rounds)


def _training_table(options: dict[str, tuple[dict, dict]], rounds: int) -> list[str]:
    device, plan, batch_size = device_of_choice(), preset("bk-sdm-small"), 8 if torch.cuda.is_available() else 2
    theirs = published_teacher("sd1")
    ours, data = pruned(theirs, name_map(theirs, plan)), _data("sd1", batch_size)
    rows, first = [], None
    for name, (of_training, of_teacher) in options.items():
        training = TrainingSettings(batch_size=batch_size, total_steps=1 + WARM_UPS + rounds, **of_training)
        settings = MemorySettings(training=training, device=device.type, **{"teacher_dtype": "bf16", **of_teacher})
        told = forecast(
            teacher=theirs, student=ours, plan=plan, latent_shape=LATENT_SHAPES["sd1"], num_tokens=NUM_TOKENS, settings=settings
        )
        cost = _attempt(partial(_cost, settings, theirs, ours, plan, data, device))
        if isinstance(cost, str):
            rows.append([name, gib(told.total_bytes), cost, "", "", ""])
            continue
        seconds = statistics.median(cost.seconds)
        first = first or seconds
        rows.append([name, gib(told.total_bytes), gib(cost.peak_bytes), f"{told.total_bytes / cost.peak_bytes:.2f}",
                     f"{1 / seconds:.2f}", f"{first / seconds:.2f}"])  # fmt: skip
    columns = ["", "forecast", "peak", "forecast over peak", "steps a second", f"over {next(iter(options))}"]
    caption = f"SD1.5 to bk-sdm-small, {_px('sd1')}, batch {batch_size}; AdamW, teacher in bf16."
    return [*table(columns, rows), "", caption]


def _cost(
    settings: MemorySettings,
    theirs: Architecture,
    ours: Architecture,
    plan: PruningPlan,
    data: LatentDataset,
    device: torch.device,
) -> TrainingCost:
    teacher = _held(theirs, settings.teacher_dtype, device, offloaded=settings.teacher_offloaded)
    student = random_denoiser(ours, device, settings.training.weight_dtype)
    teachers = Teachers.single(teacher, settings.training)
    return training_cost(settings.training, student=student, teachers=teachers, plan=plan, data=data)


# --- sampling


def precision(rounds: int) -> Iterator[str]:
    """A guided sampling step in every precision weights can be held in."""
    device = device_of_choice()
    for family in ("sd1", "sdxl"):
        rows, first = [], None
        for dtype in ("fp32", "bf16", "fp16", "fp8", *QUANTISED):
            found = _attempt(partial(_sampling, family, dtype, device, rounds))
            if isinstance(found, str):
                rows.append([dtype, found, "", ""])
                continue
            peak, seconds = found
            first = first or seconds
            rows.append([dtype, f"{1000 * seconds:.1f}", f"{first / seconds:.2f}", gib(peak)])
        yield from table([f"{family}, {_px(family)}", "ms per step", "times as fast as fp32", "peak"], rows)
        yield ""


def _sampling(family: str, dtype: str, device: torch.device, rounds: int) -> tuple[int, float]:
    """Peak bytes and seconds of a guided step."""
    network = _held(published_teacher(family), dtype, device)
    work = _sampling_step(network, family)
    peak = peak_of(work, list(network.network.parameters()), device, 2)
    return peak, statistics.median(seconds_of(work, device) for _ in range(rounds))


def experts(rounds: int) -> list[str]:
    """What routing costs: experts behind one network, beside the same networks called by hand."""
    device, plan, num_steps = device_of_choice(), preset("bk-sdm-small"), 20
    dtype, whole = "fp16" if device.type == "cuda" else "fp32", published_teacher("sd1")
    small = random_denoiser(pruned(whole, name_map(whole, plan)), device, dtype)
    full = random_denoiser(whole, device, dtype)
    timesteps = torch.linspace(999, 0, num_steps).long().tolist()
    routed = ExpertUNet([full.network, small.network], TimestepRanges((500,)))
    examples = _data("sd1", 2).read(0, torch.arange(2))
    x, context = (tensor.to(full.device, full.dtype) for tensor in (examples.latents, examples.contexts))

    @torch.no_grad()
    def by_hand() -> None:
        for t in timesteps:
            (full if t >= 500 else small).network(x, t, context)

    @torch.no_grad()
    def by_router() -> None:
        for t in timesteps:
            routed(x, t, context)

    by_hand()
    by_router()
    hand, router = in_rounds([partial(seconds_of, work, device) for work in (by_hand, by_router)], rounds)
    rows = [
        ["by hand", f"{1000 * hand / num_steps:.2f}", ""],
        ["ExpertUNet", f"{1000 * router / num_steps:.2f}", f"{router / hand:.3f}"],
    ]
    caption = f"SD1.5 for the noisy half, bk-sdm-small for the rest, {dtype}, {_px('sd1')}, {num_steps} guided steps."
    return [*table(["", "ms per step", "over by hand"], rows), "", caption]


def guidance(rounds: int) -> list[str]:
    """Guidance in one pass: memory of training by the paper's four ways, and time of sampling."""
    device, architecture, peaks = device_of_choice(), published_teacher("sd1"), {}
    settings = guidance_cost.settings_of(rank=64)
    for name, of in settings.items():
        training = replace(of.training, total_steps=1 + WARM_UPS)
        student = random_denoiser(architecture, device, of.student_dtype)
        teacher = WithoutLora(student) if of.shares_base else student
        if training.weighted_objective.uses_teacher and not of.shares_base:
            teacher = random_denoiser(architecture, device, of.teacher_dtype)
        teachers = Teachers.single(teacher, training)
        peaks[name] = training_cost(training, student=student, teachers=teachers, plan=None, data=_data("sd1", 1)).peak_bytes
        teacher = teachers = student = None
        gc.collect()
    in_paper, whole = guidance_cost.PAPER_GB, guidance_cost.DISTILLED
    rows = []
    for name, of in settings.items():
        told = guidance_cost.forecast_of(of).total_bytes
        rows.append([name, gib(told), gib(peaks[name]), f"{told / peaks[name]:.2f}", f"{peaks[name] / peaks[whole]:.2f}",
                     f"{in_paper[name] / in_paper[whole]:.2f}"])  # fmt: skip
    sampled = guidance_cost.sampling(Namespace(rank=64, size=8 * LATENT_SHAPES["sd1"][1], steps=3, rounds=rounds))
    columns = ["", "forecast", "peak", "forecast over peak", "of distillation", "in the paper"]
    return [*table(columns, rows), "", f"SD1.5, {_px('sd1')}, batch 1, rank 64.", "", *sampled]


def presets(rounds: int) -> Iterator[str]:
    """Every published preset beside its full model."""
    for family in TEACHER_CONFIGS:
        settings = benches.Settings(family=family, num_rounds=rounds, size_px=8 * LATENT_SHAPES[family][1])
        measured = benches.bench(settings)
        yield from table(measured.columns, measured.cells())
        yield from ("", "; ".join(f"{name}: {value}" for name, value in measured.settings.items()) + ".", "")


PARTS: dict[str, Callable[[int], Iterator[str] | list[str]]] = {
    part.__name__: part for part in (step, options, precision, experts, guidance, presets, peaks, compiled)
}


# --- networks and examples


def _attempt(work: Callable[[], Result]) -> Result | str:
    """What ``work`` returns, or why this machine cannot do it: a package or a kernel is missing."""
    try:
        return work()
    except (ValueError, NotImplementedError) as error:
        return f"not measured: {error}"
    finally:
        torch._dynamo.reset()
        gc.collect()


def _held(architecture: Architecture, dtype: str, device: torch.device, *, offloaded: bool = False) -> DiffusersDenoiser:
    """A random network whose weights are held in ``dtype``."""
    compute = computes(dtype)
    begins_on = CPU if offloaded or dtype in QUANTISED else device
    denoiser = random_denoiser(architecture, begins_on, compute)
    hold(denoiser.network, dtype, device, offloaded=offloaded)
    return replace(denoiser, computes=(device, DTYPES[compute]))


def _data(family: str, count: int) -> LatentDataset:
    _, height, width = LATENT_SHAPES[family]
    return random_data(published_teacher(family), count, (8 * height, 8 * width), NUM_TOKENS, seed=0)


def _sampling_step(network: DiffusersDenoiser, family: str) -> Callable[[], object]:
    examples = _data(family, 2).read(0, torch.arange(2))
    x, context = (tensor.to(network.device, network.dtype) for tensor in (examples.latents, examples.contexts))
    t, label = torch.full((2,), 500, device=network.device), examples.label and examples.label.to(context)
    return torch.no_grad()(partial(network, x, t, context, label))


def _px(family: str) -> str:
    _, height, width = LATENT_SHAPES[family]
    return f"{8 * height} x {8 * width} px"


if __name__ == "__main__":
    main()
