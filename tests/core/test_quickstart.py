import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distill_core.demo.score import every_prompt
from distill_core.networks.files import open_unet
from distill_core.quickstart import Settings, quickstart, work

pytestmark = pytest.mark.slow

TINY = Settings(train_steps=6, batch_size=8, num_prompts=2, sample_steps=2)


class Bar:
    """A progress bar that counts, and cancels where told."""

    def __init__(self, cancel_at=None):
        self.count, self.cancel_at = 0, cancel_at

    def update(self, amount):
        self.count += amount
        if self.cancel_at is not None and self.count >= self.cancel_at:
            raise KeyboardInterrupt

    def set_description(self, text):
        pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out, bar = tmp_path_factory.mktemp("quickstart") / "out", Bar()
    return out, quickstart(out, TINY, bar), bar


def test_it_leaves_a_report_a_student_and_the_run(finished):
    out, rows, _ = finished
    assert {p.name for p in out.iterdir()} == {"report.html", "report.png", "report.json", "student.safetensors",
                                               "pruned.safetensors", "run"}  # fmt: skip
    facts = json.loads((out / "report.json").read_text())
    assert [m["model"] for m in facts["models"]] == ["teacher", "pruned only", "distilled"]
    page = (out / "report.html").read_text()
    assert f"{rows[0].parameters:,}" in page and "data:image/png;base64," in page and "{" not in page.split("</style>")[1]
    with safe_open(out / "student.safetensors", "pt") as file:
        assert "input_blocks.0.0.weight" in file.keys()
    assert open_unet(out / "student.safetensors").origin == open_unet(out / "pruned.safetensors").origin != {}
    assert open_unet(out / "student.safetensors").architecture.num_parameters == rows[2].parameters < rows[0].parameters


def test_the_progress_bar_ends_full(finished):
    assert finished[2].count == work(TINY)


def test_a_finished_one_is_not_done_again(finished):
    with pytest.raises(ValueError, match="finished quickstart"):
        quickstart(finished[0], TINY, Bar())


def _measured(row):
    return row.trained, row.held_out, row.trained_interval


SAMPLED = len(every_prompt(TINY.num_prompts, TINY.seed)) * TINY.sample_steps * 2


TRAINED = 4 * TINY.batch_size * TINY.train_steps


@pytest.mark.parametrize(
    "cancel_at",
    [1, 2 * SAMPLED + 4 * TINY.batch_size * 2, 2 * SAMPLED + TRAINED + 1],
    ids=["at once", "while it trains", "when it is trained"],
)
def test_an_interrupted_one_ends_as_the_uninterrupted(cancel_at, finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quickstart(tmp_path / "out", TINY, Bar(cancel_at=cancel_at))
    bar = Bar()
    rows = quickstart(tmp_path / "out", TINY, bar)
    theirs, ours = (load_file(out / "student.safetensors") for out in (finished[0], tmp_path / "out"))
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    assert [_measured(row) for row in rows] == [_measured(row) for row in finished[1]]
    assert bar.count == work(TINY)
