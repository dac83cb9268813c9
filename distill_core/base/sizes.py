"""Sizes in words."""

from __future__ import annotations

GIB = 2**30


def gib(num_bytes: int) -> str:
    """``1.50 GiB``."""
    return f"{num_bytes / GIB:.2f} GiB"
