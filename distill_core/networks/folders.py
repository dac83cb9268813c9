"""Folders of diffusers: one network, whole or in shards, beside its config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..base.documents import MAX_LIST_BYTES, one_line, read_json
from ..base.storage import Header, StoredTensor, read_header

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def folder_of(path: Path, kind: str) -> Path | None:
    """Folder of a network, None if ``path`` is a file elsewhere. path: of a pipeline, of that folder, or of a file of weights in it.

    kind: what a pipeline calls the network: ``unet``, ``transformer``.
    """
    if path.is_dir():
        return path / kind if (path / kind).is_dir() else path
    of_diffusers = path.name.startswith(WEIGHTS.partition(".")[0]) and (path.parent / CONFIG).exists()
    return path.parent if of_diffusers else None


def read_folder(folder: Path) -> tuple[Path, Header]:
    """Weights of a diffusers folder, whole or in shards; a variant such as fp16 if there is no other."""
    stem = WEIGHTS.removesuffix(".safetensors")
    variants = [path for path in sorted(folder.glob(f"{stem}.*.safetensors")) if not _SHARD.search(path.name)]
    indices = sorted(folder.glob(f"{WEIGHTS}.index.*.json"))
    found = [path for path in (folder / WEIGHTS, folder / f"{WEIGHTS}.index.json", *variants, *indices) if path.exists()]
    if not found:
        raise ValueError(f"{folder} holds no {WEIGHTS}; give a model in the safetensors format")
    return found[0], _read_shards(found[0]) if found[0].suffix == ".json" else read_header(found[0])


def _read_shards(index: Path) -> Header:
    """All tensors that an index names, each from its shard."""
    weight_map = read_json(index, max_bytes=MAX_LIST_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} names no shards; download it again")
    headers = {shard: read_header(index.parent / Path(shard).name) for shard in sorted(set(map(str, weight_map.values())))}
    if missing := [name for name, shard in weight_map.items() if name not in headers[str(shard)].tensors]:
        raise ValueError(f"{weight_map[missing[0]]} lacks {missing[0]}, which {index.name} says it holds; download it again")
    tensors = {name: headers[str(shard)].tensors[name] for name, shard in weight_map.items()}
    return Header(tensors, next(iter(headers.values())).metadata)


def stored_in(folder: Path) -> tuple[str | None, dict[str, StoredTensor]]:
    """The variant of a network of diffusers or transformers that is read, and its weights: one such as fp16 if there is no other."""
    by_variant: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        _, _, variant = _SHARD.sub("", file.name).removesuffix(".safetensors").partition(".")
        by_variant.setdefault(variant, []).append(file)
    if not by_variant:
        raise ValueError(f"{folder} holds no .safetensors file; download the model in that format")
    variant = min(by_variant)  # the one without a name, if there is one
    return variant or None, {name: tensor for file in by_variant[variant] for name, tensor in read_header(file).tensors.items()}


def open_module(kind: Any, folder: Path, dtype: Any = None) -> Any:
    """A network of diffusers or transformers, frozen, in evaluation mode.

    kind: its class. dtype: of torch, or ``"auto"`` for the stored one; None leaves it to the library. ``ValueError`` if weights are
    missing or damaged.
    """
    variant, _ = stored_in(folder)
    options: dict[str, Any] = dict(local_files_only=True, use_safetensors=True, output_loading_info=True)
    if dtype is not None:
        options["torch_dtype"] = dtype
    try:
        model, info = kind.from_pretrained(folder, variant=variant, **options)
    except Exception as error:  # the libraries raise many kinds of errors
        raise ValueError(f"{folder} cannot be opened ({one_line(error)}); download it again") from error
    if missing := info["missing_keys"]:
        raise ValueError(f"{folder} lacks {len(missing)} weights, such as {min(missing)}; download it again")
    return model.eval().requires_grad_(False)


def check_place(folder: Path) -> None:
    """``ValueError`` for a diffusers folder where ComfyUI's loaders would list it, because they misread such students."""
    place = re.search(r"(^|/)(diffusion_models|checkpoints|models/unet)(/|$)", folder.absolute().as_posix())
    if place:
        raise ValueError(
            f"ComfyUI lists every .safetensors file under {place[2]}, and misreads students in the diffusers layout; "
            "write the ldm layout there, or choose another folder for the diffusers layout"
        )
