"""What a run's folder survives: damage, links, a second process, signals."""

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from distill_core.base.locks import locked
from distill_core.base.storage import read_header, write_tensors
from distill_core.training import checkpoints, live, run_folders
from distill_core.training.checkpoints import checkpoints_in, own
from distill_core.training.run import Run, read_metrics, started
from distill_core.training.settings import TrainingSettings
from tests.programs import Program, save_slowly

from .runs import train, weights

pytestmark = pytest.mark.slow

RECIPE = TrainingSettings(total_steps=4, batch_size=2, learning_rate=1e-3, save_every_steps=2, keep_checkpoints=3, seed=3)
NEWEST = "checkpoints/00000004"


@pytest.fixture(scope="module")
def whole(small_teacher, small_data, tmp_path_factory):
    """A run of four steps, checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, small_teacher, small_data, RECIPE)
    return folder


@pytest.fixture
def run(whole, tmp_path, small_teacher, small_data):
    """A copy of it to damage, and how to go on with it to step 6."""

    def go_on():
        train(tmp_path / "run", small_teacher, small_data, TrainingSettings(**{**RECIPE.to_mapping(), "total_steps": 6}))
        return Run(tmp_path / "run", TrainingSettings(**{**RECIPE.to_mapping(), "total_steps": 6}), _inputs(tmp_path / "run"))

    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run", go_on


def _inputs(folder):
    return started(folder).inputs


def cut(folder):
    file = folder / NEWEST / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-999])


def flip(folder, name="student.safetensors"):
    file = folder / NEWEST / name
    content = bytearray(file.read_bytes())
    content[-400:-300] = bytes(byte ^ 255 for byte in content[-400:-300])
    file.write_bytes(content)


DAMAGE = {
    "weights cut short": (cut, 2),
    "a byte of the weights flipped": (flip, 2),
    "a byte of the optimizer flipped": (lambda d: flip(d, "training.safetensors"), 2),
    "weights gone": (lambda d: (d / NEWEST / "student.safetensors").unlink(), 2),
    "what else training needs gone": (lambda d: (d / NEWEST / "training.safetensors").unlink(), 2),
    "checksums damaged": (lambda d: (d / NEWEST / "checksums.json").write_text("[" * 10000), 2),
    "weights a link": (lambda d: _link(d / NEWEST / "student.safetensors"), 2),
    "a checkpoint of before checksums": (lambda d: (d / NEWEST / "checksums.json").unlink(), 4),
    "a second model beside it": (lambda d: shutil.copy(d / NEWEST / "student.safetensors", d / NEWEST / "extra_1_.safetensors"), 4),
    "a file named as a checkpoint": (lambda d: (d / "checkpoints/00000005").write_text(""), 4),
    "a folder of a superscript digit": (lambda d: (d / "checkpoints/²").mkdir(), 4),
    "an empty folder named as a checkpoint": (lambda d: (d / "checkpoints/00000009").mkdir(), 4),
    "a link named as a checkpoint": (lambda d: (d / "checkpoints/00000006").symlink_to(d.parent), 4),
}  # fmt: skip


def _link(file):
    file.rename(file.parents[2] / "elsewhere.safetensors")
    file.symlink_to(file.parents[2] / "elsewhere.safetensors")
    (file.parents[2] / "elsewhere.safetensors").rename(file.parents[3] / "elsewhere.safetensors")


@pytest.mark.parametrize("damage,begins_at", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_an_older_one(damage, begins_at, run, caplog):
    folder, go_on = run
    damage(folder)
    before = len(read_metrics(folder))
    resumed = go_on()
    assert resumed.step == 6 and [row["step"] for row in resumed.metrics()] == [1, 2, 3, 4, 5, 6] and before == 4
    aside = [path.name for path in (folder / "checkpoints").iterdir() if ".damaged" in path.name]
    assert bool(aside) == ("was renamed to" in caplog.text)
    if begins_at == 2:
        assert aside == ["00000004.damaged"] and "checkpoint 00000004" in caplog.text


def test_a_run_without_a_sound_checkpoint_is_refused_and_kept_as_it_is(run):
    folder, go_on = run
    for checkpoint in checkpoints_in(folder):
        (checkpoint / "training.safetensors").unlink()
    before = sorted(folder.rglob("*safetensors"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"every checkpoint of run 'run' is damaged \(00000004: a file is missing"):
            go_on()
    assert sorted(folder.rglob("*safetensors")) == before


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()], ids=["refused", "absent"])
def test_on_a_drive_without_locks_a_run_goes_on_with_a_warning(error, tmp_path, monkeypatch, caplog):
    def acquire(self, *_, **__):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with locked(tmp_path):
        assert (tmp_path / ".owner.json").exists()
    assert "without locks" in caplog.text


def test_after_falling_back_the_run_is_as_if_it_had_never_been_further(run, small_teacher, small_data, tmp_path):
    folder, go_on = run
    flip(folder)
    resumed = go_on()
    straight, _ = train(
        tmp_path / "straight", small_teacher, small_data, TrainingSettings(**{**RECIPE.to_mapping(), "total_steps": 6})
    )
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(straight).values(), strict=True))


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_text("a=" + "[" * 100000), lambda f: f.write_text("inputs = 5"),
                                    lambda f: f.write_bytes(b"\xff\xfe\xfd")])  # fmt: skip
def test_a_run_whose_recipe_is_lost_goes_on_by_what_its_checkpoint_tells_and_still_refuses_others(damage, run, caplog):
    folder, go_on = run
    inputs = _inputs(folder)
    damage(folder / "recipe.toml")
    with pytest.raises(ValueError, match="was started with seed = 3, but is now 4"):
        Run(folder, TrainingSettings(**{**RECIPE.to_mapping(), "seed": 4}), inputs)
    assert go_on().step == 6 and caplog.text.count("lost or damaged") == 1


def test_without_either_the_run_is_refused_in_one_sentence(run):
    folder, go_on = run
    for checkpoint in checkpoints_in(folder):
        file = checkpoint / "training.safetensors"
        header = read_header(file)
        kept = {name: tensor.read() for name, tensor in header.tensors.items()}
        write_tensors(file, kept, {"distill.training": header.metadata["distill.training"]}, overwrite=True)
    (folder / "recipe.toml").unlink()
    with pytest.raises(ValueError, match="recipe.toml is lost or damaged .* restore it, or give the new run another name"):
        go_on()


def test_a_run_whose_first_write_was_killed_can_be_started_again(tmp_path, small_teacher, small_data):
    (tmp_path / "run" / ".recipe.toml.abcd1234").mkdir(parents=True)
    (tmp_path / "run" / "pruned.safetensors").write_bytes(b"")
    run, _ = train(tmp_path / "run", small_teacher, small_data, RECIPE)
    assert run.step == 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="is not a run .it holds thesis.txt"):
        Run(tmp_path / "other", RECIPE)


def test_looking_at_a_run_writes_nothing(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    Run(whole, RECIPE, _inputs(whole)).describe_state()
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


# --- links


@pytest.mark.parametrize("name", ["checkpoints", "samples", "tensorboard", "wandb"])
def test_a_folder_of_a_run_that_leads_elsewhere_is_refused_and_nothing_there_is_touched(name, run, tmp_path):
    folder, go_on = run
    outside = tmp_path / "home"
    (outside / ".ssh").mkdir(parents=True)
    (outside / ".ssh" / "id").write_text("key")
    (outside / "00000001").mkdir()
    (outside / "00000001" / "thesis.txt").write_text("x")
    if (folder / name).exists():
        for path in (folder / name).iterdir():
            shutil.move(path, outside)
        (folder / name).rmdir()
    (folder / name).symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(ValueError, match="is a link to another place"):
        go_on()
    assert sorted(outside.rglob("*")) == before


@pytest.mark.parametrize("name", ["recipe.toml", "metrics.csv"])
def test_a_file_of_a_run_that_leads_elsewhere_is_neither_read_nor_written(name, run, tmp_path):
    folder, go_on = run
    secret = tmp_path / "secret"
    shutil.move(folder / name, secret)
    before = secret.read_bytes()
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{name} is a link to another place"):
        go_on()
    with contextlib.suppress(ValueError):
        assert live.history(folder)["total_steps"] is None
    assert secret.read_bytes() == before and not secret.is_symlink()


def test_what_a_chart_shows_stays_in_the_folder(run, tmp_path):
    """Stages and samples that are links are not shown."""
    folder, _ = run
    (folder / "range_0").symlink_to(folder)
    assert run_folders.stages_in(folder) == [folder]
    (tmp_path / "elsewhere").mkdir()
    for place in (tmp_path / "elsewhere", folder / "samples"):
        place.mkdir(exist_ok=True)
        (place / "00000009.png").write_bytes(b"")
    assert live.newest_sample(folder) == folder / "samples/00000009.png"
    (folder / "samples/00000010.png").symlink_to(tmp_path / "elsewhere/00000009.png")
    assert live.newest_sample(folder) == folder / "samples/00000009.png"
    shutil.rmtree(folder / "samples")
    (folder / "samples").symlink_to(tmp_path / "elsewhere")
    assert live.newest_sample(folder) is None


# --- while it trains


def test_a_full_disk_tells_which_step_is_kept(run, monkeypatch):
    folder, go_on = run

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("distill_core.training.run.write_tensors", full)
    with pytest.raises(OSError, match=r"cannot write .*00000006: No space left on device; .* \(the run keeps step 4\)"):
        go_on()
    assert [path.name for path in checkpoints_in(folder)] == ["00000002", "00000004"]


def test_a_run_whose_folder_is_deleted_while_it_trains_says_so(tmp_path, small_teacher, small_data):
    def delete(progress):
        if progress.step == 1:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(ValueError, match="the folder of run 'run' was deleted or moved while it trained"):
        train(tmp_path / "run", small_teacher, small_data, RECIPE, on_step=delete)
    assert not (tmp_path / "run").exists()


def test_old_checkpoints_are_dropped_file_by_file(run):
    """What somebody else put into one stays; only what a run wrote goes."""
    folder, go_on = run
    (folder / "checkpoints/00000002/notes.txt").write_text("mine")
    checkpoints.drop(folder / "checkpoints/00000002")
    assert [path.name for path in (folder / "checkpoints/00000002").iterdir()] == ["notes.txt"]
    checkpoints.drop(folder / NEWEST)
    assert not (folder / NEWEST).exists()
    assert own(folder) == folder


# --- several processes


def test_a_second_process_is_refused_by_name_and_a_killed_one_leaves_nothing_behind(run):
    folder, go_on = run
    script = f"""
        import time
        from pathlib import Path
        from distill_core.base.locks import locked
        with locked(Path({str(folder)!r})):
            print("held", flush=True)
            time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        recipe = (folder / "recipe.toml").read_bytes()
        with pytest.raises(ValueError, match=rf"is in use by process {holder.pid} on .*, for 0 min; wait"):
            go_on()
        assert (folder / "recipe.toml").read_bytes() == recipe
    finally:
        holder.kill()
        holder.wait()
    assert go_on().step == 6


