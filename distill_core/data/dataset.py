"""Training data that was encoded once, and draws from it that depend only on (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..base.seeding import generator
from ..base.storage import fingerprint
from ..diffusion.conditioning import Caption, Label
from ..diffusion.schedule import NoiseSchedule


class Examples(NamedTuple):
    """Some examples of one size."""

    latents: Tensor
    """Clean latents as the network sees them (scaled, about unit variance), (B, C, H, W)."""
    contexts: Tensor
    """Text embeddings, (B, L, D)."""
    label: Label | None = None
    """Conditioning of an SDXL besides the caption."""
    states: Tensor | None = None
    """Noisy latents on the way to ``latents``, at the timesteps of the dataset, (B, K, C, H, W)."""
    scale: Tensor | None = None
    """Guidance scale of ``states``, (B,); None if unknown."""


class Dataset(Protocol):
    """Training data of a run: examples in buckets, all examples of a bucket with one size."""

    @property
    def bucket_sizes(self) -> Sequence[int]:
        """Number of examples in each bucket."""

    @property
    def null(self) -> Caption | None:
        """The empty caption, for caption dropout."""

    @property
    def timesteps(self) -> Tensor | None:
        """Timesteps of stored states, (K,) int64; None if noise is drawn anew each time."""

    @property
    def scales(self) -> tuple[float, float] | None:
        """Lowest and highest guidance scale of the states; None if unknown."""

    @property
    def fingerprint(self) -> str:
        """Identifies this data."""

    def sources(self, bucket: int) -> Tensor | None:
        """What each example of a bucket was made from, such as an image and its mirror image, as a number, (N,) int64.

        None if each was made from something of its own.
        """

    def read(self, bucket: int, picked: Tensor) -> Examples:
        """Examples of a bucket by their numbers, (B,) int64."""
        ...


def num_examples(dataset: Dataset) -> int:
    """Number of examples in all buckets."""
    return sum(dataset.bucket_sizes)


def largest_example(dataset: Dataset) -> Examples:
    """One example, of the bucket whose latents are the largest."""
    first = torch.zeros(1, dtype=torch.int64)
    examples = (dataset.read(bucket, first) for bucket, size in enumerate(dataset.bucket_sizes) if size)
    return max(examples, key=lambda example: example.latents.numel())


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Examples of one size, in memory."""

    latents: Tensor
    """(N, C, H, W)."""
    contexts: Tensor
    """(N, L, D), or (1, L, D) for all."""
    pooled: Tensor | None = None
    """(N, P), or (1, P) for all."""
    sizes: Tensor | None = None
    """Original height and width, crop from top and left, target height and width in pixels, (N, 6)."""
    states: Tensor | None = None
    """(N, K, C, H, W)."""
    scales: Tensor | None = None
    """Guidance scale of each example's states, (N,)."""

    def __post_init__(self):
        if self.latents.ndim != 4 or self.contexts.ndim != 3 or len(self.contexts) not in (1, len(self.latents)):
            raise ValueError(
                f"a dataset needs latents (N, C, H, W) and one context (L, D) each, got "
                f"{tuple(self.latents.shape)} and {tuple(self.contexts.shape)}"
            )
        if (self.pooled is None) != (self.sizes is None):
            raise ValueError("a dataset for SDXL needs both pooled embeddings and sizes")
        if self.states is not None and self.states.shape[:1] + self.states.shape[2:] != self.latents.shape:
            raise ValueError(
                f"stored states (N, K, C, H, W) must belong to latents (N, C, H, W), got "
                f"{tuple(self.states.shape)} and {tuple(self.latents.shape)}"
            )

    def read(self, picked: Tensor) -> Examples:
        def of(all_or_one: Tensor) -> Tensor:
            return all_or_one[picked if len(all_or_one) > 1 else torch.zeros_like(picked)]

        label = None if self.pooled is None or self.sizes is None else Label(of(self.pooled), self.sizes[picked])
        states, scale = (None if of_all is None else of_all[picked] for of_all in (self.states, self.scales))
        return Examples(self.latents[picked], of(self.contexts), label, states, scale)


