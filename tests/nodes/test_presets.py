"""The lists of presets: marked with the models they are for, and cut to those that fit the model of the graph."""

import json
import shutil
import urllib.error
import urllib.parse

import pytest

from distill_core.demo.files import TRANSFORMER
from distill_core.demo.teacher import teacher_file
from distill_core.networks.files import save_unet
from distill_core.pruning.plan import preset, preset_names

from .. import comfyui
from .pages import load

SD1 = preset_names("sd1")
OF_SD1 = [f"{name} (SD1.x)" for name in SD1]
TITLES = {"sd1": "SD1.x", "sd2": "SD2", "sdxl": "SDXL"}
ALL = [f"{name} ({TITLES[preset(name).teacher]})" for name in preset_names()]
PRUNE, TRANSFORMERS, BENCH = "DistillPruneUNetBlocks", "DistillPruneTransformerBlocks", "DistillBenchmarkPresets"


def asked(server, **query):
    try:
        return server.get(f"distill/presets?{urllib.parse.urlencode(query)}")
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def files(server):
    """A teacher of SD1.x's shape as a checkpoint, a transformer, and a file that is neither."""
    models = server.base / "models"
    teacher = teacher_file()
    for folder in ("checkpoints", "diffusion_models"):
        (models / folder / "presets").mkdir(parents=True, exist_ok=True)
    save_unet(models / "checkpoints" / "presets" / "sd1.safetensors", teacher.state_dict, teacher.architecture)
    shutil.copy(TRANSFORMER, models / "diffusion_models" / "presets" / "flux.safetensors")
    (models / "checkpoints" / "presets" / "broken.safetensors").write_bytes(b"no weights")
    (models / "outside.safetensors").write_bytes(b"")
    yield
    for folder in ("checkpoints", "diffusion_models"):
        shutil.rmtree(models / folder / "presets")


def test_the_server_says_what_presets_are_for_and_which_fit(server, files):
    about = asked(server)["presets"]
    assert {name: about[name]["family"] for name in about} == {name: preset(name).teacher for name in about}
    assert about["ssd-1b"]["title"] == "SDXL" and about["flux-1-lite"]["title"] == "Flux.1"
    assert asked(server, demo="unet") == {"fit": SD1} and asked(server, demo="transformer") == {"fit": []}
    assert asked(server, folder="checkpoints", file="presets/sd1.safetensors") == {"fit": SD1}
    assert asked(server, folder="diffusion_models", file="presets/flux.safetensors") == {"fit": []}  # of fewer blocks
    assert asked(server, folder="checkpoints", file="presets/broken.safetensors") == {"fit": None}


@pytest.mark.parametrize(
    "query",
    [
        {"folder": "checkpoints", "file": "../outside.safetensors"},
        {"folder": "checkpoints", "file": "/etc/passwd"},
        {"folder": "checkpoints", "file": "presets/none.safetensors"},
        {"folder": "configs", "file": "v1-inference.yaml"},
        {"file": "presets/sd1.safetensors"},
    ],
)
def test_it_looks_only_where_comfyui_lists_models(query, server, files):
    assert asked(server, **query) == 404


def add(page, kind, **widgets):
    """A new node; returns its id."""
    return page.evaluate(
        """([kind, widgets]) => { const node = LiteGraph.createNode(kind); node.pos = [500 * app.graph.nodes.length, 200]; app.graph.add(node);
        for (const widget of node.widgets ?? []) if (widget.name in widgets) widget.value = widgets[widget.name];
        return node.id }""",
        [kind, widgets],
    )


def link(page, one, other):
    page.evaluate(
        """([one, other]) => { const node = app.graph.getNodeById(other);
        const into = node.inputs.findIndex(({ type }) => type === "MODEL");
        app.graph.getNodeById(one).connect(0, node, into); app.api.dispatchCustomEvent("graphChanged") }""",
        [one, other],
    )


def change(page, node, **widgets):
    page.evaluate(
        """([id, widgets]) => { for (const widget of app.graph.getNodeById(id).widgets)
          if (widget.name in widgets) widget.value = widgets[widget.name];
        app.api.dispatchCustomEvent("graphChanged") }""",
        [node, widgets],
    )


def offers(page, node, expected):
    """Wait until the preset of a node offers these, as they are written."""
    page.wait_for_function(
        """([id, expected]) => { const { options } = app.graph.getNodeById(id).widgets.find(({ name }) => name === "preset");
        return options.getOptionLabel && JSON.stringify(options.values.map(options.getOptionLabel)) === expected }""",
        arg=[node, json.dumps(expected, separators=(",", ":"))],
        timeout=20_000,
    )


