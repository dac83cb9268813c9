"""The demo's transformer: a small Flux.1, with Flux's sixteen latent channels. Each of the autoencoder's four comes four times;
the transformer reads their mean and gives all four the same answer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..data.dataset import Bucket, LatentDataset
from ..diffusion.conditioning import Caption
from ..diffusion.pipelines import PATCH, PipelineDenoiser, denoiser_of
from ..diffusion.schedule import flow
from ..networks.transformers.architecture import FAMILIES, Transformer
from ..networks.transformers.flux_spelling import to_comfyui, to_diffusers
from . import files
from .autoencoder import COPIES, NUM_CHANNELS, copied
from .teacher import load_dataset
from .text import CONTEXT_WIDTH, ScenesTextEncoder

CONFIG: dict[str, Any] = dict(
    patch_size=1,  # images come to it as patches
    in_channels=PATCH**2 * NUM_CHANNELS * COPIES,
    num_layers=4,
    num_single_layers=8,
    attention_head_dim=128,
    num_attention_heads=1,
    joint_attention_dim=CONTEXT_WIDTH,
    pooled_projection_dim=CONTEXT_WIDTH,
    guidance_embeds=False,
    axes_dims_rope=(16, 56, 56),
)
"""A Flux.1 schnell of one head: 4 double and 8 single blocks."""


def load_transformer() -> PipelineDenoiser:
    """The demo's transformer in diffusers, in float32, on the GPU if there is one."""
    return transformer_of(load_file(files.TRANSFORMER))


def transformer_of(weights: Mapping[str, Tensor]) -> PipelineDenoiser:
    """A denoiser of the demo's transformer, or a student of it, from weights as ComfyUI spells them."""
    from diffusers import FluxTransformer2DModel

    found = Transformer.find({name: tuple(weight.shape) for name, weight in weights.items()})
    assert found is not None
    depths = found[0].depths
    network = FluxTransformer2DModel(**{**CONFIG, "num_layers": depths["double"], "num_single_layers": depths["single"]})
    shapes = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    network.load_state_dict(to_diffusers(weights, shapes))
    network.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    return denoiser_of(network, Transformer(FAMILIES["flux1"].in_diffusers, shapes), flow())


@cache
def load_transformer_dataset(num_scenes: int = 4096) -> LatentDataset:
    """The scenes of `teacher.load_dataset`, as the transformer reads them."""
    (bucket,) = load_dataset(num_scenes).buckets
    latents, sizes = copied(bucket.latents), torch.zeros(len(bucket.latents), 6)  # the sizes of SDXL, which it does not read
    pooled = Bucket(latents=latents, contexts=bucket.contexts, pooled=bucket.contexts.mean(1), sizes=sizes)
    null = ScenesTextEncoder.bundled().captions([""])[0]
    return LatentDataset([pooled], Caption(null, null.mean(0)))


def for_copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, as diffusers spells them, of a transformer of the autoencoder's four channels, as one of the copies has them and
    ComfyUI spells them."""
    made = to_comfyui(weights)
    for kind in ("weight", "bias"):
        name = f"final_layer.linear.{kind}"
        made[name] = _for_each_copy(made[name], dim=0)
    made["img_in.weight"] = _for_each_copy(made["img_in.weight"], dim=1) / COPIES
    return {name: weight.contiguous() for name, weight in made.items()}


def _for_each_copy(weight: Tensor, dim: int) -> Tensor:
    """Weights of the values of a patch, those of one channel together, as those of the copies."""
    return weight.unflatten(dim, (NUM_CHANNELS, PATCH**2)).repeat_interleave(COPIES, dim=dim).flatten(dim, dim + 1)
