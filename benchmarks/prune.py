"""Pruning and inspecting checkpoints of real size: ``python benchmarks/prune.py``, or with names such as ``"Z-Image"``.

SDXL needs 13 GB of disk; a transformer the size of its file and twice that of its student, and a ComfyUI, which tells its shape
(`tests/comfyui.py`). Memory is the peak of the process that does it; time is compared with a plain copy of as many bytes of the
same file, made in the same run, read from the disk and flushed to it as the student is, the two taking turns to be first. Writes
``results/prune.md``; with names, their rows of ``results/prune_transformers.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS, TESTS = HERE / "results", HERE.parent / "tests"
PRESETS = {
    "Flux.1 dev": "flux-1-lite",
    "Flux.2 dev": "keep double 0-7 single 0-23,47",
    "Flux.2 klein 4B": "klein-4b-small",
    "Flux.2 klein 9B": "klein-9b-small",
    "Z-Image": "z-image-small",
    "Qwen-Image": "qwen-image-13b",
    "Wan 14B": "wan-40-small",
    "Wan 2.2 5B": "wan-30-small",
    "SD3.5 large": "sd35-large-small",
    "SD3.5 medium": "sd35-medium-small",
    "Lumina 2": "keep layer 0-9,11,14,17,19-25",
}
"""What transformers of true shape are cut by."""
SDXL = "SDXL"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PRESETS)}; none: {SDXL}")
    parser.add_argument("--rounds", type=int, default=5, help="in turn (default: %(default)s)")
    parser.add_argument(
        "--plan", help="another plan for all of them, where the disk has no room for the usual student and its copy"
    )
    parser.add_argument("--fp8", action="store_true", help="weights in fp8, half the size, in place of bf16")
    parser.add_argument("--inspect", action="store_true", help="inspecting alone, of files with a hole in place of the weights")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    head = [
        "| command | size | seconds | peak memory | plain copy | of the copy's time | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    note = "Medians of rounds in turn; seconds include starting Python."
    out = RESULTS / ("prune_transformers.md" if arguments.names else "prune.md")
    there = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    rows = {_command(line): line for line in there if line.startswith("| `")}
    for name in arguments.names or [SDXL]:
        plan = arguments.plan or ("ssd-1b" if name == SDXL else PRESETS[name])
        dtype = "fp8" if arguments.fp8 else ""
        made = _inspecting(name, arguments.rounds, dtype) if arguments.inspect else _rows(name, plan, arguments.rounds, dtype)
        rows |= {_command(line): line for line in made}
        # As each ends: later ones may find no room.
        out.write_text("\n".join([*head, *rows.values(), "", note]) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"), end="")


def _command(row: str) -> str:
    return row.split(" | ")[0]


def _rows(name: str, plan: str, rounds: int, dtype: str) -> list[str]:
    how = ["--plan", plan] if plan.startswith(("keep ", "fold ")) else ["--preset", plan]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher, student, copy = (folder / f"{kind}.safetensors" for kind in ("teacher", "student", "copy"))
        # In a process of its own: a child's peak memory begins with that of its parent.
        subprocess.run([sys.executable, __file__, "--make-teacher", name, str(teacher), dtype, "weights"], check=True)
        prune: list[tuple[float, int]] = []
        plain: list[float] = []
        inspect: list[tuple[float, int]] = []
        size = 0

        def pruned() -> None:
            nonlocal size
            student.unlink(missing_ok=True)
            prune.append(_run("prune", teacher, student, *how))
            size = student.stat().st_size

        def copied() -> None:
            plain.append(_copy(teacher, copy, size))

        for number in range(rounds):  # what comes second may find in memory what the first has read
            for work in (pruned, copied) if number % 2 == 0 else (copied, pruned):
                _forget(teacher)
                work()
            inspect.append(_run("inspect", teacher))
        whole = teacher.stat().st_size
    seconds, of_copy = statistics.median(s for s, _ in prune), statistics.median(plain)
    return [
        f"| `distill prune` {_stored(name, dtype)} by {plan} | {size / 1e9:.2f} GB of {whole / 1e9:.2f} | {seconds:.1f} | {_peak(prune)} | "
        f"{of_copy:.1f} s | {seconds / of_copy:.2f} | {rounds} |",
        _inspect_row(name, dtype, inspect),
    ]


def _inspecting(name: str, rounds: int, dtype: str) -> list[str]:
    with tempfile.TemporaryDirectory() as temporary:
        teacher = Path(temporary) / "teacher.safetensors"
        subprocess.run([sys.executable, __file__, "--make-teacher", name, str(teacher), dtype, ""], check=True)
        return [_inspect_row(name, dtype, [_run("inspect", teacher) for _ in range(rounds)])]


def _inspect_row(name: str, dtype: str, runs: list[tuple[float, int]]) -> str:
    seconds = statistics.median(s for s, _ in runs)
    return f"| `distill inspect` {_stored(name, dtype)} | header only | {seconds:.2f} | {_peak(runs)} | | | {len(runs)} |"


def _stored(name: str, dtype: str) -> str:
    return name + f" in {dtype}" * bool(dtype)


def _peak(runs: list[tuple[float, int]]) -> str:
    return f"{max(memory for _, memory in runs) / 1e9:.2f} GB"


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


def _forget(path: Path) -> None:
    """Let the system forget what it remembers of a file, so that it is read from the disk."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(source: Path, target: Path, size: int) -> float:
    """Seconds to copy the beginning of a file."""
    started = time.monotonic()
    with open(source, "rb") as read, open(target, "wb") as write:
        while (left := size - write.tell()) > 0:
            write.write(read.read(min(left, 8 << 20)))
        write.flush()
        os.fsync(write.fileno())
    seconds = time.monotonic() - started
    target.unlink()
    return seconds


