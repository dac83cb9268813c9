"""The demo's classes of MODEL, CLIP and VAE."""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...distill_core.demo import grammar
from ...distill_core.demo.autoencoder import COPIES, NUM_CHANNELS, ScenesAutoencoder, copied, mean_of_copies
from ...distill_core.demo.files import TRANSFORMER
from ...distill_core.demo.teacher import load_dataset
from ...distill_core.demo.text import CONTEXT_WIDTH, ScenesTextEncoder
from ...distill_core.networks.architecture import Architecture
from .loading import built


class DemoLatentFormat(comfy.latent_formats.LatentFormat):
    """Latents of the demo have unit variance already; previews are the linear map nearest to the decoder (least squares)."""

    latent_rgb_factors = [[-0.08, 0.07, 0.26], [-0.01, 0.01, 0.0], [-0.23, -0.18, -0.08], [-0.03, 0.04, 0.11]]
    latent_rgb_factors_bias = [0.74, 0.68, 0.62]


class DemoModelConfig(comfy.supported_models.SD15):
    """A small SD1.x: heads of 32 channels instead of eight heads."""

    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}
    latent_format = DemoLatentFormat
    supported_inference_dtypes = [torch.float32]


def is_demo(architecture: Architecture) -> bool:
    """Whether a UNet is the demo's or a student of it, by its width, which no real model has."""
    return architecture.context_width == CONTEXT_WIDTH and architecture.channels("conv_in")[1] < 320


def build_demo(weights: dict[str, Tensor], disable_dynamic: bool) -> ModelPatcher:
    config = DemoModelConfig(comfy.model_detection.detect_unet_config(weights, ""))
    config.set_inference_dtype(torch.float32, None)
    return built(config, {name: weight.float() for name, weight in weights.items()}, disable_dynamic)


class DemoTokenizer:
    """A tokenizer of words, not CLIP tokens; it ignores weights such as ``(red:1.2)``."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_) -> dict:
        return {"scenes": [[(token, 1.0) for token in grammar.tokenize(text)]]}


class DemoClipModel(nn.Module):
    """The demo's text encoder behind the interface of ComfyUI's text encoders."""

    dtypes = (torch.float32,)

    def __init__(self, device="cpu", dtype=torch.float32, model_options=None):
        super().__init__()
        self.encoder = ScenesTextEncoder.bundled().to(device)

    def set_clip_options(self, options: dict) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([[token for token, _ in row] for row in tokens["scenes"]], device=self.encoder.positions.device)
        context = self.encoder(ids).to(comfy.model_management.intermediate_device())
        return context, context.mean(1)

    def load_sd(self, state_dict: dict) -> tuple[list, list]:
        return self.load_state_dict(state_dict, strict=False)


class CopyingAutoencoder(nn.Module):
    """The demo's autoencoder for its transformer, with the latents that ComfyUI's loaders expect of a Flux.1."""

    def __init__(self):
        super().__init__()
        self.own, self.latent_format = ScenesAutoencoder.bundled(), comfy.latent_formats.Flux()

    def encode(self, pixels: Tensor) -> Tensor:
        return self.latent_format.process_out(copied(self.own.encode(pixels)))

    def decode(self, latents: Tensor) -> Tensor:
        return self.own.decode(mean_of_copies(self.latent_format.process_in(latents)))


class DemoVAE(comfy.sd.VAE):
    """The demo's autoencoder as a VAE."""

    def __init__(self, transformer: bool = False):
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)})
        autoencoder = CopyingAutoencoder() if transformer else ScenesAutoencoder.bundled()
        self.first_stage_model = autoencoder.to(self.vae_dtype)
        self.downscale_ratio = self.upscale_ratio = 8
        self.latent_channels = NUM_CHANNELS * (COPIES if transformer else 1)
        self.memory_used_encode = lambda shape, dtype: 100 * shape[2] * shape[3] * comfy.model_management.dtype_size(dtype)
        self.memory_used_decode = lambda shape, dtype: 4000 * shape[2] * shape[3] * comfy.model_management.dtype_size(dtype)
        offload = comfy.model_management.vae_offload_device()
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=offload
        )


def demo_clip() -> comfy.sd.CLIP:
    return comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(DemoTokenizer, DemoClipModel))


def demo_transformer() -> ModelPatcher:
    """The bundled transformer as a MODEL, as ComfyUI's own loader opens it."""
    return comfy.sd.load_diffusion_model(str(TRANSFORMER), model_options={"dtype": torch.float32})


def demo_data(transformer: bool = False) -> tuple[list[dict], list]:
    """LATENT and CONDITIONING lists as from "Make Training Dataset": one entry for each scene."""
    (bucket,) = load_dataset().buckets
    samples = comfy.latent_formats.Flux().process_out(copied(bucket.latents)) if transformer else bucket.latents
    latents: list[dict] = [_Latent(samples=latent[None]) for latent in samples]
    conditioning = [
        _Conditioning([[context[None], {"pooled_output": context.mean(0, keepdim=True)}]]) for context in bucket.contexts
    ]
    return latents, conditioning


# When a node fails, ComfyUI puts the text of all of its inputs into the report. Numbers of 4,096 tensors take a minute.


class _Latent(dict):
    def __repr__(self) -> str:
        return f"latent of shape {tuple(self['samples'].shape)}"


class _Conditioning(list):
    def __repr__(self) -> str:
        return f"conditioning of shape {tuple(self[0][0].shape)}"
