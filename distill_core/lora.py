"""A LoRA made for a teacher, turned into one for a student pruned from it.

A LoRA is a set of tensors for each layer it changes, under names such as
``lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight``: a prefix, the layer as one of the
layouts spells it, and what the tensor is. Only the layer is read and renamed. What stands behind it is kept as it is, so
that LoRA, LoHa, LoKr, DoRA, OFT and full differences all pass. A LoRA never says which network it was made for.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from .architecture import Architecture
from .layouts import heads, layout
from .plan import NameMap, pruned
from .storage import read_header, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from .storage import StoredTensor

Weight = TypeVar("Weight", bound="Tensor | StoredTensor")

_PREFIXES = {
    "lora_unet_": "_",
    "lycoris_": "_",
    "model.diffusion_model.": ".",
    "diffusion_model.": ".",
    "base_model.model.unet.": ".",
    "unet.base_model.model.": ".",
    "unet.": ".",
    "base_model.model.": ".",
    "": ".",
}
"""What stands in front of a layer -> what separates the parts of the layer's name."""
_UNET_ALONE = ("lora_unet_", "model.diffusion_model.", "diffusion_model.", "base_model.model.unet.", "unet.")
"""Prefixes that only a UNet's keys have."""
_UNET_BLOCKS = ("input_blocks", "middle_block", "output_blocks", "down_blocks", "mid_block", "up_blocks")
_PLACE_OF_ADAPTER = re.compile(r"[._](?:lora|hada|lokr|oft|boft|dora|alpha|diff|w_norm|b_norm|set_weight)(?:[._]|$)")
"""Where the layer ends in a text encoder's key."""
_STALE_METADATA = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Hashes of the tensors, which are others now."""


# --- how layers are spelled -----------------------------------------------------------------------------------------


class _Dialect(NamedTuple):
    """One way to spell a layer: a layout, and what is done to its dotted name."""

    layout: str
    separator: str
    spell: Callable[[str], str]


def _with_dots(path: str) -> str:
    return path


def _with_underscores(path: str) -> str:
    return path.replace(".", "_")


def _as_processor(path: str) -> str:
    """``attn1.to_out.0`` -> ``attn1.processor.to_out``: diffusers before 0.22 hung the LoRA into the attention's processor."""
    return path.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")


_DIALECTS = {
    "ldm with dots": _Dialect("ldm", ".", _with_dots),
    "ldm with underscores": _Dialect("ldm", "_", _with_underscores),
    "diffusers with dots": _Dialect("diffusers", ".", _with_dots),
    "diffusers with underscores": _Dialect("diffusers", "_", _with_underscores),
    "diffusers processors": _Dialect("diffusers", ".", _as_processor),
}
_TRANSLATED_PREFIX = "lora_unet_"
"""What translated layers are put behind, with underscores: ComfyUI reads that in both layouts, whatever kind of adapter."""


def _paths(architecture: Architecture, dialect: _Dialect) -> dict[str, str]:
    """Canonical layer -> how a dialect spells it, for all layers of a network."""
    names = layout(dialect.layout).from_canonical(architecture.shapes)
    return {_parent(name): dialect.spell(_parent(path)) for name, path in names.items()}


def _parent(name: str) -> str:
    """The layer of a parameter."""
    return name.rpartition(".")[0]


def comfyui_reads_diffusers_names(architecture: Architecture) -> bool:
    """Whether stock ComfyUI finds the layers a LoRA names as diffusers does.

    It takes the layers of the other stages to be as many as those of the stage it looks at (comfy/utils.py of 0.33,
    ``unet_to_diffusers``: ``n = 1 + (num_res_blocks[x] + 1) * x``), so all down stages must have the same number of resnets.
    Otherwise it applies tensors to the wrong layers, or to none, without a word where shapes agree.
    """
    return len({len(architecture.numbers(f"{stage}.resnet")) for stage in architecture.stages("down")}) == 1


def kohya_names(architecture: Architecture) -> dict[str, str]:
    """Canonical layer -> how kohya's trainer calls it, spelled so that both ComfyUI and diffusers find it in this network."""
    dialect = _DIALECTS[("diffusers" if comfyui_reads_diffusers_names(architecture) else "ldm") + " with underscores"]
    return {layer: _TRANSLATED_PREFIX + path for layer, path in _paths(architecture, dialect).items()}


