"""Memory forecast for a LoRA on a network that is both teacher and student; `memory` forecasts other runs.

The step is simulated with the network itself, its weights without contents.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..diffusion.conditioning import Label
from ..diffusion.denoiser import checkpointing
from ..diffusion.transformers import TransformerDenoiser
from ..networks.name_map import NameMap
from .exports import trained
from .local import local_terms
from .memory import (
    PARTS,
    Forecast,
    LatentShape,
    Ledger,
    MemorySettings,
    Part,
    beside_weights,
    emptied,
    passes,
    student_pass,
    teacher_pass,
    update_bytes,
    without_contents,
)
from .settings import TrainingSettings
from .step import StepInputs


@dataclass(frozen=True)
class Base:
    """A network that is teacher and student at once, and what it is asked."""

    empty: Callable[[], TransformerDenoiser]
    """Makes it anew, all its weights on the meta device."""
    mapping: NameMap | None
    """To the student; None for a LoRA on the whole network."""
    held_bytes: int
    """Of its weights, as they are held."""
    context: tuple[int, int]
    """Tokens of a caption, and their width."""
    pooled_width: int | None = None
    opened: Callable[[Any], AbstractContextManager] = lambda denoiser: contextlib.nullcontext()
    """What must be open around a pass, so that gradients come through."""
    widened_bytes: int = 0
    """Of the 16-bit copies that a pass makes of weights stored in fewer bits, where the network itself does not tell."""

    def forecast(self, settings: MemorySettings, latent_shape: LatentShape, enough: float = math.inf) -> Forecast:
        """Memory of a step at its worst moment. enough: if the update alone needs more bytes, the other moments are skipped."""
        training = settings.training
        shapes = [weight.shape for weight in self._network(training, lora=True).network.parameters() if weight.requires_grad]
        num_trained = sum(shape.numel() for shape in shapes)
        always = Counter({"student weights": self.held_bytes + 4 * num_trained}) + beside_weights(shapes, training)
        gradients, widened = Counter({"gradients": 4 * num_trained}), Counter({"half-precision weights": self.widened_bytes})
        update = "the update of the weights"
        moments = {update: always + gradients + Counter({"working memory": update_bytes(shapes, training)})}
        measured = moments[update].total() <= enough
        if measured and not training.weighted_objective.only_local:
            from_teacher, *of_student = self._whole(settings, latent_shape)
            adding_up = gradients if training.accumulation_steps > 1 else Counter()
            moments |= passes(training, always, adding_up + widened + from_teacher, *(widened + part for part in of_student))
        if measured and training.learns_locally:
            moments["a local step"] = always + widened + self._local(settings, latent_shape)
        worst = max(moments, key=lambda moment: moments[moment].total())
        parts = tuple(Part(name, moments[worst][name]) for name in PARTS)
        return Forecast(moment=worst, parts=parts, settings=settings, latent_shape=latent_shape, again=self.forecast)

    def _whole(self, settings: MemorySettings, latent_shape: LatentShape) -> tuple[Counter, Counter, Counter]:
        training = settings.training
        teacher, student = (self._network(training, lora=on) for on in (False, True))
        with without_contents(FakeTensorMode(allow_non_fake_inputs=True)), self.opened(teacher), self.opened(student):
            teacher, student = emptied(teacher), emptied(student)
            layers = dict(student.kept_blocks) if training.weighted_objective.feature else {}
            inputs = self._inputs(settings, latent_shape)
            most, outputs = teacher_pass(teacher, layers, inputs, guided=training.guidance != 1)
            return most, *student_pass(student, layers, inputs, outputs, replace(training, optimizer="adamw", ema_decay=0.0))

    def _local(self, settings: MemorySettings, latent_shape: LatentShape) -> Counter:
        training, student = settings.training, self._network(settings.training, lora=True)
        with without_contents(FakeTensorMode(allow_non_fake_inputs=True)), contextlib.ExitStack() as stack:
            stack.enter_context(self.opened(student))
            student = emptied(student)
            if training.gradient_checkpointing:
                stack.enter_context(checkpointing(student))
            ledger = stack.enter_context(Ledger(student.network.parameters()))
            for weight in (weight for weight in student.network.parameters() if weight.requires_grad):
                weight.register_post_accumulate_grad_hook(lambda weight: ledger.mark("gradients", weight.grad))
            teacher, inputs = replace(student, mapping=None), self._inputs(settings, latent_shape)
            with ledger.keeping():
                terms = local_terms(student, teacher, inputs, training.local_loss, contextlib.nullcontext())
                loss = torch.stack(list(terms.values())).sum()
            del terms
            loss.backward()
            return ledger.most

    def _network(self, training: TrainingSettings, *, lora: bool) -> TransformerDenoiser:
        denoiser = self.empty()
        if lora:
            denoiser = replace(denoiser, mapping=self.mapping)
            with torch.device("meta"):
                trained(denoiser, training, None)
            denoiser.network.train()
        return denoiser

    def _inputs(self, settings: MemorySettings, latent_shape: LatentShape) -> StepInputs:
        count = settings.micro_batch
        label = None if self.pooled_width is None else Label(torch.zeros(count, self.pooled_width), torch.zeros(count, 6))
        t = torch.zeros(count, dtype=torch.long)
        return torch.zeros(count, *latent_shape), t, torch.zeros(count, *self.context), label


def on_meta(weight: Tensor) -> nn.Parameter:
    """A frozen parameter of the same shape and type, without contents."""
    return nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
