"""Metadata by which programs list model files: ModelSpec (github.com/Stability-AI/ModelSpec)."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
OF_ONE_FILE = (*_HASHES, "modelspec.date", "modelspec.thumbnail", "prompt", "workflow")
"""What is true of one file alone, and not of another made from it."""


def modelspec(path: Path | str, architecture: str = "", *, dated: bool = True) -> dict[str, str]:
    """The entries for a new file: its title, and its architecture, if that is known. dated: False if its bytes must be reproducible."""
    date = {"modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        **({"modelspec.architecture": architecture} if architecture else {}),
        "modelspec.title": Path(path).stem,
        **(date if dated else {}),
    }
