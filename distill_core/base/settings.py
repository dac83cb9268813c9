"""Settings as typed dataclasses: checks of types and ranges, reading from tables, writing as TOML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
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
SIDE_PX = (8, 16_384)
_MAX_REASON = 1000
"""Most characters of an error in a table."""


def check_settings(settings: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """``ValueError`` naming a field of a dataclass that has the wrong type or is out of range.

    Values may come from anywhere: a file, or a link in a graph, which no widget limits.
    """
    for name, hint in get_type_hints(type(settings)).items():
        if _is_plain(hint) and not _fits(value := getattr(settings, name), hint):
            raise ValueError(f"{name} must be {_words(hint)}, got {one_line(repr(value))}")
    for name, bounds in ranges.items():
        if (value := getattr(settings, name)) is not None:
            check_range(name, value, bounds)


def check_range(name: str, value: float, bounds: tuple[float, float]) -> None:
    """``ValueError`` unless the value is a number within the bounds."""
    low, high = bounds
    if not (type(value) in (int, float) and low <= value <= high):
        raise ValueError(f"{name} must be between {_spelt(low)} and {_spelt(high)}, got {_spelt(value)}")


def _spelt(value: Any) -> str:
    return f"{value:,}" if type(value) is int else f"{value:g}" if type(value) is float else repr(value)


def from_mapping(kind: type[Settings], table: Mapping[str, Any], where: str) -> Settings:
    """A settings dataclass from a table; ``ValueError`` names a field that is misspelt, missing or of the wrong type."""
    known, hints = {field.name: field for field in fields(kind)}, get_type_hints(kind)
    for name, value in table.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {nearest[0]!r}?" if nearest else f"the settings are {', '.join(sorted(known))}"
            raise ValueError(f"{where}: there is no setting {one_line(name)!r}; {meant}")
        if not _fits(value, hints[name]):
            raise ValueError(f"{where}: {name} must be {_words(hints[name])}, got {one_line(repr(value))}")
    for name, field in known.items():
        if name not in table and field.default is MISSING and field.default_factory is MISSING:
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
