"""A LoRA for a student, and what all conversions into one have in common."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..base.storage import StoredTensor
from .tensors import in_memory, role

if TYPE_CHECKING:
    from torch import Tensor

    Weight = Tensor | StoredTensor

_PLACE_OF_ADAPTER = re.compile(
    r"[._](?:lora|hada|lokr|oft|boft|dora|alpha|diff|w_norm|b_norm|set_weight|reshape_weight)(?:[._]|$)"
)
"""Where the layer ends in a key."""
UNET_BLOCKS = ("input_blocks", "middle_block", "output_blocks", "down_blocks", "mid_block", "up_blocks")
"""How the names of a UNet's blocks begin, in either layout."""


@dataclass(frozen=True)
class Remapped:
    """A LoRA for a student, and what happened to the teacher's. Counts are of layers, not of tensors."""

    tensors: dict[str, Weight]
    """The same tensors under the student's names, without those of removed blocks; with an alpha if peft's configuration gave
    it and the new names are not peft's."""
    num_kept: int
    """Layers of the network that stay."""
    num_dropped: int
    """Layers of the network whose block the student does not have."""
    num_text_encoder: int
    """Layers of text encoders, passed on unchanged."""
    switched_to_ldm: bool
    """Whether layers with diffusers names were renamed to the LDM layout, so that ComfyUI finds them
    (`comfyui_reads_diffusers_names`)."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata of the teacher's file, adapted to these tensors."""

    def read(self) -> dict[str, Tensor]:
        """All tensors in memory."""
        return {key: in_memory(tensor) for key, tensor in self.tensors.items()}

    def describe(self) -> str:
        """One line for a person."""
        parts = [f"{self.num_kept} of {self.num_kept + self.num_dropped} layers kept"]
        if self.num_dropped:
            parts.append(f"{self.num_dropped} dropped with the blocks the student does not have")
        if self.num_text_encoder:
            parts.append(f"{self.num_text_encoder} of text encoders untouched")
        if self.switched_to_ldm:
            parts.append("named in the LDM layout, because ComfyUI misreads diffusers names for a student of this shape")
        return "; ".join(parts)


def layer_of(key: str) -> str:
    """Layer of a key that belongs to no known network (to a text encoder), for counting."""
    if key.startswith(("lora_", "lycoris_")):
        return key.partition(".")[0]
    return _PLACE_OF_ADAPTER.split(key)[0]


def by_layer(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Layer -> role of each of its tensors -> key."""
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    for key in keys:
        layer = layer_of(key)
        layers[layer][role(key[len(layer) :])] = key
    return dict(layers)
