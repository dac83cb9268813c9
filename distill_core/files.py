"""UNets on disk: what is in a file, and writing one so that others open it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .architecture import Architecture
from .layouts import find_unet, layout
from .plan import PruningPlan
from .storage import DTYPES, Header, OnBytes, StoredTensor, atomic, ignore, read_header, write_tensors, write_text

if TYPE_CHECKING:
    from torch import Tensor

FORMS = {
    "ldm": "one file with bare LDM names, for ComfyUI's models/diffusion_models",
    "checkpoint": "one file with VAE and text encoder too, for ComfyUI's models/checkpoints",
    "diffusers": "a folder for UNet2DConditionModel.from_pretrained",
}
"""What a student can be written as."""
ORIGIN = ("distill.plan", "distill.teacher", "distill.skips", "distill.padding")
"""Metadata that tell what a student was pruned from; files that are made of it tell the same."""
_FULL_PREFIX = "model.diffusion_model."
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_MODELSPEC_PREDICTIONS = {"eps": "epsilon", "v": "v", "x0": "sample", "flow": "flow"}
_MODELSPEC_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}
_MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Tensors beside the UNet by which ComfyUI knows how it samples."""
_SD2_V_SIGN = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""ComfyUI takes an SD2 for v-predicting if this tensor of the full UNet spreads wider than 0.09 (comfy/supported_models.py,
SD20). A student has no such block, so the tensor is written as a marker of its own."""
_SD2_V_SPREAD = 0.09


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UNetFile:
    """A UNet on disk, known by its header; weights are read when asked for."""

    path: Path
    spelling: str
    """Layout the file is written in: a key of `layouts.LAYOUTS`."""
    prefix: str
    names: Mapping[str, str]
    """Canonical parameter name -> name in the file."""
    tensors: Mapping[str, StoredTensor]
    """Weights by canonical name, not read yet."""
    architecture: Architecture
    dtype: str
    """Precision most weights are stored in: ``f16``, ``bf16``, ``f32``, ``f8_e4m3``, ..."""
    prediction: str = "eps"
    """Key of `schedule.PREDICTIONS`; ``eps`` where nothing says otherwise."""
    markers: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Tensors by which ComfyUI knows how an SDXL samples: ``v_pred``, ``ztsnr``, ..."""
    others: Mapping[str, StoredTensor] = field(default_factory=dict)
    """VAE and text encoders of a full checkpoint, by their names in the file."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def plan(self) -> PruningPlan | None:
        """Plan the file was pruned with, if it was pruned here."""
        return PruningPlan.from_json(text) if (text := self.metadata.get("distill.plan")) else None

    @property
    def origin(self) -> dict[str, str]:
        """What it tells of the teacher it was pruned from: metadata by the keys of `ORIGIN`."""
        return {key: text for key, text in self.metadata.items() if key in ORIGIN}

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """All weights by canonical name, in the precision of the file, and independent of it: the file may go."""
        return {name: tensor.read() for name, tensor in self.tensors.items()}

    def describe(self) -> dict[str, Any]:
        """What ``distill inspect`` tells."""
        architecture = self.architecture
        return {
            "file": str(self.path),
            "family": architecture.family,
            "layout": self.spelling + (f", under the prefix {self.prefix}" if self.prefix else ""),
            "dtype": self.dtype,
            "prediction": self.prediction,
            "parameters": architecture.num_parameters,
            "context_width": architecture.context_width,
            "pruned_by": self.plan.name if self.plan else None,
            "with_vae_and_text_encoder": bool(self.others),
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
    """Read the header of a UNet: a single file in either layout, or a diffusers folder.

    Raises ``ValueError`` in one sentence if it is not there, is no safetensors file, is damaged, or holds no UNet.
    """
    path, config, scheduler = Path(path), {}, {}
    if path.is_dir():
        folder = path / "unet" if (path / "unet").is_dir() else path
        config = _read_config(folder / "config.json") if (folder / "config.json").exists() else {}
        scheduler_file = folder.parent / "scheduler" / "scheduler_config.json"
        scheduler = _read_json(scheduler_file) if scheduler_file.exists() else {}
        path, header = _read_folder(folder)
    else:
        header = read_header(path)
    try:
        return _find(path, header, config, scheduler)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _find(path: Path, header: Header, config: Mapping, scheduler: Mapping) -> UNetFile:
    spelling, prefix = find_unet(header.tensors)
    markers = {name: tensor for name, tensor in header.tensors.items() if name in _MARKERS}
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in header.tensors.items()
        if name.startswith(prefix) and name not in markers
    }
    v_sign = found.get(_SD2_V_SIGN)
    if _SD2_V_SIGN.replace("1.transformer_blocks.0.norm1.bias", "0.in_layers.0.weight") not in found:
        found.pop(_SD2_V_SIGN, None)  # our own marker, not a weight
    found = _unscaled(found)
    canonical = layout(spelling).to_canonical(found)
    tensors = {canonical[name]: tensor for name, tensor in found.items()}
    architecture = Architecture.from_state_dict(found, _head_channels(header.metadata, config))
    beside = header.tensors.keys() - {prefix + name for name in found} - markers.keys() if prefix else ()
    return UNetFile(
        path,
        spelling,
        prefix,
        names={canonical[name]: prefix + name for name in found},
        tensors=tensors,
        architecture=architecture,
        dtype=Counter(tensor.code for tensor in tensors.values()).most_common(1)[0][0].lower(),
        prediction=_prediction(header.metadata, markers, scheduler, v_sign if architecture.family == "sd2" else None),
        markers=markers,
        others={n: header.tensors[n] for n in sorted(beside) if not n.startswith((prefix, "model_ema."))},
        metadata=header.metadata,
    )


def _read_folder(folder: Path) -> tuple[Path, Header]:
    """The weights of a diffusers folder: whole, in shards, or in its fp16 variant."""
    index, half = folder / f"{_WEIGHTS}.index.json", folder / _WEIGHTS.replace(".safetensors", ".fp16.safetensors")
    if not (folder / _WEIGHTS).exists() and index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} names no shards; get it again")
        shards = sorted({str(shard) for shard in weight_map.values()})
        headers = [read_header(folder / Path(shard).name) for shard in shards]
        return index, Header({n: t for header in headers for n, t in header.tensors.items()}, headers[0].metadata)
    path = half if half.exists() and not (folder / _WEIGHTS).exists() else folder / _WEIGHTS
    return path, read_header(path)


def _unscaled(found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Scaled fp8 weights joined with their scales; ``ValueError`` for other ways of quantising."""
    plain, scales = {}, {}
    for name, tensor in found.items():
        layer, _, last = name.rpartition(".")
        if last in ("scale_weight", "weight_scale"):
            scales[f"{layer}.weight"] = tensor
        elif last not in ("scaled_fp8", "scale_input", "input_scale", "comfy_quant"):
            plain[name] = tensor
    for name, scale in scales.items():
        if name not in plain or not plain[name].code.startswith("F8") or scale.shape not in ((), (1,)):
            raise ValueError(f"{name} is quantised in a way that is not read here; take the fp16 or fp8 version of the model")
        plain[name] = StoredTensor(**{**vars(plain[name]), "scale": scale})
    return plain