# --- finding layers in a LoRA ---------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a key of a LoRA belongs in the teacher."""

    prefix: str
    layer: str
    """Canonical name of the teacher's layer."""
    dialect: str
    rest: str
    """What follows the layer, as it stands: ``.lora_up.weight``, ``_lora.down.weight``, ``.alpha``."""


def _places(keys: Mapping[str, object], teacher: Architecture) -> dict[str, _Place]:
    """Key -> its place, for all keys of the UNet; ``ValueError`` for one of a UNet that is not this one."""
    tables: dict[str, dict[str, tuple[str, str]]] = {".": {}, "_": {}}
    for name, dialect in _DIALECTS.items():
        for layer, path in _paths(teacher, dialect).items():
            tables[dialect.separator].setdefault(path, (layer, name))
    places = {}
    for key in keys:
        if place := _find(key, tables):
            places[key] = place
        elif _is_of_a_unet(key):
            raise ValueError(
                f"the teacher has no layer for {key}: this LoRA was made for another model (SD1.x, SD2 and SDXL differ), "
                "or the teacher given here is pruned already; give the full model the LoRA was made for"
            )
    if not places:
        raise ValueError(
            "this LoRA was not made for the teacher: none of its tensors belongs to a Stable Diffusion UNet; "
            f"its first is {next(iter(keys), 'missing, for the file is empty')}"
        )
    return places


def _find(key: str, tables: Mapping[str, Mapping[str, tuple[str, str]]]) -> _Place | None:
    """The longest layer a key begins with, behind any of the prefixes."""
    for prefix, separator in _PREFIXES.items():
        if not key.startswith(prefix):
            continue
        name = key[len(prefix) :]
        for head in heads(name):
            # Old diffusers joins layer and adapter with an underscore: to_q_lora.down.weight.
            path = head if head in tables[separator] else head.removesuffix("_lora")
            if path in tables[separator]:
                return _Place(prefix, *tables[separator][path], name[len(path) :])
    return None


def _is_of_a_unet(key: str) -> bool:
    """Whether a key is meant for a UNet, be it one that has no such layer."""
    inner = (key.removeprefix(prefix) for prefix in _PREFIXES)
    return key.startswith(_UNET_ALONE) or any(name.startswith(_UNET_BLOCKS) for name in inner)


def _layer_outside(key: str) -> str:
    """Layer of a key outside the UNet, to count by: a text encoder's."""
    if key.startswith(("lora_", "lycoris_")):
        return key.partition(".")[0]
    return _PLACE_OF_ADAPTER.split(key)[0]


# --- does it fit ----------------------------------------------------------------------------------------------------

_INPUT_SIDE = re.compile(r"[._](?:lora_down|lora_A|lora\.down|lora_linear_layer\.down|hada_w1_b|lokr_w[12](?:_b)?)(?:\.|$)")
"""Tensors whose second dimension, multiplied where there are several, is the input width of the layer."""
_OUTPUT_SIDE = re.compile(r"[._](?:lora_up|lora_B|lora\.up|lora_linear_layer\.up)(?:\.|$)")
"""Tensors whose first dimension is the output width of the layer."""


def _check_widths(tensors: Mapping[str, Weight], places: Mapping[str, _Place], teacher: Architecture) -> None:
    """``ValueError`` for a layer of the LoRA that is not as wide as the teacher's: SD1.x and SD2 share all their names."""
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for key, place in places.items():
        if len(tensors[key].shape) > 1:
            groups[place[:3]].append(key)
    for (_, layer, _), keys in groups.items():
        weight = teacher.shapes.get(f"{layer}.weight", ())
        if len(weight) > 1:
            inputs = [tensors[key].shape[1] for key in keys if _INPUT_SIDE.search(places[key].rest)]
            outputs = [tensors[key].shape[0] for key in keys if _OUTPUT_SIDE.search(places[key].rest)]
            # Convolutions come with their kernel unfolded or not.
            _check_width(keys[0], "inputs", inputs, {weight[1], prod(weight[1:])})
            _check_width(keys[0], "outputs", outputs, {weight[0]})


