"""Pruning plans as one line of text: ``keep down 2,2:2,2:4 mid resnet up 3:4+4+10,3:2+1+1,3``.

Each side lists its stages in order, ``up`` from the innermost out; a list that is shorter than the UNet repeats its last
entry. A stage is ``LAYERS`` or ``LAYERS:DEPTHS``:

- ``LAYERS``: how many layers (a resnet and the attention after it) stay, 0 for none of the stage, or which: ``[0,2]``.
  A number keeps the first layers; an up stage keeps its last layer in place of the last of these, because the widths of
  the skip connections require it (Kim et al. 2023, arXiv 2305.15798, Sec. 3.1).
- ``DEPTHS``: how many transformer blocks stay in each attention of the stage, or which: ``4``, ``[0,1,2,6]``; one for all,
  or one for each layer, as in ``4+4+10``. 0 removes the attention. Without ``DEPTHS``, attentions stay whole.

``mid`` is ``full``, ``none``, ``resnet`` (one resnet), or a number of transformer blocks. A side that is not named stays
whole.

A plan for a transformer names the blocks of its lists that stay, ``keep double 0-4,16-18 single 0,3,7``, with ``none`` for none
of a list; or runs of blocks that each become one, their middle block, ``fold single 5-7,9-10``; or both, ``keep double 0-4 fold
single 5-7``. A list that is not named stays whole.
"""

from __future__ import annotations

import os
import re
from functools import singledispatch
from pathlib import Path

from ..base.documents import one_line, read_text
from ..networks.architecture import Architecture
from ..networks.network import Network
from ..networks.transformers.architecture import Transformer, ranges
from .plan import MAX_NAME_CHARS, PruningPlan, all_preset_names, example_plan, folded, name_map, preset

_NUMBERS = r"(?:[0-9]{1,4}|\[[0-9]{1,4}(?:,[0-9]{1,4})*\])"
_STAGE = re.compile(rf"({_NUMBERS})(?::({_NUMBERS}(?:\+{_NUMBERS})*))?")
_ENTRY = re.compile(r"(?:\[[^\[\]]*\]|[^,])*")  # up to a comma outside brackets
EXAMPLE = "keep down 1,1,1,1 mid none up 2,2,2,2"
EXAMPLE_OF_TRANSFORMERS = "keep double 0-4,16-18 single 0-37"
EXAMPLE_OF_FOLDING = "fold single 5-7,9-10"


def read_plan(text: str, teacher: Network) -> PruningPlan:
    """A plan from what a person wrote: the name of a preset, JSON, or the line of text above.

    ``ValueError`` says which part cannot be read or does not fit the teacher.
    """
    text = text.strip()
    if text in all_preset_names():
        return preset(text)
    if text.startswith("{"):
        return PruningPlan.from_json(text, example_plan(teacher).to_json())
    if len(text) > MAX_NAME_CHARS:
        raise ValueError(
            f"a plan in one line may have at most {MAX_NAME_CHARS:,} characters, got {len(text):,}; write it as JSON"
        )
    return _read(teacher, text)


def find_plan(given: str, teacher: Network, folder: Path = Path()) -> PruningPlan:
    """A plan from the name of a preset, from its text, or from a file with it. folder: where relative paths begin."""
    is_text = given in all_preset_names() or given.lstrip().startswith(("keep ", "fold ", "{"))
    is_text = is_text or (" " in given.strip() and not Path(given).suffix and not os.path.exists(folder / given))
    return read_plan(given if is_text else read_text(folder / os.path.expanduser(given)), teacher)


def write_plan(plan: PruningPlan, teacher: Network) -> str:
    """The line of text for a plan, so that ``read_plan`` of it removes the same blocks."""
    return _write(teacher, plan)


@singledispatch
def _read(teacher: Network, text: str) -> PruningPlan:
    raise AssertionError(f"plans of {type(teacher).__name__} have no text")


@singledispatch
def _write(teacher: Network, plan: PruningPlan) -> str:
    raise AssertionError(f"plans of {type(teacher).__name__} have no text")


# --- transformers ---------------------------------------------------------------------------------------------------

_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")
_RUN = re.compile(r"([0-9]{1,4})-([0-9]{1,4})")


@_write.register
def _(teacher: Transformer, plan: PruningPlan) -> str:
    mapping, folds = name_map(teacher, plan), folded(teacher, plan)
    keep, fold = [], []
    for blocks in teacher.of.lists:
        there, runs = teacher.numbers(blocks.path), folds.get(blocks.path, [])
        kept = [n for n in there if f"{blocks.path}.{n}" not in mapping.removed]
        if not there:  # HunyuanVideo 1.5 has doubles alone
            continue
        if runs and len(there) - len(kept) == sum(len(run) - 1 for run in runs):
            fold.append(f"{blocks.word} {','.join(f'{run[0]}-{run[-1]}' for run in runs)}")
        else:  # what a plan folds and removes besides has no shorter form
            keep.append(f"{blocks.word} {ranges(kept)}")
    return " ".join(" ".join([verb, *entries]) for verb, entries in (("keep", keep), ("fold", fold)) if entries)


