"""Tokenizers and text encoders of each family, read as the pipelines of diffusers do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from ..base.documents import one_line, read_json
from ..diffusion.conditioning import Caption
from ..networks.folders import CONFIG

_CAPTIONS_AT_ONCE = 1000


class Reader(Protocol):
    """Tokenizers and text encoders of a pipeline."""

    @property
    def padded(self) -> bool:
        """Whether its captions are `Caption.padded`."""
        ...

    @property
    def text_encoders(self) -> Sequence[Any]: ...

    def read(self, captions: list[str]) -> list[Caption]:
        """Embeddings of captions, one each, as ``encode_prompt`` of the pipeline gives them; long captions are truncated."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption that are read, including those around it."""
        ...

    def num_tokens(self, captions: Collection[str]) -> Iterator[int]:
        """Tokens of each caption, including those around it."""
        ...


@dataclass(frozen=True)
class ClipReader:
    """Stable Diffusion's: one CLIP for SD1.x and SD2, two for SDXL."""

    tokenizers: Sequence[Any]
    text_encoders: Sequence[Any]
    padded: ClassVar[bool] = False

    def read(self, captions: list[str]) -> list[Caption]:
        """SD1.x and SD2: the last hidden state. SDXL: the last but one of both encoders side by side, and the second's pooled output."""
        outputs = [self._ask(*pair, captions) for pair in zip(self.tokenizers, self.text_encoders, strict=True)]
        if len(outputs) == 1:
            return [Caption(context) for context in outputs[0].last_hidden_state]
        contexts = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return [Caption(*pair) for pair in zip(contexts, outputs[-1].text_embeds, strict=True)]

    @property
    def max_tokens(self) -> int:
        return min(_length(*pair) for pair in zip(self.tokenizers, self.text_encoders, strict=True))

    def num_tokens(self, captions: Collection[str]) -> Iterator[int]:
        return _counted(
            captions, lambda part: map(max, *(_lengths(tokenizer, part) for tokenizer in self.tokenizers), itertools.repeat(0))
        )

    def _ask(self, tokenizer: Any, text_encoder: Any, captions: list[str]) -> Any:
        length = _length(tokenizer, text_encoder)
        tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True)


def _length(tokenizer: Any, text_encoder: Any) -> int:
    return min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)


class FluxReader:
    """Flux.1's: T5 gives the context, CLIP the pooled embedding. Every caption is as long as the longest may be."""

    padded = False

    def __init__(self, tokenizers: Sequence[Any], text_encoders: Sequence[Any], network: Mapping[str, Any]):
        from diffusers import FluxPipeline

        self.text_encoders, self._t5 = text_encoders, tokenizers[1]
        self.max_tokens = 512 if network.get("guidance_embeds", True) else 256  # of dev, and of schnell
        clip, t5 = text_encoders
        self._pipeline = FluxPipeline(None, None, clip, tokenizers[0], t5, tokenizers[1], None)

    def read(self, captions: list[str]) -> list[Caption]:
        contexts, pooled, _ = self._pipeline.encode_prompt(
            captions, captions, device=self.text_encoders[0].device, max_sequence_length=self.max_tokens
        )
        return [Caption(*pair) for pair in zip(contexts, pooled, strict=True)]

    def num_tokens(self, captions: Collection[str]) -> Iterator[int]:
        return _counted(captions, lambda part: _lengths(self._t5, part))


class ZImageReader:
    """Z-Image's: Qwen3, asked as in a chat. Each caption has its own length."""

    padded, max_tokens = True, 512

    def __init__(self, tokenizers: Sequence[Any], text_encoders: Sequence[Any], network: Mapping[str, Any]):
        from diffusers import ZImagePipeline

        self.text_encoders, (self._tokenizer,) = text_encoders, tokenizers
        self._pipeline = ZImagePipeline(None, None, text_encoders[0], self._tokenizer, None)

    def read(self, captions: list[str]) -> list[Caption]:
        contexts, _ = self._pipeline.encode_prompt(
            [*captions],
            device=self.text_encoders[0].device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_tokens,
        )  # it writes over the list
        return [Caption(context, padded=True) for context in contexts]

    def num_tokens(self, captions: Collection[str]) -> Iterator[int]:
        asked = [[{"role": "user", "content": ""}]]
        (template,) = self._tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        around = len(self._tokenizer(template).input_ids)
        return (around + number for number in _counted(captions, lambda part: _lengths(self._tokenizer, part)))