def test_a_list_follows_the_loader_before_it(page, files):
    load(page, {"nodes": [], "links": [], "version": 0.4})
    prune, loader = add(page, PRUNE), add(page, "CheckpointLoaderSimple", ckpt_name="presets/sd1.safetensors")
    offers(page, prune, ALL)
    between = add(page, "LoraLoaderModelOnly")
    link(page, loader, between)
    link(page, between, prune)
    offers(page, prune, OF_SD1)
    chosen = "ssd-1b"  # of another family, as when the loader was changed afterwards: it stays in the list
    change(page, prune, preset=chosen)
    offers(page, prune, [*OF_SD1, "ssd-1b (SDXL)"])


def test_without_a_preset_that_fits_all_are_offered(page, files):
    load(page, {"nodes": [], "links": [], "version": 0.4})
    prune, demo = add(page, PRUNE), add(page, "DistillLoadDemoTeacher")
    link(page, demo, prune)
    offers(page, prune, OF_SD1)
    change(page, demo, network="transformer")
    offers(page, prune, ALL)
    # Taken out of the graph and put back, it still follows.
    prune = page.evaluate(
        "id => { const node = app.graph.getNodeById(id); app.graph.remove(node); app.graph.add(node); return node.id }", prune
    )
    link(page, demo, prune)
    change(page, demo, network="unet")
    offers(page, prune, OF_SD1)


def test_a_loader_that_another_node_sets_is_not_known(page, files):
    load(page, {"nodes": [], "links": [], "version": 0.4})
    prune, loader = add(page, PRUNE), add(page, "CheckpointLoaderSimple", ckpt_name="presets/sd1.safetensors")
    link(page, loader, prune)
    offers(page, prune, OF_SD1)
    page.evaluate(
        """id => { const node = LiteGraph.createNode("PrimitiveNode"); app.graph.add(node);
        const loader = app.graph.getNodeById(id);
        node.connect(0, loader, loader.inputs.findIndex(({ name }) => name === "ckpt_name"));
        app.api.dispatchCustomEvent("graphChanged") }""",
        loader,
    )
    offers(page, prune, ALL)


def test_looking_for_new_files_keeps_what_fits(page, files):
    load(page, {"nodes": [], "links": [], "version": 0.4})
    prune, demo = add(page, PRUNE), add(page, "DistillLoadDemoTeacher")
    link(page, demo, prune)
    offers(page, prune, OF_SD1)
    page.evaluate("() => app.refreshComboInNodes()")
    offers(page, prune, OF_SD1)


def test_in_a_blueprint_the_list_follows_the_loader_outside(page, files):
    load(page, json.loads((comfyui.ROOT / "subgraphs" / "Make my checkpoint smaller.json").read_text("utf-8")))
    loader = add(page, "CheckpointLoaderSimple", ckpt_name="presets/sd1.safetensors")
    host = page.evaluate("() => app.graph.nodes.find(({ subgraph }) => subgraph).id")
    link(page, loader, host)
    page.wait_for_function(
        """expected => { const host = app.graph.nodes.find(({ subgraph }) => subgraph);
        const prunes = host.subgraph.nodes.find(({ comfyClass }) => comfyClass === "DistillPruneUNetBlocks");
        return [host, prunes].every(({ widgets }) => { const { options } = widgets.find(({ name }) => name === "preset");
          return JSON.stringify(options.values.map(options.getOptionLabel)) === expected }) }""",
        arg=json.dumps(OF_SD1, separators=(",", ":")),
        timeout=20_000,
    )


def test_the_list_of_a_benchmark_follows_its_family(page, files):
    load(page, {"nodes": [], "links": [], "version": 0.4})
    node = add(page, BENCH, family="sdxl", preset="ssd-1b")
    page.evaluate("() => app.api.dispatchCustomEvent('graphChanged')")
    offers(page, node, ["all", *(f"{name} (SDXL)" for name in preset_names("sdxl"))])


@pytest.mark.parametrize("new_nodes", [False, True], ids=["classic", "nodes 2.0"])
def test_a_person_sees_the_marks(new_nodes, page, server, files):
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", new_nodes)
    try:
        load(page, {"nodes": [], "links": [], "version": 0.4})
        prune, demo = add(page, PRUNE), add(page, "DistillLoadDemoTeacher")
        link(page, demo, prune)
        offers(page, prune, OF_SD1)
        if new_nodes:
            page.locator(f"[data-node-id='{prune}'] [role=combobox]").first.click()
        else:
            page.evaluate("id => app.canvas.centerOnNode(app.graph.getNodeById(id))", prune)
            place = page.evaluate(
                """id => { const node = app.graph.getNodeById(id), widget = node.widgets.find(({ name }) => name === "preset");
                const [x, y] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10]);
                const { left, top } = app.canvas.canvas.getBoundingClientRect(); return [x + left, y + top] }""",
                prune,
            )
            page.mouse.click(*place)
        for name in OF_SD1:
            page.get_by_text(name, exact=True).last.wait_for(timeout=10_000)
        assert not page.get_by_text("ssd-1b (SDXL)", exact=True).count()
    finally:
        page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
