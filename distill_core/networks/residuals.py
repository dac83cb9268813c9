"""Which of the residuals that a ControlNet makes for a teacher its student takes, and in which order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..base.documents import expect, parse_json

Value = TypeVar("Value")
Rename = Callable[[str], "str | None"]
"""A teacher's name -> its student's, None for what is removed."""
KEY = "distill.skips"
"""Of a file's metadata."""
_MOST = 1000
"""No network has so many."""


@dataclass(frozen=True)
class Kept:
    """Places of a teacher that its student has."""

    num_teacher: int
    """Places of the teacher."""
    kept: tuple[int, ...]
    """The teacher's numbers of those the student has."""

    def select(self, residuals: Sequence[Value]) -> list[Value]:
        """The student's residuals from the teacher's."""
        if len(residuals) != self.num_teacher:
            raise ValueError(f"the teacher takes {self.num_teacher} residuals, but there are {len(residuals)}")
        return [residuals[i] for i in self.kept]

    def then(self, further: Kept) -> Kept:
        """The same after the student was pruned again."""
        return Kept(self.num_teacher, tuple(further.select(self.kept)))

    def fields(self) -> dict[str, Any]:
        return {"teacher": self.num_teacher, "kept": self.kept}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Kept:
        """``ValueError`` if `fields` did not make these."""
        number, kept = expect(fields.get("teacher"), int, "'teacher'"), expect(fields.get("kept"), list, "'kept'")
        ascending = [-1, *(expect(one, int, "an entry of 'kept'") for one in kept), number]
        if number > _MOST:
            raise ValueError(f"no network takes {number:,} residuals")
        if any(low >= high for low, high in zip(ascending, ascending[1:], strict=False)):
            raise ValueError("its numbers must be ascending and below the teacher's count")
        return cls(number, tuple(kept))


@dataclass(frozen=True)
class KeptSkips(Kept):
    """The skip connections of a UNet that a student has, counted from ``conv_in``."""

    mid: bool
    """Whether the stage that receives the residual of the mid block is still there."""

    def after(self, further: KeptSkips) -> KeptSkips:
        """The same after the student was pruned again."""
        return KeptSkips(self.num_teacher, self.then(further).kept, self.mid and further.mid)

    def to_text(self) -> str:
        return json.dumps({**self.fields(), "mid": self.mid})


@dataclass(frozen=True)
class KeptBlocks:
    """The blocks of a transformer that a student has and that take residuals."""

    lists: Mapping[str, Kept]
    """By what ComfyUI's ControlNets call the residuals of a list: ``input``, ``output``."""

    def after(self, further: KeptBlocks) -> KeptBlocks:
        """The same after the student was pruned again."""
        return KeptBlocks({key: kept.then(further.lists[key]) for key, kept in self.lists.items()})

    @property
    def places(self) -> list[int]:
        """Places of the student's blocks among all of the teacher's, one list after another."""
        found, before = [], 0
        for kept in self.lists.values():
            found += [before + number for number in kept.kept]
            before += kept.num_teacher
        return found

    def to_text(self) -> str:
        return json.dumps({"lists": {key: kept.fields() for key, kept in self.lists.items()}})


KeptResiduals = KeptSkips | KeptBlocks


def after(before: KeptResiduals | None, further: KeptResiduals) -> KeptResiduals:
    """What is left of the first teacher's when a student is pruned again, or of a teacher's own when it was not pruned before.

    before: as the student's file says; ``ValueError`` if that cannot be said of this student.
    """
    if before is None:
        return further
    if isinstance(before, KeptSkips) and isinstance(further, KeptSkips) and len(before.kept) == further.num_teacher:
        return before.after(further)
    if isinstance(before, KeptBlocks) and isinstance(further, KeptBlocks):
        counts = {key: kept.num_teacher for key, kept in further.lists.items()}
        if {key: len(kept.kept) for key, kept in before.lists.items()} == counts:
            return before.after(further)
    raise ValueError("the metadata on kept residuals is damaged (it is of another network); prune the teacher again")


def kept_in(metadata: Mapping[str, str]) -> KeptResiduals | None:
    """What a student's file says of itself; None if it was not pruned here."""
    return read_kept(metadata[KEY]) if KEY in metadata else None


def read_kept(text: str) -> KeptResiduals:
    """What ``to_text`` wrote; ``ValueError`` if it did not."""
    try:
        fields = parse_json(text, "it")
        if "lists" in fields:
            lists = expect(fields["lists"], dict, "'lists'")
            return KeptBlocks({key: Kept.of(expect(kept, dict, "an entry of 'lists'")) for key, kept in lists.items()})
        return KeptSkips(**vars(Kept.of(fields)), mid=expect(fields.get("mid"), bool, "'mid'"))
    except ValueError as error:
        raise ValueError(f"the metadata on kept residuals is damaged ({error}); prune the teacher again") from error