class QwenImageReader:
    """Qwen-Image's: Qwen2.5-VL, asked to describe the image. Each caption has its own length."""

    padded, max_tokens = True, 1024

    def __init__(self, tokenizers: Sequence[Any], text_encoders: Sequence[Any], network: Mapping[str, Any]):
        from diffusers import QwenImagePipeline

        self.text_encoders, (self._tokenizer,) = text_encoders, tokenizers
        self._pipeline = QwenImagePipeline(None, None, text_encoders[0], self._tokenizer, None)

    def read(self, captions: list[str]) -> list[Caption]:
        contexts, mask = self._pipeline.encode_prompt(
            captions, device=self.text_encoders[0].device, max_sequence_length=self.max_tokens
        )
        whole = contexts.shape[1]
        lengths = [whole] * len(contexts) if mask is None else mask.sum(1).tolist()
        return [Caption(context[:length], padded=True) for context, length in zip(contexts, lengths, strict=True)]

    def num_tokens(self, captions: Collection[str]) -> Iterator[int]:
        around = len(self._tokenizer(self._pipeline.prompt_template_encode.format("")).input_ids)
        after = around - self._pipeline.prompt_template_encode_start_idx
        return (after + number for number in _counted(captions, lambda part: _lengths(self._tokenizer, part)))


def _lengths(tokenizer: Any, captions: list[str]) -> Iterator[int]:
    return map(len, tokenizer(captions, verbose=False).input_ids)


def _counted(captions: Collection[str], count: Callable[[list[str]], Iterator[int]]) -> Iterator[int]:
    """Tokens of captions, counted in parts, so that many need little memory."""
    left = iter(captions)
    while part := list(itertools.islice(left, _CAPTIONS_AT_ONCE)):
        yield from count(part)


@dataclass(frozen=True)
class Parts:
    """What a pipeline of a family holds beside its network."""

    reader: Callable[[Sequence[Any], Sequence[Any], Mapping[str, Any]], Reader]
    """From tokenizers, text encoders, and the config of the network."""
    text_encoders: Mapping[str, str]
    """Folder of each text encoder -> its class in transformers."""
    tokenizers: Mapping[str, str]
    autoencoder: str = "AutoencoderKL"
    """Class in diffusers."""
    as_stored: bool = True
    """Whether text encoders compute in the precision they are stored in; they are too large for another."""


PARTS = {
    "flux1": Parts(
        FluxReader,
        {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
        {"tokenizer": "CLIPTokenizer", "tokenizer_2": "AutoTokenizer"},
    ),
    "z-image": Parts(ZImageReader, {"text_encoder": "Qwen3Model"}, {"tokenizer": "AutoTokenizer"}),
    "qwen-image": Parts(
        QwenImageReader,
        {"text_encoder": "Qwen2_5_VLForConditionalGeneration"},
        {"tokenizer": "AutoTokenizer"},
        "AutoencoderKLQwenImage",
    ),
}
"""Families of transformers whose pipelines can be read."""


def parts_of(folder: Path, family: str) -> Parts:
    """What the folder of a pipeline of a family should hold; families of UNets have one or two CLIPs."""
    if family in PARTS:
        return PARTS[family]
    clips, tokenizers = {"text_encoder": "CLIPTextModel"}, {"tokenizer": "CLIPTokenizer"}
    if (folder / "text_encoder_2").is_dir():
        clips["text_encoder_2"], tokenizers["tokenizer_2"] = "CLIPTextModelWithProjection", "CLIPTokenizer"

    def reader(of: Sequence[Any], by: Sequence[Any], network: Mapping[str, Any]) -> ClipReader:
        return ClipReader(of, by)

    return Parts(reader, clips, tokenizers, as_stored=False)


def network_config(folder: Path) -> dict[str, Any]:
    """The config of a pipeline's transformer; empty if it has none."""
    path = folder / "transformer" / CONFIG
    return read_json(path) if path.exists() else {}


def open_tokenizer(kind: str, folder: Path) -> Any:
    """A tokenizer of transformers; ``ValueError`` if it is missing or damaged."""
    import transformers

    if not any((folder / name).exists() for name in ("vocab.json", "tokenizer.json", "spiece.model")):
        # transformers would make a tokenizer without a vocabulary
        raise ValueError(f"{folder} holds no vocab.json, tokenizer.json or spiece.model; download it again")
    try:
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{folder} cannot be opened ({one_line(error)}); download it again") from error
