"""The live view of a training: what a page is told of it, and the chart in a browser where one is installed."""

import base64
import json
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest

from distill_core.base.locks import locked
from distill_core.training.live import TERMS

from .. import comfyui
from .graphs import PROMPT, recipe, rows, save, train, trained, until
from .pages import load, opened
from .test_experts import experts
from .test_locales import OTHERS
from .test_shared_base import bake


def asked(server, name, quote=urllib.parse.quote, method="GET"):
    """Status and answer of the route for a run's name; its error instead, where it gives one."""
    address = f"http://127.0.0.1:{server.port}/distill/runs/{quote(name)}"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=10) as answer:
            return answer.status, json.loads(answer.read() or "null")
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text)["error"] if text.startswith(b"{") else None


@pytest.fixture(scope="module")
def drawn(server):
    """A short run with sample pictures: its folder."""
    nodes = {"recipe": recipe(sample_every_steps=2, validate_every_steps=3)}
    return trained(server, "live view", nodes, recipe=["recipe", 0], vae=["teacher", 2], total_steps=7, steps_per_queue=5)[0]


# --- the route


def test_a_run_is_told_as_its_metrics_have_it(drawn, server):
    status, told = asked(server, "live view")
    measured = rows(drawn)
    assert status == 200 and (told["run"], told["step"], told["total_steps"]) == ("live view", 5, 7)
    assert told["points"]["step"] == [row["step"] for row in measured] == [1, 2, 3, 4, 5]
    terms = {"total", "task", "output", "feature", "validation"}
    assert told["points"]["mean"].keys() == terms | {name for row in measured for name in row if name.startswith("timesteps/")}
    for name, values in told["points"]["mean"].items():
        assert values == [pytest.approx(row[name], rel=1e-5) if name in row else None for row in measured], name


def test_the_newest_sample_is_where_view_finds_it(drawn, server):
    sample = asked(server, "live view")[1]["sample"]
    assert sample["filename"] == "00000004.png"
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/view?{urllib.parse.urlencode(sample)}", timeout=10) as answer:
        assert answer.read() == (drawn / "samples" / "00000004.png").read_bytes()


@pytest.fixture(scope="module")
def several(server):
    """A short training of three experts: its folder."""
    prompt = {**PROMPT, "train": experts("live experts"), "x": {"class_type": "PreviewAny", "inputs": {"source": ["train", 4]}}}
    assert server.run(prompt).succeeded
    return server.output / "distill_runs" / "live experts"


def test_several_students_are_told_as_one_training(server, several):
    told, folder = asked(server, "live experts")[1], several
    totals = [row["total"] for number in range(3) for row in rows(folder / f"range_{number}")]
    assert told["points"]["step"] == [1, 2, 3, 4, 5, 6] and told["points"]["mean"]["total"] == pytest.approx(totals, rel=1e-5)
    assert told["total_steps"] == 6
    assert told["stages"] == [{"name": f"range_{number}", "after": 2 * number} for number in range(3)]


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "../distill_runs/live view",
        "..\\live view",
        "live view/checkpoints",
        "/etc",
        "C:\\",
        "nul",
        "a\x00b",
        ".hidden",
        "live view ",
        "x" * 200,
    ],
)
@pytest.mark.parametrize("quote", [lambda name: urllib.parse.quote(name, safe=""), urllib.parse.quote], ids=["all", "slashes"])
def test_any_other_name_is_not_found(name, quote, drawn, server):
    assert asked(server, name, quote)[0] == 404


def test_nothing_else_can_be_asked_for(drawn, server):
    (server.output / "secret").mkdir()
    (server.output / "secret" / "metrics.csv").write_text("step,total\n1,1.0\n")
    (server.output / "distill_runs" / "link").symlink_to(server.output / "secret", target_is_directory=True)
    assert asked(server, "link")[0] == 404
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/distill/runs/live%20view", b"{}", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(request, timeout=10)


def test_a_run_that_has_not_begun_is_no_error(server):
    assert asked(server, "no such run") == (204, None)


def listed(server):
    return {run["run"]: run for run in server.get("distill/runs")}


