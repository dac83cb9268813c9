import contextlib
import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_core.evaluation.catalog import measure_presets
from distill_core.networks.architecture import Architecture
from distill_core.networks.layouts import LAYOUTS
from distill_core.networks.name_map import NameMap
from distill_core.networks.residuals import KeptSkips, after, read_kept
from distill_core.pruning.plan import PruningPlan, name_map, preset, preset_names, pruned

from ...students import PUBLISHED, student_of

PUBLISHED_GMACS = {
    "bk-sdm-base": 261.5,
    "bk-sdm-small": 255.4,
    "bk-sdm-tiny": 242.8,
    "segmind-small-sd": 261.5,
    "segmind-tiny-sd": 242.8,
    "ssd-1b": 2103.9,
    "segmind-vega": 1411.2,
    "koala-700m": 1350.8,
    "koala-1b": 1715.9,
}
"""Counted by others on the published models, where they did."""


def test_every_preset_builds_a_network_of_the_published_size():
    rows = measure_presets()
    assert {row["name"]: row["parameters"] for row in rows} == PUBLISHED
    assert {row["name"]: row["gmacs"] for row in rows if row["name"] in PUBLISHED_GMACS} == PUBLISHED_GMACS


def test_every_preset_names_its_source_and_what_it_had_to_choose():
    for plan in map(preset, preset_names()):
        assert "arXiv" in plan.source and plan.title
        assert bool(plan.keep) == bool(plan.choice)


def test_another_choice_of_transformer_blocks(published):
    plan = preset("ssd-1b").with_keep({"down.2.attn.*": (0, 3, 6, 9)})
    mapping = name_map(published["sdxl"], plan)
    assert mapping.rename("down.2.attn.1.block.9") == "down.2.attn.1.block.3"
    assert mapping.rename("down.2.attn.1.block.1") is None
    assert pruned(published["sdxl"], mapping).num_parameters == PUBLISHED["ssd-1b"]
    with pytest.raises(ValueError, match="it thins out down.2.attn"):
        preset("ssd-1b").with_keep({"mid.attn.0": (0,)})


# Written down from BK-SDM's own weight transfer: student's block <- teacher's block.
INHERITED = {
    "bk-sdm-base": {"down.1.resnet.0": "down.1.resnet.0", "up.0.resnet.1": "up.0.resnet.2", "up.3.attn.1": "up.3.attn.2"},
    "bk-sdm-small": {"up.2.resnet.1": "up.2.resnet.2", "down.0.downsample": "down.0.downsample"},
    "bk-sdm-tiny": {"up.0.resnet.0": "up.1.resnet.0", "up.0.attn.1": "up.1.attn.2", "up.1.upsample": "up.2.upsample",
                    "up.2.resnet.1": "up.3.resnet.2", "down.2.attn.0": "down.2.attn.0"},
    "ssd-1b": {"down.2.attn.1.block.3": "down.2.attn.1.block.6", "up.0.attn.2.block.9": "up.0.attn.2.block.9",
               "up.0.resnet.1": "up.0.resnet.1", "up.1.attn.2.block.0": "up.1.attn.2.block.0", "mid.resnet.0": "mid.resnet.0"},
    "koala-1b": {"mid.attn.0.block.5": "mid.attn.0.block.5", "up.0.attn.1.block.5": "up.0.attn.2.block.5",
                 "up.2.resnet.1": "up.2.resnet.2"},
}  # fmt: skip


@pytest.mark.parametrize("name", INHERITED)
def test_blocks_inherit_as_published(name, published):
    mapping = name_map(published[preset(name).teacher], preset(name))
    teacher_of = {student: teacher for teacher, student in mapping.table.items()}
    for student, teacher in INHERITED[name].items():
        assert teacher_of[student] == teacher


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_not_applied_twice(name, published):
    teacher = published[preset(name).teacher]
    student = pruned(teacher, name_map(teacher, preset(name)))
    with pytest.raises(ValueError, match="already pruned"):
        name_map(student, preset(name))


def test_a_preset_for_another_family_is_refused(sd15):
    with pytest.raises(ValueError, match="plan for SDXL.*this one is SD1.x"):
        name_map(sd15, PruningPlan(name="xl", remove=("mid",), teacher="sdxl"))


