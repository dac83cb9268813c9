"""Transformers of true shape, cut: what stock ComfyUI makes of them, without weights."""

import pytest

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
}
STUDENTS = {
    ("Flux.1 dev", "flux-1-lite"): 8_163_264_064,
    ("Flux.1 dev", "flux-mini"): 3_179_199_552,
    ("Qwen-Image", "qwen-image-12b"): 11_934_618_688,
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


def test_published_students_have_their_published_size(told):
    assert {key: told[key[0]]["students"][key[1]][0] for key in STUDENTS} == STUDENTS