@_read.register
def _(teacher: Transformer, text: str) -> PruningPlan:
    def error(reason: str) -> ValueError:
        example = write_plan(example_plan(teacher), teacher)
        return ValueError(
            f"cannot read the plan {one_line(text)!r}: {one_line(reason)}; an example for this transformer is {example!r}"
        )

    words = re.sub(r" ?([,-]) ?", r"\1", " ".join(text.split())).split()
    words = words if words[:1] and words[0] in ("keep", "fold") else ["keep", *words]
    paths = {blocks.word: blocks.path for blocks in teacher.of.lists}
    parts = [part.split() for part in re.findall(r"(?:keep|fold)(?: (?!keep |fold )\S+ \S+)*", " ".join(words))]
    named = [word for part in parts for word in part[1::2]]
    if sum(map(len, parts)) != len(words) or not named or not set(named) <= paths.keys() or len(set(named)) != len(named):
        raise error(
            f"it is not a preset, not JSON, and does not say for each of {', '.join(paths)}, once at most, which blocks to keep or fold"
        )
    remove: list[str] = []
    keep: dict[str, tuple[int, ...]] = {}
    fold: dict[str, tuple[tuple[int, int], ...]] = {}
    for verb, word, entry in ((verb, *pair) for verb, *rest in parts for pair in zip(rest[::2], rest[1::2], strict=True)):
        there = teacher.numbers(paths[word])
        if verb == "fold":
            runs = [(int(match[1]), int(match[2])) for match in map(_RUN.fullmatch, entry.split(",")) if match]
            ends = [end for run in runs for end in run]
            if len(runs) <= entry.count(",") or ends != sorted(set(ends)) or not set(ends) <= set(there):
                raise error(
                    f"{entry!r} does not list runs of {word}, such as '5-7,9-10', in ascending order; the transformer has {ranges(there)}"
                )
            fold[word] = tuple(runs)
            continue
        kept = [] if entry == "none" else _numbers(entry)
        if kept is None or kept != sorted(set(kept)) or not set(kept) <= set(there):
            raise error(f"{entry!r} does not list blocks of {word} in ascending order; the transformer has {ranges(there)}")
        if there and not kept:
            remove.append(word)
        elif kept != there:
            keep[word] = tuple(kept)
    if not remove and not keep and not fold:
        raise error("it keeps everything")
    return PruningPlan(name=" ".join(text.split()), remove=tuple(remove), keep=keep, fold=fold)


def _numbers(entry: str) -> list[int] | None:
    """``0-4,7`` as numbers; None if it is no such list."""
    found: list[int] = []
    for part in entry.split(","):
        if not (match := _RANGE.fullmatch(part)):
            return None
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


# --- reading --------------------------------------------------------------------------------------------------------


@_read.register
def _(teacher: Architecture, text: str) -> PruningPlan:
    return _Reader(text, teacher).plan()


