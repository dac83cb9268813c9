"""Locks that let only one process at a time use a folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from .documents import read_json
from .storage import WriteError, write_text

log = logging.getLogger("distill")

LOCK, OWNER = ".lock", ".owner.json"


@contextlib.contextmanager
def locked(folder: Path, wait_s: float = 0, *, must: bool = False) -> Iterator[None]:
    """Lock a folder while open; ``ValueError`` says which process holds it, and for how long. wait_s: how long to wait for it.

    The operating system releases the lock when the process ends, however it ends. must: ``ValueError`` on a file system that has
    no locks, where otherwise a warning is logged.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=wait_s)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{folder} is in use by {_owner(folder)}; wait until that ends, or choose another name") from error
    except (NotImplementedError, OSError) as error:  # some network drives refuse every lock
        if must:
            raise ValueError(f"{folder} cannot be locked, so another process may be using it; delete it by hand") from error
        log.warning("%s is on a file system without locks; do not train in it from two processes", folder)
    try:
        _tell_owner(folder)
        yield
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def _tell_owner(folder: Path) -> None:
    """Write who holds a folder, for whoever finds it locked."""
    try:
        write_text(folder / OWNER, json.dumps({"pid": os.getpid(), "host": platform.node(), "since": time.time()}))
    except WriteError as error:  # the lock holds without it, and who deletes something must be able to
        log.warning("%s", error)


def _owner(folder: Path) -> str:
    """Holder of a folder, in words."""
    try:
        owner = read_json(folder / OWNER)
        minutes = max(0, int((time.time() - float(owner["since"])) // 60))
        return f"process {int(owner['pid'])} on {str(owner['host'])[:100]}, for {minutes} min"
    except (ValueError, KeyError, TypeError):
        return "another process"
