"""Weight files: what is in them, and writing them so that nothing half-written is left behind. safetensors only."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .architecture import Architecture
from .layouts import find_unet, layout
from .plan import PruningPlan

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_MODELSPEC_PREDICTIONS = {"eps": "epsilon", "v": "v", "x0": "sample"}
_MODELSPEC_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
OVERWRITABLE = {"config.json", DIFFUSERS_WEIGHTS, "student.safetensors", "optimizer.safetensors"}
"""What a folder may hold to be overwritten: what we write into folders ourselves."""


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UNetFile:
    """A UNet on disk, known by its header; weights are read one by one when asked for."""

    path: Path
    spelling: str
    """Layout the file is written in: a key of `layouts.LAYOUTS`."""
    prefix: str
    names: Mapping[str, str]
    """Canonical parameter name -> name in the file."""
    architecture: Architecture
    dtype: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def prediction(self) -> str:
        """Key of `schedule.PREDICTIONS`, from the metadata; ``eps`` where the file does not say."""
        names = {theirs: ours for ours, theirs in _MODELSPEC_PREDICTIONS.items()}
        return names.get(self.metadata.get("modelspec.prediction_type"), "eps")

    @property
    def plan(self) -> PruningPlan | None:
        """Plan the file was pruned with, if it was pruned here."""
        return PruningPlan.from_json(text) if (text := self.metadata.get("distill.plan")) else None

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """All weights by canonical name, in the dtype of the file, and independent of it: the file may go."""
        with _open(self.path) as file:
            return {name: file.get_tensor(theirs).clone() for name, theirs in self.names.items()}


def open_unet(path: Path | str) -> UNetFile:
    """Read the header of a UNet: a single file in either layout, or a diffusers folder.

    Raises ``ValueError`` in one sentence if it is not there, is no safetensors file, is damaged, or holds no UNet.
    """
    path = Path(path)
    config = {}
    if path.is_dir():
        folder = path / "unet" if (path / "unet").is_dir() else path
        if (folder / "config.json").exists():
            config = _read_config(folder / "config.json")
        path = folder / DIFFUSERS_WEIGHTS
    with _open(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        metadata = file.metadata() or {}
        try:
            spelling, prefix = find_unet(shapes)
            shapes = {name: shape for name, shape in shapes.items() if name.startswith(prefix) or not prefix}
            architecture = Architecture.from_state_dict(shapes, _head_channels(metadata, config))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        bare = [name.removeprefix(prefix) for name in shapes]
        canonical = layout(spelling).to_canonical(bare)
        dtype = str(file.get_slice(next(iter(shapes))).get_dtype()).lower()
    names = {canonical[name]: prefix + name for name in bare}
    return UNetFile(path, spelling, prefix, names, architecture, dtype, metadata)


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["block_out_channels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the config of a diffusers UNet ({error!r}); get it again") from error
    return config


def _head_channels(metadata: Mapping[str, str], config: Mapping) -> int | None:
    """Channels of a head from our own metadata, or from a diffusers config; None where neither says or all have eight heads.

    diffusers' ``attention_head_dim`` is, despite its name, the number of heads of each stage.
    """
    if "distill.head_channels" in metadata:
        return int(metadata["distill.head_channels"])
    heads = config.get("num_attention_heads") or config.get("attention_head_dim")
    if heads is None:
        return None
    widths = config["block_out_channels"]
    heads = heads if isinstance(heads, list) else [heads] * len(widths)
    if set(heads) == {8}:
        return None
    head_channels = {width // number for width, number in zip(widths, heads, strict=True)}
    if len(head_channels) > 1:
        raise ValueError(f"its attentions have {heads} heads, neither eight each nor heads of one width")
    return head_channels.pop()


@contextlib.contextmanager
def _open(path: Path) -> Iterator:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        raise ValueError(f"{path} is a pickle checkpoint, which can run code when opened; convert it to .safetensors first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if start in (b"PK", b"\x80\x02"):
            raise ValueError(f"{path} is a pickle checkpoint despite its name; convert it to .safetensors first") from error
        raise ValueError(f"{path} is not a safetensors file, or is cut short or damaged ({error}); get it again") from error


# --- writing --------------------------------------------------------------------------------------------------------


class WriteError(OSError):
    """Something could not be written; one sentence says what and why."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"cannot write {path}: {reason}; free some space or choose another folder")
        self.reason = reason


@contextlib.contextmanager
def atomic(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path``, and move what was made there into place once it is whole.

    Whatever goes wrong, nothing half-written is left. Raises ``ValueError`` if ``path`` exists and may not be
    overwritten, ``OSError`` in one sentence if it cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; choose another name or allow overwriting")
    if path.is_dir() and not {p.name for p in path.iterdir()} <= OVERWRITABLE:
        raise ValueError(f"{path} is a folder with other things in it, which overwriting would delete; choose another name")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        made = temporary / path.name
        yield made
        replaced = path.rename(temporary / "replaced") if path.is_dir() else None
        try:
            os.replace(made, path)
        except OSError:
            if replaced is not None:
                replaced.rename(path)
            raise
    except (OSError, SafetensorError) as error:
        raise WriteError(path, getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path | str, text: str, *, overwrite: bool = True) -> None:
    with atomic(path, overwrite=overwrite) as made:
        made.write_bytes(text.encode())


def write_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, overwrite: bool = False
) -> None:
    """Write a safetensors file, contiguous and durable."""
    with atomic(path, overwrite=overwrite) as made:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        made.touch()
        mode = made.stat().st_mode  # safetensors makes files only their owner may read
        save_file(contiguous, made, {"format": "pt", **(metadata or {})})
        made.chmod(mode)
        with open(made, "r+b") as file:
            os.fsync(file.fileno())


def save_unet(
    path: Path | str,
    state_dict: Mapping[str, Tensor],
    architecture: Architecture,
    *,
    spelling: str = "ldm",
    dtype: str | None = None,
    prediction: str = "eps",
    title: str = "",
    plan: PruningPlan | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a UNet so that others can open it.

    state_dict: weights by canonical name. spelling: ``ldm`` writes one file with bare LDM names, which ComfyUI's "Load
    Diffusion Model" opens; ``diffusers`` writes a folder for ``UNet2DConditionModel.from_pretrained``. dtype: ``fp16``,
    ``bf16``, ``fp32``, or None to keep what is there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose from {sorted(DTYPES)}")
    names = layout(spelling).from_canonical(architecture.shapes)
    tensors = {names[name]: weight.to(DTYPES.get(dtype, weight.dtype)) for name, weight in state_dict.items()}
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _MODELSPEC_ARCHITECTURES.get(architecture.family, "unet"),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title or Path(path).stem,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.prediction_type": _MODELSPEC_PREDICTIONS[prediction],
        **({"distill.head_channels": str(architecture.head_channels)} if architecture.head_channels else {}),
        **({"distill.plan": plan.to_json()} if plan else {}),
        **(metadata or {}),
    }
    if spelling == "ldm":
        write_tensors(path, tensors, header, overwrite=overwrite)
        return
    from .unet import diffusers_config

    with atomic(path, overwrite=overwrite) as folder:
        folder.mkdir()
        write_tensors(folder / DIFFUSERS_WEIGHTS, tensors, header)
        write_text(folder / "config.json", json.dumps(diffusers_config(architecture), indent=2))
