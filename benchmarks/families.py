"""Which students of transformers ComfyUI and diffusers open: ``python benchmarks/families.py``. Needs a ComfyUI as the tests do
(`tests/comfyui.py`).

Builds every model of true shape without weights, cuts it by some plans of every kind, and asks ComfyUI what it takes the student
for and which weights it would miss or not know; then the same with diffusers' classes in their own names, built from the config that
is written. Writes ``results/families.md``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from report import publish, table  # noqa: E402

from distill_core.networks.transformers.architecture import FAMILIES  # noqa: E402
from tests import comfyui  # noqa: E402

folders = importlib.import_module("tests.core.networks.test_folders")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    place = comfyui.find() or sys.exit(comfyui.HOW_TO_GET_IT)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "told.json"
        script = [comfyui.python(place), ROOT / "tests" / "nodes" / "in_comfyui.py", place, "cutting.of_true_shape", out]
        subprocess.run(list(map(str, script)), check=True, capture_output=True)
        told = json.loads(out.read_text())
    rows = []
    for name, facts in told.items():
        students = facts["students"]
        opened = sum(kind == facts["class"] and not (missing or unexpected or other)
                     for _, kind, missing, unexpected, other in students.values())  # fmt: skip
        smallest = {text: count for text, (count, *_) in students.items() if not text.startswith(("keep ", "fold "))}
        rows.append([
            name,
            ", ".join(f"{word} {numbers}" for word, numbers in facts["lists"].items()),
            f"{facts['parameters']:,}",
            ", ".join(f"{preset}: {count:,}" for preset, count in smallest.items()),
            f"{opened} of {len(students)}",
            "Load Distilled Model" if any(blocks.told_by for blocks in FAMILIES[facts["family"]].lists) else "Load Diffusion Model",
        ])  # fmt: skip
    in_diffusers = []
    for kind, family in folders.CLASSES:
        teacher, opened_by = folders.opened_by_from_config(kind, family)
        lists = ", ".join(f"{word} {numbers}" for word, numbers in teacher.describe_lists().items())
        in_diffusers.append([kind, lists, f"{teacher.num_parameters:,}", f"{sum(opened_by.values())} of {len(opened_by)}"])
    refused = [family.title for family in FAMILIES.values() if family.refusal]
    publish("families", [
        *table(["model", "blocks", "parameters", "presets", "students opened, with nothing missing and nothing left over", "by"], rows),
        "",
        *table(["class of diffusers", "blocks", "parameters", "students opened by `from_config`, with the same weights"], in_diffusers),
        "",
        f"Refused, with the reason: {', '.join(refused)}.",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
