"""`distill bench`: true shapes, random weights; here the shapes of a small model."""

import json

import pytest
import torch

from distill_core.cli import main
from distill_core.evaluation import bench as benches
from distill_core.evaluation.bench import TEACHER, Bench, Settings, bench, quick, work
from distill_core.pruning.plan import name_map, preset, preset_names, pruned

pytestmark = pytest.mark.slow
QUICK = dict(presets=("bk-sdm-base", "bk-sdm-tiny"), size_px=64, num_rounds=2)


@pytest.fixture
def small(small_teacher, monkeypatch):
    """A small model stands for the full ones."""
    monkeypatch.setattr(benches, "published_teacher", lambda family: small_teacher.architecture)
    return small_teacher.architecture


def test_every_preset_is_measured_beside_the_full_model(small):
    counts = []
    settings = Settings(**QUICK)
    measured = bench(settings, lambda what, count: counts.append(count))
    assert sum(counts) == work(settings) == 12
    full, base, tiny = measured.rows
    assert full.name == TEACHER and full.training is None and full.time_of_full == 1
    for row in (base, tiny):
        assert row.parameters == pruned(small, name_map(small, preset(row.name))).num_parameters
        assert row.seconds_per_image == pytest.approx(row.ms_per_step / 1000 * 25)
        assert row.sampling_bytes > 4 * row.parameters
        assert row.training.steps_per_second > 0 and row.training.hours == pytest.approx(
            10_000 / row.training.steps_per_second / 3600
        )
    assert full.gmacs > base.gmacs > tiny.gmacs > 0
    assert full.sampling_bytes > base.sampling_bytes > tiny.sampling_bytes
    assert all(len(cells) == len(measured.columns) == 9 for cells in measured.cells())
    assert {*measured.meanings} <= {*measured.columns}


def test_the_peak_of_training_is_near_its_forecast(small):
    (_, row) = bench(Settings(**QUICK | {"presets": ("bk-sdm-base",)})).rows
    assert row.training.peak_bytes == pytest.approx(row.training.forecast_bytes, rel=0.25)


def test_training_that_does_not_fit_is_left_out_with_the_reason(small, monkeypatch):
    monkeypatch.setattr(benches, "free_bytes", lambda device: 1 << 20)
    counts, settings = [], Settings(**QUICK | {"presets": ("bk-sdm-base",)})
    (_, row) = bench(settings, lambda what, count: counts.append(count)).rows
    assert sum(counts) == work(settings)
    assert row.training.peak_bytes is None and row.training.steps_per_second is None and row.training.hours is None
    assert row.training.left_out == "only 0.02 GiB free" and "no room" in Bench(rows=(row,), settings={}).cells()[0]


def test_training_can_be_left_out(small):
    settings = Settings(**QUICK | {"train": False})
    measured = bench(settings)
    assert work(settings) == 6 and all(row.training is None for row in measured.rows)
    assert all(len(cells) == len(measured.columns) == 6 for cells in measured.cells())
    assert [*measured.meanings] == ["ms per step", "sampling"]


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"family": "flux"}, "family: unknown 'flux'; choose from"),
        ({"presets": ("ssd-1b",)}, "ssd-1b is a preset for sdxl, not for sd1"),
        ({"size_px": 100}, "size_px must be a multiple of 64"),
        ({"num_rounds": 0}, "num_rounds must be between 1 and 10,000"),
        ({"dtype": "fp8"}, "dtype: unknown 'fp8'; choose from fp32, bf16, fp16"),
    ],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_all_presets_of_a_family_are_measured_unless_some_are_asked_for():
    assert Settings(family="sdxl").chosen == tuple(preset_names("sdxl"))
    assert Settings(family="sdxl").latent_shape == (4, 128, 128) and Settings(size_px=256).latent_shape == (4, 32, 32)
    few = quick(Settings())
    assert few.presets == ("bk-sdm-tiny",) and few.num_rounds == 2
    if not torch.cuda.is_available():
        assert few.size_px == 128


def test_the_command_writes_a_picture_and_json(small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "bench.png"
    command = ["bench", "--quick", "--size", "64", "--out", str(out)]
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in facts["rows"]] == [TEACHER, "bk-sdm-tiny"]
    assert facts["settings"]["device"] and facts["rows"][1]["training"]["hours"] > 0 and out.exists()
    assert main(command) == 2 and "exists already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert "ms per step" in capsys.readouterr().out
