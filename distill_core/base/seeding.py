"""Random numbers that depend only on a seed, a number and a purpose."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, index: int, purpose: str) -> torch.Generator:
    """Random number generator that is a pure function of (seed, index, purpose)."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
