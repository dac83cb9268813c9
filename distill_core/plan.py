"""Which blocks of a UNet go, and the one teacher -> student name map that follows from it.

The map serves weight inheritance, the pairing of feature points, and everything keyed by block names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .architecture import Architecture, nodes
from .layouts import heads

PRESETS = Path(__file__).parent / "presets"
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """Blocks to remove, in canonical names."""

    name: str
    """Name of the preset, or whatever a hand-made plan calls itself."""
    remove: tuple[str, ...]
    """Blocks or patterns of blocks: ``up.1.attn.0``, ``down.*.resnet.1``, ``mid``, ``down.inner``. A star stands for one
    part of a name; ``inner`` for the innermost stage. Every pattern must match something."""
    teacher: str | None = None
    """Family of UNet the plan is meant for (``sd1``, ``sd2``, ``sdxl``); None for any."""
    title: str = ""
    """What a person reads in a list of presets."""
    source: str = ""
    """Paper or repository the plan comes from."""

    def __post_init__(self):
        if not self.remove or not all(isinstance(pattern, str) for pattern in self.remove):
            raise ValueError(f"plan {self.name!r}: 'remove' must be a list of at least one block name")
        if self.teacher not in (None, *_FAMILIES):
            raise ValueError(f"plan {self.name!r}: unknown teacher {self.teacher!r}; choose from {sorted(_FAMILIES)}")

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read a plan; ``ValueError`` says what is wrong with it."""
        try:
            fields = json.loads(text)
            if not isinstance(fields["remove"], list):
                raise TypeError("'remove' is no list")
            return cls(**fields | {"remove": tuple(fields["remove"])})
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(
                f'not a pruning plan: {error}; a plan looks like {{"name": "mine", "remove": ["mid", "down.*.resnet.1"]}}'
            ) from error

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "remove": list(self.remove)})


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def preset(name: str) -> PruningPlan:
    """Look a published plan up by name; ``ValueError`` lists the choices."""
    if name not in preset_names():
        raise ValueError(f"unknown preset {name!r}; choose from {preset_names()}")
    return PruningPlan.from_json((PRESETS / f"{name}.json").read_text())


@dataclass(frozen=True)
class NameMap:
    """Teacher block -> student block, for every block that stays."""

    table: Mapping[str, str]
    removed: frozenset[str]
    """Teacher blocks that go, the resampling layers the new shape no longer needs included."""

    @classmethod
    def identity(cls, architecture: Architecture) -> NameMap:
        """Nothing removed: the student has the teacher's shape."""
        return cls({block: block for block in architecture.blocks}, frozenset())

    def rename(self, name: str) -> str | None:
        """Student's name of a teacher's parameter or block; None for what was removed."""
        for head in heads(name):
            if head in self.removed:
                return None
            if head in self.table:
                return self.table[head] + name[len(head) :]
        return None

    def apply(self, by_name: Mapping[str, Value]) -> dict[str, Value]:
        """Keep and rename the entries of a mapping keyed by teacher's names: shapes, weights, anything."""
        renamed = ((self.rename(name), value) for name, value in by_name.items())
        return {name: value for name, value in renamed if name is not None}

    @property
    def stages(self) -> dict[str, str]:
        """Teacher's stage -> the student's that inherits from it, as in ``{"down.0": "down.0", "up.1": "up.0"}``."""
        pairs = ((teacher.split("."), student.split(".")) for teacher, student in self.table.items())
        return {".".join(t[:2]): ".".join(s[:2]) for t, s in sorted(pairs) if t[0] in ("down", "up")}


def name_map(teacher: Architecture, plan: PruningPlan) -> NameMap:
    """Apply a plan to a teacher; ``ValueError`` says which block is at fault if no working UNet comes out."""
    if plan.teacher is not None and teacher.family != plan.teacher:
        raise ValueError(
            f"{plan.name} is a plan for {_FAMILIES[plan.teacher]} UNets, this one is {_describe(teacher)}; "
            "choose a preset made for it"
        )
    matched = {pattern: _matching(pattern, teacher) for pattern in plan.remove}
    for pattern, blocks in matched.items():
        if not blocks:
            raise ValueError(
                f"{plan.name} removes {pattern!r}, which this UNet does not have: it has been pruned already, "
                "or is of another shape; start from the full model"
            )
    removed = set().union(*matched.values())
    removed |= _orphaned_resampling(teacher, removed)
    mapping = NameMap(_renumber(teacher.blocks - removed), frozenset(removed))
    pruned(teacher, mapping, plan.name).check_wiring()
    return mapping


