"""Compare Models and Distillation Report on the demo, in ComfyUI."""

import html
import re
import time

import numpy as np
import pytest
from PIL import Image

from distill_core.demo.teacher import teacher_file
from distill_core.pruning.plan import name_map, preset, pruned

from .graphs import PROMPT, train

COMPARE = {
    "models.model_1": ["teacher", 0], "models.model_2": ["prune", 0], "positive": ["prompt", 0], "negative": ["empty", 0],
    "latent_image": ["one", 0], "vae": ["teacher", 2], "names": "teacher, <b>pruned</b>", "num_seeds": 2, "seed": 5, "steps": 4,
    "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "cfg_of_each": "",
}  # fmt: skip
REPORT = {
    "comparison": ["compare", 2],
    "title": "<script>alert(1)</script>",
    "filename_prefix": "reports/r",
    "run_name": "",
    "prompt": "",
}


def graph(compare=(), report=(), without=()):
    inputs = {name: value for name, value in (COMPARE | dict(compare)).items() if name not in without}
    return {
        **PROMPT,
        "one": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "compare": {"class_type": "DistillCompareModels", "inputs": inputs},
        "report": {"class_type": "DistillReport", "inputs": REPORT | dict(report)},
        "show": {"class_type": "SaveImage", "inputs": {"images": ["compare", 0], "filename_prefix": "grid"}},
    }


def written(server):
    return sorted(path for path in server.output.rglob("*.html") if not path.stem.endswith("_votes"))


@pytest.fixture(scope="module")
def told(found):
    return found("comparing.demo")


def model(told, name):
    return next(row for row in told["models"] if row["name"] == name)


def test_figures_are_those_of_the_networks(told):
    architecture = teacher_file().architecture
    student = pruned(architecture, name_map(architecture, preset("bk-sdm-base")))
    assert model(told, "teacher")["parameters"] == architecture.num_parameters
    assert model(told, "student")["parameters"] == student.num_parameters
    assert model(told, "routed")["parameters"] == architecture.num_parameters + student.num_parameters
    assert model(told, "teacher")["weight_bytes"] == 4 * architecture.num_parameters
    # What docs/results.md says of the quickstart, which counts on a network of diffusers.
    assert (round(model(told, "teacher")["gmacs"], 4), round(model(told, "student")["gmacs"], 4)) == (0.0846, 0.0535)
    assert model(told, "student")["gmacs"] < model(told, "routed")["gmacs"] < model(told, "teacher")["gmacs"]
    assert all(row["peak_bytes"] > row["weight_bytes"] and row["ms_per_step"] > 0 for row in told["models"])


def test_distances_are_zero_to_itself_and_a_known_shift_squared(told):
    assert told["itself"] and model(told, "again")["distances"] == [0.0] * 10
    assert model(told, "shifted")["distances"] == pytest.approx([0.01] * 10, rel=1e-3)
    assert min(model(told, "student")["distances"]) > 1e-4 and model(told, "routed")["mean_distance"] > 0


def test_images_are_those_of_ksampler_and_models_stay(told):
    assert told["untouched"] and told["of KSampler"] < 2e-3  # kept in 16 bits
    assert told["seeds"] == ["seed 3 #1", "seed 3 #2", "seed 4 #1", "seed 4 #2"] and told["shape"] == [4, 3, 64, 64]
    assert told["settings"]["cfg"].endswith("routed: 1") and told["settings"]["seeds"] == "3 to 4"


def test_models_that_share_no_latents_are_refused(found):
    other, sound, frames = found("comparing.refusals")
    assert other.startswith("other does not go with teacher: their latents differ (Wan21 and DemoLatentFormat)")
    assert sound.startswith("sound (BaseModel) is not an image model")
    assert frames.startswith("the latents have 5 frames; only single images can be compared")


def test_images_are_judged_by_the_clip_models_there_are(found):
    pytest.importorskip("torchmetrics")
    told = found("comparing.judging")
    teacher, same, dark = told["teacher's"]
    assert teacher["frechet_distance"] is None and teacher["clip_score"] is None
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-3) and same["kernel_distance"] < 1e-3
    assert dark["frechet_distance"] > 10 * abs(same["frechet_distance"]) and dark["kernel_distance"] > 1e-3
    assert all(one["frechet_distance"] is not None for one in told["real"])
    assert len(told["fits"]) == 3 and all(0 <= score <= 100 for score in told["fits"])
    assert all("came without CLIP's projection" in told[name] for name in ("empty", "one", "unprojected", "of SD1.x", "demo"))
    assert "embeds texts in 32 dimensions but clip_vision embeds images in 24" in told["wide"]


