import json
import os
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_core.base.documents import (
    MAX_BYTES,
    expect,
    json_lines,
    lines,
    numbers,
    parse_csv,
    parse_json,
    read_bytes,
    read_csv,
    read_json,
    read_text,
    read_toml,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64) + 1, 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def refused(read, *arguments, said):
    began = time.monotonic()
    with pytest.raises(ValueError, match=said) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700 and time.monotonic() - began < 1


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value=st.dictionaries(TEXT, VALUES, max_size=4))
def test_json_is_read_as_it_was_written(value):
    assert parse_json(json.dumps(value), "x") == parse_json(json.dumps(value, ensure_ascii=False), "x") == value


@pytest.mark.parametrize(
    "text,said",
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "nests too deeply"),
        ('{"a":' * 100_000, "nests too deeply"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": -1e999}', "not a finite number"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": Infinity}', "not a finite number"),
        ('{"a": ' + "9" * 100_000 + "}", "whole number of 100000 digits is too large"),
        ('{"a": 18446744073709551616}', "too large"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        ("[]", "must be an object, got a list"),
        ("true", "must be an object, got true or false"),
        ("null", "must be an object, got nothing"),
        (" " * (MAX_BYTES + 1), "characters, but at most 1,048,576 are allowed"),
    ],
)
def test_json_that_is_wrong_is_one_sentence(text, said):
    refused(parse_json, text, "the text", said=f"^the text .*{said}")


@pytest.mark.parametrize("value,kind", [(True, int), (1.0, int), ("1", int), (1, bool), (None, str), ((), list)])
def test_a_value_of_another_kind_is_refused(value, kind):
    with pytest.raises(ValueError, match="^x must be"):
        expect(value, kind, "x")


@pytest.mark.parametrize("value", [3, [True], ["1"], [None], [[1]]])
def test_a_list_of_something_else_than_numbers_is_refused(value):
    with pytest.raises(ValueError, match="^x must be"):
        numbers(value, "x")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name,text,read,what", [
    ("x.txt", "ä", read_text, "ä"),
    ("x.json", '{"a": "ä"}', read_json, {"a": "ä"}),
    ("x.jsonl", '{"a": "ä"}\n', lambda path: [*json_lines(path)], [{"a": "ä"}]),
    ("x.toml", 'a = "ä"', read_toml, {"a": "ä"}),
    ("x.csv", "a,b\nä,1\n", read_csv, [{"a": "ä", "b": "1"}]),
])  # fmt: skip
def test_every_reader_reads_what_editors_and_powershell_write(name, text, read, what, encoding, tmp_path):
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read(tmp_path / name) == what


@pytest.mark.parametrize("read", [read_text, read_json, lambda path: [*json_lines(path)], read_toml, read_csv])
def test_every_reader_refuses_what_is_no_text_or_no_file(read, tmp_path):
    (tmp_path / "latin").write_bytes("ä".encode("latin-1"))
    (tmp_path / "odd").write_bytes(b"\xff\xfe\x00")
    refused(read, tmp_path / "latin", said="latin is not text in UTF-8; save it as UTF-8")
    refused(read, tmp_path / "odd", said="odd is not text in UTF-8")
    refused(read, tmp_path, said="is a folder, not a file")
    refused(read, tmp_path / "none", said="none does not exist")


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names, and links only for administrators")
def test_links_to_files_are_followed_and_pipes_are_not_waited_for(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "device").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    assert read_text(tmp_path / "link") == "text"
    for name in ("device", "pipe"):
        refused(read_bytes, tmp_path / name, said="a device or a pipe, not a file")


def test_a_file_larger_than_it_should_be_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(bytes(MAX_BYTES + 1))
    refused(read_text, tmp_path / "x", said="larger than 1 MiB")
    (tmp_path / "x").write_bytes(bytes(MAX_BYTES))
    assert len(read_bytes(tmp_path / "x")) == MAX_BYTES


@settings(deadline=None)
@given(captions=st.lists(TEXT, min_size=1))
def test_a_line_of_json_holds_any_caption(captions, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "x.jsonl"
    path.write_bytes("\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in captions).encode())
    assert [row["text"] for row in json_lines(path)] == captions


def test_lines_end_where_editors_say():
    assert lines("a\u2028b\x0bc\x1cd\x85e\nf\r\ng\rh") == ["a\u2028b\x0bc\x1cd\x85e", "f", "g", "h"]


def test_a_wrong_line_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n[1]\n')
    refused(lambda path: [*json_lines(path)], tmp_path / "x.jsonl", said="x.jsonl: line 3 must be an object")


@pytest.mark.parametrize(
    "text,said",
    [
        ("a = " + "[" * 60_000, "nests too deeply"),
        ("a = nan", "nan is not a finite number"),
        ("a = [1.0, -inf]", "not a finite number"),
        ("a = 1e999", "not a finite number"),
        ("a = " + "9" * 5000, "not valid TOML"),
        ("a = {b = [18446744073709551616]}", "a whole number is too large"),
        ("a." * 20_000 + "a = 1", "dots in a line"),
        ('a = "C:\\Users\\me"', r"forward slashes \(\"C:/images\"\) or in single quotes"),
        ('a = "C:\\new\\train"', "backslashes between double quotes"),
        ('a = ["x", "..\\new"]', "backslashes between double quotes"),
        ("#" * (129 << 10), "larger than 0.125 MiB"),
    ],
)
def test_toml_that_is_wrong_is_one_sentence(text, said, tmp_path):
    (tmp_path / "r.toml").write_text(text)
    refused(read_toml, tmp_path / "r.toml", said=f"r.toml .*{said}")


@pytest.mark.parametrize("text", ["a = 'C:\\new'", 'a = "C:\\\\new"', '# "C:\\new"\na = "C:/new"'])
def test_paths_that_are_written_well_are_read(text, tmp_path):
    (tmp_path / "r.toml").write_text(text)
    assert read_toml(tmp_path / "r.toml")["a"].replace("\\", "/") == "C:/new"


def test_a_field_too_long_for_csv_is_one_sentence():
    refused(parse_csv, "a,b\n1,2\n3," + "x" * 200_000, "x.csv", said="^x.csv is not valid CSV .line 3: field larger")
