"""Benchmark Presets in ComfyUI: SD1.5's true shapes, small images."""

import json

import pytest
from PIL import Image

pytestmark = pytest.mark.slow
SETTINGS = {"family": "sd1", "preset": "bk-sdm-tiny", "size_px": 64, "batch_size": 1, "num_rounds": 1, "train": False,
            "dtype": "automatic", "filename_prefix": "measured/here"}  # fmt: skip


def graph(**changes):
    return {"bench": {"class_type": "DistillBenchmarkPresets", "inputs": SETTINGS | changes}}


@pytest.fixture(scope="module")
def measured(server):
    return server.run(graph())


def test_figures_and_picture_are_written_with_the_name_of_the_device(server, measured):
    assert measured.succeeded and measured.outputs["bench"]["images"]
    (written,) = (server.output / "measured").glob("here_*.json")
    figures = json.loads(written.read_text("utf-8"))
    full, tiny = figures["rows"]
    assert (full["parameters"], tiny["parameters"]) == (859_520_964, 323_384_964)
    assert full["sampling_bytes"] > 4 * full["parameters"] and full["training"] is tiny["training"] is None
    assert figures["settings"]["device"].startswith("CPU") and figures["settings"]["images"].startswith("64 x 64 px, 1 at once")
    with Image.open(written.with_suffix(".png")) as image:
        assert image.width > 600


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"family": "sdxl"}, "bk-sdm-tiny is a preset for sd1, not for sdxl"),
        ({"filename_prefix": "../out"}, "leads out of the output folder"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_measured(server, changes, message):
    assert message in server.run(graph(**changes)).error
