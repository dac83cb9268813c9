"""How LoRAs name the layers of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .architecture import Architecture
from .layouts import layout_named


class _Dialect(NamedTuple):
    """One way to spell a layer: a layout, and a change to its dotted name."""

    layout: str
    separator: str
    spell: Callable[[str], str]


def _with_dots(path: str) -> str:
    return path


def _with_underscores(path: str) -> str:
    return path.replace(".", "_")


def _as_processor(path: str) -> str:
    """``attn1.to_out.0`` -> ``attn1.processor.to_out``: diffusers before 0.22 put the LoRA in the attention's processor."""
    return path.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")


DIALECTS = {
    "ldm with dots": _Dialect("ldm", ".", _with_dots),
    "ldm with underscores": _Dialect("ldm", "_", _with_underscores),
    "diffusers with dots": _Dialect("diffusers", ".", _with_dots),
    "diffusers with underscores": _Dialect("diffusers", "_", _with_underscores),
    "diffusers processors": _Dialect("diffusers", ".", _as_processor),
}


TRANSLATED_PREFIX = "lora_unet_"
"""Prefix of translated layers, with underscores: ComfyUI reads it in both layouts, for every kind of adapter."""


def paths_in(architecture: Architecture, dialect: _Dialect) -> dict[str, str]:
    """Canonical layer -> its name in a dialect, for all layers of a network."""
    names = layout_named(dialect.layout).from_canonical(architecture.shapes)
    return {_parent(name): dialect.spell(_parent(path)) for name, path in names.items()}


def _parent(name: str) -> str:
    """The layer of a parameter."""
    return name.rpartition(".")[0]


def comfyui_reads_diffusers_names(architecture: Architecture) -> bool:
    """Whether stock ComfyUI finds the layers of a LoRA that uses diffusers names.

    ComfyUI assumes that all other stages have as many layers as the stage it looks at (comfy/utils.py of 0.33,
    ``unet_to_diffusers``: ``n = 1 + (num_res_blocks[x] + 1) * x``), so all down stages must have the same number of resnets.
    Otherwise it applies tensors to the wrong layers, or to none, and gives no warning where shapes agree.
    """
    return len({len(architecture.numbers(f"{stage}.resnet")) for stage in architecture.stages("down")}) == 1


def kohya_names(architecture: Architecture) -> dict[str, str]:
    """Canonical layer -> its name in kohya's trainer, spelled so that ComfyUI and diffusers both find it in this network."""
    dialect = DIALECTS[("diffusers" if comfyui_reads_diffusers_names(architecture) else "ldm") + " with underscores"]
    return {layer: TRANSLATED_PREFIX + path for layer, path in paths_in(architecture, dialect).items()}
