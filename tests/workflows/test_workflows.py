"""The shipped workflows, run by comfy-cli on a real server, unchanged but for the batches and steps of some.

Those that begin with the student of the quickstart find its run complete.
"""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from distill_core.demo.grammar import Group, Scene
from distill_core.demo.judge import ScenesJudge
from distill_core.networks.network import open_network
from distill_core.routing.experts import Experts
from distill_core.training.run import read_metrics

from .. import comfyui
from .shortened import misfits, shortened

WORKFLOWS = comfyui.ROOT / "workflows"
ASKED = Scene(Group("apple", 2, "red"), "left of", Group("cat"), "flat")
"""What the workflows of the demo draw."""
LIGHT = {
    "DistillTrainExperts": {"batch_size": 16},
    "DistillSharedBaseLoRA": {"batch_size": 8},
    "DistillTeacherDataset": {"images_per_prompt": 1},
}
"""On a CPU a step takes as long as its batch is large."""


@pytest.fixture(scope="module")
def server(comfyui_path, tmp_path_factory):
    with comfyui.Server(comfyui_path, comfyui.python(comfyui_path), tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_a_workflow_uses_known_nodes_and_has_its_picture(path, server):
    assert path.with_suffix(".jpg").exists()
    known = server.get("object_info")
    graph = json.loads(path.read_text())
    used = {node["type"] for node in graph["nodes"]} - {"MarkdownNote", "Note", "Reroute", "PrimitiveNode"}
    assert used <= known.keys()
    for node in graph["nodes"]:
        if node["type"].startswith("Distill"):
            names = [*known[node["type"]]["input"].get("required", {}), *known[node["type"]]["input"].get("optional", {})]
            assert {entry["name"].partition(".")[0] for entry in node["inputs"]} <= set(names)  # models.model_1 is one of models
    assert misfits(graph, known) == []


def test_the_workflows_are_in_the_template_browser(server):
    listed = server.get("workflow_templates")["distill-nodes"]
    assert sorted(listed) == sorted(path.stem for path in WORKFLOWS.glob("*.json"))


def run(path, server):
    comfy = shutil.which("comfy", path=str(Path(sys.executable).parent)) or shutil.which("comfy")
    if comfy is None:
        pytest.skip("comfy-cli is not installed: pip install comfy-cli")
    command = [comfy, "--skip-prompt", "run", "--workflow", str(path), "--wait",
               "--host", "127.0.0.1", "--port", str(server.port), "--timeout", "900"]  # fmt: skip
    done = subprocess.run(command, cwd=comfyui.ROOT, capture_output=True, text=True, env=comfyui.quiet_environment())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def run_light(server, tmp_path):
    known = server.get("object_info")

    def run_it(name, change=lambda graph: graph, **changes):
        graph = shortened(json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8")), known, LIGHT, changes)
        (tmp_path / f"{name}.json").write_text(json.dumps(change(graph)))
        run(tmp_path / f"{name}.json", server)

    return run_it


def pictures(server, name):
    """The pictures a workflow saved under a name, (N, 3, 64, 64) in [-1, 1]."""
    files = sorted((server.output / "distill").glob(f"{name}_*.png"))
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def rows_of_grid(file, num_rows, num_images, side_px=64):
    """The images of each row of a grid by Compare Models, (num_images, 3, side_px, side_px) in [-1, 1]."""
    pixels = torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).permute(2, 0, 1) / 127.5 - 1
    shown_px = pixels.shape[2] // num_images - 4  # between gaps of 4
    line_px = (pixels.shape[1] - 4 - num_rows * shown_px) // (num_rows + 1)  # of names: of the columns, and above each row
    for row in range(num_rows):
        top = line_px + row * (line_px + shown_px) + line_px
        images = (pixels[:, top : top + shown_px, left : left + shown_px] for left in range(4, pixels.shape[2] - 4, shown_px + 4))
        step = shown_px // side_px
        yield torch.stack([image[:, ::step, ::step] for image in images])


def share_of_right(drawn):
    """Of pictures, how many show what the workflows ask for."""
    return ScenesJudge.bundled().agrees(drawn, [ASKED] * len(drawn)).float().mean()


def test_quickstart_runs_to_a_student_that_draws_scenes(server, run_light):
    run_light("quickstart_scenes")

    # The saved file is the student the graph produced.
    (saved,) = (server.output / "diffusion_models").glob("scenes_student_*.safetensors")
    checkpoint = max((server.output / "distill_runs" / "quickstart-scenes" / "checkpoints").iterdir())
    ours, theirs = load_file(saved), load_file(checkpoint / "student.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n].half()) for n in ours)

    # Its pictures are what the teacher's are, those of the pruned model are not.
    assert share_of_right(pictures(server, "teacher")) >= 0.85 and share_of_right(pictures(server, "distilled")) >= 0.85
    assert share_of_right(pictures(server, "pruned")) <= 0.2


def test_a_transformer_is_cut_and_taught_again(server, run_light):
    """With fewer steps than it ships with."""
    run_light("heal_scenes", DistillTrainStep={"total_steps": 40, "steps_per_queue": 40, "batch_size": 16, "local_steps": 20})
    (saved,) = (server.output / "diffusion_models").glob("scenes_transformer_student_*.safetensors")
    assert open_network(saved).architecture.depths == {"double": 4, "single": 5}
    assert share_of_right(pictures(server, "heal_scenes_whole")) >= 0.85
    assert share_of_right(pictures(server, "heal_scenes_cut")) <= 0.5
    rows = read_metrics(server.output / "distill_runs" / "heal-scenes")
    for term in ("local", "output"):
        measured = [row[term] for row in rows if term in row]
        assert len(measured) == 20 and sum(measured[-5:]) < 0.9 * sum(measured[:5]), term


def test_a_small_model_begins_and_a_big_one_finishes(server, run_light):
    run_light("route_big_and_small")
    assert all(share_of_right(pictures(server, name)) >= 0.85 for name in ("big", "small_then_big"))


def test_three_students_draw_scenes_as_one_model(server, run_light):
    run_light("o2mkd_scenes")
    experts = Experts.read(server.output / "distill_runs" / "o2mkd-scenes" / "experts")
    assert len(experts.files) == 3 and len({member.fingerprint for member in experts.members}) == 3
    assert share_of_right(pictures(server, "o2mkd_teacher")) >= 0.85 and share_of_right(pictures(server, "o2mkd_experts")) >= 0.85


def test_a_lora_draws_at_cfg_1_what_the_model_draws_with_guidance(server, run_light):
    run_light("bake_guidance_scenes")
    (file,) = (server.output / "distill").glob("scenes_guidance_*.png")
    guided, baked, plain = map(share_of_right, rows_of_grid(file, num_rows=3, num_images=8))
    assert min(guided, baked) >= 0.85 > plain
    assert list((server.output / "loras").glob("scenes_guided_200_steps_*.safetensors"))


def with_unlearned_beside(graph, learned, name):
    """Let ``graph`` also draw and save, as ``name``, what the sampler on the model of the LoRA ``learned`` draws without it."""
    links = {link[0]: link for link in graph["links"]}
    sampler = next(
        node for node in graph["nodes"] if node["type"] == "KSampler" and links[node["inputs"][0]["link"]][1] == learned["id"]
    )
    chain = [sampler]
    while chain[-1]["type"] != "SaveImage":
        (follows,) = chain[-1]["outputs"][0]["links"]
        chain.append(next(node for node in graph["nodes"] if node["id"] == links[follows][3]))
    ids = {node["id"]: graph["last_node_id"] + place for place, node in enumerate(chain, 1)}
    base = links[learned["inputs"][0]["link"]][1:3]
    copies = copy.deepcopy(chain)
    for node in copies:
        node["id"] = ids[node["id"]]
        for entry in node["inputs"]:
            if entry.get("link") is None:
                continue
            _, source, slot, target, place, kind = links[entry["link"]]
            source, slot = base if source == learned["id"] else (ids.get(source, source), slot)
            graph["last_link_id"] += 1
            entry["link"] = graph["last_link_id"]
            graph["links"].append([entry["link"], source, slot, ids[target], place, kind])
    copies[-1]["widgets_values"] = [f"distill/{name}"]
    graph["nodes"] += copies
    graph["last_node_id"] += len(copies)
    return sampler


@pytest.mark.parametrize(
    "name,slow,fast", [("turbo_lora_scenes", "turbo_model", "turbo_lora"), ("small_and_fast", "fast_teacher", "fast_small")]
)
def test_four_evaluations_draw_what_forty_do(name, slow, fast, server, run_light):
    """Judged on 36 pictures, and better than the same model draws without the LoRA: 40 steps of training are hardly seen."""

    def unlearned_too(graph):
        (learning,) = (node for node in graph["nodes"] if node["type"] == "DistillSharedBaseLoRA")
        sampler = with_unlearned_beside(graph, learning, "unlearned")
        assert sampler["widgets_values"][2:6] == [4, 1.0, "euler", "simple"]
        return graph

    for left in (server.output / "distill").glob("unlearned_*"):
        left.unlink()
    run_light(name, unlearned_too, EmptyLatentImage={"batch_size": 36})

    guided, learned, unlearned = (pictures(server, drawn) for drawn in (slow, fast, "unlearned"))
    assert share_of_right(guided) >= 0.85
    assert share_of_right(learned) > share_of_right(unlearned) + 0.1


def test_a_student_learns_a_style_of_ones_own(server, run_light):
    run_light("fine_tune_scenes")
    before, after = pictures(server, "scenes_student"), pictures(server, "scenes_fine_tuned")
    assert share_of_right(before) >= 0.5
    redness = [(drawn[:, 0] - drawn[:, 2])[:, :, :24].mean() for drawn in (before, after)]  # of the two apples
    assert redness[0] > 0.2 > 0 > redness[1]


def test_three_models_are_compared_on_one_page(server, run_light):
    graph = json.loads((WORKFLOWS / "compare_scenes.json").read_text("utf-8"))
    of_type = {node["type"]: node for node in graph["nodes"]}
    (named,) = (entry for entry in of_type["DistillReport"]["inputs"] if entry["name"] == "run_name")  # typed in one place alone
    assert of_type["DistillTrainStep"]["outputs"][4] == {"name": "run_name", "type": "STRING", "links": [named["link"]]}
    run_light("compare_scenes")
    page, votes = sorted((server.output / "distill").glob("compare_scenes_*.html"))
    assert votes.stem.endswith("_votes")
    text = page.read_text("utf-8")
    teacher, pruned, distilled = re.findall(r"<tr><td>(\w+)</td>.*<td>([^<]*)</td></tr>", text)
    assert (teacher[1], pruned[0], distilled[0]) == ("reference", "pruned", "distilled")
    assert float(distilled[1]) < 0.4 * float(pruned[1]) and "Loss of every step" in text
