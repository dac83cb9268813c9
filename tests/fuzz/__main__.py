"""Look for inputs that are read wrongly: ``python -m tests.fuzz --minutes 30``.

Each format is read in child processes that may take one gibibyte more than they begin with, and a second of computing for
an input. Whatever ends one, or raises anything but ``ValueError`` in one sentence, is saved into the corpus, which the
tests replay. Needs a system that can fork.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import resource
import signal
import tempfile
import time
import traceback
from pathlib import Path
from random import Random

import torch

from .targets import TARGETS, failure, seeds_of

CORPUS = Path(__file__).parent / "corpus"
MEMORY_BYTES, SECONDS, INPUTS_A_CHILD = 1 << 30, 1.0, 200


def child(name: str, seeds: list[bytes], number: int, folder: Path) -> None:
    """Read inputs until one is read wrongly; the newest lies in ``folder/input``."""
    target, random = TARGETS[name], Random(number)
    (folder / "files").mkdir(exist_ok=True)
    for seed in seeds:
        target.read(seed, folder / "files")  # and with it everything is imported
    now_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now_bytes + MEMORY_BYTES,) * 2)
    for done in range(1, INPUTS_A_CHILD + 1):
        data = target.mutate(random.choice(seeds), random)
        (folder / "input").write_bytes(data)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # what lasts longer ends the process
        wrong = failure(target, data, folder / "files")
        signal.setitimer(signal.ITIMER_PROF, 0)
        (folder / "done").write_text(str(done))
        if wrong:
            (folder / "error").write_text("".join(traceback.format_exception(wrong)))
            os._exit(1)


def run(name: str, seeds: list[bytes], number: int) -> tuple[int, str, bytes]:
    """One child: inputs it read, what was wrong with the last of them, and that input."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        if not (pid := os.fork()):
            try:
                child(name, seeds, number, folder)
            except BaseException:
                (folder / "error").write_text(traceback.format_exc())
                os._exit(2)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        done = int((folder / "done").read_text()) if (folder / "done").exists() else 0
        if not status:
            return done, "", b""
        said = (folder / "error").read_text() if (folder / "error").exists() else ""
        ended = f"took more than {SECONDS:g} s or ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else ""
        return done, said or ended, (folder / "input").read_bytes() if (folder / "input").exists() else b""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="FORMAT", help=f"{', '.join(TARGETS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=5, help="of all formats together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides the inputs (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    names = arguments.targets or list(TARGETS)
    read, found = dict.fromkeys(names, 0), {name: {} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        seeds = seeds_of(names, Path(folder))
    end, number = time.monotonic() + 60 * arguments.minutes, 0
    while time.monotonic() < end:
        name = names[number % len(names)]
        done, said, data = run(name, seeds[name], arguments.seed + number)
        number, read[name] = number + 1, read[name] + done
        kind = "\n".join(said.strip().splitlines()[-3:])
        if said and kind not in found[name]:
            found[name][kind] = path = CORPUS / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
            path.write_bytes(data)
            print(f"{name}: {path}\n{said}", flush=True)
    for name in names:
        print(f"{name:<12}{read[name]:>9,} inputs, {len(found[name])} kinds of fault")
    return any(found.values())


if __name__ == "__main__":
    raise SystemExit(main())