def test_the_runs_on_the_disk_are_listed(drawn, server):
    (server.output / "distill_runs" / "no run" / "samples").mkdir(parents=True)
    (server.output / "distill_runs" / "to it").symlink_to(drawn, target_is_directory=True)
    runs = listed(server)
    assert "live view" in runs and not {"no run", "to it"} & runs.keys()
    student = drawn / "checkpoints" / "00000005" / "student.safetensors"
    held = sum(file.stat().st_size for file in drawn.rglob("*") if file.is_file())
    assert runs["live view"] == {
        "run": "live view", "kind": "student", "step": 5, "total_steps": 7, "bytes": held, "path": str(student)
    }  # fmt: skip


def test_a_run_is_deleted_and_nothing_else(drawn, server):
    folder = server.output / "distill_runs" / "to delete"
    shutil.copytree(drawn, folder)
    (folder / "my notes.txt").write_text("keep")
    assert asked(server, "to delete", method="DELETE") == (204, None)
    assert [path.name for path in folder.iterdir()] == ["my notes.txt"] and "to delete" not in listed(server)
    status, reason = asked(server, "to delete", method="DELETE")
    assert status == 409 and "there is no run in" in reason
    whole = lambda name: urllib.parse.quote(name, safe="")  # noqa: E731
    assert asked(server, "../distill_runs/live view", whole, "DELETE")[0] == 404 and drawn.exists()


def test_a_run_that_trains_is_not_deleted(drawn, server):
    with locked(drawn):
        status, reason = asked(server, "live view", method="DELETE")
    assert status == 409 and "is in use by process" in reason and asked(server, "live view")[0] == 200


def _metrics_become(content):
    def change(folder):
        (folder / "metrics.csv").write_bytes(content)

    return change


def _pipe(folder):
    (folder / "metrics.csv").unlink()
    os.mkfifo(folder / "metrics.csv")


@pytest.mark.parametrize(
    "change,status",
    [
        (lambda folder: (folder / "recipe.toml").write_text("a=" + "[" * 100000), 200),
        (lambda folder: (folder / "recipe.toml").write_bytes(b"\xff\xfe\xff"), 200),
        (lambda folder: (folder / "recipe.toml").write_text('total_steps = "many"'), 200),
        (_metrics_become(b"step,total\n1,oops\n2,0.5\n"), 200),
        (_metrics_become(b"step,total\n1," + b"9" * 200000 + b"\n"), 204),
        (_metrics_become(b"\xff\xfe\x00,,\n\x00"), 204),
        (_metrics_become(b"total\n1\n"), 204),
        (_pipe, 204),
        (lambda folder: shutil.rmtree(folder), 204),
    ],
)  # fmt: skip
def test_a_damaged_run_is_shown_as_far_as_it_can_be_and_never_an_error(change, status, drawn, server):
    folder = server.output / "distill_runs" / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(server.output / "distill_runs" / "live view", folder)
    whole = asked(server, "damaged")
    change(folder)
    got = asked(server, "damaged")
    assert whole[0] == 200 and got[0] == status, got
    assert "Traceback" not in server.log.read_text()[-2000:]


# --- events


class Listener:
    """Hears the events of a server in the background."""

    def __init__(self, server):
        aiohttp = pytest.importorskip("aiohttp", reason="the events come by websocket: pip install aiohttp")
        import asyncio

        async def listen():
            address = f"http://127.0.0.1:{server.port}/ws?clientId=listener"
            async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
                self.ready.set()
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        self.heard.append(json.loads(message.data))

        self.heard, self.ready = [], threading.Event()
        threading.Thread(target=lambda: asyncio.run(listen()), daemon=True).start()
        assert self.ready.wait(10)

    def of(self, event):
        return [message["data"] for message in list(self.heard) if message["type"] == event]


