"""Handwritten digits as Stable-Diffusion-shaped latents, their captions, and the classifier that evaluates samples.

Images are (B, 1, 16, 16) in [-1, 1], ink = 1. Latents are (B, 4, 8, 8) with about unit variance: the 8x8 scans of the
UCI set "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998; scikit-learn's ``load_digits``), enlarged
to twice their size and folded space-to-depth, the latent shape of a 64x64 image in SD.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LATENT_MEAN, LATENT_STD = -0.39, 0.64  # of the 1,797 enlarged scans


# --- images and latents ---------------------------------------------------------------------------------------------


@cache
def load_digits() -> tuple[Tensor, Tensor]:
    """All 1,797 scans as images (1797, 1, 16, 16) in [-1, 1] and their labels (1797,) int64."""
    data = load_file(DATA / "digits.safetensors")
    return enlarge(data["images"]), data["labels"].long()


def enlarge(scans: Tensor) -> Tensor:
    """Scans (B, 8, 8) of ink counts 0..16 -> images (B, 1, 16, 16) in [-1, 1]."""
    return F.interpolate(scans[:, None].float() / 8 - 1, scale_factor=2, mode="bilinear", align_corners=False)


def encode(images: Tensor) -> Tensor:
    """Images (B, 1, 16, 16) -> latents (B, 4, 8, 8); exact inverse of `decode`."""
    return (rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2) - LATENT_MEAN) / LATENT_STD


def decode(latents: Tensor) -> Tensor:
    """Latents (B, 4, 8, 8) -> images (B, 1, 16, 16), unclamped."""
    return rearrange(latents * LATENT_STD + LATENT_MEAN, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)


class DigitsAutoencoder(nn.Module):
    """The same conversion with an autoencoder's interface: RGB (B, 3, 8h, 8w) in [-1, 1] <-> (B, 4, h, w)."""

    scale = 4  # RGB pixels per digit pixel, so that one latent pixel covers 8x8 as in Stable Diffusion

    def __init__(self):
        super().__init__()
        self.register_parameter("anchor", nn.Parameter(torch.zeros(1), requires_grad=False))  # carries dtype and device

    def encode(self, rgb: Tensor) -> Tensor:
        return encode(F.avg_pool2d(rgb.mean(1, keepdim=True), self.scale))

    def decode(self, latents: Tensor) -> Tensor:
        image = F.interpolate(decode(latents), scale_factor=self.scale, mode="nearest")
        return image.clamp(-1, 1).expand(-1, 3, -1, -1)


# --- captions -------------------------------------------------------------------------------------------------------

TEMPLATES = ("the digit {}", "{}", "a handwritten {}", "the number {}", "a {}", "handwritten digit {}")
NUM_TOKENS, CONTEXT_WIDTH = 8, 64
VOCABULARY = ("", "<unknown>", "the", "a", "digit", "number", "handwritten", *WORDS)
TOKEN_IDS = {word: i for i, word in enumerate(VOCABULARY)} | {str(i): VOCABULARY.index(w) for i, w in enumerate(WORDS)}


def token_ids(caption: str) -> list[int]:
    """Word ids of a caption, one per word."""
    return [TOKEN_IDS.get(word, 1) for word in re.findall(r"[a-z0-9]+", caption.lower())]


def tokenize(caption: str) -> list[int]:
    """Word ids of a caption, padded or truncated to ``NUM_TOKENS``; the empty caption (the null prompt) is only padding."""
    ids = token_ids(caption)[:NUM_TOKENS]
    return ids + [0] * (NUM_TOKENS - len(ids))


def caption(label: int, template: int = 0) -> str:
    """``caption(7)`` is "the digit seven"."""
    return TEMPLATES[template].format(WORDS[label])


class DigitsTextEncoder(nn.Module):
    """Word and position embeddings, trained together with the teacher: token ids (B, 8) -> context (B, 8, 64)."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), CONTEXT_WIDTH)
        self.positions = nn.Parameter(torch.randn(NUM_TOKENS, CONTEXT_WIDTH) * 0.1)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.words(token_ids) + self.positions

    @classmethod
    def bundled(cls) -> DigitsTextEncoder:
        encoder = cls()
        encoder.load_state_dict(load_file(DATA / "text_encoder.safetensors"))
        return encoder.eval().requires_grad_(False)

    def captions(self, captions: list[str]) -> Tensor:
        """Context (B, 8, 64) of a list of captions."""
        return self(torch.tensor([tokenize(text) for text in captions]))


# --- classifier -----------------------------------------------------------------------------------------------------


class DigitsClassifier(nn.Module):
    """Small convolutional classifier of images (B, 1, 16, 16); its 64 features also measure the Fréchet distance."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    @classmethod
    def bundled(cls) -> DigitsClassifier:
        classifier = cls()
        classifier.load_state_dict(load_file(DATA / "classifier.safetensors"))
        return classifier.eval().requires_grad_(False)


def held_out_split(num_examples: int = 1797, fraction: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices (train, held out) of the random split the bundled classifier was trained and tested on."""
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    num_held_out = round(num_examples * fraction)
    return order[num_held_out:], order[:num_held_out]


def accuracy(classifier: DigitsClassifier, images: Tensor, labels: Tensor) -> float:
    """Fraction of images (B, 1, 16, 16) that the classifier assigns to their labels (B,)."""
    with torch.no_grad():
        return (classifier(images.clamp(-1, 1)).argmax(1) == labels).float().mean().item()
