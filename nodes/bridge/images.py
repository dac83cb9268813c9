"""IMAGEs of ComfyUI from other images, and the other way round."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

THUMBNAIL_PX = 256


def to_image(image) -> Tensor:
    """A PIL image as an IMAGE (1, H, W, 3) in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.asarray(image).copy()).float()[None] / 255


def to_images(images: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] as an IMAGE."""
    return (images.float().movedim(1, -1) + 1).clamp(0, 2) / 2


def pixels_of(image: Tensor) -> Tensor:
    """An IMAGE as pixels (B, 3, H, W) in [-1, 1]."""
    return image[..., :3].movedim(-1, 1) * 2 - 1


def thumbnail(image: Tensor) -> str:
    """The first of an IMAGE as ModelSpec has it: a small JPEG in a data URL."""
    from PIL import Image

    if image.shape[0] == 0 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"the thumbnail has the shape {tuple(image.shape)}; connect an image in color")
    pixels = image[0, ..., :3].expand(-1, -1, 3).nan_to_num().clamp(0, 1)
    small = Image.fromarray((pixels * 255).round().byte().cpu().numpy())
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    written = BytesIO()
    small.save(written, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(written.getvalue()).decode()}"


def image_view(path: Path | None) -> dict[str, Any] | None:
    """The parameters of ComfyUI's ``/view`` for an image in the output folder; ``version`` changes with its content."""
    if path is None:
        return None
    place = path.relative_to(folder_paths.get_output_directory())
    image = {"filename": place.name, "subfolder": place.parent.as_posix(), "type": "output"}
    return image | {"version": path.stat().st_mtime_ns // 1_000_000}
