"""Networks of every kind that can be pruned, in memory and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from .architecture import TITLES as _OF_UNETS
from .architecture import Architecture
from .files import UNetFile, open_unet
from .transformers.architecture import FAMILIES, Transformer
from .transformers.files import TransformerFile, find_transformer

Network = Architecture | Transformer
NetworkFile = UNetFile | TransformerFile
Same = TypeVar("Same", bound=Network)

UNETS = ("sd1", "sd2", "sdxl")
"""Families of UNets that presets are for."""
TRANSFORMERS = tuple(name for name, family in FAMILIES.items() if not family.refusal)
"""Families of transformers that can be cut."""
TITLES = {
    **{name: f"{title} UNets" for name, title in _OF_UNETS.items()},
    **{name: f"{family.title} transformers" for name, family in FAMILIES.items()},
}
"""What the networks of a family are called."""


def short_title(family: str) -> str:
    """The name of a family as its users say it, such as SDXL or Flux.1."""
    return _OF_UNETS[family].removesuffix("-shaped") if family in _OF_UNETS else FAMILIES[family].title


def open_network(path: Path | str) -> NetworkFile:
    """A UNet or a transformer, read from its header: a single file, or a diffusers folder.

    Raises ``ValueError`` in one sentence if it does not exist, is damaged, or holds neither.
    """
    path = Path(path)
    return find_transformer(path) or open_unet(path)
