"""What a distillation step costs over the bare sum of its parts, and what the cache saves: ``python benchmarks/training_step.py``.

The bare sum is the teacher's forward pass without gradient, the student's forward and backward pass by one plain loss, and
the optimiser's step, of the same networks on the same examples. Beside the distillation step it is taken turn by turn in
one run, so that a busy machine slows both. The loop of published training scripts is the bare sum too, with images and
captions encoded before each step. Networks have SD1.5's shapes and random weights. Writes ``results/training_step.md``.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from demo_students import pruned_student
from report import device_words, publish, table
from torch import Tensor
from tqdm import tqdm

from distill_core.data.cache import CachedDataset, CacheWriter, Entry
from distill_core.data.dataset import Batch, LatentDataset, draw
from distill_core.diffusion.conditioning import Caption
from distill_core.diffusion.denoiser import DiffusersDenoiser, tap
from distill_core.diffusion.schedule import NoiseSchedule
from distill_core.evaluation.catalog import NUM_TOKENS, TEACHER_CONFIGS
from distill_core.networks.architecture import Architecture
from distill_core.pruning.plan import preset
from distill_core.training.memory import Ledger
from distill_core.training.processes import ALONE
from distill_core.training.run import Run
from distill_core.training.settings import TrainingSettings
from distill_core.training.teachers import Teachers
from distill_core.training.trainer import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAN = preset("bk-sdm-small")
WIDTHS = (1, 2, 4, 4)  # of the levels, over the outermost
VAE = dict(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
           up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=512)  # fmt: skip
CLIP = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=NUM_TOKENS, hidden_act="quick_gelu")  # fmt: skip
MIB = 2**20


class Case(NamedTuple):
    """Networks and examples a step is measured on."""

    width: int
    """Channels of the outermost level; SD1.5 has 320."""
    size_px: int
    batch_size: int
    encodes: bool = False
    """Whether to measure a loop that encodes, too."""

    @property
    def title(self) -> str:
        network = "SD1.5" if self.width == 320 else f"SD1.5 of width {self.width}"
        return f"{network}, {self.size_px} px, batch {self.batch_size}"


def main() -> None:
    on_gpu = DEVICE.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="of images, px (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=16 if on_gpu else 1, help="examples a step of the full network (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=20 if on_gpu else 8, help="turns of each (default: %(default)s)")
    arguments = parser.parse_args()
    # Of a narrow network on large images activations are what fills memory, as they do at large batches.
    costs = {}
    for case in (Case(64, 512, 4), Case(320, arguments.size, arguments.batch, encodes=True)):
        costs[case] = measure(case, arguments.rounds)
        gc.collect()
    publish("training_step", _report(costs, arguments.rounds))


def cost_tables(costs: Mapping[Case, Cost]) -> list[str]:
    """Time and memory of a distillation step over its bare sum."""
    return [
        *table(["a step", "distillation step, s", "bare sum, s", "ratio", "lowest over lowest"], [
            [case.title, f"{statistics.median(c.steps):.2f}", f"{statistics.median(c.bare):.2f}", f"{_median_ratio(c.steps, c.bare):.3f}",
             f"{min(c.steps) / min(c.bare):.3f}"]
            for case, c in costs.items()
        ]), "",
        *table(["memory at its peak, MiB", "distillation step", "bare sum", "more", "teacher's features", "more over features"], [
            [case.title, *(f"{size / MIB:,.1f}" for size in (c.step_bytes, c.bare_bytes, c.step_bytes - c.bare_bytes, c.feature_bytes)),
             f"{(c.step_bytes - c.bare_bytes) / c.feature_bytes:.2f}"]
            for case, c in costs.items()
        ]),
    ]  # fmt: skip


def _report(costs: Mapping[Case, Cost], rounds: int) -> list[str]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    last, cost = list(costs.items())[-1]
    loop = [encoding + bare for encoding, bare in zip(cost.encoding, cost.bare, strict=True)]
    cached, encoded = (last.batch_size / statistics.median(seconds) for seconds in (cost.steps, loop))
    share = _median_ratio(cost.encoding, loop)
    return [
        *cost_tables(costs), "",
        *table([f"training, {last.title}", "samples a second", "ratio"], [
            ["distillation from cached latents and embeddings", f"{cached:.3f}", f"{_median_ratio(loop, cost.steps):.2f}"],
            ["bare sum, images and captions encoded each step", f"{encoded:.3f}", "1"],
        ]), "",
        f"Student by {PLAN.name}, objective bk-sdm, AdamW, fp32. Medians of {rounds} turns of each, ratios of each turn; memory is "
        f"what a step makes, besides weights and the optimiser's state. Encoding takes {share:.0%} of the time of the loop that does "
        f"it. {device_words()}{' (seconds of CPU time)' * (DEVICE.type == 'cpu')}; the whole process took {peak / 1e9:.1f} GB of main memory at most.",
    ]  # fmt: skip


def _median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


# --- what is measured


class Cost(NamedTuple):
    """Seconds of each turn, and bytes."""

    steps: list[float]
    bare: list[float]
    encoding: list[float]
    """Of what the next turn's bare sum trains on; none where nothing is encoded."""
    step_bytes: int
    bare_bytes: int
    feature_bytes: int


def measure(case: Case, rounds: int) -> Cost:
    with tempfile.TemporaryDirectory() as folder:
        return _measure(case, Path(folder), rounds)


