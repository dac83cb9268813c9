"""Text files beside weights: JSON, JSON Lines, TOML, CSV and plain text, written by people and by any program.

All of it is untrusted. Whatever a file contains, every reader here raises ``ValueError`` in one sentence that names the
file and says what to do. Readers reject deep nesting and numbers that overflow, and never wait for a pipe.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 20
"""Largest text: a recipe, a plan, a manifest, a caption. A hundred times what people write."""
MAX_LIST_BYTES = 256 << 20
"""Largest text with one entry per image or step: two million examples of a cache."""
MAX_TOML_BYTES, _MAX_TOML_DOTS = 128 << 10, 400
"""Largest recipe, and most dots in one line: the TOML parser's time grows with the square of a dotted key's parts."""
_MAX_WHOLE = 2**64
_MAX_REASON = 200
_WORDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
_BACKSLASHES = "write paths with forward slashes (\"C:/images\") or in single quotes ('C:\\images')"
_WINDOWS_PATH = re.compile(r'^[^#\n]*"(?:[A-Za-z]:|\.\.?)\\(?!\\)', re.MULTILINE)
"""A drive, or dots, and one backslash between double quotes; TOML reads it as the start of an escape such as a tab."""


def one_line(error: object, max_chars: int = _MAX_REASON) -> str:
    """Message of an error, shortened and on one line."""
    said = " ".join(str(error).split()) or (type(error).__name__ if isinstance(error, Exception) else "")
    return said if len(said) <= max_chars else f"{said[:max_chars]} …"


# --- files ----------------------------------------------------------------------------------------------------------


def check_regular(path: Path) -> None:
    """``ValueError`` unless a path is a regular file, or a link to one.

    Links are followed, because data sets are often folders of links into a store. A pipe or a device has no end.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path} does not exist; check the name and its folder") from error
    except (OSError, ValueError) as error:  # the name is too long, or contains a null byte
        raise ValueError(
            f"cannot read {one_line(path)} ({one_line(getattr(error, 'strerror', error))}); give another name"
        ) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise ValueError(f"{path} is {kind}, not a file; give a file")


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Contents of a regular file."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(size) if size <= max_bytes else b""
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror or error}); check its permissions and its disk") from error
    if size > max_bytes:
        raise ValueError(f"{path} is larger than {max_bytes / 2**20:g} MiB; give the right file, or split it")
    return content


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Text in UTF-8, or in UTF-16 as Windows PowerShell writes it, without a byte order mark."""
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} holds weights, not text; give a text file")
    content = read_bytes(path, max_bytes)
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8; save it as UTF-8") from error


def lines(text: str) -> list[str]:
    """Lines as editors count them; `str.splitlines` also breaks at characters that a caption may contain, such as U+2028."""
    return re.split(r"\r\n?|\n", text)


# --- JSON -----------------------------------------------------------------------------------------------------------


def read_json(path: Path, kind: type = dict, max_bytes: int = MAX_BYTES) -> Any:
    """Contents of a JSON file, which must be a ``dict`` or a ``list``, as ``kind`` says."""
    return _parse_stored(read_text(path, max_bytes), path, kind, max_bytes)


def parse_json(text: str, where: object, kind: type = dict, max_chars: int = MAX_BYTES) -> Any:
    """Value of a JSON text, which must be of a kind and have finite numbers only.

    where: its name in errors; the caller adds what to do.
    """
    if len(text) > max_chars:
        raise ValueError(f"{where} has {len(text):,} characters, but at most {max_chars:,} are allowed")
    try:
        value = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_distinct)
        if "\\u" in text:  # perhaps a lone surrogate, which cannot be encoded
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({_why(error)})") from error
    return expect(value, kind, where)


def expect(value: Any, kind: type, where: object) -> Any:
    """The value, if it is of a kind; true and false do not count as numbers."""
    if type(value) is not kind:
        raise ValueError(f"{where} must be {_WORDS[kind]}, got {_WORDS.get(type(value), 'nothing')}")
    return value


def numbers(value: Any, where: object, kinds: tuple[type, ...] = (int, float)) -> list:
    """The value, if it is a list of numbers."""
    if odd := [entry for entry in expect(value, list, where) if type(entry) not in kinds]:
        raise ValueError(f"{where} must be numbers, got {one_line(repr(odd[0]))}")
    return value


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON Lines file, one per line; empty lines are skipped."""
    for number, line in enumerate(lines(read_text(path, MAX_LIST_BYTES)), 1):
        if line.strip():
            yield _parse_stored(line, f"{path}: line {number}", dict, MAX_BYTES)


def _parse_stored(text: str, where: object, kind: type, max_chars: int) -> Any:
    """As `parse_json`, but for a file, so that the error says what to do."""
    try:
        return parse_json(text, where, kind, max_chars)
    except ValueError as error:
        raise ValueError(f"{error}; correct it, or download it again") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with distinct keys; readers differ in which of two equal keys they take."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > 21 or abs(number := int(digits)) >= _MAX_WHOLE:
        raise ValueError(f"a whole number of {len(digits)} digits is too large")
    return number


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{one_line(digits)} is not a finite number")
    return number


def _why(error: Exception) -> str:
    return "it nests too deeply" if isinstance(error, RecursionError) else one_line(error)


# --- TOML and CSV ---------------------------------------------------------------------------------------------------


def read_toml(path: Path) -> dict[str, Any]:
    """Contents of a TOML file, which must have finite numbers only."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    text = read_text(path, MAX_TOML_BYTES)
    if any(line.count(".") > _MAX_TOML_DOTS for line in lines(text)):
        raise ValueError(f"{path} has more than {_MAX_TOML_DOTS} dots in a line; break that line into several")
    try:
        table = tomllib.loads(text, parse_float=_finite)
        _check_whole_numbers(table)
    except (ValueError, RecursionError) as error:
        remedy = _BACKSLASHES if "\\" in text else "correct it"
        raise ValueError(f"{path} is not valid TOML ({_why(error)}); {remedy}") from error
    if _WINDOWS_PATH.search(text):
        raise ValueError(f"{path} has a path with backslashes between double quotes, which TOML reads as escapes; {_BACKSLASHES}")
    return table


def _check_whole_numbers(value: Any) -> None:
    """``ValueError`` for a whole number beyond 64 bits, which the TOML parser accepts."""
    if type(value) is int and abs(value) >= _MAX_WHOLE:
        raise ValueError("a whole number is too large")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_whole_numbers(inner)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, keyed by the names in its first line."""
    return parse_csv(read_text(path, MAX_LIST_BYTES), path)


def parse_csv(text: str, where: object) -> list[dict[str, str]]:
    """Rows of a CSV text, keyed by the names in its first line. where: its name in errors."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        found = list(rows)
    except csv.Error as error:
        raise ValueError(f"{where} is not valid CSV (line {rows.line_num + 1}: {one_line(error)}); correct that line") from error
    if longer := [number for number, row in enumerate(found, 1) if None in row]:
        raise ValueError(f"{where}: entry {longer[0]} has more values than columns; put text with commas in double quotes")
    return found
