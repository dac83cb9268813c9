"""What a family of diffusion transformers is: lists of equal blocks, and what tells it from others.

Names are those of ComfyUI's own files, so a family needs no table of them. Facts on which numbers of blocks open are of
ComfyUI 0.33 (comfy/model_detection.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BlockList:
    """Blocks of one kind that run one after another."""

    word: str
    """What plans call it: ``double``."""
    path: str
    """What files call it: ``double_blocks``."""
    depth_key: str = "num_layers"
    """What configs call its length; a file's metadata may hold one, and ComfyUI believes it."""
    least: int = 0
    """How many must stay."""


@dataclass(frozen=True)
class Family:
    """Transformers of one make."""

    name: str
    """``flux1``."""
    title: str
    """``Flux.1``."""
    marks: tuple[str, ...]
    """Parameters that its checkpoints hold and those of no family after it do; ``a|b`` stands for either."""
    lists: tuple[BlockList, ...] = ()
    belongs: Callable[[Mapping[str, Shape]], bool] = lambda shapes: True
    """What the marks leave open, told by shapes."""
    refusal: str = ""
    """Why it cannot be cut, and what can be done instead; empty if it can."""

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether a checkpoint is of this family. shapes: by names without a prefix."""
        return all(any(name in shapes for name in mark.split("|")) for mark in self.marks) and self.belongs(shapes)
