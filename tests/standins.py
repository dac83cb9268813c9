"""Parts of a published model at their real size, in fp16: weights are random, and as large as trained ones."""

import pytest
import torch

from distill_core.networks.architecture import Architecture
from distill_core.networks.layouts import LAYOUTS


def unet(architecture: Architecture) -> dict[str, torch.Tensor]:
    """As in a checkpoint."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(32_000_000, generator=random)
    names, weights = LAYOUTS["ldm"].from_canonical(architecture.shapes), {}
    for name, shape in architecture.shapes.items():
        count, fan_in = torch.Size(shape).numel(), max(1, torch.Size(shape[1:]).numel())
        start = int(torch.randint(len(noise) - count, (1,), generator=random))
        weight = noise[start : start + count].reshape(shape) * (fan_in**-0.5 if len(shape) > 1 else 0.02)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weights[f"model.diffusion_model.{names[name]}"] = (weight + centre).half()
    return weights


def narrow_sdxl() -> Architecture:
    """SDXL with each level as wide as the first: ComfyUI knows it by the first and by the depths."""
    from diffusers import UNet2DConditionModel

    from distill_core.evaluation.catalog import TEACHER_CONFIGS

    changes = {"block_out_channels": (320,) * 3, "attention_head_dim": [5] * 3}
    with torch.device("meta"):
        network = UNet2DConditionModel(**TEACHER_CONFIGS["sdxl"] | changes)
    return Architecture.from_state_dict(network.state_dict(), head_channels=64)


def sdxl_clips() -> dict[str, torch.Tensor]:
    """The two text encoders of SDXL, as in a checkpoint: the second as OpenCLIP has it."""
    weights = {name.replace("cond_stage_model", "conditioner.embedders.0"): weight for name, weight in clip().items()}
    width, shapes = 1280, {"token_embedding.weight": (49408, 1280), "positional_embedding": (77, 1280),
                           "text_projection": (1280, 1280), "logit_scale": ()}  # fmt: skip
    layer = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,), "attn.out_proj.weight": (width, width),
             "attn.out_proj.bias": (width,), "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
             "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}  # fmt: skip
    shapes |= {f"transformer.resblocks.{n}.{name}": shape for n in range(32) for name, shape in layer.items()}
    random = torch.Generator().manual_seed(2)
    second = {name: (0.02 * torch.randn(shape, generator=random)).half() for name, shape in shapes.items()}
    for norm in ("ln_final", *(f"transformer.resblocks.{n}.ln_{i}" for n in range(32) for i in (1, 2))):
        second |= {f"{norm}.weight": torch.ones(width).half(), f"{norm}.bias": torch.zeros(width).half()}
    return weights | {f"conditioner.embedders.1.model.{name}": weight for name, weight in second.items()}


def clip() -> dict[str, torch.Tensor]:
    """The text encoder of SD1.x, as in a checkpoint."""
    transformers = pytest.importorskip("transformers", reason="ComfyUI's own requirement, installed elsewhere")
    config = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    weights = transformers.CLIPTextModel(config).state_dict()
    names = {n: n if n.startswith("text_model.") else f"text_model.{n}" for n in weights}
    return {f"cond_stage_model.transformer.{names[n]}": weight.half() for n, weight in weights.items()}


def vae() -> dict[str, torch.Tensor]:
    """The autoencoder of SD1.x, as in a file of its own."""
    from diffusers import AutoencoderKL

    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    network = AutoencoderKL(**blocks, block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4)
    return {name: weight.half().contiguous() for name, weight in network.state_dict().items()}


def controlnet() -> dict[str, torch.Tensor]:
    """A ControlNet of SD1.x; unlike an untrained one, it controls."""
    from diffusers import ControlNetModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ControlNetModel(cross_attention_dim=768, attention_head_dim=8)
        return {
            name: (torch.randn_like(weight) * 0.02 if not weight.any() else weight).half().contiguous()
            for name, weight in network.state_dict().items()
        }


def lora(architecture: Architecture, rank: int = 4) -> dict[str, torch.Tensor]:
    """On every attention, as kohya's trainer writes it."""
    names = LAYOUTS["diffusers"].from_canonical(architecture.shapes)
    random, weights = torch.Generator().manual_seed(1), {}
    for name, shape in architecture.shapes.items():
        if ".attn" in name and ".to_" in name and name.endswith(".weight"):
            key = "lora_unet_" + names[name].removesuffix(".weight").replace(".", "_")
            weights[f"{key}.lora_up.weight"] = torch.randn(shape[0], rank, generator=random).half() * 0.1
            weights[f"{key}.lora_down.weight"] = torch.randn(rank, shape[1], generator=random).half() * 0.1
            weights[f"{key}.alpha"] = torch.tensor(float(rank))
    return weights