def _prediction(metadata: Mapping, markers: Mapping, scheduler: Mapping, sd2_v_sign: StoredTensor | None) -> str:
    """What the network predicts: by metadata, markers, the pipeline's scheduler, or ComfyUI's test of an SD2."""
    theirs = {**{v: k for k, v in _MODELSPEC_PREDICTIONS.items()}, "v_prediction": "v"}
    for said in (metadata.get("modelspec.prediction_type"), scheduler.get("prediction_type")):
        if isinstance(said, str) and said in theirs:
            return theirs[said]
    if "v_pred" in markers or "edm_vpred.sigma_max" in markers:
        return "v"
    if sd2_v_sign is not None and sd2_v_sign.read().float().std(unbiased=False) > _SD2_V_SPREAD:
        return "v"
    return "eps"


def _read_config(path: Path) -> dict:
    config = _read_json(path)
    if not isinstance(config.get("block_out_channels"), list):
        raise ValueError(f"{path} is not the config of a diffusers UNet; get it again")
    return config


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); get it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not what its name says; get it again")
    return content


def _head_channels(metadata: Mapping[str, str], config: Mapping) -> int | None:
    """Channels of a head from our own metadata, or from a diffusers config; None where neither says or all have eight heads.

    diffusers' ``attention_head_dim`` is, despite its name, the number of heads of each stage.
    """
    if "distill.head_channels" in metadata:
        if not (text := metadata["distill.head_channels"]).isdecimal() or int(text) == 0:
            raise ValueError(f"its metadata tell of attention heads of {text!r} channels; prune the teacher again")
        return int(text)
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


