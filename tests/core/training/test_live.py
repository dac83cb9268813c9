"""What someone who watches a run is told: nothing of it lost, however it is cut into points and messages."""

import math
import random

import pytest

from distill_core.training import live
from distill_core.training.loop import Progress
from distill_core.training.run import read_metrics


def rows_of(count, seed=0):
    """Metrics as of a run: each step in one range of timesteps, validated now and then."""
    chance = random.Random(seed)
    rows = []
    for step in range(1, count + 1):
        row = {"step": float(step), "lr": 1e-3, "total": chance.random(), "task": chance.random(), "feature/mid": 1.0}
        row[f"timesteps/{100 * chance.randrange(10)}-x"] = row["total"]
        rows.append(row | ({"validation": chance.random()} if step % 7 == 0 else {}))
    return rows


def table(folder, rows, name="metrics.csv"):
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    folder.mkdir(parents=True)
    (folder / name).write_text("".join(",".join(line) + "\n" for line in lines))


def progress(row, total_steps=100, seconds_per_step=0.5):
    return Progress(int(row["step"]), total_steps, row, seconds_per_step)


# --- points


def test_few_rows_are_a_point_each():
    rows = rows_of(20)
    points = live.points(rows)
    assert points["step"] == list(range(1, 21))
    for name in ("total", "task", "validation"):
        expected = [pytest.approx(row[name], rel=1e-5) if name in row else None for row in rows]
        assert points["mean"][name] == points["min"][name] == points["max"][name] == expected
    bins = [name for name in points["mean"] if name.startswith("timesteps/")]
    assert bins == sorted(bins, key=lambda name: int(name[10:-2])) and not set(bins) & points["min"].keys()
    assert points["mean"].keys() == {"total", "task", "validation", *bins}


@pytest.mark.parametrize("count", [999, 1000, 1001, 1999, 2000, 2001, 54_321])
def test_many_rows_are_at_most_so_many_points_and_keep_mean_and_extremes(count):
    rows = rows_of(count)
    points = live.points(rows)
    steps, totals = points["step"], [row["total"] for row in rows]
    assert 500 <= len(steps) <= 1000 and steps[-1] == count
    sizes = [last - first for first, last in zip([0, *steps], steps, strict=False)]
    assert sum(size * mean for size, mean in zip(sizes, points["mean"]["total"], strict=True)) == pytest.approx(sum(totals))
    groups = [totals[first:last] for first, last in zip([0, *steps], steps, strict=False)]
    for kind, of in (("min", min), ("max", max)):
        assert points[kind]["total"] == pytest.approx([of(group) for group in groups], rel=1e-5)


def test_what_is_not_finite_is_left_out_for_json_has_no_word_for_it():
    rows = [{"step": 1, "total": math.inf}, {"step": 2, "total": math.nan}, {"step": 3, "total": 2.0}]
    assert live.points(rows)["mean"]["total"] == [None, None, 2.0]
    assert live.points(rows, 1)["mean"]["total"] == [2.0]
    assert live.points([]) == {"step": [], "mean": {}, "min": {}, "max": {}}


# --- messages


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.3, 5.0])
def test_messages_are_a_second_apart_and_together_tell_every_step(seconds):
    rows, sender = rows_of(100), live.Live("run", 100)
    told = [(now, sender.tell(progress(row), now)) for now, row in ((100 + i * seconds, row) for i, row in enumerate(rows))]
    told = [(now, message) for now, message in told if message]
    assert all(after - before >= live.SECONDS_BETWEEN for (before, _), (after, _) in zip(told, told[1:-1], strict=False))
    messages = [message for _, message in told]
    assert [message["after"] for message in messages] == [None, *(message["step"] for message in messages[:-1])]
    assert messages[-1]["step"] == 100 and messages[-1]["seconds_left"] == 0
    assert [step for message in messages for step in message["points"]["step"]] == list(range(1, 101))
    totals = [total for message in messages for total in message["points"]["mean"]["total"]]
    assert totals == pytest.approx([row["total"] for row in rows], rel=1e-5)


def test_a_message_says_how_fast_it_goes_and_how_long_it_takes():
    message = live.Live("run", 50).tell(progress({"step": 10, "total": 1.0}, 80, 0.25), 0.0)
    assert message == {
        "run": "run",
        "step": 10,
        "total_steps": 80,
        "seconds_per_step": 0.25,
        "seconds_left": 10.0,
        "after": None,
        "points": {"step": [10], "mean": {"total": [1.0]}, "min": {"total": [1.0]}, "max": {"total": [1.0]}},
    }


def test_the_step_is_that_of_the_whole_training():
    """A training of several experts counts on where the metrics of each begin at 1."""
    message = live.Live("run", 50).tell(Progress(30, 50, {"step": 5, "total": 1.0}, 0.1), 0.0)
    assert message["points"]["step"] == [30]


# --- history


def test_history_is_the_metrics_of_the_run(tmp_path):
    rows, folder = rows_of(50), tmp_path / "a run"
    table(folder, rows)
    told = {"run": "a run", "step": 50, "total_steps": None, "stages": [], "points": live.points(rows)}
    assert live.history(folder) == told
    (folder / "recipe.toml").write_text("total_steps = 80\n")
    assert live.history(folder)["total_steps"] == 80


def test_history_of_several_students_is_their_stages_one_after_another(tmp_path):
    stages = {"joint": 5, "range_0": 3, "range_2": 2, "range_10": 4}
    tables = {stage: rows_of(count, seed) for seed, (stage, count) in enumerate(stages.items())}
    for stage, rows in tables.items():
        table(tmp_path / stage, rows)
    rows = live.metrics_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 15))
    assert [row["total"] for row in rows] == [row["total"] for stage in stages for row in tables[stage]]
    assert live.history(tmp_path)["step"] == 14


def test_a_folder_named_in_superscript_digits_does_not_hide_a_history(tmp_path):
    table(tmp_path / "range_0", rows_of(3))
    (tmp_path / "range_²").mkdir()
    assert live.history(tmp_path)["step"] == 3


def test_a_folder_without_a_step_has_no_history(tmp_path):
    assert live.history(tmp_path) is None and live.history(tmp_path / "nothing") is None
    table(tmp_path / "begun", [])
    assert live.history(tmp_path / "begun") is None


def test_a_row_that_is_being_written_is_not_read(tmp_path):
    rows = rows_of(5)
    table(tmp_path / "run", rows)
    path = tmp_path / "run" / "metrics.csv"
    text = path.read_text()
    for cut in range(len(text) - 1, text.rstrip().rfind("\n"), -1):
        path.write_text(text[:cut])
        assert [row["step"] for row in read_metrics(path.parent)] == [1, 2, 3, 4]


def test_the_newest_sample_is_that_of_the_last_step(tmp_path):
    assert live.newest_sample(tmp_path) is None
    (tmp_path / "samples").mkdir()
    for name in ("00000900.png", "00001000.png", "notes.png", "².png", ".00002000.png"):
        (tmp_path / "samples" / name).touch()
    assert live.newest_sample(tmp_path).name == "00001000.png"
