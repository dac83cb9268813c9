"""Scenes as images: emoji in their own or another color, on a pale background.

Images are (B, 3, 64, 64) in [-1, 1]. The emoji are those of Noto Emoji (shaded) and Fluent Emoji (flat), drawn once
by `.build` and bundled as one image; see data/NOTICE.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import files
from .grammar import OBJECTS, STYLES, Scene

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE_PX, EMOJI_PX = 64, 48
PER_ROW = 8  # objects in a row of the atlas, each in every style
RGB = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 210, 30),
    "green": (50, 165, 60),
    "blue": (50, 110, 225),
    "purple": (150, 65, 190),
}
BACKGROUNDS = ((250, 246, 236), (228, 240, 250), (250, 230, 234), (230, 245, 230), (240, 234, 250), (238, 238, 238))

CELL_PX = 8
"""Objects stand on a grid of this pitch, the pixels of one latent, so that a small autoencoder keeps them sharp."""
LARGE, SMALL = 6, 4
"""Sides of the square an object fills, in cells: alone in the image, and otherwise."""
MARGIN_PX = 1


@cache
def _atlas() -> Image:
    from PIL import Image

    with Image.open(files.DATA / "emoji.png") as file:
        return file.convert("RGBA")


@cache
def emoji(noun: str, style: str, color: str | None) -> Image:
    """One object, 48 x 48 RGBA; in ``color``, its brightness alone is kept."""
    number, column = OBJECTS.index(noun), STYLES.index(style)
    left, top = EMOJI_PX * (number % PER_ROW * len(STYLES) + column), EMOJI_PX * (number // PER_ROW)
    image = _atlas().crop((left, top, left + EMOJI_PX, top + EMOJI_PX))
    return image if color is None else recolored(image, RGB[color])


def recolored(image: Image, rgb: tuple[int, int, int]) -> Image:
    """The image's brightness as shades of ``rgb``: its median is the color itself, what is brighter tends to white."""
    from PIL import Image

    pixels = np.asarray(image).astype(np.float32)
    brightness, opaque = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32), pixels[..., 3] > 128
    away = brightness - np.median(brightness[opaque])
    away = np.clip(away / max(np.percentile(np.abs(away[opaque]), 90), 30), -1, 1)[..., None]  # 0 at the median
    color = np.array(rgb, np.float32)
    shade = np.where(away < 0, color * (1 + 0.6 * away), color + 0.6 * away * (255 - color))
    return Image.fromarray(np.concatenate([shade, pixels[..., 3:]], -1).round().astype(np.uint8), "RGBA")


def _corners(arrangement: str, counts: list[int], rng: random.Random) -> Iterator[tuple[int, tuple[int, int], int]]:
    """Group, upper left corner (x, y) and side of each object, in cells."""
    if arrangement == "alone":
        (count,) = counts
        if count == 1:
            yield 0, (rng.randint(0, 2), rng.randint(0, 2)), LARGE
        elif count == 2:
            y = rng.randint(0, 4)
            yield from ((0, (x, y), SMALL) for x in (0, 4))
        else:
            y = rng.choice((0, 4))
            yield from ((0, corner, SMALL) for corner in ((2, y), (0, 4 - y), (4, 4 - y)))
    else:
        across = rng.randint(0, 4)
        for group, count in enumerate(counts):
            beside = across + rng.choice((-1, 0, 1)) if counts == [1, 1] else rng.randint(1, 3)
            for place in (0, 4) if count == 2 else (min(max(beside, 0), 4),):
                yield group, (4 * group, place) if arrangement == "in a row" else (place, 4 * group), SMALL


def draw(scene: Scene, rng: random.Random) -> np.ndarray:
    """One image (64, 64, 3) uint8; background and places vary with ``rng``, and the style if it is open."""
    from PIL import Image

    style = scene.style or rng.choice(STYLES)
    canvas = Image.new("RGB", (SIDE_PX, SIDE_PX), rng.choice(BACKGROUNDS))
    arrangement, groups = scene.placed
    for number, (x, y), side in _corners(arrangement, [group.count for group in groups], rng):
        group, side_px = groups[number], CELL_PX * side - 2 * MARGIN_PX
        image = _scaled(group.object, style, group.color, side_px)
        canvas.paste(image, (CELL_PX * x + MARGIN_PX, CELL_PX * y + MARGIN_PX), image)
    return np.asarray(canvas)


@cache
def _scaled(noun: str, style: str, color: str | None, side_px: int) -> Image:
    from PIL import Image

    return emoji(noun, style, color).resize((side_px, side_px), Image.Resampling.LANCZOS)


def draw_all(scenes: list[Scene], seed: int) -> Tensor:
    """Images (B, 3, 64, 64) of uint8 0..255."""
    rng = random.Random(seed)
    return torch.from_numpy(np.stack([draw(scene, rng) for scene in scenes])).permute(0, 3, 1, 2)


def as_images(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float in [-1, 1]."""
    return pixels.float() / 127.5 - 1
