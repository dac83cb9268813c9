"""Conversion of a LoRA made for a teacher into one for a student pruned from it.

A LoRA is a set of tensors for each layer it changes, under names such as
``lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight``: a prefix, the layer as one of the
layouts spells it, and the role of the tensor. Only the layer is read and renamed. The part after it is kept, so LoRA,
LoHa, LoKr, DoRA, OFT and full differences all pass. A LoRA never says which network it was made for.

Its strength comes from ``alpha`` beside the matrices, or from peft's configuration in the metadata of the file (`metadata`).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..base.modelspec import OF_ONE_FILE
from ..base.storage import StoredTensor, read_header, write_tensors
from ..networks.architecture import Architecture
from ..networks.layouts import heads, layout_named
from ..networks.lora_names import DIALECTS, TRANSLATED_PREFIX, comfyui_reads_diffusers_names, paths_in
from ..networks.name_map import NameMap
from ..networks.network import Network
from ..pruning.plan import pruned
from .blocks import remap_on_blocks
from .metadata import KEY, PeftConfig, alpha_of, read_configs, written
from .remapped import UNET_BLOCKS, Remapped, by_layer
from .tensors import WIDENS, check_adapter, check_finite, check_fit, check_products, check_tensor, in_memory, rank, role, widened

if TYPE_CHECKING:
    from torch import Tensor

    from .remapped import Weight

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
"""Prefix of a layer -> separator between the parts of the layer's name."""
_UNET_ALONE = ("lora_unet_", "model.diffusion_model.", "diffusion_model.", "base_model.model.unet.", "unet.")
"""Prefixes that only a UNet's keys have."""


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
    """Key -> its place, for all keys of the UNet; ``ValueError`` for a key of another UNet."""
    if "lora_controlnet" in keys:
        raise ValueError("this file is a Control-LoRA, which is a ControlNet and not a LoRA; open it with Load ControlNet Model")
    tables: dict[str, dict[str, tuple[str, str]]] = {".": {}, "_": {}}
    for name, dialect in DIALECTS.items():
        for layer, path in paths_in(teacher, dialect).items():
            tables[dialect.separator].setdefault(path, (layer, name))
    places = {}
    for key in keys:
        if place := _find(key, tables):
            places[key] = place
        elif _is_of_a_unet(key):
            check_adapter(keys)
            raise ValueError(
                f"the teacher has no layer for {key}: this LoRA was made for another model (SD1.x, SD2 and SDXL differ), "
                "or the given teacher is already pruned; give the full model the LoRA was made for"
            )
    if not places:
        raise ValueError(
            "this LoRA was not made for the teacher: none of its tensors belongs to a Stable Diffusion UNet; "
            f"its first is {next(iter(keys), 'missing, because the file is empty')}"
        )
    check_adapter(keys)
    return places


def _find(key: str, tables: Mapping[str, Mapping[str, tuple[str, str]]]) -> _Place | None:
    """The longest layer that a key begins with, after any of the prefixes."""
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
    """Whether a key is meant for a UNet, even for one without such a layer."""
    inner = (key.removeprefix(prefix) for prefix in _PREFIXES)
    return key.startswith(_UNET_ALONE) or any(name.startswith(UNET_BLOCKS) for name in inner)


def _by_layer(places: Mapping[str, _Place]) -> dict[str, dict[str, str]]:
    """Canonical layer -> role of each of its tensors -> key; ``ValueError`` for a layer that occurs twice."""
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    for key, place in places.items():
        first = next(iter(layers[place.layer].values()), key)
        there = layers[place.layer].setdefault(role(place.rest), key)
        if there != key or places[first][:3] != place[:3]:
            other = there if there != key else first
            raise ValueError(
                f"{key}: this LoRA has two tensors for one place, or names a layer twice ({other}); keep one of them"
            )
    return dict(layers)


# --- does it fit ----------------------------------------------------------------------------------------------------

_INPUT_SIDE = re.compile(r"[._](?:lora_down|lora_A|lora\.down|lora_linear_layer\.down|hada_w1_b|lokr_w[12](?:_b)?)(?:\.|$)")
"""Tensors whose second dimension, multiplied where there are several, is the input width of the layer."""
_OUTPUT_SIDE = re.compile(r"[._](?:lora_up|lora_B|lora\.up|lora_linear_layer\.up)(?:\.|$)")
"""Tensors whose first dimension is the output width of the layer."""


