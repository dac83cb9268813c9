"""Plans of which blocks of a network to remove, and the teacher -> student name map that follows from a plan.

The map serves weight inheritance, the pairing of feature layers, and everything else keyed by block names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from ..base.documents import expect, lines, one_line, parse_json, read_text
from ..networks.architecture import Architecture
from ..networks.layouts import heads
from ..networks.transformers.architecture import FAMILIES, Transformer

PRESETS = Path(__file__).parent / "presets"
Value = TypeVar("Value")
Network = Architecture | Transformer
Same = TypeVar("Same", Architecture, Transformer)
EXAMPLE = '{"name": "mine", "remove": ["mid", "down.*.resnet.1"], "keep": {"down.2.attn.*": [0, 1, 2, 6]}}'
MAX_PATTERNS, MAX_PATTERN_CHARS, MAX_NAME_CHARS = 500, 100, 2000
"""Limits of a plan: several times what it takes to name every block of SDXL."""
_MAX_SKIPS = 1000
_METADATA = "distill.plan"


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """Blocks to remove, in canonical names."""

    name: str
    """Name of the preset, or any name for a hand-made plan."""
    remove: tuple[str, ...] = ()
    """Blocks or patterns of blocks: ``up.1.attn.0``, ``down.*.resnet.1``, ``mid``, ``down.inner``. A star stands for one
    part of a name; ``inner`` for the innermost stage. Every pattern must match something."""
    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Attention or pattern of attentions -> transformer blocks of its stack that stay, as in ``{"down.2.attn.*": (0, 1)}``;
    the others are removed. Attentions that are removed whole are not listed here."""
    teacher: str | None = None
    """Family of UNets that the plan is for (``sd1``, ``sd2``, ``sdxl``); None for any."""
    title: str = ""
    """Short description for a list of presets."""
    source: str = ""
    """Paper or repository that the plan comes from."""
    choice: str = ""
    """What the source leaves open, what is chosen here, and why. `with_keep` makes another choice."""

    def __post_init__(self):
        if len(self.name) > MAX_NAME_CHARS:
            raise ValueError(f"a plan's name may have at most {MAX_NAME_CHARS:,} characters, got {len(self.name):,}; shorten it")
        patterns = [*self.remove, *self.keep]
        if len(patterns) > MAX_PATTERNS or any(len(str(pattern)) > MAX_PATTERN_CHARS for pattern in patterns):
            raise ValueError(
                f"plan {self.name[:60]!r} is too long: it may have at most {MAX_PATTERNS:,} patterns of {MAX_PATTERN_CHARS} "
                "characters; use stars, as in 'down.*.attn.1'"
            )
        if not (self.remove or self.keep) or not all(isinstance(pattern, str) for pattern in self.remove):
            raise ValueError(
                f"plan {self.name!r}: 'remove' must be a list of block names, with at least one unless 'keep' has one"
            )
        for attention, blocks in self.keep.items():
            if (
                not blocks
                or not all(type(block) is int and block >= 0 for block in blocks)
                or list(blocks) != sorted(set(blocks))
            ):
                raise ValueError(
                    f"plan {self.name!r}: 'keep' of {attention!r} must list transformer blocks in ascending order, such as "
                    "[0, 1, 2]; list an attention that is removed whole in 'remove'"
                )
        if self.teacher not in (None, *_FAMILIES):
            raise ValueError(f"plan {self.name!r}: unknown teacher {self.teacher!r}; choose from {sorted(_FAMILIES)}")

    @classmethod
    def from_json(cls, text: str, example: str = EXAMPLE) -> PruningPlan:
        """A plan from JSON; ``ValueError`` says what is wrong and shows an example. The name may be left out."""
        try:
            fields = {"name": "a plan of your own", "remove": [], "keep": {}} | parse_json(text, "the text")
            for name in ("name", "title", "source", "choice"):
                expect(fields.setdefault(name, ""), str, f"'{name}'")
            remove, keep = expect(fields["remove"], list, "'remove'"), expect(fields["keep"], dict, "'keep'")
            kept = {attention: tuple(expect(blocks, list, f"'keep' of {attention!r}")) for attention, blocks in keep.items()}
            fields |= {"name": " ".join(lines(fields["name"])), "remove": tuple(remove), "keep": kept}
            if unknown := fields.keys() - cls.__dataclass_fields__.keys():
                raise ValueError(f"{one_line(min(unknown))!r} is not part of a plan")
        except ValueError as error:
            raise ValueError(f"not a pruning plan: {error}; a plan looks like {example}") from error
        return cls(**fields)

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata for a student's file, which `plan_in` reads."""
        return {_METADATA: self.to_json()}

    def to_json(self) -> str:
        """The plan as JSON, without a preset's descriptions."""
        keep = {"keep": {attention: list(blocks) for attention, blocks in self.keep.items()}} if self.keep else {}
        return json.dumps({"name": self.name, "remove": list(self.remove), **keep})

    @classmethod
    def removing(cls, removed: Iterable[str], teacher: Architecture, name: str, family: str | None = None) -> PruningPlan:
        """The plan that removes exactly these blocks of a teacher."""
        removed = set(removed) & teacher.blocks
        whole = sorted(removed & teacher.modules)
        thinned = {block.rsplit(".block.", 1)[0] for block in removed - teacher.modules} - set(whole)
        keep = {a: tuple(n for n in teacher.numbers(f"{a}.block") if f"{a}.block.{n}" not in removed) for a in sorted(thinned)}
        return cls(name=name, remove=tuple(whole), keep=keep, teacher=family)

    def with_keep(self, keep: Mapping[str, tuple[int, ...]]) -> PruningPlan:
        """The same plan with another choice of transformer blocks; ``ValueError`` for attentions that it does not thin out."""
        for attention in keep:
            if attention not in self.keep:
                raise ValueError(
                    f"{self.name} does not thin out {attention!r}; it thins out {', '.join(self.keep) or 'no attention'}"
                )
        return replace(self, name=f"{self.name}, other blocks kept", keep={**self.keep, **keep})


