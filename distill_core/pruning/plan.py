"""Plans of which blocks of a network to remove, and the teacher -> student name map that follows from a plan.

The map serves weight inheritance, the pairing of feature layers, and everything else keyed by block names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..base.documents import expect, lines, one_line, parse_json, read_text
from ..base.settings import check_choice, meant, nearest
from ..networks.name_map import NameMap
from ..networks.network import TITLES, UNETS, Network, Same
from .folding import middle

PRESETS = Path(__file__).parent / "presets"
EXAMPLE = '{"name": "mine", "remove": ["mid", "down.*.resnet.1"], "keep": {"down.2.attn.*": [0, 1, 2, 6]}}'
MAX_PATTERNS, MAX_PATTERN_CHARS, MAX_NAME_CHARS = 500, 100, 2000
"""Limits of a plan: several times what it takes to name every block of SDXL."""
_METADATA = "distill.plan"
_WORD = re.compile(r"[a-z_]+")


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
    fold: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    """List of blocks, or pattern of attentions -> first and last block of each run that becomes one, its middle block (the
    earlier of two), as in ``{"single": ((5, 7), (9, 10))}``. `folded` gives the runs on a teacher."""
    teacher: str | None = None
    """Family of networks that the plan is for (``sd1``, ``sdxl``, ``flux1``); None for any."""
    depths: Mapping[str, int] = field(default_factory=dict)
    """How many blocks each list of the teacher has, by the list's word, for a plan that means only such transformers."""
    title: str = ""
    """Short description for a list of presets."""
    source: str = ""
    """Paper or repository that the plan comes from."""
    choice: str = ""
    """What the source leaves open, what is chosen here, and why. `with_keep` makes another choice."""

    def __post_init__(self):
        if len(self.name) > MAX_NAME_CHARS:
            raise ValueError(f"a plan's name may have at most {MAX_NAME_CHARS:,} characters, got {len(self.name):,}; shorten it")
        patterns = [*self.remove, *self.keep, *self.fold]
        if len(patterns) > MAX_PATTERNS or any(len(str(pattern)) > MAX_PATTERN_CHARS for pattern in patterns):
            raise ValueError(
                f"plan {self.name[:60]!r} is too long: it may have at most {MAX_PATTERNS:,} patterns of {MAX_PATTERN_CHARS} "
                "characters; use stars, as in 'down.*.attn.1'"
            )
        if not any((self.remove, self.keep, self.fold)) or not all(isinstance(pattern, str) for pattern in self.remove):
            raise ValueError(
                f"plan {self.name!r}: 'remove' must be a list of block names, with at least one unless 'keep' or 'fold' has one"
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
        for stack, runs in self.fold.items():
            ends = [end for run in runs for end in run]
            if (
                not runs
                or not all(type(end) is int and end >= 0 for end in ends)
                or any(len(run) != 2 for run in runs)
                or ends != sorted(set(ends))
            ):
                raise ValueError(
                    f"plan {self.name!r}: 'fold' of {stack!r} must list the first and the last block of each run, in ascending order, "
                    "such as [[5, 7], [9, 10]]"
                )
        if self.teacher is not None:
            check_choice(self.teacher, TITLES, f"plan {self.name!r}: unknown teacher")

    @classmethod
    def from_json(cls, text: str, example: str = EXAMPLE) -> PruningPlan:
        """A plan from JSON; ``ValueError`` says what is wrong and shows an example. The name may be left out."""
        try:
            fields = {"name": "a plan of your own", "remove": [], "keep": {}, "fold": {}} | parse_json(text, "the text")
            for name in ("name", "title", "source", "choice"):
                expect(fields.setdefault(name, ""), str, f"'{name}'")
            remove, keep = expect(fields["remove"], list, "'remove'"), expect(fields["keep"], dict, "'keep'")
            kept = {attention: tuple(expect(blocks, list, f"'keep' of {attention!r}")) for attention, blocks in keep.items()}
            folds = {
                stack: tuple(
                    tuple(expect(run, list, f"'fold' of {stack!r}")) for run in expect(runs, list, f"'fold' of {stack!r}")
                )
                for stack, runs in expect(fields["fold"], dict, "'fold'").items()
            }
            depths = expect(fields.setdefault("depths", {}), dict, "'depths'")
            for word, depth in depths.items():
                expect(depth, int, f"'depths' of {one_line(word)!r}")
            fields |= {"name": " ".join(lines(fields["name"])), "remove": tuple(remove), "keep": kept, "fold": folds}
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
        given = {"remove": self.remove, "keep": self.keep, "fold": self.fold}
        return json.dumps({"name": self.name} | {key: value for key, value in given.items() if value or key == "remove"})

    @classmethod
    def removing(cls, removed: Iterable[str], teacher: Network, name: str, family: str | None = None) -> PruningPlan:
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
    remove, keep = teacher.example()
    return PruningPlan(name="mine", remove=remove, keep=keep)


def preset_names(*families: str) -> list[str]:
    """Names of the plans for some families of teachers, by default for all UNets."""
    return [name for name in all_preset_names() if preset(name).teacher in (families or UNETS)]


def all_preset_names() -> list[str]:
    """Names of the plans for UNets and transformers."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def fitting_presets(teacher: Network) -> list[str]:
    """Names of the published plans that work on a teacher."""

    def fits(name: str) -> bool:
        try:
            name_map(teacher, preset(name))
        except ValueError:
            return False
        return True

    return list(filter(fits, preset_names(teacher.family)))


def preset(name: str) -> PruningPlan:
    """Published plan by name; ``ValueError`` lists the choices."""
    check_choice(name, all_preset_names(), "unknown preset")
    return PruningPlan.from_json(read_text(PRESETS / f"{name}.json"))


def name_map(teacher: Network, plan: PruningPlan) -> NameMap:
    """Name map of a plan on a teacher; ``ValueError`` says which block is at fault if no working network results."""
    if plan.teacher is not None and teacher.family != plan.teacher:
        choices = ", ".join(preset_names(teacher.family))
        raise ValueError(
            f"{plan.name} is a plan for {TITLES[plan.teacher]}, but this one is {teacher.title}; "
            + (f"choose a preset made for it ({choices})" if choices else "write a plan of your own")
        )
    if plan.depths and plan.depths != teacher.depths:
        wanted, there = (
            " and ".join(f"{depth} {word}s" for word, depth in depths.items()) for depths in (plan.depths, teacher.depths)
        )
        raise ValueError(
            f"{plan.name} is a plan for {teacher.title} with {wanted}, but this one has {there}; choose another plan"
        )
    removed = set().union(*(_matching(pattern, teacher, plan.name) for pattern in plan.remove))
    for pattern, kept in plan.keep.items():
        removed |= _thinned(pattern, kept, teacher, plan.name)
    runs = [(stack, run) for stack, of_stack in folded(teacher, plan).items() for run in of_stack]
    removed |= {f"{stack}.{number}" for stack, run in runs for number in run if number != middle(run)}
    if not removed:
        raise ValueError(f"{plan.name} removes nothing from this {teacher.kind}: it keeps all transformer blocks; remove some")
    try:
        removed |= teacher.orphans(removed)
        stays = NameMap({block: block for block in teacher.blocks - removed}, frozenset(removed))
        teacher.check_kept(stays.apply(teacher.shapes))  # under the teacher's names, for the messages
    except ValueError as error:
        raise ValueError(f"{plan.name} {error}") from error
    stand_for = {f"{stack}.{middle(run)}": (f"{stack}.{run[0]}", f"{stack}.{run[-1]}") for stack, run in runs}
    return NameMap(teacher.renumbered(teacher.blocks - removed), frozenset(removed), stand_for)


def folded(teacher: Network, plan: PruningPlan) -> dict[str, list[list[int]]]:
    """Runs of blocks that a plan folds, by the stack they are in; ``ValueError`` if the teacher does not have them."""
    found: dict[str, list[list[int]]] = {}
    for pattern, ends in plan.fold.items():
        for stack in _stacks(pattern, {end for run in ends for end in run}, teacher, f"{plan.name} folds"):
            there = teacher.numbers(stack)
            found.setdefault(stack, []).extend([n for n in there if first <= n <= last] for first, last in ends)
    return found


def plan_in(metadata: Mapping[str, str]) -> PruningPlan | None:
    """The plan a file was pruned with, by its metadata; None if it was not pruned here."""
    return PruningPlan.from_json(text) if (text := metadata.get(_METADATA)) else None


def pruned(teacher: Same, mapping: NameMap) -> Same:
    """Architecture of the student."""
    return replace(teacher, shapes=mapping.apply(teacher.shapes))


def plan_between(teacher: Network, student: Network, plan: PruningPlan | None) -> PruningPlan | None:
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
        "student and teacher do not match: give the model that was pruned as teacher, and the result of pruning as student"
    )


def _matching(pattern: str, teacher: Network, plan_name: str) -> set[str]:
    """Blocks a pattern removes: those it matches, and all inside them."""
    # Merge adjacent stars: several would match the same text in more ways than can be tried.
    expression = re.compile(re.sub(r"(?:\\\*)+", "[^.]+", re.escape(teacher.spelled_out(pattern))))
    found = {block for block in teacher.blocks if any(expression.fullmatch(node) for node in teacher.nodes(block))}
    if not found:
        words = {word for block in teacher.blocks for word in _WORD.findall(block)}
        misspelt = [word for word in _WORD.findall(pattern) if word not in words and nearest(word, words)]
        raise ValueError(
            f"{plan_name} names {pattern!r}, which this {teacher.kind} does not have"
            + (
                f"; {meant(misspelt[0], words)}"
                if misspelt
                else ": it is already pruned, or has another shape; start from the full model"
            )
        )
    return found


def _thinned(pattern: str, kept: Iterable[int], teacher: Network, plan_name: str) -> set[str]:
    """Blocks that are removed when each matching stack keeps those numbered ``kept``."""
    stacks = _stacks(pattern, kept, teacher, f"{plan_name} keeps")
    return {f"{stack}.{n}" for stack in stacks for n in teacher.numbers(stack) if n not in kept}


def _stacks(pattern: str, named: Iterable[int], teacher: Network, does: str) -> list[str]:
    """Stacks of blocks that a pattern matches; ``ValueError`` if there is none, or one lacks a block that is named.

    does: how the messages begin.
    """
    matching = _matching(pattern, teacher, does.rpartition(" ")[0])
    stacks = sorted({stack for block in matching if (stack := teacher.stack_of(block))})
    if not stacks:
        raise ValueError(f"{does} transformer blocks of {pattern!r}, which is not {teacher.stack_words}")
    for stack in stacks:
        if missing := set(named) - set(teacher.numbers(stack)):
            raise ValueError(
                f"{does} transformer block {min(missing)} of {stack.removesuffix('.block')}, which has {len(teacher.numbers(stack))}: "
                f"the {teacher.kind} is already pruned, or has another shape; start from the full model"
            )
    return stacks
