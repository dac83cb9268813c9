"""Encoders of images and captions into the latents and embeddings a network reads, and decoders of latents into images.

Pixels are (B, 3, H, W) in [-1, 1]; latents are (B, C, h, w), scaled as the network sees them.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ..base.storage import fingerprint
from ..diffusion.conditioning import Caption
from ..networks.folders import open_module, stored_in
from ..networks.network import short_title
from .readers import PARTS, Reader, network_config, open_tokenizer, parts_of

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
class Autoencoder:
    """The autoencoder of a diffusers pipeline."""

    vae: AutoencoderKL

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """The mean of the autoencoder's distribution, shifted and scaled."""
        pixels = pixels.to(self.vae.device, self.vae.dtype)
        mean = self._image(self.vae.encode(self._frame(pixels)).latent_dist.mean).float()
        shift, scale = self._shift_and_scale(mean)
        return (mean - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Encoders`."""
        latents = latents.to(self.vae.device).float()
        shift, scale = self._shift_and_scale(latents)
        scaled = (latents / scale + shift).to(self.vae.dtype)
        return self._image(self.vae.decode(self._frame(scaled)).sample).float().clamp(-1, 1)

    @property
    def _of_videos(self) -> bool:
        """Whether it takes images as videos of one frame."""
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


@dataclass
class DiffusersEncoders:
    """Autoencoder and text encoders of a diffusers pipeline."""

    autoencoder: Autoencoder
    open_reader: Callable[[], Reader]
    fingerprint: str
    padded: bool
    """Whether its captions are `Caption.padded`."""
    max_tokens: int
    """Tokens of a caption that the encoders read, including those around it."""
    _reader: Reader | None = None

    @classmethod
    def from_folder(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        family: str = "sd1",
        text_device: torch.device | str | None = None,
    ) -> DiffusersEncoders:
        """Encoders from the folder of a pipeline of a family; with a ``text_encoder_2`` one of a UNet is an SDXL.

        dtype: precision they compute in; text encoders of transformers compute in that they are stored in. Only safetensors are
        read, and nothing is downloaded. text_device: of the text encoders, if that is another. ``ValueError`` if something is missing or
        damaged.
        """
        path, of_texts = Path(path), text_device or device
        parts = parts_of(path, family)
        models = short_title(family) if family in PARTS else "SD1.x, SD2 or SDXL"
        for name in ["vae", *parts.text_encoders, *parts.tokenizers]:
            if not (path / name).is_dir():
                raise ValueError(f"{path} has no folder {name}; give the folder of a whole diffusers pipeline of {models}")
        try:
            import transformers
        except ImportError as error:
            raise ValueError("text encoders need a package: python -m pip install transformers") from error
        import diffusers

        def open_reader() -> Reader:
            text_encoders = []
            for name, kind in parts.text_encoders.items():
                text_encoder = open_module(getattr(transformers, kind), path / name, "auto" if parts.as_stored else None)
                text_encoders.append(text_encoder.to(of_texts) if parts.as_stored else text_encoder.to(of_texts, dtype))
            tokenizers = [open_tokenizer(kind, path / name) for name, kind in parts.tokenizers.items()]
            return parts.reader(tokenizers, text_encoders, network_config(path))

        vae = open_module(getattr(diffusers, parts.autoencoder), path / "vae")
        overflows = dtype == torch.float16 and vae.config.force_upcast  # as SDXL's autoencoder does
        nn.Module.to(vae, device, torch.float32 if overflows else dtype)  # diffusers' own `to` warns
        weights = {
            f"{name}.{key}": tensor for name in ("vae", *parts.text_encoders) for key, tensor in stored_in(path / name)[1].items()
        }
        scale = torch.tensor([vae.config.get("scaling_factor", 1.0)])
        reader = open_reader()
        return cls(
            Autoencoder(vae), open_reader, fingerprint({**weights, "scale": scale}), reader.padded, reader.max_tokens, reader
        )

    @property
    def reader(self) -> Reader:
        """Tokenizers and text encoders, opened again if they were closed."""
        self._reader = self._reader or self.open_reader()
        return self._reader

    def close_texts(self) -> None:
        """Free the memory of the text encoders, which may be larger than the network, until there are captions again."""
        self._reader = None
        gc.collect()

    @property
    def latents(self) -> Callable[[Tensor], Tensor]:
        """See `Encoders`."""
        return self.autoencoder.latents

    @property
    def decode(self) -> Callable[[Tensor], Tensor]:
        """See `Encoders`. It does not hold the text encoders in memory."""
        return self.autoencoder.decode

    @torch.no_grad()
    def captions(self, captions: list[str]) -> list[Caption]:
        """Embeddings as ``encode_prompt`` of diffusers' pipelines gives them; long captions are truncated."""
        return self.reader.read(captions)

    def num_tokens(self, captions: Collection[str]) -> Iterator[int]:
        """Tokens of each caption, including those around it."""
        return self.reader.num_tokens(captions)
