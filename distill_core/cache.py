"""Latents and text embeddings on disk, each computed once.

A cache is a folder of shards and an index. A shard holds tensors, each named by its `key`, a hash of all it was computed
from, and beside each tensor a checksum. The index says which latent and which embedding make an example. What stands in a
shard is never computed again, whether a run was interrupted, pictures were added or only one of them changed; what no
example names any more stays, until the folder is deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .dataset import Caption, Examples, tile
from .denoiser import Label
from .documents import MAX_LIST_BYTES, expect, numbers, read_json
from .encoders import Encoders, warn_of_cut
from .images import Picture, Size, best_size, crop, fit
from .locks import locked
from .storage import StoredTensor, ignore, read_header, write_tensors, write_text

log = logging.getLogger("distill")

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
"""Precisions to store."""
MAX_TOKENS = 60 * 77
"""Longest embedding captions of different lengths may need to become equally long: enough for lengths of 1 to 6 times 77."""
SHARD_ENTRIES, SHARD_BYTES = 256, 64 << 20  # of a full shard, whichever comes first
OPEN_SHARDS = 256  # memory maps, not files: an open shard holds no file descriptor
_WAIT_S = 30
_INDEX, _FORMAT = "index.json", "distill cache 1"
_SHARD_NAME = re.compile(r"shard-[0-9a-f]{16}\.safetensors")


def key(*parts: Any) -> str:
    """Thirty-two hex digits that stand for what a tensor was computed from: strings and numbers."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def text_key(caption: str, encoders: str, dtype: str) -> str:
    """Key of a caption's embedding; ``encoders`` is their fingerprint."""
    return key("text", caption, encoders, dtype)


def latent_key(content: str, encoders: str, dtype: str, size: Size, flip: bool = False) -> str:
    """Key of the latent of a picture that was cropped to a size, and mirrored or not."""
    return key("latent", content, encoders, dtype, size, flip)


# --- shards ---------------------------------------------------------------------------------------------------------


def _shards_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("shard-*.safetensors") if _SHARD_NAME.fullmatch(file.name))


def _checksum(name: str, tensor: Tensor) -> int:
    """CRC-32 of a tensor with its name, precision and shape."""
    start = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), start)


class _Shards:
    """Tensors of the shards that were added, by name.

    A damaged shard is deleted, so that nothing in it is taken for computed, and ``ValueError`` names it.
    """

    def __init__(self):
        self.tensors: dict[str, StoredTensor] = {}
        self._checksums: dict[str, int] = {}
        # A file that changed its size is opened anew: reading a memory map beyond the end of its file ends the process.
        self._open = lru_cache(OPEN_SHARDS)(lambda path, num_bytes: safe_open(path, framework="pt"))

    def add(self, path: Path, verify: bool = False) -> None:
        """Take in a shard by its header; verify: read all of it too."""
        try:
            tensors, metadata = read_header(path)
            checksums = {name: int(metadata[name]) for name in tensors}
        except (ValueError, KeyError) as error:
            raise self._damaged(path) from error
        for name in tensors if verify else ():
            self._read(path, name, checksums[name])
        self.tensors |= tensors
        self._checksums |= checksums

    def read(self, name: str) -> Tensor:
        return self._read(self.tensors[name].path, name, self._checksums[name])

    def _read(self, path: Path, name: str, checksum: int) -> Tensor:
        try:
            # A copy: no memory map is left that would keep a damaged file from being deleted.
            tensor = self._open(path, path.stat().st_size).get_tensor(name).clone()
        except (FileNotFoundError, SafetensorError) as error:
            raise self._damaged(path) from error
        if _checksum(name, tensor) != checksum:
            raise self._damaged(path)
        return tensor

    def _damaged(self, path: Path) -> ValueError:
        self._open.cache_clear()
        path.unlink(missing_ok=True)
        return ValueError(f"{path} was damaged or missing and is deleted; a new start of the run makes anew what was in it")


