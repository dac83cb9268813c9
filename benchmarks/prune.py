"""Pruning and inspecting a checkpoint of SDXL's size: ``python benchmarks/prune.py``. Needs 13 GB of disk.

Memory is the peak of the process that does it; time is compared with a plain copy of the student's bytes, made in the
same run, on the same disk, and flushed to it as the student is. Writes ``results/prune.md``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher, student, copy = (folder / f"{name}.safetensors" for name in ("teacher", "student", "copy"))
        # In a process of its own: a child's peak memory begins with that of its parent.
        subprocess.run([sys.executable, __file__, "--make-teacher", str(teacher)], check=True)
        prune, plain, inspect = [], [], []
        for _ in range(ROUNDS):
            student.unlink(missing_ok=True)
            prune.append(_run("prune", teacher, student, "--preset", "ssd-1b"))
            plain.append(_copy(student, copy))
            inspect.append(_run("inspect", teacher))
        size = student.stat().st_size
    seconds = statistics.median(s for s, _ in prune)
    lines = [
        "| command on an SDXL UNet in fp16 | size | seconds | peak memory |",
        "|---|---|---|---|",
        f"| `distill prune … --preset ssd-1b` | {size / 1e9:.2f} GB written | {seconds:.1f} | {max(m for _, m in prune) / 1e9:.2f} GB |",
        f"| plain copy of the student | {size / 1e9:.2f} GB written | {statistics.median(plain):.1f} | |",
        f"| `distill inspect` | header only | {statistics.median(s for s, _ in inspect):.2f} | {max(m for _, m in inspect) / 1e9:.2f} GB |",
        "",
        f"Prune over plain copy: {seconds / statistics.median(plain):.2f}. Peak memory over the student's size: "
        f"{max(m for _, m in prune) / size:.2f}. Medians of {ROUNDS} rounds in turn; seconds include starting Python.",
    ]
    (RESULTS / "prune.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _run(*arguments) -> tuple[float, int]:
    """Seconds and peak resident bytes of one ``distill`` command."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "distill_core", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"distill {' '.join(map(str, arguments))} failed")
    return time.monotonic() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _copy(source: Path, target: Path) -> float:
    started = time.monotonic()
    with open(source, "rb") as read, open(target, "wb") as write:
        shutil.copyfileobj(read, write, 8 << 20)
        write.flush()
        os.fsync(write.fileno())
    seconds = time.monotonic() - started
    target.unlink()
    return seconds


def _make_teacher(path: Path) -> None:
    import torch

    from distill_core.base.storage import write_tensors
    from distill_core.evaluation.catalog import published_teacher
    from distill_core.networks.layouts import LAYOUTS

    shapes = published_teacher("sdxl").shapes
    names = LAYOUTS["ldm"].from_canonical(shapes)
    # One tensor's memory serves all: what is in the weights makes no difference.
    noise = torch.randn(max(torch.Size(shape).numel() for shape in shapes.values())).half()
    tensors = {names[name]: noise[: torch.Size(shape).numel()].reshape(shape) for name, shape in shapes.items()}
    write_tensors(path, {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()})


if __name__ == "__main__":
    _make_teacher(Path(sys.argv[2])) if sys.argv[1:2] == ["--make-teacher"] else main()
