"""One network and several LoRAs on it, of which one at a time is on: students of about one model's size, on disk and in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from .adapter import attach, turn_on
from .denoiser import Denoiser


class SharedBase:
    """A frozen network with the LoRAs of several files on it; each of its students is the network with one of them on."""

    def __init__(self, base: Denoiser, files: Sequence[Path]):
        """files: as `adapter.Lora` writes them. The network is changed in place."""
        self.base, self._on, distinct = base, None, list(dict.fromkeys(files))
        self._lora_of = [distinct.index(file) for file in files]
        for number, file in enumerate(distinct):
            attach(base, file, _name(number))

    def student(self, number: int) -> Denoiser:
        """The network with the LoRA of one file on, as a denoiser of its own."""
        number = self._lora_of[number]

        def forward(*inputs, **options) -> Tensor:
            if self._on != number:  # stays on until another is asked
                turn_on(self.base.network, _name(number))
                self.base.network.requires_grad_(False)  # peft makes what it turns on trainable
                self._on = number
            return self.base.network(*inputs, **options)

        return replace(self.base, forward=forward)


def _name(number: int) -> str:
    return f"range_{number}"
