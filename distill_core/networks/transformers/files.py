"""Transformers on disk: ComfyUI's single files and diffusers folders, read and written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...base.documents import expect, numbers, one_line, parse_json, read_json
from ...base.modelspec import OF_ONE_FILE, modelspec
from ...base.settings import check_choice
from ...base.storage import CODES, Header, OnBytes, StoredTensor, atomic, ignore, read_header, write_tensors, write_text
from ..folders import CONFIG, WEIGHTS, check_place, folder_of, read_folder
from ..packed import QUANTISATION, packed_weight
from ..residuals import Rename
from .architecture import FAMILIES, Transformer

if TYPE_CHECKING:
    from torch import Tensor

_CONFIG = "config"
_WHERE = f"its metadata {QUANTISATION!r}"


@dataclass(frozen=True)
class TransformerFile:
    """A transformer on disk, described by its header; weights are read on demand, and as they are stored."""

    advice: ClassVar[str] = (
        "Its images suffer: look at them before you keep it. Distill Train Step in ComfyUI and distill train teach students of several "
        "families."
    )
    """What to do with a student."""
    path: Path
    prefix: str
    tensors: Mapping[str, StoredTensor]
    """Weights, scales and markers by name without the prefix."""
    architecture: Transformer
    dtype: str
    """Precision most of it is stored in: ``bf16``, ``f8_e4m3``, ..."""
    others: Mapping[str, StoredTensor] = field(default_factory=dict)
    """VAE and text encoders beside it, by their names in the file."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def save_student(
        self,
        path: Path | str,
        weights: Mapping[str, Tensor | StoredTensor],
        student: Transformer,
        *,
        layout: str,
        metadata: Mapping[str, str],
        rename: Rename,
        **writing: Any,
    ) -> None:
        """Write a student of this file's network; see `save_transformer`. rename: teacher's names to the student's."""
        if layout not in ("ldm", "checkpoint"):
            raise ValueError(
                "a single file of a transformer is cut into a single file; write the ldm layout, which ComfyUI opens, or cut the folder of "
                "diffusers"
            )
        if layout == "checkpoint" and not self.others:
            raise ValueError(f"{self.path} holds no VAE and text encoder to copy; write the ldm layout")
        whole = layout == "checkpoint"
        save_transformer(
            path,
            weights,
            student,
            prefix=self.prefix if whole else "",
            others=self.others if whole else None,
            metadata={**rewritten(self.metadata, self.architecture, student, rename, self.prefix, whole=whole), **metadata},
            **writing,
        )

    def loading_note(self, student: Transformer, layout: str) -> str:
        """What a person must know to open a student in ComfyUI; empty if its own loaders open it as it is."""
        return student.loading_note

    def describe(self) -> dict[str, Any]:
        """Summary of the network from its header, for scripts and people."""
        return {
            "file": str(self.path),
            "family": self.architecture.family,
            "layout": "comfyui" + (f", under the prefix {self.prefix}" if self.prefix else ""),
            "dtype": self.dtype,
            "quantised": self.architecture.quantised,
            "parameters": self.architecture.num_parameters,
            "with_other_models": bool(self.others),
            "blocks": self.architecture.describe_lists(),
        }


