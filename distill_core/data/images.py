"""Training images with their captions, and the sizes they are cropped to.

Sizes are (height, width) in pixels. An image is never stretched: it is resized to cover a size of about its own shape, and
the excess is cropped evenly.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..base.documents import json_lines, one_line, read_bytes, read_csv, read_text
from ..base.settings import check_choice, meant

log = logging.getLogger("distill")

Size = tuple[int, int]
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
MAX_PIXELS = 1 << 26
"""Largest image, 8192 x 8192: decoded, turned and flattened it takes one to two GiB. A 60-megapixel camera stays below."""
MAX_IMAGE_BYTES = 512 << 20
"""Largest image file: that many pixels take this size uncompressed, 64 bits each."""
_CAPTION_COLUMNS = ("text", "caption")
_LISTS = {"metadata.csv": read_csv, "metadata.jsonl": json_lines}
_CAPTION_SUFFIXES = (".caption", ".csv", ".json", ".jsonl", ".txt")
_MAX_SIZES_CHARS = 1000
_REPEATS = re.compile(r"[0-9]{1,3}_")
"""Start of a folder's name that gives the number of repeats in kohya's trainer."""
_SIDE_STEP_PX = 8  # one latent pixel of every Stable Diffusion autoencoder


# --- where images come from -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFile:
    """A stored image and its caption; the image is read on demand.

    ``ValueError`` names the image if it cannot be read.
    """

    name: str
    """Its name in errors."""
    caption: str
    read: Callable[[], bytes]
    """Returns the image as it is stored: a PNG, a JPEG, ..."""

    def content(self) -> str:
        """The sha256 of the stored bytes, which identifies the image."""
        with self._naming():
            return hashlib.sha256(self.read()).hexdigest()

    def size(self) -> Size:
        """Height and width when upright, without decoding the image."""
        with self._naming():
            image = self._stored()
            return image.size if _orientation(image) >= 5 else image.size[::-1]

    def open(self) -> Image.Image:
        """The image upright, in RGB, on white where it is transparent."""
        with self._naming():
            image = self._stored()
            return _rgb(ImageOps.exif_transpose(image) if _orientation(image) > 1 else image)

    def _stored(self) -> Image.Image:
        """The image, not decoded yet. No other format is tried: EPS runs Ghostscript, and others may unpack without end."""
        image = Image.open(io.BytesIO(self.read()), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        return image

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except Image.DecompressionBombError as error:
            raise ValueError(f"{self.name} has more than {MAX_PIXELS:,} pixels; make it smaller, or remove it") from error
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            reason = "it is not a BMP, JPEG, PNG or WebP" if isinstance(error, UnidentifiedImageError) else one_line(error)
            raise ValueError(f"{self.name} cannot be read as an image ({reason}); replace or remove it") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1..8; 5 and above lie on their side."""
    # A PNG's own getexif would decode all of it, to look for EXIF behind the pixels.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def folder(path: Path | str) -> list[ImageFile]:
    """Images in a folder and its subfolders, sorted by name; names that start with a dot are skipped.

    A caption comes from the text file of the same name, or from ``metadata.csv`` or ``metadata.jsonl`` at the top with
    columns ``file_name`` and ``text`` or ``caption``, as Hugging Face lays out image folders; else it is empty, with a
    warning. ``ValueError`` if there is no image or captions cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give the folder that holds the training images")
    files = [file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
    names = sorted(file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))
    if not names:
        raise ValueError(f"{path} holds no images; add files that end in {', '.join(SUFFIXES)}")
    listed = _listed_captions(path)
    if lost := listed.keys() - set(names):
        log.warning("the metadata of %s lists %d images that do not exist, such as %s", path, len(lost), min(lost))
    captions = [_caption_beside(path / name, listed.get(name)) for name in names]
    _warn_of_missing(captions, path)
    _warn_of_unused(path, names)
    return [
        ImageFile(str(path / name), caption or "", partial(read_bytes, path / name, MAX_IMAGE_BYTES))
        for name, caption in zip(names, captions, strict=True)
    ]


def _caption_beside(file: Path, otherwise: str | None) -> str | None:
    beside = file.with_suffix(".txt")
    return read_text(beside).strip() if beside.exists() else otherwise


def _warn_of_unused(folder: Path, names: Sequence[str]) -> None:
    """Warn once of files that other trainers read and this one does not."""
    stems = {Path(name).with_suffix("").as_posix() for name in names}
    used = {f"{stem}.txt" for stem in stems} | {name for name in _LISTS}
    others = (file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in _CAPTION_SUFFIXES)
    unused = sorted(name.as_posix() for name in others if name.as_posix() not in used and _is_caption(name, stems))
    repeats = sorted({part for name in names for part in Path(name).parts[:-1] if _REPEATS.match(part)})
    parts = [f"{len(unused)} caption files are not read, such as {unused[0]}"] if unused else []
    parts += [f"repeats are not applied, as in {repeats[0]}"] if repeats else []
    if parts:
        log.warning(
            "in %s %s; captions are read from .txt files named like the images, or from metadata.csv or .jsonl at the top",
            folder,
            "; ".join(parts),
        )


def _is_caption(name: Path, stems: Collection[str]) -> bool:
    """Whether a file lists captions, or is named after an image: ``cat.caption``, ``cat.caption.txt``, ``cat.png.txt``."""
    stem = name.with_suffix("")
    while stem.suffix and stem.as_posix() not in stems:
        stem = stem.with_suffix("")
    hidden = any(part.startswith(".") for part in name.parts)
    return not hidden and (name.name in _LISTS or stem.as_posix() in stems)


def _warn_of_missing(captions: Sequence[str | None], where: Path) -> None:
    if missing := sum(caption is None for caption in captions):
        log.warning("%d of %d images in %s have no caption; they get an empty one", missing, len(captions), where)


def _listed_captions(folder: Path) -> dict[str, str | None]:
    """Captions by file name from the metadata at the top of a folder."""
    captions: dict[str, str | None] = {}
    for listing, read in _LISTS.items():
        file = folder / listing
        for number, row in enumerate(read(file) if file.exists() else (), 1):
            column = next((column for column in _CAPTION_COLUMNS if column in row), None)
            if not isinstance(row.get("file_name"), str) or column is None:
                raise ValueError(
                    f"{file}: entry {number} must have file_name and text or caption, got {one_line(', '.join(row)) or 'nothing'}"
                )
            name = PurePosixPath(row["file_name"].replace("\\", "/")).as_posix()
            captions[name] = row[column].strip() if isinstance(row[column], str) else None
    return captions


def hugging_face(
    path: Path | str, split: str = "train", image_column: str = "image", caption_column: str = "text"
) -> list[ImageFile]:
    """Images of a local Hugging Face data set: one that was saved to disk, or a downloaded repository.

    Nothing is downloaded. The ``datasets`` library keeps its own copy of a repository in its cache. ``ValueError`` if the
    library, the folder, the split or a column is missing.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; nothing is downloaded, so give a data set that is on this machine")
    try:
        import datasets
    except ImportError as error:
        raise ValueError("Hugging Face data sets need a package: python -m pip install datasets") from error
    saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    try:
        with _offline(datasets.config):
            loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # the library raises other errors for each kind of file
        raise ValueError(f"{path} cannot be read as a data set ({one_line(error)}); download it again") from error
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {split: loaded}
    check_choice(split, splits, f"{path} has no split")
    rows = splits[split]
    for column in (image_column, caption_column):
        check_choice(column, rows.column_names, f"{path} has no column")
    captions = list(rows[caption_column])
    if odd := [type(caption).__name__ for caption in captions if not isinstance(caption, str | None)]:
        raise ValueError(f"column {caption_column!r} of {path} holds {odd[0]}, not text; choose another column")
    _warn_of_missing(captions, path)
    images = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return [
        ImageFile(f"{path}, {split} {number}", (caption or "").strip(), partial(_stored_bytes, images, number, image_column))
        for number, caption in enumerate(captions)
    ]