@pytest.mark.parametrize(
    "remove,message",
    [
        (["down.0.resnet.1", "down.0.attn.1"], r"down.0 keeps 1 resnets and up.3 3"),
        (["down.2.resnet.1", "down.2.attn.1", "up.0.resnet.1"], r"down.2 keeps 1 resnets and up.1 3"),
        (["down.3"], "3 down stages but 4 up stages"),
        (
            ["down.0.resnet.1", "down.0.attn.1", "up.3.resnet.0", "up.3.attn.0"],
            "up.3.resnet.1 was built for 640 input channels but",
        ),
        (["up.1.resnet.1"], "keeps an attention but removes the resnet"),
        (["mid.attn.0.block.0"], "without any transformer block"),
        (["down.7"], "does not have: it is already pruned, or has another shape"),
        (["mide"], "does not have; did you mean 'mid'"),
        (["down.*.resnets.1"], "does not have; did you mean 'resnet'"),
        (["conv_in"], "removes conv_in"),
        (["down.*.resnet.*", "down.*.attn.*"], "every resnet on one side"),
        (["down.0.downsample"], "down.0.downsample is missing, but the stage after it remains"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_with_the_reason(remove, message, sd15):
    with pytest.raises(ValueError, match=message):
        name_map(sd15, PruningPlan(name="bad", remove=tuple(remove)))


def test_plans_travel_as_json():
    plan = PruningPlan(name="mine", remove=("mid", "down.*.resnet.1"), keep={"up.0.attn.*": (0, 2)})
    assert PruningPlan.from_json(plan.to_json()) == plan
    for text in [
        "{",
        "[]",
        '{"name": "x"}',
        '{"name": "x", "remove": []}',
        json.dumps({"name": "x", "remove": ["mid"], "keep": 1}),
        '{"name": "x", "remove": "mid"}',
        '{"name": "x", "remove": ["mid"], "teacher": "sd15"}',
        '{"name": "x", "keep": {"mid.attn.0": []}}',
        '{"name": "x", "keep": {"mid.attn.0": [1, 0]}}',
        '{"name": "x", "keep": {"mid.attn.0": ["0"]}}',
        '{"name": "x", "keep": [0]}',
        '{"name": 3, "remove": ["mid"]}',
    ]:
        with pytest.raises(ValueError):
            PruningPlan.from_json(text)


@pytest.mark.parametrize("remove", ["mid.attn.0", "mid.resnet.0", "mid.resnet.1"])
def test_a_mid_block_that_loaders_would_misread_is_refused(remove, sd15):
    with pytest.raises(ValueError, match="no UNet has"):
        name_map(sd15, PruningPlan(name="p", remove=(remove,)))


def test_a_mid_block_of_one_resnet_is_built(small_teacher, batch):
    student = student_of(small_teacher, PruningPlan(name="p", remove=("mid.attn.0", "mid.resnet.1")))
    with torch.no_grad():
        assert student(*batch).isfinite().all()


choices = st.lists(st.sampled_from(
    ["mid", "mid.attn.0", "down.inner", "up.inner", "down.*.resnet.1", "down.*.attn.1", "up.*.resnet.1", "up.*.attn.1",
     "down.0.attn.*", "up.1.attn.0", "up.2.attn.*", "down.1.resnet.0", "up.3.resnet.0", "up.0.resnet.1"]
), min_size=1, max_size=6, unique=True)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(remove=choices)
def test_any_plan_gives_a_working_network_or_a_reason(remove, sd15):
    """What is accepted is wired through, keeps each teacher weight once, and loses none."""
    try:
        mapping = name_map(sd15, PruningPlan(name="any", remove=tuple(remove)))
    except ValueError as error:
        assert str(error)
        return
    student = pruned(sd15, mapping)
    student.check_wiring()
    assert len(set(mapping.table.values())) == len(mapping.table)
    assert set(mapping.table) | mapping.removed == sd15.blocks
    assert student.blocks == set(mapping.table.values())
    # A loader that knows nothing of the plan reads the same network from either layout.
    for layout in LAYOUTS.values():
        names = layout.from_canonical(student.shapes)
        assert Architecture.from_state_dict({names[n]: shape for n, shape in student.shapes.items()}).shapes == student.shapes


def test_identity_keeps_every_name(sd15):
    mapping = NameMap.identity(sd15)
    assert mapping.apply(sd15.shapes) == sd15.shapes


@pytest.mark.parametrize("keep,message", [({"down.0.resnet.0": (0,)}, "is not an attention"), ({"mid": (0,)}, "removes nothing")])
def test_keep_that_has_no_effect_is_refused(keep, message, sd15):
    with pytest.raises(ValueError, match=message):
        name_map(sd15, PruningPlan(name="p", keep=keep))


@pytest.mark.parametrize(
    "text",
    [
        "garbage",
        "{}",
        "[]",
        "[" * 100_000,
        '{"teacher": "x", "kept": 1, "mid": 1}',
        '{"teacher": 3, "kept": [0, 3], "mid": true}',
        '{"teacher": 3, "kept": [-1, 0], "mid": true}',
        '{"teacher": 3, "kept": [1, 0], "mid": true}',
        '{"teacher": 3, "kept": [0, 0], "mid": true}',
        '{"teacher": 3, "kept": [0.0], "mid": true}',
        '{"teacher": 3, "kept": [false], "mid": true}',
        '{"teacher": 3, "kept": ["0"], "mid": true}',
        '{"teacher": 3.0, "kept": [], "mid": true}',
        '{"teacher": "3", "kept": [], "mid": true}',
        '{"teacher": 3, "kept": [], "mid": 1}',
        '{"teacher": 1e999, "kept": [], "mid": true}',
        '{"teacher": 1000000000000, "kept": [0], "mid": true}',
    ],
)
def test_a_damaged_note_of_skip_connections_is_one_sentence(text):
    with pytest.raises(ValueError, match="metadata on kept residuals") as caught:
        read_kept(text)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(kept=st.sets(st.integers(0, 11)), mid=st.booleans())
def test_a_note_of_skip_connections_is_read_as_it_was_written(kept, mid):
    skips = KeptSkips(12, tuple(sorted(kept)), mid)
    assert read_kept(skips.to_text()) == skips


PLAN = {"name": "p", "remove": ["mid"], "keep": {"down.0.attn.0": [0]}}


@pytest.mark.parametrize(
    "change",
    [
        {"name": None},
        {"name": 3},
        {"name": "x" * 2001},
        {"title": 3},
        {"source": []},
        {"remove": "mid"},
        {"remove": {"mid": 1}},
        {"remove": [3]},
        {"remove": [None]},
        {"remove": ["mid"] * 501},
        {"remove": ["*" * 101]},
        {"keep": []},
        {"keep": {"down.0.attn.0": 3}},
        {"keep": {"down.0.attn.0": "012"}},
        {"keep": {"down.0.attn.0": [True]}},
        {"keep": {"down.0.attn.0": [[0]]}},
        {"teacher": ["sd1"]},
        {"teacher": 3},
        {"unknown": 1},
    ],
)
def test_a_part_of_a_plan_that_is_no_such_thing_is_one_sentence(change):
    assert PruningPlan.from_json(json.dumps(PLAN)).name == "p"
    with pytest.raises(ValueError, match="plan") as caught:
        PruningPlan.from_json(json.dumps(PLAN | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["*" * 100, "*a*b*c*d*e" * 10, "d*w*.*.r*e*n*t.*9", "*e" * 50, ".*" * 50, "down.*.resnet.1"])
def test_no_pattern_takes_long(pattern, published):
    began = time.monotonic()
    with contextlib.suppress(ValueError):
        name_map(published["sdxl"], PruningPlan(name="p", remove=("down.1.resnet.1",) + (pattern,) * 499))
    assert time.monotonic() - began < 3


def test_skip_connections_are_kept_through_two_prunings(sd15):
    first = name_map(sd15, preset("bk-sdm-base"))
    student = pruned(sd15, first)
    second = name_map(student, PruningPlan(name="p", remove=("down.inner", "up.inner", "mid")))
    skips = sd15.kept_residuals(first.rename).after(student.kept_residuals(second.rename))
    assert (skips.num_teacher, skips.kept, skips.mid) == (12, (0, 1, 3, 4, 6, 7), False)
    assert skips == read_kept(skips.to_text())
    assert skips.select("abcdefghijkl") == ["a", "b", "d", "e", "g", "h"]
    with pytest.raises(ValueError, match="12 residuals"):
        skips.select("abc")


@pytest.mark.parametrize(
    "text",
    [
        '{"lists": {"input": {"teacher": 3, "kept": [0]}}}',
        '{"teacher": 12, "kept": [0], "mid": true}',
    ],
)
def test_a_note_of_skip_connections_of_another_network_is_refused(text, sd15):
    own = sd15.kept_residuals(name_map(sd15, preset("bk-sdm-base")).rename)
    with pytest.raises(ValueError, match="metadata on kept residuals is damaged"):
        after(read_kept(text), own)
    assert after(None, own) == own
