"""Tensors on disk: read one by one, and written so that no half-written file is left behind. safetensors only.

The safetensors library reads and writes whole sets of tensors; this module streams a checkpoint in pieces, so that
pruning a file of any size needs the memory of one tensor. Nothing here imports torch before a tensor is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .documents import check_regular, expect, numbers, one_line, parse_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CODES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
"""Precisions to write -> their codes in the format."""
_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
MOST_DIMENSIONS = 8
_UNREAD = {"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64", "U16", "U32", "U64"}
"""Precisions of the format that this library does not support."""
OVERWRITABLE = {
    "checksums.json", "config.json", "diffusion_pytorch_model.safetensors", "lora.safetensors", "student.safetensors",
    "training.safetensors",
}  # fmt: skip
"""Files that this library writes into folders; a folder with only these may be overwritten."""
_CHUNK_BYTES = 8 << 20
_LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MOST_BRACKETS = 1_000_000  # each tensor has three; as Python objects they take ten times the size of the text
_DAY_S = 24 * 3600
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    path: Path
    code: str
    """Precision as the format spells it: ``F16``, ``BF16``, ``F8_E4M3``, ..."""
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""
    scale: StoredTensor | None = None
    """For scaled fp8: one number that multiplies all values when they are read."""

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _BYTES[self.code]

    @property
    def as_stored(self) -> bool:
        """Whether its values are just those in the file."""
        return self.scale is None

    def read(self) -> Tensor:
        """The values, independent of the file; of scaled fp8 in float16."""
        return self.exact() if self.scale is None else self.exact().half()

    def exact(self) -> Tensor:
        """The values, not rounded yet: of scaled fp8 in float32, to be written or computed with in any precision."""
        return self._from_file([0], prod(self.shape)).reshape(self.shape)

    def values(self, starts: Sequence[int], count: int) -> Tensor:
        """``count`` values of the flattened tensor from each start on, (len(starts) * count,), as `read` rounds them."""
        found = self._from_file(starts, count)
        return found if self.scale is None else found.half()

    def _from_file(self, starts: Sequence[int], count: int) -> Tensor:
        import torch

        size = _BYTES[self.code]
        data = bytearray(len(starts) * count * size)
        with open(self.path, "rb", buffering=0) as file:
            for i, start in enumerate(starts):
                file.seek(self.offset + start * size)
                _fill(file, memoryview(data)[i * count * size : (i + 1) * count * size])
        dtype = _dtype(self.code)
        values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return values if self.scale is None else values.float() * self.scale.read().float()


def _dtype(code: str) -> torch.dtype:
    """torch's precision for one of the format; ``ValueError`` if this torch has none."""
    import torch

    if (dtype := getattr(torch, _TORCH[code], None)) is None:
        raise ValueError(f"tensors in {code} need a newer torch than {torch.__version__}")
    return dtype


def _fill(file, buffer: memoryview) -> None:
    """Read until the buffer is full; one call of ``readinto`` reads at most 2 GiB."""
    while len(buffer):
        if not (count := file.readinto(buffer)):
            raise OSError(f"{file.name} was cut short while it was read")
        buffer = buffer[count:]