def _stored_bytes(images: Any, number: int, column: str) -> bytes:
    stored = images[number][column] or {"bytes": b"", "path": None}
    if stored["path"] is None or stored["bytes"]:
        return stored["bytes"]
    return read_bytes(Path(stored["path"]), MAX_IMAGE_BYTES)


@contextlib.contextmanager
def _offline(config: Any) -> Iterator[None]:
    before = {name: getattr(config, name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if hasattr(config, name)}
    try:
        for name in before:
            setattr(config, name, True)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


# --- sizes ----------------------------------------------------------------------------------------------------------


def bucket_sizes(area_side_px: int, step_px: int = 64, min_px: int | None = None) -> list[Size]:
    """Sizes of many shapes, none larger than a given square: for each side the longest other side, in both orientations.

    Sides are multiples of ``step_px``, by default from half the square's side to twice that side. ``ValueError`` if there
    are none.
    """
    min_px, max_px = min_px or area_side_px // 2, 2 * area_side_px
    sides = range(math.ceil(min_px / step_px) * step_px, max_px + 1, step_px)
    longest = {side: min(area_side_px**2 // side, max_px) // step_px * step_px for side in sides}
    found = {(a, b) for a, b in longest.items() if b >= min_px}
    if not found:
        raise ValueError(f"no size with sides in steps of {step_px} from {min_px} to {max_px} fits into {area_side_px} squared")
    return sorted(found | {(b, a) for a, b in found})


SSD_1B_SIZES: list[Size] = [
    (1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344), (1536, 640), (640, 1536),
]  # fmt: skip
"""Sizes at which SSD-1B was distilled (Gupta et al. 2024, arXiv 2401.02677), a subset of SDXL's own sizes."""
RESOLUTIONS: dict[str, list[Size]] = {
    **{str(side): [(side, side)] for side in (512, 768, 1024)},
    **{f"buckets-{side}": bucket_sizes(side) for side in (512, 768, 1024)},
    "ssd-1b": SSD_1B_SIZES,
}
"""Name -> sizes that images are cropped to, each image to the size nearest its shape."""


def sizes(text: str) -> list[Size]:
    """Sizes by name, a key of `RESOLUTIONS`, or written out: ``640``, or height x width as in ``768x512,512x768``."""
    if text in RESOLUTIONS:
        return RESOLUTIONS[text]
    parts = [
        re.fullmatch(r"([1-9][0-9]{0,8})(?:x([1-9][0-9]{0,8}))?", part.strip()) for part in text[:_MAX_SIZES_CHARS].split(",")
    ]
    if None in parts or len(text) > _MAX_SIZES_CHARS:
        raise ValueError(
            f"sizes {one_line(text)!r} must be height x width, as in 768x512,512x768, or a name; {meant(text, RESOLUTIONS)}"
        )
    found = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
    if odd := [side for size in found for side in size if side % _SIDE_STEP_PX]:
        raise ValueError(f"sizes {one_line(text)!r} must have sides that are multiples of {_SIDE_STEP_PX}, got {odd[0]}")
    return found


def best_size(size: Size, sizes: Sequence[Size]) -> Size:
    """The size whose shape is nearest to an image's, by the logarithm of height over width."""
    return min(sizes, key=lambda other: abs(math.log(other[0] / other[1]) - math.log(size[0] / size[1])))


class Crop(NamedTuple):
    """The part of an image that is left when it is cropped to a size."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom in the image's own pixels."""
    sizes: tuple[int, int, int, int, int, int]
    """Conditioning of an SDXL: original height and width, crop from top and left in pixels of the resized image, target
    height and width (Podell et al. 2023, arXiv 2307.01952, Sec. 2.2)."""


def crop(original: Size, size: Size) -> Crop:
    """The largest centred part that has the shape of ``size``."""
    scale = max(size[0] / original[0], size[1] / original[1])
    height, width = (min(whole, side / scale) for whole, side in zip(original, size, strict=True))
    top, left = (original[0] - height) / 2, (original[1] - width) / 2
    box = left, top, min(left + width, original[1]), min(top + height, original[0])
    cut_top, cut_left = (max(0, round(whole * scale) - side) // 2 for whole, side in zip(original, size, strict=True))
    return Crop(box, (*original, cut_top, cut_left, *size))


class Fitted(NamedTuple):
    """An image at its training size."""

    pixels: Tensor
    """(3, H, W) in [-1, 1]."""
    sizes: tuple[int, int, int, int, int, int]
    """As in `Crop`."""


def fit(image: Image.Image, size: Size) -> Fitted:
    """An RGB image cropped and resized to a size, with the Lanczos filter."""
    box, numbers = crop((image.height, image.width), size)
    resized = image.resize(size[::-1], Image.Resampling.LANCZOS, box=box)
    values = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(*size, 3)
    return Fitted(values.permute(2, 0, 1).float() / 127.5 - 1, numbers)
