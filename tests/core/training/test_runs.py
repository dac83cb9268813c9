"""The runs in a folder: listed as they are, deleted without anything else."""

import pytest
import torch

from distill_core.base.locks import locked
from distill_core.base.storage import write_tensors
from distill_core.training.runs import delete_run, run_in, runs_in, stage_steps, total_steps_of

TENSORS = {"weight": torch.zeros(4)}


def checkpoint(folder, step, result="student"):
    inside = folder / "checkpoints" / f"{step:08d}"
    inside.mkdir(parents=True)
    for name in (result, "training"):
        write_tensors(inside / f"{name}.safetensors", TENSORS)
    return inside / f"{result}.safetensors"


@pytest.fixture
def runs(tmp_path):
    """A student, a LoRA and experts in training."""
    student, lora, experts = (tmp_path / "runs" / name for name in ("student", "lora", "experts"))
    checkpoint(student, 20)
    newest = {"student": checkpoint(student, 30), "lora": checkpoint(lora, 5, "lora")}
    (student / "recipe.toml").write_text("total_steps = 100\n")
    for number, step in enumerate((10, 4)):
        checkpoint(experts / f"range_{number}", step)
    (experts / "stages.json").write_text('{"range_0": 10, "range_1": 10}')
    return tmp_path / "runs", newest


def test_each_is_listed_with_its_steps_size_and_result(runs):
    folder, newest = runs
    (folder / "elsewhere").mkdir()
    (folder / "link").symlink_to(folder / "student", target_is_directory=True)
    found = {run.name: run for run in runs_in(folder)}
    told = {name: (run.kind, run.step, run.total_steps, run.result) for name, run in found.items()}
    assert told == {
        "student": ("student", 30, 100, newest["student"]),
        "lora": ("LoRA", 5, None, newest["lora"]),
        "experts": ("experts", 14, 20, None),
    }
    assert found["lora"].num_bytes == sum(file.stat().st_size for file in (folder / "lora").rglob("*.safetensors"))
    assert runs_in(folder / "missing") == []
    (folder / "experts" / "experts").mkdir()
    (folder / "experts" / "experts" / "experts.json").write_text("{}")
    assert run_in(folder / "experts").result == folder / "experts" / "experts"


@pytest.mark.parametrize("text", ["", "[]", '{"range_0": -1}', '{"range_0": true}', '{"range_0": "3"}', "{" * 9999])
def test_damaged_stages_are_none(text, runs):
    folder = runs[0] / "experts"
    (folder / "stages.json").write_text(text)
    assert stage_steps(folder) == {} and total_steps_of(folder) is None and run_in(folder).step == 14


def test_what_is_not_of_the_run_stays(runs, tmp_path):
    folder, _ = runs
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (folder / "student" / "samples").symlink_to(outside, target_is_directory=True)
    (folder / "student" / "checkpoints" / "link").symlink_to(outside, target_is_directory=True)
    (folder / "lora" / "notes.md").write_text("mine")
    for name in ("student", "lora", "experts"):
        delete_run(folder / name)
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*")] == ["lora", "lora/notes.md"]
    assert (outside / "precious").read_text() == "x"


def test_what_is_no_run_or_trains_is_not_deleted(runs):
    folder, newest = runs
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("x")
    (folder / "link").symlink_to(folder / "student", target_is_directory=True)
    for name, reason in (("notes", "there is no run in"), ("missing", "there is no run in"), ("link", "is a link")):
        with pytest.raises(ValueError, match=reason):
            delete_run(folder / name)
    with locked(folder / "lora"), pytest.raises(ValueError, match="is in use by process"):
        delete_run(folder / "lora")
    assert newest["student"].exists() and newest["lora"].exists() and (folder / "notes" / "a.txt").exists()


def test_one_that_was_cut_short_can_be_deleted_again(runs):
    """The recipe, by which it is still known, goes last."""
    folder = runs[0] / "student"
    (folder / "checkpoints").rename(folder / "samples")
    assert run_in(folder).step == 0
    delete_run(folder)
    assert not folder.exists()
