"""What all tests stand under, no network above all, and small UNets of the real shape."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small only wait for a second thread; the servers' too

import pytest
import torch

from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.conditioning import Label
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.networks.architecture import Architecture

from . import comfyui
from .offline.sitecustomize import refuse

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what runs in its background

_tried: list[str] = []
refuse(_tried.append)


COMFY = ("workflows", "nodes")


def pytest_collection_modifyitems(items):
    """What starts or asks a real ComfyUI is marked by where it lies, and comes first.

    It has the longest files: of several processes none is left alone with one at the end.
    """
    places = {item: item.path.relative_to(Path(__file__).parent).parts[0] for item in items}
    for item, place in places.items():
        if place in COMFY:
            item.add_marker(pytest.mark.comfy)
    items.sort(key=lambda item: COMFY.index(places[item]) if places[item] in COMFY else len(COMFY))


@pytest.fixture(autouse=True)
def tried():
    """What a test tried of the network, which must be nothing when it ends: the library asks no other machine for anything."""
    _tried.clear()
    yield _tried
    assert not _tried, _tried


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pages are looked at by playwright: pip install playwright")
    with playwright.sync_playwright() as running:
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        try:
            opened = running.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as error:
            pytest.skip(f"pages are looked at in Chromium: playwright install chromium ({error.message.splitlines()[0]})")
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def comfyui_path():
    if (path := comfyui.find()) is None:
        pytest.skip(comfyui.HOW_TO_GET_IT)
    if comfyui.python(path) is None:
        pytest.skip(comfyui.HOW_TO_GET_ITS_PYTHON.format(path=path))
    return path


@pytest.fixture(scope="session")
def in_comfyui(comfyui_path, tmp_path_factory):
    """Run a function of in_comfyui.py by the Python of ComfyUI, each in a process of its own.

    All are forks of one that has loaded ComfyUI, but those that ask what loading does.
    """
    folder = tmp_path_factory.mktemp("in_comfyui")
    tried, says = folder / "tried.log", folder / "says.txt"
    environment = comfyui.offline_environment(tried)
    command = [comfyui.python(comfyui_path), str(comfyui.ROOT / "tests" / "nodes" / "in_comfyui.py"), str(comfyui_path)]
    loaded = None

    def run(function, *arguments):
        nonlocal loaded
        arguments = [str(argument) for argument in arguments]
        if function.startswith("loading.") or not hasattr(os, "fork"):
            done = subprocess.run([*command, function, *arguments], capture_output=True, text=True, env=environment)
            code, text = done.returncode, done.stderr
        else:
            if loaded is None:
                pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                loaded = subprocess.Popen(command, text=True, env=environment, **pipes)
            says.unlink(missing_ok=True)
            print(json.dumps([function, arguments, str(says)]), file=loaded.stdin, flush=True)
            code, text = int(loaded.stdout.readline() or 1), says.read_text() if says.exists() else "ComfyUI did not start"
        assert code == 0, text[-3000:]
        assert not tried.exists(), tried.read_text()
        return text

    yield run
    if loaded is not None:
        loaded.stdin.close()
        loaded.wait(30)


SMALL = dict(
    sample_size=8,
    block_out_channels=(32, 32, 64, 64),
    cross_attention_dim=16,
    attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)
"""SD1.x with its four levels and eight heads, at a tenth of its width."""


@pytest.fixture(scope="session")
def small_teacher() -> DiffusersDenoiser:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    network = UNet2DConditionModel(**SMALL).eval()
    return DiffusersDenoiser(network=network, architecture=Architecture.from_state_dict(network.state_dict()))


@pytest.fixture(scope="session")
def small_data() -> LatentDataset:
    """Twelve examples of noise for the small teacher."""
    random = torch.Generator().manual_seed(0)
    latents, contexts = torch.randn(12, 4, 8, 8, generator=random), torch.randn(12, 4, 16, generator=random)
    return LatentDataset.of(latents, contexts, torch.zeros(4, 16))


SMALL_XL = dict(
    sample_size=8,
    block_out_channels=(32, 64, 128),
    cross_attention_dim=16,
    attention_head_dim=[1, 2, 4],
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    transformer_layers_per_block=[1, 2, 4],
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=8 + 6 * 256,
)
"""SDXL with its three levels and stacks of transformer blocks, at a tenth of its width."""


@pytest.fixture(scope="session")
def small_xl_teacher() -> DiffusersDenoiser:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    network = UNet2DConditionModel(**SMALL_XL).eval()
    architecture = Architecture.from_state_dict(network.state_dict(), head_channels=32)
    return DiffusersDenoiser(network=network, architecture=architecture)


@pytest.fixture(scope="session")
def published() -> dict[str, Architecture]:
    """SD1.5, SD2 and SDXL at their real sizes, shapes alone."""
    from distill_core.evaluation.catalog import TEACHER_CONFIGS, published_teacher

    return {family: published_teacher(family) for family in TEACHER_CONFIGS}


@pytest.fixture(scope="session")
def sd15(published) -> Architecture:
    return published["sd1"]


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=random), torch.tensor([3, 700]), torch.randn(2, 5, 16, generator=random)


@pytest.fixture
def xl_batch(batch):
    random = torch.Generator().manual_seed(2)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64], [96, 64, 8, 0, 64, 64]])
    return *batch, Label(torch.randn(2, 8, generator=random), sizes)


def pytest_terminal_summary(terminalreporter):
    """One line, not one for each test, on how to get what was missing."""
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])}
    for reason in sorted(reasons):
        terminalreporter.write_line(f"skipped: {reason}")
