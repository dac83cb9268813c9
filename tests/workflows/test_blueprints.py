"""The shipped subgraph blueprints: whole in themselves, known to the server, and one of them found and run in a browser."""

import json
from itertools import combinations

import pytest

from distill_core.demo.teacher import teacher_file
from distill_core.networks.files import open_unet
from distill_core.pruning.plan import preset
from distill_core.pruning.prune import prune

from .. import comfyui
from ..nodes.graphs import rows, until
from ..nodes.pages import load, opened
from ..nodes.test_live import CHART, status
from .test_layout import TITLE, box, overlap

PATHS = sorted((comfyui.ROOT / "subgraphs").glob("*.json"))
NAMES = ["Compare two models", "Guidance in one pass", "Make my checkpoint smaller"]
INPUTS, OUTPUTS = -10, -20
"""Ids of what stands for the subgraph's own inputs and outputs in it."""

every_blueprint = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def server(comfyui_path, tmp_path_factory):
    with comfyui.Server(comfyui_path, comfyui.python(comfyui_path), tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module")
def known(server):
    return server.get("object_info")


def read(path):
    """The node of a blueprint, its subgraph, and the nodes in it by id."""
    graph = json.loads(path.read_text("utf-8"))
    (host,), (subgraph,) = graph["nodes"], graph["definitions"]["subgraphs"]
    assert host["type"] == subgraph["id"]
    return host, subgraph, {node["id"]: node for node in subgraph["nodes"]}


def schema(node, known):
    """A node's inputs by name: kind and options."""
    inputs = known[node["type"]]["input"]
    return {**inputs.get("required", {}), **inputs.get("optional", {})}


@every_blueprint
def test_a_blueprint_uses_known_nodes_and_inputs(path, known):
    for node in read(path)[2].values():
        inputs = schema(node, known)
        assert {entry["name"].partition(".")[0] for entry in node["inputs"]} == set(inputs)
        widgets = [entry["name"] for entry in node["inputs"] if "widget" in entry]
        assert len(node["widgets_values"]) == len(widgets)
        for name, value in zip(widgets, node["widgets_values"], strict=True):
            _, options = inputs[name]
            assert value in options.get("options", [value]), name
        assert [entry["name"] for entry in node["outputs"]] == known[node["type"]]["output_name"]


@every_blueprint
def test_links_are_told_alike_at_both_ends(path):
    host, subgraph, nodes = read(path)
    ends = {"from": {}, "to": {}}
    for node in nodes.values():
        for slot, entry in enumerate(node["inputs"]):
            ends["to"] |= {} if entry["link"] is None else {entry["link"]: (node["id"], slot, entry["type"])}
        for slot, entry in enumerate(node["outputs"]):
            ends["from"] |= {link: (node["id"], slot, entry["type"]) for link in entry["links"]}
    for side, end, of in (("inputs", "from", INPUTS), ("outputs", "to", OUTPUTS)):
        for slot, entry in enumerate(subgraph[side]):
            assert entry["linkIds"], entry["name"]
            ends[end] |= {link: (of, slot, entry["type"]) for link in entry["linkIds"]}
        assert [(entry["name"], entry["type"]) for entry in subgraph[side]] == [(e["name"], e["type"]) for e in host[side]]
    links = {link["id"]: link for link in subgraph["links"]}
    assert {id_: (link["origin_id"], link["origin_slot"], link["type"]) for id_, link in links.items()} == ends["from"]
    assert {id_: (link["target_id"], link["target_slot"], link["type"]) for id_, link in links.items()} == ends["to"]


@every_blueprint
def test_every_promoted_widget_is_one_of_a_node_and_has_its_value(path):
    host, subgraph, nodes = read(path)
    links = {link["id"]: link for link in subgraph["links"]}
    values = []
    for outer, entry in zip(host["inputs"], subgraph["inputs"], strict=True):
        targets = [links[link] for link in entry["linkIds"]]
        inner = [nodes[link["target_id"]]["inputs"][link["target_slot"]] for link in targets]
        assert {"widget" in slot for slot in inner} == {"widget" in outer}
        if "widget" in outer:
            (slot,), node = inner, nodes[targets[0]["target_id"]]
            assert outer["widget"]["name"] == outer["name"] == slot["name"]
            widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
            values.append(node["widgets_values"][widgets.index(slot["name"])])
    assert host["widgets_values"] == values and len(values) >= 6


@every_blueprint
def test_nothing_in_a_blueprint_lies_over_anything_else(path):
    _, subgraph, nodes = read(path)
    boxes = [box(node) for node in nodes.values()]
    for end in (subgraph["inputNode"], subgraph["outputNode"]):
        left, top, width, height = end["bounding"]
        boxes.append(box({"pos": (left, top + TITLE), "size": (width, height - TITLE)}))
    assert not [pair for pair in combinations(boxes, 2) if overlap(*pair)]


def test_the_server_lists_the_blueprints_as_this_packs(server):
    listed = {id_: entry for id_, entry in server.get("global_subgraphs").items() if entry["source"] == "custom_node"}
    assert sorted(entry["name"] for entry in listed.values()) == NAMES == [path.stem for path in PATHS]
    assert {entry["info"]["node_pack"] for entry in listed.values()} == {"custom_nodes.distill-nodes"}
    for id_, entry in listed.items():
        data = json.loads(server.get(f"global_subgraphs/{id_}")["data"])
        assert data["nodes"][0]["title"] == data["definitions"]["subgraphs"][0]["name"] == entry["name"]


SETTINGS = {"run_name": "blueprint", "total_steps": 2, "steps_per_queue": 2, "batch_size": 2, "learning_rate": 0.003,
            "preset": "bk-sdm-small", "filename_prefix": "diffusion_models/of a blueprint"}  # fmt: skip
WITH_THE_DEMO = """settings => {
    const [host] = app.graph.nodes;
    const [teacher, empty] = ["DistillLoadDemoTeacher", "CLIPTextEncode"].map((type) => LiteGraph.createNode(type));
    app.graph.add(teacher);
    app.graph.add(empty);
    const connect = (node, output, to, input) =>
        node.connect(node.findOutputSlot(output), to, to.inputs.findIndex(({ name }) => name === input));
    connect(teacher, "clip", empty, "clip");
    connect(teacher, "model", host, "teacher");
    connect(teacher, "latents", host, "latents");
    connect(teacher, "captions", host, "captions");
    connect(empty, "CONDITIONING", host, "null_caption");
    for (const [name, value] of Object.entries(settings)) host.widgets.find((widget) => widget.name === name).value = value;
}"""


def test_a_blueprint_is_found_by_its_name_and_runs_to_a_saved_student(browser, server):  # noqa: F811
    server.post("settings/Comfy.TutorialCompleted", True)
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    opened(page, server)
    page.evaluate("app.graph.clear()")
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.get_by_role("combobox").first.fill("Make my checkpoint smaller")
    page.get_by_text("Make my checkpoint smaller", exact=True).first.wait_for()
    page.keyboard.press("Enter")
    page.wait_for_function("app.graph.nodes.length === 1")
    page.mouse.click(700, 500)  # where it goes
    page.evaluate(WITH_THE_DEMO, SETTINGS)
    page.evaluate("app.queuePrompt(0)")
    until(lambda: server.get("history"), "nothing ran", 120)
    (entry,) = server.get("history").values()
    assert comfyui.Result(entry).succeeded, entry["status"]["messages"]
    (saved,) = (server.output / "diffusion_models").glob("of a blueprint_*.safetensors")
    pruned = prune(teacher_file().architecture, preset("bk-sdm-small")).student
    assert open_unet(saved).architecture.modules == pruned.modules
    assert [row["step"] for row in rows(server.output / "distill_runs" / "blueprint")] == [1, 2]

    # Inside, the chart is of the run that is named outside, after a reload too.
    graph = page.evaluate("app.graph.serialize()")
    opened(page, server)
    load(page, graph)
    page.evaluate("app.canvas.setGraph(app.graph.nodes.find(({ subgraph }) => subgraph).subgraph)")
    page.locator(CHART).wait_for(timeout=30_000)
    assert status(page) == "step 2 of 2"
    page.close()
