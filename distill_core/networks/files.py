"""UNets on disk: reading files, and writing files that other tools open."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..base.documents import one_line, read_json
from ..base.modelspec import modelspec
from ..base.settings import check_choice
from ..base.storage import CODES, Header, OnBytes, StoredTensor, atomic, ignore, read_header, write_tensors, write_text
from .architecture import Architecture
from .diffusers_config import diffusers_config, kept_settings
from .folders import WEIGHTS, check_place, folder_of, read_folder
from .layouts import find_unet, layout_named, what_else
from .model_sampling import SD2_V_SIGN, SD2_V_SIGN_LDM, STABLE_DIFFUSION, ModelSampling, is_marker, read_sampling
from .packed import packed_weight
from .residuals import Rename
from .transformers.architecture import Transformer

if TYPE_CHECKING:
    from torch import Tensor

FILE_LAYOUTS = {
    "ldm": "one file with bare LDM names, for ComfyUI's models/diffusion_models",
    "checkpoint": "one file with VAE and text encoder too, for ComfyUI's models/checkpoints",
    "diffusers": "a folder for UNet2DConditionModel.from_pretrained",
}
"""Forms in which a student can be written."""
ORIGIN = ("distill.plan", "distill.teacher", "distill.skips", "distill.padding")
"""Metadata that says what a student was pruned from; files made from the student carry it too."""
_FULL_PREFIX = "model.diffusion_model."
_QUANTISED = "is quantised in a way that is not supported; use the fp16 or fp8 version of the model"
_EIGHT_HEADS = "eight heads"
_CARRIED = ("author", "license", "resolution", "tags", "trigger_phrase", "usage_hint")
"""ModelSpec fields of a teacher that also hold for its student."""
_MODELSPEC_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}
_UNCLIP_WIDTHS = (1536, 2048)
"""Widths of the image vectors that unCLIP models take where SDXL takes its label; diffusers names that part otherwise."""
_BESIDE = {"VAE": ("first_stage_model.",), "text encoder": ("cond_stage_model.", "conditioner.")}
"""Other parts of a full checkpoint -> prefixes of their tensors."""


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UNetFile:
    """A UNet on disk, described by its header; weights are read on demand."""

    advice: ClassVar[str] = "Distil the student next: directly after pruning its images are poor."
    """What to do with a student."""
    path: Path
    layout: str
    """Layout the file is written in: a key of `layouts.LAYOUTS`."""
    prefix: str
    names: Mapping[str, str]
    """Canonical parameter name -> name in the file."""
    tensors: Mapping[str, StoredTensor]
    """Weights by canonical name, not read yet."""
    architecture: Architecture
    dtype: str
    """Precision most weights are stored in: ``f16``, ``bf16``, ``f32``, ``f8_e4m3``, ..."""
    sampling: ModelSampling = STABLE_DIFFUSION
    """How the network is sampled; as Stable Diffusion 1 unless the file says otherwise."""
    others: Mapping[str, StoredTensor] = field(default_factory=dict)
    """VAE and text encoders of a full checkpoint, by their names in the file."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of its diffusers config, those that hold for a student too; see `diffusers_config.kept_settings`."""

    @property
    def prediction(self) -> str:
        """What the network predicts."""
        return self.sampling.prediction

    @property
    def markers(self) -> dict[str, Tensor]:
        """Marker tensors that give ComfyUI its sampling."""
        return self.sampling.markers(self.architecture.family)

    @property
    def origin(self) -> dict[str, str]:
        """Metadata on the teacher it was pruned from, by the keys of `ORIGIN`."""
        return {key: text for key, text in self.metadata.items() if key in ORIGIN}

    @property
    def is_whole_checkpoint(self) -> bool:
        """Whether it also holds VAE and text encoder."""
        return all(any(name.startswith(prefixes) for name in self.others) for prefixes in _BESIDE.values())

    def save_student(
        self,
        path: Path | str,
        weights: Mapping[str, Tensor | StoredTensor],
        student: Architecture,
        *,
        layout: str,
        metadata: Mapping[str, str],
        rename: Rename,
        **writing: Any,
    ) -> None:
        """Write a student of this file's network, sampled as it is; see `save_unet`. rename: teacher's names to the student's."""
        if layout == "checkpoint" and not self.is_whole_checkpoint:
            raise ValueError(f"{self.path} holds no VAE and text encoder to copy; write the ldm layout")
        carried = {key: text for name in _CARRIED if (text := self.metadata.get(key := f"modelspec.{name}"))}
        save_unet(
            path,
            weights,
            student,
            layout=layout,
            sampling=self.sampling,
            others=self.others,
            metadata={**carried, **metadata},
            settings=self.settings,
            **writing,
        )

    def loading_note(self, student: Architecture, layout: str) -> str:
        """What a person must know to open a student in ComfyUI; empty if its own loaders open it as it is."""
        in_channels, _ = student.channels("conv_in")
        return "" if layout == "diffusers" else self.sampling.loading_note(student.family, in_channels)

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """All weights by canonical name, in the precision of the file, copied into memory: the file may be deleted."""
        return {name: tensor.read() for name, tensor in self.tensors.items()}

    def describe(self) -> dict[str, Any]:
        """Summary of the network from its header, for scripts and people."""
        architecture = self.architecture
        return {
            "file": str(self.path),
            "family": architecture.family,
            "layout": self.layout + (f", under the prefix {self.prefix}" if self.prefix else ""),
            "dtype": self.dtype,
            "prediction": self.prediction,
            "sampling": self.sampling.describe(),
            "parameters": architecture.num_parameters,
            "context_width": architecture.context_width,
            "with_vae_and_text_encoder": self.is_whole_checkpoint,
            "mid": "none"
            if "mid.resnet.0" not in architecture.modules
            else f"transformer depth {architecture.depth('mid.attn.0')}",
            "stages": [
                {
                    "name": stage,
                    "channels": architecture.channels(f"{stage}.resnet.0")[1],
                    "resnets": len(numbers := architecture.numbers(f"{stage}.resnet")),
                    "transformer_depth": [architecture.depth(f"{stage}.attn.{j}") for j in numbers],
                }
                for stage in (*architecture.stages("down"), *architecture.stages("up"))
            ],
        }


