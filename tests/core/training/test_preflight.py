"""What is told before the work: with nothing written, and nothing left behind."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distill_core.base import packages
from distill_core.base.disk import check_room, check_writable
from distill_core.base.packages import REQUIRED, check_installed
from distill_core.base.storage import WriteError, write_tensors
from distill_core.cli import main
from distill_core.diffusion.schedule import scaled_linear
from distill_core.pruning.plan import preset
from distill_core.routing.one_to_many import ExpertsSettings
from distill_core.training import preflight
from distill_core.training.loop import distill
from distill_core.training.preflight import check_experts_run, check_packages, check_run, checkpoint_bytes, disk_bytes
from distill_core.training.run import Inputs, Run
from distill_core.training.settings import TrainingSettings

from ...students import student_of

pytestmark = pytest.mark.slow

try:
    import tomllib
except ImportError:
    import tomli as tomllib

RECIPE = TrainingSettings(total_steps=4, batch_size=2, save_every_steps=1)
SHAPES = {"a": (10, 20), "b": (50,)}
ROOT = Path(__file__).parents[3]


def room(monkeypatch, num_bytes):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, num_bytes))


def test_packages_are_those_pip_installs():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {package for package in declared if ";" not in package} | ({"tomli"} if sys.version_info < (3, 11) else set())
    assert {*REQUIRED} == wanted


def test_missing_and_old_packages_are_told_with_the_line_that_helps(monkeypatch):
    check_installed(REQUIRED, "Distill")
    with pytest.raises(ValueError, match=r"^Distill needs a package: python -m pip install no-such-thing$"):
        check_installed(["tqdm", "no-such-thing"], "Distill")
    monkeypatch.setattr(packages, "version", lambda name: "0.29.2.dev0")
    with pytest.raises(ValueError, match=r'^Distill needs packages: python -m pip install "diffusers>=0.30" nothing$'):
        check_installed(["diffusers>=0.30", "einops", "nothing"], "Distill")
    for new in ("0.30", "0.30.0.dev0", "0.100", "1.0rc1"):
        monkeypatch.setattr(packages, "version", lambda name, new=new: new)
        check_installed(["diffusers>=0.30"], "Distill")


@pytest.mark.parametrize("settings,message", [({"optimizer": "lion"}, "optimizer lion needs a package: python -m pip install lion-pytorch"),
                                              ({"trackers": ("wandb",)}, "tracker wandb needs a package: python -m pip install wandb"),
                                              ({"lora_rank": 2}, "a LoRA needs a package: python -m pip install peft")])  # fmt: skip
def test_what_a_recipe_asks_for_is_told_before_its_data(settings, message, monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name != "torch" else 1)
    check_packages(RECIPE)
    for check in (check_packages, lambda recipe: check_run(tmp_path / "x", recipe, SHAPES)):
        with pytest.raises(ValueError, match=f"^{message}$"):
            check(replace(RECIPE, **settings))


def test_a_run_with_other_settings_is_told_whatever_its_data(tmp_path):
    run = Run(tmp_path / "run", RECIPE, Inputs(data="some", teachers=("t",)))
    with run.training():
        for name in ("student", "training"):
            write_tensors(run.folder / "checkpoints" / "00000001" / f"{name}.safetensors", {})

    def everything():
        return {path: path.is_file() and path.stat().st_mtime_ns for path in run.folder.rglob("*")}

    before = everything()
    check_run(run.folder, RECIPE, SHAPES)
    with pytest.raises(ValueError, match="was started with batch_size = 2"):
        check_run(run.folder, replace(RECIPE, batch_size=4), SHAPES)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing").write_text("")
    with pytest.raises(ValueError, match="is not a run"):
        check_run(tmp_path / "other", RECIPE, SHAPES)
    check_run(tmp_path / "new" / "run", RECIPE, SHAPES)
    assert not (tmp_path / "new").exists() and everything() == before


def test_checkpoints_are_as_large_as_told(small_teacher, small_data, tmp_path):
    for number, changes in enumerate([{}, {"ema_decay": 0.9}, {"optimizer": "adafactor"}, {"weight_dtype": "bf16"}]):
        recipe = replace(RECIPE, total_steps=1, objective="guidance", **changes)
        student, plan = student_of(small_teacher, preset("bk-sdm-tiny")), preset("bk-sdm-tiny")
        run = Run(tmp_path / str(number), recipe)
        distill(run, student=student, teacher=small_teacher, plan=plan, dataset=small_data)
        written = sum(path.stat().st_size for path in run.checkpoints[-1].iterdir())
        assert checkpoint_bytes(student.architecture.shapes, recipe) == pytest.approx(written, rel=0.1)


def test_a_disk_too_small_for_the_checkpoints_is_told(monkeypatch, tmp_path):
    each = checkpoint_bytes(SHAPES, RECIPE)
    room(monkeypatch, 3 * each)  # two stay, and the next is written before the older of them goes
    check_run(tmp_path / "run", RECIPE, SHAPES)
    check_run(tmp_path / "run", replace(RECIPE, total_steps=1, keep_checkpoints=1000), SHAPES)
    check_run(tmp_path / "run", replace(RECIPE, lora_rank=4, keep_checkpoints=1000), SHAPES)
    room(monkeypatch, 3 * each - 1)
    with pytest.raises(ValueError, match="3 checkpoints need at least .* are free; free some space, or lower keep_checkpoints"):
        check_run(tmp_path / "run", RECIPE, SHAPES)
    there = tmp_path / "run" / "checkpoints" / "00000001"
    there.mkdir(parents=True)
    (there / "student.safetensors").write_bytes(bytes(each))
    preflight.check_checkpoints(tmp_path / "run", SHAPES, [RECIPE])
    with pytest.raises(ValueError, match="9 checkpoints need"):  # of all but one of the runs, two each
        check_experts_run(tmp_path / "experts", RECIPE, SHAPES, [RECIPE] * 4)


def test_what_runs_take_one_after_another_is_what_each_keeps_and_one_more(tmp_path):
    each, short = checkpoint_bytes(SHAPES, RECIPE), replace(RECIPE, total_steps=1)
    whole, lora = ExpertsSettings(count=3, joint_steps=1), replace(RECIPE, lora_rank=4)
    assert disk_bytes(SHAPES, [RECIPE]) == 3 * each and disk_bytes(SHAPES, [short]) == each
    assert disk_bytes(SHAPES, whole.stages(RECIPE, scaled_linear())) == (1 + 3 * 2 + 1) * each
    assert disk_bytes(SHAPES, whole.stages(RECIPE, scaled_linear(), num_plans=2)) == (2 + 3 * 2 + 1) * each
    assert disk_bytes(SHAPES, whole.stages(lora, scaled_linear())) == each


@pytest.mark.parametrize(("every", "total", "num"), [(1, 6, 6), (4, 6, 2), (6, 6, 1), (4, 12, 4), (4, 13, 5)])
def test_checkpoints_at_validations_count_if_the_best_are_kept(every, total, num):
    """Every sixth step, at each validation, and at the end."""
    recipe = replace(RECIPE, save_every_steps=6, total_steps=total, validation_share=0.25, validate_every_steps=every)
    assert preflight._num_written(replace(recipe, keep_best=1)) == num
    assert preflight._num_written(recipe) == -(-total // 6)


def test_room_is_that_of_the_place_where_the_folder_will_be(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or shutil._ntuple_diskusage(0, 0, 10))
    check_room(tmp_path / "not" / "there", 10, "things", "do")
    with pytest.raises(ValueError, match="^things need at least"):
        check_room(tmp_path / "not" / "there", 11, "things", "do")
    assert asked == [tmp_path] * 2


def test_what_cannot_be_written_is_told_and_nothing_left(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "new" / "deep" / "x.png", tmp_path / "x.png"):
        check_writable(path)
    check_writable(tmp_path / "file", overwrite=True)
    with pytest.raises(ValueError, match="exists already"):
        check_writable(tmp_path / "file")
    with pytest.raises(ValueError, match="is a folder"):
        check_writable(tmp_path, overwrite=True)
    with pytest.raises(WriteError, match="cannot write"):
        check_writable(tmp_path / "file" / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", [["compare", "A", "B", "--out"], ["quickstart", "--out"]], ids=lambda command: command[0])
def test_commands_try_their_output_before_they_work(command, tmp_path, capsys, monkeypatch):
    from distill_core import quickstart
    from distill_core.evaluation import compare

    def late(*_, **__):
        raise AssertionError("too late")

    for module, name in ((compare, "compare"), (quickstart, "Run")):
        monkeypatch.setattr(module, name, late)
    (tmp_path / "file").write_text("")
    assert main([*command, str(tmp_path / "file" / "out.png")]) == 2
    assert "cannot write" in capsys.readouterr().err
