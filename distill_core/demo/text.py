"""The text encoder of the demo: one token a word, trained together with the teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import files
from .grammar import NUM_TOKENS, WORDS, tokenize

CONTEXT_WIDTH = 64


class ScenesTextEncoder(nn.Module):
    """Token ids (B, 10) -> context (B, 10, 64). Attention over the caption tells each object its number, color and place."""

    def __init__(self, num_layers: int = 2):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), CONTEXT_WIDTH)
        self.positions = nn.Parameter(torch.randn(NUM_TOKENS, CONTEXT_WIDTH) * 0.1)
        layer = nn.TransformerEncoderLayer(CONTEXT_WIDTH, 4, 2 * CONTEXT_WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(CONTEXT_WIDTH), enable_nested_tensor=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.layers(self.words(token_ids) + self.positions)

    def captions(self, captions: list[str]) -> Tensor:
        """Context (B, 10, 64) of a list of captions."""
        return self(torch.tensor([tokenize(text) for text in captions]))

    @classmethod
    def bundled(cls) -> ScenesTextEncoder:
        return files.bundled(cls(), "text_encoder")
