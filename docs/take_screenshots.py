"""Takes the images of the workflows and of single nodes in a real ComfyUI: ``python docs/take_screenshots.py o2mkd_scenes``.

Opens each workflow in Chromium, runs it if asked (``--run``), and writes ``workflows/NAME.jpg`` (quickstart_scenes:
``assets/quickstart_graph.jpg``, as its card shows scenes); with ``--node TYPE`` also
``web/docs/images/TYPE.png`` of that node. ``--opened FOLDER`` takes instead what a person sees who opens each workflow: at two
sizes of the window, with both kinds of nodes, dark, light and in Chinese. Needs a ComfyUI as the tests do
(`tests/comfyui.py`), playwright, and Chromium.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
comfyui, pages = importlib.import_module("tests.comfyui"), importlib.import_module("tests.nodes.pages")

WORKFLOWS, NODES = ROOT / "workflows", ROOT / "web" / "docs" / "images"
PICTURES = {"quickstart_scenes": ROOT / "assets" / "quickstart_graph.jpg"}
VIEW = {"width": 2600, "height": 1900}
SMALL, WIDE = {"width": 1680, "height": 1000}, {"width": 1920, "height": 969}
FORMS = {
    "dark": (False, "dark", "en", SMALL),
    "light-wide": (False, "light", "en", WIDE),
    "new-nodes-light": (True, "light", "en", SMALL),
    "new-nodes-wide": (True, "dark", "en", WIDE),
    "zh": (False, "dark", "zh", SMALL),
    "new-nodes-zh": (True, "dark", "zh", SMALL),
}
"""Whether nodes are drawn by Vue, the palette, the language and the window."""
MARGIN_PX = 8  # around the image
BEFORE_PX, AFTER_PX = 120, 420  # what ComfyUI itself shows at the left and the top, at the right and the bottom
MOST_WIDE_PX = 1400
PLACE = """([left, top, scale]) => {
    const canvas = window.app.canvas;
    canvas.ds.scale = scale; canvas.ds.offset = [left, top]; canvas.setDirty(true, true);
}"""
OPEN = """([workflow, name]) =>
    window.app.loadGraphData(workflow, true, true, name, {openSource: 'template'})"""
BOUNDS = """() => {
    const graph = window.app.graph, boxes = [...graph._groups.map(g => g._bounding ?? g.boundingRect)];
    for (const node of graph._nodes) boxes.push([node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30]);
    const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
    return [left, top, Math.max(...boxes.map(b => b[0] + b[2])) - left, Math.max(...boxes.map(b => b[1] + b[3])) - top];
}"""
ADD = """async type => {
    const node = window.LiteGraph.createNode(type);
    window.app.graph.add(node);
    await window.app.refreshComboInNodes();  // a run of just now is listed
    for (const widget of node.widgets) widget.value ??= widget.options.values?.[0];
    node.setSize([440, node.computeSize()[1]]);
}"""
NODE_BOX = """type => {
    const node = window.app.graph._nodes.find(node => node.type === type);
    return [node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30];
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="WORKFLOW", choices=[path.stem for path in WORKFLOWS.glob("*.json")])
    parser.add_argument("--run", action="store_true", help="run each workflow before its image is taken")
    parser.add_argument("--node", action="append", default=[], metavar="TYPE", help="take an image of this node, too")
    parser.add_argument("--alone", action="append", default=[], metavar="TYPE", help="take an image of this node by itself")
    parser.add_argument("--opened", type=Path, metavar="FOLDER", help="take what is seen on opening, in every form, into FOLDER")
    parser.add_argument("--base", type=Path, help="new folder for ComfyUI's files: Save Distilled Model shows its path")
    arguments = parser.parse_args()
    place = comfyui.find() or sys.exit(comfyui.HOW_TO_GET_IT)
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("there is no Chromium")
    with tempfile.TemporaryDirectory() as temporary:
        base = arguments.base or Path(temporary)
        take_all(arguments, place, chromium, base)


