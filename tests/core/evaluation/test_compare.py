import json
from dataclasses import replace

import pytest
import torch

from distill_core.base.image_grid import image_rows
from distill_core.cli import main
from distill_core.diffusion.macs import count_macs
from distill_core.evaluation import compare as comparing
from distill_core.evaluation.compare import NUM_BINS, Judged, Settings, compare, work, write_report
from distill_core.evaluation.comparison import COLUMNS, UNEVEN, Comparison, Measured, table_text
from distill_core.evaluation.measuring import in_rounds, watched_memory
from distill_core.evaluation.metrics import clip_score, feature_distances, frechet_distance, mean_cosine_distance
from distill_core.evaluation.trial import random_data
from distill_core.networks.files import open_unet, save_unet
from distill_core.pruning.plan import name_map, preset

pytestmark = pytest.mark.slow

TINY = Settings(size_px=(64, 64), num_tokens=5, num_rounds=2, num_examples=2)


@pytest.fixture(scope="module")
def files(small_teacher, tmp_path_factory):
    """A teacher, itself once more, and a student of it."""
    folder = tmp_path_factory.mktemp("compared")
    save_unet(folder / "teacher.safetensors", small_teacher.named_parameters(), small_teacher.architecture)
    main(["prune", str(folder / "teacher.safetensors"), str(folder / "small.safetensors"), "--preset", "bk-sdm-small"])
    teacher = open_unet(folder / "teacher.safetensors")
    return {"teacher": teacher, "again": teacher, "small": open_unet(folder / "small.safetensors")}


@pytest.fixture(scope="module")
def comparison(files):
    return compare(files, TINY)


def test_a_model_is_at_no_distance_from_itself_and_a_student_at_some(comparison):
    teacher, again, small = comparison.models
    assert teacher.distances == again.distances == (0.0,) * NUM_BINS
    assert len(small.distances) == NUM_BINS and min(small.distances) > 0
    assert comparison.rows()[0][-1] == "reference" and comparison.rows()[1][-1] == "0"


def test_parameters_macs_and_sizes_are_those_of_the_networks(comparison, files, small_teacher):
    teacher, again, small = comparison.models
    mapping = name_map(small_teacher.architecture, preset("bk-sdm-small"))
    kept = sum(weight.numel() for weight in mapping.apply(dict(small_teacher.named_parameters())).values())
    assert teacher.parameters == sum(p.numel() for p in small_teacher.network.parameters()) and small.parameters == kept
    assert teacher.weight_bytes == 4 * teacher.parameters  # fp32
    assert teacher.gmacs * 1e9 == count_macs(small_teacher, (4, 8, 8), 5) > small.gmacs * 1e9
    assert 4 * teacher.parameters < teacher.peak_bytes < 12 * teacher.parameters
    assert teacher.peak_bytes == again.peak_bytes > small.peak_bytes and small.ms_per_step > 0


def test_figures_depend_on_the_seed_and_nothing_else(files, comparison):
    two = {name: files[name] for name in ("teacher", "small")}
    assert compare(two, TINY).models[1].distances == comparison.models[2].distances
    other = compare(two, Settings(**{**vars(TINY), "seed": 1})).models[1]
    assert other.distances != comparison.models[2].distances


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_rounds": 0}, "num_rounds must be between 1 and 10,000, got 0"),
        ({"num_examples": 10**9}, "num_examples must be between 1 and 4,096, got 1,000,000,000"),
        ({"num_tokens": True}, "num_tokens must be a whole number, got True"),
        ({"size_px": (64, 64 * 10**6)}, "size_px must be between 64 and 16,384, got 64,000,000"),
        ({"size_px": (64, 72)}, "multiples of 64 pixels, got 64 x 72"),
        ({"dtype": "fp8"}, "dtype: unknown 'fp8'; choose from fp32, bf16, fp16"),
    ],
)
def test_settings_that_measure_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


def test_the_progress_bar_ends_full(files):
    done = []
    compare(files, TINY, lambda: done.append(1))
    assert len(done) == work(len(files), TINY)


def test_models_are_timed_in_turn():
    """A machine that slows down slows all of them, so that the medians keep their ratio."""
    order, clock = [], [1.0]

    def timed(name, cost):
        def one():
            order.append(name)
            clock[0] *= 1.01
            return cost * clock[0]

        return one

    small, large = in_rounds([timed("small", 1.0), timed("large", 2.0)], 5)
    assert order == ["small", "large"] * 5 and large / small == pytest.approx(2.0, rel=0.02)


def test_memory_is_the_most_there_was_at_once():
    with watched_memory(torch.device("cpu")) as peak:
        first = torch.zeros(1000)
        del first
        second, third = torch.zeros(500), torch.zeros(700)
        del second, third
    assert peak.num_bytes == 4 * 1200


