"""Checkpoints of a run on disk: which are whole, and what becomes of those that are not.

A run's folder may come from somebody else, or from a disk that failed: nothing outside it is touched, nothing is deleted but
files this program wrote, and what is damaged is set aside.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from functools import lru_cache
from pathlib import Path

from .documents import read_json
from .storage import clear_abandoned, read_header, write_text

log = logging.getLogger("distill")

TRAINING, CHECKSUMS = "training.safetensors", "checksums.json"
RESULTS = ("student.safetensors", "lora.safetensors")
"""What comes out of a run, by the name of its file."""
_NAME = re.compile(r"[0-9]{8,12}")
_CHUNK_BYTES = 8 << 20


def is_link(path: Path) -> bool:
    """Whether a path leads elsewhere: a symbolic link, or a junction of Windows."""
    return path.is_symlink() or getattr(os.path, "isjunction", lambda _: False)(path)


def own(path: Path) -> Path:
    """A file or folder within a run's; ``ValueError`` if it is a link, by which a run would read, delete and write elsewhere."""
    if is_link(path):
        raise ValueError(f"{path} is a link to another place; a run keeps its files in its own folder, so replace the link")
    return path


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints of a run's folder, oldest first; each is named by its step."""
    return [path for path in _named(folder) if is_whole(path)]


def _named(folder: Path) -> list[Path]:
    """What is named as a checkpoint is, whole or not."""
    inside = folder / "checkpoints"
    if is_link(inside) or not inside.is_dir():
        return []
    return sorted((path for path in inside.iterdir() if _NAME.fullmatch(path.name)), key=lambda path: int(path.name))


def result_of(checkpoint: Path) -> Path | None:
    """The file people use; None where it is missing."""
    return next((file for name in RESULTS if (file := checkpoint / name).is_file() and not is_link(file)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether both files are there and as long as their headers tell; what is in them is for `check`."""
    if is_link(checkpoint) or not checkpoint.is_dir():
        return False
    files = (result_of(checkpoint), checkpoint / TRAINING)
    return all(file is not None and file.is_file() and not is_link(file) and _opens(file) for file in files)


def _opens(file: Path) -> bool:
    stat = file.stat()
    return _opens_as(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(256)
def _opens_as(file: Path, num_bytes: int, mtime_ns: int) -> bool:
    """A file that changed is looked at again."""
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
    """Note the CRC-32 of each file of a checkpoint that was just written."""
    files = [file for file in sorted(checkpoint.iterdir()) if file.name in (*RESULTS, TRAINING)]
    write_text(checkpoint / CHECKSUMS, json.dumps({file.name: _crc32(file) for file in files}))


def check(checkpoint: Path) -> None:
    """``ValueError`` naming the file that is not what was written. A checkpoint from before checksums passes."""
    file = checkpoint / CHECKSUMS
    if not file.is_file():
        return
    checksums = read_json(file)
    for name in (result_of(checkpoint).name, TRAINING):
        if _crc32(checkpoint / name) != checksums.get(name):
            raise ValueError(f"{name} has changed since it was written")


# --- what is not whole ----------------------------------------------------------------------------------------------


def sound(file: Path) -> Path:
    """A result in a checkpoint; ``ValueError`` if it is not what was written."""
    try:
        check(file.parent)
    except ValueError as error:
        raise ValueError(
            f"checkpoint {file.parent} is damaged ({error}); put it back, or train again in another folder"
        ) from error
    return file


def settle(folder: Path) -> None:
    """Set aside what is damaged, newest first, until a checkpoint is sound, so that the run goes on from that one.

    What a killed write left is removed. ``ValueError`` if none is sound, and then all stay: a run does not silently begin anew.
    Call it while the folder is locked.
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
                f"no checkpoint of run {folder.name!r} is whole ({path.name}: {reason}); put one back, or give the new run "
                "another name"
            )
    for path, reason in damaged:
        aside = _free_name(path)
        path.rename(aside)
        log.warning("checkpoint %s of run %r is damaged (%s); it is set aside as %s", path.name, folder.name, reason, aside.name)


def _damage(path: Path) -> str | None:
    if not is_whole(path):
        return "it lacks a file, or one is cut short"
    try:
        check(path)
    except ValueError as error:
        return str(error)
    return None


def _free_name(path: Path) -> Path:
    names = (f"{path.name}.damaged{f'-{number}' if number else ''}" for number in range(1000))
    return next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))


def drop(checkpoint: Path) -> None:
    """Delete the files of a checkpoint, and its folder if nothing else is in it."""
    for name in (*RESULTS, TRAINING, CHECKSUMS):
        (checkpoint / name).unlink(missing_ok=True)
    if not any(checkpoint.iterdir()):
        checkpoint.rmdir()
