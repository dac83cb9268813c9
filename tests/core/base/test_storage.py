import json
import math
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from distill_core.base.storage import StoredTensor, _host, atomic, fingerprint, read_header, write_tensors
from distill_core.networks.files import open_unet, save_unet
from distill_core.networks.model_sampling import ModelSampling
from distill_core.pruning.plan import preset
from distill_core.pruning.prune import prune_file

pytestmark = pytest.mark.slow

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.uint8,
    torch.bool,
]


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=6))
def test_the_library_reads_what_is_written_and_the_other_way_round(parts, tmp_path_factory):
    random = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": (torch.rand(shape, generator=random) * 3).to(dtype) for i, (dtype, shape) in enumerate(parts)}
    folder = tmp_path_factory.getbasetemp()
    write_tensors(folder / "ours", tensors, {"a": "ä"}, overwrite=True)
    save_file(tensors, folder / "theirs")
    with safe_open(folder / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "ä"}
    for name in ("ours", "theirs"):
        loaded, header = load_file(folder / name), read_header(folder / name).tensors
        assert loaded.keys() == header.keys() == tensors.keys()
        for key, tensor in tensors.items():
            for other in (loaded[key], header[key].read()):
                assert other.dtype == tensor.dtype and other.shape == tensor.shape
                assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_stored_tensors_pass_through_or_change_precision(tmp_path):
    tensors = {"a": torch.randn(300, 7), "b": torch.randn(5).half()}
    write_tensors(tmp_path / "first", tensors)
    stored = read_header(tmp_path / "first").tensors
    write_tensors(tmp_path / "second", stored, codes={"a": "BF16"})
    again = load_file(tmp_path / "second")
    assert torch.equal(again["a"], tensors["a"].bfloat16()) and torch.equal(again["b"], tensors["b"])


def test_the_fingerprint_is_the_same_on_disk_and_in_memory_and_tells_models_apart(tmp_path):
    tensors = {"a": torch.randn(1000), "b": torch.randn(3, 5).half(), "c": torch.tensor(2.0), "d": torch.zeros(0, 3)}
    write_tensors(tmp_path / "t", tensors)
    assert fingerprint(tensors) == fingerprint(read_header(tmp_path / "t").tensors)
    for other in ({**tensors, "a": tensors["a"] + 1e-3}, {**tensors, "b": tensors["b"].reshape(5, 3)}, {"x": tensors["a"]}):
        assert fingerprint(other) != fingerprint(tensors)


def _file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "header,data",
    [
        (b"no json", b""),
        ([1, 2], b""),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(8)),
        ({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, b""),
        ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, bytes(4)),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}, bytes(4)),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),  # a hole
        ({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, bytes(4)),  # an overlap
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, bytes(4)),
        ({"a": {"dtype": "F32", "shape": [1] * 1500, "data_offsets": [0, 4]}}, bytes(4)),
        (b"[" * 200_000, b""),
        ({"__metadata__": 5}, b""),
        ({"__metadata__": {"a": 5}}, b""),
        ({"__metadata__": {"a": ["b"]}}, b""),
    ],
)
def test_a_damaged_header_is_one_sentence(header, data, tmp_path):
    with pytest.raises(ValueError, match="not a valid safetensors file") as caught:
        read_header(_file(tmp_path / "x.safetensors", header, data))
    assert "\n" not in str(caught.value)


def _pairs(*entries):
    """A header as text, in which a name may come twice."""
    return ("{" + ", ".join(f'"{name}": {json.dumps(entry)}' for name, entry in entries) + "}").encode()


SIZES = st.integers(-1, 3) | st.sampled_from([True, 1.0, "1", None, 2**31, 2**63, 2**64])
CODES = st.sampled_from(["F32", "F16", "U8", "BOOL", "F64", "F8_E4M3", "f32", "F99", 4, None])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": CODES,
        "shape": st.lists(SIZES, max_size=2) | SIZES,
        "data_offsets": st.tuples(st.integers(-4, 12), st.integers(-4, 12)) | st.lists(SIZES, max_size=3),
    },
)
METADATA = st.none() | st.dictionaries(st.text("ab"), st.text("ab") | st.integers() | st.none(), max_size=2) | st.integers()


