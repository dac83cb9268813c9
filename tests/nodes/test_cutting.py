"""Transformers, cut: of true shape without weights, and small ones that compute."""

import json

import pytest

from distill_core.pruning.plan import all_preset_names, preset

pytestmark = pytest.mark.comfy

PARAMETERS = {
    "Flux.1 dev": 11_901_408_320,
    "Flux.2 dev": 32_223_281_152,
    "Flux.2 klein 9B": 9_078_581_248,
    "Flux.2 klein 4B": 3_875_544_576,
    "Qwen-Image": 20_430_401_088,
    "Z-Image": 6_154_908_736,
    "Lumina 2": 2_609_769_152,
    "Wan 1.3B": 1_418_996_800,
    "Wan 14B": 14_288_491_584,
    "Wan 2.2 5B": 4_999_787_712,
    "HunyuanVideo": 12_821_012_544,
    "LTX-Video 2B": 1_923_385_472,
    "Cosmos-Predict2 2B": 1_956_405_248,
    "Anima": 2_091_068_928,
    "Krea 2": 12_820_073_036,
    "SD3.5 large": 8_056_627_520,
    "SD3.5 medium": 2_243_171_520,
}
STUDENTS = {
    ("Flux.1 dev", "flux-1-lite"): 8_163_264_064,
    ("Flux.1 dev", "flux-mini"): 3_179_199_552,
    ("Qwen-Image", "qwen-image-12b"): 11_934_618_688,
    ("Qwen-Image", "qwen-image-13b"): 13_633_775_168,
}


@pytest.fixture(scope="module")
def told(found):
    return found("cutting.of_true_shape")


def test_every_family_is_recognised_with_its_published_size(told):
    assert not [(name, facts["error"]) for name, facts in told.items() if "error" in facts]
    assert {name: told[name]["parameters"] for name in PARAMETERS} == PARAMETERS


def test_every_student_opens_with_nothing_missing_and_nothing_unexpected(told):
    number = 0
    for name, facts in told.items():
        for text, (_, kind, missing, unexpected, different) in facts["students"].items():
            assert (kind, missing, unexpected, different) == (facts["class"], [], [], []), (name, text)
            number += 1
    assert number >= 100


def test_every_preset_for_transformers_was_tried_on_its_teacher(told):
    assert {text for facts in told.values() for text in facts["students"] if not text.startswith("keep ")} == {
        name for name in all_preset_names() if preset(name).depths
    }


def test_published_students_have_their_published_size(told):
    assert {key: told[key[0]]["students"][key[1]][0] for key in STUDENTS} == STUDENTS


# --- small ones that compute


def test_a_student_computes_as_its_teacher_with_the_blocks_skipped(found):
    told = found("cutting.of_small_networks")
    assert len(told) >= 10
    for family, students in told.items():
        assert {text: far for text, (far, _) in students.items() if far} == {} and len(students) >= 5, family
        assert min(moved for _, moved in students.values()) > 0.1, family  # the blocks that are left out matter


@pytest.fixture(scope="module")
def models(in_comfyui, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    in_comfyui("cutting.of_models", folder)
    return json.loads((folder / "told.json").read_text())


def test_a_model_is_cut_saved_and_opened_by_every_loader_with_the_same_answers(models):
    assert {*models} == {"flux1", "flux1 in fp8", "flux2", "hunyuan", "wan", "wan in fp8", "ltxv", "sd3"}
    for name, told in models.items():
        stock = {} if name == "sd3" else {"stock": 0}
        assert told["far"] == {"student": 0, "ours": 0, **stock} and told["moved"] > 0.1, name
        assert ("Load Distilled Model" in told["note"]) == (name == "sd3"), name
        assert told["file unchanged"] and told["teacher as before"], name


def test_a_students_file_keeps_its_plan_and_can_be_cut_again(models):
    for name, told in models.items():
        family, _, form = name.partition(" in ")
        assert told["facts"]["family"] == family and told["facts"]["prediction"] == "flow" and told["plan back"], name
        assert told["facts"]["quantised"] == bool(form) and told["facts"]["pruned_by"].startswith("keep "), name
        assert {*told["cut again"].values()} == {1} and told["reloaded"], name


# --- LoRAs


def test_a_teachers_lora_in_any_spelling_does_the_same_on_the_student(found):
    told = found("cutting.of_loras")
    assert len(told) >= 20 and {name.split(" ")[0] for name in told} == {"flux1", "flux2", "hunyuan", "wan", "ltxv", "sd3"}
    for name, facts in told.items():
        assert facts["far"] == 0 and facts["moved"] > 0.1 and facts["stock far"] > 0.1, name
        assert facts["kept"] and facts["dropped"] and facts["kept"] + facts["dropped"] == facts["layers"], name


def test_no_key_of_a_lora_reaches_another_block(found):
    told = found("cutting.of_lora_keys")
    assert len(told) >= 10
    for family, counts in told.items():
        ours, as_it_is = counts["remapped"], counts["as it is"]
        assert ours["wrong"] == ours["lost"] == 0 and ours["right"] >= 50 and ours["dropped"] >= 50, family
        assert as_it_is["wrong"] >= 50, family  # as stock ComfyUI would read it
