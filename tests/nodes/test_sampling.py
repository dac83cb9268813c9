"""A student samples as its teacher does on every path, and quantised MODELs are read as what they stand for."""

import pytest

from .sampling import FORMATS, KINDS

FORGETS = {"sdxl, playground": {"stock Save Checkpoint"}}  # of its own teacher too: ComfyUI writes nothing that says it


@pytest.fixture(scope="module")
def travels(found):
    return found("sampling.travels")


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_samples_as_its_teacher_on_every_path(kind, travels):
    want, edm = travels[kind]["teacher"], "EDM" in travels[kind]["teacher"]
    paths = {path: got for path, got in travels[kind].items() if path not in ("teacher", "train", *FORGETS.get(kind, ()))}
    assert set(paths.values()) == {want}, paths
    assert ("EDM, sigma" in travels[kind]["train"]) if edm else travels[kind]["train"] is None


@pytest.fixture(scope="module")
def patched(found):
    return found("sampling.patched")


@pytest.mark.parametrize("kind", ["v", "v, zero snr", "x0", "flow"])
def test_sampling_that_was_patched_on_comes_back_from_the_file(kind, patched):
    told = patched[kind]
    assert told["save"] is None and told["train"] is None or kind == "flow" and "flow" in told["train"]
    assert told["pruned"].rpartition(",")[0].partition("+")[2] == told["teacher"].rpartition(",")[0].partition("+")[2]
    ends = told["teacher"].split(", ")[1:]
    assert told["loaded"].split(", ")[1] == ends[0]


@pytest.mark.parametrize("kind", ["lcm", "eps, edm", "shifted flow"])
def test_sampling_that_no_file_can_tell_is_neither_saved_nor_trained(kind, patched):
    told = patched[kind]
    assert "a file cannot store" in told["save"] and "cannot be trained" in told["train"] and "remove the patch" in told["train"]
    assert told["pruned"].split(", ")[:2] == told["teacher"].split(", ")[:2]


@pytest.fixture(scope="module")
def quantised(found):
    return found("sampling.quantised")


TOLERANCE = {"float8_e4m3fn": 0.04, "float8_e5m2": 0.13, "int8_tensorwise": 0.01, "nvfp4": 0.2}


@pytest.mark.parametrize("form", FORMATS)
def test_quantised_weights_are_read_as_what_they_stand_for(form, quantised):
    told = quantised[form]
    assert told["shapes"] and told["opens"]
    assert max(told["read"], told["saved"], told["pruned"]) < TOLERANCE[form], told
    assert told["lora"] < 0.1 + TOLERANCE[form]  # ComfyUI rounds the patched weight to the same format again
    assert told["file"] is None or "quantised in a way that is not supported" in told["file"]


def test_weights_kept_in_an_unknown_way_are_refused(quantised):
    assert "quantised in a way that is not supported" in quantised["unknown"] and "fp16" in quantised["unknown"]
