"""Denoisers around transformers, whose network may be a teacher and its student at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..networks.name_map import NameMap
from ..networks.transformers.architecture import FAMILIES, Transformer
from .denoiser import Denoiser, instead


@dataclass(kw_only=True)
class TransformerDenoiser(Denoiser):
    """A denoiser around a transformer. Layers have the network's own names."""

    transformer: Transformer | None = None
    """What its network is made of; None if that is not known."""
    mapping: NameMap | None = None
    """To the student that it predicts as: it skips the blocks that are removed, and names layers as the student's."""
    lora_head: ClassVar[str]
    """What a layer's name begins with in LoRA files."""

    def way(self) -> AbstractContextManager:
        """The way through the network that a prediction takes."""
        if self.mapping is None or self.transformer is None:
            return contextlib.nullcontext()
        return skipping_blocks(self.network, self.transformer, self.mapping.removed)

    @property
    def skipped(self) -> frozenset[str]:
        return frozenset() if self.mapping is None else self.mapping.removed

    @property
    def runs(self) -> Mapping[str, tuple[str, str]]:
        return {} if self.mapping is None else self.mapping.folded

    @property
    def kept_blocks(self) -> Mapping[str, str]:
        blocks = () if self.transformer is None else self.transformer.in_order
        return {self.runs[block][1] if block in self.runs else block: block for block in blocks if block not in self.skipped}

    def tapped(self, value: Any) -> Tensor:
        """All tokens (B, L, D) of what a block returns, those of one stream after those of another."""
        streams = value if isinstance(value, tuple) else (value,)
        return torch.cat([stream for stream in streams if stream is not None], dim=1)

    @property
    def lora_names(self) -> dict[str, str]:
        layers = (path for path, module in self.network.named_modules() if hasattr(module, "weight"))
        own = (
            path for path in layers if not {"base_layer", "lora_A", "lora_B"} & {*path.split(".")}
        )  # not parts of a LoRA on it
        students = ((path, path if self.mapping is None else self.mapping.rename(path)) for path in own)
        return {path: f"{self.lora_head}.{name}" for path, name in students if name is not None}

    @property
    def inner_blocks(self) -> list[str]:
        if self.transformer is None or not self.transformer.of.learns:
            known = ", ".join(family.title for family in FAMILIES.values() if family.learns)
            raise ValueError(f"gradient_checkpointing works only for UNets and {known}; set it to false in the recipe")
        kept = [block for block in self.transformer.in_order if block not in self.skipped]
        return kept + self.transformer.refiners

    def path(self, name: str) -> str:
        return name

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())


@contextlib.contextmanager
def skipping_blocks(network: nn.Module, teacher: Transformer, removed: Iterable[str]) -> Iterator[None]:
    """While open, a transformer predicts as its student without these blocks would: they pass on what they are given.

    network: as ComfyUI or diffusers builds it, whichever spelling ``teacher`` has. Afterwards it is unchanged, whatever happens in between.
    """
    with contextlib.ExitStack() as stack:
        for block in set(removed) & set(teacher.in_order):
            blocks = teacher.lists[block.partition(".")[0]]
            stack.enter_context(
                instead(network.get_submodule(block), lambda *args, blocks=blocks, **named: blocks.given(args, named))
            )
        yield
