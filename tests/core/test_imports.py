"""The order of the house: packages import from those below alone, no module is in a circle, and nothing names ComfyUI."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import distill_core

pytestmark = pytest.mark.slow

ROOT = Path(distill_core.__file__).parent
ORDER = ["base", "networks", "diffusion", "pruning", "lora", "data", "training", "evaluation", "routing"]
"""From the ground up; the modules beside the packages, and the demo, stand on all of them."""


def module(file):
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules():
    return {module(file): file for file in sorted(ROOT.rglob("*.py"))}


def imports(name, file):
    """Modules a module imports, wherever it does: at the top, in a function, for its types."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                yield f"{target}.{alias.name}" if f"{target}.{alias.name}" in modules() else target


@cache
def graph():
    return {
        name: {target for target in imports(name, file) if target in modules() and target != name}
        for name, file in modules().items()
        if name != "distill_core"  # which hands names on
    }


def place(name):
    """Floor of the package a module is in; of what stands beside the packages the highest."""
    part = name.split(".")[1] if name.count(".") > 1 else ""
    return ORDER.index(part) if part in ORDER else len(ORDER)


def test_packages_import_from_those_below_alone():
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == {*ORDER, "demo", "preparation"}
    arrows = [(name, target) for name, targets in graph().items() for target in targets if target != "distill_core"]
    assert len(arrows) > 200
    assert [(name, target) for name, target in arrows if place(name) < place(target)] == []


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter(graph()).prepare()


def test_the_core_never_imports_comfyui_a_node_or_itself_by_name():
    for name, file in modules().items():
        named = {target.split(".")[0] for target in imports(name, file) if target not in modules()}
        assert not named & {"comfy", "comfy_api", "comfy_extras", "nodes", "folder_paths", "server"}, name
        absolute = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and not node.level]
        assert not [node.module for node in absolute if node.module.split(".")[0] == "distill_core"], name


# --- what the library exports


def test_every_export_is_there():
    assert sorted(distill_core._HOME) == distill_core.__all__
    for name in distill_core.__all__:
        assert getattr(distill_core, name).__module__ == f"distill_core.{distill_core._HOME[name]}", name
    assert {*distill_core.__all__} <= {*dir(distill_core)}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = distill_core.nothing
    tree = ast.parse((ROOT / "__init__.py").read_text())
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level for alias in node.names}
    assert typed == {*distill_core.__all__}


def test_importing_the_library_waits_for_nothing():
    code = (
        "import sys, distill_core; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules); distill_core.preset('ssd-1b')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
