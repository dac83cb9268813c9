"""The help pages: they name what the nodes have, and every language says on each line what English says there.

The front end asks for ``docs/NODE/LANGUAGE.md``, then for ``docs/NODE.md``, and resolves the images of both against ``docs/``.
"""

import json
import re
from collections import Counter, defaultdict

import pytest

from .. import comfyui
from .test_locales import LOCALES, NUMBER, OTHERS, read

HELP = comfyui.ROOT / "web" / "docs"
NODES = sorted(json.loads((LOCALES / "en" / "nodeDefs.json").read_text("utf-8")))
CODE = re.compile(r"`([^`]+)`")
BOLD = re.compile(r"\*\*([^*]+)\*\*")
ITALIC = re.compile(r"\*([^*]+)\*")
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
TABLE = re.compile(r"^\| (?:input|setting|output) \|.*\n\|[-|]+\n((?:\|.*\n)+)", re.M)
STRESSED = {"your", "you"}
"""In italics in English, and neither on the screen nor typed by a user."""

every_page = pytest.mark.parametrize(("node", "language"), [(node, language) for language in OTHERS for node in NODES])


def text_of(node, language="en"):
    return (HELP / f"{node}.md" if language == "en" else HELP / node / f"{language}.md").read_text("utf-8")


def lines(node, language):
    """Pairs of the lines in English and in the other language, without blocks of code."""
    ours, theirs = (FENCED.sub("", text_of(node, name)).splitlines() for name in ("en", language))
    assert len(ours) == len(theirs), "a page has as many lines as in English"
    return list(zip(ours, theirs, strict=True))


def names(language):
    """What the screen calls inputs and outputs, by node, then by English name; under "" those of all nodes and the charts' words."""
    ours, theirs = (read(name)["nodeDefs.json"] for name in ("en", language))
    found = defaultdict(lambda: defaultdict(set))
    for path, english in ours.items():
        if path.endswith("/name"):
            for node in (path.split("/")[0], ""):
                found[node][english].add(theirs[path])
    for script in (comfyui.ROOT / "web" / "js").glob("*.js"):
        for block in re.findall(rf"^  {language}: {{\n(.*?)^  }}", script.read_text("utf-8"), re.M | re.S):
            for english, other in re.findall(r'^    "(.+?)":\s*"(.+)",$', block, re.M):
                found[""][english].add(other)
    return found


def shape(line):
    """Heading, item, row with so many cells, picture or text."""
    return re.match(r"#+ |- |\||!|", line)[0], CODE.sub("", line).count("|")


def addresses(line):
    return re.findall(r"\]\((\S+?)\)", line)


def first_cell(line):
    """Names in the first cell of a row, or in bold at the start of an item."""
    found = re.match(r"\| ([^|:]+)|- ((?:(?:, )?\*\*\w+\*\*)+)", line)
    return re.findall(r"[\w-]+(?: [\w-]+)*", found[1] or found[2]) if found else []


def test_every_node_has_its_pages():
    assert sorted(page.stem for page in HELP.glob("*.md")) == NODES
    assert {folder.name for folder in HELP.iterdir() if folder.is_dir()} == {*NODES, "images"}
    for node in NODES:
        assert {page.stem for page in (HELP / node).iterdir()} == set(OTHERS), node


def test_tables_name_what_the_node_has():
    rows = [(node, row) for node in NODES for table in TABLE.findall(text_of(node)) for row in table.splitlines()]
    assert len(rows) > 80
    own = names("en")
    assert not [(node, name) for node, row in rows for name in first_cell(row) if name not in own[node]]


@every_page
def test_a_page_is_built_like_the_english_one(node, language):
    for ours, theirs in lines(node, language):
        assert shape(theirs) == shape(ours), theirs
        assert addresses(theirs) == addresses(ours), theirs
    assert FENCED.findall(text_of(node, language)) == FENCED.findall(text_of(node))


@every_page
def test_every_sentence_is_translated(node, language):
    prose = [CODE.sub("", theirs) for _, theirs in lines(node, language)]
    assert not [line for line in prose if re.search(r"[a-z]+ [a-z]+ [a-z]+", line)]


@every_page
def test_numbers_survive(node, language):
    for ours, theirs in lines(node, language):
        assert Counter(NUMBER.findall(theirs)) == Counter(NUMBER.findall(ours)), f"{ours}\n{theirs}"


@every_page
def test_what_users_type_or_read_in_english_survives(node, language):
    for ours, theirs in lines(node, language):
        lost = set(CODE.findall(ours)) - set(CODE.findall(theirs))
        invented = [code for code in CODE.findall(theirs) if code not in ours]
        assert not lost and not invented, f"lost {lost}, invented {invented}: {theirs}"


@every_page
def test_names_are_those_of_the_screen(node, language):
    """Inputs and outputs have the names that the node shows; choices, messages and workflows stay as they are, in code."""
    called, (ours, theirs) = names(language), (read(name)["nodeDefs.json"] for name in ("en", language))
    of_nodes = {text: theirs[path] for path, text in ours.items() if path.endswith("/display_name")}
    by_length = re.compile("|".join(sorted(map(re.escape, of_nodes), key=len, reverse=True)))
    for english, other in lines(node, language):
        prose, code = CODE.sub("", english), CODE.findall(other)
        assert not [name for name in by_length.findall(prose) if of_nodes[name] not in other], other
        italic = set(ITALIC.findall(BOLD.sub("", prose))) - STRESSED
        typed = {word for word in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", prose) if word not in " ".join(italic)}
        shown = {word for word in first_cell(english) if word in called[node]}
        for word in italic | typed | shown:
            allowed = called[node].get(word) or called[""].get(word) or set()
            assert any(name in other for name in allowed) or any(word in one for one in code), (
                f"{word} is {allowed or word}: {other}"
            )
