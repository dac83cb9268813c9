"""The judge of scenes: a classifier that reads objects, numbers, colors, places and style off an image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from . import files
from .grammar import COLORS, NUMBERS, OBJECTS, STYLES, Scene

ARRANGEMENTS = ("alone", "in a row", "in a column")
PLACES = ("first", "second")
"""The left and the right group of a row, the upper and the lower of a column."""
ANSWERS: dict[str, Sequence] = {"arrangement": ARRANGEMENTS, "style": STYLES} | {
    f"{place} {what}": answers
    for place in PLACES
    for what, answers in (("object", OBJECTS), ("count", range(1, len(NUMBERS) + 1)), ("color", COLORS))
}
"""What the judge is asked, and the answers it chooses from."""
NOT_ASKED = -100
WIDTHS = (32, 64, 96, 96)
NUM_FEATURES = 192


class ScenesJudge(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> the logits of each question in `ANSWERS`."""

    def __init__(self):
        super().__init__()
        stages = []
        for before, width in pairwise((12, *WIDTHS)):
            for channels in (before, width):
                stages += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            stages.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(
            *(nn.PixelUnshuffle(2), *stages[:-1], nn.Flatten(), nn.Dropout(0.1)),
            *(nn.Linear(16 * WIDTHS[-1], NUM_FEATURES), nn.ReLU()),
        )
        self.heads = nn.ModuleDict({question: nn.Linear(NUM_FEATURES, len(answers)) for question, answers in ANSWERS.items()})

    def features(self, images: Tensor) -> Tensor:
        """(B, 192), in which distances between sets of images are measured."""
        return self.body(images)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(images)
        return {question: head(features) for question, head in self.heads.items()}

    @torch.no_grad()
    def agrees(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Whether each image (B, 3, 64, 64) shows all that its scene says: bool (B,)."""
        asked, right = asked_of(scenes), torch.ones(len(images), dtype=torch.bool)
        for question, logits in self(images.clamp(-1, 1)).items():
            right &= (logits.argmax(1) == asked[question]) | (asked[question] == NOT_ASKED)
        return right

    @classmethod
    def bundled(cls) -> ScenesJudge:
        return files.bundled(cls(), "judge")


def asked_of(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The right answer to each question (B,), `NOT_ASKED` where a scene leaves it open."""
    rows = [_facts(scene) for scene in scenes]
    return {
        question: torch.tensor([answers.index(row[question]) if question in row else NOT_ASKED for row in rows])
        for question, answers in ANSWERS.items()
    }


def _facts(scene: Scene) -> dict[str, str | int]:
    arrangement, groups = scene.placed
    facts: dict[str, str | int | None] = {"arrangement": arrangement, "style": scene.style}
    for place, group in zip(PLACES, groups, strict=False):
        facts |= {f"{place} {what}": getattr(group, what) for what in ("object", "count", "color")}
    return {question: fact for question, fact in facts.items() if fact is not None}
