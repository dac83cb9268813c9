import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_core.architecture import Architecture
from distill_core.catalog import measure_presets
from distill_core.denoiser import DiffusersDenoiser
from distill_core.layouts import LAYOUTS
from distill_core.plan import NameMap, PruningPlan, name_map, preset, preset_names, pruned
from distill_core.unet import build_unet

PUBLISHED = {"bk-sdm-base": 579_384_964, "bk-sdm-small": 482_346_884, "bk-sdm-tiny": 323_384_964}


def student_of(teacher: DiffusersDenoiser, plan: PruningPlan) -> DiffusersDenoiser:
    mapping = name_map(teacher.architecture, plan)
    architecture = pruned(teacher.architecture, mapping)
    student = DiffusersDenoiser(network=build_unet(architecture).eval(), architecture=architecture)
    student.load_state_dict({n: w.detach() for n, w in mapping.apply(teacher.named_parameters()).items()})
    return student


def test_every_preset_builds_a_network_of_the_published_size():
    rows = measure_presets()
    assert {row["name"]: row["parameters"] for row in rows} == PUBLISHED
    assert {row["name"]: row["gmacs"] for row in rows} == {"bk-sdm-base": 261.5, "bk-sdm-small": 255.4, "bk-sdm-tiny": 242.8}


def test_every_preset_names_its_source():
    assert all("arXiv" in preset(name).source and preset(name).title for name in preset_names())


# Written down from BK-SDM's own weight transfer: student's block <- teacher's block.
INHERITED = {
    "bk-sdm-base": {"down.1.resnet.0": "down.1.resnet.0", "up.0.resnet.1": "up.0.resnet.2", "up.3.attn.1": "up.3.attn.2"},
    "bk-sdm-small": {"up.2.resnet.1": "up.2.resnet.2", "down.0.downsample": "down.0.downsample"},
    "bk-sdm-tiny": {"up.0.resnet.0": "up.1.resnet.0", "up.0.attn.1": "up.1.attn.2", "up.1.upsample": "up.2.upsample",
                    "up.2.resnet.1": "up.3.resnet.2", "down.2.attn.0": "down.2.attn.0"},
}  # fmt: skip


@pytest.mark.parametrize("name", preset_names())
def test_blocks_inherit_as_published(name, sd15):
    mapping = name_map(sd15, preset(name))
    teacher_of = {student: teacher for teacher, student in mapping.table.items()}
    for student, teacher in INHERITED[name].items():
        assert teacher_of[student] == teacher


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_not_applied_twice(name, sd15):
    student = pruned(sd15, name_map(sd15, preset(name)))
    for other in preset_names():
        with pytest.raises(ValueError, match="pruned already"):
            name_map(student, preset(other))


def test_a_preset_for_another_family_is_refused(sd15):
    with pytest.raises(ValueError, match="plan for SDXL.*this one is SD1.x"):
        name_map(sd15, PruningPlan(name="xl", remove=("mid",), teacher="sdxl"))


@pytest.mark.parametrize(
    "remove,message",
    [
        (["down.0.resnet.1", "down.0.attn.1"], r"skip|input channels"),
        (["up.1.resnet.1"], "keeps an attention of which it removes the resnet"),
        (["mid.attn.0.block.0"], "without any transformer block"),
        (["down.7"], "does not have"),
        (["conv_in"], "removes conv_in"),
        (["down.*.resnet.*", "down.*.attn.*"], "every resnet on one side"),
        (["down.0.downsample"], "input channels|received|skip"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_with_the_reason(remove, message, sd15):
    with pytest.raises(ValueError, match=message):
        name_map(sd15, PruningPlan(name="bad", remove=tuple(remove)))


def test_plans_travel_as_json():
    plan = PruningPlan(name="mine", remove=("mid", "down.*.resnet.1"))
    assert PruningPlan.from_json(plan.to_json()) == plan
    for text in [
        "{",
        "[]",
        '{"name": "x"}',
        '{"name": "x", "remove": []}',
        json.dumps({"name": "x", "remove": ["mid"], "keep": 1}),
        '{"name": "x", "remove": "mid"}',
        '{"name": "x", "remove": ["mid"], "teacher": "sd15"}',
    ]:
        with pytest.raises(ValueError):
            PruningPlan.from_json(text)


@pytest.mark.parametrize("remove,skipped", [(("mid",), "mid"), (("up.2.attn.*",), "up.2.attn"),
                                            (("down.0.attn.*", "up.3.attn.*"), "down.0.attn up.3.attn")])  # fmt: skip
def test_pruned_equals_the_teacher_with_those_blocks_skipped(remove, skipped, small_teacher, batch):
    """Blocks that put out what came in when skipped: attentions, and the mid block."""
    student = student_of(small_teacher, PruningPlan(name="p", remove=remove))

    def is_skipped(name):
        return any(name == s or name.startswith(f"{s}.") for s in skipped.split()) and name.count(".") in (2, 3)

    def pass_through(module, inputs, output):
        return (inputs[0],) if isinstance(output, tuple) else inputs[0]

    modules = [m for m in small_teacher.architecture.modules if is_skipped(m)]
    handles = [small_teacher.module(name).register_forward_hook(pass_through) for name in modules]
    try:
        assert modules
        with torch.no_grad():
            torch.testing.assert_close(student(*batch), small_teacher(*batch), rtol=1e-5, atol=1e-5)
    finally:
        for handle in handles:
            handle.remove()


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


def test_core_never_imports_comfy_or_a_node():
    core = Path(__file__).parents[2] / "distill_core"
    for file in core.rglob("*.py"):
        lines = [line.split() for line in file.read_text().splitlines()]
        imports = [words[1] for words in lines if len(words) > 1 and words[0] in ("import", "from")]
        assert not [
            name for name in imports if name.split(".")[0] in ("comfy", "comfy_api", "nodes", "folder_paths", "distill_core")
        ], file
