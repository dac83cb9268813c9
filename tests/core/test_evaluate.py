import copy

import pytest
import torch

from distill_core.evaluate import count_macs, frechet_distance


def test_frechet_distance_of_gaussians_is_the_closed_form():
    random = torch.Generator().manual_seed(0)
    unit = torch.randn(200_000, 3, generator=random, dtype=torch.float64)
    scale, shift = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 0.0, -2.0])
    expected = (shift**2).sum() + ((scale - 1) ** 2).sum()
    assert frechet_distance(unit, unit * scale + shift) == pytest.approx(expected.item(), rel=0.02)


def test_frechet_distance_laws():
    a, b = torch.randn(50, 4), torch.randn(60, 4) + 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(a[:1], b)


def test_macs_grow_with_the_picture(small_teacher):
    small, large = (count_macs(small_teacher, (4, side, side), 5) for side in (8, 16))
    assert 3.5 < large / small < 5  # convolutions times 4, self-attention times 16, time embedding times 1


def test_macs_are_the_same_on_the_meta_device(small_teacher):
    """Which kernel a device uses for attention makes no difference."""
    meta = type(small_teacher)(network=copy.deepcopy(small_teacher.network).to("meta"), architecture=small_teacher.architecture)
    assert count_macs(meta, (4, 16, 16), 5) == count_macs(small_teacher, (4, 16, 16), 5)