def example_plan(teacher: Network) -> PruningPlan:
    """A plan that fits a teacher, as a starting point for a person."""
    if isinstance(teacher, Transformer):
        longest = max(teacher.of.lists, key=lambda blocks: len(teacher.numbers(blocks.path)))
        numbers = teacher.numbers(longest.path)
        return PruningPlan(name="mine", keep={longest.word: tuple(numbers[: len(numbers) // 2 or 1])})
    first = next(a for a in sorted(teacher.modules) if ".attn." in a)
    deep = [a for a in sorted(teacher.modules) if ".attn." in a and not a.startswith("mid") and teacher.depth(a) > 1]
    return PruningPlan(
        name="mine",
        remove=("mid",) if "mid.resnet.0" in teacher.modules else () if deep else (first,),
        keep={deep[0]: tuple(range(teacher.depth(deep[0]) // 2))} if deep else {},
    )


def preset_names(*families: str) -> list[str]:
    """Names of the plans for some families of teachers, by default for all UNets."""
    return [name for name in all_preset_names() if preset(name).teacher in (families or UNETS)]


def all_preset_names() -> list[str]:
    """Names of the plans for UNets and transformers."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def preset(name: str) -> PruningPlan:
    """Published plan by name; ``ValueError`` lists the choices."""
    if not re.fullmatch(r"[\w-]+", name) or not (path := PRESETS / f"{name}.json").exists():
        raise ValueError(f"unknown preset {name!r}; choose from {all_preset_names()}")
    return PruningPlan.from_json(read_text(path))


@dataclass(frozen=True)
class NameMap:
    """Teacher block -> student block, for every block that stays."""

    table: Mapping[str, str]
    removed: frozenset[str]
    """Teacher blocks that are removed, including resampling layers that the new shape no longer needs."""

    @classmethod
    def identity(cls, architecture: Architecture) -> NameMap:
        """The map that removes nothing: the student has the teacher's shape."""
        return cls({block: block for block in architecture.blocks}, frozenset())

    def rename(self, name: str) -> str | None:
        """Student's name for a teacher's parameter or block; None if it was removed."""
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

    def skips(self, teacher: Architecture) -> KeptSkips:
        """The teacher's skip connections that the student has."""
        kept = tuple(i for i, source in enumerate(teacher.skips) if self._skip_stays(source))
        return KeptSkips(len(teacher.skips), kept, mid=teacher.stages("up")[0] in self.stages)

    def _skip_stays(self, source: str) -> bool:
        # A layer without its attention still sends the output of its resnet.
        return self.rename(source.replace(".attn.", ".resnet.")) is not None

    @property
    def stages(self) -> dict[str, str]:
        """Teacher's stage -> the student's that inherits from it, as in ``{"down.0": "down.0", "up.1": "up.0"}``."""
        pairs = ((teacher.split("."), student.split(".")) for teacher, student in self.table.items())
        return {".".join(t[:2]): ".".join(s[:2]) for t, s in sorted(pairs) if t[0] in ("down", "up")}


@dataclass(frozen=True)
class KeptSkips:
    """The skip connections of a teacher that a student has; a student needs them to receive a ControlNet's residuals."""

    num_teacher: int
    """Skip connections of the teacher."""
    kept: tuple[int, ...]
    """The teacher's numbers of those the student has, counted from ``conv_in``."""
    mid: bool
    """Whether the stage that receives the residual of the mid block is still there."""

    def select(self, residuals: Sequence[Value]) -> list[Value]:
        """The student's residuals from the teacher's, both counted from ``conv_in``."""
        if len(residuals) != self.num_teacher:
            raise ValueError(f"the teacher has {self.num_teacher} skip connections, but there are {len(residuals)} residuals")
        return [residuals[i] for i in self.kept]

    def then(self, further: KeptSkips) -> KeptSkips:
        """The same after the student was pruned again."""
        return KeptSkips(self.num_teacher, tuple(further.select(self.kept)), self.mid and further.mid)

    def to_text(self) -> str:
        return json.dumps({"teacher": self.num_teacher, "kept": self.kept, "mid": self.mid})

    @classmethod
    def from_text(cls, text: str) -> KeptSkips:
        """``ValueError`` if the text is not one `to_text` wrote."""
        try:
            fields = parse_json(text, "it")
            number, kept = expect(fields.get("teacher"), int, "'teacher'"), expect(fields.get("kept"), list, "'kept'")
            mid = expect(fields.get("mid"), bool, "'mid'")
            ascending = [-1, *(expect(one, int, "an entry of 'kept'") for one in kept), number]
            if number > _MAX_SKIPS:
                raise ValueError(f"no UNet has {number:,} skip connections")
            if any(low >= high for low, high in zip(ascending, ascending[1:], strict=False)):
                raise ValueError("its numbers must be ascending and below the teacher's count")
        except ValueError as error:
            raise ValueError(f"the metadata on skip connections is damaged ({error}); prune the teacher again") from error
        return cls(number, tuple(kept), mid)


def name_map(teacher: Network, plan: PruningPlan) -> NameMap:
    """Name map of a plan on a teacher; ``ValueError`` says which block is at fault if no working network results."""
    if plan.teacher is not None and teacher.family != plan.teacher:
        raise ValueError(
            f"{plan.name} is a plan for {_FAMILIES[plan.teacher]} {_KINDS[plan.teacher in FAMILIES]}, but this one is {_describe(teacher)}; "
            "choose a preset made for it"
        )
    removed = set().union(*(_matching(pattern, teacher, plan.name) for pattern in plan.remove))
    for pattern, kept in plan.keep.items():
        removed |= _thinned(pattern, kept, teacher, plan.name)
    if not removed:
        raise ValueError(f"{plan.name} removes nothing from this {teacher.kind}: it keeps all transformer blocks; remove some")
    try:
        removed |= teacher.orphans(removed)
        stays = NameMap({block: block for block in teacher.blocks - removed}, frozenset(removed))
        teacher.check_kept(stays.apply(teacher.shapes))  # under the teacher's names, for the messages
    except ValueError as error:
        raise ValueError(f"{plan.name} {error}") from error
    return NameMap(teacher.renumbered(teacher.blocks - removed), frozenset(removed))


def plan_in(metadata: Mapping[str, str]) -> PruningPlan | None:
    """The plan a file was pruned with, by its metadata; None if it was not pruned here."""
    return PruningPlan.from_json(text) if (text := metadata.get(_METADATA)) else None


def pruned(teacher: Same, mapping: NameMap) -> Same:
    """Architecture of the student."""
    return replace(teacher, shapes=mapping.apply(teacher.shapes))


def plan_between(teacher: Architecture, student: Architecture, plan: PruningPlan | None) -> PruningPlan | None:
    """A student's plan if it leads from the teacher to the student, None if both have one shape.

    ``ValueError`` if they do not match.
    """
    if dict(student.shapes) == dict(teacher.shapes):
        return None
    try:
        if plan is not None and dict(pruned(teacher, name_map(teacher, plan)).shapes) == dict(student.shapes):
            return plan
    except ValueError:  # the plan of another teacher
        pass
    raise ValueError(
        "student and teacher do not match: give the model that was pruned (Prune UNet Blocks) as teacher, and the result of "
        "pruning as student"
    )


UNETS = ("sd1", "sd2", "sdxl")
"""Families of UNets that presets are for."""
_FAMILIES = {
    **{"sd1": "SD1.x-shaped", "sd2": "SD2-shaped", "sdxl": "SDXL-shaped", "unet": "of no known family"},
    **{name: family.title for name, family in FAMILIES.items()},
}


_KINDS = ("UNets", "transformers")


def _describe(network: Network) -> str:
    width = "" if isinstance(network, Transformer) else f" (context width {network.context_width})"
    return _FAMILIES[network.family] + width


def _matching(pattern: str, teacher: Network, plan_name: str) -> set[str]:
    """Blocks a pattern removes: those it matches, and all inside them."""
    # Merge adjacent stars: several would match the same text in more ways than can be tried.
    expression = re.compile(re.sub(r"(?:\\\*)+", "[^.]+", re.escape(teacher.spelled_out(pattern))))
    found = {block for block in teacher.blocks if any(expression.fullmatch(node) for node in teacher.nodes(block))}
    if not found:
        raise ValueError(
            f"{plan_name} names {pattern!r}, which this {teacher.kind} does not have: it is already pruned, "
            "or has another shape; start from the full model"
        )
    return found


def _thinned(pattern: str, kept: Iterable[int], teacher: Network, plan_name: str) -> set[str]:
    """Blocks that are removed when each matching stack keeps those numbered ``kept``."""
    stacks = {teacher.stack_of(block) for block in _matching(pattern, teacher, plan_name)} - {None}
    if not stacks:
        raise ValueError(f"{plan_name} keeps transformer blocks of {pattern!r}, which is not {teacher.stack_words}")
    for stack in sorted(filter(None, stacks)):
        if missing := set(kept) - set(teacher.numbers(stack)):
            raise ValueError(
                f"{plan_name} keeps transformer block {min(missing)} of {stack.removesuffix('.block')}, which has {len(teacher.numbers(stack))}: "
                f"the {teacher.kind} is already pruned, or has another shape; start from the full model"
            )
    blocks = {f"{stack}.{n}": n for stack in stacks if stack for n in teacher.numbers(stack)}
    return {block for block, number in blocks.items() if number not in kept}