@dataclass(frozen=True)
class TransformerFolder(TransformerFile):
    """A transformer of diffusers on disk: weights in its own names, and the config that says what they are of."""

    config: Mapping[str, Any] = field(default_factory=dict)

    def save_student(
        self,
        path: Path | str,
        weights: Mapping[str, Tensor | StoredTensor],
        student: Transformer,
        *,
        layout: str,
        metadata: Mapping[str, str],
        rename: Rename,
        overwrite: bool = False,
        **writing: Any,
    ) -> None:
        """Write a student as a folder that ``from_pretrained`` of the same class opens. rename: teacher's names to the student's."""
        if layout != "diffusers":
            raise ValueError(
                f"{self.path.parent} is a diffusers folder, which is cut into one; write the diffusers layout, or cut the single file "
                "that ComfyUI opens"
            )
        check_place(Path(path))
        config = json.dumps(self.config_of(student, rename), indent=2)
        with atomic(path, overwrite=overwrite) as folder:
            folder.mkdir()
            save_transformer(folder / WEIGHTS, weights, student, metadata={**self.metadata, **metadata}, **writing)
            write_text(folder / CONFIG, config)

    def config_of(self, student: Transformer, rename: Rename) -> dict[str, Any]:
        """The config of a student. rename: teacher's names to the student's."""
        # from_config would take the lengths of lists that diffusers noted as defaults from the class again.
        config = {key: value for key, value in self.config.items() if key != "_use_default_values"}
        for blocks in student.of.lists:
            if blocks.depth_key in config or self.architecture.depths[blocks.word]:
                config[blocks.depth_key] = student.depths[blocks.word]
            if numbered := config.get(blocks.numbered_in):
                there = numbers(numbered, f"{blocks.numbered_in} in {self.path.parent / CONFIG}", (int,))
                renamed = (rename(f"{blocks.path}.{number}") for number in there)
                config[blocks.numbered_in] = [int(name.rpartition(".")[2]) for name in renamed if name is not None]
        if entries := config.get(student.of.entries_in):
            where, blocks_in_order = f"{student.of.entries_in} in {self.path.parent / CONFIG}", self.architecture.in_order
            if len(expect(entries, list, where)) != len(blocks_in_order):
                raise ValueError(f"{where} must have an entry for each of the {len(blocks_in_order)} blocks; download it again")
            config[student.of.entries_in] = [
                entry for entry, block in zip(entries, blocks_in_order, strict=True) if rename(block) is not None
            ]
        return config

    def loading_note(self, student: Transformer, layout: str) -> str:
        """diffusers counts the blocks by the config."""
        return ""

    def describe(self) -> dict[str, Any]:
        """See `TransformerFile.describe`."""
        return {**super().describe(), "layout": f"diffusers ({self.config['_class_name']})"}


