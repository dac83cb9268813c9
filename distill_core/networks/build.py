"""UNets as diffusers networks, built from an architecture alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .architecture import Architecture
from .diffusers_config import beyond_diffusers, config_of, diffusers_config, envelope
from .files import UNetFile
from .layouts import from_diffusers, split, to_diffusers

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class _NoAttention(nn.Module):
    """Placeholder in a layer of a diffusers stage that has no attention."""

    def forward(self, hidden_states: Tensor, **_) -> tuple[Tensor]:
        return (hidden_states,)


def build_unet(architecture: Architecture) -> UNet2DConditionModel:
    """A network with freshly initialised weights; ``ValueError`` if diffusers cannot build exactly this UNet.

    If no diffusers config describes the UNet, blocks are removed from the smallest larger network that one describes.
    """
    from diffusers import UNet2DConditionModel

    if beyond_diffusers(architecture):
        network = UNet2DConditionModel.from_config(config_of(architecture, envelope(architecture)))
        _take_out(network, architecture)
    else:
        network = UNet2DConditionModel.from_config(diffusers_config(architecture))
    names = to_diffusers(architecture.shapes)
    built = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    wanted = {names[name]: tuple(shape) for name, shape in architecture.shapes.items()}
    if built != wanted:
        different = sorted(set(built.items()) ^ set(wanted.items()))
        raise ValueError(f"diffusers cannot build this UNet; the first parameter that differs is {different[0][0]}")
    return network


def _take_out(network: UNet2DConditionModel, architecture: Architecture) -> None:
    for path, module in list(network.named_modules()):
        if not isinstance(getattr(module, "transformer_blocks", None), nn.ModuleList):
            continue
        attention = split(from_diffusers([f"{path}.norm.weight"])[f"{path}.norm.weight"])[0]
        if depth := architecture.depth(attention):
            module.transformer_blocks = module.transformer_blocks[:depth]
        else:
            stage, layer = path.rsplit(".", 1)
            network.get_submodule(stage)[int(layer)] = _NoAttention()


def load_unet(file: UNetFile, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Network of a file, in ``dtype``, in evaluation mode."""
    with torch.device("meta"):
        network = build_unet(file.architecture)
    names = to_diffusers(file.architecture.shapes)
    network.load_state_dict({names[name]: weight.exact().to(dtype) for name, weight in file.tensors.items()}, assign=True)
    return network.eval()