# --- reading --------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One example, by the keys of its parts."""

    latent: str
    text: str
    sizes: Sequence[int] | None = None
    """Original height and width, crop from top and left, target height and width in pixels; for SDXL."""


class _Index(NamedTuple):
    examples: list[Entry]
    null: str | None
    timesteps: list[int] | None
    scales: tuple[float, float] | None
    """Least and largest scale of guidance that states were drawn with; where they differ, each latent has its own beside it."""


def _read_index(folder: Path) -> _Index:
    path = folder / _INDEX
    if not path.exists():
        raise ValueError(f"{folder} holds no finished cache; start the run that makes it again")
    try:
        index = read_json(path, max_bytes=MAX_LIST_BYTES)
        if index.get("format") != _FORMAT:
            raise ValueError(f"its format is {index.get('format')!r}")
        examples = [_entry(expect(entry, list, "an example")) for entry in expect(index.get("examples"), list, "examples")]
        null, timesteps, scales = (index.get(name) for name in ("null", "timesteps", "scales"))
        if null is not None:
            expect(null, str, "null")
        if timesteps is not None:
            _below_2_31(timesteps, "timesteps")
        if scales is not None and (len(numbers(scales, "scales")) != 2 or not scales[0] <= scales[1]):
            raise ValueError("scales must be the least and the largest")
        return _Index(examples, null, timesteps, scales and tuple(map(float, scales)))
    except ValueError as error:
        raise ValueError(
            f"{path} is not the index of a cache, or is damaged; choose another folder, or delete that file"
        ) from error


def _entry(parts: list) -> Entry:
    """An example as the index has it: two keys, and six sizes or nothing."""
    if len(parts) not in (2, 3) or not all(isinstance(key, str) for key in parts[:2]):
        raise ValueError("an example must name a latent and a text")
    entry = Entry(*parts)
    if entry.sizes is not None and len(_below_2_31(entry.sizes, "sizes")) != 6:
        raise ValueError("an example has six sizes")
    return entry


def _below_2_31(value: Any, where: str) -> list[int]:
    """A list of whole numbers, as pixels and timesteps are."""
    if not all(0 <= number < 2**31 for number in numbers(value, where, (int,))):
        raise ValueError(f"{where} are out of range")
    return value


class CachedDataset:
    """A `Dataset` on disk, with one bucket for each shape of latents; a tensor is read when it is asked for.

    Examples are in the order of their keys, so that equal fingerprints mean equal draws.
    """

    def __init__(self, folder: Path, shards: _Shards, index: _Index):
        self._shards, stored = shards, shards.tensors
        self.entries = sorted(index.examples, key=json.dumps)
        texts = {entry.text for entry in self.entries} | ({index.null} - {None})
        self.scales = index.scales if index.timesteps else None
        self._each_scale = self.scales is not None and self.scales[0] < self.scales[1]
        scales = {f"{entry.latent}.scale" for entry in self.entries if self._each_scale}
        _check(folder, self.entries, texts, scales, index.timesteps, stored)
        buckets: dict[tuple[int, ...], list[Entry]] = {}
        for entry in self.entries:
            buckets.setdefault(stored[entry.latent].shape, []).append(entry)
        self._buckets = [buckets[shape] for shape in sorted(buckets)]
        self._num_tokens = _common_length({stored[text].shape[0] for text in texts})
        self._for_sdxl = f"{self.entries[0].text}.pooled" in stored
        self.bucket_sizes = [len(bucket) for bucket in self._buckets]
        self.null = None if index.null is None else self._caption(index.null)
        self.timesteps = None if index.timesteps is None else torch.tensor(index.timesteps)
        self.fingerprint = key(self.entries, index.null, index.timesteps)[:16]

    @classmethod
    def open(cls, folder: Path | str) -> CachedDataset:
        """A finished cache; ``ValueError`` if it is not finished, or damaged as far as headers tell."""
        folder = Path(folder)
        index, shards = _read_index(folder), _Shards()
        for path in _shards_in(folder):
            shards.add(path)
        return cls(folder, shards, index)

    def read(self, bucket: int, picked: Tensor) -> Examples:
        """Examples as they are stored; ``ValueError`` names a shard that turns out to be damaged, and deletes it."""
        entries = [self._buckets[bucket][number] for number in picked.tolist()]
        contexts, pooled = zip(*(self._caption(entry.text) for entry in entries), strict=True)
        label = states = scale = None
        if self._for_sdxl:
            label = Label(torch.stack(pooled), torch.tensor([entry.sizes for entry in entries], dtype=torch.float32))
        if self.timesteps is not None:
            states = torch.stack([self._shards.read(f"{entry.latent}.states") for entry in entries])
        if self._each_scale:
            scale = torch.stack([self._shards.read(f"{entry.latent}.scale") for entry in entries])
        elif self.scales is not None:
            scale = torch.full((len(entries),), self.scales[0])
        latents = torch.stack([self._shards.read(entry.latent) for entry in entries])
        return Examples(latents, torch.stack(contexts), label, states, scale)

    def _caption(self, text: str) -> Caption:
        pooled = self._shards.read(f"{text}.pooled") if self._for_sdxl else None
        return Caption(tile(self._shards.read(text), self._num_tokens), pooled)