def _measure(case: Case, folder: Path, rounds: int) -> Cost:
    torch.manual_seed(0)
    teacher = _teacher(case.width)
    student = pruned_student(teacher, PLAN)
    encoders = Encoders(case) if case.encodes else None
    dataset = encoders.cached(folder / "cache") if encoders else _noise(case)
    recipe = TrainingSettings(total_steps=2 + rounds, batch_size=case.batch_size)
    batch = draw(dataset, 0, student.schedule, recipe.batching)

    student.network.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(student.network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    bare_bytes = _peak(lambda: _bare_sum(teacher, student, optimizer, batch), teacher, student, optimizer)
    del optimizer

    training = Trainer(Run(folder / "run", recipe), student, Teachers.single(teacher, recipe), PLAN, dataset, ALONE)
    with training.open():
        (optimizer,), step = training.learner.optimizer.parts, partial(next, map(training.step, range(recipe.total_steps)))
        step_bytes = _peak(step, teacher, student, optimizer)
        with torch.no_grad(), tap(teacher, training.layers) as features:
            teacher(*_on_device(batch))
            feature_bytes = sum(feature.nbytes for feature in features.values())
            features.clear()
        steps, bare, encoding, examples = [], [], [], batch
        for turn in tqdm(range(rounds), desc=case.title):
            # What comes first after encoding finds cold caches: each does so every other turn.
            for who in ("step", "bare") if turn % 2 else ("bare", "step"):
                if who == "step":
                    steps.append(_seconds(step)[0])
                else:
                    bare.append(_seconds(partial(_bare_sum, teacher, student, optimizer, examples))[0])
            if encoders:
                seconds, examples = _seconds(partial(encoders.encoded, student.schedule))
                encoding.append(seconds)
    return Cost(steps, bare, encoding, step_bytes, bare_bytes, feature_bytes)


def _bare_sum(teacher: DiffusersDenoiser, student: DiffusersDenoiser, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    inputs = _on_device(batch)
    with torch.no_grad():
        target = teacher(*inputs)
    F.mse_loss(student(*inputs), target).backward()
    optimizer.step()
    optimizer.zero_grad()


def _on_device(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(tensor.to(DEVICE) for tensor in (batch.x_t, batch.t, batch.context))


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long some work takes, and what it gives. On a CPU its own time, in which other processes do not count."""
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    _wait()
    started = clock()
    result = work()
    _wait()
    return clock() - started, result


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _peak(step: Callable[[], object], teacher, student, optimizer: torch.optim.Optimizer) -> int:
    """Bytes a step makes at its peak, besides what is there before and after it: of the second one, which has all of that."""
    step()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with Ledger(_lasting(teacher, student, optimizer)) as ledger:
        step()
    return ledger.most.total()


def _lasting(teacher, student, optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    for denoiser in (teacher, student):
        yield from denoiser.network.parameters()
        yield from denoiser.network.buffers()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


# --- networks and examples


def _teacher(width: int) -> DiffusersDenoiser:
    from diffusers import UNet2DConditionModel

    config = TEACHER_CONFIGS["sd1"] | {"block_out_channels": tuple(width * level for level in WIDTHS)}
    network = UNet2DConditionModel(**config).to(DEVICE).eval().requires_grad_(False)
    return DiffusersDenoiser(network=network, architecture=Architecture.from_state_dict(network.state_dict()))


def _noise(case: Case) -> LatentDataset:
    side = case.size_px // 8
    latents, contexts = torch.randn(8, 4, side, side), torch.randn(8, NUM_TOKENS, TEACHER_CONFIGS["sd1"]["cross_attention_dim"])
    return LatentDataset.of(latents, contexts, contexts[0])


class Encoders:
    """SD1.5's autoencoder and text encoder with random weights, and images and captions of noise to encode."""

    num_examples = 8

    def __init__(self, case: Case):
        from diffusers import AutoencoderKL
        from transformers import CLIPTextConfig, CLIPTextModel

        self._vae, self._text = AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**CLIP))
        del self._vae.decoder  # nothing is decoded
        for network in (self._vae, self._text):
            network.to(DEVICE).eval().requires_grad_(False)
        self._pixels = torch.rand(self.num_examples, 3, case.size_px, case.size_px) * 2 - 1
        self._tokens = torch.randint(CLIP["vocab_size"], (self.num_examples, NUM_TOKENS))
        self._batch_size = case.batch_size

    @torch.no_grad()
    def _latents(self, picked: Tensor) -> Tensor:
        return self._vae.encode(self._pixels[picked].to(DEVICE)).latent_dist.sample() * self._vae.config.scaling_factor

    @torch.no_grad()
    def _contexts(self, picked: Tensor) -> Tensor:
        return self._text(self._tokens[picked].to(DEVICE)).last_hidden_state

    def encoded(self, schedule: NoiseSchedule) -> Batch:
        """A batch as published scripts make it in each step."""
        picked = torch.randint(self.num_examples, (self._batch_size,))
        x0, context = self._latents(picked), self._contexts(picked)
        eps, t = torch.randn_like(x0), torch.randint(schedule.num_timesteps, (len(x0),), device=DEVICE)
        return Batch(x0, eps, schedule.add_noise(x0, eps, t), t, context, None)

    def cached(self, folder: Path) -> CachedDataset:
        """All examples, encoded once."""
        writer, entries = CacheWriter(folder), []
        for number in range(self.num_examples):
            picked = torch.tensor([number])
            entry = Entry(f"image {number}", f"caption {number}")
            writer.add_latent(entry.latent, self._latents(picked)[0])
            writer.add_text(entry.text, Caption(self._contexts(picked)[0]))
            entries.append(entry)
        return writer.finish(entries, entries[0].text)


if __name__ == "__main__":
    main()
