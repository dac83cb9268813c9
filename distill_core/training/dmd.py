"""Distribution matching distillation: the student learns to draw in a few steps what the teacher would draw in many, without images.

The student draws from noise. A second copy of what is trained, the *fake score*, learns to denoise what the student draws. A drawing,
noised again, is denoised by the fake score and by the guided teacher, the *real score*; where they differ, the drawing has to move
(Yin et al. 2024, arXiv 2311.18828, Eq. 7 and 8; in several steps, with several updates of the fake score for one of the student:
arXiv 2405.14867, Sec. 4). So learn the later of the student's sampling steps. The first learns to go where the teacher's own path
from the same noise goes, so that drawings stay as various as the teacher's (Wu et al. 2026, arXiv 2602.03139).

Each example of a batch trains one of the sampling steps, all in turn, so a gradient goes through one evaluation of the student.
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
from .learner import Learner, lent
from .losses import matching_loss, task_loss
from .settings import TrainingSettings

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``network(x, t, examples)``: its prediction for states (B, C, H, W) at timesteps (B,) with the captions of examples (B,), float32."""
FAKE_RATE = 2.0
"""Learning rate of the fake score, in parts of the student's."""


class Draws(NamedTuple):
    """The random numbers of a batch, on the CPU."""

    noise: Tensor
    """Where the student's sampling begins, (B, C, H, W)."""
    number: Tensor
    """The sampling step that each example trains, from 0, (B,) int64."""
    t: Tensor
    """Timestep up to which its drawing is noised again, (B,) int64."""
    eps: Tensor
    """That noise, (B, C, H, W)."""

    def part(self, which: slice) -> Draws:
        """Those of some of the batch's examples."""
        return Draws(*(entry[which] for entry in self))


def drawn(shape: torch.Size, schedule: NoiseSchedule, *, phases: int, first: int, seed: int, turn: int, purpose: str) -> Draws:
    """Random numbers for examples of a shape (B, C, H, W). first: the first sampling step that is trained. turn: number of the batch."""
    random = generator(seed, turn, purpose)
    noise, eps = (torch.randn(shape, generator=random) for _ in range(2))
    t = torch.randint(schedule.num_timesteps, shape[:1], generator=random)
    return Draws(noise, first + (torch.arange(shape[0]) + turn) % (phases - first), t, eps)


