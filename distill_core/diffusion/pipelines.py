"""Denoisers around the transformers of diffusers' pipelines, which may be teacher and student at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base.documents import numbers
from ..networks.model_sampling import FLOW, ModelSampling
from ..networks.transformers.architecture import Transformer
from .conditioning import Label, num_tokens
from .schedule import NoiseSchedule, flow
from .transformers import TransformerDenoiser

PATCH = 2
"""Side of a patch of latents, which is one token."""
GUIDANCE = 3.5
"""The guidance that Flux.1 dev takes as an input, as its pipelines give it."""
FLOWS = ModelSampling(prediction="flow", noise=FLOW)
"""Sampling of all these families."""
_MOST = 1_000_000
"""More than any number in a scheduler's config."""


class PipelineDenoiser(TransformerDenoiser):
    """A transformer of diffusers, asked as its pipeline asks it."""

    lora_head, lora_as_peft = "transformer", True

    @property
    def config(self) -> Any:
        return cast("Any", self.network).config

    @property
    def latent_channels(self) -> int:
        return self.config.in_channels // PATCH**2  # whose tokens are patches


class FluxDenoiser(PipelineDenoiser):
    """A ``FluxTransformer2DModel`` (Flux.1)."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        if label is None:
            raise ValueError(
                "the captions lack their pooled embedding, which Flux.1 reads; encode them with its own text encoders"
            )
        height, width = x_t.shape[2:]
        guidance = x_t.new_full((len(x_t),), GUIDANCE) if self.config.guidance_embeds else None
        with self.way():
            predicted = self.running(
                patches(x_t),
                encoder_hidden_states=context,
                pooled_projections=label.pooled,
                timestep=self.schedule.at(t, x_t).sigma.flatten(),
                img_ids=positions(height, width).to(x_t),
                txt_ids=x_t.new_zeros(context.shape[1], 3),
                guidance=guidance,
                return_dict=False,
            )[0]
        return from_patches(predicted, height, width)


class QwenImageDenoiser(PipelineDenoiser):
    """A ``QwenImageTransformer2DModel``. Captions may be padded."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        height, width = x_t.shape[2:]
        lengths = num_tokens(context)
        context = context[:, : max(lengths)]
        mask = None
        if min(lengths) < max(lengths):
            mask = torch.arange(max(lengths), device=x_t.device) < torch.tensor(lengths, device=x_t.device)[:, None]
        with self.way():
            predicted = self.running(
                patches(x_t),
                encoder_hidden_states=context,
                encoder_hidden_states_mask=mask,
                timestep=self.schedule.at(t, x_t).sigma.flatten(),
                img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(x_t),
                return_dict=False,
            )[0]
        return from_patches(predicted, height, width)


class ZImageDenoiser(PipelineDenoiser):
    """A ``ZImageTransformer2DModel``, which takes the amount of image in place of that of noise, and predicts the velocity from noise to image. Captions may be padded."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        alpha = self.schedule.at(t, x_t.float()).alpha.flatten()  # the network scales it before it rounds
        captions = [caption[:length] for caption, length in zip(context, num_tokens(context), strict=True)]
        with self.way():
            predicted = self.running(list(x_t.unsqueeze(2)), alpha, captions, return_dict=False)[0]
        return -torch.stack(predicted).squeeze(2)

    @property
    def latent_channels(self) -> int:
        return self.config.in_channels


DENOISERS: dict[str, type[PipelineDenoiser]] = {
    "flux1": FluxDenoiser,
    "qwen-image": QwenImageDenoiser,
    "z-image": ZImageDenoiser,
}
"""By family."""


def denoiser_of(network: nn.Module, transformer: Transformer, schedule: NoiseSchedule) -> PipelineDenoiser:
    """A network of diffusers as a denoiser."""
    return DENOISERS[transformer.family](
        network=network,
        architecture=None,  # type: ignore[arg-type]  # of UNets
        sampling=FLOWS,
        noise_levels=schedule,
        transformer=transformer,
    )


def flow_of(scheduler: Mapping[str, Any], side_tokens: tuple[int, int]) -> NoiseSchedule:
    """Noise levels at which a pipeline samples images of so many tokens on each side. scheduler: its config.

    As in ``calculate_shift`` and ``FlowMatchEulerDiscreteScheduler`` of diffusers, but for ``shift_terminal``, which depends on the number
    of steps. ``ValueError`` for a config that gives no shift.
    """

    def number(name: str, default: float) -> float:
        (value,) = numbers([scheduler.get(name, default)], f"{name} of its scheduler")
        if not 0 < value < _MOST:
            raise ValueError(f"{name} of its scheduler must be between 0 and {_MOST:,}, got {value:g}; download the model again")
        return value

    if not scheduler.get("use_dynamic_shifting"):
        return flow(shift=number("shift", 1.0))
    least, most = number("base_image_seq_len", 256), number("max_image_seq_len", 4096)
    low, high = number("base_shift", 0.5), number("max_shift", 1.15)
    if most <= least:
        raise ValueError(
            f"max_image_seq_len of its scheduler must be more than {least:g}, got {most:g}; download the model again"
        )
    exponent = low + (high - low) * (math.prod(side_tokens) - least) / (most - least)
    return flow(shift=math.exp(exponent) if scheduler.get("time_shift_type", "exponential") == "exponential" else exponent)


def patches(latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) as tokens (B, H W / 4, 4 C), row by row."""
    return latents.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def from_patches(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, H, W) from tokens (B, H W / 4, 4 C)."""
    rows = tokens.unflatten(1, (height // PATCH, width // PATCH)).unflatten(-1, (-1, PATCH, PATCH))
    return rows.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def positions(height: int, width: int) -> Tensor:
    """Row and column of each token (H W / 4, 3) of latents (H, W), for Flux's rotary embedding."""
    rows, columns = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()