class _Reader:
    """Reads one text for one UNet."""

    def __init__(self, text: str, teacher: Architecture):
        self.text, self.teacher = text, teacher
        self.remove: list[str] = []
        self.keep: dict[str, tuple[int, ...]] = {}

    def plan(self) -> PruningPlan:
        words = re.sub(r" ?([,+:]) ?", r"\1", " ".join(self.text.split())).split()
        words = words[1:] if words[:1] == ["keep"] else words
        if len(words) % 2 or not set(words[::2]) <= {"down", "mid", "up"} or len(set(words[::2])) * 2 != len(words):
            raise self.error("it is not a preset, not JSON, and not of the form 'keep down ... mid ... up ...'")
        for side, entry in zip(words[::2], words[1::2], strict=True):
            if side == "mid":
                self.read_mid(entry)
            else:
                self.read_side(side, _entries(entry))
        if not self.remove and not self.keep:
            raise self.error("it keeps everything")
        return PruningPlan(name=" ".join(self.text.split()), remove=tuple(self.remove), keep=self.keep)

    def error(self, reason: str) -> ValueError:
        example = write_plan(example_plan(self.teacher), self.teacher)
        return ValueError(
            f"cannot read the plan {one_line(self.text)!r}: {one_line(reason)}; an example for this UNet is {example!r}"
        )

    def read_side(self, side: str, entries: list[str]) -> None:
        stages = self.teacher.stages(side)
        if len(entries) > len(stages):
            raise self.error(f"{side} lists {len(entries)} stages but this UNet has {len(stages)}")
        for stage, entry in zip(stages, entries + entries[-1:] * (len(stages) - len(entries)), strict=True):
            if not (match := _STAGE.fullmatch(entry)):
                raise self.error(f"{entry!r} is not the number of layers that {stage} keeps")
            self.read_stage(stage, match[1], match[2])

    def read_stage(self, stage: str, layers: str, depths: str | None) -> None:
        there = self.teacher.numbers(f"{stage}.resnet")
        kept = self.pick(layers, there, f"resnets in {stage}", last=stage.startswith("up"))
        if not kept:
            self.remove.append(stage)
            return
        for layer in (layer for layer in there if layer not in kept):
            self.remove += [
                block for block in (f"{stage}.resnet.{layer}", f"{stage}.attn.{layer}") if block in self.teacher.modules
            ]
        if depths is None:
            return
        wanted = depths.split("+")
        if len(wanted) not in (1, len(kept)):
            raise self.error(f"{stage} keeps {len(kept)} layers but {len(wanted)} depths are given")
        for layer, depth in zip(kept, wanted * (len(kept) // len(wanted)), strict=True):
            self.read_depth(f"{stage}.attn.{layer}", depth)

    def read_depth(self, attention: str, depth: str) -> None:
        there = self.teacher.numbers(f"{attention}.block")
        if not (kept := self.pick(depth, there, f"transformer blocks in {attention}")):
            self.remove += [attention] if there else []
        elif kept != there:
            self.keep[attention] = tuple(kept)

    def read_mid(self, entry: str) -> None:
        if entry == "none":
            self.remove.append("mid")
        elif entry == "resnet":
            self.remove += ["mid.attn.0", "mid.resnet.1"]
        elif re.fullmatch(_NUMBERS, entry) and entry != "0":
            self.read_depth("mid.attn.0", entry)
        elif entry != "full":
            raise self.error(f"{entry!r} is not a mid block; use full, resnet, none, or a number of transformer blocks")

    def pick(self, entry: str, there: list[int], what: str, last: bool = False) -> list[int]:
        """The existing numbers that an entry keeps."""
        if entry.startswith("["):
            picked = [int(number) for number in entry[1:-1].split(",")]
            if picked != sorted(set(picked)) or not set(picked) <= set(there):
                raise self.error(f"{entry} must list {what} in ascending order; the UNet has {there}")
            return picked
        if (number := int(entry)) > len(there):
            raise self.error(f"it keeps {number} {what}, but there are only {len(there)}")
        return _first(number, there, last)


def _entries(text: str) -> list[str]:
    """The parts between commas outside brackets."""
    entries, start = [], 0
    while start <= len(text):
        entry = _ENTRY.match(text, start)
        assert entry  # empty at least
        entries.append(entry[0])
        start += len(entries[-1]) + 1
    return entries


def _first(number: int, there: list[int], last: bool) -> list[int]:
    """The first ``number`` ones; if ``last``, the very last one replaces the last of these."""
    return there[: number - 1] + there[-1:] if last and number else there[:number]


# --- writing --------------------------------------------------------------------------------------------------------


@_write.register
def _(teacher: Architecture, plan: PruningPlan) -> str:
    removed = name_map(teacher, plan).removed
    sides = (
        f"{side} {','.join(_write_stage(stage, removed, teacher) for stage in teacher.stages(side))}" for side in ("down", "up")
    )
    down, up = sides
    return f"keep {down} mid {_write_mid(removed, teacher)} {up}"


def _write_numbers(kept: list[int], there: list[int], last: bool = False) -> str:
    short = kept == _first(len(kept), there, last)
    return str(len(kept)) if short else f"[{','.join(map(str, kept))}]"


def _write_depth(attention: str, removed: frozenset[str], teacher: Architecture) -> str:
    there = teacher.numbers(f"{attention}.block")
    return _write_numbers([n for n in there if f"{attention}.block.{n}" not in removed], there)


def _write_stage(stage: str, removed: frozenset[str], teacher: Architecture) -> str:
    there = teacher.numbers(f"{stage}.resnet")
    kept = [layer for layer in there if f"{stage}.resnet.{layer}" not in removed]
    layers = _write_numbers(kept, there, last=stage.startswith("up"))
    depths = [_write_depth(f"{stage}.attn.{layer}", removed, teacher) for layer in kept]
    if depths == [str(teacher.depth(f"{stage}.attn.{layer}")) for layer in kept]:
        return layers
    return f"{layers}:{depths[0] if len(set(depths)) == 1 else '+'.join(depths)}"


def _write_mid(removed: frozenset[str], teacher: Architecture) -> str:
    if "mid.resnet.0" in removed or "mid.resnet.0" not in teacher.modules:
        return "none" if "mid.resnet.0" in removed else "full"
    if "mid.attn.0" in removed:
        return "resnet"
    depth = _write_depth("mid.attn.0", removed, teacher)
    return "full" if depth == str(teacher.depth("mid.attn.0")) else depth