def _check_width(key: str, side: str, factors: list[int], expected: set[int]) -> None:
    if factors and prod(factors) not in expected:
        raise ValueError(
            f"the LoRA has {prod(factors)} {side} where the teacher's layer has {min(expected)} ({key}): it was made for "
            "another model, whose layers have the same names; give the full model it was made for"
        )


# --- remapping ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remapped(Generic[Weight]):
    """A LoRA for a student, and what became of the teacher's. Counts are of layers, not of tensors."""

    tensors: dict[str, Weight]
    """The same tensors under the student's names, without those of removed blocks."""
    num_kept: int
    """Layers of the UNet that stay."""
    num_dropped: int
    """Layers of the UNet whose block the student does not have."""
    num_text_encoder: int
    """Layers outside the UNet, passed on untouched."""
    switched_to_ldm: bool
    """Whether layers named as diffusers does were renamed to the LDM layout, for ComfyUI to find them
    (`comfyui_reads_diffusers_names`)."""

    def describe(self) -> str:
        """One line for a person."""
        parts = [f"{self.num_kept} of {self.num_kept + self.num_dropped} UNet layers kept"]
        if self.num_dropped:
            parts.append(f"{self.num_dropped} dropped with the blocks the student does not have")
        if self.num_text_encoder:
            parts.append(f"{self.num_text_encoder} of text encoders untouched")
        if self.switched_to_ldm:
            parts.append("named in the LDM layout, because ComfyUI misreads diffusers names for a student of this shape")
        return "; ".join(parts)


def remap_lora(
    tensors: Mapping[str, Weight], teacher: Architecture, mapping: NameMap, *, spelling: str | None = None
) -> Remapped[Weight]:
    """Rename the layers of a teacher's LoRA to the student's, and drop those of removed blocks.

    spelling: layout to name the layers of the UNet in, a key of `layouts.LAYOUTS`; None keeps the format that came, unless
    ComfyUI would misread it for this student. Layers that change layout are named as kohya does (``lora_unet_``, underscores).

    Raises ``ValueError`` if the LoRA was not made for the teacher, or if nothing of it is left.
    """
    if spelling is not None:
        layout(spelling)
    student = pruned(teacher, mapping)
    places = _places(tensors, teacher)
    _check_widths(tensors, places, teacher)
    layers = {place.layer for place in places.values()}
    kept = {layer: name for layer in layers if (name := mapping.rename(layer)) is not None}
    if not kept:
        raise ValueError(
            f"nothing is left of this LoRA: all {len(layers)} layers it changes belong to blocks the student does not have; "
            "use one that changes more of the model, or train one on the student"
        )
    places_kept = {key: place for key, place in places.items() if place.layer in kept}
    switched = spelling is None and not comfyui_reads_diffusers_names(student) and _has_diffusers_names(places_kept)
    renamed = _respell(places_kept, kept, student, spelling or ("ldm" if switched else None))
    outside = tensors.keys() - places.keys()
    return Remapped(
        {renamed.get(key, key): tensor for key, tensor in tensors.items() if key in renamed or key in outside},
        num_kept=len(kept),
        num_dropped=len(layers) - len(kept),
        num_text_encoder=len({_layer_outside(key) for key in outside}),
        switched_to_ldm=switched,
    )


def _has_diffusers_names(places: Mapping[str, _Place]) -> bool:
    return any(_DIALECTS[place.dialect].layout == "diffusers" for place in places.values())


def _respell(places: Mapping[str, _Place], kept: Mapping[str, str], student: Architecture, target: str | None) -> dict[str, str]:
    """Key of the teacher's LoRA -> key of the student's.

    kept: teacher's layer -> student's. target: layout to write, None for the one each key is in.
    """
    paths = {name: _paths(student, dialect) for name, dialect in _DIALECTS.items()}
    renamed: dict[str, str] = {}
    for key, (prefix, layer, dialect, rest) in places.items():
        if target not in (None, _DIALECTS[dialect].layout):
            prefix, dialect = _TRANSLATED_PREFIX, f"{target} with underscores"
        renamed[key] = prefix + paths[dialect][kept[layer]] + rest
    if len(set(renamed.values())) < len(renamed):
        raise ValueError(
            "this LoRA names the same layer in both layouts, so that one would be lost in a single layout; keep its own naming"
        )
    return renamed