def _check_widths(tensors: Mapping[str, Weight], places: Mapping[str, _Place], teacher: Architecture) -> None:
    """``ValueError`` for a layer of the LoRA with another width than the teacher's: SD1.x and SD2 share all their names."""
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for key, place in places.items():
        if len(tensors[key].shape) > 1 or role(place.rest) == WIDENS:
            groups[place[:3]].append(key)
    for (_, layer, _), keys in groups.items():
        weight = teacher.shapes.get(f"{layer}.weight", ())
        weight = widened(weight, {role(places[key].rest): key for key in keys}, tensors)
        if len(weight) > 1:
            inputs = [tensors[key].shape[1] for key in keys if _INPUT_SIDE.search(places[key].rest)]
            outputs = [tensors[key].shape[0] for key in keys if _OUTPUT_SIDE.search(places[key].rest)]
            # The kernel of a convolution may be unfolded.
            _check_width(keys[0], "inputs", inputs, {weight[1], prod(weight[1:])})
            _check_width(keys[0], "outputs", outputs, {weight[0]})


def _check_width(key: str, side: str, factors: list[int], expected: set[int]) -> None:
    if factors and prod(factors) not in expected:
        raise ValueError(
            f"the LoRA has {prod(factors)} {side}, but the teacher's layer has {min(expected)} ({key}): it was made for "
            "another model with the same layer names; give the full model it was made for"
        )


