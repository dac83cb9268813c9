import json

import pytest

from .. import comfyui
from .pages import opened


@pytest.fixture(scope="package")
def server(comfyui_path, tmp_path_factory):
    """One for all of these tests, ended with them: what it holds is room that others need."""
    with comfyui.Server(comfyui_path, comfyui.python(comfyui_path), tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture
def page(browser, server):
    server.post("settings/Comfy.TutorialCompleted", True)
    context = browser.new_context(viewport={"width": 1500, "height": 1300})
    page = context.new_page()
    opened(page, server)
    yield page
    context.close()


@pytest.fixture(scope="session")
def found(in_comfyui, tmp_path_factory):
    """What a function of a file beside this one, given as ``module.function``, found."""

    def run(function):
        out = tmp_path_factory.mktemp("found") / "found.json"
        in_comfyui(function, out)
        return json.loads(out.read_text())

    return run
