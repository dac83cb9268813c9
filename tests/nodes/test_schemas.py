"""What every node owes its user."""

import re

import pytest

from ..comfyui import ROOT
from .test_locales import OTHERS

NAMES = {
    "DistillLoadDemoTeacher": "Load Demo Teacher",
    "DistillPruneUNetBlocks": "Prune UNet Blocks",
    "DistillPruneTransformerBlocks": "Prune Transformer Blocks",
    "DistillAnalyseUNetBlocks": "Analyse UNet Blocks",
    "DistillAnalyseTransformerBlocks": "Analyse Transformer Blocks",
    "DistillLoadDistilledModel": "Load Distilled Model",
    "DistillRemapLoRAToStudent": "Remap LoRA to Student",
    "DistillTeacherDataset": "Teacher Dataset",
    "DistillTrainStep": "Distill Train Step",
    "DistillTrainExperts": "Train Timestep Experts",
    "DistillLoadExperts": "Load Timestep Experts",
    "DistillSharedBaseLoRA": "Shared-Base LoRA",
    "DistillTimestepRouter": "Timestep Router",
    "DistillTimestepRouterSampler": "Timestep Router Sampler",
    "DistillCompareModels": "Compare Models",
    "DistillReport": "Distillation Report",
    "DistillBenchmarkPresets": "Benchmark Presets",
    "DistillRecipe": "Distillation Recipe",
    "DistillSaveDistilledModel": "Save Distilled Model",
}


@pytest.fixture(scope="module")
def nodes(server):
    return {name: info for name, info in server.get("object_info").items() if info["category"] == "distill"}


def test_the_nodes_have_their_names(nodes):
    assert {name: info["display_name"] for name, info in nodes.items()} == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_node_explains_itself(name, nodes):
    info = nodes[name]
    assert len(info["description"]) > 60 and len(info["search_aliases"]) >= 3
    assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"])
    assert (ROOT / "web" / "docs" / f"{name}.md").exists()
    for section in info["input"].values():
        for field, (kind, *options) in section.items():
            if section is not info["input"].get("hidden"):
                assert options and options[0].get("tooltip"), f"{field} has no tooltip"
                if kind in ("INT", "FLOAT"):
                    assert (
                        options[0]["min"] < options[0]["max"] and options[0]["min"] <= options[0]["default"] <= options[0]["max"]
                    )


@pytest.mark.parametrize("name", NAMES)
def test_few_widgets_are_visible(name, nodes):
    widgets = [
        options
        for section in ("required", "optional")
        for kind, *options in nodes[name]["input"].get(section, {}).values()
        if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    ]
    assert len([w for w in widgets if not w[0].get("advanced")]) <= 12


def test_help_pages_are_served(server):
    import urllib.request

    docs = f"http://127.0.0.1:{server.port}/extensions/distill-nodes/docs"
    for page in [f"{name}{ending}.md" for name in NAMES for ending in ("", *(f"/{language}" for language in OTHERS))]:
        with urllib.request.urlopen(f"{docs}/{page}", timeout=10) as answer:
            assert "html" not in answer.headers["Content-Type"]  # which the front end takes for an error
            text = answer.read().decode()
        pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
        assert text.startswith("# ") and ("## Example" in text or "/" in page) and pictures
        for picture in pictures:  # in every language relative to docs/, as the front end resolves them
            with urllib.request.urlopen(f"{docs}/{picture}", timeout=10) as answer:
                assert answer.read(4) == b"\x89PNG"


def test_the_pack_loads_without_complaint(server):
    about_us = [line for line in server.log.read_text().split("Starting server")[0].splitlines() if "distill-nodes" in line]
    assert about_us and not [line for line in about_us if "FAILED" in line or "Traceback" in line or "WARNING" in line]
