"""What the pack adds to ComfyUI's start: ``python benchmarks/startup.py``, with a ComfyUI where the tests find one.

In fresh processes, one after another: seconds of work until ComfyUI has its own nodes, and those its loader then takes for
this pack, nodes and their descriptions included. Writes ``results/startup.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from report import device_words, publish, table

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import comfyui  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="fresh starts (default: %(default)s)")
    rounds = parser.parse_args().rounds
    if (path := comfyui.find()) is None:
        parser.error(comfyui.HOW_TO_GET_IT)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cost.json"
        script = comfyui.ROOT / "tests" / "nodes" / "in_comfyui.py"
        starts = []
        for _ in range(rounds + 1):  # the first reads files from disk and writes bytecode
            subprocess.run([comfyui.python(path), script, path, "loading.cost", out], check=True, capture_output=True)
            starts.append(json.loads(out.read_text()))
    own, packs = ([start[name] for start in starts[1:]] for name in ("comfyui_s", "pack_s"))
    rows = [
        ["ComfyUI with its own nodes", _span(own), ""],
        ["this pack", _span(packs), f"{100 * median(packs) / median(own):.1f} %"],
    ]
    note = f"Median and range of {rounds} fresh starts, seconds of work of the process. {device_words()}."
    publish("startup", [*table(["loading", "seconds", "of ComfyUI's"], rows), "", note])


def _span(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
