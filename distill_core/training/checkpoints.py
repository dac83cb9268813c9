"""Checkpoints of a run on disk: which of them are complete, and what happens to the others.

A run's folder may come from another person, or from a disk that failed. So this module touches nothing outside the folder,
deletes only files that this program wrote, and sets damaged checkpoints aside.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from functools import lru_cache
from pathlib import Path

from ..base.documents import read_json
from ..base.storage import clear_abandoned, read_header, write_text

log = logging.getLogger("distill")

TRAINING, CHECKSUMS = "training.safetensors", "checksums.json"
RESULTS = ("student.safetensors", "lora.safetensors")
"""File names of the result of a run."""
_NAME = re.compile(r"[0-9]{8,12}")
_CHUNK_BYTES = 8 << 20


def is_link(path: Path) -> bool:
    """Whether a path is a symbolic link, or a junction on Windows."""
    return path.is_symlink() or getattr(os.path, "isjunction", lambda _: False)(path)


def own(path: Path) -> Path:
    """The path itself, inside a run's folder; ``ValueError`` for a link, as the run would read, write and delete elsewhere."""
    if is_link(path):
        raise ValueError(f"{path} is a link to another place; a run keeps its files in its own folder, so replace the link")
    return path


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's folder, oldest first; each is named by its step."""
    return [path for path in _named(folder) if is_whole(path)]


def step_in(folder: Path) -> int:
    """Step of the newest checkpoint in a run's folder; 0 before the first."""
    checkpoints = checkpoints_in(folder)
    return int(checkpoints[-1].name) if checkpoints else 0


def _named(folder: Path) -> list[Path]:
    """Every path that is named like a checkpoint, complete or not."""
    inside = folder / "checkpoints"
    if is_link(inside) or not inside.is_dir():
        return []
    return sorted((path for path in inside.iterdir() if _NAME.fullmatch(path.name)), key=lambda path: int(path.name))


def result_of(checkpoint: Path) -> Path | None:
    """The student or LoRA file of a checkpoint; None if it is missing."""
    return next((file for name in RESULTS if (file := checkpoint / name).is_file() and not is_link(file)), None)


def result_in(checkpoint: Path) -> Path:
    """The same file; ``ValueError`` if it is missing."""
    if (result := result_of(checkpoint)) is None:
        raise ValueError(f"{checkpoint} has no {' or '.join(RESULTS)}")
    return result


def is_whole(checkpoint: Path) -> bool:
    """Whether both files exist and have the length their headers declare; `check` verifies the contents."""
    if is_link(checkpoint) or not checkpoint.is_dir():
        return False
    files = (result_of(checkpoint), checkpoint / TRAINING)
    return all(file is not None and file.is_file() and not is_link(file) and _opens(file) for file in files)


def _opens(file: Path) -> bool:
    stat = file.stat()
    return _opens_as(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(256)
def _opens_as(file: Path, num_bytes: int, mtime_ns: int) -> bool:
    """Whether the header can be read; a file that has changed is read again."""
    try:
        read_header(file)
    except (ValueError, OSError):
        return False
    return True


# --- checksums ------------------------------------------------------------------------------------------------------


def _crc32(file: Path) -> int:
    value = 0
    with open(file, "rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def write_checksums(checkpoint: Path) -> None:
    """Write the CRC-32 of each file of a new checkpoint."""
    files = [file for file in sorted(checkpoint.iterdir()) if file.name in (*RESULTS, TRAINING)]
    write_text(checkpoint / CHECKSUMS, json.dumps({file.name: _crc32(file) for file in files}))


def check(checkpoint: Path) -> None:
    """Raise ``ValueError`` naming a file that has changed since it was written. A checkpoint without checksums passes."""
    file = checkpoint / CHECKSUMS
    if not file.is_file():
        return
    checksums = read_json(file)
    for name in (result_in(checkpoint).name, TRAINING):
        if _crc32(checkpoint / name) != checksums.get(name):
            raise ValueError(f"{name} has changed since it was written")


# --- damaged checkpoints --------------------------------------------------------------------------------------------


def sound(file: Path) -> Path:
    """The result file itself; ``ValueError`` if its checkpoint is damaged."""
    try:
        check(file.parent)
    except ValueError as error:
        raise ValueError(
            f"checkpoint {file.parent} is damaged ({error}); restore it, or train again in another folder"
        ) from error
    return file


def settle(folder: Path) -> None:
    """Set damaged checkpoints aside, newest first, until an undamaged one is found, from which the run resumes.

    Also removes the remains of an interrupted write. ``ValueError`` if every checkpoint is damaged; then none is moved, so
    that a run never restarts from step 0 silently. Call it while the folder is locked.
    """
    clear_abandoned(folder)
    clear_abandoned(own(folder / "checkpoints"))
    damaged: list[tuple[Path, str]] = []
    for path in reversed(_named(folder)):
        if (reason := _damage(path)) is None:
            break
        damaged.append((path, reason))
    else:
        if damaged:
            path, reason = damaged[0]
            raise ValueError(
                f"every checkpoint of run {folder.name!r} is damaged ({path.name}: {reason}); restore one, or give the new run "
                "another name"
            )
    for path, reason in damaged:
        aside = _free_name(path)
        path.rename(aside)
        log.warning("checkpoint %s of run %r is damaged (%s); it was renamed to %s", path.name, folder.name, reason, aside.name)


def _damage(path: Path) -> str | None:
    if not is_whole(path):
        return "a file is missing or truncated"
    try:
        check(path)
    except ValueError as error:
        return str(error)
    return None


def _free_name(path: Path) -> Path:
    names = (f"{path.name}.damaged{f'-{number}' if number else ''}" for number in range(1000))
    return next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))


def drop(checkpoint: Path) -> None:
    """Delete the files of a checkpoint, and its folder if that is then empty."""
    for name in (*RESULTS, TRAINING, CHECKSUMS):
        (checkpoint / name).unlink(missing_ok=True)
    if not any(checkpoint.iterdir()):
        checkpoint.rmdir()
