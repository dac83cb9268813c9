"""Encoders of images and captions into the latents and embeddings a network reads, and decoders of latents into images.

Pixels are (B, 3, H, W) in [-1, 1]; latents are (B, C, h, w), scaled as the network sees them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ..base.storage import fingerprint
from ..diffusion.conditioning import Caption
from ..networks.folders import open_module
from .readers import Reader, network_config, open_tokenizer, parts_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

log = logging.getLogger("distill")


class TextEncoders(Protocol):
    """The frozen networks that read captions for a network.

    Those that truncate long captions have ``max_tokens``, and ``num_tokens`` of captions, for `warn_of_cut`. Those whose captions
    are `Caption.padded` say so by ``padded``.
    """

    @property
    def fingerprint(self) -> str:
        """Identifies these encoders."""

    def captions(self, captions: list[str]) -> list[Caption]:
        """Embeddings of captions, one each."""
        ...


class Encoders(TextEncoders, Protocol):
    """The frozen networks around it."""

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), float32; equal pixels give equal latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W) in [-1, 1], float32."""
        ...


def pads(encoders: TextEncoders) -> bool:
    """Whether their captions are `Caption.padded`."""
    return getattr(encoders, "padded", False)


def warn_of_cut(captions: Collection[str], encoders: TextEncoders) -> None:
    """Warn once, with their number, of captions that are longer than the encoders read; some read any length."""
    if not (hasattr(encoders, "num_tokens") and hasattr(encoders, "max_tokens")):
        return
    if num_cut := sum(number > encoders.max_tokens for number in encoders.num_tokens(captions)):
        log.warning(
            "%d of %d captions exceed the text encoder's %d tokens and are truncated; shorten them, or put what matters first",
            num_cut,
            len(captions),
            encoders.max_tokens,
        )


@dataclass(frozen=True)
class DiffusersEncoders:
    """Autoencoder and text encoders of a diffusers pipeline."""

    vae: AutoencoderKL
    reader: Reader
    fingerprint: str

    @classmethod
    def from_folder(
        cls, path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, family: str = "sd1"
    ) -> DiffusersEncoders:
        """Encoders from the folder of a pipeline of a family; with a ``text_encoder_2`` one of a UNet is an SDXL.

        dtype: precision they compute in; text encoders of transformers compute in that they are stored in. Only safetensors are
        read, and nothing is downloaded. ``ValueError`` if something is missing or damaged.
        """
        path = Path(path)
        parts = parts_of(path, family)
        for name in ["vae", *parts.text_encoders, *parts.tokenizers]:
            if not (path / name).is_dir():
                raise ValueError(f"{path} has no folder {name}; give the folder of a whole diffusers pipeline of {parts.title}")
        try:
            import transformers
        except ImportError as error:
            raise ValueError("text encoders need a package: python -m pip install transformers") from error
        import diffusers

        vae, of_vae = open_module(getattr(diffusers, parts.autoencoder), path / "vae")
        weights = {f"vae.{key}": tensor for key, tensor in of_vae.items()}
        text_encoders = []
        for name, kind in parts.text_encoders.items():
            stored_in = "auto" if parts.as_stored else None
            text_encoder, stored = open_module(getattr(transformers, kind), path / name, stored_in)
            text_encoders.append(text_encoder.to(device) if parts.as_stored else text_encoder.to(device, dtype))
            weights |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
        overflows = dtype == torch.float16 and vae.config.force_upcast  # as SDXL's autoencoder does
        tokenizers = [open_tokenizer(kind, path / name) for name, kind in parts.tokenizers.items()]
        scale = torch.tensor([vae.config.get("scaling_factor", 1.0)])
        return cls(
            nn.Module.to(vae, device, torch.float32 if overflows else dtype),  # diffusers' own `to` warns
            parts.reader(tokenizers, text_encoders, network_config(path)),
            fingerprint({**weights, "scale": scale}),
        )

    def rest(self) -> None:
        """Move the text encoders out of the device's memory; the next captions move them back."""
        self._move("cpu")

    def _move(self, device: torch.device | str) -> None:
        for text_encoder in self.reader.text_encoders:
            text_encoder.to(device)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """The mean of the autoencoder's distribution, shifted and scaled."""
        pixels = pixels.to(self.vae.device, self.vae.dtype)
        mean = self._image(self.vae.encode(self._frame(pixels)).latent_dist.mean).float()
        shift, scale = self._shift_and_scale(mean)
        return (mean - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.device).float()
        shift, scale = self._shift_and_scale(latents)
        scaled = (latents / scale + shift).to(self.vae.dtype)
        return self._image(self.vae.decode(self._frame(scaled)).sample).float().clamp(-1, 1)

    @property
    def _of_videos(self) -> bool:
        """Whether the autoencoder takes images as videos of one frame."""
        return "temperal_downsample" in self.vae.config

    def _frame(self, image: Tensor) -> Tensor:
        return image[:, :, None] if self._of_videos else image

    def _image(self, frame: Tensor) -> Tensor:
        return frame[:, :, 0] if self._of_videos else frame

    def _shift_and_scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale of each channel, as diffusers' pipelines read them from the autoencoder's config."""
        config = self.vae.config
        shift = like.new_tensor(config.get("latents_mean") or [config.get("shift_factor") or 0.0])
        deviation = like.new_tensor(config.get("latents_std") or [1.0])
        return shift[:, None, None], (config.get("scaling_factor", 1.0) / deviation)[:, None, None]

    @torch.no_grad()
    def captions(self, captions: list[str]) -> list[Caption]:
        """Embeddings as ``encode_prompt`` of diffusers' pipelines gives them; long captions are truncated."""
        self._move(self.vae.device)
        return self.reader.read(captions)

    @property
    def padded(self) -> bool:
        return self.reader.padded

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption that the encoders read, including those around it."""
        return self.reader.max_tokens

    def num_tokens(self, captions: Collection[str]) -> Iterator[int]:
        """Tokens of each caption, including those around it."""
        return self.reader.num_tokens(captions)