@dataclass(frozen=True, kw_only=True)
class Matching:
    """A student of so many sampling steps, and whom its drawings are compared with."""

    student: Network
    """With a gradient where one is wanted."""
    real: Network
    """The guided teacher; it predicts what the student does."""
    as_fake: Callable[[], AbstractContextManager]
    """While open, ``student`` is the fake score."""
    schedule: NoiseSchedule
    prediction: str
    """What all three predict: a key of `schedule.PREDICTIONS`."""
    phases: int
    """Sampling steps of the student."""
    anchor_steps: int
    """Steps of the teacher to half of its path, where the student's first step aims."""

    def losses(self, draws: Draws, device: torch.device) -> dict[str, Tensor]:
        """Terms of the student's loss, (B,) each, and ``cosine_distance`` of the velocities of both scores.

        Each is 0 where an example trains the other role of the student; scaled so that their means do not depend on how many do.
        """
        noise, number = draws.noise.to(device), draws.number
        x, t = self._before(noise, number), self._starts[number]
        predicted = self.student(x, t, torch.arange(len(x)))
        first, later = (rows.nonzero().flatten() for rows in (number == 0, number > 0))
        terms = {name: torch.zeros(len(x), device=device) for name in ("dmd", "diversity", "cosine_distance")}
        if len(first):
            aim, end = self._anchor(noise[first], first)
            ends = torch.full_like(first, end)
            landed = ddim_step(predicted[first], x[first], t[first], ends, self.schedule, self.prediction)
            distance = self._velocity_error(landed - aim, t[first], ends)
            terms["diversity"] = terms["diversity"].index_add(0, first.to(device), self.phases * distance)
        if len(later):
            drawing = self._clean(predicted[later], x[later], t[later])
            real, fake, apart = self._scores(drawing.detach(), draws.t[later], draws.eps[later].to(device), later)
            share, rows = self.phases / (self.phases - 1), later.to(device)
            terms["dmd"] = terms["dmd"].index_add(0, rows, share * matching_loss(drawing, real, fake))
            terms["cosine_distance"] = terms["cosine_distance"].index_add(0, rows, share * apart)
        return terms

    @torch.no_grad()
    def drawings(self, draws: Draws, device: torch.device) -> Tensor:
        """What the student draws, seen from the sampling step of each example: clean latents (B, C, H, W)."""
        x, t = self._before(draws.noise.to(device), draws.number), self._starts[draws.number]
        return self._clean(self.student(x, t, torch.arange(len(x))), x, t)

    def denoising_loss(self, drawings: Tensor, draws: Draws) -> Tensor:
        """How far ``student``, which is the fake score here, is from denoising noised drawings, (B,)."""
        x_t = self.schedule.add_noise(drawings, eps := draws.eps.to(drawings), draws.t)
        target = prediction(self.prediction).target(drawings, eps, self.schedule.at(draws.t, drawings))
        return task_loss(self.student(x_t, draws.t, torch.arange(len(x_t))), target)

    @property
    def _starts(self) -> Tensor:
        return timesteps(self.schedule, self.phases)

    @torch.no_grad()
    def _before(self, noise: Tensor, number: Tensor) -> Tensor:
        """States before a sampling step of each example, (B, C, H, W): the student's own, from noise."""
        x, starts = noise.clone(), self._starts
        for done in range(int(number.max())):
            going = (number > done).nonzero().flatten()
            now, end = (starts[i].expand(len(going)) for i in (done, done + 1))
            output = self.student(x[going], now, going)
            x[going] = ddim_step(output, x[going], now, end, self.schedule, self.prediction)
        return x

    @torch.no_grad()
    def _anchor(self, noise: Tensor, examples: Tensor) -> tuple[Tensor, int]:
        """Where the teacher is half way, from noise (B, C, H, W), and which timestep that is."""
        path = timesteps(self.schedule, 2 * self.anchor_steps)[: self.anchor_steps + 1].tolist()
        for now, end in zip(path[:-1], path[1:], strict=True):
            t, then = (torch.full_like(examples, timestep) for timestep in (now, end))
            noise = ddim_step(self.real(noise, t, examples), noise, t, then, self.schedule, self.prediction)
        return noise, path[-1]

    def _velocity_error(self, difference: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """Squared error (B,) of the velocity that leads from t to a state wrong by so much; in rectified flow, of ``eps - x0``."""
        now, then = self.schedule.at(t, difference), self.schedule.at(end, difference)
        velocity = difference / (now.sigma * then.alpha - now.alpha * then.sigma)
        return velocity.square().flatten(1).mean(1)

    def _clean(self, predicted: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return ddim_step(predicted, x, t, torch.full_like(t, CLEAN), self.schedule, self.prediction)

    @torch.no_grad()
    def _scores(self, drawing: Tensor, t: Tensor, eps: Tensor, examples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents by the real and by the fake score of a noised drawing, and the cosine distance of their velocities, (B,)."""
        x_t = self.schedule.add_noise(drawing, eps, t)
        real = self.real(x_t, t, examples)
        with self.as_fake():
            fake = self.student(x_t, t, examples)
        ours, theirs = (convert(each, x_t, t, self.schedule, self.prediction, "flow").flatten(1) for each in (fake, real))
        apart = 1 - F.cosine_similarity(ours, theirs)
        return self._clean(real, x_t, t), self._clean(fake, x_t, t), apart


class FakeScore:
    """Other values of the parameters that are trained, by name, which learn to denoise what the student draws.

    It begins as the student does, which is the teacher where a LoRA is trained.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: TrainingSettings, *, scaled: bool):
        self._theirs = parameters
        self._own = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
        self.learner = Learner(self._own, settings, scaled=scaled)

    @contextmanager
    def on(self) -> Iterator[None]:
        """While open, the network computes with its values."""
        with lent(self._theirs, self._own):
            yield

    def add_gradients(self, loss: Callable[[], Tensor]) -> Tensor:
        """Add the gradients of the mean of a loss, (B,), computed with its values; returns the loss."""
        with self.on():
            losses = loss()
            self.learner.backward(losses.mean())
            for name, parameter in self._own.items():
                gradient = self._theirs[name].grad
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return losses.detach()

    def update(self, learning_rate: float) -> float:
        """Apply the gradients; returns the norm they had. learning_rate: the student's."""
        norm = self.learner.clip().item()
        self.learner.update(norm, FAKE_RATE * learning_rate)
        return norm

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its values and everything its next update needs: tensors, and the rest as JSON."""
        tensors, rest = self.learner.state()
        weights = {f"weights/{name}": weight.detach() for name, weight in self._own.items()}
        return {**weights, **{f"optimizer/{name}": tensor for name, tensor in tensors.items()}}, rest

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Restore from `state`."""
        for name, weight in self._own.items():
            weight.copy_(tensors[f"weights/{name}"])
        learnt = {name.removeprefix("optimizer/"): t for name, t in tensors.items() if name.startswith("optimizer/")}
        self.learner.load(learnt, rest)
