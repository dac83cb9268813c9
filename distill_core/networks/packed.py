"""Which weights of a file stand for other numbers than those that are stored: quantised ones, told by their storage alone."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..base.storage import StoredTensor

QUANTISATION = "_quantization_metadata"
"""Metadata in which ComfyUI lists the layers of a file that are quantised."""
_BESIDE = re.compile(r"^(.*\.weight)[._].")
_WHOLE_NUMBERS = ("I", "U")


def weight_beside(name: str, names: Container[str]) -> str | None:
    """The weight that a tensor says more about: ``x.weight`` for ``x.weight_scale`` and ``x.weight.absmax``; None if there is none."""
    found = _BESIDE.match(name)
    return found[1] if found and found[1] in names else None


def packed_weight(tensors: Mapping[str, StoredTensor]) -> str | None:
    """A weight that is stored in whole numbers, or with another tensor that says what its numbers stand for; None if none is."""
    in_whole_numbers = (
        name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.code.startswith(_WHOLE_NUMBERS)
    )
    explained = (weight for name in tensors if (weight := weight_beside(name, tensors)))
    return next(in_whole_numbers, None) or next(explained, None)
