"""What installers read must agree with itself."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _section(name):
    return re.search(rf"^{name} = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)[1]


def test_requirements_are_the_dependencies():
    """ComfyUI-Manager reads requirements.txt, pip reads pyproject.toml."""
    dependencies = re.findall(r'"([^"]+)"', _section("dependencies"))
    assert (ROOT / "requirements.txt").read_text().splitlines() == dependencies


def test_torch_is_never_pinned():
    text = (ROOT / "pyproject.toml").read_text() + (ROOT / "requirements.txt").read_text()
    assert not re.search(r'"torch ?(?!>=)[=<>~!]', text)  # a lowest version is not a pin
    assert "torch" not in (ROOT / "requirements.txt").read_text()


def test_readme_prints_two_commands():
    text = (ROOT / "README.md").read_text()
    assert 'python -m pip install -e ".[torch]" && distill quickstart' in text
    assert 'python -m pip install -e ".[torch,dev]" && python -m pytest' in text


def test_version_is_told_once():
    from distill_core import __version__

    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def _files(*options):
    try:
        found = subprocess.run(["git", "ls-files", *options], cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is not a git checkout")
    return {*found.stdout.splitlines()}


def test_what_the_packed_pages_link_to_is_packed():
    packed = _files() - _files("-i", "-c", "--exclude-from=.comfyignore")
    assert {"__init__.py", "README.md", "distill_core/__init__.py", "nodes/__init__.py"} <= packed
    assert not any(file.startswith(("tests/", ".")) for file in packed)
    folders = {str(folder) for file in packed for folder in Path(file).parents}
    for page in ("README.md", *(file for file in packed if re.fullmatch(r"docs/\w+\.md", file))):
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
            target = ((ROOT / page).parent / link).resolve().relative_to(ROOT.resolve()).as_posix()
            assert target in packed | folders, f"{page} links to {link}"
