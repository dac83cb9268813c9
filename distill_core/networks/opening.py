"""Any network on disk, whatever it is."""

from __future__ import annotations

from pathlib import Path

from .files import UNetFile, open_unet
from .transformers.files import TransformerFile, find_transformer


def open_network(path: Path | str) -> UNetFile | TransformerFile:
    """A UNet or a transformer, read from its header: a single file, or a diffusers folder of a UNet.

    Raises ``ValueError`` in one sentence if it does not exist, is damaged, or holds neither.
    """
    path = Path(path)
    return (find_transformer(path) if path.is_file() else None) or open_unet(path)
