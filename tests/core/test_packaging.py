"""What installers read must agree with itself."""

import re
from pathlib import Path

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
