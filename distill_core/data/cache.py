"""Latents and text embeddings on disk, each computed once.

A cache is a folder of shards and an index. A shard holds tensors, each named by its `key`, a hash of everything it was
computed from, and a checksum for each tensor. The index says which latent and which embedding form an example. A tensor in
a shard is never computed again, even if a run was interrupted, images were added or one of them changed; tensors that no
example uses any more stay until the folder is deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..base.documents import MAX_LIST_BYTES, expect, numbers, read_json
from ..base.locks import locked
from ..base.precision import DTYPES
from ..base.settings import check_choice
from ..base.storage import StoredTensor, ignore, read_header, write_tensors, write_text
from ..diffusion.conditioning import Caption, Label, pad, tile, tiled_length
from .dataset import Examples
from .encoders import Encoders, pads, warn_of_cut
from .images import ImageFile, Size, best_size, crop, fit

log = logging.getLogger("distill")

STORED = ("fp16", "fp32")
"""Precisions to store."""
SHARD_ENTRIES, SHARD_BYTES = 256, 64 << 20  # of a full shard, whichever comes first
OPEN_SHARDS = 256  # memory maps, not files: an open shard holds no file descriptor
_WAIT_S = 30
_INDEX, _FORMAT = "index.json", "distill cache 1"
_SHARD_NAME = re.compile(r"shard-[0-9a-f]{16}\.safetensors")


def key(*parts: Any) -> str:
    """Thirty-two hex digits that identify what a tensor was computed from: strings and numbers."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def text_key(caption: str, encoders: str, dtype: str) -> str:
    """Key of a caption's embedding; ``encoders`` is their fingerprint."""
    return key("text", caption, encoders, dtype)


def latent_key(content: str, encoders: str, dtype: str, size: Size, flip: bool = False) -> str:
    """Key of the latent of an image that was cropped to a size, and mirrored or not."""
    return key("latent", content, encoders, dtype, size, flip)


# --- shards ---------------------------------------------------------------------------------------------------------


def _shards_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("shard-*.safetensors") if _SHARD_NAME.fullmatch(file.name))


def _checksum(name: str, tensor: Tensor) -> int:
    """CRC-32 of a tensor with its name, precision and shape."""
    start = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, start)


class _Shards:
    """Tensors of the added shards, by name.

    A damaged shard is deleted, so that its tensors are computed again, and ``ValueError`` names it.
    """

    def __init__(self):
        self.tensors: dict[str, StoredTensor] = {}
        self._checksums: dict[str, int] = {}
        # A file that changed its size is opened again: reading a memory map beyond the end of its file kills the process.
        self._open = lru_cache(OPEN_SHARDS)(lambda path, num_bytes: safe_open(path, framework="pt"))

    def add(self, path: Path, verify: bool = False) -> None:
        """Add a shard by its header; verify: also read all of it."""
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
            # A copy, because an open memory map would prevent the deletion of a damaged file.
            tensor = self._open(path, path.stat().st_size).get_tensor(name).clone()
        except (FileNotFoundError, SafetensorError) as error:
            raise self._damaged(path) from error
        if _checksum(name, tensor) != checksum:
            raise self._damaged(path)
        return tensor

    def _damaged(self, path: Path) -> ValueError:
        self._open.cache_clear()
        path.unlink(missing_ok=True)
        return ValueError(f"{path} was damaged or missing and is deleted; start the run again to compute its contents again")


# --- reading --------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One example, as the keys of its parts."""

    latent: str
    text: str
    sizes: Sequence[int] | None = None
    """Original height and width, crop from top and left, target height and width in pixels; for SDXL."""
    source: str | None = None
    """What it shares with the examples made from the same image or prompt; None if there are no others."""


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Examples in the order of their keys, which is that of a dataset."""
    return sorted(entries, key=json.dumps)


def fingerprint_of(entries: Iterable[Entry], null: str | None, timesteps: Sequence[int] | None) -> str:
    """The fingerprint of a dataset of these examples, the empty caption's key, and the timesteps of states."""
    return key([entry[:3] for entry in in_order(entries)], null, timesteps)[:16]


class _Index(NamedTuple):
    examples: list[Entry]
    null: str | None
    timesteps: list[int] | None
    scales: tuple[float, float] | None
    """Lowest and highest guidance scale of the states; if they differ, each latent has its own scale beside it."""
    padded: bool
    """Whether its captions are `Caption.padded`."""


