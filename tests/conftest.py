"""Small UNets of the real shape, shared by all tests."""

import pytest
import torch

from distill_core.architecture import Architecture
from distill_core.denoiser import DiffusersDenoiser

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
def sd15() -> Architecture:
    """SD1.5 at its real size, shapes alone."""
    from distill_core.catalog import published_teacher

    return published_teacher("sd1")


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=random), torch.tensor([3, 700]), torch.randn(2, 5, 16, generator=random)


def pytest_terminal_summary(terminalreporter):
    """One line, not one for each test, on how to get what was missing."""
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])}
    for reason in sorted(reasons):
        terminalreporter.write_line(f"skipped: {reason}")
