"""One network with several LoRAs, one active at a time: experts that together take about the size of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..diffusion.denoiser import Denoiser
from .layers import attach, turn_on


class AdapterSwitch:
    """A frozen network with the LoRAs of several files; one of them is active at a time."""

    def __init__(self, base: Denoiser, files: Sequence[Path]):
        """files: as `layers.Lora` writes them. The network is changed in place."""
        self.base, distinct = base, list(dict.fromkeys(files))
        self._on: int | None = None
        self._lora_of = [distinct.index(file) for file in files]
        for number, file in enumerate(distinct):
            attach(base, file, _name(number))

    def using(self, number: int) -> Denoiser:
        """The network with the LoRA of one file active, as a denoiser of its own."""
        number = self._lora_of[number]

        def forward(*inputs, **options) -> Tensor:
            if self._on != number:  # stays active until another LoRA is used
                turn_on(self.base.network, _name(number))
                self.base.network.requires_grad_(False)  # peft makes the adapters it activates trainable
                self._on = number
            return self.base.network(*inputs, **options)

        return replace(self.base, forward=forward)


def _name(number: int) -> str:
    return f"range_{number}"
