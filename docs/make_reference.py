"""Writes recipe.md, the reference of every setting of a recipe, from the dataclasses that hold them: ``python docs/make_reference.py``.

Names, types, defaults and docstrings are read from the source. Ranges are what each class passes to ``check_settings``, choices
what it lists when it refuses a value.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import types
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from distill_core import recipe

PATH = Path(__file__).with_name("recipe.md")
COMMAND = "python docs/make_reference.py"
INTRODUCTION = f"""\
# Recipe reference

<!-- Written by `{COMMAND}`. Edit the docstrings of the settings, then run it again. -->

A recipe is one TOML file that describes a whole training run, for `distill train`. `distill recipes` lists complete examples,
`distill recipes NAME` prints one. Paths are relative to the folder of the recipe. A setting that is left out has its default;
`run` and `[data]` are required. [The guide](guide.md#train) shows how to start a run.
"""
TABLE = "| setting | type | default | allowed | meaning |\n|---|---|---|---|---|"
LARGE = {-(2**63): "-2^63", 2**64 - 1: "2^64 - 1"}
TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def docstrings(kind: type) -> dict[str, str]:
    """The string under each field of a class, on one line; without references to code, which a reader of a recipe cannot follow."""
    module = ast.parse(Path(inspect.getsourcefile(kind)).read_text(encoding="utf-8"))
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
    found = {}
    for field, below in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = plain(below.value.value)
    return found


def plain(text: str) -> str:
    """A docstring as Markdown."""
    text = re.sub(r" \((see )?`[\w.]+`\)", "", " ".join(text.split()))
    text = re.sub(r"\b([Aa]) key of `[\w.]+`", lambda key: f"{'O' if key[1] == 'A' else 'o'}ne of the names allowed", text)
    text = re.sub(r"; None\b", "; unset", text).replace(" None for", " Unset for")
    return text.replace("``", "`").replace("|", r"\|")


def ranges(kind: type) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each number that has them."""
    given: dict[str, tuple[float, float]] = {}
    module = sys.modules[kind.__module__]
    if hasattr(module, "check_settings"):
        with mock.patch.object(module, "check_settings", lambda settings, bounds: given.update(bounds)):
            kind(**required(kind))
    return given


def required(kind: type) -> dict[str, Any]:
    return {field.name: "x" for field in fields(kind) if is_required(field)}


def is_required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def refusal(kind: type, name: str, value: Any) -> str:
    """What a class says of a value of one of its fields; empty if it takes it."""
    try:
        kind(**required(kind) | {name: value})
    except ValueError as error:
        return str(error)
    return ""


def allowed(kind: type, name: str, hint: Any, bounds: dict[str, tuple[float, float]]) -> str:
    """Range or choices of a setting; empty where any value of its type is taken."""
    if name in bounds:
        low, high = bounds[name]
        return f"{LARGE.get(low, f'{low:,}')} to {LARGE.get(high, f'{high:,}')}"
    parts = getattr(hint, "__args__", (hint,))
    several = getattr(hint, "__origin__", None) is tuple
    if str in parts and (listed := re.search(r"choose from (\[.*\])$", refusal(kind, name, ("?",) if several else "?"))):
        return ", ".join(f"`{choice}`" for choice in ast.literal_eval(listed[1]))
    if float in parts and "above 0" in refusal(kind, name, (0.0,) if several else 0.0):
        return "above 0"
    return ""


def type_of(hint: Any) -> str:
    if getattr(hint, "__origin__", None) is tuple:
        return f"list of {TYPES[hint.__args__[0]]}s"
    parts = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(TYPES[part] for part in parts if part is not types.NoneType)


def default_of(field: Field) -> str:
    if is_required(field):
        return "*required*"
    return "*unset*" if field.default is None else f"`{json.dumps(field.default)}`"


def table(kind: type) -> str:
    """One row for each setting of a class."""
    hints, told, bounds, rows = get_type_hints(kind), docstrings(kind), ranges(kind), [TABLE]
    for field in fields(kind):
        name, hint = field.name, hints[field.name]
        cells = [f"`{name}`", type_of(hint), default_of(field), allowed(kind, name, hint, bounds), told.get(name, "")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def example() -> str:
    """The recipe in the docstring of the module, without its references to code."""
    text = re.search(r"```toml\n.*?```", recipe.__doc__, re.S)[0]
    return re.sub(r" +# `.*", "", text)


def sections() -> dict[str, tuple[type, str]]:
    """Each section of a recipe: its class, and what `Recipe` says of the field that holds it."""
    hints, told, found = get_type_hints(recipe.Recipe), docstrings(recipe.Recipe), {}
    for name, hint in hints.items():
        kind = next((part for part in [hint, *getattr(hint, "__args__", ())] if hasattr(part, "__dataclass_fields__")), None)
        if kind is not None:
            found["teacher" if name == "teachers" else name] = kind, told.get(name, "")
    return found


def text() -> str:
    """The whole page."""
    parts = [INTRODUCTION, example() + "\n", "`run` is the folder of the run. It is the only setting outside a section.\n"]
    for name, (kind, told) in sections().items():
        about = plain(inspect.getdoc(kind))
        optional = told.replace("None for", "Leave it out for")
        parts.append(f"## `[{name}]`\n\n{' '.join(filter(None, [about, optional]))}\n\n{table(kind)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8", newline="\n")
    print(f"wrote {PATH}")
