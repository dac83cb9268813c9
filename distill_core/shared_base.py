"""One network and several LoRAs on it, of which one at a time is on: students of about one model's size, on disk and in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from .adapter import attach
from .denoiser import Denoiser


class SharedBase:
    """A frozen network with the LoRAs of several files on it; each of its students is the network with one of them on."""

    def __init__(self, base: Denoiser, files: Sequence[Path]):
        """files: as `adapter.Lora` writes them. The network is changed in place."""
        self.base = base
        self._layers = [attach(base, file, _name(number)) for number, file in enumerate(files)]
        self._on: int | None = None

    def student(self, number: int) -> Denoiser:
        """The network with one LoRA on, as a denoiser of its own."""

        def forward(*inputs, **options) -> Tensor:
            self._switch(number)
            return self.base.network(*inputs, **options)

        return replace(self.base, forward=forward)

    def _switch(self, number: int) -> None:
        if self._on == number:
            return
        for layer in {layer for layers in self._layers for layer in layers}:
            self.base.module(layer).set_adapter(_name(number) if layer in self._layers[number] else [])
        self.base.network.requires_grad_(False)  # peft makes what it turns on trainable
        self._on = number


def _name(number: int) -> str:
    return f"range_{number}"
