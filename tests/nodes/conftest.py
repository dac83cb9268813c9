import json
import subprocess

import pytest

from .. import comfyui


@pytest.fixture(scope="package")
def server(comfyui_path, tmp_path_factory):
    """One for all of these tests, ended with them: what it holds is room that others need."""
    with comfyui.Server(comfyui_path, comfyui.python(comfyui_path), tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="session")
def in_comfyui(comfyui_path, tmp_path_factory):
    """Run a function of in_comfyui.py by the Python of ComfyUI."""

    def run(function, *arguments):
        script = comfyui.ROOT / "tests" / "nodes" / "in_comfyui.py"
        command = [comfyui.python(comfyui_path), script, comfyui_path, function, *arguments]
        tried = tmp_path_factory.mktemp("tried") / "tried.log"
        environment = comfyui.offline_environment(tried)
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not tried.exists(), tried.read_text()
        return done.stderr

    return run


@pytest.fixture(scope="session")
def found(in_comfyui, tmp_path_factory):
    """What a function of a file beside this one, given as ``module.function``, found."""

    def run(function):
        out = tmp_path_factory.mktemp("found") / "found.json"
        in_comfyui(function, out)
        return json.loads(out.read_text())

    return run
