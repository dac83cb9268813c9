"""What ComfyUI compares to know whether a node is executed again: for values that are given, and for those that are not known yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ...distill_core.routing.experts import MANIFEST
from .folders import experts_folder, file_in

_Seen = TypeVar("_Seen")


def fingerprint_of(look: Callable[..., _Seen], *given) -> _Seen | str | float:
    """What ``look`` sees of what is given to a node, or its error, which the node raises again.

    NaN, which never equals the last value, if one of what is given is None, as linked inputs are: its value is not known yet.
    """
    if any(value is None for value in given):
        return float("nan")  # a new object each time: ComfyUI takes the same object for the same value
    try:
        return look(*given)
    except (ValueError, OSError) as error:
        return str(error)


def file_written(folder: str, name: str) -> int:
    """When a file of one of ComfyUI's model folders was last written."""
    return file_in(folder, name).stat().st_mtime_ns


def experts_written(name: str) -> int:
    """When a folder of experts was last written."""
    return (experts_folder(name) / MANIFEST).stat().st_mtime_ns