class _Lora(NamedTuple):
    """A LoRA split into its parts. Tensors of a layer are keyed by their role (`tensors.role`)."""

    tensors: Mapping[str, Weight]
    places: dict[str, _Place]
    layers: dict[str, dict[str, str]]
    """Canonical layer of the teacher -> role -> key."""
    outside: dict[str, dict[str, str]]
    """The same for layers of text encoders, by the common part of their keys."""
    configs: dict[str, PeftConfig]

    @classmethod
    def of(cls, tensors: Mapping[str, Weight], teacher: Architecture, metadata: Mapping[str, str] | None) -> _Lora:
        """``ValueError`` if it was not made for the teacher."""
        places = _places(tensors, teacher)
        layers = _by_layer(places)
        _check_widths(tensors, places, teacher)
        outside = by_layer(tensors.keys() - places.keys())
        return cls(tensors, places, layers, outside, read_configs(metadata or {}))

    def only(self, layers: Iterable[str]) -> _Lora:
        """The same LoRA with only some layers of the UNet."""
        places = {key: place for key, place in self.places.items() if place.layer in layers}
        tensors = {key: tensor for key, tensor in self.tensors.items() if key in places or key not in self.places}
        return self._replace(tensors=tensors, places=places, layers={layer: self.layers[layer] for layer in layers})

    def shapes(self, keys: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
        """Role -> shape, of one layer."""
        return {name: tuple(self.tensors[key].shape) for name, key in keys.items()}

    def rank(self, layer: str) -> int | None:
        return rank(self.shapes(self.layers[layer]))

    def check(self, teacher: Architecture) -> None:
        """``ValueError`` for tensors that are damaged, or do not fit the teacher's layer; shapes first, then values."""
        for layer, keys in self.layers.items():
            self._check_each(keys)
            if (weight := teacher.shapes.get(f"{layer}.weight")) is not None:
                fitting = widened(weight, keys, self.tensors)
                check_fit(keys, self.shapes(keys), fitting, teacher.shapes.get(f"{layer}.bias"))
        for keys in self.outside.values():
            if keys.keys() - {"lora_down"}:  # alone it has no effect in any loader
                self._check_each(keys)
                check_products(keys, self.shapes(keys))
        for key, tensor in self.tensors.items():
            check_finite(key, tensor)

    def _check_each(self, keys: Mapping[str, str]) -> None:
        for name, key in keys.items():
            check_tensor(key, name, self.tensors[key])


# --- remapping ------------------------------------------------------------------------------------------------------


def remap_lora(
    tensors: Mapping[str, Weight],
    teacher: Network,
    mapping: NameMap,
    *,
    metadata: Mapping[str, str] | None = None,
    layout: str | None = None,
) -> Remapped:
    """A teacher's LoRA with layers renamed to the student's, without those of removed blocks and of identity blocks.

    metadata: of the file; it may hold peft's configuration. layout: layout to name the layers of the UNet in, a key of
    `layouts.LAYOUTS`; None keeps the given format, unless ComfyUI would misread it for this student. Layers that change
    layout are named as kohya does (``lora_unet_``, underscores). A transformer's LoRA always keeps its format (`blocks`).

    Raises ``ValueError`` if the LoRA was not made for the teacher, if its tensors are damaged, or if nothing of it is left.
    """
    if layout is not None:
        layout_named(layout)
    if not isinstance(teacher, Architecture):
        return remap_on_blocks(tensors, teacher, mapping, metadata=metadata)
    lora, student = _Lora.of(tensors, teacher, metadata), pruned(teacher, mapping)
    stays = (layer for layer in lora.layers if not mapping.is_identity(layer))
    kept = {layer: name for layer in stays if (name := mapping.rename(layer)) is not None}
    if not kept:
        raise ValueError(
            f"nothing is left of this LoRA: all {len(lora.layers)} layers it changes belong to blocks the student does not have; "
            "use one that changes more of the model, or train one on the student"
        )
    left = lora.only(kept)
    left.check(teacher)
    switched = layout is None and not comfyui_reads_diffusers_names(student) and _has_diffusers_names(left.places)
    target = layout or ("ldm" if switched else None)
    renamed = _respell(left.places, kept, student, target)
    remapped: dict[str, Weight] = {renamed.get(key, key): tensor for key, tensor in left.tensors.items()}
    kept_metadata = {key: text for key, text in (metadata or {}).items() if key not in OF_ONE_FILE}
    if target == "ldm" or any(target not in (None, DIALECTS[place.dialect].layout) for place in left.places.values()):
        remapped |= _alphas(left, renamed, teacher)
        kept_metadata.pop(KEY, None)
    elif left.configs:
        kept_metadata |= {KEY: written(_moved(left, kept, teacher, student))}
    return Remapped(
        remapped,
        num_kept=len(kept),
        num_dropped=len(lora.layers) - len(kept),
        num_text_encoder=len(lora.outside),
        switched_to_ldm=switched,
        metadata=kept_metadata,
    )


def _has_diffusers_names(places: Mapping[str, _Place]) -> bool:
    return any(DIALECTS[place.dialect].layout == "diffusers" for place in places.values())


def _respell(places: Mapping[str, _Place], kept: Mapping[str, str], student: Architecture, target: str | None) -> dict[str, str]:
    """Key of the teacher's LoRA -> key of the student's.

    kept: teacher's layer -> student's. target: layout to write; None keeps that of each key.
    """
    paths = {name: paths_in(student, dialect) for name, dialect in DIALECTS.items()}
    renamed: dict[str, str] = {}
    for key, (prefix, layer, dialect, rest) in places.items():
        if target not in (None, DIALECTS[dialect].layout):
            prefix, dialect = TRANSLATED_PREFIX, f"{target} with underscores"
        renamed[key] = prefix + paths[dialect][kept[layer]] + rest
    return renamed


# --- how strong it is -----------------------------------------------------------------------------------------------

_PEFT_ALONE = {"lora_magnitude_vector": "part of peft's DoRA", "lora_B.bias": "a bias of a LoRA", "weight": "a whole weight",
               "bias": "a whole bias"}  # fmt: skip
"""Tensors that only peft reads, by role."""


def _of_unet(configs: Mapping[str, PeftConfig]) -> str:
    """Name of the UNet's configuration in a file; a file of the UNet alone may leave the name out."""
    return "unet" if "unet" in configs else ""


def _moved(lora: _Lora, kept: Mapping[str, str], teacher: Architecture, student: Architecture) -> dict[str, PeftConfig]:
    """The configurations of a LoRA, with the UNet's adapted to the student. kept: teacher's layer -> student's."""
    if (network := _of_unet(lora.configs)) not in lora.configs:
        return lora.configs
    old, new = (paths_in(architecture, DIALECTS["diffusers with dots"]) for architecture in (teacher, student))
    whole = {layer for layer, keys in lora.layers.items() if not keys.keys() - {"weight", "bias"}}
    moved = lora.configs[network].moved(
        {old[layer]: new[kept[layer]] for layer in kept.keys() - whole},
        ranks={old[layer]: lora.rank(layer) for layer in kept},
        saved={old[layer]: new[kept[layer]] for layer in whole},
    )
    return {**lora.configs, network: moved}


def _alphas(lora: _Lora, renamed: Mapping[str, str], teacher: Architecture) -> dict[str, Tensor]:
    """Alphas as tensors, for layers whose strength is in peft's configuration, which ComfyUI does not read.

    renamed: key -> that of the student. ``ValueError`` for tensors that ComfyUI does not read.
    """
    paths, config = paths_in(teacher, DIALECTS["diffusers with dots"]), lora.configs.get(_of_unet(lora.configs))
    found: dict[str, Tensor] = {}
    for layer, keys in lora.layers.items():
        for name in _PEFT_ALONE.keys() & keys.keys():
            raise ValueError(
                f"{keys[name]} is {_PEFT_ALONE[name]}, which ComfyUI does not read; use this LoRA in diffusers, "
                "in the diffusers layout"
            )
        key = next(iter(keys.values()))
        found |= _alpha(lora, keys, renamed[key].removesuffix(lora.places[key].rest), config, paths[layer])
    for layer, keys in lora.outside.items():
        text_encoder, _, path = layer.partition(".")
        found |= _alpha(lora, keys, layer, lora.configs.get(text_encoder), path)
    return found


def _alpha(lora: _Lora, keys: Mapping[str, str], name: str, config: PeftConfig | None, path: str) -> dict[str, Tensor]:
    """The alpha of one layer; empty if it has one already or none is given. name: start of its keys. path: peft's."""
    import torch

    alpha = alpha_of(config, path, keys, lora.shapes(keys))
    return {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}


def remap_lora_file(
    path: Path | str,
    out: Path | str,
    teacher: Network,
    mapping: NameMap,
    *,
    layout: str | None = None,
    overwrite: bool = False,
) -> Remapped:
    """Convert a LoRA file into one for a student, one tensor in memory at a time; see `remap_lora`.

    The metadata is kept, including kohya's ``ss_*``, except hashes of the tensors; peft's configuration is adapted;
    ``distill.remapped`` records the conversion. Raises ``ValueError`` also if the file is not a LoRA, was remapped already,
    or if ``out`` exists.
    """
    if layout is not None and not isinstance(teacher, Architecture):
        raise ValueError(f"layout {layout!r} is for UNets; the LoRA of a transformer keeps its names, so leave layout out")
    header = read_header(path)
    if "distill.remapped" in header.metadata:
        raise ValueError(f"{path} is already a LoRA for a student; start from the one made for the teacher")
    try:
        remapped = remap_lora(header.tensors, teacher, mapping, metadata=header.metadata, layout=layout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    done = {"kept": remapped.num_kept, "dropped": remapped.num_dropped, "from": Path(path).name}
    write_tensors(out, remapped.tensors, {**remapped.metadata, "distill.remapped": json.dumps(done)}, overwrite=overwrite)
    return remapped


# --- as diffusers writes it -----------------------------------------------------------------------------------------

_MATRICES = ("lora_down", "lora_up", "alpha")
"""Tensors of a plain LoRA."""


def diffusers_lora(
    tensors: Mapping[str, StoredTensor], model: Architecture, metadata: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """A plain LoRA as diffusers itself writes it: ``unet.<layer>.lora_A.weight`` (A) and ``.lora_B.weight`` (B).

    Diffusers reads no alpha in this form and computes ``W + B A``, so ``alpha / rank``, or the scale from peft's
    configuration in the metadata of the file, is multiplied into B.

    Raises ``ValueError`` if the LoRA was not made for the model, is damaged, is of another kind, or also has layers of text
    encoders.
    """
    lora = _Lora.of(tensors, model, metadata)
    if lora.outside:
        key = min(lora.tensors.keys() - lora.places.keys())
        raise ValueError(f"{key} belongs to a text encoder; only LoRAs of the UNet alone can be written in diffusers' form")
    for key, place in lora.places.items():
        if role(place.rest) not in _MATRICES:
            raise ValueError(f"{key}: this LoRA is of a kind (DoRA, LoHa, LoKr …) that diffusers' form cannot store")
    lora.check(model)
    paths, matrices = paths_in(model, DIALECTS["diffusers with dots"]), {}
    for layer, keys in lora.layers.items():
        down, up = _plain(lora, keys, paths[layer])
        outputs, inputs, *kernel = model.shapes[f"{layer}.weight"]
        matrices[f"unet.{paths[layer]}.lora_A.weight"] = down.reshape(-1, inputs, *kernel)
        matrices[f"unet.{paths[layer]}.lora_B.weight"] = up.reshape(outputs, -1, *(1 for _ in kernel))
    return matrices


def _plain(lora: _Lora, keys: Mapping[str, str], path: str) -> tuple[Tensor, Tensor]:
    """A and B of a layer, scaled so that their product is the change of its weight, in their stored precision."""
    if "lora_up" not in keys:
        raise ValueError(f"{keys['alpha']} has no matrices beside it; download the LoRA again")
    read = {name: in_memory(lora.tensors[key]) for name, key in keys.items()}
    down, up, config = read["lora_down"], read["lora_up"], lora.configs.get(_of_unet(lora.configs))
    scale = config.scale(path, len(down)) if config else 1.0
    scaled = (up.float() * (read["alpha"].item() / len(down) if "alpha" in read else scale)).to(up)
    if not scaled.float().isfinite().all():
        raise ValueError(f"{keys['lora_up']} overflows with alpha multiplied into it; convert the LoRA to fp32 first")
    return down, scaled


def convert_lora_file(path: Path | str, out: Path | str, model: Architecture, *, overwrite: bool = False) -> int:
    """Write a LoRA file as diffusers does, see `diffusers_lora`; returns the number of layers.

    The metadata is kept, except hashes of the tensors and the entries by which kohya's trainer, or peft, scales them.
    """
    header = read_header(path)
    try:
        tensors = diffusers_lora(header.tensors, model, header.metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    dropped = (*OF_ONE_FILE, KEY)
    kept = {key: text for key, text in header.metadata.items() if key not in dropped and not key.startswith("ss_network_")}
    write_tensors(out, tensors, kept, overwrite=overwrite)
    return len(tensors) // 2
