"""Writes recipe.md, the reference of every setting of a recipe, from the dataclasses that hold them: ``python docs/make_reference.py``.

Names, types and defaults are those of the fields; meaning and limits stand beside each as `settings.Limits`.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

sys.path.insert(0, str(Path(__file__).parents[1]))

from distill_core import recipe
from distill_core.base.settings import Limits, limits_of

PATH = Path(__file__).with_name("recipe.md")
COMMAND = "python docs/make_reference.py"
INTRODUCTION = f"""\
# Recipe reference

<!-- Written by `{COMMAND}`. Edit the settings in the source, then run it again. -->

A recipe is one TOML file that describes a whole training run, for `distill train`. `distill recipes` lists complete examples,
`distill recipes NAME` prints one. Paths are relative to the folder of the recipe. A setting that is left out has its default;
`run` and `[data]` are required. [The guide](guide.md#train) shows how to start a run.
"""
TABLE = "| setting | type | default | allowed | meaning |\n|---|---|---|---|---|"
LARGE = {-(2**63): "-2^63", 2**64 - 1: "2^64 - 1"}
TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def allowed(limits: Limits) -> str:
    """Range or choices of a setting; empty where any value of its type is allowed."""
    if limits.within is not None:
        low, high = limits.within
        return f"{LARGE.get(low, f'{low:,}')} to {LARGE.get(high, f'{high:,}')}"
    if limits.above is not None:
        return f"above {limits.above:g}"
    return ", ".join(f"`{choice}`" for choice in limits.choices)


def type_of(hint: Any) -> str:
    if getattr(hint, "__origin__", None) is tuple:
        return f"list of {TYPES[hint.__args__[0]]}s"
    parts = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(TYPES[part] for part in parts if part is not types.NoneType)


def default_of(field: Field, limits: Limits) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "*required*"
    if field.default is None:
        return f"*{limits.unset or 'unset'}*"
    return f"`{json.dumps(field.default)}`"


def table(kind: type) -> str:
    """One row for each setting of a class."""
    hints, limits, rows = get_type_hints(kind), limits_of(kind), [TABLE]
    for field in fields(kind):
        own = limits[field.name]
        cells = [
            f"`{field.name}`",
            type_of(hints[field.name]),
            default_of(field, own),
            allowed(own),
            own.words.replace("|", r"\|"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def example() -> str:
    """The recipe in the docstring of the module, without its references to code."""
    text = re.search(r"```toml\n.*?```", recipe.__doc__, re.S)[0]
    return re.sub(r" +# `.*", "", text)


def sections() -> dict[str, tuple[type, str]]:
    """Each section of a recipe: its class, and when it can be left out."""
    hints, limits, found = get_type_hints(recipe.Recipe), limits_of(recipe.Recipe), {}
    for name, hint in hints.items():
        kind = next((part for part in [hint, *getattr(hint, "__args__", ())] if hasattr(part, "__dataclass_fields__")), None)
        if kind is not None:
            found["teacher" if name == "teachers" else name] = kind, limits[name].words
    return found


def text() -> str:
    """The whole page."""
    parts = [INTRODUCTION, example() + "\n", "`run` is the folder of the run. It is the only setting outside a section.\n"]
    for name, (kind, optional) in sections().items():
        about = inspect.getdoc(kind).replace("``", "`").replace("\n", " ")
        parts.append(f"## `[{name}]`\n\n{' '.join(filter(None, [about, optional]))}\n\n{table(kind)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8", newline="\n")
    print(f"wrote {PATH}")
