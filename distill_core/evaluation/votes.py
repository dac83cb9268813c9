"""A page for blind votes: two images of one seed at a time, in random order and without names, and the count at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

from ..base.image_grid import to_pil
from . import report

MOST_VOTED = 24
"""Images of each model; a person seldom votes on more."""
SIDE_PX = 768
"""Larger images are shown smaller, so that the page can be sent."""


def votes_page(title: str, images: Mapping[str, Tensor], seeds: Sequence[str]) -> str:
    """A page in which a person compares each model with the first, image by image.

    images: of two models or more, (N, 3, H, W) in [-1, 1], image n from the same noise for each. seeds: N labels. The page
    needs no network; it counts votes, gives the 95 % interval (Wilson 1927), and keeps unfinished votes in the browser.
    ``ValueError`` for fewer than two models or no images.
    """
    if len(images) < 2 or not seeds:
        raise ValueError(f"votes need images by two models or more, got {len(images)} with {len(seeds)} images each")
    shown = min(MOST_VOTED, len(seeds))
    told = {
        "title": title,
        "models": list(images),
        "seeds": list(seeds[:shown]),
        "images": [[_source(image) for image in of_model[:shown]] for of_model in images.values()],
    }
    told["id"] = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    return report.page(
        title,
        report.paragraph(
            "Both images of a pair are from the same seed and prompt. Choose the better one without knowing which model made it: "
            "click it, or press ←, ↓ (equal) or →."
        ),
        f"<style>{_STYLE}</style>",
        '<div id="votes"></div>',
        report.data("votes-images", told),
        report.script(_script()),
    )


def _source(image: Tensor) -> str:
    small = to_pil(image)
    small.thumbnail((SIDE_PX, SIDE_PX))
    return report.data_url(small, "jpeg")


@cache
def _script() -> str:
    return Path(__file__).with_suffix(".js").read_text("utf-8")


_STYLE = """
.pair { display: flex; gap: 1rem }
.pair button { flex: 1; padding: 0; border: 3px solid #ddd; background: none; cursor: pointer }
.pair button:hover, .pair button:focus-visible { border-color: #4c78a8 }
.pair img { display: block; width: 100%; max-height: 70vh; object-fit: contain }
.choices button, .choices a { font: inherit; padding: .4rem .9rem; margin-right: .5rem }
"""
