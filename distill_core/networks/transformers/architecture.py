"""What a diffusion transformer is made of, read from the names and shapes of its parameters alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from ..packed import weight_beside
from ..residuals import Kept, KeptBlocks, Rename
from . import cosmos, flux, hidream, hunyuan, ltxv, lumina, others, qwen_image, sd3, wan
from .family import BlockList, Family, Shape

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in (sd3, flux, hunyuan, lumina, qwen_image, wan, ltxv, cosmos, hidream, others)
    for family in module.FAMILIES
}
"""In the order they are tried."""
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "net.")
_QUANTISING = re.compile(
    r"(?:^|\.)(?:scale_weight|scale_input|weight_scale|weight_scale_2|input_scale|pre_quant_scale|comfy_quant|scaled_fp8)$|^__.+__$"
)
"""Tensors that say how a weight is stored, or mark the whole network; they are no parameters."""


@dataclass(frozen=True)
class Transformer:
    """A diffusion transformer, given by its parameter names, as ComfyUI spells them, and shapes."""

    of: Family
    shapes: Mapping[str, Shape]
    packed: bool = False
    """Whether its file stores weights in whole numbers, or lists quantised layers in its metadata."""

    @classmethod
    def find(cls, shapes: Mapping[str, Shape]) -> tuple[Transformer, str] | None:
        """The transformer among a file's tensors, and its prefix; None if there is none that is known.

        Blocks may be numbered with gaps, as some published students are; `contiguous` closes them. ``ValueError`` if its family
        cannot be cut.
        """
        for prefix in PREFIXES:
            bare = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
            family = next((family for family in FAMILIES.values() if family.fits(bare)), None)
            if family is None:
                continue
            if family.refusal:
                raise ValueError(f"it is {family.title}, which cannot be cut: {family.refusal}")
            return cls(family, bare), prefix
        return None

    def holds(self, name: str) -> bool:
        """Whether a layer or a parameter is in one of its blocks."""
        return self._block(name) in self.blocks

    def contiguous(self, name: str) -> str:
        """A parameter's name when blocks are numbered from 0 without gaps, as ComfyUI counts them."""
        block = self._block(name)
        return self._numbering[block] + name[len(block) :]

    @cached_property
    def _numbering(self) -> dict[str, str]:
        return self.renumbered(self.blocks)

    @property
    def family(self) -> str:
        return self.of.name

    @property
    def lists(self) -> dict[str, BlockList]:
        """Lists of blocks by what files call them."""
        return {blocks.path: blocks for blocks in self.of.lists}

    @cached_property
    def blocks(self) -> frozenset[str]:
        """Blocks of the lists, ``double_blocks.3``, and the first part of every other name, ``img_in``."""
        return frozenset(self._block(name) for name in self.shapes)

    def _block(self, name: str) -> str:
        first, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        return f"{first}.{number}" if number.isdigit() and (first in self.lists or first == self.of.beside) else first

    @cached_property
    def num_parameters(self) -> int:
        weights = (name for name in self.shapes if name not in self.of.tables and not self._is_about_storage(name))
        return sum(prod(self.shapes[name]) for name in weights)

    @cached_property
    def quantised(self) -> bool:
        """Whether some weights stand for other numbers than those that are stored."""
        return self.packed or any(self._is_about_storage(name) and not name.startswith("__") for name in self.shapes)

    def _is_about_storage(self, name: str) -> bool:
        return bool(_QUANTISING.search(name) or weight_beside(name, self.shapes))

    def numbers(self, path: str) -> list[int]:
        """Numbers of the blocks in a list."""
        return sorted(int(block.rpartition(".")[2]) for block in self.blocks if block.startswith(f"{path}."))

    @property
    def refiners(self) -> list[str]:
        """Blocks that no plan names, such as ``noise_refiner.0``."""
        found = {".".join(name.split(".")[:2]) for name in self.shapes if name.split(".")[0] in self.of.refiners}
        return sorted(found)

    def check_whole(self) -> None:
        """``ValueError`` unless there are enough blocks, and all of a list hold the same parameters."""
        for path, blocks in self.lists.items():
            numbers = self.numbers(path)
            if len(numbers) < blocks.least:
                raise ValueError(f"{path} has no blocks")
            held: dict[int, dict[str, Shape]] = {number: {} for number in numbers}
            for name, shape in self.shapes.items():
                first, _, rest = name.partition(".")
                if first == path and not self._is_about_storage(name):
                    number_text, _, inner = rest.partition(".")
                    held[int(number_text)][inner] = () if self.quantised else shape
            for number in numbers[1:] if blocks.alike else ():
                if held[number] != held[numbers[0]]:
                    odd = min({*held[number].items()} ^ {*held[numbers[0]].items()})[0]
                    raise ValueError(f"{path}.{number}.{odd} is missing or has another shape than in {path}.{numbers[0]}")

    # --- pruning

    kind = "transformer"

    @property
    def title(self) -> str:
        """What kind of transformer it is."""
        return self.of.title

    @cached_property
    def depths(self) -> dict[str, int]:
        """Number of blocks in each list."""
        return {blocks.word: len(self.numbers(blocks.path)) for blocks in self.of.lists}

    @property
    def told_depths(self) -> dict[str, int]:
        """What a config of ComfyUI's must be told; empty if its own loaders count the blocks."""
        return {blocks.told_by: self.depths[blocks.word] for blocks in self.of.lists if blocks.told_by}

    @property
    def loading_note(self) -> str:
        """What a person must know to open a student in ComfyUI; empty if its own loaders open it as it is."""
        if not self.told_depths:
            return ""
        return (
            f"Open it with Load Distilled Model: ComfyUI's own loaders do not count the blocks of {self.title}, and fill in missing ones "
            "with whatever is in memory."
        )

    @property
    def modules(self) -> frozenset[str]:
        """The smallest parts a plan can remove are whole blocks."""
        return self.blocks

    def example(self) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
        """What a plan may remove and keep, as a starting point for a person."""
        longest = max(self.of.lists, key=lambda blocks: len(self.numbers(blocks.path)))
        numbers = self.numbers(longest.path)
        return (), {longest.word: (*numbers[: (len(numbers) - 1) // 2], numbers[-1])}

    @property
    def stack_words(self) -> str:
        return f"one of its lists of blocks ({', '.join(blocks.word for blocks in self.of.lists)})"

    def spelled_out(self, pattern: str) -> str:
        """A pattern of blocks with the list's name as files have it: ``double.3`` is ``double_blocks.3``."""
        word, dot, rest = pattern.partition(".")
        return next((blocks.path for blocks in self.of.lists if blocks.word == word), word) + dot + rest

    def nodes(self, block: str) -> Iterable[str]:
        """A block and the list it is in; nothing for what is in no list, which always stays."""
        path = block.partition(".")[0]
        return (path, block) if path in self.lists else ()

    def stack_of(self, block: str) -> str | None:
        """The list that a block is in."""
        path = block.partition(".")[0]
        return path if path in self.lists else None

    @cached_property
    def in_order(self) -> list[str]:
        """All blocks, one list after another."""
        return [f"{path}.{number}" for path in self.lists for number in self.numbers(path)]

    def orphans(self, removed: Set[str]) -> set[str]:
        """Entries beside the blocks that are removed."""
        entries = (f"{self.of.beside}.{number}" for number in self.numbers(self.of.beside)) if self.of.beside else ()
        return {entry for entry, block in zip(entries, self.in_order, strict=False) if block in removed}

    def check_kept(self, shapes: Mapping[str, Shape]) -> None:
        """``ValueError`` if too few blocks are kept; its words follow the name of a plan."""
        kept = replace(self, shapes=shapes)
        for path, blocks in self.lists.items():
            if len(kept.numbers(path)) < blocks.least:
                raise ValueError(f"removes every block of {path}; keep one at least")
            if blocks.last_stays and (last := self.numbers(path)[-1]) not in kept.numbers(path):
                raise ValueError(f"removes {path}.{last}, the last block, whose place no other can take; keep it")
        if not any(kept.numbers(path) for path in self.lists):
            raise ValueError("removes every block; keep one at least")

    def kept_residuals(self, rename: Rename) -> KeptBlocks:
        """Its blocks that a student has, of those that a ControlNet adds to."""
        return KeptBlocks({
            blocks.residuals: Kept(len(numbers), tuple(i for i, n in enumerate(numbers) if rename(f"{blocks.path}.{n}")))
            for blocks in self.of.lists
            if blocks.residuals and (numbers := self.numbers(blocks.path))
        })  # fmt: skip

    @staticmethod
    def renumbered(blocks: Iterable[str]) -> dict[str, str]:
        """Number the remaining blocks of each list from 0."""
        order = sorted(blocks, key=lambda block: [int(part) if part.isdigit() else part for part in block.split(".")])
        seen: dict[str, int] = {}
        table = {}
        for block in order:
            path, dot, number = block.partition(".")
            table[block] = f"{path}.{seen.setdefault(path, 0)}" if dot else block
            seen[path] = seen.get(path, 0) + 1
        return table

    def describe_lists(self) -> dict[str, str]:
        """Numbers of the blocks in each list, as text: ``0-18``."""
        return {blocks.word: ranges(self.numbers(blocks.path)) for blocks in self.of.lists}


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as text: ``0-4,16-18``; ``none`` if there are none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"