def _check(
    folder: Path,
    entries: list[Entry],
    texts: set[str],
    scales: set[str],
    timesteps: list | None,
    stored: dict[str, StoredTensor],
) -> None:
    """``ValueError`` unless everything is there and of one kind."""
    if not entries:
        raise ValueError(f"{folder} holds no examples; a dataset needs at least one")
    if missing := ({entry.latent for entry in entries} | texts | scales) - stored.keys():
        raise ValueError(f"{folder} lacks {len(missing)} latents or embeddings; start the run again, which makes them anew")
    for what, names, rank in (("latent", {entry.latent for entry in entries}, 3), ("embedding", texts, 2)):
        if odd := [name for name in names if len(stored[name].shape) != rank or not all(stored[name].shape)]:
            raise ValueError(
                f"{folder} has a {what} of shape {list(stored[odd[0]].shape)}, which is none; make it anew in another folder"
            )
    states = (stored.get(f"{entry.latent}.states") for entry in entries)
    for what, found in {
        "width of embeddings": {stored[text].shape[1] for text in texts},
        "kind of embeddings, SDXL's and others": {getattr(stored.get(f"{text}.pooled"), "shape", None) for text in texts},
        "number of states": {tensor and tensor.shape[:1] for tensor in states}
        | {None if timesteps is None else (len(timesteps),)},
    }.items():
        if len(found) > 1:
            raise ValueError(f"the examples of {folder} do not agree in their {what}; make them anew in another folder")
    if f"{entries[0].text}.pooled" in stored and any(entry.sizes is None for entry in entries):
        raise ValueError(f"the examples of {folder} are for SDXL and need sizes; make them anew in another folder")


def _common_length(lengths: set[int]) -> int:
    """The number of tokens that embeddings of some lengths are tiled to."""
    if (length := lcm(*lengths)) > MAX_TOKENS:
        raise ValueError(
            f"captions of {sorted(lengths)} tokens are equally long only at {length:,}, more than {MAX_TOKENS:,}; shorten the "
            "longest captions"
        )
    return length


# --- writing --------------------------------------------------------------------------------------------------------


