"""The shipped workflows as they open: large enough to be read, nothing over anything else, the note first."""

import json
from itertools import combinations

import pytest

from .. import comfyui

PATHS = sorted((comfyui.ROOT / "workflows").glob("*.json"))
TITLE = 30  # above a node
WINDOWS = [(1680, 1000), (1920, 969)]
FILLED = 0.75  # of the window, when ComfyUI opens a template
PADDING_PX = 10  # on each side of the nodes, then
LEAST_ZOOM = 8 / 14  # below it ComfyUI draws no text
LEAST_WIDTH = 225  # to which "Nodes 2.0" widens a node
SIDEBAR_PX, TOP_BARS_PX = 66, 95
GROUPS = {"#6fa8d6", "#93c492", "#cf8fd0", "#dbb458"}

every_workflow = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def box(node):
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE, left + width, top + height


def frame(group):
    left, top, width, height = group["bounding"]
    return left, top, left + width, top + height


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def holds(outer, inner):
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


@every_workflow
def test_it_opens_large_enough_to_be_read(path):
    graph = json.loads(path.read_text("utf-8"))
    lefts, tops, rights, bottoms = zip(*map(box, graph["nodes"]), strict=True)
    width, height = (max(ends) - min(starts) + 2 * PADDING_PX for starts, ends in ((lefts, rights), (tops, bottoms)))
    for window in WINDOWS:
        assert FILLED * min(window[0] / width, window[1] / height) >= LEAST_ZOOM


@every_workflow
def test_a_file_opens_beside_and_below_what_comfyui_shows_over_the_canvas(path):
    graph = json.loads(path.read_text("utf-8"))
    scale, (right, down) = graph["extra"]["ds"]["scale"], graph["extra"]["ds"]["offset"]
    lefts, tops, rights, bottoms = zip(*map(box, graph["nodes"]), *map(frame, graph["groups"]), strict=True)
    assert scale >= LEAST_ZOOM
    assert (min(lefts) + right) * scale >= SIDEBAR_PX and (min(tops) + down) * scale >= TOP_BARS_PX
    assert (max(rights) + right) * scale <= min(width for width, _ in WINDOWS)
    assert (max(bottoms) + down) * scale <= min(height for _, height in WINDOWS)


@every_workflow
def test_nothing_lies_over_anything_else(path):
    graph = json.loads(path.read_text("utf-8"))
    boxes, frames = {node["id"]: box(node) for node in graph["nodes"]}, [frame(group) for group in graph["groups"]]
    assert not [pair for pair in combinations(boxes, 2) if overlap(*(boxes[node] for node in pair))]
    assert not [pair for pair in combinations(frames, 2) if overlap(*pair)]
    notes = [node["id"] for node in graph["nodes"] if "Note" in node["type"]]
    for node, place in boxes.items():
        around = [outer for outer in frames if overlap(outer, place)]
        assert (not around) if node in notes else (len(around) == 1 and holds(around[0], place))


@every_workflow
def test_no_node_is_widened(path):
    graph = json.loads(path.read_text("utf-8"))
    assert not [node["id"] for node in graph["nodes"] if node["size"][0] < LEAST_WIDTH]


@every_workflow
def test_the_note_comes_first_and_colors_are_those_of_all(path):
    graph = json.loads(path.read_text("utf-8"))
    (note,) = (node for node in graph["nodes"] if node.get("title") == "Read me")
    assert all(node["pos"][0] >= note["pos"][0] and node["pos"][1] >= note["pos"][1] for node in graph["nodes"])
    assert {group["color"] for group in graph["groups"]} <= GROUPS
    assert len({(node.get("color"), node.get("bgcolor")) for node in graph["nodes"] if node["type"].startswith("Distill")}) == 1
