"""A LoRA on a network: low-rank matrices beside frozen layers (Hu et al. 2021, arXiv 2106.09685), by peft.

A DoRA (Liu et al. 2024, arXiv 2402.09353) also learns the magnitude of each column of a layer's weight, one per input of
the layer, as in the paper and as every UI reads it. peft's own DoRA has magnitudes of rows, which ComfyUI's loader reads
differently (comfy/weight_adapter/base.py of 0.33: it divides by the norm of W where that of W + B A is meant).
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..base.modelspec import modelspec
from ..base.seeding import generator
from ..base.storage import StoredTensor, read_header, write_tensors
from ..diffusion.denoiser import Denoiser, Load
from .tensors import KOHYA, PEFT, check_finite, check_products, check_tensor, column_lengths, parts_of

ATTENTION = ("*.attn1.to_*", "*.attn2.to_*")
"""Layers that usually have a LoRA: the projections of every attention."""
_MAX_TARGETS, _MAX_TARGET_CHARS = 1000, 200
NO_DORA = "DoRA does not support int8 or nf4 weights; turn dora off (lora_dora in a recipe), or load the model in fp16 or fp8"
NAME = "distill"
"""Name of the adapter in peft."""

if TYPE_CHECKING:

    class _Weighted(nn.Module):
        weight: nn.Parameter

    class _LoraLayer(nn.Module):
        """What peft makes of a layer; ``lora_A`` and all like it go by the name of the LoRA."""

        base_layer: _Weighted
        lora_A: Mapping[str, _Weighted]
        lora_B: Mapping[str, _Weighted]
        dora_scale: nn.ParameterDict
        scaling: Mapping[str, float]
        active_adapters: Sequence[str]
        disable_adapters: bool

        def set_adapter(self, adapter_names: list[str]) -> None: ...


class Lora:
    """A LoRA put on a denoiser's network: ``W x`` becomes ``W x + alpha / rank * B A x``, and A and B alone are trained.

    dora: also train the magnitudes of the weight's columns; see `_decompose`. targets: patterns of canonical layers, such as
    ``mid.*`` or ``*.attn2.to_*``. The matrices are float32, whatever the network is; B starts at zero, so that nothing
    changes before the first step, and the seed determines A. ``ValueError`` for a pattern that matches no layer.
    """

    file_name = "lora.safetensors"

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        rank: int,
        alpha: float | None = None,
        dora: bool = False,
        targets: Sequence[str] = ATTENTION,
        seed: int = 0,
        about: Mapping[str, str] | None = None,
    ):
        """about: further metadata for its files."""
        from peft import LoraConfig, inject_adapter_in_model

        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.denoiser, self.layers, self.dora = denoiser, _matching(denoiser, targets), dora
        self._about = dict(about or {})
        for layer in self.layers if dora else []:
            _check_columns(cast("_Weighted", denoiser.module(layer)))
        denoiser.network.requires_grad_(False)
        paths = [denoiser.path(layer) for layer in self.layers]
        config = LoraConfig(r=rank, lora_alpha=self.alpha, **_just(denoiser.network, paths))
        with torch.random.fork_rng(devices=[]):  # peft fills matrices from the global generator; ours come below
            inject_adapter_in_model(config, denoiser.network, NAME)
        for name, parameter in self.parameters().items():
            parameter.data = _beginning(name, parameter.shape, seed).to(parameter.device)
        for layer in self.layers if dora else []:
            _decompose(_lora_layer(denoiser, layer), NAME)
        self.strengths: Tensor | None = None
        """Strength of the LoRA for each example, (B,), as in a loader; None for full strength."""
        for layer in self.layers:
            _lora_layer(denoiser, layer).lora_B[NAME].register_forward_hook(self._at_strength)

    def _at_strength(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.strengths is None:
            return None
        if len(output) != len(self.strengths):
            raise ValueError("this model has layers that mix the examples of a batch; train one scale, without guidance_min")
        return output * self.strengths.to(output).reshape(-1, *[1] * (output.ndim - 1))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Matrices by ``<canonical layer>.lora_down`` (A, rank x inputs) and ``.lora_up`` (B, outputs x rank).

        A DoRA also has the magnitudes of columns, ``.dora_scale`` (1 x inputs).
        """
        found: dict[str, nn.Parameter] = {}
        for layer in self.layers:
            module = _lora_layer(self.denoiser, layer)
            found[f"{layer}.lora_down"] = module.lora_A[NAME].weight
            found[f"{layer}.lora_up"] = module.lora_B[NAME].weight
            if NAME in getattr(module, "dora_scale", ()):
                found[f"{layer}.dora_scale"] = module.dora_scale[NAME]
        return found

    def _keys(self) -> dict[str, str]:
        """Name of each parameter -> its key in a file."""
        names, keys, form = self.denoiser.lora_names, {}, KOHYA if self._scale is None else PEFT
        for name in self.parameters():
            layer, matrix = name.rsplit(".", 1)
            keys[name] = names[layer] + form[matrix]
        return keys

    @property
    def _scale(self) -> float | None:
        """What the matrices B are multiplied by in a file of peft's form; None for kohya's, which alone holds magnitudes and alphas."""
        return self.alpha / self.rank if self.denoiser.lora_as_peft and not self.dora else None

    @property
    def exact(self) -> bool:
        return self._scale in (None, 1)

    def write(self, path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a LoRA file for stock ComfyUI and diffusers; diffusers ignores a DoRA's magnitudes."""
        keys, names, scale = self._keys(), self.denoiser.lora_names, self._scale
        tensors = {keys[name]: weight for name, weight in weights.items()}
        kind: dict[str, str] = {}
        if scale is None:
            tensors |= {f"{names[layer]}.alpha": torch.tensor(self.alpha) for layer in self.layers}
            kind = {"ss_network_module": "networks.lora"}
            if self.dora:
                kind = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": "locon", "dora_wd": "True"})}
            kind |= {"ss_network_dim": str(self.rank), "ss_network_alpha": str(self.alpha)}
        elif scale != 1:
            tensors |= {keys[name]: scale * weight for name, weight in weights.items() if name.endswith(".lora_up")}
        about = {**kind, **modelspec(path, dated=False), "distill.lora": json.dumps({"layers": len(self.layers)}), **self._about}
        write_tensors(path, tensors, {**about, **metadata})

    def read(self, path: Path) -> dict[str, Tensor]:
        """The matrices of a file that `write` wrote, by their names here."""
        stored = read_header(path).tensors
        for key in self._keys().values():
            if key not in stored:
                raise ValueError(f"{path} has no {key}; it is damaged or belongs to another LoRA; start a new run")
            check_finite(key, stored[key])
        read = {name: stored[key].read() for name, key in self._keys().items()}
        scale = self._scale or 1.0
        return read if scale == 1 else {name: w / scale if name.endswith(".lora_up") else w for name, w in read.items()}


def trained_shapes(denoiser: Denoiser, rank: int, targets: Sequence[str] = ATTENTION, dora: bool = False) -> list[torch.Size]:
    """Shapes of what a `Lora` of this rank would train; the network does not change."""
    modules = (denoiser.module(layer) for layer in _matching(denoiser, targets))
    weights = [module.weight for module in modules if isinstance(module, (nn.Linear, nn.Conv2d))]
    downs = [torch.Size([rank, *weight.shape[1:]]) for weight in weights]
    ups = [torch.Size([weight.shape[0], rank, *[1] * (weight.ndim - 2)]) for weight in weights]
    magnitudes = [torch.Size([1, weight.shape[1], *[1] * (weight.ndim - 2)]) for weight in weights] if dora else []
    return [*downs, *ups, *magnitudes]


class WithoutLora:
    """A denoiser of the same network that predicts as if it had no LoRA.

    It is for predictions alone: a backward pass that computes a part again would use the LoRA that is active then.
    """

    def __init__(self, denoiser: Denoiser):
        self._denoiser = copy.copy(denoiser)
        self._denoiser.forward = None  # the network itself, not compiled or wrapped for training

    def __call__(self, *inputs) -> Tensor:
        with _all_off(self._denoiser.network):
            return self._denoiser(*inputs)

    def __getattr__(self, name: str):
        return getattr(self._denoiser, name)


def without_lora(denoiser: Denoiser) -> Load:
    """Loads a denoiser `WithoutLora`, which has all its attributes."""
    return cast("Load", partial(WithoutLora, denoiser))


@contextlib.contextmanager
def _all_off(network: nn.Module) -> Iterator[None]:
    """While open, no LoRA is active."""
    before = [(layer, list(layer.active_adapters)) for layer in _lora_layers(network)]
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    for layer, _ in before:
        layer.set_adapter([])
    try:
        yield
    finally:
        for layer, names in before:
            layer.set_adapter(names)
        for parameter in network.parameters():
            parameter.requires_grad_(id(parameter) in trained)  # peft makes the adapters it activates trainable


def turn_on(network: nn.Module, name: str) -> None:
    """Activate one LoRA of a network, and no other."""
    for layer in _lora_layers(network):
        layer.set_adapter([name] if name in layer.lora_A else [])


def _lora_layer(denoiser: Denoiser, name: str) -> _LoraLayer:
    """A layer with a LoRA, by its canonical name."""
    return cast("_LoraLayer", denoiser.module(name))


def _lora_layers(network: nn.Module) -> list[_LoraLayer]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def attach(denoiser: Denoiser, path: Path, name: str) -> None:
    """Put a LoRA from a file that `Lora.write` wrote on a network, under a name.

    If a network has several, `turn_on` selects the active one. ``ValueError`` if the file has no layer of this network.
    """
    from peft import LoraConfig, inject_adapter_in_model

    stored, names = read_header(path).tensors, denoiser.lora_names
    layers = [layer for layer, key in names.items() if parts_of(stored, key).keys() & {"lora_down", "lora_up"}]
    if not layers:
        raise ValueError(f"{path} is not a LoRA for this network; give one that was trained on it")
    parts = {layer: _parts(stored, names[layer]) for layer in layers}
    ranks = {denoiser.path(layer): found["lora_down"].shape[0] for layer, found in parts.items()}
    alphas = {denoiser.path(layer): found["alpha"].item() for layer, found in parts.items() if "alpha" in found}
    config = LoraConfig(rank_pattern=ranks, alpha_pattern=ranks | alphas, **_just(denoiser.network, list(ranks)))
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several are intended
        inject_adapter_in_model(config, denoiser.network, name)
        for layer, found in parts.items():
            module = _lora_layer(denoiser, layer)
            for matrix, key in ((module.lora_A, "lora_down"), (module.lora_B, "lora_up")):
                _take(found[key], matrix[name].weight, f"{path}: {names[layer]}.{key}")
            if "dora_scale" in found:
                _decompose(module, name)
                _take(found["dora_scale"], module.dora_scale[name], f"{path}: {names[layer]}.dora_scale")
    denoiser.network.requires_grad_(False)


def _just(network: nn.Module, paths: Sequence[str]) -> dict[str, list[str]]:
    """What tells peft to change these layers of a network: it also takes others whose paths end like one of them."""
    wanted, also = {*paths}, []
    for path, _ in network.named_modules():
        parts = path.split(".")
        if path not in wanted and any(".".join(parts[start:]) in wanted for start in range(1, len(parts))):
            also.append(path)
    return {"target_modules": list(paths), "exclude_modules": also}


def _parts(stored: Mapping[str, StoredTensor], name: str) -> dict[str, Tensor]:
    """Tensors of a layer in a file, read, by their role; ``ValueError`` if they are damaged."""
    keys = parts_of(stored, name)
    for part, key in keys.items():
        check_tensor(key, part, stored[key])
    check_products(keys, {part: tuple(stored[key].shape) for part, key in keys.items()})
    found = {part: stored[key].read() for part, key in keys.items()}
    for part, key in keys.items():
        check_finite(key, found[part])
    return found


def _take(tensor: Tensor, parameter: nn.Parameter, key: str) -> None:
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"{key} has shape {tuple(tensor.shape)}, but this network needs {tuple(parameter.shape)}; "
            "train the LoRA again on this network"
        )
    parameter.copy_(tensor)


