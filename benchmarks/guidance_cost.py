"""What guidance in one pass costs to train and spares while sampling, at SD1.5's width: ``python benchmarks/guidance_cost.py``.

The four rows of the paper's table (Golnari 2023, arXiv 2312.06899): fine-tuning and distillation, of every weight and of a LoRA.
Memory is counted part by part without making the tensors (`memory.forecast`, which the tests hold against real runs); where
there is a CUDA device, sampling is timed on it, else by the processor time of this process. Weights are random. Writes
``results/guidance_cost.md``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from report import device_words, publish, table

from distill_core.base.sizes import gib
from distill_core.diffusion.conditioning import Caption
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.diffusion.sampling import sample
from distill_core.evaluation.catalog import LATENT_SHAPES, NUM_TOKENS, published_teacher
from distill_core.lora.layers import Lora
from distill_core.networks.build import build_unet
from distill_core.training.exports import trained
from distill_core.training.memory import STATE_BYTES, Forecast, MemorySettings, forecast
from distill_core.training.settings import TrainingSettings

FAMILY = "sd1"
GUIDED = {"objective": "guidance", "guidance": 7.5}
TUNED = {"objective": "task"}
FULL, DISTILLED, LORA, BOTH = "fine-tuning", "distillation", "LoRA", "distillation + LoRA"
PAPER_GB = {FULL: 21.0, DISTILLED: 24.4, LORA: 9.6, BOTH: 10.3}
PARTS = ("weights", "gradients", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="pixels of the samples that are timed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="samplings of each kind, in turn (default: %(default)s)")
    arguments = parser.parse_args()
    publish("guidance_cost", ["# Guidance in one pass", "", *_memory(arguments.rank), "", *sampling(arguments)])


def settings_of(rank: int) -> dict[str, MemorySettings]:
    """How each row of the table is trained."""
    lora = {"lora_rank": rank, "precision": "fp16"}
    return {
        FULL: _settings(False, **TUNED, precision="fp16"),
        DISTILLED: _settings(False, **GUIDED, precision="fp16"),
        LORA: _settings(True, **TUNED, **lora),
        BOTH: _settings(True, **GUIDED, **lora),
    }


def _memory(rank: int) -> list[str]:
    told = {name: forecast_of(settings) for name, settings in settings_of(rank).items()}
    whole = {name: sum(_kept(of).values()) for name, of in told.items()}
    rows = [
        [name, *(gib(_kept(of)[part]) for part in PARTS), gib(whole[name]), f"{whole[name] / whole[DISTILLED]:.3f}",
         gib(of.total_bytes), f"{of.total_bytes / told[DISTILLED].total_bytes:.3f}", f"{PAPER_GB[name] / PAPER_GB[DISTILLED]:.2f}"]
        for name, of in told.items()
    ]  # fmt: skip
    return [
        *table(["", *PARTS, "these three", "of distillation", "a whole step", "of distillation", "in the paper"], rows), "",
        f"SD1.5, 512 px, batch 1, AdamW; base and teacher in fp16, what is trained in fp32, rank {rank} on every attention. "
        f"{BOTH} over {LORA} alone: {whole[BOTH] / whole[LORA] - 1:+.1%} of what is kept, "
        f"{told[BOTH].total_bytes / told[LORA].total_bytes - 1:+.1%} of a whole step.",
    ]  # fmt: skip


def _settings(shares_base: bool, **training) -> MemorySettings:
    return MemorySettings(training=TrainingSettings(batch_size=1, **training), teacher_dtype="fp16", shares_base=shares_base)


def forecast_of(settings: MemorySettings) -> Forecast:
    architecture = published_teacher(FAMILY)
    return forecast(
        teacher=architecture,
        student=architecture,
        plan=None,
        latent_shape=LATENT_SHAPES[FAMILY],
        num_tokens=NUM_TOKENS,
        settings=settings,
    )


def _kept(told: Forecast) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer, counted on networks without contents."""
    recipe, shares_base = told.settings.training, told.settings.shares_base
    with torch.device("meta"):
        network = build_unet(published_teacher(FAMILY))
    torch.nn.Module.to(network, torch.float16 if shares_base else torch.float32)  # that of diffusers warns
    size = sum(weight.numel() for weight in network.parameters())
    learning = (
        trained(DiffusersDenoiser(network=network, architecture=published_teacher(FAMILY)), recipe, None).parameters().values()
    )
    teacher = 2 * size if recipe.weighted_objective.uses_teacher and not shares_base else 0
    return {
        "weights": teacher + sum(weight.numel() * weight.element_size() for weight in network.parameters()),
        "gradients": sum(weight.numel() * weight.element_size() for weight in learning),
        "optimizer": sum(STATE_BYTES[recipe.optimizer](weight.shape) for weight in learning),
    }


def sampling(arguments: argparse.Namespace) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = build_unet(published_teacher(FAMILY)).eval().to(device).requires_grad_(False)
    base = DiffusersDenoiser(network=network, architecture=published_teacher(FAMILY))
    width = base.architecture.context_width
    context, null = torch.randn(1, NUM_TOKENS, width), Caption(torch.zeros(NUM_TOKENS, width))
    noise = torch.randn(1, 4, arguments.size // 8, arguments.size // 8)

    def seconds(guidance: float) -> float:
        _wait(device)
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        started = clock()
        sample(base, context, null, noise=noise, num_steps=arguments.steps, guidance=guidance)
        _wait(device)
        return clock() - started

    seconds(7.5)  # warm
    guided = [seconds(7.5) for _ in range(arguments.rounds)]
    lora = Lora(base, rank=arguments.rank)
    beside = [seconds(1.0) for _ in range(arguments.rounds)]
    for layer in lora.layers:
        base.module(layer).merge()
    merged, again = [], []
    for _ in range(arguments.rounds):
        merged.append(seconds(1.0))
        again.append(seconds(7.5))
    ratios = [two / one for two, one in zip(again, merged, strict=True)]
    rows = [
        ["the model, guided: two answers", f"{statistics.median(guided + again):.2f} s", ""],
        ["cfg 1, LoRA beside the weights", f"{statistics.median(beside):.2f} s", f"{statistics.median(guided) / statistics.median(beside):.2f}"],
        ["cfg 1, LoRA merged", f"{statistics.median(merged):.2f} s", f"{statistics.median(ratios):.2f}"],
    ]  # fmt: skip
    return [
        *table(["sampling", "median", "times as fast"], rows), "",
        f"SD1.5's UNet with random weights, fp32, {arguments.size} px, {arguments.steps} steps, {arguments.rounds} rounds in turn; "
        f"merged over guided round by round from {min(ratios):.2f} to {max(ratios):.2f}. {device_words()}.",
    ]  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