def remap_lora_file(
    path: Path | str,
    out: Path | str,
    teacher: Architecture,
    mapping: NameMap,
    *,
    spelling: str | None = None,
    overwrite: bool = False,
) -> Remapped[StoredTensor]:
    """Turn a LoRA file into one for a student, one tensor in memory at a time; see `remap_lora`.

    The metadata stays, kohya's ``ss_*`` included, but for hashes of the tensors; ``distill.remapped`` tells what was done.
    Raises ``ValueError`` also if the file is no LoRA, was remapped already, or if ``out`` exists.
    """
    header = read_header(path)
    if "distill.remapped" in header.metadata:
        raise ValueError(f"{path} is a LoRA for a student already; start from the one made for the teacher")
    try:
        remapped = remap_lora(header.tensors, teacher, mapping, spelling=spelling)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    metadata = {key: text for key, text in header.metadata.items() if key not in _STALE_METADATA}
    done = {"kept": remapped.num_kept, "dropped": remapped.num_dropped, "from": Path(path).name}
    write_tensors(out, remapped.tensors, {**metadata, "distill.remapped": json.dumps(done)}, overwrite=overwrite)
    return remapped


# --- as diffusers writes it -----------------------------------------------------------------------------------------

_MATRICES = {
    "lora_A": re.compile(r"[._](?:lora_down|lora_A|lora\.down|lora_linear_layer\.down)(?:\.default)?\.weight"),
    "lora_B": re.compile(r"[._](?:lora_up|lora_B|lora\.up|lora_linear_layer\.up)(?:\.default)?\.weight"),
    "alpha": re.compile(r"\.alpha"),
}
"""What diffusers calls a tensor of a plain LoRA -> what stands behind the layer, in any format."""


def diffusers_lora(tensors: Mapping[str, StoredTensor], model: Architecture) -> dict[str, Tensor]:
    """A plain LoRA as diffusers itself writes it: ``unet.<layer>.lora_A.weight`` (A) and ``.lora_B.weight`` (B).

    Diffusers reads no alpha in this form and computes ``W + B A``, so ``alpha / rank`` is multiplied into B.

    Raises ``ValueError`` if the LoRA was not made for the model, is of another kind, or is for text encoders as well.
    """
    places = _places(tensors, model)
    _check_widths(tensors, places, model)
    if outside := tensors.keys() - places.keys():
        raise ValueError(f"{min(outside)} is of a text encoder; only LoRAs of the UNet alone are written in diffusers' form")
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, place in places.items():
        name = next((name for name, spelling in _MATRICES.items() if spelling.fullmatch(place.rest)), None)
        if name is None:
            raise ValueError(f"{key}: this LoRA is of a kind (DoRA, LoHa, LoKr …) that has no place in diffusers' form of it")
        if name in layers[place.layer]:
            raise ValueError(f"{key}: this LoRA has two tensors for one place")
        layers[place.layer][name] = tensors[key].read()
    paths, written = _paths(model, _DIALECTS["diffusers with dots"]), {}
    for layer, found in layers.items():
        if not {"lora_A", "lora_B"} <= found.keys():
            raise ValueError(f"{layer}: one of the two matrices of this LoRA is missing")
        outputs, inputs, *kernel = model.shapes[f"{layer}.weight"]
        down, up, rank = found["lora_A"], found["lora_B"], found["lora_A"].shape[0]
        scale = found["alpha"].item() / rank if "alpha" in found else 1.0
        written[f"unet.{paths[layer]}.lora_A.weight"] = down.reshape(rank, inputs, *kernel)
        written[f"unet.{paths[layer]}.lora_B.weight"] = (up.float() * scale).to(up).reshape(outputs, rank, *(1 for _ in kernel))
    return written


def convert_lora_file(path: Path | str, out: Path | str, model: Architecture, *, overwrite: bool = False) -> int:
    """Write a LoRA file as diffusers does, see `diffusers_lora`; returns the number of layers.

    The metadata stays, but for hashes of the tensors and what says how kohya's trainer scales them.
    """
    header = read_header(path)
    try:
        tensors = diffusers_lora(header.tensors, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    kept = {
        key: text for key, text in header.metadata.items() if key not in _STALE_METADATA and not key.startswith("ss_network_")
    }
    write_tensors(out, tensors, kept, overwrite=overwrite)
    return len(tensors) // 2
