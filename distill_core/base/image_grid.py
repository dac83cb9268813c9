"""Grids of images: rows with names, images stacked vertically, and their PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .storage import atomic

if TYPE_CHECKING:
    from PIL.Image import Image


SMALL_IMAGE_PX = 192
"""Images whose longer side is at most half of this are enlarged."""


def image_rows(rows: Mapping[str, Tensor], columns: Sequence[str] = ()) -> Image:
    """Rows of RGB images (B, 3, H, W) in [-1, 1], each with its name above it, and the names of columns on top.

    All images must have one size. They are shown pixel by pixel; small ones are enlarged by a whole factor.
    """
    from PIL import Image, ImageDraw

    width, height = to_pil(next(iter(rows.values()))[0]).size
    count = max(map(len, rows.values()))
    gap, text_px = max(4, width // 40), max(15, count * width // 64)
    line = 2 * text_px
    sheet = Image.new("RGB", (gap + count * (width + gap), bool(columns) * line + len(rows) * (line + height) + gap), "white")
    drawing, font = ImageDraw.Draw(sheet), _font(text_px)
    for number, name in enumerate(columns[:count]):
        drawing.text((gap + number * (width + gap) + width // 2, line // 2), name, "#555555", font, anchor="mm")
    top = bool(columns) * line
    for name, images in rows.items():
        drawing.text((gap, top + line // 2), name, "black", font, anchor="lm")
        top += line
        for number, image in enumerate(images):
            sheet.paste(to_pil(image).resize((width, height), 0), (gap + number * (width + gap), top))
        top += height
    return sheet


def to_pil(image: Tensor) -> Image:
    """An RGB image (3, H, W) in [-1, 1], pixel by pixel; a small one enlarged by a whole factor."""
    from PIL import Image

    height, width = image.shape[-2:]
    factor = max(1, SMALL_IMAGE_PX // max(height, width))
    pixels = (image.detach().cpu().float().permute(1, 2, 0).clamp(-1, 1) + 1).mul(127.5).round().byte().numpy()
    return Image.fromarray(pixels).resize((width * factor, height * factor), 0)


def _font(size_px: int):
    """The font that comes with matplotlib."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size_px)


def stacked(images: Sequence[Image]) -> Image:
    """Images stacked vertically, centred on a white background."""
    from PIL import Image

    sheet = Image.new("RGB", (max(p.width for p in images), sum(p.height for p in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, ((sheet.width - image.width) // 2, top))
        top += image.height
    return sheet


def save_png(path: Path, image: Image, *, overwrite: bool = False) -> None:
    """Write an image as PNG, atomically."""
    with atomic(path, overwrite=overwrite) as made:
        image.save(made, format="png")