def take_all(arguments: argparse.Namespace, place: Path, chromium: str, base: Path) -> None:
    with comfyui.Server(place, comfyui.python(place), base) as server:
        shutil.copytree(place / "input", base / "input", dirs_exist_ok=True)  # ComfyUI's example image
        stand_ins(base, arguments.names)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport=VIEW)
            if arguments.opened:
                take_opened(page, server, arguments.names, arguments.opened)
                return
            come(page, server)
            for name in arguments.names:
                take(page, server, name, arguments.run, arguments.node)
            for kind in arguments.alone:
                take_alone(page, kind)
            browser.close()


def come(page: Page, server) -> None:
    pages.opened(page, server)
    page.wait_for_timeout(5000)  # what ComfyUI says at its start is gone


def take_opened(page: Page, server, names: list[str], folder: Path) -> None:
    """Screenshots of the window ``FOLDER/NAME-FORM.png`` just after a workflow was opened."""
    folder.mkdir(parents=True, exist_ok=True)
    server.post("settings/Comfy.TutorialCompleted", True)
    for form, (new_nodes, palette, locale, size) in FORMS.items():
        server.post("settings/Comfy.VueNodes.Enabled", new_nodes)
        server.post("settings/Comfy.ColorPalette", palette)
        server.post("settings/Comfy.Locale", locale)
        page.set_viewport_size(size)
        come(page, server)
        for name in names:
            workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
            page.evaluate(OPEN, [workflow, name])
            page.wait_for_timeout(2000)
            page.screenshot(path=folder / f"{name}-{form}.png")
        print(f"took {form}")


def stand_ins(base: Path, names: list[str]) -> None:
    """Empty files under the names that workflows choose, so that ComfyUI does not mark them as missing."""
    texts = [(WORKFLOWS / f"{name}.json").read_text(encoding="utf-8") for name in names]
    for file in {file for text in texts for file in re.findall(r'"([\w./ -]+\.safetensors)"', text)}:
        for folder in ("checkpoints", "loras", "controlnet", "diffusion_models", "text_encoders", "vae"):
            path = base / "models" / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def take(page: Page, server, name: str, run: bool, node_types: list[str]) -> None:
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
    page.keyboard.press("Escape")
    page.wait_for_timeout(2000)
    bounds = page.evaluate(BOUNDS)
    framed(page, bounds)  # before it runs, so that every widget is made
    if run:
        page.evaluate("() => window.app.queuePrompt(0)")
        page.wait_for_timeout(2000)
        while any(server.get("queue").values()):
            time.sleep(1)
        page.wait_for_timeout(4000)
        bounds = page.evaluate(BOUNDS)
    image = framed(page, bounds)
    image.thumbnail((MOST_WIDE_PX, MOST_WIDE_PX))
    image.save(PICTURES.get(name, WORKFLOWS / f"{name}.jpg"), quality=85)
    for kind in node_types:
        if any(node["type"] == kind for node in workflow["nodes"]):
            framed(page, page.evaluate(NODE_BOX, kind), scale=1.0).save(NODES / f"{kind}.png")
    print(f"took {name}")


def take_alone(page: Page, kind: str) -> None:
    """An image of a node by itself, with its defaults."""
    page.evaluate("() => window.app.loadGraphData({nodes: [], links: [], groups: [], version: 0.4})")
    page.evaluate(ADD, kind)
    page.wait_for_timeout(1000)
    framed(page, page.evaluate(NODE_BOX, kind), scale=1.0).save(NODES / f"{kind}.png")
    print(f"took {kind}")


def framed(page: Page, bounds: list[float], scale: float | None = None) -> Image.Image:
    """The part of the graph within bounds (left, top, width, height, in the graph's own units), as large as the page allows."""
    left, top, width, height = bounds
    room = VIEW["width"] - BEFORE_PX - AFTER_PX, VIEW["height"] - BEFORE_PX - AFTER_PX
    scale = scale or min(1.0, room[0] / width, room[1] / height)
    page.evaluate(PLACE, [BEFORE_PX / scale - left, BEFORE_PX / scale - top, scale])
    page.wait_for_timeout(1500)
    shown = page.locator("#graph-canvas").bounding_box() or {"x": 0, "y": 0}
    clip = {
        "x": BEFORE_PX + shown["x"] - MARGIN_PX,
        "y": BEFORE_PX + shown["y"] - MARGIN_PX,
        "width": width * scale + 2 * MARGIN_PX,
        "height": height * scale + 2 * MARGIN_PX,
    }
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")


if __name__ == "__main__":
    main()
