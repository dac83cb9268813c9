"""Settings as typed dataclasses, each field with its meaning and limits: checks, reading from tables, writing as TOML."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_type_hints

from .documents import one_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
MOST_STEPS = 100_000_000
STEPS = (1, MOST_STEPS)
OR_NONE = (0, MOST_STEPS)  # steps between two events; 0 turns them off
BATCH = (1, 65_536)
SEEDS = (-(2**63), 2**64 - 1)  # the range torch accepts
SAMPLER_STEPS = (1, 1000)
GUIDANCE = (1, 100)
SHARE = (0, 1)
SIDE_PX = (8, 16_384)
_MAX_REASON = 1000
"""Longest error quoted for a table, in characters."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a setting means, and which values are allowed. For a list, they apply to each entry."""

    words: str = ""
    """Its meaning, for the person who sets it: shown in the recipe reference and as a tooltip."""
    unset: str = ""
    """What None stands for, in words."""
    within: tuple[float, float] | None = None
    """Smallest and largest number."""
    above: float | None = None
    """Any finite number above this one."""
    choices: tuple[str, ...] = ()
    """The only texts allowed; empty for any text."""

    def check(self, name: str, value: Any) -> None:
        """``ValueError`` naming the setting, if the value is not allowed."""
        entries = value if isinstance(value, (list, tuple)) else [value]
        for entry in entries:
            if self.within is not None:
                check_range(name, entry, self.within)
            if self.choices:
                check_choice(entry, self.choices, f"{name}: unknown")
        if self.above is not None and not all(self.above < entry < math.inf for entry in entries):
            got = (
                f"a number above {self.above:g}, got {value}"
                if entries is not value
                else f"numbers above {self.above:g}, got {[*value]}"
            )
            raise ValueError(f"{name} must be {got}")


def setting(
    default: Any = MISSING,
    words: str = "",
    *,
    unset: str = "",
    within: tuple[float, float] | None = None,
    above: float | None = None,
    choices: Collection[str] = (),
) -> Any:
    """A field of a settings dataclass, with its `Limits`."""
    limits = Limits(words=words, unset=unset, within=within, above=above, choices=tuple(choices))
    return field(default=default, metadata={"limits": limits})


def limits_of(kind: type[DataclassInstance] | DataclassInstance) -> dict[str, Limits]:
    """The limits of every field of a settings dataclass."""
    return {own.name: own.metadata.get("limits", Limits()) for own in fields(kind)}


def check_settings(settings: DataclassInstance) -> None:
    """``ValueError`` naming the field whose value has the wrong type or is not allowed.

    Values may come from anywhere: a file, or a link in a graph, which no widget limits.
    """
    for name, hint in get_type_hints(type(settings)).items():
        if _is_plain(hint) and not _fits(value := getattr(settings, name), hint):
            raise ValueError(f"{name} must be {_words(hint)}, got {one_line(repr(value))}")
    for name, limits in limits_of(settings).items():
        if (value := getattr(settings, name)) is not None:
            limits.check(name, value)


def check_range(name: str, value: float, bounds: tuple[float, float]) -> None:
    """``ValueError`` unless the value is a number within the bounds."""
    low, high = bounds
    if not (type(value) in (int, float) and low <= value <= high):
        raise ValueError(f"{name} must be between {_spelt(low)} and {_spelt(high)}, got {_spelt(value)}")


def _spelt(value: Any) -> str:
    return f"{value:,}" if type(value) is int else f"{value:g}" if type(value) is float else repr(value)


def check_choice(value: Any, choices: Collection[str], said: str) -> None:
    """``ValueError`` unless a value is one of the choices. said: how the error begins, such as "unknown preset"."""
    if value not in tuple(choices):  # it may be of any type
        raise ValueError(f"{said} {one_line(repr(value))}; {meant(value, choices)}")


def check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """``ValueError`` for a name that no setting has, with the nearest."""
    known = sorted(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: there is no setting {one_line(name)!r}; {meant(name, known, 'the settings are')}")


def meant(value: Any, choices: Collection[str], otherwise: str = "choose from") -> str:
    """The choice nearest to a value as a question, or, if none is near, all of them."""
    near = nearest(value, choices)
    return f"{otherwise} {', '.join(choices)}" if near is None else f"did you mean {near!r}?"


def nearest(value: Any, choices: Collection[str]) -> str | None:
    """The choice that a value is probably a misspelling of."""
    near = difflib.get_close_matches(value, choices, 1, cutoff=0.8) if isinstance(value, str) else []
    return near[0] if near else None


def from_mapping(kind: type[Settings], table: Mapping[str, Any], where: str) -> Settings:
    """A settings dataclass from a table; ``ValueError`` names a setting that is misspelt, missing, of the wrong type or not allowed."""
    known, hints = {own.name: own for own in fields(kind)}, get_type_hints(kind)
    check_names(table, known, where)
    for name, value in table.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{where}: {name} must be {_words(hints[name])}, got {one_line(repr(value))}")
    for name, own in known.items():
        if name not in table and own.default is MISSING and own.default_factory is MISSING:
            raise ValueError(f"{where}: {name} is missing; add it")
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(error, _MAX_REASON)}") from error


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _is_plain(hint: Any) -> bool:
    """Whether `_fits` can check a type: numbers, texts and switches, tuples of them, and any of these or None."""
    return bool(getattr(hint, "__origin__", None) in (None, tuple, Union) and _words(hint))


def _fits(value: Any, hint: Any) -> bool:
    if (parts := getattr(hint, "__args__", None)) is None:
        return type(value) is hint or (hint is float and type(value) is int)
    if getattr(hint, "__origin__", None) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(entry, parts[0]) for entry in value)
    return any(_fits(value, part) for part in parts)


def _words(hint: Any) -> str:
    if getattr(hint, "__origin__", None) is tuple:
        return f"a list, each entry {_words(hint.__args__[0])}"
    return " or ".join(_WORDS[part] for part in getattr(hint, "__args__", (hint,)) if part in _WORDS)


def to_toml(table: Mapping[str, Any]) -> str:
    import tomli_w

    return tomli_w.dumps(table)
