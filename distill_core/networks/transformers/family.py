"""What a family of diffusion transformers is: lists of equal blocks, and what tells it from others.

Names are those of ComfyUI's own files, so a family needs no table of them. Facts on which numbers of blocks open are of
ComfyUI 0.33 (comfy/model_detection.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BlockList:
    """Blocks of one kind that run one after another."""

    word: str
    """What plans call it: ``double``."""
    path: str
    """What files call it: ``double_blocks``."""
    depth_key: str = "num_layers"
    """What configs call its length; a file's metadata may hold one, and ComfyUI believes it."""
    least: int = 0
    """How many must stay."""
    diffusers: str = ""
    """What diffusers calls it, where that is another name: ``transformer_blocks``."""
    alike: bool = True
    """Whether all its blocks hold the same parameters."""
    last_stays: bool = False
    """Whether no other block can take the last one's place: it is of another shape, or something else comes of it."""
    last_swapped: tuple[str, str] | None = None
    """Layer of the last block whose two halves diffusers has the other way round: its name there, and ComfyUI's."""
    told_by: str = ""
    """Key of ComfyUI's config that says how long it is, where ComfyUI's own loaders do not count the blocks of a file."""
    residuals: str = ""
    """What ComfyUI's ControlNets call what they add to these blocks, under which a student's file says which of them it has; empty if
    nobody asks."""
    numbered_in: str = ""
    """Key of diffusers' config that lists some of its blocks by their numbers."""
    streams: tuple[str, ...] = ()
    """What ComfyUI's blocks call what they pass on, in the order they return it; empty if that is their first argument."""
    diffusers_streams: tuple[str, ...] = ()
    """The same of diffusers' blocks."""

    def given(self, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """The hidden states among a block's arguments: what it would return if it changed nothing."""
        if not self.streams:
            return args[0]
        found = tuple(named[name] if name in named else args[place] for place, name in enumerate(self.streams))
        return found if len(found) > 1 else found[0]


@dataclass(frozen=True)
class Family:
    """Transformers of one make."""

    name: str
    """``flux1``."""
    title: str
    """``Flux.1``."""
    marks: tuple[str, ...]
    """Parameters that its checkpoints hold and those of no family after it do; ``a|b`` stands for either."""
    lists: tuple[BlockList, ...] = ()
    belongs: Callable[[Mapping[str, Shape]], bool] = lambda shapes: True
    """What the marks leave open, told by shapes."""
    tables: tuple[str, ...] = ()
    """Tensors of its files that are no parameters."""
    marker: tuple[str, object, str] | None = None
    """Tensor of a file that sets something, which a network in memory knows by its config alone: key and value there, name here."""
    refiners: tuple[str, ...] = ()
    """Lists of blocks that no plan names, and that hold activations as others do."""
    beside: str = ""
    """List with an entry for each block, of one list of blocks after another, and perhaps more: ``caption_projection``."""
    entries_in: str = ""
    """Key of configs with such an entry for each block: ``llama_layers``."""
    spread: tuple[str, float] | None = None
    """Parameter of the second-to-last block; if its standard deviation is below the number, ComfyUI lets the network compute in float16."""
    learns: bool = False
    """Whether gradients through ComfyUI's blocks are right, plain and checkpointed (tests/nodes/healing.py compares differences)."""
    believes_config: bool = False
    """Whether ComfyUI believes a config in a file's metadata more than the file's tensors."""
    diffusers: tuple[str, ...] = ()
    """What diffusers calls its classes."""
    diffusers_tables: tuple[str, ...] = ()
    """Tensors of diffusers' files that are no parameters."""
    refusal: str = ""
    """Why it cannot be cut, and what can be done instead; empty if it can."""

    @property
    def in_diffusers(self) -> Family:
        """The same, spelled as diffusers does."""
        lists = (
            replace(
                blocks,
                path=blocks.diffusers or blocks.path,
                diffusers=blocks.path,
                last_swapped=None,
                streams=blocks.diffusers_streams,
            )
            for blocks in self.lists
        )
        return replace(self, lists=tuple(lists), tables=self.diffusers_tables, spread=None)

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether a checkpoint is of this family. shapes: by names without a prefix."""
        return all(any(name in shapes for name in mark.split("|")) for mark in self.marks) and self.belongs(shapes)