# --- in a graph


def test_a_graph_shows_rows_of_models_and_writes_a_report(server):
    result = server.run(graph())
    assert result.succeeded, result.error
    with Image.open(server.output / result.outputs["show"]["images"][0]["filename"]) as opened:
        grid = np.asarray(opened.convert("L"))
    assert grid.shape[1] >= 2 * 192 and all((part < 250).mean() > 0.2 for part in (grid[:200], grid[-150:]))  # not bare paper
    (path,) = written(server)
    page = path.read_text("utf-8")
    assert path.parent == server.output / "reports" and "3,187,716" in page and "2,142,788 (67%)" in page
    assert "<script" not in page and "<b>pruned</b>" not in page and html.escape("<b>pruned</b>") in page
    assert re.findall(r'(?:src|href)="(?!data:)([^"]*)"', page) == [(votes := path.with_name("r_00001_votes.html")).name]
    assert votes.is_file() and "s per image" in page and "<b>pruned</b>" not in votes.read_text("utf-8")
    assert server.run(graph()).succeeded and written(server) == [path]  # from the cache


def test_the_report_shows_the_losses_of_a_run_and_sees_when_it_goes_on(server):
    run = {"run": {"class_type": "DistillTrainStep", "inputs": train("reported")["inputs"]}}
    assert server.run({**PROMPT, **run, "step": {"class_type": "PreviewAny", "inputs": {"source": ["run", 3]}}}).succeeded
    before = written(server)
    prompt = graph(report={"run_name": "reported", "filename_prefix": "reports/losses"})
    assert server.run(prompt).succeeded
    (path,) = set(written(server)) - {*before}
    assert "Loss of every step" in path.read_text("utf-8")
    metrics = server.output / "distill_runs" / "reported" / "metrics.csv"
    metrics.touch()
    assert server.run(prompt).succeeded and len(written(server)) == len(before) + 2
    assert server.run(prompt).succeeded and len(written(server)) == len(before) + 2  # from the cache
    # Of a name that another node gives, it is not known beforehand whether its run has gone on.
    prompt["name"] = {"class_type": "PrimitiveString", "inputs": {"value": "reported"}}
    prompt["report"]["inputs"]["run_name"] = ["name", 0]
    for more in (3, 4):
        assert server.run(prompt).succeeded and len(written(server)) == len(before) + more


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"compare": {"names": "one"}}, "names: give one unique name per model (2), got 'one'"),
        ({"compare": {"names": "one, one"}}, "names: give one unique name per model (2)"),
        ({"compare": {"names": "one, two, one"}}, "names: give one unique name per model (2)"),
        ({"compare": {"cfg_of_each": "7.5"}}, "cfg_of_each: give one number from 0 to 100 per model (2), got '7.5'"),
        ({"compare": {"cfg_of_each": "7.5, nan"}}, "cfg_of_each: give one number"),
        ({"report": {"filename_prefix": "../../evil"}}, "leads out of the output folder"),
        ({"report": {"run_name": "../../etc"}}, "run_name '../../etc' must be a plain name"),
        ({"report": {"run_name": "never"}}, "no run of that name has losses"),
        ({"report": {"clip": ["teacher", 1]}}, "connect clip_vision, or disconnect clip"),
        ({"report": {"real_images": ["compare", 0]}}, "connect clip_vision"),
    ],
)
def test_what_cannot_be_done_is_told(changes, message, server):
    before = sorted(server.base.parent.rglob("*.html"))
    result = server.run(graph(**changes))
    assert not result.succeeded and message in result.error
    assert sorted(server.base.parent.rglob("*.html")) == before


def test_cancel_ends_a_comparison_at_once(server):
    prompt_id = server.queue(graph(compare={"num_seeds": 2000, "steps": 20}))
    time.sleep(4)
    server.post("interrupt", {})
    assert server.wait(prompt_id, timeout_s=60).interrupted
