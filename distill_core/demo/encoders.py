"""Encoders of the demo, with the interface of real encoders."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ..base.storage import fingerprint
from ..diffusion.conditioning import Caption
from . import grammar
from .autoencoder import ScenesAutoencoder
from .text import ScenesTextEncoder


class ScenesEncoders:
    """Text encoder and autoencoder of the demo, for images of 64 x 64 pixels."""

    max_tokens = grammar.NUM_TOKENS

    def __init__(self):
        self.text, self.autoencoder = ScenesTextEncoder.bundled(), ScenesAutoencoder.bundled()
        self.fingerprint = fingerprint({**self.text.state_dict(), **self.autoencoder.state_dict()})

    def num_tokens(self, captions: Collection[str]) -> Iterator[int]:
        """Number of words in each caption."""
        return (len(grammar.token_ids(caption)) for caption in captions)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        return self.autoencoder.encode(pixels)

    @torch.no_grad()
    def captions(self, captions: list[str]) -> list[Caption]:
        return [Caption(context) for context in self.text.captions(captions)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)