@dataclass(frozen=True)
class LatentDataset:
    """A `Dataset` in memory."""

    buckets: Sequence[Bucket]
    null: Caption | None = None
    timesteps: Tensor | None = None

    def __post_init__(self):
        if not any(self.bucket_sizes):
            raise ValueError("a dataset needs at least one example")
        stored = sum(bucket.states is not None for bucket in self.buckets)
        if stored not in (0, len(self.buckets)) or bool(stored) != (self.timesteps is not None):
            raise ValueError("a dataset needs the timesteps of its stored states, and states in every bucket or none")

    @classmethod
    def of(cls, latents: Tensor, contexts: Tensor, null_context: Tensor | None = None) -> LatentDataset:
        """Examples of one size: latents (N, C, H, W), contexts (N or 1, L, D), the empty caption's (L, D)."""
        return cls([Bucket(latents=latents, contexts=contexts)], None if null_context is None else Caption(null_context))

    @property
    def bucket_sizes(self) -> Sequence[int]:
        return [len(bucket.latents) for bucket in self.buckets]

    @property
    def scales(self) -> tuple[float, float] | None:
        scales = [bucket.scales for bucket in self.buckets if bucket.scales is not None]
        if len(scales) < len(self.buckets):
            return None
        least, largest = torch.cat(scales).aminmax()
        return least.item(), largest.item()

    @property
    def fingerprint(self) -> str:
        parts = [(i, *part) for i, bucket in enumerate(self.buckets) for part in vars(bucket).items()]
        one_scale = len({*(self.scales or ())}) < 2  # then it is the same for all examples
        named = {f"{i}/{name}": tensor for i, name, tensor in parts if not (name == "scales" and one_scale)}
        return fingerprint({name: tensor for name, tensor in named.items() if tensor is not None})

    def sources(self, bucket: int) -> None:
        return None

    def read(self, bucket: int, picked: Tensor) -> Examples:
        return self.buckets[bucket].read(picked)


# --- draws ----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """One training batch, on the CPU, in float32."""

    x0: Tensor
    """Clean latents, (B, C, H, W)."""
    eps: Tensor
    """The noise in ``x_t``, (B, C, H, W); with input perturbation ``x_t`` holds a little more than that."""
    x_t: Tensor
    """Noisy latents that the networks read, (B, C, H, W)."""
    t: Tensor
    """Timesteps, (B,) int64."""
    context: Tensor
    """(B, L, D)."""
    label: Label | None
    scale: Tensor | None = None
    """Guidance scale of each example, (B,), if a range of scales is trained."""

    def part(self, which: slice) -> Batch:
        """Some of the batch's examples."""
        label = None if self.label is None else Label(*(entry[which] for entry in self.label))
        scale = None if self.scale is None else self.scale[which]
        return Batch(self.x0[which], self.eps[which], self.x_t[which], self.t[which], self.context[which], label, scale)


class Batching(NamedTuple):
    """How batches are drawn."""

    batch_size: int
    seed: int
    caption_dropout: float = 0.0
    """Share of captions replaced by the empty one."""
    timesteps: str = "uniform"
    """A key of `TIMESTEPS`."""
    within: tuple[int, int] | None = None
    """[start, end) of the timesteps to draw, for example [0, 500]; None for all."""
    noise_offset: float = 0.0
    """Standard deviation of a constant added to each channel of the noise (Guttenberg 2023)."""
    input_perturbation: float = 0.0
    """Extra noise in ``x_t``, as a share of its noise (Ning et al. 2023, arXiv 2301.11706, Alg. 1)."""
    held_out: float = 0.0
    """Share of each bucket that is never trained on."""
    scales: tuple[float, float] | None = None
    """Lowest and highest guidance scale; each example gets one between them. None for no scales."""

    def timesteps_of(self, schedule: NoiseSchedule) -> tuple[int, int]:
        """The range [start, end) of timesteps to draw; ``ValueError`` if the schedule has fewer."""
        first, end = self.within or (0, schedule.num_timesteps)
        if end > schedule.num_timesteps:
            raise ValueError(f"timestep_range ends at {end}, but the schedule has {schedule.num_timesteps} timesteps")
        return first, end


