"""A ControlNet made for the teacher, on its student, in ComfyUI's own sampler."""

import json

import pytest

from distill_core.demo.teacher import teacher_file
from distill_core.pruning.plan import name_map
from distill_core.pruning.plan_text import read_plan

PLANS = ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "keep down 2:1+0,1,2 mid resnet up 3,[1,2]:0,3"]


@pytest.fixture(scope="module")
def received(in_comfyui, tmp_path_factory):
    out = tmp_path_factory.mktemp("control") / "received.json"
    in_comfyui("receive_control", json.dumps(PLANS), out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("text", PLANS)
def test_each_kept_block_receives_what_its_teacher_block_receives(text, received):
    teacher = teacher_file().architecture
    mapping = name_map(teacher, read_plan(text, teacher))
    sources = teacher.skips
    kept = [i for i, source in enumerate(sources) if mapping.rename(source.replace(".attn.", ".resnet.")) is not None]

    def of(who, name):
        return [number for which, number in received[who] if which == name]

    # The teacher takes them all: of the input blocks from the first, of the skip connections from the last.
    n = len(sources)
    assert of("teacher", "output") == list(range(n))[::-1]
    assert of("teacher", "input") == list(range(n))[::-1]  # residual n - 1 - i is the one beside input block i
    assert of(text, "output") == kept[::-1]
    assert of(text, "input") == [n - 1 - i for i in kept]
    assert of(text, "middle") == ([99] if "up.0" in mapping.stages else [None])


def test_a_control_lora_works_where_encoder_and_mid_block_are_whole_and_is_refused_elsewhere(in_comfyui, tmp_path):
    in_comfyui("controlling.control_lora", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    refused = {name: text for name, text in found.items() if isinstance(text, str)}
    lacking = {"encoder": "input_blocks.5.1", "no mid": "middle_block.0", "tiny": "input_blocks.2.0",
               "encoder put back": "down.1.attn.1", "from a file": "middle_block.0", "student, then teacher": "input_blocks.2.0",
               "before another": "middle_block.0"}  # fmt: skip
    assert refused.keys() == lacking.keys()
    for name, layer in lacking.items():
        assert layer in refused[name] and "use a full ControlNet" in refused[name] and "\n" not in refused[name]
    works = found.keys() - refused.keys()
    assert works == {"teacher", "decoder", "decoder put back", "teacher, then student", "decoder, then student"}
    for name in works:  # as the full ControlNet of the same weights does
        of_lora, of_full = found[name]
        assert of_lora == pytest.approx(of_full, rel=1e-4) and of_full > 1
