"""The battery for a GPU: what can be tried without one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def battery(*arguments):
    return subprocess.run([sys.executable, BENCHMARKS / "gpu.py", *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_a_part_is_rehearsed_alone_and_published_nowhere():
    before = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").rglob("*")}
    done = battery("experts", "--rehearse", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    heading, *lines = done.stdout.splitlines()
    assert heading == "# experts" and any(line.startswith("| ExpertUNet | ") for line in lines)
    assert {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").rglob("*")} == before


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_what_it_needs():
    assert "there is no CUDA device; to try the battery on the CPU, add --rehearse" in battery().stderr
    assert (
        "unknown part steps; choose from step, options, precision, experts, guidance, presets, peaks, compiled"
        in battery("steps").stderr
    )