def _read_index(folder: Path) -> _Index:
    path = folder / _INDEX
    if not path.exists():
        raise ValueError(f"{folder} holds no finished cache; start the run that creates it again")
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
            raise ValueError("scales must be the lowest and the highest")
        padded = expect(index.get("padded", False), bool, "padded")
        return _Index(examples, null, timesteps, scales and tuple(map(float, scales)), padded)
    except ValueError as error:
        raise ValueError(f"{path} is not a valid cache index; choose another folder, or delete that file") from error


def _entry(parts: list) -> Entry:
    """An example as in the index: two keys, six sizes or nothing, and its source if others share it."""
    if not 2 <= len(parts) <= 4 or not all(isinstance(key, str) for key in (*parts[:2], *parts[3:])):
        raise ValueError("an example must name a latent and a text")
    entry = Entry(*parts)
    if entry.sizes is not None and len(_below_2_31(entry.sizes, "sizes")) != 6:
        raise ValueError("an example must have six sizes")
    return entry


def _below_2_31(value: Any, where: str) -> list[int]:
    """A list of whole numbers in the range of pixels and timesteps."""
    if not all(0 <= number < 2**31 for number in numbers(value, where, (int,))):
        raise ValueError(f"{where} are out of range")
    return value


class CachedDataset:
    """A `Dataset` on disk, with one bucket for each shape of latents; tensors are read on demand.

    Examples are sorted by their keys, so that equal fingerprints mean equal draws.
    """

    def __init__(self, folder: Path, shards: _Shards, index: _Index):
        self._shards, stored = shards, shards.tensors
        self.entries = in_order(index.examples)
        texts = {text for text in (index.null, *(entry.text for entry in self.entries)) if text is not None}
        self.scales = index.scales if index.timesteps else None
        self._each_scale = self.scales is not None and self.scales[0] < self.scales[1]
        scales = {f"{entry.latent}.scale" for entry in self.entries if self._each_scale}
        _check(folder, self.entries, texts, scales, index.timesteps, stored)
        buckets: dict[tuple[int, ...], list[Entry]] = {}
        for entry in self.entries:
            buckets.setdefault(stored[entry.latent].shape, []).append(entry)
        self._buckets = [buckets[shape] for shape in sorted(buckets)]
        lengths = {stored[text].shape[0] for text in texts}
        self._padded, self._num_tokens = index.padded, max(lengths) if index.padded else tiled_length(lengths)
        self._for_sdxl = f"{self.entries[0].text}.pooled" in stored
        self.bucket_sizes = [len(bucket) for bucket in self._buckets]
        self._sources = [_numbered([entry.source for entry in bucket]) for bucket in self._buckets]
        self.null = None if index.null is None else self._caption(index.null)
        self.timesteps = None if index.timesteps is None else torch.tensor(index.timesteps)
        self.fingerprint = fingerprint_of(self.entries, index.null, index.timesteps)

    @classmethod
    def open(cls, folder: Path | str) -> CachedDataset:
        """A finished cache; ``ValueError`` if it is not finished, or if its headers show damage."""
        folder = Path(folder)
        index, shards = _read_index(folder), _Shards()
        for path in _shards_in(folder):
            shards.add(path)
        return cls(folder, shards, index)

    def sources(self, bucket: int) -> Tensor | None:
        return self._sources[bucket]

    def read(self, bucket: int, picked: Tensor) -> Examples:
        """Examples as they are stored; a damaged shard is deleted, and ``ValueError`` names it."""
        entries = [self._buckets[bucket][number] for number in picked.tolist()]
        contexts, pooled, _ = zip(*(self._caption(entry.text) for entry in entries), strict=True)
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
        stretch = pad if self._padded else tile
        return Caption(stretch(self._shards.read(text), self._num_tokens), pooled, self._padded)


def _numbered(sources: Sequence[str | None]) -> Tensor | None:
    """A number for each source, of those that are None one each; None if all are."""
    if not any(sources):
        return None
    numbers: dict[str | int, int] = {}
    return torch.tensor([numbers.setdefault(source or place, len(numbers)) for place, source in enumerate(sources)])