def _make_teacher(name: str, path: Path, dtype_word: str, with_weights: str) -> None:
    import torch

    from distill_core.base.storage import write_tensors
    from distill_core.evaluation.catalog import published_teacher
    from distill_core.networks.layouts import LAYOUTS

    if name == SDXL:
        shapes = published_teacher("sdxl").shapes
        names, dtype = LAYOUTS["ldm"].from_canonical(shapes), torch.float16
        shapes = {f"model.diffusion_model.{names[parameter]}": shape for parameter, shape in shapes.items()}
    else:
        shapes = _true_shapes(name, path.with_suffix(".json"))
        dtype = torch.float8_e4m3fn if dtype_word else torch.bfloat16
    if not with_weights:
        code = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
        _write_header(path, shapes, code, dtype.itemsize)
        return
    # One tensor's memory serves all: what is in the weights makes no difference.
    noise = torch.randn(max(torch.Size(shape).numel() for shape in shapes.values())).to(dtype)
    write_tensors(path, {parameter: noise[: torch.Size(shape).numel()].reshape(shape) for parameter, shape in shapes.items()})


def _write_header(path: Path, shapes: dict[str, list[int]], code: str, itemsize: int) -> None:
    """A file of this shape that takes no room: its weights are a hole."""
    entries, end = {}, 0
    for parameter, shape in shapes.items():
        start, end = end, end + math.prod(shape) * itemsize
        entries[parameter] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def _true_shapes(name: str, out: Path) -> dict[str, list[int]]:
    """Shapes of a transformer as ComfyUI builds it."""
    sys.path.insert(0, str(TESTS.parent))
    from tests import comfyui

    place = comfyui.find() or sys.exit(comfyui.HOW_TO_GET_IT)
    script = [comfyui.python(place), TESTS / "nodes" / "in_comfyui.py", place, "cutting.true_shapes", name, out]
    subprocess.run(list(map(str, script)), check=True, capture_output=True)
    return json.loads(out.read_text())


if __name__ == "__main__":
    _make_teacher(sys.argv[2], Path(sys.argv[3]), *sys.argv[4:]) if sys.argv[1:2] == ["--make-teacher"] else main()
