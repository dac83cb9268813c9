"""Any noise-predicting network behind one call, and the taps that listen to its blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from .architecture import Architecture
from .layouts import layout
from .schedule import NoiseSchedule, scaled_linear


@dataclass(kw_only=True)
class Denoiser:
    """``denoiser(x_t, t, context) -> prediction`` for a network, its noise schedule and its named blocks."""

    network: nn.Module
    architecture: Architecture
    schedule: NoiseSchedule = field(default_factory=scaled_linear)
    prediction: str = "eps"
    """What the network predicts: a key of `schedule.PREDICTIONS`."""

    spelling: ClassVar[str]
    """Layout of the network's parameter names: a key of `layouts.LAYOUTS`."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x_t: (B, C, H, W); t: integer timesteps (B,); context: text embedding (B, L, D). Returns (B, C, H, W)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def module(self, name: str) -> nn.Module:
        """Module by canonical name, such as ``down.0.downsample`` or ``up.1.attn.0.proj_out``."""
        return self.network.get_submodule(layout(self.spelling).from_canonical([*self.architecture.shapes, name])[name])

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by canonical name."""
        theirs = dict(self.network.named_parameters())
        return {name: theirs[path] for name, path in self._paths().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy weights by canonical name into the network."""
        paths = self._paths()
        self.network.load_state_dict({paths[name]: weight for name, weight in state_dict.items()})

    def _paths(self) -> dict[str, str]:
        return layout(self.spelling).from_canonical(self.architecture.shapes)


class DiffusersDenoiser(Denoiser):
    """A ``UNet2DConditionModel``."""

    spelling = "diffusers"

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.network(x_t, t, encoder_hidden_states=context, return_dict=False)[0]


class LdmDenoiser(Denoiser):
    """A ``UNetModel`` in the LDM layout, called as CompVis and ComfyUI call it."""

    spelling = "ldm"

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.network(x_t, timesteps=t.float(), context=context)


@contextlib.contextmanager
def tap(denoiser: Denoiser, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """While open, collect what the named modules put out: ``{name: tensor}``, refilled by every forward pass."""
    outputs: dict[str, Tensor] = {}

    def listen(name: str):
        def hook(module, inputs, output):
            outputs[name] = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)

        return denoiser.module(name).register_forward_hook(hook)

    handles = [listen(name) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