@pytest.mark.parametrize("make,last", [(train, 3), (experts, 6), (bake, 6)], ids=["train", "experts", "bake"])
def test_every_step_is_told_while_it_trains(make, last, server):
    listener, name = Listener(server), f"told by {make.__name__}"
    result = server.run({**PROMPT, "7": make(name), "x": {"class_type": "PreviewAny", "inputs": {"source": ["7", 3]}}})
    assert result.succeeded, result.error
    until(lambda: any(told.get("step") == last for told in listener.of("distill.progress")), "the last step was not told", 10)
    until(lambda: listener.of("distill.progress")[-1].get("ended"), "the end was not told", 10)
    *told, end = listener.of("distill.progress")
    assert end["run"] == name and end["node"] == "7"
    assert all(message["run"] == name and message["node"] == "7" for message in told)
    assert [message["after"] for message in told] == [None, *(message["step"] for message in told[:-1])]
    assert [step for message in told for step in message["points"]["step"]] == list(range(1, last + 1))
    used, total = told[-1]["memory"]
    assert 1 << 20 < used < total
    assert told[-1]["seconds_left"] == 0 and told[-1]["seconds_per_step"] > 0
    assert told[-1]["stage"] == ("range 2, timesteps 332 to 0" if make is experts else "")
    history = asked(server, name)[1]
    told_totals = [value for message in told for value in message["points"]["mean"]["total"]]
    assert history["points"]["mean"]["total"] == told_totals and history["step"] == last


def test_the_curve_is_still_a_picture_for_who_uses_the_api(server):
    result = server.run({**PROMPT, "train": train("by api"), "save": save(["train", 0], "by api")})
    ((picture,),) = (result.outputs["train"]["images"],)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/view?{urllib.parse.urlencode(picture)}", timeout=10) as answer:
        assert answer.headers["Content-Type"] == "image/png"


# --- the chart

WIDGETS = ["run_name", "total_steps", "steps_per_queue", "batch_size"]  # the first of Distill Train Step, in order
CHART = ".distill-chart[data-run]"
"""Of a node whose run exists."""


def workflow(**settings):
    """The graph of the shipped workflow quickstart_scenes without what samples, as people load it."""
    graph = json.loads((comfyui.ROOT / "workflows" / "quickstart_scenes.json").read_text("utf-8"))
    kept = {"DistillLoadDemoTeacher", "CLIPTextEncode", "DistillPruneUNetBlocks", "DistillTrainStep", "DistillSaveDistilledModel"}
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] in kept]
    ids = {node["id"] for node in graph["nodes"]}
    graph["links"] = [link for link in graph["links"] if link[1] in ids and link[3] in ids]
    links = {link[0] for link in graph["links"]}
    for node in graph["nodes"]:
        for output in node["outputs"]:
            output["links"] = [link for link in output["links"] or [] if link in links]
    (trains,) = (node for node in graph["nodes"] if node["type"] == "DistillTrainStep")
    for name, value in settings.items():
        trains["widgets_values"][WIDGETS.index(name)] = value
    return graph


def points(page, kind="raw", term="total"):
    """Where the points of a line are, in its own pixels, (N, 2)."""
    path = page.locator(f"{CHART} path.{kind}.series-{term}").get_attribute("d")
    return np.array([[float(number) for number in point.split()] for point in re.split("[ML]", path)[1:]])


def follows(places, measured):
    """Whether points are where values are, but for the scale."""
    line = np.polyfit(measured, places, 1)
    return np.abs(np.polyval(line, measured) - places).max() < 0.15  # they are written to a tenth


def status(page):
    return page.locator(f"{CHART} .status").inner_text()