def _check(
    folder: Path,
    entries: list[Entry],
    texts: set[str],
    scales: set[str],
    timesteps: list | None,
    stored: dict[str, StoredTensor],
) -> None:
    """``ValueError`` unless everything is present and consistent."""
    if not entries:
        raise ValueError(f"{folder} holds no examples; a dataset needs at least one")
    if missing := ({entry.latent for entry in entries} | texts | scales) - stored.keys():
        raise ValueError(f"{folder} lacks {len(missing)} latents or embeddings; start the run again to compute them")
    for what, names, rank in (("latent", {entry.latent for entry in entries}, 3), ("embedding", texts, 2)):
        if odd := [name for name in names if len(stored[name].shape) != rank or not all(stored[name].shape)]:
            raise ValueError(
                f"{folder} has a {what} of invalid shape {list(stored[odd[0]].shape)}; create the dataset again in another folder"
            )
    states = (stored.get(f"{entry.latent}.states") for entry in entries)
    kinds: dict[str, set] = {
        "width of embeddings": {stored[text].shape[1] for text in texts},
        "kind of embeddings, SDXL's and others": {getattr(stored.get(f"{text}.pooled"), "shape", None) for text in texts},
        "number of states": {tensor and tensor.shape[:1] for tensor in states}
        | {None if timesteps is None else (len(timesteps),)},
    }
    for what, found in kinds.items():
        if len(found) > 1:
            raise ValueError(f"the examples of {folder} differ in their {what}; create them again in another folder")
    if f"{entries[0].text}.pooled" in stored and any(entry.sizes is None for entry in entries):
        raise ValueError(f"the examples of {folder} are for SDXL and need sizes; create them again in another folder")


# --- writing --------------------------------------------------------------------------------------------------------


class CacheWriter:
    """Adds new entries to a cache, one shard at a time.

    dtype: precision to store, one of `STORED`. verify: read everything, not only the headers, to find damage. padded: whether
    captions are `Caption.padded`.
    Damaged shards are deleted with a warning. ``ValueError`` if the folder holds other files and is not a cache.
    Use `writing` if another process may write too.
    """

    def __init__(self, folder: Path | str, *, dtype: str = "fp16", verify: bool = False, padded: bool = False):
        check_choice(dtype, STORED, "unknown dtype of a cache")
        self.folder, self.dtype, self._padded = Path(folder), dtype, padded
        _check_ours(self.folder)
        self._shards, self._num_waiting = _Shards(), 0
        self._waiting: dict[str, Tensor] = {}
        for path in _shards_in(self.folder):
            try:
                self._shards.add(path, verify)
            except ValueError as error:
                log.warning("%s", error)

    @property
    def num_bytes(self) -> int:
        """Bytes of all written tensors."""
        return sum(tensor.num_bytes for tensor in self._shards.tensors.values())

    def has(self, key: str) -> bool:
        return key in self._shards.tensors or key in self._waiting

    def add_text(self, key: str, caption: Caption) -> None:
        """Add the embedding of a caption."""
        self._add({key: caption.context, f"{key}.pooled": caption.pooled})

    def add_latent(self, key: str, latent: Tensor, states: Tensor | None = None, scale: Tensor | None = None) -> None:
        """Add a clean latent (C, H, W), the noisy states on the way to it (K, C, H, W), and their guidance scale, ()."""
        self._add({key: latent, f"{key}.states": states, f"{key}.scale": scale})

    def caption(self, key: str) -> Caption:
        """An embedding that was added, now or before, as it is stored."""
        context, pooled = (
            self._waiting.get(name) if name not in self._shards.tensors else self._shards.read(name)
            for name in (key, f"{key}.pooled")
        )
        assert context is not None
        return Caption(context, pooled, self._padded)

    def _add(self, tensors: dict[str, Tensor | None]) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                self._waiting[name] = self._stored(tensor)
        self._num_waiting += 1
        num_bytes = sum(tensor.nbytes for tensor in self._waiting.values())
        if self._num_waiting >= SHARD_ENTRIES or num_bytes >= SHARD_BYTES:
            self.flush()

    def _stored(self, tensor: Tensor) -> Tensor:
        dtype = DTYPES[self.dtype] if tensor.ndim else torch.float32  # a scale is one number, kept in full
        if tensor.dtype == torch.bfloat16:  # of a text encoder; it may overflow in fp16, and has no more digits
            dtype = torch.bfloat16
        stored = tensor.detach().to("cpu", dtype).contiguous()
        if not stored.isfinite().all():
            raise ValueError(
                f"a latent or an embedding overflows in {self.dtype} (NaN or Inf); run the encoders in float32, or store fp32"
            )
        return stored

    def flush(self) -> None:
        """Write the entries that wait for a full shard."""
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
        """Write the index: these examples, the key of the empty caption, the timesteps and the guidance scales of states.

        It replaces the existing index; to add to that, include its examples, which are `CachedDataset.entries`.
        """
        self.flush()
        entries = list(entries)
        timesteps = None if timesteps is None else [int(t) for t in timesteps]
        num_of = Counter(entry.source for entry in entries)
        index: dict[str, Any] = {
            "format": _FORMAT,
            "null": null,
            "timesteps": timesteps,
            "scales": scales,
            "examples": [entry if entry.source and num_of[entry.source] > 1 else entry[:3] for entry in entries],
        }
        if self._padded:
            index["padded"] = True
        write_text(self.folder / _INDEX, json.dumps(index))
        return CachedDataset.open(self.folder)


