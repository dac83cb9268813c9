"""Conversion of a LoRA made for a transformer into one for a student cut from it: only the numbers of blocks change.

Trainers spell the layers of one transformer in many ways, kohya's ``lora_unet_double_blocks_0_img_attn_qkv`` and diffusers'
``transformer.transformer_blocks.0.attn.to_q`` among them. In all of them a layer of a block begins with the list of blocks
and a number, behind a prefix. So the number is replaced, the rest is kept, and whatever reads the LoRA on the teacher reads it
on the student; that diffusers' ``to_q`` is a third of a fused weight is the reader's concern.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from ..base.modelspec import OF_ONE_FILE
from ..networks.name_map import NameMap
from ..networks.transformers.architecture import FAMILIES, Transformer
from ..networks.transformers.family import Family
from .metadata import KEY, PeftConfig, alpha_of, read_configs
from .remapped import UNET_BLOCKS, Remapped, layer_of
from .tensors import check_adapter, check_finite, check_fit, check_products, check_tensor, in_memory, role, widened

if TYPE_CHECKING:
    from .remapped import Weight

_PREFIXES = (
    "base_model.model.unet.", "unet.base_model.model.", "base_model.model.", "model.diffusion_model.", "diffusion_model.",
    "transformer.", "lora_transformer_", "lora_unet__", "lora_unet_", "lycoris_", "",
)  # fmt: skip
"""What stands before the name of a layer; the first that fits counts."""
_TEXT_ENCODERS = ("lora_te", "text_encoder", "text_model", "clip_", "t5xxl", "lora_clip", "lora_t5")
"""How keys of text encoders begin."""
_XLABS = {
    ".qkv_lora1.": ".img_attn.qkv.lora_",
    ".qkv_lora2.": ".txt_attn.qkv.lora_",
    ".proj_lora1.": ".img_attn.proj.lora_",
    ".proj_lora2.": ".txt_attn.proj.lora_",
    ".qkv_lora.": ".linear1_qkv.lora_",
    ".proj_lora.": ".linear2.lora_",
}
"""Part of a key of XLabs' trainer -> ComfyUI's. ComfyUI knows such a file by the teacher's last blocks, so the keys are translated."""


_OUTPUTS = ("lora_up", "diff", "diff_b")
"""Tensors whose rows are a layer's outputs."""


class _Place(NamedTuple):
    """Where a key of a LoRA belongs."""

    key: str
    """Translated, if it was of XLabs."""
    block: str | None
    """Block of a list, as files call it; None for what is in none."""
    head: str
    """What stands before the number."""
    rest: str
    """What follows the number."""
    is_swapped: bool = False
    """Whether the reader of the teacher's LoRA would swap the halves of its output, and that of a student's would not."""


class _Reader:
    """Finds the blocks that keys of a LoRA belong to, in one transformer."""

    def __init__(self, teacher: Transformer):
        self.teacher = teacher
        self.paths = _heads(teacher.of)
        heads = {*UNET_BLOCKS}.union(*map(_heads, FAMILIES.values()))
        self.all_heads = "|".join(sorted(heads, key=len, reverse=True))

    def place(self, key: str) -> _Place:
        """``ValueError`` for a key of a block that the teacher does not have, or of another network."""
        key = _of_xlabs(key)
        prefix = next(prefix for prefix in _PREFIXES if key.startswith(prefix))
        match = re.match(rf"({self.all_heads})([._])([0-9]{{1,4}})(?=[._])", key[len(prefix) :])
        if key.startswith(_TEXT_ENCODERS) or not match:
            return _Place(key, None, key, "")
        path, number = self.paths.get(match[1]), int(match[3])
        if path is None or f"{path}.{number}" not in self.teacher.blocks:
            raise ValueError(
                f"the teacher has no block for {key}: this LoRA was made for another model than {self.teacher.title} of this depth, or "
                "the given teacher is already cut; give the full model the LoRA was made for"
            )
        end = len(prefix) + match.end()
        if swapped := self._last_swapped(path, number, key[end:]):
            return _Place(key, f"{path}.{number}", f"diffusion_model.{path}.", swapped, is_swapped=True)
        return _Place(key, f"{path}.{number}", key[: end - len(match[3])], key[end:])

    def _last_swapped(self, path: str, number: int, rest: str) -> str | None:
        """The rest of a key in ComfyUI's spelling, for the layer of the last block that diffusers has the other way round."""
        names = self.teacher.lists[path].last_swapped if path in self.teacher.lists else None
        if names is None or number != self.teacher.numbers(path)[-1]:
            return None
        theirs, ours = names
        match = re.match(rf"[._]{theirs.replace('.', '[._]')}(?=[._])", rest)
        return match and f".{ours}{rest[match.end() :]}"

    @cached_property
    def layers(self) -> dict[str, str]:
        """Name of a layer as a key may spell it -> the layer."""
        layers = {name.rpartition(".")[0] for name in self.teacher.shapes}
        return {layer.replace(".", "_"): layer for layer in layers} | {layer: layer for layer in layers}

    def layer(self, name: str) -> str | None:
        """The teacher's layer that a key's layer means if it is spelled as in ComfyUI's files; None for other spellings."""
        return next((self.layers.get(name[len(prefix) :]) for prefix in _PREFIXES if name.startswith(prefix)), None)


def _heads(family: Family) -> dict[str, str]:
    """What files and diffusers call the lists of a family -> what files call them."""
    beside = {family.beside: family.beside} if family.beside else {}
    return beside | {head: blocks.path for blocks in family.lists for head in (blocks.path, blocks.diffusers) if head}


