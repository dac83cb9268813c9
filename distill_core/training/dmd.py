"""Distribution matching distillation: a student learns from its own few-step samples what the teacher's samples look like.

The student samples from noise. A second copy of what is trained, the *fake score*, learns to denoise these samples. A sample with
new noise is denoised by the fake score and by the guided teacher, the *real score*; their difference is the direction in which the
sample must move (Yin et al. 2024, arXiv 2311.18828, Eq. 7 and 8; for several sampling steps, with several updates of the fake score
for each of the student: arXiv 2405.14867, Sec. 4). The first sampling step learns instead to go where the teacher's own path
from the same noise goes, which keeps samples as varied as the teacher's (Wu et al. 2026, arXiv 2602.03139).

Each example of a batch trains one of the sampling steps, all in turn, so that a gradient goes through one evaluation of the student.
No images are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.seeding import generator
from ..diffusion.sampling import timesteps
from ..diffusion.schedule import CLEAN, NoiseSchedule, convert, ddim_step, prediction
from .learner import Learner, swapped, with_prefix, without_prefix
from .losses import matching_loss, task_loss
from .settings import TrainingSettings

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``network(x, t, examples)``: a prediction for states (B, C, H, W) at timesteps (B,), with the captions of examples (B,); float32."""
FAKE_RATE = 2.0
"""Learning rate of the fake score, as a multiple of the student's."""


class Draws(NamedTuple):
    """The random numbers of a batch, on the CPU."""

    noise: Tensor
    """Where the student's sampling begins, (B, C, H, W)."""
    sampling_step: Tensor
    """The step of that sampling which each example trains, from 0, (B,) int64."""
    t: Tensor
    """Timestep at which both scores see its sample, (B,) int64."""
    eps: Tensor
    """Noise added to the sample for that, (B, C, H, W)."""
    share: Tensor
    """Where its guidance scale lies between the lowest and the highest, (B,) in [0, 1]."""

    def part(self, which: slice) -> Draws:
        """Those of some examples."""
        return Draws(*(entry[which] for entry in self))


def drawn(shape: torch.Size, schedule: NoiseSchedule, *, phases: int, first: int, seed: int, batch: int, purpose: str) -> Draws:
    """Random numbers for examples of a shape (B, C, H, W). first: the first sampling step that is trained. batch: its number."""
    random = generator(seed, batch, purpose)
    noise, eps = (torch.randn(shape, generator=random) for _ in range(2))
    t = torch.randint(schedule.num_timesteps, shape[:1], generator=random)
    in_turn = first + (torch.arange(shape[0]) + batch) % (phases - first)
    return Draws(noise, in_turn, t, eps, torch.rand(shape[0], generator=random))


