"""Valid files made wrong: by their bytes, and by the structure they hold, so that what is wrong lies deep.

All is a function of a ``random.Random``.
"""

import json
import struct
from collections.abc import Callable
from math import prod
from random import Random

import tomli_w

from distill_core.base.storage import _BYTES

NASTY = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 0.0, -0.0, 0.5, 1e308, "", " ", "0", "-1", "../../x", "/dev/zero",
    "\x00", "\u2028", "ä", "x" * 5000, "*" * 50, ".a" * 200, [], {}, [[]], [0] * 1000, {"a": {}}, ["*"] * 1000,
]  # fmt: skip
RAW = ["1e999", "-1e999", "NaN", "Infinity", "9" * 5000, "[" * 3000, '{"a":' * 3000, '"\\ud800"', "1e-999", "01", "0x10", "'a'"]
"""What JSON and TOML writers do not write; each takes the place of the text `_placeholder` gives it."""
Mutation = Callable[[bytes, Random], bytes]


def _placeholder(number: int) -> str:
    return f"raw-{number}-raw"


def _filled_in(text: str) -> str:
    for number, raw in enumerate(RAW):
        text = text.replace(f'"{_placeholder(number)}"', raw)
    return text


def _nasty(random: Random):
    return random.choice([*NASTY, *map(_placeholder, range(len(RAW)))])


def _places(value, found):
    """Every container within a value."""
    if isinstance(value, (dict, list)):
        found.append(value)
        for inner in value.values() if isinstance(value, dict) else value:
            _places(inner, found)
    return found


def value(value, random: Random):
    """A value of JSON, changed in a few places."""
    value = json.loads(json.dumps(value))
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        places = [place for place in _places(value, []) if place]
        if not places:
            return _nasty(random)
        place = random.choice(places)
        key = random.choice(list(place)) if isinstance(place, dict) else random.randrange(len(place))
        match random.randrange(6):
            case 0:
                place[key] = _nasty(random)
            case 1:
                del place[key]
            case 2 if isinstance(place, dict):
                place[str(_nasty(random))[:300]] = place.pop(key)
            case 3:
                other = random.choice(places)
                place[key] = json.loads(json.dumps(random.choice(list(other.values()) if isinstance(other, dict) else other)))
            case 4 if isinstance(place, list):
                place.extend(place * random.choice([1, 3]))
            case _ if type(place[key]) in (int, float):
                place[key] += random.choice([-1, 1, 0.5, 1000])
            case _ if isinstance(place[key], str):
                place[key] = string(place[key], random)
    return value


def string(text: str, random: Random) -> str:
    """A text with a part cut out, repeated or replaced."""
    start, end = sorted(random.randint(0, len(text)) for _ in range(2))
    part = random.choice(["", text[start:end] * 2, text[start:end] * 50, str(_nasty(random)), "*", ".", "9" * 30, "[", ","])
    return text[:start] + part + text[end:]


def raw(data: bytes, random: Random) -> bytes:
    """Bytes with a part cut out, repeated or replaced; now and then in another encoding."""
    start, end = sorted(random.randint(0, len(data)) for _ in range(2))
    end = min(end, start + random.choice([0, 1, 2, 8, 1 << 20]))
    part = random.choice(
        [b"", data[start:end] * 2, random.randbytes(4), random.choice(RAW).encode(), b"\x00", b"\n", b"\xff\xfe"]
    )
    data = data[:start] + part + data[end:]
    return random.choice([data] * 8 + [b"\xef\xbb\xbf" + data, data.decode("latin-1").encode("utf-16"), data[: len(data) // 2]])


def text(data: bytes, random: Random) -> bytes:
    for _ in range(random.choice([1, 1, 3])):
        data = string(data.decode("utf-8", "replace"), random).encode() if random.random() < 0.7 else raw(data, random)
    return data


def as_json(data: bytes, random: Random) -> bytes:
    if random.random() < 0.1:
        return raw(data, random)
    return _filled_in(json.dumps(value(json.loads(data), random))).encode()


def as_json_lines(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    number = random.randrange(len(lines))
    if lines[number].strip():
        lines[number] = as_json(lines[number], random)
    return b"\n".join(lines)


def as_toml(data: bytes, random: Random) -> bytes:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    if random.random() < 0.2:
        return text(data, random)
    table = value(tomllib.loads(data.decode()), random)
    try:
        return _filled_in(tomli_w.dumps(table)).encode()
    except (TypeError, AttributeError):  # None, which TOML has no word for
        return raw(data, random)


def as_safetensors(data: bytes, random: Random) -> bytes:
    """A header that is changed, behind its right length or not; or another file that is well formed, with other tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = random.random()
    if kind < 0.1:
        return raw(data, random)
    if kind < 0.4:
        text = _filled_in(json.dumps(value(header, random))).encode()
        return struct.pack("<Q", len(text) + random.choice([0, 0, 0, 1, -1, 2**40])) + text + rest
    metadata, tensors = header.pop("__metadata__", {}), {name: (e["dtype"], e["shape"]) for name, e in header.items()}
    for _ in range(random.choice([0, 1, 1, 3])):
        metadata = _other_metadata(metadata, random)
    for _ in range(random.choice([0, 1, 1, 3])):
        tensors = _other_tensors(tensors, random)
    return pack(tensors, metadata)


def _other_metadata(metadata: dict, random: Random) -> dict:
    name = random.choice([*metadata, "distill.plan", "distill.skips", "distill.head_channels", "distill.padding", "distill.sampling",
                          "distill.run", "distill.training"])  # fmt: skip
    told = metadata.get(name, "{}")
    try:
        told = as_json(told.encode(), random).decode("utf-8", "replace")
    except (ValueError, RecursionError):  # it is text, or was made to nest before
        told = string(told, random)
    return metadata | {name: told}


def _other_tensors(tensors: dict, random: Random) -> dict:
    name = random.choice(list(tensors) or ["x"])
    code, shape = tensors.get(name, ("F32", [1]))
    parts = name.split(".")
    place = random.randrange(len(parts))
    other = ".".join([*parts[:place], random.choice(["0", "1", "7", "99999", "9" * 30, "", "x", parts[0]]), *parts[place + 1 :]])
    choice = random.randrange(6)
    if choice == 0:
        return {n: t for n, t in tensors.items() if n != name}
    if choice == 1:
        return {n: t for n, t in tensors.items() if not n.startswith(".".join(parts[: place + 1]))}
    if choice == 2:
        return {other if n == name else n: t for n, t in tensors.items()}
    if choice == 3:
        return tensors | {random.choice([other, string(name, random)[:2000]]): (code, shape)}
    if choice == 4:
        return tensors | {name: (random.choice(list(_BYTES)), shape)}
    sizes = [*shape, 1][: random.randint(0, len(shape) + 1)]
    return tensors | {name: (code, [random.choice([size, size, 0, 1, 2, size + 1]) for size in sizes])}


def pack(tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> bytes:
    """A well-formed file of tensors whose bytes count up, so that equal parts are told apart."""
    header, offset = {"__metadata__": metadata}, 0
    for name, (code, shape) in tensors.items():
        end = offset + prod(shape) * _BYTES[code]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + (bytes(range(64)) * (offset // 64 + 1))[:offset]