class CacheWriter:
    """Adds to a cache what is not in it yet, a shard at a time.

    dtype: precision to store, a key of `DTYPES`. verify: read all that is there, and not only the headers, to find damage.
    Damaged shards are deleted with a warning. ``ValueError`` if the folder holds other things and is no cache.
    Where another process may write too, use `writing`.
    """

    def __init__(self, folder: Path | str, *, dtype: str = "fp16", verify: bool = False):
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r} for a cache; choose from {sorted(DTYPES)}")
        self.folder, self.dtype = Path(folder), dtype
        _check_ours(self.folder)
        self._shards, self._waiting, self._num_waiting = _Shards(), {}, 0
        for path in _shards_in(self.folder):
            try:
                self._shards.add(path, verify)
            except ValueError as error:
                log.warning("%s", error)

    @property
    def num_bytes(self) -> int:
        """Of all that is written."""
        return sum(tensor.num_bytes for tensor in self._shards.tensors.values())

    def has(self, key: str) -> bool:
        return key in self._shards.tensors or key in self._waiting

    def add_text(self, key: str, caption: Caption) -> None:
        """The embedding of a caption."""
        self._add({key: caption.context, f"{key}.pooled": caption.pooled})

    def add_latent(self, key: str, latent: Tensor, states: Tensor | None = None, scale: Tensor | None = None) -> None:
        """A clean latent (C, H, W), the noisy states on the way to it (K, C, H, W), and the scale of guidance they had, ()."""
        self._add({key: latent, f"{key}.states": states, f"{key}.scale": scale})

    def caption(self, key: str) -> Caption:
        """An embedding that was added, now or before, as it is stored."""
        context, pooled = (
            self._waiting.get(name) if name not in self._shards.tensors else self._shards.read(name)
            for name in (key, f"{key}.pooled")
        )
        return Caption(context, pooled)

    def _add(self, tensors: dict[str, Tensor | None]) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                self._waiting[name] = self._stored(tensor)
        self._num_waiting += 1
        num_bytes = sum(tensor.nbytes for tensor in self._waiting.values())
        if self._num_waiting >= SHARD_ENTRIES or num_bytes >= SHARD_BYTES:
            self.flush()

    def _stored(self, tensor: Tensor) -> Tensor:
        dtype = DTYPES[self.dtype] if tensor.ndim else torch.float32  # a scale is one number, and is learnt to the last digit
        stored = tensor.detach().to("cpu", dtype).contiguous()
        if not stored.isfinite().all():
            raise ValueError(
                f"a latent or an embedding holds numbers that are not finite in {self.dtype}; run the encoders in float32, "
                "or store fp32"
            )
        return stored

    def flush(self) -> None:
        """Write what waits for a full shard."""
        if self._waiting:
            path = self.folder / f"shard-{key(*sorted(self._waiting))[:16]}.safetensors"
            checksums = {name: str(_checksum(name, tensor)) for name, tensor in self._waiting.items()}
            write_tensors(path, self._waiting, checksums, overwrite=True)
            self._shards.add(path)
            self._waiting, self._num_waiting = {}, 0

    def finish(
        self,
        entries: Iterable[Entry],
        null: str | None,
        timesteps: Iterable[int] | None = None,
        scales: tuple[float, float] | None = None,
    ) -> CachedDataset:
        """Write the index: these examples, the key of the empty caption, the timesteps of states and the scales of their guidance.

        It replaces the index there was; to add to that, name its examples too, which are `CachedDataset.entries`.
        """
        self.flush()
        timesteps = None if timesteps is None else [int(t) for t in timesteps]
        index = {"format": _FORMAT, "null": null, "timesteps": timesteps, "scales": scales, "examples": [*entries]}
        write_text(self.folder / _INDEX, json.dumps(index))
        return CachedDataset.open(self.folder)


@contextlib.contextmanager
def writing(folder: Path | str, *, dtype: str = "fp16", verify: bool = False) -> Iterator[CacheWriter]:
    """Hold a cache's folder while adding to it, as in `CacheWriter`; at the end what waits is written, however it ends.

    ``ValueError`` if another process writes in it for longer than it takes to see that nothing is missing.
    """
    _check_ours(Path(folder))
    with locked(Path(folder), wait_s=_WAIT_S):
        writer = CacheWriter(folder, dtype=dtype, verify=verify)
        try:
            yield writer
        finally:
            writer.flush()


