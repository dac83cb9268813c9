"""Checks of free disk space and write access, made before the work whose results go there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from .sizes import gib
from .storage import ExistsError, WriteError


def check_room(folder: Path, num_bytes: int, what: str, remedy: str) -> None:
    """``ValueError`` if a folder, or the place where it will be created, has less than ``num_bytes`` free."""
    if num_bytes > (free := shutil.disk_usage(_nearest(folder)).free):
        raise ValueError(f"{what} need at least {gib(num_bytes)} in {folder}, but only {gib(free)} are free; {remedy}")


def check_writable(path: Path, *, overwrite: bool = False) -> None:
    """Fail as `storage.atomic` would when it writes a file, but before the work starts; leaves nothing behind."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; choose a file name")
    if path.exists() and not overwrite:
        raise ExistsError(path)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=_nearest(path.parent)):
            pass
    except OSError as error:
        raise WriteError(path, error.strerror or str(error)) from error


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    folder = Path(os.path.abspath(folder))
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