# --- DoRA


def _decompose(layer: _LoraLayer, name: str) -> None:
    """Turn a layer's LoRA into a DoRA: ``W' = W + alpha / rank * B A`` becomes ``m W' / |W'|`` (arXiv 2402.09353, Eq. 5).

    m starts as ``|W|``, so that nothing changes while B is 0. Scaling the columns of a weight is the same as scaling the
    inputs, so the inputs are scaled.
    """
    if not hasattr(layer, "dora_scale"):
        layer.dora_scale = nn.ParameterDict()
    layer.dora_scale[name] = nn.Parameter(column_lengths(layer.base_layer.weight))
    layer.register_forward_pre_hook(partial(_with_scaled_columns, name))


def _check_columns(layer: _Weighted) -> None:
    """``ValueError`` for a layer without column magnitudes: the columns of a grouped convolution are not its inputs."""
    if not layer.weight.is_floating_point():
        raise ValueError(NO_DORA)
    if getattr(layer, "groups", 1) > 1:
        raise ValueError("DoRA does not support grouped convolutions; leave them out, or turn dora off (lora_dora in a recipe)")


def _with_scaled_columns(name: str, layer: _LoraLayer, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The inputs of a layer times ``m / |W'|`` if its DoRA is active. The norm counts as a constant (Sec. 4.3)."""
    if layer.disable_adapters or name not in layer.active_adapters:
        return None
    x, *rest = inputs
    return (x * (layer.dora_scale[name] / column_lengths(_merged(layer, name)))).to(x.dtype), *rest


@torch.no_grad()
def _merged(layer: _LoraLayer, name: str) -> Tensor:
    """The weight of a layer with its LoRA, in float32."""
    weight, down, up = layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight
    with torch.autocast(weight.device.type, enabled=False):
        change = layer.scaling[name] * (up.flatten(1) @ down.flatten(1))
    return weight.float() + change.reshape(weight.shape)


def _matching(denoiser: Denoiser, targets: Sequence[str]) -> list[str]:
    """Linear and convolution layers that match the patterns, in the network's order."""
    modules = {layer: denoiser.module(layer) for layer in denoiser.lora_names}
    layers = [layer for layer, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not layers:
        raise ValueError("this model has no layer that can have a LoRA; load it in fp32, bf16, fp16 or fp8, not quantised")
    if len(targets) > _MAX_TARGETS or any(len(pattern) > _MAX_TARGET_CHARS for pattern in targets):
        raise ValueError(
            f"lora_targets may be at most {_MAX_TARGETS:,} patterns of {_MAX_TARGET_CHARS} characters; "
            "use stars, as in '*.attn2.to_*'"
        )
    for pattern in targets:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise ValueError(
                f"lora_targets: {pattern!r} matches no layer of this model; layers are called {layers[0]}, "
                f"{layers[len(layers) // 2]} …"
            )
    return [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in targets)]


def _beginning(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Initial matrix: zeros for B; for A uniform in ``± 1 / sqrt(inputs)``, as in linear layers."""
    if name.endswith("lora_up"):
        return torch.zeros(shape)
    bound = shape[1:].numel() ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, 0, name))