@dataclass(frozen=True, kw_only=True)
class Matching:
    """A student that samples in a few steps, and the two scores that judge its samples."""

    student: Network
    """With a gradient where one is wanted."""
    real: Network
    """The guided teacher; it predicts what the student does."""
    switched: Callable[[], AbstractContextManager]
    """While open, ``student`` is the fake score."""
    schedule: NoiseSchedule
    prediction: str
    """What all three predict: a key of `schedule.PREDICTIONS`."""
    phases: int
    """Sampling steps of the student."""
    anchor_steps: int
    """Steps of the teacher to the middle of its path, where the student's first step aims; 0 to train that step like the others."""

    def losses(self, draws: Draws, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms of the student's loss, and ``cosine_distance`` of the velocities of both scores, (B,) each.

        A term is 0 for examples that do not train it, and left out if none does. It is scaled so that its mean does not depend on
        how many do.
        """
        noise, steps = draws.noise.to(device), draws.sampling_step
        x, t = self._before(noise, steps), self._starts[steps]
        predicted = self.student(x, t, torch.arange(len(x)))
        anchored = (steps == 0) & bool(self.anchor_steps)
        share = 1 / self.phases if self.anchor_steps else 0.0  # of the examples, in the long run

        def spread(values: Tensor, examples: Tensor, share: float) -> Tensor:
            return torch.zeros(len(x), device=device).index_add(0, examples.to(device), values / share)

        terms, measured = dict[str, Tensor](), dict[str, Tensor]()
        if len(rows := anchored.nonzero().flatten()):
            aim, end = self._anchor(noise[rows], rows)
            ends = torch.full_like(rows, end)
            landed = ddim_step(predicted[rows], x[rows], t[rows], ends, self.schedule, self.prediction)
            terms["diversity"] = spread(self._velocity_error(landed - aim, t[rows], ends), rows, share)
        if len(rows := (~anchored).nonzero().flatten()):
            sample = self._clean(predicted[rows], x[rows], t[rows])
            real, fake, distance = self._scores(sample.detach(), draws.t[rows], draws.eps[rows].to(device), rows)
            terms["dmd"] = spread(matching_loss(sample, real, fake), rows, 1 - share)
            measured["cosine_distance"] = spread(distance, rows, 1 - share)
        return terms, measured

    @torch.no_grad()
    def samples(self, draws: Draws, device: torch.device) -> Tensor:
        """The student's samples, as each example's sampling step predicts them: clean latents (B, C, H, W)."""
        x, t = self._before(draws.noise.to(device), draws.sampling_step), self._starts[draws.sampling_step]
        return self._clean(self.student(x, t, torch.arange(len(x))), x, t)

    def denoising_loss(self, samples: Tensor, draws: Draws) -> Tensor:
        """The fake score's loss against samples with noise, (B,); ``student`` must be the fake score."""
        x_t = self.schedule.add_noise(samples, eps := draws.eps.to(samples), draws.t)
        target = prediction(self.prediction).target(samples, eps, self.schedule.at(draws.t, samples))
        return task_loss(self.student(x_t, draws.t, torch.arange(len(x_t))), target)

    @property
    def _starts(self) -> Tensor:
        return timesteps(self.schedule, self.phases)

    @torch.no_grad()
    def _before(self, noise: Tensor, sampling_step: Tensor) -> Tensor:
        """The student's own states before a sampling step of each example, (B, C, H, W)."""
        x, starts = noise.clone(), self._starts
        for done in range(int(sampling_step.max())):
            going = (sampling_step > done).nonzero().flatten()
            now, end = (starts[i].expand(len(going)) for i in (done, done + 1))
            output = self.student(x[going], now, going)
            x[going] = ddim_step(output, x[going], now, end, self.schedule, self.prediction)
        return x

    @torch.no_grad()
    def _anchor(self, noise: Tensor, examples: Tensor) -> tuple[Tensor, int]:
        """The teacher's states in the middle of its path from noise (B, C, H, W), and their timestep."""
        path = timesteps(self.schedule, 2 * self.anchor_steps)[: self.anchor_steps + 1].tolist()
        for now, end in zip(path[:-1], path[1:], strict=True):
            t, then = (torch.full_like(examples, timestep) for timestep in (now, end))
            noise = ddim_step(self.real(noise, t, examples), noise, t, then, self.schedule, self.prediction)
        return noise, path[-1]

    def _velocity_error(self, difference: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """Squared error (B,) of the velocity from t to ``end``, where states are off by a difference; for flows of ``eps - x0``."""
        now, then = self.schedule.at(t, difference), self.schedule.at(end, difference)
        velocity = difference / (now.sigma * then.alpha - now.alpha * then.sigma)
        return velocity.square().flatten(1).mean(1)

    def _clean(self, predicted: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return ddim_step(predicted, x, t, torch.full_like(t, CLEAN), self.schedule, self.prediction)

    @torch.no_grad()
    def _scores(self, sample: Tensor, t: Tensor, eps: Tensor, examples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents of a sample with noise by the real and by the fake score, and their velocities' cosine distance, (B,)."""
        x_t = self.schedule.add_noise(sample, eps, t)
        real = self.real(x_t, t, examples)
        with self.switched():
            fake = self.student(x_t, t, examples)
        ours, theirs = (convert(each, x_t, t, self.schedule, self.prediction, "flow").flatten(1) for each in (fake, real))
        return self._clean(real, x_t, t), self._clean(fake, x_t, t), 1 - F.cosine_similarity(ours, theirs)


class FakeScore:
    """Other values of the trained parameters, by name, that learn to denoise the student's samples.

    They begin as the student's: where a LoRA is trained, as the network without it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: TrainingSettings, *, scaled: bool):
        self._theirs = parameters
        self.parameters = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
        self.learner = Learner(self.parameters, settings, scaled=scaled)
        self.num_updates = 0
        """Updates up to which it has learnt, each of a batch with that number."""

    @contextmanager
    def on(self) -> Iterator[None]:
        """While open, the network computes with these values, and gradients are added to theirs."""
        with swapped(self._theirs, self.parameters):
            yield

    def update(self, learning_rate: float) -> float:
        """Apply the gradients; returns the norm they had. learning_rate: the student's."""
        norm = self.learner.clip().item()
        self.learner.update(norm, FAKE_RATE * learning_rate)
        self.num_updates += 1
        return norm

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The values and everything the next update needs: tensors, and the rest as JSON."""
        tensors, rest = self.learner.state()
        weights = with_prefix("weights", {name: weight.detach() for name, weight in self.parameters.items()})
        return weights | with_prefix("optimizer", tensors), rest | {"num_updates": self.num_updates}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Restore from `state`."""
        for name, weight in without_prefix("weights", tensors).items():
            self.parameters[name].copy_(weight)
        self.learner.load(without_prefix("optimizer", tensors), rest)
        self.num_updates = rest["num_updates"]
