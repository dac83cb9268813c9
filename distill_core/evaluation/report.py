"""HTML pages: one file with embedded images and escaped texts."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

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
    return f'<img src="{data_url(image, form)}" alt="{html.escape(description)}">'


def data_url(image: Image, form: str) -> str:
    """An image as the address of an ``img``; form as for `embedded`."""
    buffer = io.BytesIO()
    image.save(buffer, format=form, quality=92)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def link(file_name: str, text: str) -> str:
    """A link to a file beside the page."""
    return f'<p><a href="{html.escape(quote(file_name))}">{html.escape(text)}</a></p>'


def data(name: str, value: Any) -> str:
    """JSON that a script of the page reads from the element of that id; no text in it ends the element."""
    text = json.dumps(value).replace("<", r"\u003c")
    return f'<script type="application/json" id="{html.escape(name)}">{text}</script>'


def script(source: str) -> str:
    """A script of this package."""
    return f"<script>{source}</script>"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
img { max-width: 100% }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .4rem .9rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
"""
