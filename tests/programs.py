"""``distill`` in a process of its own, forked from one that has loaded PyTorch, so that it starts at once.

Import it as ``tests.programs``: by that name the new process finds it too.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT = multiprocessing.get_context(_METHOD)
if _METHOD == "forkserver":
    _CONTEXT.set_forkserver_preload(
        [
            "distill_core.cli",
            "distill_core.preparation",
            "distill_core.training.loop",
            "diffusers.models.unets.unet_2d_condition",
            "peft",
        ]
    )


class Program:
    """A started ``distill``; what it says goes to a file."""

    def __init__(self, *arguments, cwd=".", environment=None, begin=None):
        """begin: called there before the command; a function of this module, or of an installed one."""
        number, name = tempfile.mkstemp(suffix=".txt")
        os.close(number)
        self._says = Path(name)
        given = (list(map(str, arguments)), str(cwd), {"CUDA_VISIBLE_DEVICES": ""} | (environment or {}), name, begin)
        self._process = _CONTEXT.Process(target=_run, args=given, daemon=True)
        self._process.start()

    @property
    def ended(self) -> bool:
        return self._process.exitcode is not None

    @property
    def said(self) -> str:
        return self._says.read_text()

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout_s: float = 300) -> int:
        """Its exit status, below 0 for the signal that ended it."""
        self._process.join(timeout_s)
        if not self.ended:
            self.kill()
            raise TimeoutError(f"distill took over {timeout_s} s; it said: {self.said}")
        return self._process.exitcode


def run(*arguments, cwd=".") -> None:
    """Run a command to its end, which must be a good one."""
    program = Program(*arguments, cwd=cwd)
    assert program.wait() == 0, program.said


def save_slowly() -> None:
    """Take two seconds for each checkpoint from now on, and tell of it on stderr."""
    from distill_core.training.run import Run

    save = Run.save

    def slow(self, state, trained):
        print("saving", state.step, file=sys.stderr, flush=True)
        time.sleep(2)
        save(self, state, trained)

    Run.save = slow


def _run(arguments, cwd, environment, says, begin):
    from distill_core.cli import main

    os.chdir(cwd)
    os.environ |= environment
    with open(says, "w") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if begin is not None:
        begin()
    sys.exit(main(arguments))
