"""HTML pages: one file with embedded images and escaped texts."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def page(title: str, *parts: str) -> str:
    """A complete page of parts made by the other functions of this module."""
    name, body = html.escape(title), "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{name}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{name}</h1>\n{body}\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def listing(items: Mapping[str, object]) -> str:
    """A list of names and their meanings, one bullet each."""
    entries = (f"<li><b>{html.escape(name)}</b>: {html.escape(str(text))}</li>" for name, text in items.items())
    return "<ul>\n" + "\n".join(entries) + "\n</ul>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head, *body = (
        "<tr>" + "".join(f"<{cell}>{html.escape(text)}</{cell}>" for text in row) + "</tr>"
        for cell, row in (("th", columns), *(("td", row) for row in rows))
    )
    return f"<table><thead>{head}</thead><tbody>\n" + "\n".join(body) + "\n</tbody></table>"


def embedded(image: Image, description: str, form: str = "png") -> str:
    """An embedded image. form: ``png``, or ``jpeg`` for large photographs."""
    buffer = io.BytesIO()
    image.save(buffer, format=form, quality=92)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/{form};base64,{encoded}" alt="{html.escape(description)}">'


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
img { max-width: 100% }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .4rem .9rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
"""
