"""Which block of a student each block of its teacher became."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from .layouts import heads
from .network import Network

Value = TypeVar("Value")


@dataclass(frozen=True)
class NameMap:
    """Teacher block -> student block, for every block that stays."""

    table: Mapping[str, str]
    removed: frozenset[str]
    """Teacher blocks that are removed, including resampling layers that the new shape no longer needs."""
    folded: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Teacher block that stays for a whole run of blocks -> the first and the last of the run."""
    padded: frozenset[str] = frozenset()
    """Teacher blocks that stay in name alone: the student's output their input."""

    @classmethod
    def identity(cls, architecture: Network) -> NameMap:
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

    def is_identity(self, name: str) -> bool:
        """Whether a teacher's parameter or block belongs to what stays in name alone, so that a change of it is left out."""
        return not self.padded.isdisjoint(heads(name))

    def apply(self, by_name: Mapping[str, Value]) -> dict[str, Value]:
        """Keep and rename the entries of a mapping keyed by teacher's names: shapes, weights, anything."""
        renamed = ((self.rename(name), value) for name, value in by_name.items())
        return {name: value for name, value in renamed if name is not None}

    @property
    def stages(self) -> dict[str, str]:
        """Teacher's stage -> the student's that inherits from it, as in ``{"down.0": "down.0", "up.1": "up.0"}``."""
        pairs = ((teacher.split("."), student.split(".")) for teacher, student in self.table.items())
        return {".".join(t[:2]): ".".join(s[:2]) for t, s in sorted(pairs) if t[0] in ("down", "up")}
