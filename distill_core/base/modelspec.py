"""Metadata by which programs list model files: ModelSpec (github.com/Stability-AI/ModelSpec)."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

STALE_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Hashes of the tensors, which no longer match once a tensor has changed."""
OF_ONE_FILE = (*STALE_HASHES, "modelspec.date", "modelspec.thumbnail", "prompt", "workflow")
"""What is true of one file alone, and not of another made from it."""


def modelspec(path: Path | str, architecture: str = "") -> dict[str, str]:
    """The entries for a new file: its title, its date, and its architecture, if that is known."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        **({"modelspec.architecture": architecture} if architecture else {}),
        "modelspec.title": Path(path).stem,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