def open_unet(path: Path | str) -> UNetFile:
    """A UNet on disk, read from its header: a single file in either layout, or a diffusers folder.

    Raises ``ValueError`` in one sentence if it does not exist, is not a safetensors file, is damaged, or holds no UNet.
    """
    path = Path(path)
    config: dict[str, Any] = {}
    scheduler: dict[str, Any] = {}
    folder = folder_of(path, "unet")
    if folder is not None:
        config = _read_config(folder / "config.json") if (folder / "config.json").exists() else {}
        scheduler_file = folder.parent / "scheduler" / "scheduler_config.json"
        scheduler = read_json(scheduler_file) if scheduler_file.exists() else {}
    if folder is not None and path.is_dir():
        path, header = read_folder(folder)
    else:
        header = read_header(path)
    try:
        return _find(path, header, config, scheduler)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _find(path: Path, header: Header, config: Mapping, scheduler: Mapping) -> UNetFile:
    if found_transformer := Transformer.find({name: tensor.shape for name, tensor in header.tensors.items()}):
        title = found_transformer[0].of.title
        raise ValueError(
            f"it is {title}, a transformer, and this takes UNets; distill prune, train and remap-lora take transformers, and so do nodes"
        )
    layout, prefix = find_unet(header.tensors)
    markers = {name: tensor for name, tensor in header.tensors.items() if is_marker(name)}
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in header.tensors.items()
        if name.startswith(prefix) and name not in markers
    }
    written_sign = found.get(SD2_V_SIGN_LDM)
    if written_sign is not None and written_sign.shape == (2,):  # a marker, not a weight
        del found[SD2_V_SIGN_LDM]
    found = _unscaled(found)
    if other := what_else(found):
        raise ValueError(f"it is {other}; only UNets of SD1.x, SD2 and SDXL are supported")
    canonical = layout_named(layout).to_canonical(found)
    tensors = {canonical[name]: tensor for name, tensor in found.items()}
    architecture = Architecture.from_state_dict(found, _head_channels(header.metadata, config))
    if layout == "ldm" and architecture.label_width in _UNCLIP_WIDTHS:
        raise ValueError("it is an SD2 unCLIP, which reads images; only UNets of SD1.x, SD2 and SDXL are supported")
    _check_whole(architecture, layout)
    sign = None
    if architecture.family == "sd2" and architecture.channels("conv_in")[0] == 4:  # SD2 for inpainting predicts noise
        sign = tensors.get(SD2_V_SIGN) if SD2_V_SIGN_LDM in found or written_sign is None else written_sign
    beside = tuple(prefix for prefixes in _BESIDE.values() for prefix in prefixes) if prefix else ()
    return UNetFile(
        path,
        layout,
        prefix,
        names={canonical[name]: prefix + name for name in found},
        tensors=tensors,
        architecture=architecture,
        dtype=Counter(tensor.code for tensor in tensors.values()).most_common(1)[0][0].lower(),
        sampling=read_sampling(markers, scheduler, header.metadata, sign),
        others={name: header.tensors[name] for name in sorted(header.tensors) if name.startswith(beside)} if beside else {},
        metadata=header.metadata,
        settings=kept_settings(config),
    )


