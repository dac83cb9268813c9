"""A LoRA on a network: low-rank matrices beside layers that stay as they are (Hu et al. 2021, arXiv 2106.09685), by peft."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from .dataset import generator
from .denoiser import Denoiser
from .storage import read_header, write_tensors

ATTENTION = ("*.attn1.to_*", "*.attn2.to_*")
"""Layers a LoRA usually sits on: the projections of every attention."""
NAME = "distill"
"""What peft knows the adapter by."""


class Lora:
    """A LoRA put on a denoiser's network: ``W x`` becomes ``W x + alpha / rank * B A x``, and A and B alone are trained.

    targets: patterns of canonical layers, such as ``mid.*`` or ``*.attn2.to_*``. The matrices are float32, whatever the
    network is; B begins as zero, so that nothing changes before the first step, and A follows from the seed.
    ``ValueError`` for a pattern that matches no layer.
    """

    file_name = "lora.safetensors"

    def __init__(
        self, denoiser: Denoiser, *, rank: int, alpha: float | None = None, targets: Sequence[str] = ATTENTION, seed: int = 0
    ):
        from peft import LoraConfig, inject_adapter_in_model

        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.denoiser, self.layers = denoiser, _matching(denoiser, targets)
        denoiser.network.requires_grad_(False)
        paths = [denoiser.path(layer) for layer in self.layers]
        config = LoraConfig(r=rank, lora_alpha=self.alpha, target_modules=paths)
        with torch.random.fork_rng(devices=[]):  # peft fills matrices from the global generator; ours come below
            inject_adapter_in_model(config, denoiser.network, NAME)
        for name, parameter in self.parameters().items():
            parameter.data = _beginning(name, parameter.shape, seed).to(parameter.device)
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
        """Matrices by ``<canonical layer>.lora_down`` (A, rank x inputs) and ``.lora_up`` (B, outputs x rank)."""
        found = {}
        for layer in self.layers:
            module = self.denoiser.module(layer)
            found[f"{layer}.lora_down"] = module.lora_A[NAME].weight
            found[f"{layer}.lora_up"] = module.lora_B[NAME].weight
        return found

    def write(self, path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a LoRA file as kohya's trainer does; stock ComfyUI and diffusers open it."""
        names = self.denoiser.lora_names
        tensors = {}
        for name, weight in weights.items():
            layer, matrix = name.rsplit(".", 1)
            tensors[f"{names[layer]}.{matrix}.weight"] = weight
            tensors[f"{names[layer]}.alpha"] = torch.tensor(self.alpha)
        about = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": str(self.alpha),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": path.stem,
            "distill.lora": json.dumps({"layers": len(self.layers)}),
        }
        write_tensors(path, tensors, {**about, **metadata})

    def read(self, path: Path) -> dict[str, Tensor]:
        """The matrices of a file `write` wrote, by their names here."""
        names, stored = self.denoiser.lora_names, read_header(path).tensors
        keys = {name: "{}.{}.weight".format(names[name.rsplit(".", 1)[0]], name.rsplit(".", 1)[1]) for name in self.parameters()}
        return {name: stored[key].read() for name, key in keys.items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take the matrices of a checkpoint."""
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(weights[name])


class AnsweringWith:
    """A denoiser of the same network that answers with one of its LoRAs, or with none, whatever else is on it.

    It is for answers alone: a backward pass that computes a part again would do so with what is on then.
    """

    def __init__(self, denoiser: Denoiser, name: str | None):
        self._denoiser, self._name = copy.copy(denoiser), name
        self._denoiser.forward = None  # the network itself, not what a training compiles or wraps

    def __call__(self, *inputs) -> Tensor:
        with _only(self._denoiser.network, self._name):
            return self._denoiser(*inputs)

    def __getattr__(self, name: str):
        return getattr(self._denoiser, name)


@contextlib.contextmanager
def _only(network: nn.Module, name: str | None) -> Iterator[None]:
    """While open, one LoRA is on, or none."""
    before = [(layer, list(layer.active_adapters)) for layer in _lora_layers(network)]
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    turn_on(network, name)
    try:
        yield
    finally:
        for layer, names in before:
            layer.set_adapter(names)
        for parameter in network.parameters():
            parameter.requires_grad_(id(parameter) in trained)  # peft makes what it turns on trainable


def turn_on(network: nn.Module, name: str | None) -> None:
    """Have a network answer with one of its LoRAs, or with none."""
    for layer in _lora_layers(network):
        layer.set_adapter([name] if name in layer.lora_A else [])


def _lora_layers(network: nn.Module) -> list[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def attach(denoiser: Denoiser, path: Path, name: str) -> None:
    """Put a LoRA from a file that `Lora.write` wrote on a network, under a name.

    Whichever was put on first is on. ``ValueError`` if the file has no layer of this network.
    """
    from peft import LoraConfig, inject_adapter_in_model

    stored, names = read_header(path).tensors, denoiser.lora_names
    layers = [layer for layer, key in names.items() if f"{key}.lora_down.weight" in stored]
    if not layers:
        raise ValueError(f"{path} is no LoRA for this network; give one that was trained on it")
    ranks = {denoiser.path(layer): stored[f"{names[layer]}.lora_down.weight"].shape[0] for layer in layers}
    alphas = {denoiser.path(layer): stored[f"{names[layer]}.alpha"].read().item() for layer in layers}
    config = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=alphas)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several are what is meant
        inject_adapter_in_model(config, denoiser.network, name)
        for layer in layers:
            module = denoiser.module(layer)
            module.lora_A[name].weight.copy_(stored[f"{names[layer]}.lora_down.weight"].read())
            module.lora_B[name].weight.copy_(stored[f"{names[layer]}.lora_up.weight"].read())
    denoiser.network.requires_grad_(False)


def _matching(denoiser: Denoiser, targets: Sequence[str]) -> list[str]:
    """Linear and convolution layers that patterns match, in the network's order."""
    modules = {layer: denoiser.module(layer) for layer in denoiser.lora_names}
    layers = [layer for layer, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not layers:
        raise ValueError("this model has no layer a LoRA could sit on; load it in fp32, bf16, fp16 or fp8, not quantised")
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