def test_the_chart_moves_survives_a_reload_and_is_what_was_measured(page, server):
    load(page, workflow(run_name="chart", total_steps=150, steps_per_queue=150, batch_size=4))
    assert page.locator(CHART).count() == 0
    page.evaluate("app.queuePrompt(0)")
    page.locator(f"{CHART} path.smooth.series-total").wait_for(timeout=120_000)
    seen = len(points(page))
    page.wait_for_function(
        f"seen => document.querySelector('{CHART} path.raw').getAttribute('d').split('L').length > seen", arg=seen
    )
    assert re.fullmatch(r"step \d+ of 150 · [\d.]+ (steps/s|s/step) · .+ left · [\d.]+ of [\d.]+ GiB", status(page))

    before = len(points(page))
    opened(page, server)
    page.locator(f"{CHART} path.smooth.series-total").wait_for(timeout=30_000)
    assert len(points(page)) >= before
    page.wait_for_function(f"document.querySelector('{CHART} .status').textContent === 'step 150 of 150'", timeout=300_000)

    measured = rows(server.output / "distill_runs" / "chart")
    for term in ("total", "task", "output", "feature"):
        places, values = points(page, term=term), np.array([row[term] for row in measured])
        assert len(places) == 150 and follows(places[:, 0], np.arange(1, 151))
        assert follows(places[:, 1], np.log(values)), term
        shown = page.get_by_role("button", name=term, exact=True).inner_text().split()[-1]
        assert float(shown) == pytest.approx(values[-1], rel=1e-2)
    page.get_by_role("button", name="Log scale").click()
    assert follows(points(page)[:, 1], np.array([row["total"] for row in measured]))


def test_a_graph_is_saved_as_it_was_loaded(page, drawn):
    def trains(graph):
        (node,) = (node for node in graph["nodes"] if node["type"] == "DistillTrainStep")
        return node["widgets_values"], node["size"]

    graph = workflow(run_name="live view")
    for _ in range(2):
        load(page, graph)
        page.locator(CHART).wait_for(timeout=30_000)
        saved = json.loads(page.evaluate("JSON.stringify(app.graph.serialize())"))
        assert trains(saved) == trains(graph)
        graph = saved
    prompts = page.evaluate("app.graphToPrompt().then(({ output }) => Object.values(output))")
    (inputs,) = (prompt["inputs"] for prompt in prompts if prompt["class_type"] == "DistillTrainStep")
    assert "distill_chart" not in inputs and inputs["run_name"] == "live view"


def test_the_chart_is_of_the_run_that_is_named_and_of_none_where_there_is_none(page, drawn):
    load(page, workflow(run_name="live view"))
    page.locator(CHART).wait_for(timeout=30_000)
    assert status(page) == "step 5 of 7" and len(points(page)) == 5
    rename = """name => {
        const node = app.graph.nodes.find((node) => node.type === "DistillTrainStep");
        const widget = node.widgets.find((widget) => widget.name === "run_name");
        widget.value = name;
        widget.callback(name);
    }"""
    page.evaluate(rename, "a new run")
    page.locator(CHART).wait_for(state="detached")
    assert "No run of this name yet" in page.locator(".distill-chart .panel p:visible").inner_text()
    page.evaluate(rename, "live view")
    page.locator(CHART).wait_for()
    # Removed with its node, and the other's events with it.
    page.evaluate("app.graph.clear()")
    page.locator(CHART).wait_for(state="detached")


NAME_BY_ANOTHER = """() => {
    const node = app.graph.nodes.find((node) => node.type === "DistillTrainStep");
    const names = LiteGraph.createNode("PrimitiveString");
    app.graph.add(names);
    names.connect(0, node, node.findInputSlot("run_name"));
    return String(node.id);
}"""
SAY = "([kind, detail]) => app.api.dispatchEvent(new CustomEvent(kind, { detail }))"


def test_a_chart_that_another_node_names_shows_what_this_page_runs(page, drawn):
    """Not the training of another tab, or in a subgraph, whose node has the same number."""
    load(page, workflow())
    node = page.evaluate(NAME_BY_ANOTHER)
    told = {
        "run": "live view",
        "total_steps": 7,
        "after": None,
        "step": 5,
        "points": {"step": [], "mean": {}, "min": {}, "max": {}},
    }
    page.evaluate(SAY, ["execution_start", {"prompt_id": "ours"}])
    for foreign in ({"node": node, "prompt": "theirs"}, {"node": f"7:{node}", "prompt": "ours"}):
        page.evaluate(SAY, ["distill.progress", told | foreign])
        page.wait_for_timeout(500)
        assert page.locator(CHART).count() == 0
    page.evaluate(SAY, ["distill.progress", told | {"node": node, "prompt": "ours"}])
    page.locator(CHART).wait_for(timeout=30_000)