def test_another_run_that_was_begun_in_the_meantime_is_noticed(tmp_path, small_teacher, small_data):
    """Both looked at an empty folder; the second to train finds a run with other settings."""
    late = Run(tmp_path / "run", TrainingSettings(**{**RECIPE.to_mapping(), "seed": 4}))
    train(tmp_path / "run", small_teacher, small_data, RECIPE)
    with pytest.raises(ValueError, match="was started with"), late.training():
        raise AssertionError


def test_one_process_may_hold_a_folder_once_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="is in use"), locked(tmp_path):
        raise AssertionError
    with locked(tmp_path):
        assert json.loads((tmp_path / ".owner.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".owner.json").exists()


# --- signals


@pytest.mark.parametrize("ending,code", [((signal.SIGINT, signal.SIGINT), 130), ((signal.SIGTERM,), 143), ((signal.SIGTERM, signal.SIGINT), 143)])  # fmt: skip
def test_a_second_signal_does_not_lose_what_the_first_has_promised(ending, code, tmp_path):
    (tmp_path / "recipe.toml").write_text(
        'run = "run"\n[teacher]\nfile = "demo"\n[student]\npreset = "bk-sdm-base"\n[data]\nprompts = "prompts.txt"\n'
        'resolution = "64"\nsampler_steps = 1\n[training]\ntotal_steps = 100000\nbatch_size = 1\nsave_every_steps = 100000\n'
    )
    (tmp_path / "prompts.txt").write_text("a cat, flat\n")
    program = Program("train", tmp_path / "recipe.toml", cwd=tmp_path, begin=save_slowly)
    metrics = tmp_path / "run" / "metrics.csv"
    _until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    program.send(ending[0])
    _until(lambda: "saving" in program.said)
    for number in ending[1:]:
        time.sleep(0.3)
        program.send(number)
    assert program.wait(60) in (code, 130) and "every finished step is kept" in program.said, program.said
    (checkpoint,) = checkpoints_in(tmp_path / "run")
    assert int(checkpoint.name) >= len(read_metrics(tmp_path / "run")) - 1 > 1


def _until(condition):
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


# --- metrics


@pytest.mark.parametrize("row", ["5,oops" + ",1" * 40, "5," + "9" * 200000, '5,"', "x,1,2", "nan,1", ",,,", "\x00,1"])
def test_rows_that_cannot_be_read_are_left_out_with_one_warning(row, whole, tmp_path, caplog):
    shutil.copy(whole / "metrics.csv", tmp_path / "metrics.csv")
    good = read_metrics(tmp_path)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write(row + "\n" + row + "\n")
    with caplog.at_level(logging.WARNING):
        assert read_metrics(tmp_path) == good
    assert caplog.text.count("cannot be read and are skipped") == 1