@contextlib.contextmanager
def writing(folder: Path | str, *, dtype: str = "fp16", verify: bool = False, padded: bool = False) -> Iterator[CacheWriter]:
    """Lock a cache's folder while adding to it, as in `CacheWriter`; waiting entries are written at the end, however it ends.

    ``ValueError`` if another process holds the folder for longer than half a minute.
    """
    _check_ours(Path(folder))
    with locked(Path(folder), wait_s=_WAIT_S):
        writer = CacheWriter(folder, dtype=dtype, verify=verify, padded=padded)
        try:
            yield writer
        finally:
            writer.flush()


def _check_ours(folder: Path) -> None:
    """``ValueError`` for a folder that is neither empty nor a cache, finished or begun."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder for the cache")
    if (folder / _INDEX).exists():
        _read_index(folder)
        return
    others = [path.name for path in folder.glob("*") if not path.name.startswith(".")]
    if others := sorted(name for name in others if not _SHARD_NAME.fullmatch(name)):
        raise ValueError(f"{folder} holds other files, such as {others[0]}, and no cache; choose an empty or a new folder")


class _Queue:
    """Items that are encoded as soon as they fill a batch, by key."""

    def __init__(self, batch_size: int, encode: Callable[[dict[str, Any]], None]):
        self._batch_size, self._encode = batch_size, encode
        self._waiting: dict[str, Any] = {}

    def add(self, key: str, thing: Any) -> None:
        self._waiting[key] = thing
        if len(self._waiting) >= self._batch_size:
            self.empty()

    def empty(self) -> None:
        if self._waiting:
            self._encode(self._waiting)
            self._waiting = {}


def encode(
    images: Sequence[ImageFile],
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
    """Dataset of images and captions, with the empty caption; only what is not in the folder yet is encoded.

    sizes: each image is cropped to the size nearest its shape. flip: also store each image mirrored. dtype, verify: as in
    `CacheWriter`. ``on_item(done, total)`` is called after each image. If it is interrupted, encoded items stay.
    """
    with writing(folder, dtype=dtype, verify=verify, padded=pads(encoders)) as writer:
        return _encode(writer, images, encoders, sizes, batch_size, flip, on_item)


def _encode(
    writer: CacheWriter,
    images: Sequence[ImageFile],
    encoders: Encoders,
    sizes: Sequence[Size],
    batch_size: int,
    flip: bool,
    on_item: Callable[[int, int], None],
) -> CachedDataset:
    """`encode`, once the folder is locked."""

    def encode_texts(captions: dict[str, str]) -> None:
        for name, caption in zip(captions, encoders.captions([*captions.values()]), strict=True):
            writer.add_text(name, caption)

    def encode_images(size: Size, cropped: dict[str, tuple[ImageFile, bool]]) -> None:
        pixels = [(fit(image.open(), size).pixels, mirrored) for image, mirrored in cropped.values()]
        latents = encoders.latents(torch.stack([one.flip(-1) if mirrored else one for one, mirrored in pixels]))
        for name, latent in zip(cropped, latents, strict=True):
            writer.add_latent(name, latent)

    def named(caption: str) -> str:
        name = text_key(caption, encoders.fingerprint, writer.dtype)
        if not writer.has(name):
            texts.add(name, caption)
        return name

    captions = {image.caption for image in images}
    warn_of_cut([text for text in captions if not writer.has(text_key(text, encoders.fingerprint, writer.dtype))], encoders)
    texts = _Queue(batch_size, encode_texts)
    queues = {size: _Queue(batch_size, partial(encode_images, size)) for size in sizes}
    entries, null, num_enlarged = [], named(""), 0
    for number, image in enumerate(images, 1):
        content, original = image.content(), image.size()
        size = best_size(original, sizes)
        num_enlarged += original[0] < size[0] or original[1] < size[1]
        for mirrored in (False, True) if flip else (False,):
            name = latent_key(content, encoders.fingerprint, writer.dtype, size, mirrored)
            if not writer.has(name):
                queues[size].add(name, (image, mirrored))
            source = latent_key(content, encoders.fingerprint, writer.dtype, size)
            entries.append(Entry(name, named(image.caption), crop(original, size).sizes, source))
        on_item(number, len(images))
    for queue in (texts, *queues.values()):
        queue.empty()
    if num_enlarged:
        log.warning("%d of %d images are smaller than their training size, and are enlarged", num_enlarged, len(images))
    return writer.finish(entries, null)