WRAP = """() => {
    const node = app.graph.nodes.find((node) => node.type === "DistillTrainStep");
    app.graph.convertToSubgraph(new Set([node]));
}"""


def test_charts_in_subgraphs_of_graphs_that_were_left_ask_nothing(page, drawn):
    load(page, workflow(run_name="live view"))
    page.evaluate(WRAP)
    graph = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    told = {"run": "live view", "total_steps": 7, "after": None, "step": 5, "node": "1", "prompt": "ours"}
    asked = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/distill/runs/live%20view") else None)

    def requests():
        """Of a step of the run."""
        page.wait_for_timeout(500)  # of what loading asks
        asked.clear()
        page.evaluate(SAY, ["distill.progress", told | {"points": {"step": [], "mean": {}, "min": {}, "max": {}}}])
        page.wait_for_timeout(500)
        return len(asked)

    for _ in range(3):
        load(page, graph)
        assert requests() == 1
    load(page, {"nodes": [], "links": [], "version": 0.4})
    assert requests() == 0


def run_name(page):
    return page.evaluate("app.graph.nodes.find((node) => node.type === 'DistillTrainStep').widgets[0].value")


def test_a_run_is_chosen_begun_anew_and_deleted_on_the_chart(page, drawn, server):
    shutil.copytree(drawn, server.output / "distill_runs" / "another")
    load(page, workflow(run_name="nothing yet"))
    page.get_by_role("button", name="Runs").click()
    page.get_by_role("button", name="live view", exact=True).click()
    page.locator(CHART).wait_for()
    assert run_name(page) == "live view" and status(page) == "step 5 of 7" and len(points(page)) == 5

    page.get_by_role("button", name="Runs").click()
    row = page.locator(".distill-chart li", has_text="another")
    assert re.fullmatch(r"step 5 of 7 · student · \d+ MiB", row.locator(".facts").inner_text())
    row.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    row.wait_for(state="detached")
    assert not (server.output / "distill_runs" / "another").exists() and run_name(page) == "live view"
    page.get_by_role("button", name="New run").click()
    assert run_name(page) == "live view-2"
    page.locator(CHART).wait_for(state="detached")


def test_a_training_is_stopped_on_the_chart_and_keeps_its_steps(page, server):
    load(page, workflow(run_name="stopped", total_steps=5000, steps_per_queue=5000, batch_size=4))
    stop = page.get_by_role("button", name="Stop and keep")
    assert not stop.is_visible()
    page.evaluate("app.queuePrompt(0)")
    page.locator(f"{CHART} path.smooth.series-total").wait_for(timeout=120_000)
    other = page.context.browser.new_page()  # which did not queue it, and is told by the server alone
    opened(other, server)
    load(other, workflow(run_name="stopped", total_steps=5000, steps_per_queue=5000, batch_size=4))
    other.get_by_role("button", name="Stop and keep").click(timeout=30_000)
    for seen in (page, other):
        seen.get_by_role("button", name="Stop and keep").wait_for(state="hidden", timeout=30_000)
        kept = len(rows(server.output / "distill_runs" / "stopped"))
        seen.wait_for_function(
            f"text => document.querySelector('{CHART} .status').textContent === text", arg=f"step {kept} of 5000"
        )
    other.close()
    assert listed(server)["stopped"]["step"] == kept > 1


def test_a_saved_student_dropped_onto_the_canvas_opens_its_graph(page, server):
    graph = workflow(run_name="dropped", total_steps=2, steps_per_queue=2, batch_size=2)
    (saves,) = (node for node in graph["nodes"] if node["type"] == "DistillSaveDistilledModel")
    saves["widgets_values"][0] = "dropped/student"
    load(page, graph)
    page.evaluate("app.queuePrompt(0)")
    saved = server.output / "dropped"
    until(lambda: any(saved.glob("student_*.safetensors")), "nothing was saved", 120)
    page.evaluate("app.graph.clear()")
    page.evaluate(
        """async ([name, text]) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            await app.handleFile(new File([bytes], name));
        }""",
        ["student.safetensors", base64.b64encode(next(saved.glob("student_*.safetensors")).read_bytes()).decode()],
    )
    page.wait_for_function("() => app.graph.nodes.some((node) => node.type === 'DistillTrainStep')")
    assert run_name(page) == "dropped"