class Header(NamedTuple):
    """Tensors and metadata in the header of a safetensors file."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(path: Path | str) -> Header:
    """Header of a safetensors file; ``ValueError`` in one sentence if the file has another format or is damaged."""
    path = Path(path)
    check_regular(path)
    if path.suffix in _PICKLES:
        raise ValueError(f"{path} is a pickle checkpoint, which can run code when opened; convert it to .safetensors first")
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        text = file.read(length) if length <= _LARGEST_HEADER_BYTES else b""
        num_bytes = os.fstat(file.fileno()).st_size - 8 - length
    if text.count(b"{") + text.count(b"[") > _MOST_BRACKETS:
        raise ValueError(f"{path} declares more tensors than any model has; download it again from a source you trust")
    try:
        entries, metadata = _entries(text, num_bytes)
    except ValueError as error:
        if start[:4] == b"GGUF":
            raise ValueError(
                f"{path} is in the GGUF format, which is not supported; download the .safetensors version of the model"
            ) from error
        if start[:2] in (b"PK", b"\x80\x02"):
            raise ValueError(f"{path} is a pickle checkpoint despite its name; convert it to .safetensors first") from error
        raise ValueError(f"{path} is not a valid safetensors file ({one_line(error)}); download it again") from error
    if unread := {entry["dtype"] for entry in entries.values()} & _UNREAD:
        raise ValueError(
            f"{path} holds tensors in {min(unread)}, which is not supported; convert them to one of {', '.join(_BYTES)}"
        )
    tensors = {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
    return Header(tensors, metadata)


def _entries(text: bytes, num_bytes: int) -> tuple[dict[str, dict], dict[str, str]]:
    """Tensors and metadata of a header that ``num_bytes`` follow; ``ValueError`` by the rules of the safetensors library.

    The library itself would import numpy or torch to open a file, and map all of it into memory.
    """
    entries = parse_json(text.decode(), "its header", max_chars=_LARGEST_HEADER_BYTES)
    metadata = entries.pop("__metadata__", None)
    for name, value in expect({} if metadata is None else metadata, dict, "its metadata").items():
        expect(value, str, f"its metadata {name!r}")
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: _offsets(*item)):
        start, previous = _offsets(name, entry)[0], end
        end, shape = _offsets(name, entry)[1], numbers(entry.get("shape"), f"the shape of {name!r}", (int,))
        code = expect(entry.get("dtype"), str, f"the dtype of {name!r}")
        if code not in _BYTES.keys() | _UNREAD:
            raise ValueError(f"{name!r} has the unknown dtype {code!r}")
        if start != previous or end < start:
            raise ValueError(f"{name!r} does not begin where the tensor before it ends")
        if len(shape) > MOST_DIMENSIONS:
            raise ValueError(f"{name!r} has {len(shape):,} dimensions, more than any tensor of a model")
        if min(shape, default=0) < 0 or prod(max(1, size) for size in shape) >= 2**63:
            raise ValueError(f"{name!r} has an impossible shape, or is too large")
        if code in _BYTES and end - start != prod(shape) * _BYTES[code]:
            raise ValueError(f"{name!r} has {end - start:,} bytes, which do not match its shape")
    if end != num_bytes:
        raise ValueError(f"its header declares {end:,} bytes of tensors, but the file has {num_bytes:,}")
    return entries, metadata or {}


def _offsets(name: str, entry: Any) -> list[int]:
    """First byte and end of a tensor, counted from the end of the header."""
    where = f"data_offsets of {name!r}"
    found = numbers(expect(entry, dict, repr(name)).get("data_offsets"), where, (int,))
    if len(found) != 2:
        raise ValueError(f"{where} must be two numbers")
    return found


def fingerprint(tensors: Mapping[str, Tensor | StoredTensor]) -> str:
    """Sixteen hex digits that identify a set of tensors, from names, shapes, and 64 values of each.

    The values come from eight evenly spaced runs. This is fast enough for a checkpoint of any size; it detects another
    model or data set, not tampering.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + _spread(tensor).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _spread(tensor: Tensor | StoredTensor, num_runs: int = 8, run: int = 8) -> Tensor:
    import torch

    count = prod(tensor.shape)
    run = min(run, count)
    starts = sorted({i * (count - run) // (num_runs - 1) for i in range(num_runs)})
    if isinstance(tensor, StoredTensor):
        return tensor.values(starts, run)
    picked = torch.cat([torch.arange(start, start + run) for start in starts])
    return tensor.detach().reshape(-1)[picked.to(tensor.device)].cpu()


# --- writing --------------------------------------------------------------------------------------------------------


OnBytes = Callable[[int, int], None]


def ignore(done: int, total: int) -> None:
    pass


class WriteError(OSError):
    """A file could not be written; one sentence says which and why."""

    def __init__(self, path: Path, reason: str, kept: str = ""):
        """kept: what was saved nevertheless."""
        remedy = (
            "choose a shorter name" if reason == os.strerror(errno.ENAMETOOLONG) else "free some space or choose another folder"
        )
        super().__init__(f"cannot write {path}: {reason}; {remedy}{kept and f' ({kept})'}")
        self.path, self.reason = path, reason


class ExistsError(ValueError):
    """A file or folder is there already and may not be replaced."""

    def __init__(self, path: Path):
        super().__init__(f"{path} exists already; choose another name, or set overwrite")
        self.path = path


@contextlib.contextmanager
def atomic(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path``, and move the finished result from there into place.

    Whatever goes wrong, no half-written file is left. Raises `ExistsError` if ``path`` exists and may not be
    overwritten, ``OSError`` in one sentence if it cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ExistsError(path)
    if path.is_dir() and not {p.name for p in path.iterdir()} <= OVERWRITABLE:
        raise ValueError(f"{path} is a folder that holds other files, which overwriting would delete; choose another name")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.{_host()}.{os.getpid()}.", suffix=".tmp", dir=path.parent))
        made = temporary / "made"  # no suffix, so that no UI lists a half-written file
        yield made
        if made.is_dir():
            _sync(made)
        replaced = path.rename(temporary / "replaced") if path.is_dir() else None
        try:
            os.replace(made, path)
        except OSError:
            if replaced is not None:
                replaced.rename(path)
            raise
        _sync(path.parent)
    except OSError as error:
        raise WriteError(path, getattr(error, "reason", None) or error.strerror or str(error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can be asked to."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):  # not every file system knows it
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def discard(paths: Sequence[Path]) -> None:
    """Delete files and folders; if one of them cannot be moved, all stay.

    They are given hidden names first, which needs no room on the disk; folders that a killed process left so are removed by
    `clear_abandoned`. Links are deleted, not followed.
    """
    mark = f"{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    moved: dict[Path, Path] = {}
    try:
        for path in paths:
            moved[path] = path.rename(path.with_name(f".{path.name}.{mark}"))
    except OSError:
        for path, hidden in moved.items():
            hidden.rename(path)
        raise
    for hidden in moved.values():
        if hidden.is_dir() and not hidden.is_symlink():
            shutil.rmtree(hidden)
        else:
            hidden.unlink()


def _host() -> str:
    """Eight hex digits that identify this machine or container."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.\d{1,9}\.[a-z0-9_]{8}\.tmp")


def clear_abandoned(folder: Path) -> None:
    """Remove what killed processes left while they wrote into a folder; see `_clear_abandoned`."""
    found = [match[1] for entry in (folder.iterdir() if folder.is_dir() else ()) if (match := _TEMPORARY.fullmatch(entry.name))]
    for name in sorted({*found}):
        _clear_abandoned(folder / name)


def _clear_abandoned(path: Path) -> None:
    """Remove what killed processes left while they wrote a path; a folder they had moved aside goes back to its place."""
    found = ((entry, _TEMPORARY.fullmatch(entry.name)) for entry in path.parent.iterdir())
    for left in [entry for entry, match in found if match and match[1] == path.name]:
        if left.is_symlink() or not left.is_dir() or _may_be_written(left):
            continue
        if (left / "replaced").is_dir() and not path.exists():
            (left / "replaced").rename(path)
        shutil.rmtree(left, ignore_errors=True)


def _may_be_written(temporary: Path) -> bool:
    """Whether the process that made a temporary folder is alive or, on another machine, wrote within the last day."""
    import psutil

    host, pid = temporary.name.split(".")[-4:-2]
    try:
        if host != _host():
            return time.time() - max(part.lstat().st_mtime for part in (temporary, *temporary.rglob("*"))) < _DAY_S
        # After a container restarts, the same number may belong to another process.
        return psutil.Process(int(pid)).create_time() <= temporary.stat().st_mtime
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.AccessDenied:
        return True


def write_text(path: Path | str, text: str, *, overwrite: bool = True) -> None:
    """Write a text file, atomic and durable."""
    with atomic(path, overwrite=overwrite) as made, open(made, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def write_tensors(
    path: Path | str,
    tensors: Mapping[str, Tensor | StoredTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    codes: Mapping[str, str] | None = None,
    overwrite: bool = False,
    on_bytes: OnBytes = ignore,
) -> None:
    """Write a safetensors file, contiguous and durable, with one tensor in memory at a time.

    ``ValueError`` for what no reader would open: metadata that is not text, a precision the format does not have.
    codes: precision to write for the tensors named in it, as the format spells it; the others keep theirs.
    ``on_bytes(done, total)`` is called after each tensor.
    """
    metadata = {"format": "pt", **(metadata or {})}
    if odd := [name for name, value in metadata.items() if not (isinstance(name, str) and isinstance(value, str))]:
        raise ValueError(f"metadata {odd[0]!r} of {path} must be text, got {metadata[odd[0]]!r}")
    codes = {name: (codes or {}).get(name) or _code(tensor) for name, tensor in tensors.items()}
    # Every tensor is aligned to its own size; what is copied is read from one end of its file to the other.
    order = sorted(tensors, key=lambda name: (-_BYTES[codes[name]], *_source(tensors[name]), name))
    header: dict[str, dict[str, Any]] = {"__metadata__": metadata}
    offset = 0
    for name in order:
        end = offset + prod(tensors[name].shape) * _BYTES[codes[name]]
        header[name] = {"dtype": codes[name], "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    # A file name that is not UTF-8 puts lone surrogates into the metadata, which no reader accepts.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER_BYTES:
        raise ValueError(
            f"the header of {path} would have {len(text):,} bytes, more than {_LARGEST_HEADER_BYTES:,}; shorten the metadata"
        )
    with atomic(path, overwrite=overwrite) as made, open(made, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            _write(file, tensors[name], codes[name])
            on_bytes(header[name]["data_offsets"][1], offset)
        file.flush()
        os.fsync(file.fileno())


def _source(tensor: Tensor | StoredTensor) -> tuple[str, int]:
    """Where a tensor is read from."""
    return (str(tensor.path), tensor.offset) if isinstance(tensor, StoredTensor) else ("", 0)


def _code(tensor: Tensor | StoredTensor) -> str:
    """Precision of a tensor's values, as the format spells it."""
    if isinstance(tensor, StoredTensor):
        return "F16" if tensor.scale else tensor.code
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _TORCH.values():
        raise ValueError(f"tensors in {name} cannot be written; convert them to one of {', '.join(_TORCH.values())}")
    return next(code for code, theirs in _TORCH.items() if theirs == name)


def _write(file, tensor: Tensor | StoredTensor, code: str) -> None:
    if isinstance(tensor, StoredTensor) and tensor.as_stored and tensor.code == code:
        _copy_bytes(tensor, file)
        return
    import torch

    values = tensor.exact() if isinstance(tensor, StoredTensor) else tensor.detach()
    values = values.to("cpu", _dtype(code)).contiguous()
    file.write(values.reshape(-1).view(torch.uint8).numpy())


def _copy_bytes(tensor: StoredTensor, file) -> None:
    left, buffer = tensor.num_bytes, memoryview(bytearray(min(_CHUNK_BYTES, tensor.num_bytes)))
    with open(tensor.path, "rb", buffering=0) as source:
        source.seek(tensor.offset)
        while left:
            part = buffer[: min(left, len(buffer))]
            _fill(source, part)
            file.write(part)
            left -= len(part)


def zeros_like(tensor: Tensor | StoredTensor) -> Tensor:
    """Zeros of a tensor's shape and precision, on the CPU."""
    import torch

    return torch.zeros(tuple(tensor.shape), dtype=_dtype(_code(tensor)))
