"""A LoRA on a network: low-rank matrices beside layers that stay as they are (Hu et al. 2021, arXiv 2106.09685), by peft.

As a DoRA (Liu et al. 2024, arXiv 2402.09353) it also learns the length of each column of a layer's weight, one for each of
the layer's inputs, as the paper has it and every UI reads it. peft's own DoRA has lengths of rows, which ComfyUI's loader
takes for something else (comfy/weight_adapter/base.py of 0.33: it divides by the norm of W where that of W + B A is meant).
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

import torch
from torch import Tensor, nn

from .dataset import generator
from .denoiser import Denoiser
from .lora_tensors import check_finite, check_products, check_tensor
from .storage import StoredTensor, read_header, write_tensors

ATTENTION = ("*.attn1.to_*", "*.attn2.to_*")
"""Layers a LoRA usually sits on: the projections of every attention."""
_MAX_TARGETS, _MAX_TARGET_CHARS = 1000, 200
NAME = "distill"
"""What peft knows the adapter by."""


class Lora:
    """A LoRA put on a denoiser's network: ``W x`` becomes ``W x + alpha / rank * B A x``, and A and B alone are trained.

    dora: train the length of the weight's columns as well; see `_decompose`. targets: patterns of canonical layers, such as
    ``mid.*`` or ``*.attn2.to_*``. The matrices are float32, whatever the network is; B begins as zero, so that nothing changes
    before the first step, and A follows from the seed. ``ValueError`` for a pattern that matches no layer.
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
    ):
        from peft import LoraConfig, inject_adapter_in_model

        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.denoiser, self.layers, self.dora = denoiser, _matching(denoiser, targets), dora
        for layer in self.layers if dora else []:
            _check_columns(denoiser.module(layer))
        denoiser.network.requires_grad_(False)
        paths = [denoiser.path(layer) for layer in self.layers]
        config = LoraConfig(r=rank, lora_alpha=self.alpha, target_modules=paths)
        with torch.random.fork_rng(devices=[]):  # peft fills matrices from the global generator; ours come below
            inject_adapter_in_model(config, denoiser.network, NAME)
        for name, parameter in self.parameters().items():
            parameter.data = _beginning(name, parameter.shape, seed).to(parameter.device)
        for layer in self.layers if dora else []:
            _decompose(denoiser.module(layer), NAME)
        self.strengths: Tensor | None = None
        """How much of the LoRA each example has, (B,), as a strength in a loader; None for all of it."""
        for layer in self.layers:
            denoiser.module(layer).lora_B[NAME].register_forward_hook(self._at_strength)

    def _at_strength(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.strengths is None:
            return None
        if len(output) != len(self.strengths):
            raise ValueError("this model has layers that mix the examples of a batch; train it on one scale (guidance_min)")
        return output * self.strengths.to(output).reshape(-1, *[1] * (output.ndim - 1))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Matrices by ``<canonical layer>.lora_down`` (A, rank x inputs) and ``.lora_up`` (B, outputs x rank).

        Of a DoRA also the lengths of columns, ``.dora_scale`` (1 x inputs).
        """
        found = {}
        for layer in self.layers:
            module = self.denoiser.module(layer)
            found[f"{layer}.lora_down"] = module.lora_A[NAME].weight
            found[f"{layer}.lora_up"] = module.lora_B[NAME].weight
            if NAME in getattr(module, "dora_scale", ()):
                found[f"{layer}.dora_scale"] = module.dora_scale[NAME]
        return found

    def _keys(self) -> dict[str, str]:
        """Name of each parameter -> its key in a file."""
        names, keys = self.denoiser.lora_names, {}
        for name in self.parameters():
            layer, matrix = name.rsplit(".", 1)
            keys[name] = f"{names[layer]}.{matrix}" + (".weight" if matrix != "dora_scale" else "")
        return keys

    def write(self, path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a LoRA file as kohya's trainer does, which stock ComfyUI and diffusers open; of a DoRA diffusers leaves the lengths out."""
        keys, names = self._keys(), self.denoiser.lora_names
        tensors = {keys[name]: weight for name, weight in weights.items()}
        tensors |= {f"{names[layer]}.alpha": torch.tensor(self.alpha) for layer in self.layers}
        kind = (
            {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": "locon", "dora_wd": "True"})}
            if self.dora
            else {"ss_network_module": "networks.lora"}
        )
        about = {
            **kind,
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": str(self.alpha),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": path.stem,
            "distill.lora": json.dumps({"layers": len(self.layers)}),
        }
        write_tensors(path, tensors, {**about, **metadata})

    def read(self, path: Path) -> dict[str, Tensor]:
        """The matrices of a file `write` wrote, by their names here."""
        stored = read_header(path).tensors
        for key in self._keys().values():
            if key not in stored:
                raise ValueError(f"{path} has no {key}; it is damaged or of another LoRA, so start a new run")
            check_finite(key, stored[key])
        return {name: stored[key].read() for name, key in self._keys().items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take the matrices of a checkpoint."""
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(weights[name])


class WithoutLora:
    """A denoiser of the same network that answers as if no LoRA were on it.

    It is for answers alone: a backward pass that computes a part again would do so with what is on then.
    """

    def __init__(self, denoiser: Denoiser):
        self._denoiser = copy.copy(denoiser)
        self._denoiser.forward = None  # the network itself, not what a training compiles or wraps

    def __call__(self, *inputs) -> Tensor:
        with _all_off(self._denoiser.network):
            return self._denoiser(*inputs)

    def __getattr__(self, name: str):
        return getattr(self._denoiser, name)


@contextlib.contextmanager
def _all_off(network: nn.Module) -> Iterator[None]:
    """While open, no LoRA is on."""
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
            parameter.requires_grad_(id(parameter) in trained)  # peft makes what it turns on trainable


def turn_on(network: nn.Module, name: str) -> None:
    """Have a network answer with one of its LoRAs alone."""
    for layer in _lora_layers(network):
        layer.set_adapter([name] if name in layer.lora_A else [])


def _lora_layers(network: nn.Module) -> list[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def attach(denoiser: Denoiser, path: Path, name: str) -> None:
    """Put a LoRA from a file that `Lora.write` wrote on a network, under a name.

    Where several are put on, `turn_on` says which of them is on. ``ValueError`` if the file has no layer of this network.
    """
    from peft import LoraConfig, inject_adapter_in_model

    stored, names = read_header(path).tensors, denoiser.lora_names
    layers = [layer for layer, key in names.items() if stored.keys() & {f"{key}.lora_down.weight", f"{key}.lora_up.weight"}]
    if not layers:
        raise ValueError(f"{path} is no LoRA for this network; give one that was trained on it")
    parts = {layer: _parts(stored, names[layer]) for layer in layers}
    ranks = {denoiser.path(layer): found["lora_down"].shape[0] for layer, found in parts.items()}
    alphas = {denoiser.path(layer): found["alpha"].item() for layer, found in parts.items() if "alpha" in found}
    config = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks | alphas)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several are what is meant
        inject_adapter_in_model(config, denoiser.network, name)
        for layer, found in parts.items():
            module = denoiser.module(layer)
            for matrix, key in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
                _take(found[key], getattr(module, matrix)[name].weight, f"{path}: {names[layer]}.{key}")
            if "dora_scale" in found:
                _decompose(module, name)
                _take(found["dora_scale"], module.dora_scale[name], f"{path}: {names[layer]}.dora_scale")
    denoiser.network.requires_grad_(False)


def _parts(stored: Mapping[str, StoredTensor], name: str) -> dict[str, Tensor]:
    """Tensors of a layer in a file by what they are, read; ``ValueError`` if they are damaged."""
    spelled = {"lora_down": ".lora_down.weight", "lora_up": ".lora_up.weight", "alpha": ".alpha", "dora_scale": ".dora_scale"}
    keys = {part: name + rest for part, rest in spelled.items() if name + rest in stored}
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
            f"{key} has shape {tuple(tensor.shape)} where this network has {tuple(parameter.shape)}; train it again on it"
        )
    parameter.copy_(tensor)


# --- DoRA


def _decompose(layer: nn.Module, name: str) -> None:
    """Make a DoRA of a layer's LoRA: ``W' = W + alpha / rank * B A`` becomes ``m W' / |W'|`` (arXiv 2402.09353, Eq. 5).

    m begins as ``|W|``, so that nothing changes while B is 0. A weight whose columns are scaled answers as it does itself
    to inputs that are scaled so, which is how it is computed.
    """
    if not hasattr(layer, "dora_scale"):
        layer.dora_scale = nn.ParameterDict()
    layer.dora_scale[name] = nn.Parameter(_lengths(layer.base_layer.weight))
    layer.register_forward_pre_hook(partial(_with_scaled_columns, name))


def _check_columns(layer: nn.Module) -> None:
    """``ValueError`` for a layer whose columns cannot be measured: of a convolution in groups they are no inputs."""
    if not layer.weight.is_floating_point():
        raise ValueError(
            "weights in int8 or nf4 take no DoRA: turn dora off (lora_dora in a recipe), or keep the model in fp16 or fp8"
        )
    if getattr(layer, "groups", 1) > 1:
        raise ValueError("a convolution in groups takes no DoRA: leave its layer out, or turn dora off (lora_dora in a recipe)")


def _with_scaled_columns(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The inputs of a layer times ``m / |W'|`` where its DoRA is on. The norm counts as a constant (Sec. 4.3)."""
    if layer.disable_adapters or name not in layer.active_adapters:
        return None
    x, *rest = inputs
    return (x * (layer.dora_scale[name] / _lengths(_merged(layer, name)))).to(x.dtype), *rest


@torch.no_grad()
def _merged(layer: nn.Module, name: str) -> Tensor:
    """The weight of a layer with its LoRA, in float32."""
    weight, down, up = layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight
    with torch.autocast(weight.device.type, enabled=False):
        change = layer.scaling[name] * (up.flatten(1) @ down.flatten(1))
    return weight.float() + change.reshape(weight.shape)


@torch.no_grad()
def _lengths(weight: Tensor) -> Tensor:
    """Length of each column of a weight, never 0, in float32: (1, inputs), of a convolution (1, inputs, 1, 1)."""
    norms = torch.linalg.vector_norm(weight.float(), dim=[0, *range(2, weight.ndim)], keepdim=True)
    return norms + torch.finfo(torch.float32).eps  # as ComfyUI's loader in float32; in float16 it adds 0.001


def _matching(denoiser: Denoiser, targets: Sequence[str]) -> list[str]:
    """Linear and convolution layers that patterns match, in the network's order."""
    modules = {layer: denoiser.module(layer) for layer in denoiser.lora_names}
    layers = [layer for layer, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not layers:
        raise ValueError("this model has no layer a LoRA could sit on; load it in fp32, bf16, fp16 or fp8, not quantised")
    if len(targets) > _MAX_TARGETS or any(len(pattern) > _MAX_TARGET_CHARS for pattern in targets):
        raise ValueError(
            f"lora_targets may be {_MAX_TARGETS:,} patterns of {_MAX_TARGET_CHARS} characters; use stars, as in '*.attn2.to_*'"
        )
    for pattern in targets:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise ValueError(
                f"lora_targets: {pattern!r} matches no layer of this model; layers are called {layers[0]}, {layers[len(layers) // 2]} …"
            )
    return [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in targets)]


def _beginning(name: str, shape: torch.Size, seed: int) -> Tensor:
    """B: zeros. A: uniform in ``± 1 / sqrt(inputs)``, as linear layers begin."""
    if name.endswith("lora_up"):
        return torch.zeros(shape)
    bound = shape[1:].numel() ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, 0, name))
