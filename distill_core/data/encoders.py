"""Encoders of images and captions into the latents and embeddings a UNet reads, and decoders of latents into images.

Pixels are (B, 3, H, W) in [-1, 1]; latents are (B, C, h, w), scaled as the UNet sees them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..base.documents import one_line
from ..base.storage import StoredTensor, fingerprint, read_header
from ..diffusion.conditioning import Caption

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


log = logging.getLogger("distill")

_CAPTIONS_AT_ONCE = 1000


class TextEncoders(Protocol):
    """The frozen networks that read captions for a UNet.

    Those that truncate long captions have ``max_tokens``, and ``num_tokens`` of captions, for `warn_of_cut`.
    """

    @property
    def fingerprint(self) -> str:
        """Identifies these encoders."""

    def captions(self, captions: list[str]) -> list[Caption]:
        """Embeddings of captions, one each."""
        ...


class Encoders(TextEncoders, Protocol):
    """The frozen networks around a UNet."""

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), float32; equal pixels give equal latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W) in [-1, 1], float32."""
        ...


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
    """Autoencoder and text encoders of a diffusers pipeline: one text encoder for SD1.x and SD2, two for SDXL."""

    vae: AutoencoderKL
    tokenizers: Sequence[CLIPTokenizer]
    text_encoders: Sequence[CLIPTextModel | CLIPTextModelWithProjection]
    fingerprint: str

    @classmethod
    def from_folder(
        cls, path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> DiffusersEncoders:
        """Encoders from the folder of a pipeline; with a ``text_encoder_2`` it is an SDXL.

        Only safetensors are read, and nothing is downloaded. ``ValueError`` if something is missing or damaged.
        """
        path = Path(path)
        second = ["_2"] if (path / "text_encoder_2").is_dir() else []
        for name in ["vae", *(kind + n for n in ["", *second] for kind in ("text_encoder", "tokenizer"))]:
            if not (path / name).is_dir():
                raise ValueError(
                    f"{path} has no folder {name}; give the folder of a whole diffusers pipeline of SD1.x, SD2 or SDXL"
                )
        try:
            import transformers
        except ImportError as error:
            raise ValueError("text encoders need a package: python -m pip install transformers") from error
        from diffusers import AutoencoderKL

        kinds = {"vae": AutoencoderKL, "text_encoder": transformers.CLIPTextModel}
        kinds |= {"text_encoder_2": transformers.CLIPTextModelWithProjection} if second else {}
        models: dict[str, Any] = {}
        weights: dict[str, Tensor | StoredTensor] = {}
        for name, kind in kinds.items():
            models[name], stored = _load(kind, path / name)
            weights |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
        vae, *text_encoders = models.values()
        overflows = dtype == torch.float16 and vae.config.force_upcast  # as SDXL's autoencoder does
        weights["scale"] = torch.tensor([vae.config.scaling_factor])
        return cls(
            vae.to(device, torch.float32 if overflows else dtype),
            [_tokenizer(transformers.CLIPTokenizer, path / f"tokenizer{n}") for n in ["", *second]],
            [text_encoder.to(device, dtype) for text_encoder in text_encoders],
            fingerprint(weights),
        )

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """The mean of the autoencoder's distribution, shifted and scaled."""
        mean = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mean.float()
        shift, scale = self._shift_and_scale(mean)
        return (mean - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.device).float()
        shift, scale = self._shift_and_scale(latents)
        return self.vae.decode((latents / scale + shift).to(self.vae.dtype)).sample.float().clamp(-1, 1)

    def _shift_and_scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale of each channel, as diffusers' pipelines read them from the autoencoder's config."""
        config = self.vae.config
        shift = like.new_tensor(config.latents_mean or [config.shift_factor or 0.0])
        deviation = like.new_tensor(config.latents_std or [1.0])
        return shift[:, None, None], (config.scaling_factor / deviation)[:, None, None]

    @torch.no_grad()
    def captions(self, captions: list[str]) -> list[Caption]:
        """Embeddings as ``encode_prompt`` of diffusers' pipelines gives them; long captions are truncated.

        SD1.x and SD2: the last hidden state. SDXL: the last but one of both encoders side by side, and the second's pooled
        output.
        """
        outputs = [self._read(*pair, captions) for pair in zip(self.tokenizers, self.text_encoders, strict=True)]
        if len(outputs) == 1:
            return [Caption(context) for context in outputs[0].last_hidden_state]
        contexts = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return [Caption(*pair) for pair in zip(contexts, outputs[-1].text_embeds, strict=True)]

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption that the encoders read, including its start and end tokens."""
        return min(_length(*pair) for pair in zip(self.tokenizers, self.text_encoders, strict=True))

    def num_tokens(self, captions: Collection[str]) -> Iterator[int]:
        """Tokens of each caption, including its start and end tokens."""
        left = iter(captions)
        while part := list(itertools.islice(left, _CAPTIONS_AT_ONCE)):
            yield from map(
                max, *(map(len, tokenizer(part, verbose=False).input_ids) for tokenizer in self.tokenizers), itertools.repeat(0)
            )

    def _read(self, tokenizer: CLIPTokenizer, text_encoder: Any, captions: list[str]) -> Any:
        length = _length(tokenizer, text_encoder)
        tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True)


def _length(tokenizer: CLIPTokenizer, text_encoder: Any) -> int:
    return min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)


def _load(kind: Any, folder: Path) -> tuple[Any, dict[str, StoredTensor]]:
    """A network and its weights as they are stored; the fp16 variant if there is no other."""
    files = sorted(folder.glob("*.safetensors"))
    whole = [file for file in files if ".fp16" not in file.name]
    variant, files = (None, whole) if whole else ("fp16", files)
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file; download the model in that format")
    weights = {name: tensor for file in files for name, tensor in read_header(file).tensors.items()}
    options = dict(local_files_only=True, use_safetensors=True, output_loading_info=True)
    try:
        model, info = kind.from_pretrained(folder, variant=variant, **options)
    except Exception as error:  # the libraries raise many kinds of errors
        raise ValueError(f"{folder} cannot be opened ({one_line(error)}); download it again") from error
    if missing := info["missing_keys"]:
        raise ValueError(f"{folder} lacks {len(missing)} weights, such as {min(missing)}; download it again")
    return model.eval().requires_grad_(False), weights


def _tokenizer(kind: Any, folder: Path) -> CLIPTokenizer:
    if not any((folder / name).exists() for name in ("vocab.json", "tokenizer.json")):
        # transformers would make a tokenizer without a vocabulary
        raise ValueError(f"{folder} holds no vocab.json; download it again")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder} cannot be opened ({one_line(error)}); download it again") from error
