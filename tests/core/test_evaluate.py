import copy

import pytest
import torch

from distill_core.evaluate import count_macs, frechet_distance
from distill_core.sampling import sample


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


def test_sampling_is_a_function_of_noise_and_prompt(small_teacher):
    random = torch.Generator().manual_seed(0)
    noise, context = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 5, 16, generator=random)
    options = dict(null_context=torch.zeros(5, 16), num_steps=3, guidance=3.0)
    first = sample(small_teacher, context, noise=noise, **options)
    assert first.isfinite().all() and first.shape == noise.shape
    assert torch.equal(first, sample(small_teacher, context, noise=noise, **options))
    assert not torch.equal(first, sample(small_teacher, context.flip(0), noise=noise, **options))


def test_guidance_one_is_the_conditional_answer_at_half_the_cost(small_teacher):
    random = torch.Generator().manual_seed(0)
    noise, context = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 5, 16, generator=random)
    calls = []

    class Counting(type(small_teacher)):
        def __call__(self, x, t, context):
            calls.append(len(x))
            return super().__call__(x, t, context)

    counting = Counting(network=small_teacher.network, architecture=small_teacher.architecture)
    results = [sample(counting, context, torch.zeros(5, 16), noise=noise, num_steps=2, guidance=g) for g in (1.0, 1.0000001)]
    assert calls == [1, 1, 2, 2]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