TIMESTEPS = {
    "uniform": lambda size, count, random: torch.randint(count, (size,), generator=random),
    # Esser et al. 2024, arXiv 2403.03206, Sec. 3.1, with mean 0 and deviation 1.
    "logit-normal": lambda size, count, random: (
        (torch.randn(size, generator=random).sigmoid() * count).long().clamp(max=count - 1)
    ),
}
"""How timesteps are drawn: (batch size, number of timesteps, generator) -> (B,) int64."""


@lru_cache(maxsize=64)
def _order(count: int, seed: int, epoch: int, purpose: str) -> Tensor:
    """The numbers below ``count`` in random order."""
    return torch.randperm(count, generator=generator(seed, epoch, purpose))


def indices(batch: int, batch_size: int, num_examples: int, seed: int, purpose: str = "order") -> Tensor:
    """Examples of a batch, (batch_size,): the data in a new order every epoch, each example once an epoch."""
    positions = range(batch * batch_size, (batch + 1) * batch_size)
    return torch.stack([_order(num_examples, seed, p // num_examples, purpose)[p % num_examples] for p in positions])


ROUND_EPOCHS = 16  # more bring a bucket's share of the batches closer to its share of the examples


def which_bucket(step: int, batch_size: int, bucket_sizes: Sequence[int], seed: int) -> tuple[int, int]:
    """The bucket a step takes its batch from, and how many batches that bucket gave before.

    Steps come in rounds of about ``ROUND_EPOCHS`` epochs; in each round every bucket has a fixed number of batches, in a
    new order.
    """
    per_round = tuple(max(1, round(ROUND_EPOCHS * size / batch_size)) if size else 0 for size in bucket_sizes)
    done, place = divmod(step, sum(per_round))
    order, earlier = _round(per_round, seed, done)
    bucket = int(order[place])
    return bucket, done * per_round[bucket] + int(earlier[place])


@lru_cache(maxsize=4)
def _round(per_round: tuple[int, ...], seed: int, number: int) -> tuple[Tensor, Tensor]:
    """Buckets of a round in order, and for each place how often its bucket came before in the round."""
    order = torch.repeat_interleave(torch.arange(len(per_round)), torch.tensor(per_round))
    order = order[_order(len(order), seed, number, "buckets")]
    earlier = torch.zeros_like(order)
    for bucket in range(len(per_round)):
        earlier[order == bucket] = torch.arange(per_round[bucket])
    return order, earlier


def _split(dataset: Dataset, bucket: int, batching: Batching) -> tuple[Tensor, Tensor]:
    """A bucket's examples that are trained on, and those kept for validation.

    Those made from one source, such as an image and its mirror image, are on one side. A bucket's only source is trained on.
    """
    return _sides(dataset.bucket_sizes[bucket], dataset.sources(bucket), bucket, batching.seed, batching.held_out)


@lru_cache(maxsize=64)  # every step asks for every bucket
def _sides(size: int, sources: Tensor | None, bucket: int, seed: int, share: float) -> tuple[Tensor, Tensor]:
    num_sources = size if sources is None else int(sources.max()) + 1
    num_held_out = min(num_sources - 1, round(num_sources * share)) if size else 0
    order = _order(num_sources, seed, bucket, "held out")
    num_trained = size - num_held_out
    if sources is not None:
        num_trained = size - int(torch.isin(sources, order[num_sources - num_held_out :]).sum())
        order = order.argsort()[sources].argsort(stable=True)
    return order[:num_trained], order[num_trained:]


def draw(dataset: Dataset, step: int, schedule: NoiseSchedule, batching: Batching) -> Batch:
    """The batch of a step: examples, noise, timesteps, some captions replaced by the empty one."""
    trained = [_split(dataset, bucket, batching)[0] for bucket in range(len(dataset.bucket_sizes))] if batching.held_out else []
    sizes = [len(of_bucket) for of_bucket in trained] or dataset.bucket_sizes
    bucket, earlier = which_bucket(step, batching.batch_size, sizes, batching.seed)
    picked = indices(earlier, batching.batch_size, sizes[bucket], batching.seed, f"order {bucket}" if bucket else "order")
    if batching.held_out:
        picked = trained[bucket][picked]
    examples = dataset.read(bucket, picked)
    batch = _noised(dataset, examples, schedule, batching, generator(batching.seed, step, "noise"))
    return _scaled(batch, examples, batching, step, "scales")


def held_out_batches(dataset: Dataset, schedule: NoiseSchedule, batching: Batching, limit: int) -> list[Batch]:
    """At most ``limit`` batches of held-out examples, of every bucket in turn, with noise and timesteps that are always the same."""
    plain = batching._replace(caption_dropout=0.0, noise_offset=0.0, input_perturbation=0.0)
    of_buckets = [
        [(bucket, picked) for picked in _split(dataset, bucket, batching)[1].split(batching.batch_size) if len(picked)]
        for bucket in range(len(dataset.bucket_sizes))
    ]
    chosen = [part for turn in zip_longest(*of_buckets) for part in turn if part is not None][:limit]
    noised = []
    for number, (bucket, picked) in enumerate(chosen):
        examples = dataset.read(bucket, picked)
        batch = _noised(dataset, examples, schedule, plain, generator(batching.seed, number, "validation"))
        noised.append(_scaled(batch, examples, batching, number, "validation scales"))
    return noised


def _scaled(batch: Batch, examples: Examples, batching: Batching, number: int, purpose: str) -> Batch:
    """A batch with a guidance scale for each example, if there is a range of scales.

    A state on a trajectory has the scale of that trajectory (Jensen et al. 2025, arXiv 2503.07274); other examples get a
    scale drawn uniformly.
    """
    if batching.scales is None:
        return batch
    if examples.states is not None:
        return batch._replace(scale=examples.scale)
    least, largest = batching.scales
    share = torch.rand(len(batch.t), generator=generator(batching.seed, number, purpose))
    return batch._replace(scale=least + (largest - least) * share)


def _noised(dataset: Dataset, examples: Examples, schedule: NoiseSchedule, batching: Batching, random: torch.Generator) -> Batch:
    x0, context, label = examples.latents.float(), examples.contexts.float(), examples.label
    eps = torch.randn(x0.shape, generator=random)
    first, end = batching.timesteps_of(schedule)
    t = first + TIMESTEPS[batching.timesteps](len(x0), end - first, random)
    dropped = torch.rand(len(x0), generator=random) < batching.caption_dropout
    if dataset.null is not None:
        context = torch.where(dropped[:, None, None], dataset.null.context.float(), context)
        if label is not None and dataset.null.pooled is not None:
            label = label._replace(pooled=torch.where(dropped[:, None], dataset.null.pooled.to(label.pooled), label.pooled))
    if examples.states is not None:
        assert dataset.timesteps is not None
        (held,) = ((dataset.timesteps >= first) & (dataset.timesteps < end)).nonzero(as_tuple=True)
        if not len(held):
            raise ValueError(f"timestep_range {first} to {end} contains none of the teacher's states; store more states, or none")
        stored = held[torch.randint(len(held), (len(x0),), generator=random)]
        t, x_t = dataset.timesteps[stored], examples.states[torch.arange(len(x0)), stored].float()
        alpha, sigma = schedule.at(t, x_t)
        return Batch(x0, (x_t - alpha * x0) / sigma, x_t, t, context, label)
    if batching.noise_offset:
        eps = eps + batching.noise_offset * torch.randn(*x0.shape[:2], 1, 1, generator=random)
    shown = eps
    if batching.input_perturbation:
        shown = eps + batching.input_perturbation * torch.randn(eps.shape, generator=random)
    return Batch(x0, eps, schedule.add_noise(x0, shown, t), t, context, label)
