"""The demo's transformer: a small Flux.1, with Flux's sixteen latent channels. Each of the autoencoder's four comes four times;
the transformer reads their mean and gives all four the same answer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NUM_CHANNELS, COPIES, PATCH = 4, 4, 2


def copied(latents: Tensor) -> Tensor:
    """Latents (B, 4, H, W) of the autoencoder, as (B, 16, H, W) of the transformer."""
    return latents.repeat_interleave(COPIES, dim=1)


def mean_of_copies(latents: Tensor) -> Tensor:
    """Latents (B, 16, H, W) of the transformer, as (B, 4, H, W) of the autoencoder."""
    return latents.unflatten(1, (NUM_CHANNELS, COPIES)).mean(2)


def patches(latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) as tokens (B, H W / 4, 4 C), row by row, as Flux orders them."""
    return latents.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def positions(height: int, width: int) -> Tensor:
    """Row and column of each token (H W / 4, 3) of latents (H, W), for Flux's rotary embedding."""
    rows, columns = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


def in_comfyui(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Flux.1 of diffusers that reads and answers means of copies, as one of ComfyUI's for the copies themselves."""
    given, made = dict(weights), dict[str, Tensor]()

    def take(name: str, *sources: str) -> None:
        for kind in ("weight", "bias"):
            if found := [given.pop(f"{source}.{kind}") for source in sources if f"{source}.{kind}" in given]:
                made[f"{name}.{kind}"] = torch.cat(found)

    def take_norms(name: str, query: str, key: str) -> None:
        made[f"{name}.query_norm.scale"], made[f"{name}.key_norm.scale"] = (
            given.pop(f"{query}.weight"),
            given.pop(f"{key}.weight"),
        )

    for number in range(_depth(given, "transformer_blocks")):
        ours, theirs = f"double_blocks.{number}", f"transformer_blocks.{number}"
        for stream, before, norms, norm, out, mlp in (
            ("img", "to_", "norm_", "norm1", "to_out.0", "ff"),
            ("txt", "add_", "norm_added_", "norm1_context", "to_add_out", "ff_context"),
        ):
            projections = (f"{theirs}.attn.{before}{each}{'_proj' if stream == 'txt' else ''}" for each in "qkv")
            take(f"{ours}.{stream}_attn.qkv", *projections)
            take_norms(f"{ours}.{stream}_attn.norm", f"{theirs}.attn.{norms}q", f"{theirs}.attn.{norms}k")
            take(f"{ours}.{stream}_attn.proj", f"{theirs}.attn.{out}")
            take(f"{ours}.{stream}_mod.lin", f"{theirs}.{norm}.linear")
            take(f"{ours}.{stream}_mlp.0", f"{theirs}.{mlp}.net.0.proj")
            take(f"{ours}.{stream}_mlp.2", f"{theirs}.{mlp}.net.2")
    for number in range(_depth(given, "single_transformer_blocks")):
        ours, theirs = f"single_blocks.{number}", f"single_transformer_blocks.{number}"
        take(f"{ours}.linear1", *(f"{theirs}.attn.to_{each}" for each in "qkv"), f"{theirs}.proj_mlp")
        take(f"{ours}.linear2", f"{theirs}.proj_out")
        take_norms(f"{ours}.norm", f"{theirs}.attn.norm_q", f"{theirs}.attn.norm_k")
        take(f"{ours}.modulation.lin", f"{theirs}.norm.linear")
    for layer, theirs in (("time_in", "timestep_embedder"), ("vector_in", "text_embedder")):
        take(f"{layer}.in_layer", f"time_text_embed.{theirs}.linear_1")
        take(f"{layer}.out_layer", f"time_text_embed.{theirs}.linear_2")
    take("txt_in", "context_embedder")
    take("img_in", "x_embedder")
    take("final_layer.adaLN_modulation.1", "norm_out.linear")
    take("final_layer.linear", "proj_out")
    assert not given, sorted(given)
    for kind in ("weight", "bias"):  # diffusers has scale and shift, ComfyUI shift and scale
        name = f"final_layer.adaLN_modulation.1.{kind}"
        made[name] = torch.cat(made[name].chunk(2)[::-1])
        name = f"final_layer.linear.{kind}"
        made[name] = _for_each_copy(made[name], dim=0)
    made["img_in.weight"] = _for_each_copy(made["img_in.weight"], dim=1) / COPIES
    return {name: weight.contiguous() for name, weight in made.items()}


def _depth(weights: Mapping[str, Tensor], path: str) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith(f"{path}.")})


def _for_each_copy(weight: Tensor, dim: int) -> Tensor:
    """Weights of the values of a patch, those of one channel together, as those of the copies."""
    return weight.unflatten(dim, (NUM_CHANNELS, PATCH**2)).repeat_interleave(COPIES, dim=dim).flatten(dim, dim + 1)
