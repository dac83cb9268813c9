"""What a MODEL predicts for given latents at given noise levels, asked as a sampler would."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...distill_core.pruning.runs import Examples, Predict
from .model import Model

EMPTY_LATENTS = "the latents are empty; connect images that the model should make well: VAE Encode, or a KSampler"


def check_one_each(num_latents: int, num_captions: int) -> None:
    """``ValueError`` unless there is a caption for each latent, or one for all."""
    if num_captions not in (1, num_latents):
        raise ValueError(
            f"there are {num_latents} latents but {num_captions} captions; give one caption for each, or one for all"
        )


def at_levels(
    patcher: ModelPatcher,
    latents: Tensor,
    noise: Tensor,
    sigmas: Sequence[float],
    *,
    positive: list,
    negative: list,
    cfg: float,
    seed: int,
    visit: Callable[[Predict], None],
) -> None:
    """Call ``visit`` for each noise level, in the order given, with what asks a MODEL: for the noise, or the velocity of a flow.

    latents, noise: of one batch, as a LATENT holds them. The answer is on the CPU.
    """
    sampling, clean = patcher.get_model_object("model_sampling"), patcher.model.process_latent_in(latents)

    def sampler(model_k, x: Tensor, _, extra_args: dict, callback, disable) -> Tensor:
        for sigma in sigmas:
            level = x.new_full((len(x),), sigma)
            x_t = sampling.noise_scaling(level, noise.to(x), clean.to(x))

            def predict(x_t=x_t, level=level, sigma=sigma) -> Tensor:
                return ((x_t - model_k(x_t, level, **extra_args)) / sigma).cpu()

            visit(predict)
        return x

    levels = torch.tensor([*reversed(sigmas), 0.0])
    comfy.sample.sample_custom(
        patcher, noise, cfg, comfy.samplers.KSAMPLER(sampler), levels, positive, negative, latents, disable_pbar=True, seed=seed
    )


def even_levels(patcher: ModelPatcher, count: int) -> list[float]:
    """Noise levels in the middle of as many equal parts of a MODEL's schedule, the least noisy first."""
    sampling = patcher.get_model_object("model_sampling")
    return [float(sampling.percent_to_sigma(1 - (i + 0.5) / count)) for i in range(count)]


def examples_of(model: Model, latents: list[dict], captions: list, *, num_examples: int, num_levels: int, seed: int) -> Examples:
    """A few random latents with their captions, one after another, each at evenly spaced noise levels.

    ``ValueError`` if there are none, if their captions do not match in number, or if they are videos or empty.
    """
    single = [sample[None] for entry in latents for sample in entry["samples"]]
    conditioning = [own for one in captions for entry in one for own in _one_each(entry)]
    check_one_each(len(single), len(conditioning))
    if any(sample.ndim > 4 and sample.shape[2] > 1 for sample in single):
        raise ValueError("the latents are videos; give single images, or single frames: use VAE Encode of an image")
    if not any(sample.any() for sample in single):
        raise ValueError(EMPTY_LATENTS)
    random = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(single), generator=random)[:num_examples].tolist()
    sigmas = even_levels(model.patcher, num_levels)

    def visit_each(visit: Callable[[Predict], None]) -> None:
        for place in picked:
            sample = comfy.sample.fix_empty_latent_channels(model.patcher, single[place])
            at_levels(
                model.patcher,
                sample,
                comfy.sample.prepare_noise(sample, seed + place),
                sigmas,
                positive=(caption := [conditioning[place % len(conditioning)]]),
                negative=caption,
                cfg=1.0,
                seed=seed,
                visit=visit,
            )

    return Examples(len(picked), num_levels, visit_each)


def _one_each(entry: list) -> list[list]:
    """Conditioning of several captions in one batch as conditioning of one each."""
    embedding, options = entry
    count = len(embedding)
    return [
        [embedding[i : i + 1], {key: value[i : i + 1] if _is_batch(value, count) else value for key, value in options.items()}]
        for i in range(count)
    ]


def _is_batch(value, count: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == count > 1
