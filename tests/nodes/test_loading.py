"""Loading the pack adds its nodes to ComfyUI, and changes nothing else there."""

import json

import pytest

from .. import comfyui
from .test_schemas import NAMES


@pytest.fixture(scope="module")
def traces(found):
    return found("loading.traces")


def test_nothing_of_comfyui_torch_or_python_is_another_than_before(traces):
    assert traces["loaded"]
    folder, name = str(comfyui.ROOT), comfyui.ROOT.name
    nodes = {f"nodes.{table}[{node!r}]" for node in NAMES for table in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS")}
    lists = ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "LOADED_MODULE_DIRS", "EXTENSION_WEB_DIRS")
    registered = {f"len(nodes.{table})" for table in lists} | {f"nodes.LOADED_MODULE_DIRS[{name!r}]"}
    registered |= {f"nodes.EXTENSION_WEB_DIRS[{key!r}]" for key in (name, "distill-nodes")}
    assert set(traces["changed"]) - registered == nodes, json.dumps(traces["changed"], indent=1).replace(folder, "")


def test_it_listens_at_its_own_addresses_alone(traces):
    assert sorted(traces["routes"]) == [
        "DELETE /distill/runs/{name}",
        "GET /distill/presets",
        "GET /distill/runs",
        "GET /distill/runs/{name}",
    ]


def test_diffusers_and_peft_wait_until_they_are_needed(traces):
    assert not set(traces["imported"]) & {"diffusers", "peft", "transformers", "matplotlib", "bitsandbytes", "accelerate"}
