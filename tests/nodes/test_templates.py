"""The example workflows in other languages than English."""

import json
import re
from itertools import combinations

import pytest

from .. import comfyui
from ..workflows.test_layout import box, overlap
from .pages import load, opened
from .test_locales import LOCALES, OTHERS

WORKFLOWS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((comfyui.ROOT / "workflows").glob("*.json"))}
CODE = re.compile(r"`[^`]+`")


def translated(language):
    return json.loads((comfyui.ROOT / "web" / f"workflows.{language}.json").read_text("utf-8"))


def notes_of(graph):
    return [node["widgets_values"][0] for node in graph["nodes"] if node["type"].endswith("Note")]


@pytest.mark.parametrize("language", OTHERS)
def test_every_note_and_title_is_translated_and_nothing_else(language):
    titled = [each for graph in WORKFLOWS.values() for each in [*graph["nodes"], *graph["groups"]]]
    texts = translated(language)
    assert texts["titles"].keys() == {each["title"] for each in titled if each.get("title")}
    assert texts["notes"].keys() == {note for graph in WORKFLOWS.values() for note in notes_of(graph)}


@pytest.mark.parametrize("language", OTHERS)
def test_a_note_has_the_same_parts_and_names_nodes_as_the_screen_does(language):
    ours, theirs = (json.loads((LOCALES / one / "nodeDefs.json").read_text("utf-8")) for one in ("en", language))
    shown = {ours[node]["display_name"]: theirs[node]["display_name"] for node in ours}
    for english, other in translated(language)["notes"].items():
        assert english.count("\n") == other.count("\n") and english.startswith("## ") == other.startswith("## ")
        assert set(CODE.findall(other)) <= set(CODE.findall(english))
        lacking = {code for code in CODE.findall(english) if code not in other}
        assert lacking <= {"`lora_rank`"}, other  # a widget, which has its own name
        for name in re.findall(r"\*\*([^*]+)\*\*", english):
            assert shown.get(name, "") in other, f"{name} is {shown[name]} there: {other}"


def test_the_front_end_shows_it_and_leaves_what_people_wrote(page, server):
    graph = WORKFLOWS["quickstart_scenes"]
    texts, (note,) = translated("zh"), notes_of(graph)
    named = json.loads(json.dumps(graph))
    named["groups"][0]["title"] = "constructor"  # which every object of JavaScript has
    server.post("settings/Comfy.Locale", "zh")
    try:
        page.route("**/workflows.zh.json", lambda route: route.abort())
        opened(page, server)
        shown = "() => window.app.graph.nodes.filter((node) => node.type === 'MarkdownNote').map((node) => node.widgets[0].value)"
        titles = "() => [...window.app.graph.nodes, ...window.app.graph.groups].map(({ title }) => title)"
        load(page, graph)
        page.wait_for_timeout(500)
        assert page.evaluate(shown) == [note]
        page.unroute("**/workflows.zh.json")  # the server is back
        load(page, named)
        page.wait_for_function(f"text => ({shown})()[0] === text", arg=texts["notes"][note])
        assert {texts["titles"].get(group["title"], "constructor") for group in named["groups"]} <= set(page.evaluate(titles))

        own = json.loads(json.dumps(graph).replace("Nothing to download", "My own words"))
        for words in (notes_of(own), ["constructor"]):
            (kept,) = (node for node in own["nodes"] if node["type"].endswith("Note"))
            kept["widgets_values"] = words
            load(page, own)
            page.wait_for_timeout(1000)
            assert page.evaluate(shown) == words
            assert {group["title"] for group in graph["groups"]} <= set(page.evaluate(titles))
    finally:
        server.post("settings/Comfy.Locale", "en")


BOXES = (
    """() => window.app.graph.nodes.map(({ id, pos, size }) => [id, [pos[0], pos[1] - 30, pos[0] + size[0], pos[1] + size[1]]])"""
)


@pytest.mark.parametrize("new_nodes", [False, True])
def test_nodes_do_not_grow_over_others_when_opened(page, server, new_nodes):
    """Those that are too small for their widgets grow; in "Nodes 2.0" most do a little."""
    server.post("settings/Comfy.VueNodes.Enabled", new_nodes)
    try:
        opened(page, server)
        for name, graph in WORKFLOWS.items():
            load(page, graph)
            page.wait_for_timeout(1000 if new_nodes else 100)
            boxes = dict(page.evaluate(BOXES))
            assert not [pair for pair in combinations(boxes, 2) if overlap(*(boxes[node] for node in pair))], name
            if not new_nodes:
                laid_out = {str(node["id"]): box(node) for node in graph["nodes"]}
                assert {node: tuple(map(round, place)) for node, place in boxes.items()} == laid_out, name
    finally:
        server.post("settings/Comfy.VueNodes.Enabled", False)


APPS = {name: graph["extra"]["linearData"] for name, graph in WORKFLOWS.items() if "linearData" in graph["extra"]}


@pytest.mark.parametrize("name", APPS)
def test_an_app_shows_widgets_that_exist(page, server, name):
    """In app mode, which the front end offers for any workflow, ours show what a beginner wants first."""
    opened(page, server)
    load(page, WORKFLOWS[name])
    widgets = "([id, name]) => window.app.graph.getNodeById(id)?.widgets?.some(widget => widget.name === name)"
    assert all(page.evaluate(widgets, chosen) for chosen in APPS[name]["inputs"])
    assert {int(node) for node in APPS[name]["outputs"]} <= {node["id"] for node in WORKFLOWS[name]["nodes"]}
    page.evaluate("window.app.extensionManager.command.execute('Comfy.ToggleLinear')")
    for label in ("prompt", "preset", "run_name", "total_steps"):
        page.get_by_text(label, exact=True).first.wait_for(timeout=10_000)
    page.evaluate("window.app.extensionManager.command.execute('Comfy.ToggleLinear')")