@settings(max_examples=300, deadline=None)
@given(
    entries=st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), ENTRIES), max_size=3),
    metadata=st.lists(METADATA, max_size=1),
    num_bytes=st.integers(0, 12),
    before=st.sampled_from([b"", b"", b"", b" ", b"\xef\xbb\xbf"]),
)
def test_what_is_read_the_library_reads_and_reads_the_same(entries, metadata, num_bytes, before, tmp_path_factory):
    text = before + _pairs(*[("__metadata__", value) for value in metadata], *entries)
    _same_as_the_library(_file(tmp_path_factory.getbasetemp() / "x", text, bytes(range(num_bytes))))


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.tuples(st.sampled_from(["F32", "F16", "U8", "I64"]), st.lists(st.integers(0, 3), max_size=3)), max_size=4),
    moved=st.sampled_from([-4, -1, 0, 0, 1, 4]),
    at=st.integers(0, 3),
    sides=st.sampled_from([(0,), (1,), (0, 1)]),
    longer=st.sampled_from([0, 0, 1, -1, 4]),
    shuffled=st.randoms(),
)
def test_a_header_that_is_nearly_right_is_read_as_the_library_reads_it(
    parts, moved, at, sides, longer, shuffled, tmp_path_factory
):
    header, end, width = {}, 0, {"F32": 4, "F16": 2, "U8": 1, "I64": 8}
    for number, (code, shape) in enumerate(parts):
        start, end = end, end + math.prod(shape) * width[code]
        header[str(number)] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    if parts:
        for side in sides:
            header[str(at % len(parts))]["data_offsets"][side] += moved
    names = list(header)
    shuffled.shuffle(names)
    data = bytes(i % 61 for i in range(max(0, end + longer)))
    _same_as_the_library(_file(tmp_path_factory.getbasetemp() / "x", {name: header[name] for name in names}, data))


def _same_as_the_library(path):
    """Ours refuses what the library refuses. What both open is the same; ours may refuse more, such as a name that is there twice."""
    try:
        with safe_open(path, "numpy") as file:
            theirs = {name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in file.keys()}
            values, metadata = (
                {name: file.get_tensor(name).tobytes() for name in theirs if theirs[name][0] != "F8_E4M3"},
                file.metadata(),
            )
    except (SafetensorError, OSError):
        with pytest.raises(ValueError, match="not a valid safetensors file"):
            read_header(path)
        return
    try:
        header = read_header(path)
    except ValueError as error:
        assert "a key appears twice" in str(error) or "an impossible shape" in str(error)
        return
    assert {name: (tensor.code, tensor.shape) for name, tensor in header.tensors.items()} == theirs
    assert header.metadata == (metadata or {})
    for name, value in values.items():
        assert header.tensors[name].read().numpy().tobytes() == value


@pytest.mark.parametrize("metadata", [None, {}])
def test_metadata_may_be_missing(metadata, tmp_path):
    assert read_header(_file(tmp_path / "x.safetensors", {"__metadata__": metadata})) == ({}, {})


def test_the_end_of_a_file_that_is_too_short_or_too_long_is_not_read_as_a_weight(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(9)})
    whole = (tmp_path / "x").read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:7], b""):
        (tmp_path / "x").write_bytes(damaged)
        with pytest.raises(ValueError, match="not a valid safetensors file"):
            read_header(tmp_path / "x")


@pytest.mark.parametrize("code,num_bytes", [("F8_E4M3FNUZ", 1), ("U16", 2), ("C64", 8)])
def test_a_precision_that_is_not_read_here_is_named(code, num_bytes, tmp_path):
    file = _file(tmp_path / "x", {"a": {"dtype": code, "shape": [1], "data_offsets": [0, num_bytes]}}, bytes(num_bytes))
    with pytest.raises(ValueError, match=f"holds tensors in {code}, .*convert them to one of F64, F32"):
        read_header(file)


