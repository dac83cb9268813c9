"""The runs in a folder: listed as they are, deleted without anything else."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch

from distill_core.base.locks import locked
from distill_core.base.storage import atomic, write_tensors
from distill_core.training.run_folders import delete_run, run_in, runs_in, total_steps_of

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
    assert total_steps_of(folder) is None and run_in(folder).step == 14


def test_a_file_with_two_names_takes_its_room_once(runs):
    folder, newest = runs
    before = run_in(folder / "student").num_bytes
    (folder / "student" / "experts").mkdir()
    os.link(newest["student"], folder / "student" / "experts" / "range_0.safetensors")
    assert run_in(folder / "student").num_bytes == before


def test_what_is_not_of_the_run_stays(runs, tmp_path):
    folder, _ = runs
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (folder / "student" / "samples").symlink_to(outside, target_is_directory=True)
    (folder / "student" / "checkpoints" / "link").symlink_to(outside, target_is_directory=True)
    mine = {"notes.md", "range_notes", "pruned images"}
    for name in mine:
        (folder / "lora" / name).write_text("mine")
    for name in ("student", "lora", "experts"):
        delete_run(folder / name)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == {"lora", *(f"lora/{name}" for name in mine)}
    assert (outside / "precious").read_text() == "x"


def test_what_is_no_run_or_trains_is_not_deleted(runs):
    folder, newest = runs
    for name in ("samples", "experts", "pruned models", "range_notes"):
        (folder / "notes" / name).mkdir(parents=True)
    (folder / "link").symlink_to(folder / "student", target_is_directory=True)
    assert run_in(folder / "notes") is None
    for name, reason in (("notes", "there is no run in"), ("missing", "there is no run in"), ("link", "is a link")):
        with pytest.raises(ValueError, match=reason):
            delete_run(folder / name)
    with locked(folder / "lora"), pytest.raises(ValueError, match="is in use by process"):
        delete_run(folder / "lora")
    assert newest["student"].exists() and newest["lora"].exists() and len([*(folder / "notes").iterdir()]) == 4


def test_one_whose_files_cannot_be_moved_stays_as_it_was(runs, monkeypatch):
    folder, rename = runs[0] / "student", Path.rename
    before = sorted(folder.rglob("*.*"))

    def refuse(path, target):
        if path.name == "recipe.toml":  # as on Windows, where another program has it open
            raise PermissionError("it is open")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        delete_run(folder)
    monkeypatch.undo()
    assert set(before) <= set(folder.rglob("*.*")) and run_in(folder).step == 30
    delete_run(folder)
    assert not folder.exists()


def test_what_killed_processes_left_goes_too(runs):
    folder = runs[0] / "lora"
    with atomic(folder / "base.safetensors") as made:
        made.write_bytes(bytes(9))
        name = made.parent.name
    _, _, host, _, end, tmp = name.rsplit(".", 5)
    left = folder / f".base.safetensors.{host}.999999999.{end}.{tmp}"
    left.mkdir()
    (left / "made").write_bytes(bytes(9))
    delete_run(folder)
    assert not folder.exists()


def test_a_full_disk_can_be_emptied(runs, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    delete_run(runs[0] / "student")
    assert not (runs[0] / "student").exists()


def test_without_locks_nothing_is_deleted(runs, monkeypatch):
    def none(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", none)
    with pytest.raises(ValueError, match="cannot be locked, so another process may be using it"):
        delete_run(runs[0] / "student")
    assert run_in(runs[0] / "student").step == 30
