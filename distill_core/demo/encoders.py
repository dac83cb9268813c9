"""Encoders of the demo: text and latents of the digits, with the interface of real encoders."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ..base.storage import fingerprint
from ..diffusion.conditioning import Caption
from . import digits


class DigitsEncoders:
    """Text encoder and autoencoder of the demo, for images of 64 x 64 pixels."""

    def __init__(self):
        self.text, self.autoencoder = digits.DigitsTextEncoder.bundled(), digits.DigitsAutoencoder()
        self.fingerprint = fingerprint(self.text.state_dict())

    max_tokens = digits.NUM_TOKENS

    def num_tokens(self, captions: Collection[str]) -> Iterator[int]:
        """Number of words in each caption."""
        return (len(digits.token_ids(caption)) for caption in captions)

    def latents(self, pixels: Tensor) -> Tensor:
        return self.autoencoder.encode(pixels)

    @torch.no_grad()
    def captions(self, captions: list[str]) -> list[Caption]:
        return [Caption(context) for context in self.text.captions(captions)]

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)