def test_xl_models_are_told_sizes(small_xl_teacher, tmp_path):
    save_unet(tmp_path / "xl.safetensors", small_xl_teacher.named_parameters(), small_xl_teacher.architecture)
    file = open_unet(tmp_path / "xl.safetensors")
    examples = random_data(file.architecture, 2, TINY.size_px, TINY.num_tokens, TINY.seed).read(0, torch.arange(2))
    assert examples.label.pooled.shape == (2, 8) and examples.label.sizes[0].tolist() == [64, 64, 0, 0, 64, 64]
    assert compare({"a": file, "b": file}, TINY).models[1].mean_distance == 0


def test_models_of_other_families_and_single_ones_are_refused(files, small_xl_teacher, tmp_path):
    save_unet(tmp_path / "xl.safetensors", small_xl_teacher.named_parameters(), small_xl_teacher.architecture)
    with pytest.raises(ValueError, match="xl cannot be compared with teacher.*compare models of one family"):
        compare({"teacher": files["teacher"], "xl": open_unet(tmp_path / "xl.safetensors")}, TINY)
    with pytest.raises(ValueError, match="at least two models, got 1"):
        compare({"teacher": files["teacher"]}, TINY)


# --- what people look at


def test_tables_line_up():
    assert table_text(("model", "n"), [["a", "1,000"], ["longer", "2"]]).splitlines() == [
        "model       n",
        "a       1,000",
        "longer      2",
    ]


def test_images_keep_their_pixels_and_their_places():
    rows = {"teacher": torch.full((2, 3, 200, 200), 1.0), "student": torch.full((2, 3, 200, 200), -1.0)}
    sheet = image_rows(rows, ["seed 0", "seed 1"])
    assert sheet.width >= 400 and sheet.height >= 400
    reds = [sheet.getpixel((100, y))[0] for y in range(sheet.height)]
    assert reds.count(0) >= 200 and reds[-1] == 255


@pytest.fixture
def drawn():
    measured = [
        Measured(name=name, parameters=number, weight_bytes=2 * number, gmacs=1.0, ms_of_rounds=(2.0,), peak_bytes=number,
                 distances=distances)
        for name, number, distances in (("<b>teacher</b>", 10, (0.0, 0.0)), ("it's & \"more\"", 5, None))
    ]  # fmt: skip
    pictures = {model.name: torch.zeros(2, 3, 16, 16) for model in measured}
    return Comparison(models=tuple(measured), settings={"<i>": "</ul>"}, images=pictures, seeds=["<s>0</s>", "1"])


def test_a_report_is_one_file_whose_texts_are_escaped(drawn, tmp_path):
    judged = [Judged(name="<script>", frechet_distance=1.25, clip_score=31.5)]
    image = write_report(
        tmp_path / "r.html", drawn, title="</title><script>", judged=judged, judged_by={"by": "<img src=x>"}, losses=None
    )
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "<b>teacher</b>" not in page and "&lt;b&gt;teacher&lt;/b&gt;" in page
    assert "<script" not in page and "src=x>" not in page and "<i>" not in page and "http" not in page
    assert (
        'href="r_votes.html"' in page
        and page.count("data:image/") == 2
        and "31.50" in page
        and "(50%)" in page
        and image.width > 500
    )
    with pytest.raises(ValueError, match="exists already"):
        write_report(tmp_path / "r.html", drawn, title="again")


def test_figures_are_short_and_names_are_no_formulas():
    sizes = {"parameters": 2_567_463_684, "weight_bytes": 4_897 * 2**20, "gmacs": 6_012.4, "ms_of_rounds": (12_345.6,)}
    large = Measured(name=r"$\frac$", peak_bytes=6_000 * 2**20, distances=(0.0,) * 10, **sizes)
    comparison = Comparison(models=(large, large), settings={})
    assert comparison.rows()[0] == [large.name, "2,567,463,684", "6,012", "12,346", "6,000", "4,897", "reference"]
    assert comparing.chart(comparison).height > 400


