"""Run the quickstart and keep its image and table: ``python benchmarks/quickstart.py [--preset P]``.

Writes ``results/quickstart.png`` and ``results/quickstart.md`` (for other presets ``quickstart-P.*``), every figure
measured in that run.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from distill_core.demo.score import every_prompt
from distill_core.pruning.plan import preset_names
from distill_core.quickstart import COLUMNS, Settings, cells, quickstart, work

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=preset_names("sd1"), default=Settings.preset)
    settings = Settings(preset=parser.parse_args().preset)
    stem = "quickstart" if settings.preset == Settings.preset else f"quickstart-{settings.preset}"
    RESULTS.mkdir(exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tqdm(total=work(settings)) as progress:
        rows = quickstart(Path(folder) / "out", settings, progress)
        shutil.copy(Path(folder) / "out" / "report.png", RESULTS / f"{stem}.png")
    minutes = (time.monotonic() - started) / 60
    teacher, _, student = rows
    lines = [f"| {' | '.join(COLUMNS.values())} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    lines += ["", f"Student over teacher: trained prompts {student.trained / teacher.trained:.3f}, held-out prompts "
              f"{student.held_out / teacher.held_out:.3f}. {settings.train_steps} steps of batch {settings.batch_size}, "
              f"{len(every_prompt(settings.num_prompts, settings.seed))} images judged of each model, {minutes:.1f} minutes in all."]  # fmt: skip
    (RESULTS / f"{stem}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