def pruned(teacher: Architecture, mapping: NameMap, plan_name: str = "the plan") -> Architecture:
    """Architecture of the student."""
    student = Architecture(mapping.apply(teacher.shapes), teacher.head_channels)
    for end in ("conv_in", "conv_out", "norm_out", "time_embed.0", "time_embed.1"):
        if end not in student.modules:
            raise ValueError(f"{plan_name} removes {end}, without which there is no UNet")
    mid = {module for module in student.modules if module.startswith("mid.")}
    if mid not in (set(), {"mid.resnet.0"}, {"mid.resnet.0", "mid.attn.0", "mid.resnet.1"}):
        raise ValueError(
            f"{plan_name} leaves a mid block of {', '.join(sorted(mid))}, which no UNet has; keep it whole, "
            "keep one resnet of it, or remove it"
        )
    for attention in (block for block in student.modules if ".attn." in block):
        if attention.replace("attn", "resnet") not in student.modules:
            raise ValueError(f"{plan_name} keeps an attention of which it removes the resnet in front ({attention})")
        if not student.depth(attention):
            raise ValueError(f"{plan_name} keeps an attention without any transformer block ({attention}); remove it whole")
    return student


_FAMILIES = {"sd1": "SD1.x-shaped", "sd2": "SD2-shaped", "sdxl": "SDXL-shaped", "unet": "of no known family"}


def _describe(architecture: Architecture) -> str:
    return f"{_FAMILIES[architecture.family]} (context width {architecture.context_width})"


def _matching(pattern: str, teacher: Architecture) -> set[str]:
    """Blocks a pattern removes: those it matches, and all inside them."""
    stages = teacher.numbers("down")
    pattern = pattern.replace("down.inner", f"down.{stages[-1]}").replace("up.inner", "up.0")
    expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    return {block for block in teacher.blocks if any(expression.fullmatch(node) for node in nodes(block))}


def _orphaned_resampling(teacher: Architecture, removed: set[str]) -> set[str]:
    """The downsampling into, and the upsampling out of, stages that are gone."""

    def remaining(side: str) -> list[str]:
        return [s for s in teacher.stages(side) if any(b.startswith(f"{s}.resnet.") for b in teacher.blocks - removed)]

    down, up = remaining("down"), remaining("up")
    if not down or not up:
        raise ValueError("the plan removes every resnet on one side of the UNet")
    return {f"{down[-1]}.downsample", f"{up[-1]}.upsample"} & (teacher.blocks - removed)


def _renumber(blocks: Iterable[str]) -> dict[str, str]:
    """Number the stages, resnets and transformer blocks that stay from 0 again; an attention follows its resnet."""
    order = sorted(blocks, key=lambda block: [int(part) if part.isdigit() else part for part in block.split(".")])
    numbers: dict[str, dict[str, int]] = {}

    def new(scope: str, number: str) -> str:
        seen = numbers.setdefault(scope, {})
        return str(seen.setdefault(number, len(seen)))

    # Resnets first: they give their attentions the new number.
    for block in order:
        if match := re.match(r"((?:down|up))\.(\d+)\.resnet\.(\d+)", block):
            new(match[1], match[2])
            new(f"{match[1]}.{match[2]}", match[3])
    table = {}
    for block in order:
        parts = block.split(".")
        renamed = list(parts)
        if parts[0] in ("down", "up"):
            renamed[1] = new(parts[0], parts[1])
            if len(parts) > 3:
                renamed[3] = new(f"{parts[0]}.{parts[1]}", parts[3])
        elif parts[:2] == ["mid", "resnet"]:
            renamed[2] = new("mid", parts[2])
        if len(parts) > 4 or parts[:2] == ["mid", "attn"] and len(parts) > 3:
            renamed[-1] = new(block.rsplit(".", 1)[0], parts[-1])
        table[block] = ".".join(renamed)
    return table