@pytest.mark.parametrize(
    "of_small,said",
    [
        ((6.0, 6.2, 6.6), "takes 62% of its time per step (60% to 66% in 3 rounds)."),
        ((1.1, 6.2, 6.6), "takes 62% of its time per step (11% to 66% in 3 rounds). The times vary too much"),
        ((6.0,), "takes 60% of its time per step."),
    ],
)
def test_the_spread_of_the_times_is_told_and_a_wide_one_warned_of(of_small, said):
    sizes = {"weight_bytes": 1, "gmacs": 1.0, "peak_bytes": 1, "distances": None}
    large = Measured(name="large", parameters=10, ms_of_rounds=(10.0,) * len(of_small), **sizes)
    small = Measured(name="small", parameters=5, ms_of_rounds=of_small, **sizes)
    comparison = Comparison(models=(large, small), settings={})
    assert comparison.summary().startswith(f"small has 50% of the parameters of large and {said}")
    assert (UNEVEN in comparison.summary()) == ("vary too much" in said)
    assert comparison.facts()["models"][1]["ms_per_step"] == sorted(of_small)[len(of_small) // 2]


def test_what_was_not_measured_is_left_out(drawn):
    assert drawn.rows()[1][-1] == "none" and drawn.facts()["models"][1]["mean_distance"] is None
    told = {"model": "a", "Fréchet distance": "reference", "kernel distance": "reference"}
    assert Judged(name="a").cells() == told and Judged(name="a", clip_score=1.0).cells() == told | {"CLIP score": "1.00"}
    assert "s per image" not in drawn.columns and "s per image" not in drawn.meanings


def test_the_time_of_an_image_is_that_of_its_steps_and_the_device_is_named(drawn, tmp_path):
    sampled = [replace(model, steps_per_image=20 / 4) for model in drawn.models]  # 20 steps of batches of 4
    comparison = replace(drawn, models=tuple(sampled), settings={"device": "a card"})
    assert [dict(zip(comparison.columns, row, strict=True))["s per image"] for row in comparison.rows()] == [
        "0.01",
        "0.01 (100%)",
    ]
    assert comparison.facts()["models"][0]["seconds_per_image"] == pytest.approx(0.01)
    write_report(tmp_path / "r.html", comparison, title="t")
    assert "<h2>Figures on a card</h2>" in (tmp_path / "r.html").read_text("utf-8")


# --- distances between pictures


def test_feature_distances_are_ours_and_zero_for_more_of_the_same():
    pytest.importorskip("torchmetrics")
    random = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(n, 12, generator=random) for n in (300, 400, 400))
    frechet, kernel = feature_distances(a, b + 0.5)
    assert frechet == pytest.approx(frechet_distance(a, b + 0.5), rel=1e-3)
    assert feature_distances(a, b + 0.5) == (frechet, kernel)
    assert abs(feature_distances(b, c)[1]) < 0.02 < kernel
    # By hand: mean over pairs of (x.y / d + 1)^3, pairs of a row with itself left out (Bińkowski et al. 2018, Eq. 4).
    x, y = a[:40], b[:40] + 0.5
    xx, yy, xy = ((p @ q.T / 12 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    expected = sum((m.sum() - m.trace()) / (40 * 39) for m in (xx, yy)) - 2 * xy.mean()
    assert feature_distances(x, y)[1] == pytest.approx(expected.item(), rel=1e-3)


def test_feature_distances_say_what_they_need(monkeypatch):
    with pytest.raises(ValueError, match="at least 2 images on each side, got 1 and 3"):
        feature_distances(torch.zeros(1, 4), torch.zeros(3, 4))
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match="python -m pip install torchmetrics"):
        feature_distances(torch.zeros(3, 4), torch.zeros(3, 4))


def test_diversity_is_the_mean_over_all_pairs():
    rows = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-5.0, 0.0]])
    assert mean_cosine_distance(rows) == pytest.approx((1 + 2 + 1) / 3) and mean_cosine_distance(rows[:1].repeat(4, 1)) == 0
    alike = torch.randn(1, 77, generator=torch.Generator().manual_seed(0)).repeat(7, 1)
    assert 0 <= mean_cosine_distance(alike) < 1e-12
    with pytest.raises(ValueError, match="at least 2 images"):
        mean_cosine_distance(rows[:1])


def test_clip_score_is_the_mean_cosine_above_zero():
    text = torch.tensor([3.0, 0.0])
    assert clip_score(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-5.0, 0.0]]), text) == pytest.approx(100 / 3)


# --- the command


@pytest.fixture
def compared(files):
    return [str(files[name].path) for name in ("teacher", "small")]


QUICK = ["--size", "64", "--rounds", "1", "--examples", "1"]


def test_the_command_prints_a_table_and_draws_a_picture(compared, tmp_path, capsys):
    out = tmp_path / "c.png"
    assert main(["compare", *compared, *QUICK, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("model") and all(name.split()[0] in told for name in COLUMNS) and "900-999" in told
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert main(["compare", *compared, *QUICK, "--out", str(out), "--overwrite", "--names", "big, little", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in facts["models"]] == ["big", "little"] and len(facts["models"][1]["distances"]) == NUM_BINS
    assert facts["settings"]["device"] and facts["image"] == str(out)


@pytest.mark.parametrize(
    "more,message",
    [
        (["--names", "one"], "one unique name per model (2), got 'one'; or leave it empty"),
        (["--names", "one, one"], "one unique name per model (2), got 'one, one'"),
        (["--names", "one, two, one"], "one unique name per model (2)"),
        (["--names", "one,"], "one unique name per model (2)"),
        (["--out", "{teacher}"], "exists already; choose another name, or add --overwrite"),
        (["nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["{teacher}"], "a file is given twice"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(more, message, compared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparing, "compare", None)
    out = [] if "--out" in more else ["--out", str(tmp_path / "c.png")]
    assert main(["compare", *compared, *[m.format(teacher=compared[0]) for m in more], *out]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_an_interrupted_one_leaves_nothing(compared, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "compare", interrupt)
    assert main(["compare", *compared, "--out", str(tmp_path / "c.png")]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_side_is_a_multiple_of_64():
    with pytest.raises(SystemExit) as caught:
        main(["compare", "a", "b", "--size", "100"])
    assert caught.value.code == 2
