"""What all tests stand under, no network above all, and small UNets of the real shape."""

import os
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


def pytest_collection_modifyitems(items):
    """What starts or asks a real ComfyUI is marked by where it lies."""
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in ("nodes", "workflows"):
            item.add_marker(pytest.mark.comfy)


@pytest.fixture(autouse=True)
def tried():
    """What a test tried of the network, which must be nothing when it ends: the library asks no other machine for anything."""
    _tried.clear()
    yield _tried
    assert not _tried, _tried


@pytest.fixture(scope="session")
def comfyui_path():
    if (path := comfyui.find()) is None:
        pytest.skip(comfyui.HOW_TO_GET_IT)
    if comfyui.python(path) is None:
        pytest.skip(comfyui.HOW_TO_GET_ITS_PYTHON.format(path=path))
    return path


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