def _check_ours(folder: Path) -> None:
    """``ValueError`` for a folder that is no cache, finished or begun, and not empty either."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder for the cache")
    if (folder / _INDEX).exists():
        _read_index(folder)
        return
    others = [path.name for path in folder.glob("*") if not path.name.startswith(".")]
    if others := sorted(name for name in others if not _SHARD_NAME.fullmatch(name)):
        raise ValueError(f"{folder} holds other things, such as {others[0]}, and no cache; choose an empty or a new folder")


class _Queue:
    """Things that are encoded as soon as there is a batch of them, by key."""

    def __init__(self, batch_size: int, encode: Callable[[dict[str, Any]], None]):
        self._batch_size, self._encode, self._waiting = batch_size, encode, {}

    def add(self, key: str, thing: Any) -> None:
        self._waiting[key] = thing
        if len(self._waiting) >= self._batch_size:
            self.empty()

    def empty(self) -> None:
        if self._waiting:
            self._encode(self._waiting)
            self._waiting = {}


def encode(
    pictures: Sequence[Picture],
    encoders: Encoders,
    sizes: Sequence[Size],
    folder: Path | str,
    *,
    batch_size: int = 8,
    flip: bool = False,
    dtype: str = "fp16",
    verify: bool = False,
    on_item: Callable[[int, int], None] = ignore,
) -> CachedDataset:
    """Pictures and captions as a dataset, with the empty caption; only what is not in the folder yet is encoded.

    sizes: each picture is cropped to the one nearest its shape. flip: each picture also comes mirrored. dtype, verify: as
    in `CacheWriter`. ``on_item(done, total)`` is called after each picture. If it is interrupted, what was encoded stays.
    """
    with writing(folder, dtype=dtype, verify=verify) as writer:
        return _encode(writer, pictures, encoders, sizes, batch_size, flip, on_item)


def _encode(
    writer: CacheWriter,
    pictures: Sequence[Picture],
    encoders: Encoders,
    sizes: Sequence[Size],
    batch_size: int,
    flip: bool,
    on_item: Callable[[int, int], None],
) -> CachedDataset:
    """What `encode` does, once the folder is held."""

    def encode_texts(captions: dict[str, str]) -> None:
        for name, caption in zip(captions, encoders.captions([*captions.values()]), strict=True):
            writer.add_text(name, caption)

    def encode_pictures(size: Size, cropped: dict[str, tuple[Picture, bool]]) -> None:
        pixels = [(fit(picture.open(), size).pixels, mirrored) for picture, mirrored in cropped.values()]
        latents = encoders.latents(torch.stack([one.flip(-1) if mirrored else one for one, mirrored in pixels]))
        for name, latent in zip(cropped, latents, strict=True):
            writer.add_latent(name, latent)

    def named(caption: str) -> str:
        name = text_key(caption, encoders.fingerprint, writer.dtype)
        if not writer.has(name):
            texts.add(name, caption)
        return name

    captions = {picture.caption for picture in pictures}
    warn_of_cut([text for text in captions if not writer.has(text_key(text, encoders.fingerprint, writer.dtype))], encoders)
    texts = _Queue(batch_size, encode_texts)
    queues = {size: _Queue(batch_size, partial(encode_pictures, size)) for size in sizes}
    entries, null, num_enlarged = [], named(""), 0
    for number, picture in enumerate(pictures, 1):
        content, original = picture.content(), picture.size()
        size = best_size(original, sizes)
        num_enlarged += original[0] < size[0] or original[1] < size[1]
        for mirrored in (False, True) if flip else (False,):
            name = latent_key(content, encoders.fingerprint, writer.dtype, size, mirrored)
            if not writer.has(name):
                queues[size].add(name, (picture, mirrored))
            entries.append(Entry(name, named(picture.caption), crop(original, size).sizes))
        on_item(number, len(pictures))
    for queue in (texts, *queues.values()):
        queue.empty()
    if num_enlarged:
        log.warning("%d of %d pictures are smaller than what they are trained at, and are enlarged", num_enlarged, len(pictures))
    return writer.finish(entries, null)