def test_scales_that_are_powers_of_two_are_read_and_copied(tmp_path):
    stored = bytes([126, 127, 130, 255])
    file = _file(tmp_path / "x", {"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}, stored)
    tensors = read_header(file).tensors
    if not hasattr(torch, "float8_e8m0fnu"):
        with pytest.raises(ValueError, match="tensors in F8_E8M0 need a newer torch"):
            tensors["a"].read()
        return
    assert tensors["a"].read().float()[:3].tolist() == [0.5, 1.0, 8.0]
    write_tensors(tmp_path / "y.safetensors", tensors)
    assert (tmp_path / "y.safetensors").read_bytes().endswith(stored)


def test_an_empty_tensor_too_large_for_torch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too large"):
        read_header(_file(tmp_path / "x", {"a": {"dtype": "F32", "shape": [2**62, 2, 0], "data_offsets": [0, 0]}}))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="a device or a pipe, not a file"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("metadata", [{"a": 5}, {"a": None}, {"a": {"b": "c"}}, {5: "a"}])
def test_metadata_no_reader_takes_are_not_written(metadata, tmp_path):
    with pytest.raises(ValueError, match="must be text"):
        write_tensors(tmp_path / "x", {"a": torch.ones(1)}, metadata)
    assert list(tmp_path.iterdir()) == []


def test_tensors_the_format_does_not_have_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="complex128 cannot be written"):
        write_tensors(tmp_path / "x", {"a": torch.ones(1, dtype=torch.complex128)})


@settings(max_examples=50, deadline=None)
@given(metadata=st.dictionaries(st.text(st.characters()), st.text(st.characters())))
def test_whatever_text_is_written_the_library_reads(metadata, tmp_path_factory):
    """Halves of characters too, as the name of a file has that is not UTF-8."""
    path = tmp_path_factory.getbasetemp() / "text"
    write_tensors(path, {"a": torch.ones(1)}, metadata, overwrite=True)
    with safe_open(path, "pt") as file:
        assert {"format", *(name.encode(errors="replace").decode() for name in metadata)} == file.metadata().keys()


# --- killed writes


def _killed(path):
    """Leave behind what a killed write leaves: the process says when it is half done."""
    script = f"""
import os, sys
from distill_core.base.storage import atomic
with atomic({str(path)!r}) as made:
    made.write_bytes(b"half")
    print(made, flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    made = Path(process.stdout.readline().strip())
    assert made.read_bytes() == b"half"
    return process, made


def test_what_a_killed_write_leaves_is_no_model_and_goes_with_the_next(tmp_path):
    path = tmp_path / "x.safetensors"
    process, made = _killed(path)
    write_tensors(path, {"a": torch.ones(1)})  # while another writes: its file stays
    assert made.read_bytes() == b"half"
    process.kill()
    process.wait()
    process.stdin.close(), process.stdout.close()
    assert not [file for file in tmp_path.rglob("*") if file.suffix and file != path and file.is_file()]
    write_tensors(path, {"a": torch.ones(1)}, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def _left(path, host=None, pid=None):
    left = path.parent / f".{path.name}.{host or _host()}.{pid or os.getpid()}.abcdefgh.tmp"
    left.mkdir()
    (left / "made").write_text("half")
    return left


def test_a_process_that_has_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path):
    """As in a container that is started again."""
    before_us = psutil.Process().create_time() - 60
    os.utime(_left(tmp_path / "x"), (before_us, before_us))
    write_tensors(tmp_path / "x", {"a": torch.ones(1)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("hours,stays", [(1, True), (25, False)])
def test_what_another_machine_writes_is_left_alone_for_a_day(hours, stays, tmp_path):
    left = _left(tmp_path / "x", host="00000000")
    for part in (left / "made", left):
        os.utime(part, (time.time() - 3600 * hours,) * 2)
    write_tensors(tmp_path / "x", {"a": torch.ones(1)})
    assert left.exists() == stays


def test_only_our_own_leftovers_go(tmp_path):
    (tmp_path / ".x.original").mkdir()
    (tmp_path / "precious").mkdir()
    link = tmp_path / f".x.{_host()}.999999999.abcdefgh.tmp"
    link.symlink_to(tmp_path / "precious", target_is_directory=True)
    other = _left(tmp_path / "y", pid=999999999)
    write_tensors(tmp_path / "x", {"a": torch.ones(1)})
    assert (tmp_path / ".x.original").exists() and link.is_symlink() and (tmp_path / "precious").exists() and other.exists()


def test_a_folder_that_was_moved_aside_comes_back(tmp_path):
    left = _left(tmp_path / "folder", pid=999999999)
    (left / "replaced").mkdir()
    (left / "replaced" / "config.json").write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "folder", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "folder" / "config.json").read_text() == "old" and not left.exists()


def test_a_header_of_more_tensors_than_memory_is_refused_before_it_is_parsed(tmp_path):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(f'"{number}":{entry}' for number in range(400_000)) + "}"
    file = _file(tmp_path / "x.safetensors", text.encode())
    tracemalloc.start()
    with pytest.raises(ValueError, match="declares more tensors than any model has"):
        read_header(file)
    assert tracemalloc.get_traced_memory()[1] < 3 * len(text)
    tracemalloc.stop()


def test_a_header_that_begins_like_a_pickle_is_still_read(tmp_path):
    """Its first two bytes are its length, and may be any."""
    length = int.from_bytes(b"PK", "little")
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    _file(tmp_path / "x.safetensors", text.ljust(length).encode(), bytes(4))
    assert list(read_header(tmp_path / "x.safetensors").tensors) == ["a"]


# --- checkpoints of every kind


@pytest.fixture
def teacher(small_teacher):
    return small_teacher.architecture, {n: w.detach() for n, w in small_teacher.named_parameters().items()}


def _ldm(weights, prefix="model.diffusion_model."):
    from distill_core.networks.layouts import LAYOUTS

    names = LAYOUTS["ldm"].from_canonical(weights)
    return {prefix + names[n]: w.clone() for n, w in weights.items()}


BESIDE = {"first_stage_model.decoder.conv_in.bias": torch.ones(3), "cond_stage_model.transformer.x": torch.ones(2).half(),
          "model_ema.decay": torch.ones(1), "model_ema.diffusion_modelinput_blocks00weight": torch.ones(1)}  # fmt: skip


def test_a_full_checkpoint_keeps_its_vae_and_text_encoder(teacher, tmp_path):
    _, weights = teacher
    save_file({**_ldm(weights), **BESIDE}, tmp_path / "full.safetensors")
    prune_file(
        open_unet(tmp_path / "full.safetensors"),
        tmp_path / "s.safetensors",
        preset("bk-sdm-tiny"),
        layout="checkpoint",
        dtype="fp16",
    )
    tensors = load_file(tmp_path / "s.safetensors")
    assert all(torch.equal(tensors[name], BESIDE[name]) for name in list(BESIDE)[:2])
    assert {name.split(".")[0] for name in tensors} == {
        "model",
        "first_stage_model",
        "cond_stage_model",
    }  # no averages of the teacher
    assert all(name.startswith("model.diffusion_model.") for name in tensors if name.startswith("model"))
    student = open_unet(tmp_path / "s.safetensors")
    assert student.dtype == "f16" and student.prefix == "model.diffusion_model." and len(student.others) == 2


def test_a_checkpoint_of_a_bare_unet_is_refused(teacher, tmp_path):
    architecture, weights = teacher
    save_unet(tmp_path / "bare.safetensors", weights, architecture)
    with pytest.raises(ValueError, match="no VAE and text encoder"):
        prune_file(
            open_unet(tmp_path / "bare.safetensors"), tmp_path / "s.safetensors", preset("bk-sdm-tiny"), layout="checkpoint"
        )
    assert not (tmp_path / "s.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_kept_to_the_bit_and_widened_when_asked(dtype, teacher, tmp_path):
    _, weights = teacher
    save_file({n: w.to(dtype) for n, w in _ldm(weights, "").items()}, tmp_path / "t.safetensors")
    file = open_unet(tmp_path / "t.safetensors")
    prune_file(file, tmp_path / "same.safetensors", preset("bk-sdm-base"))
    prune_file(file, tmp_path / "wide.safetensors", preset("bk-sdm-base"), dtype="fp16")
    same, wide = open_unet(tmp_path / "same.safetensors"), open_unet(tmp_path / "wide.safetensors")
    assert file.dtype == same.dtype == ("f8_e4m3" if dtype == torch.float8_e4m3fn else "f8_e5m2") and wide.dtype == "f16"
    name = "up.1.resnet.1.conv1.weight"
    original = weights["up.1.resnet.2.conv1.weight"].to(dtype)
    assert torch.equal(same.state_dict[name].view(torch.uint8), original.view(torch.uint8))
    assert torch.equal(wide.state_dict[name], original.half())


@pytest.mark.parametrize("words", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
def test_scaled_fp8_is_read_with_its_scale(words, teacher, tmp_path):
    _, weights = teacher
    tensors, scaled = _ldm(weights, ""), "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    scale = tensors[f"{scaled}.weight"].abs().max() / 448
    expected = (tensors[f"{scaled}.weight"] / scale).to(torch.float8_e4m3fn)
    tensors |= {f"{scaled}.weight": expected, f"{scaled}.{words[0]}": scale, f"{scaled}.{words[1]}": torch.tensor(1.0)}
    save_file({**tensors, "scaled_fp8": torch.zeros(0)}, tmp_path / "t.safetensors")
    prune_file(open_unet(tmp_path / "t.safetensors"), tmp_path / "s.safetensors", preset("bk-sdm-base"))
    found = open_unet(tmp_path / "s.safetensors").state_dict["down.0.attn.0.block.0.attn1.to_q.weight"]
    assert torch.equal(found, (expected.float() * scale).half())
    assert not [name for name in load_file(tmp_path / "s.safetensors") if "scale" in name]


def test_scaled_fp8_is_rounded_once_to_what_is_written(tmp_path):
    """448 * 200 is more than float16 holds."""
    write_tensors(
        tmp_path / "t",
        {"w": torch.tensor([448.0, 1.0]).to(torch.float8_e4m3fn), "big": torch.tensor(200.0), "small": torch.tensor(0.00123456)},
    )
    stored = read_header(tmp_path / "t").tensors
    for scale, code, expected in (
        ("big", "BF16", torch.tensor([89600.0, 200.0]).bfloat16()),
        ("small", "F32", torch.tensor([448.0, 1.0]) * torch.tensor(0.00123456)),
        ("small", "F16", (torch.tensor([448.0, 1.0]) * torch.tensor(0.00123456)).half()),
    ):
        weight = StoredTensor(**{**vars(stored["w"]), "scale": stored[scale]})
        write_tensors(tmp_path / "s", {"w": weight}, codes={"w": code}, overwrite=True)
        found = read_header(tmp_path / "s").tensors["w"]
        assert found.code == code and torch.equal(found.read(), expected)
    assert torch.equal(weight.read(), expected) and torch.equal(weight.values([1], 1), expected[1:])


@pytest.mark.parametrize("storage", ["whole numbers", "absmax"])
def test_weights_that_are_quantised_in_an_unknown_way_are_named(storage, teacher, tmp_path):
    _, weights = teacher
    layer = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    tensors = _ldm(weights, "")
    if storage == "absmax":
        tensors[f"{layer}.weight.absmax"] = torch.ones(4)
    else:
        tensors[f"{layer}.weight"] = torch.ones(8, 1, dtype=torch.uint8)
    save_file(tensors, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=f"{layer}.weight is quantised in a way that is not supported"):
        open_unet(tmp_path / "t.safetensors")


def test_a_name_that_is_too_long_is_told_so(tmp_path):
    with pytest.raises(OSError, match="; choose a shorter name$"):
        write_tensors(tmp_path / ("a" * 250), {"x": torch.zeros(1)})


def test_other_quantisation_is_refused(teacher, tmp_path):
    _, weights = teacher
    layer = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    save_file({**_ldm(weights, ""), f"{layer}.weight_scale": torch.ones(32)}, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="quantised in a way that is not supported"):
        open_unet(tmp_path / "t.safetensors")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_markers_of_v_prediction_are_read_and_carried(prefix, teacher, tmp_path):
    _, weights = teacher
    save_file({**_ldm(weights, prefix), **BESIDE} if prefix else _ldm(weights, prefix), tmp_path / "eps.safetensors")
    assert open_unet(tmp_path / "eps.safetensors").prediction == "eps"
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file({**load_file(tmp_path / "eps.safetensors"), **markers}, tmp_path / "v.safetensors")
    for form in ("ldm", "checkpoint") if prefix else ("ldm",):
        prune_file(open_unet(tmp_path / "v.safetensors"), tmp_path / form, preset("bk-sdm-base"), layout=form)
        assert open_unet(tmp_path / form).prediction == "v" and markers.keys() <= load_file(tmp_path / form).keys()


def test_the_prediction_of_a_pipeline_is_its_schedulers(teacher, tmp_path):
    architecture, weights = teacher
    save_unet(tmp_path / "pipe" / "unet", weights, architecture, layout="diffusers")
    file = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file)  # without our metadata
    (tmp_path / "pipe" / "scheduler").mkdir()
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    assert open_unet(tmp_path / "pipe").prediction == open_unet(tmp_path / "pipe" / "unet").prediction == "v"


def test_shards_and_the_fp16_variant_of_a_folder_are_read(teacher, tmp_path):
    architecture, weights = teacher
    save_unet(tmp_path / "whole", weights, architecture, layout="diffusers")
    tensors = load_file(tmp_path / "whole" / "diffusion_pytorch_model.safetensors")
    config = (tmp_path / "whole" / "config.json").read_text()
    for folder in ("half", "shards"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(config)
    save_file({n: t.half() for n, t in tensors.items()}, tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors")
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[:100], names[100:])):
        shard = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, tmp_path / "shards" / shard)
        index |= dict.fromkeys(part, shard)
    (tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert open_unet(tmp_path / "half").dtype == "f16"
    read = open_unet(tmp_path / "shards").state_dict
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())


def test_an_sd2_that_predicts_v_is_known_by_comfyuis_sign_and_its_student_carries_it(published, tmp_path):
    """On the meta device nothing is in the weights; the one tensor that decides is made real."""
    from distill_core.networks.model_sampling import SD2_V_SIGN_LDM
    from distill_core.pruning.prune import prune

    student = prune(published["sd2"], preset("bk-sdm-v2-tiny")).student
    for prediction, marked in (("v", True), ("eps", False)):
        weights = {n: torch.zeros(s, dtype=torch.float8_e5m2) for n, s in student.shapes.items()}
        save_unet(tmp_path / prediction, weights, student, sampling=ModelSampling(prediction=prediction))
        header = read_header(tmp_path / prediction)
        assert (SD2_V_SIGN_LDM in header.tensors) == marked
        tensors = {n: t for n, t in header.tensors.items()}
        write_tensors(tmp_path / f"{prediction} without metadata", tensors)
        assert open_unet(tmp_path / f"{prediction} without metadata").prediction == prediction
        (tmp_path / prediction).unlink()


@pytest.mark.parametrize("place", ["models/diffusion_models/x", "ComfyUI/output/checkpoints/a/x", "models/unet/x"])
def test_a_diffusers_folder_is_not_written_where_comfyui_would_misread_it(place, teacher, tmp_path):
    architecture, weights = teacher
    with pytest.raises(ValueError, match="misreads students in the diffusers layout"):
        save_unet(tmp_path / place, weights, architecture, layout="diffusers")
    assert list(tmp_path.iterdir()) == []
    save_unet(tmp_path / "pipeline" / "unet", weights, architecture, layout="diffusers")


def test_a_student_tells_licence_plan_and_teacher(teacher, tmp_path):
    architecture, weights = teacher
    save_unet(
        tmp_path / "t.safetensors", weights, architecture, metadata={"modelspec.license": "CreativeML", "modelspec.author": "A"}
    )
    file = open_unet(tmp_path / "t.safetensors")
    prune_file(file, tmp_path / "s.safetensors", preset("bk-sdm-small"))
    metadata = open_unet(tmp_path / "s.safetensors").metadata
    assert (metadata["modelspec.license"], metadata["modelspec.author"]) == ("CreativeML", "A")
    assert metadata["distill.teacher"] == fingerprint(file.tensors) == fingerprint(weights)
    assert json.loads(metadata["distill.skips"]) == {"teacher": 12, "kept": [0, 1, 3, 4, 6, 7, 9, 10], "mid": True}
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1" and metadata["modelspec.sai_model_spec"] == "1.0.0"


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_damaged_json_beside_a_unet_is_one_sentence(text, teacher, tmp_path):
    architecture, weights = teacher
    folder = tmp_path / "pipe"
    save_unet(folder / "unet", weights, architecture, layout="diffusers")
    (folder / "scheduler").mkdir()
    places = [folder / "scheduler" / "scheduler_config.json", folder / "unet" / "config.json"]
    for place in places:
        before = place.read_text() if place.exists() else '{"prediction_type": ["odd"]}'
        place.write_text(text)
        with pytest.raises(ValueError, match=f"{place.name} (is not valid JSON|must be an object)") as caught:
            open_unet(folder)
        assert "\n" not in str(caught.value)
        place.write_text(before)
    assert open_unet(folder).prediction == "eps"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for weight_map, message in (({}, "names no shards"), ({"a": 3}, "does not exist"), ({"a": "../../x"}, "does not exist")):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            open_unet(folder)


@pytest.mark.parametrize("text", ["abc", "0", "-3", ""])
def test_odd_numbers_of_head_channels_are_refused(text, teacher, tmp_path):
    architecture, weights = teacher
    save_unet(tmp_path / "t.safetensors", weights, architecture, metadata={"distill.head_channels": text})
    with pytest.raises(ValueError, match="invalid head size"):
        open_unet(tmp_path / "t.safetensors")