def test_the_stages_of_several_experts_are_marked(page, several):
    graph = json.loads((comfyui.ROOT / "workflows" / "o2mkd_scenes.json").read_text("utf-8"))
    (trains,) = (node for node in graph["nodes"] if node["type"] == "DistillTrainExperts")
    trains["widgets_values"][0] = "live experts"
    load(page, graph)
    page.locator(CHART).wait_for(timeout=30_000)
    assert page.locator(f"{CHART} .stage-name").all_text_contents() == ["range 1", "range 2"]
    assert status(page) == "step 6 of 6"


def test_everything_is_reached_by_the_keyboard(page, drawn):
    load(page, workflow(run_name="live view"))
    page.locator(CHART).wait_for(timeout=30_000)
    page.locator(f"{CHART} button").first.focus()
    reached = []
    for _ in range(10):
        reached.append(page.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"))
        page.keyboard.press("Tab")
    terms = ["total", "task", "output", "feature", "validation"]
    assert reached == ["Loss", "By timestep", "Samples", "Runs", "Log scale", *terms]

    task = page.get_by_role("button", name="task", exact=True)
    task.focus()
    assert task.evaluate("button => getComputedStyle(button).outlineStyle") == "solid"
    page.keyboard.press("Space")
    assert task.get_attribute("aria-pressed") == "false" and page.locator(f"{CHART} path.series-task").count() == 0

    page.get_by_role("button", name="By timestep").press("Enter")
    expected = {name.removeprefix("timesteps/") for row in rows(drawn) for name in row if name.startswith("timesteps/")}
    titles = page.locator(f"{CHART} .bar title").all_text_contents()
    assert {title.split(":")[0] for title in titles} == expected

    page.get_by_role("button", name="Samples").press("Enter")
    picture = page.locator(f"{CHART} img")
    assert "Teacher above, student below, step 4" in picture.get_attribute("alt")
    until(lambda: picture.evaluate("picture => picture.naturalWidth") > 100, "the picture was not loaded", 10)


def test_the_colours_are_those_of_the_theme(page, drawn, server):
    load(page, workflow(run_name="live view"))
    page.locator(CHART).wait_for(timeout=30_000)
    line = page.locator(f"{CHART} path.smooth.series-total")
    colours = []
    for theme in ("dark", "light"):
        page.evaluate("theme => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
        time.sleep(0.5)
        colours.append(line.evaluate("line => getComputedStyle(line).stroke"))
    page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
    assert colours[0] != colours[1]


SENT = {*TERMS, "all timesteps", "student", "LoRA", "experts"}
"""What the server says: losses, stages, kinds of runs."""


@pytest.mark.parametrize("language", OTHERS)
def test_every_text_of_the_chart_is_said_in_every_language(language):
    scripts = [file.read_text("utf-8") for file in sorted((comfyui.ROOT / "web" / "js").glob("*.js"))]
    (source,) = (script for script in scripts if "const TRANSLATED = {" in script)
    start = source.index("const TRANSLATED = {")
    end = source.index("\n};", start)
    (table,) = re.findall(rf"\n  {language}: {{\n(.*?)\n  }},", source[start:end], re.DOTALL)
    table = dict(re.findall(r'"(.+?)":\s*"(.+?)",(?:\n|$)', table))
    code = "\n".join([*scripts, source[:start] + source[end:]]).replace(source, "")
    (terms,) = re.findall(r"const TERMS = {\n(.+?)\n}", code, re.DOTALL)
    terms = re.findall(r"(\w+):", terms)
    assert set(terms) == set(TERMS)  # what the server sends
    assert {*re.findall(r'say\(\s*"(.+?)"', code), *SENT} - {"LoRA"} <= table.keys()
    for english, other in table.items():
        assert f'"{english}"' in code or english in SENT, f"{english} is not said"
        assert english != other and sorted(re.findall(r"{\d}", english)) == sorted(re.findall(r"{\d}", other)), english
