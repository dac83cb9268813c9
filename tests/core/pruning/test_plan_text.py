import re
import time

import pytest

from distill_core.pruning.plan import name_map, preset, preset_names, pruned
from distill_core.pruning.plan_text import EXAMPLE, find_plan, read_plan, write_plan

PRESETS_AS_TEXT = {
    "bk-sdm-base": "keep down 1,1,1,1 mid full up 2,2,2,2",
    "bk-sdm-v2-small": "keep down 1,1,1,1 mid none up 2,2,2,2",
    "bk-sdm-tiny": "keep down 1,1,1,0 mid none up 0,2,2,2",
    "ssd-1b": "keep down 2,2,2:[0,1,2,6] mid resnet up 3:[0,1,2,6]+[0,1,2,6]+10,3:2+1+1,3",
    "segmind-vega": "keep down 2,2:1,2:2 mid resnet up 3:2,3:1,3",
    "koala-700m": "keep down 1,1,1:5 mid none up 2:5,2,2",
    "koala-1b": "keep down 1,1,1:6 mid 6 up 2:6,2,2",
}


@pytest.mark.parametrize("name", PRESETS_AS_TEXT)
def test_presets_as_text(name, published):
    teacher = published[preset(name).teacher]
    assert write_plan(preset(name), teacher) == PRESETS_AS_TEXT[name]
    assert name_map(teacher, read_plan(PRESETS_AS_TEXT[name], teacher)) == name_map(teacher, preset(name))


@pytest.mark.parametrize(
    "text", ["keep down 1,1,1 mid none up 2,2,2,2", "down 1 mid none up 2", "up 2 keep", "keep mid none down 1 up 2"]
)
def test_short_forms(text, sd15):
    """The last number stands for the stages that are not listed; sides come in any order."""
    if text == "up 2 keep":
        with pytest.raises(ValueError, match="not of the form"):
            read_plan(text, sd15)
    else:
        assert name_map(sd15, read_plan(text, sd15)) == name_map(sd15, preset("bk-sdm-small"))


def test_a_text_longer_than_any_name_of_a_file_is_a_plan(sd15):
    text = "mid none down 1,1,1,1" + " " * 300 + "up 2,2,2,2"
    assert find_plan(text, sd15) == read_plan(text, sd15)


@pytest.mark.parametrize("name", preset_names())
def test_a_plan_is_also_the_name_of_a_preset_or_json(name, published):
    teacher = published[preset(name).teacher]
    assert read_plan(f" {name} ", teacher) == preset(name)
    assert name_map(teacher, read_plan(preset(name).to_json(), teacher)) == name_map(teacher, preset(name))


@pytest.mark.parametrize(
    "text,message",
    [
        ("half of it", "not a preset, not JSON, and not of the form"),
        ("", "keeps everything"),
        ("keep down 1 down 1", "not of the form"),
        ("keep down 1,1,1,1,1 mid none", "down lists 5 stages but this UNet has 4"),
        ("keep down 3", "keeps 3 resnets in down.0, but there are only 2"),
        ("keep down [1,0]", "ascending"),
        ("keep down 2:1+1+1", "keeps 2 layers but 3 depths"),
        ("keep down 2:7", "keeps 7 transformer blocks in down.0.attn.0, but there are only 1"),
        ("keep mid half", "'half' is not a mid block"),
        ("keep down x,y", "'x' is not the number of layers"),
        ("keep down 2 mid full up 3", "keeps everything"),
        ("{", "not a pruning plan"),
    ],
)
def test_what_cannot_be_read_is_named(text, message, sd15):
    with pytest.raises(ValueError, match=message) as caught:
        read_plan(text, sd15)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "keep" + " " * 200_000 + "x",
        "keep down " + "1," * 100_000,
        "keep down " + "[" * 100_000,
        "keep down 1:" + "1+" * 100_000,
        "keep mid " + "1" * 100_000,
        "keep down " + "1," * 900,
        "keep down " + "[1," * 600,
        "keep down " + "9" * 1900,
        "keep mid [" + "0," * 900 + "0]",
        "{" * 1_000_000,
    ],
)
def test_a_long_text_is_refused_at_once_and_in_few_words(text, sd15):
    began = time.monotonic()
    with pytest.raises(ValueError) as caught:
        read_plan(text, sd15)
    assert time.monotonic() - began < 0.5 and len(str(caught.value)) < 700 and "\n" not in str(caught.value)


@pytest.mark.parametrize("space", ["", " ", "   ", "\t", "\n"])
def test_space_around_signs_does_not_matter(space, sd15):
    tight = "keep down 2:1+1,[0]:1,1,1 mid none"
    spaced = re.sub("[,+:]", rf"{space}\g<0>{space}", tight)
    one, other = read_plan(tight, sd15), read_plan(spaced, sd15)
    assert (one.remove, one.keep) == (other.remove, other.keep)


def test_a_plan_of_several_lines_is_named_in_one(sd15):
    for text in ("keep down 1\nmid none", '{"name": "keep down 1\\nmid none", "remove": ["mid"]}'):
        assert read_plan(text, sd15).name == "keep down 1 mid none"


def test_the_example_in_the_message_can_be_read(sd15):
    assert pruned(sd15, name_map(sd15, read_plan(EXAMPLE, sd15))).num_parameters == 482_346_884


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("pruned_by", [None, "keep mid none", "keep down 1 mid none up 2"])
def test_examples_in_messages_fit_the_unet(family, pruned_by, published):
    """A person who copies one prunes with it."""
    teacher = published[family]
    teacher = pruned(teacher, name_map(teacher, read_plan(pruned_by, teacher))) if pruned_by else teacher
    for wrong, before in (('{"remove": 5}', "a plan looks like "), ("keep mid half", "an example for this UNet is ")):
        with pytest.raises(ValueError, match=before) as refused:
            read_plan(wrong, teacher)
        example = str(refused.value).rpartition(before)[2].strip("'")
        assert pruned(teacher, name_map(teacher, read_plan(example, teacher))).num_parameters < teacher.num_parameters


def test_json_may_leave_the_name_out(sd15):
    assert read_plan('{"remove": ["mid"]}', sd15).name == "a plan of your own"
    with pytest.raises(ValueError, match="not a pruning plan: 'name' must be text"):
        read_plan('{"name": 5, "remove": ["mid"]}', sd15)