def _find_folder(path: Path) -> TransformerFolder | None:
    """The transformer of a diffusers folder; None if ``path`` is no such folder, or that of another network.

    path: of a pipeline, of its folder of the transformer, or of a file of weights in that. ``ValueError`` as `find_transformer`.
    """
    folder = folder_of(path, "transformer")
    if folder is None or not (folder / CONFIG).exists():
        return None
    config = read_json(folder / CONFIG)
    kind = config.get("_class_name")
    family = next((family for family in FAMILIES.values() if kind in family.diffusers), None)
    if family is None:
        if "Transformer" in str(kind):
            known = sorted(kind for family in FAMILIES.values() if not family.refusal for kind in family.diffusers)
            raise ValueError(f"{folder}: {one_line(str(kind))} is not known here; these can be cut: {', '.join(known)}")
        return None
    if family.refusal:
        raise ValueError(f"{folder}: it is {family.title}, which cannot be cut: {family.refusal}")
    weights, header = read_folder(folder)
    try:
        shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
        architecture = Transformer(family.in_diffusers, shapes, packed_weight(header.tensors) is not None)
        _check_whole(architecture)
        return TransformerFolder(
            weights,
            "",
            tensors=header.tensors,
            architecture=architecture,
            dtype=_most_stored(header.tensors),
            metadata=header.metadata,
            config=config,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def find_transformer(path: Path) -> TransformerFile | None:
    """The transformer in a single file or a diffusers folder, read from its header; None if it holds none of a known family.

    ``ValueError`` in one sentence if the file is damaged, its family cannot be cut, or blocks are incomplete.
    """
    if (in_folder := _find_folder(path)) or not path.is_file():
        return in_folder
    header = read_header(path)
    try:
        return _find(path, header)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _find(path: Path, header: Header) -> TransformerFile | None:
    found = Transformer.find({name: _unpacked(name, header) for name in header.tensors})
    if found is None:
        return None
    architecture, prefix = found
    tensors = {name: header.tensors[prefix + name] for name in architecture.shapes}
    is_listed = any(architecture.holds(layer.removeprefix(prefix)) for layer in _quantised_layers(header.metadata))
    architecture = replace(architecture, packed=is_listed or packed_weight(tensors) is not None)
    _check_whole(architecture)
    return TransformerFile(
        path,
        prefix,
        tensors=tensors,
        architecture=architecture,
        dtype=_most_stored(tensors),
        others={name: tensor for name, tensor in header.tensors.items() if not name.startswith(prefix)} if prefix else {},
        metadata=header.metadata,
    )


def _check_whole(architecture: Transformer) -> None:
    try:
        architecture.check_whole()
    except ValueError as error:
        raise ValueError(f"the transformer is incomplete or damaged: {error}; download it again") from error


def _most_stored(tensors: Mapping[str, StoredTensor]) -> str:
    """Precision that takes the most bytes."""
    stored: Counter[str] = Counter()
    for tensor in tensors.values():
        stored[tensor.code] += tensor.num_bytes
    return stored.most_common(1)[0][0].lower()


def _unpacked(name: str, header: Header) -> tuple[int, ...]:
    """Shape of a weight; two numbers of four bits lie in a byte (nvfp4)."""
    tensor = header.tensors[name]
    is_packed = tensor.code == "U8" and name.endswith(".weight") and f"{name}_scale" in header.tensors
    return (*tensor.shape[:-1], 2 * tensor.shape[-1]) if is_packed and tensor.shape else tensor.shape


def open_transformer(path: Path | str) -> TransformerFile:
    """A transformer on disk, read from its header: a single file, or a diffusers folder.

    Raises ``ValueError`` in one sentence if it is damaged, or holds no transformer that can be cut.
    """
    if (file := find_transformer(Path(path))) is None:
        raise ValueError(f"{path}: it contains no transformer of a known family")
    return file


def save_transformer(
    path: Path | str,
    tensors: Mapping[str, Tensor | StoredTensor],
    architecture: Transformer,
    *,
    dtype: str | None = None,
    prefix: str = "",
    others: Mapping[str, StoredTensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    on_bytes: OnBytes = ignore,
) -> None:
    """Write a transformer as ComfyUI opens it, one tensor in memory at a time.

    tensors: weights, scales and markers by name. dtype: ``fp16``, ``bf16``, ``fp32``, or None to keep what is there; a quantised
    network keeps what is there. prefix, others: of a full checkpoint. metadata: entries of the header, see `rewritten`.
    """
    if dtype is not None:
        check_choice(dtype, CODES, "unknown dtype")
    if dtype is not None and architecture.quantised:
        raise ValueError("the weights of a quantised transformer can only be copied; leave the precision as it is")
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    codes = dict.fromkeys(named, CODES[dtype]) if dtype else {}
    header = {**modelspec(path, architecture.family), **(metadata or {})}
    write_tensors(path, {**(others or {}), **named}, header, codes=codes, overwrite=overwrite, on_bytes=on_bytes)


def stated(config: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of a file that tell ComfyUI what a network is made of. config: as ComfyUI knows it; what is no JSON is left out."""
    plain = {
        key: value for key, value in config.items() if value is None or isinstance(value, (bool, int, float, str, list, tuple))
    }
    return {_CONFIG: json.dumps({"transformer": plain})}


def rewritten(
    metadata: Mapping[str, str],
    teacher: Transformer,
    student: Transformer,
    rename: Rename,
    prefix: str = "",
    *,
    whole: bool = False,
) -> dict[str, str]:
    """A teacher's metadata made true of its student: lengths of lists, and the layers that are named in it; not what is its alone.

    ComfyUI believes both before it looks at the tensors. rename: teacher's name -> student's, None for what is removed. prefix: of the
    teacher's layers. whole: the student keeps it, and the models beside it. ``ValueError`` if the metadata cannot be read.
    """
    changed = {key: text for key, text in metadata.items() if key not in OF_ONE_FILE}
    if _CONFIG in changed:
        config = parse_json(changed[_CONFIG], "its metadata 'config'")
        if isinstance(of_network := config.get("transformer"), dict):
            lengths = {blocks.depth_key: student.depths[blocks.word] for blocks in student.of.lists}
            config["transformer"] = of_network | {key: length for key, length in lengths.items() if key in of_network}
            changed[_CONFIG] = json.dumps(config)

    def renamed(layer: str) -> str | None:
        bare = layer.removeprefix(prefix)
        if not teacher.holds(bare):
            return layer if whole else None
        new = rename(bare)
        return new and (prefix if whole else "") + new

    if layers := _quantised_layers(metadata):
        table = parse_json(metadata[QUANTISATION], _WHERE)
        table["layers"] = {new: how for layer, how in layers.items() if (new := renamed(layer)) is not None}
        changed[QUANTISATION] = json.dumps(table)
    return changed


def _quantised_layers(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The layers that a file's metadata list as quantised, and how; ``ValueError`` if they cannot be read."""
    layers = parse_json(metadata.get(QUANTISATION, "{}"), _WHERE).get("layers")
    return layers if isinstance(layers, dict) else {}