# --- writing --------------------------------------------------------------------------------------------------------


def save_unet(
    path: Path | str,
    state_dict: Mapping[str, Tensor | StoredTensor],
    architecture: Architecture,
    *,
    form: str = "ldm",
    dtype: str | None = None,
    prediction: str = "eps",
    title: str = "",
    plan: PruningPlan | None = None,
    markers: Mapping[str, Tensor | StoredTensor] | None = None,
    others: Mapping[str, Tensor | StoredTensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    on_bytes: OnBytes = ignore,
) -> None:
    """Write a UNet so that others can open it, one weight in memory at a time.

    state_dict: weights by canonical name. form: a key of `FORMS`. dtype: ``fp16``, ``bf16``, ``fp32``, or None to keep what
    is there. others: VAE and text encoders under their LDM names, for a full checkpoint. Raises ``ValueError`` for a form
    the architecture, or the place, cannot have.
    """
    if form not in FORMS:
        raise ValueError(f"unknown layout {form!r}; choose from {sorted(FORMS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose from {sorted(DTYPES)}")
    if form == "checkpoint" and not others:
        raise ValueError("there is no VAE and text encoder to go with the UNet; write the ldm layout")
    prefix = _FULL_PREFIX if form == "checkpoint" else ""
    names = layout("diffusers" if form == "diffusers" else "ldm").from_canonical(architecture.shapes)
    tensors = {prefix + names[name]: weight for name, weight in state_dict.items()}
    codes = dict.fromkeys(tensors, DTYPES[dtype]) if dtype else {}
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
    if form != "diffusers":
        beside = {**(_v_markers(architecture, prefix) if prediction == "v" else {}), **(markers or {})}
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
    from .unet import diffusers_config

    _check_place(Path(path))
    config = json.dumps(diffusers_config(architecture), indent=2)
    with atomic(path, overwrite=overwrite) as folder:
        folder.mkdir()
        write_tensors(folder / _WEIGHTS, tensors, header, codes=codes, on_bytes=on_bytes)
        write_text(folder / "config.json", config)


def _v_markers(architecture: Architecture, prefix: str) -> dict[str, Tensor]:
    """What makes ComfyUI sample a v-predicting network as one."""
    import torch

    if architecture.family == "sd2":
        return {prefix + _SD2_V_SIGN: torch.tensor([-1.0, 1.0])}
    return {"v_pred": torch.zeros(0)} if architecture.family == "sdxl" else {}


def _check_place(folder: Path) -> None:
    """``ValueError`` for a diffusers folder where ComfyUI's loaders would list it: they read such students wrongly."""
    place = re.search(r"(^|/)(diffusion_models|checkpoints|models/unet)(/|$)", folder.absolute().as_posix())
    if place:
        raise ValueError(
            f"ComfyUI lists every .safetensors file under {place[2]}, and reads students in the diffusers layout wrongly; "
            "write the ldm layout there, or choose a folder elsewhere for the diffusers layout"
        )
