"""What the documentation says is true: its code runs, its links lead somewhere, its reference is that of the settings."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import distill_core

from ..conftest import SMALL

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def read(page):
    return page.read_text(encoding="utf-8")


def python_blocks(page):
    return [code for language, code in FENCED.findall(read(page)) if language == "python"]


def prose(page):
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("[", "").replace("#", ""), FENCED.sub("", read(page)))


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) < 150


def test_readme_needs_no_address():
    """Every command works from a checkout."""
    commands = "".join(code for _, code in FENCED.findall(read(ROOT / "README.md")))
    assert not re.search(r"https?:|git clone", commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_reference_is_that_of_the_settings():
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert read(reference.PATH) == reference.text(), f"the settings have changed; run: {reference.COMMAND}"


def test_library_example_runs(tmp_path, monkeypatch):
    from diffusers import UNet2DConditionModel

    monkeypatch.chdir(tmp_path)
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    names = {
        "unet": UNet2DConditionModel(**SMALL),
        "latents": torch.randn(12, 4, 8, 8, generator=random),
        "captions": torch.randn(12, 4, 16, generator=random),
        "empty_caption": torch.zeros(4, 16),
    }
    for code in python_blocks(DOCS / "library.md"):
        exec(compile(code, "docs/library.md", "exec"), names)  # noqa: S102

    for made in ("pruned.safetensors", "run/recipe.toml", "run/metrics.csv", "run/checkpoints"):
        assert Path(made).exists(), made
    pruned, trained = (distill_core.open_unet(file) for file in ("pruned.safetensors", names["run"].result_file))
    assert pruned.architecture == trained.architecture != distill_core.open_unet("teacher").architecture
    assert any(not torch.equal(weight, trained.state_dict[name]) for name, weight in pruned.state_dict.items())
    student = UNet2DConditionModel.from_pretrained("student").eval()
    x, t, context = names["latents"][:2], torch.tensor([3, 700]), names["captions"][:2]
    with torch.no_grad():
        assert torch.equal(student(x, t, context).sample, distill_core.load_unet(trained)(x, t, context).sample)


def test_library_page_names_every_export():
    named = set(re.findall(r"`(\w+)`", read(DOCS / "library.md")))
    assert set(distill_core.__all__) <= named


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_what_examples_import_exists(page):
    for code in python_blocks(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("distill_core"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def messages():
    """Every text in the code, an ellipsis for each value that is put in."""
    for path in [*ROOT.glob("distill_core/**/*.py"), *ROOT.glob("nodes/**/*.py")]:
        nodes = list(ast.walk(ast.parse(read(path))))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                yield node.value


def test_messages_that_are_explained_exist():
    """Troubleshooting quotes messages as the code words them."""
    text = "\n".join(messages())
    quoted = re.findall(r"^\| `(.*?)` \|", read(DOCS / "troubleshooting.md"), re.M)
    assert len(quoted) > 20
    for message in quoted:
        pattern = r"[^\n]*".join(re.escape(part.strip()) for part in message.split("…"))
        assert re.search(pattern, text), message
