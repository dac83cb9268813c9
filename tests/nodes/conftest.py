import pytest

from .. import comfyui


@pytest.fixture(scope="session")
def comfyui_path():
    if (path := comfyui.find()) is None:
        pytest.skip(comfyui.HOW_TO_GET_IT)
    if comfyui.python(path) is None:
        pytest.skip(comfyui.HOW_TO_GET_ITS_PYTHON.format(path=path))
    return path


@pytest.fixture(scope="session")
def server(comfyui_path, tmp_path_factory):
    with comfyui.Server(comfyui_path, comfyui.python(comfyui_path), tmp_path_factory.mktemp("comfyui")) as running:
        yield running