def _check_whole(architecture: Architecture, layout: str) -> None:
    """``ValueError`` unless the UNet is complete; it names missing parameters as the file would."""
    if missing := architecture.missing_parameters():
        name = layout_named(layout).from_canonical([*architecture.shapes, *missing])[missing[0]]
        more = f", and {len(missing) - 1} more parameters" if missing[1:] else ""
        raise ValueError(f"the UNet is incomplete: {name} is missing{more}; download it again")
    try:
        architecture.check_whole()
    except ValueError as error:
        raise ValueError(f"the UNet is incomplete or damaged: {error}; download it again") from error


def _unscaled(found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Scaled fp8 weights joined with their scales; ``ValueError`` for other ways of quantising."""
    plain, scales = {}, {}
    for name, tensor in found.items():
        layer, _, last = name.rpartition(".")
        if last in ("weight_scale_2", "pre_quant_scale"):
            raise ValueError(f"{layer}.weight {_QUANTISED}")
        if last in ("scale_weight", "weight_scale"):
            scales[f"{layer}.weight"] = tensor
        elif last not in ("scaled_fp8", "scale_input", "input_scale", "comfy_quant"):
            plain[name] = tensor
    for name, scale in scales.items():
        if name not in plain or not plain[name].code.startswith("F8") or scale.shape not in ((), (1,)):
            raise ValueError(f"{name} {_QUANTISED}")
        plain[name] = StoredTensor(**{**vars(plain[name]), "scale": scale})
    if weight := packed_weight(plain):
        raise ValueError(f"{weight} {_QUANTISED}")
    return plain


def _read_config(path: Path) -> dict:
    config = read_json(path)
    widths, heads = config.get("block_out_channels"), config.get("num_attention_heads") or config.get("attention_head_dim") or 8
    numbers = [widths, heads if isinstance(heads, list) else [heads]]
    if not all(isinstance(row, list) and row and all(type(n) is int and n > 0 for n in row) for row in numbers):
        raise ValueError(f"{path} is not the config of a diffusers UNet; download it again")
    if isinstance(heads, list) and len(heads) != len(widths):
        raise ValueError(f"{path} gives attention heads for {len(heads)} stages, but has {len(widths)} stages; download it again")
    return config


def _head_channels(metadata: Mapping[str, str], config: Mapping) -> int | Literal["unknown"] | None:
    """Channels of a head, from our own metadata or a diffusers config; None if all attentions have eight heads of any width.

    diffusers' ``attention_head_dim`` is, despite its name, the number of heads of each stage.
    """
    if "distill.head_channels" in metadata:
        if metadata["distill.head_channels"] == _EIGHT_HEADS:
            return None
        if not re.fullmatch("[1-9][0-9]{0,5}", text := metadata["distill.head_channels"]):
            raise ValueError(f"its metadata gives an invalid head size {one_line(text)!r}; prune the teacher again")
        return int(text)
    heads = config.get("num_attention_heads") or config.get("attention_head_dim")
    if heads is None:
        return "unknown"
    widths = config["block_out_channels"]
    heads = heads if isinstance(heads, list) else [heads] * len(widths)
    if set(heads) == {8}:
        return None
    head_channels = {width // number for width, number in zip(widths, heads, strict=True)}
    if len(head_channels) > 1:
        raise ValueError(f"its attentions have {heads} heads, neither eight each nor heads of one width")
    return head_channels.pop()


def _told_heads(architecture: Architecture) -> dict[str, str]:
    """Metadata on the attention heads, for networks whose shapes would be taken for others."""
    if architecture.head_channels is None and not architecture.linear_projection:
        return {}
    return {"distill.head_channels": str(architecture.head_channels or _EIGHT_HEADS)}


# --- writing --------------------------------------------------------------------------------------------------------


def save_unet(
    path: Path | str,
    state_dict: Mapping[str, Tensor | StoredTensor],
    architecture: Architecture,
    *,
    layout: str = "ldm",
    dtype: str | None = None,
    sampling: ModelSampling = STABLE_DIFFUSION,
    others: Mapping[str, Tensor | StoredTensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    on_bytes: OnBytes = ignore,
) -> None:
    """Write a UNet so that others can open it, one weight in memory at a time.

    state_dict: weights by canonical name. layout: a key of `FILE_LAYOUTS`. dtype: ``fp16``, ``bf16``, ``fp32``, or None to keep what
    is there. sampling: how the network is sampled, by default as Stable Diffusion. others: VAE and text encoders under their
    LDM names, for a full checkpoint. metadata: more entries for the header, such as ``modelspec.title``. settings: of a diffusers config, in place of the usual. Raises
    ``ValueError`` if the architecture, its sampling, or the path does not allow the layout.
    """
    sampling.check_writable(layout)
    check_choice(layout, FILE_LAYOUTS, "unknown layout")
    if dtype is not None:
        check_choice(dtype, CODES, "unknown dtype")
    if layout == "checkpoint" and not others:
        raise ValueError("a full checkpoint needs a VAE and a text encoder, and there are none; write the ldm layout")
    prefix = _FULL_PREFIX if layout == "checkpoint" else ""
    names = layout_named("diffusers" if layout == "diffusers" else "ldm").from_canonical(architecture.shapes)
    tensors = {prefix + names[name]: weight for name, weight in state_dict.items()}
    codes = dict.fromkeys(tensors, CODES[dtype]) if dtype else {}
    header = {
        **modelspec(path, _MODELSPEC_ARCHITECTURES.get(architecture.family, "unet")),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        **sampling.metadata(),
        **_told_heads(architecture),
        **(metadata or {}),
    }
    if layout != "diffusers":
        beside = sampling.markers(architecture.family, prefix)
        tensors = {**{name: tensor for name, tensor in beside.items() if name not in tensors}, **tensors}
        write_tensors(
            path,
            {**(others or {}), **tensors} if prefix else tensors,
            header,
            codes=codes,
            overwrite=overwrite,
            on_bytes=on_bytes,
        )
        return
    check_place(Path(path))
    config = json.dumps({**diffusers_config(architecture), **(settings or {})}, indent=2)
    with atomic(path, overwrite=overwrite) as folder:
        folder.mkdir()
        write_tensors(folder / WEIGHTS, tensors, header, codes=codes, on_bytes=on_bytes)
        write_text(folder / "config.json", config)