def _of_xlabs(key: str) -> str:
    if ".processor." in key:
        for theirs, ours in _XLABS.items():
            if theirs in key:
                return "diffusion_model." + key.replace(".processor", "").replace(theirs, ours)
    return key


def remap_on_blocks(
    tensors: Mapping[str, Weight], teacher: Transformer, mapping: NameMap, *, metadata: Mapping[str, str] | None = None
) -> Remapped:
    """A transformer's LoRA with blocks renumbered as the student's, without those of removed blocks.

    Layers outside the blocks stay. A strength in peft's configuration, which ComfyUI does not read, is multiplied into the matrices
    of a plain LoRA, and written as an alpha for other kinds. Raises ``ValueError`` if the LoRA was not made for the teacher, is damaged, or if nothing of it is left.
    """
    reader, configs = _Reader(teacher), read_configs(metadata or {})
    places = {key: reader.place(key) for key in tensors}
    if not any(place.block for place in places.values()):
        raise ValueError(
            f"this LoRA was not made for the teacher: none of its tensors belongs to a block of {teacher.title}; "
            f"its first is {next(iter(tensors), 'missing, because the file is empty')}"
        )
    check_adapter(tensors)
    layers = _by_layer(places)
    goes = {name for name, keys in layers.items() if _goes(keys, places[next(iter(keys.values()))], mapping)}
    of_text = {name for name in layers if name.startswith(_TEXT_ENCODERS)}
    kept: dict[str, Weight] = {}
    for name in [name for name in layers if name not in goes]:
        _check(name, layers[name], tensors, reader)
        alpha = _alpha(name, layers[name], tensors, configs)
        renamed = {key: _renamed(places[key], mapping) for key in layers[name].values()}
        for role_of, key in layers[name].items():
            kept[renamed[key]] = _changed(tensors[key], role_of, alpha, places[key].is_swapped)
        if alpha is not None and "lora_up" not in layers[name]:
            kept |= _alpha_tensor(layer_of(next(iter(renamed.values()))), alpha)
    if not (num_kept := len(layers.keys() - goes - of_text)):
        raise ValueError(
            f"nothing is left of this LoRA: all {len(goes)} layers it changes belong to blocks the student does not have; "
            "use one that changes more of the model"
        )
    return Remapped(
        kept,
        num_kept=num_kept,
        num_dropped=len(goes),
        num_text_encoder=len(of_text),
        switched_to_ldm=False,
        metadata={key: text for key, text in (metadata or {}).items() if key not in (*OF_ONE_FILE, KEY)},
    )


def _by_layer(places: Mapping[str, _Place]) -> dict[str, dict[str, str]]:
    """Layer -> role of each of its tensors -> key; ``ValueError`` for a place that occurs twice."""
    layers: dict[str, dict[str, str]] = {}
    for key, place in places.items():
        name = layer_of(place.key)
        other = layers.setdefault(name, {}).setdefault(role(place.key[len(name) :]), key)
        if other != key:
            raise ValueError(f"{key}: this LoRA has two tensors for one place ({other}); keep one of them")
    return layers


def _goes(keys: Mapping[str, str], place: _Place, mapping: NameMap) -> bool:
    """Whether a layer is left out: its block is gone, or its halves would have to be swapped in what is no plain LoRA."""
    gone = place.block is not None and mapping.rename(place.block) is None
    return gone or (place.is_swapped and not keys.keys() <= {*_OUTPUTS, "lora_down", "alpha"})


def _renamed(place: _Place, mapping: NameMap) -> str:
    """The student's key."""
    block = mapping.rename(place.block) if place.block else None
    return place.key if block is None else place.head + block.rpartition(".")[2] + place.rest


def _changed(tensor: Weight, role_of: str, alpha: float | None, is_swapped: bool) -> Weight:
    """A tensor with the layer's strength multiplied into its output side, and its halves swapped."""
    if role_of == "lora_up" and alpha is not None and alpha != tensor.shape[1]:
        tensor = (in_memory(tensor).float() * (alpha / tensor.shape[1])).to(in_memory(tensor))
    if role_of in _OUTPUTS and is_swapped:
        tensor = in_memory(tensor).roll(len(in_memory(tensor)) // 2, 0)
    return tensor


def _check(name: str, keys: Mapping[str, str], tensors: Mapping[str, Weight], reader: _Reader) -> None:
    """``ValueError`` for tensors of a layer that are damaged, or do not fit the teacher's, as far as its shape is known."""
    for role_of, key in keys.items():
        check_tensor(key, role_of, tensors[key])
    shapes = {role_of: tuple(tensors[key].shape) for role_of, key in keys.items()}
    layer = None if reader.teacher.quantised else reader.layer(name)
    weight = None if layer is None else reader.teacher.shapes.get(f"{layer}.weight")
    if weight is None:
        check_products(keys, shapes)
    else:
        check_fit(keys, shapes, widened(weight, keys, tensors), reader.teacher.shapes.get(f"{layer}.bias"))
    for key in keys.values():
        check_finite(key, tensors[key])


def _alpha(name: str, keys: Mapping[str, str], tensors: Mapping[str, Weight], configs: Mapping[str, PeftConfig]) -> float | None:
    """The alpha of a layer by peft's configuration; None without one, or if a tensor says it."""
    network, _, path = name.partition(".")
    if network not in configs:
        network, path = "", name
    return alpha_of(configs.get(network), path, keys, {role_of: tuple(tensors[key].shape) for role_of, key in keys.items()})


def _alpha_tensor(layer: str, alpha: float) -> dict[str, Weight]:
    import torch

    return {f"{layer}.alpha": torch.tensor(alpha)}
