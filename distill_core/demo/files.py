"""Where the files of the demo are, and how its small networks are read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file
from torch import nn

DATA = Path(__file__).parent / "data"
TRANSFORMER = DATA / "transformer.safetensors"
Network = TypeVar("Network", bound=nn.Module)


def bundled(network: Network, name: str) -> Network:
    """A network with the bundled weights ``NAME.safetensors``, in float32, in evaluation mode."""
    network.load_state_dict(load_file(DATA / f"{name}.safetensors"))  # copies float16 into float32
    return network.eval().requires_grad_(False)
