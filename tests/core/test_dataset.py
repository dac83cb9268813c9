import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_core.dataset import LatentDataset, draw, fingerprint, indices


@pytest.fixture
def dataset():
    return LatentDataset(latents=torch.randn(10, 4, 8, 8), contexts=torch.randn(10, 3, 5), null_context=torch.zeros(3, 5))


def settings(**changes):
    return dict(batch_size=4, num_timesteps=1000, caption_dropout=0.5, seed=7) | changes


@given(num_examples=st.integers(1, 40), batch_size=st.integers(1, 17), seed=st.integers(0, 2**40))
def test_each_example_comes_once_an_epoch(num_examples, batch_size, seed):
    order = torch.cat([indices(step, batch_size, num_examples, seed) for step in range(2 * num_examples)])
    for epoch in range(2):
        part = order[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(part.tolist()) == list(range(num_examples))


def test_a_draw_depends_on_seed_and_step_alone(dataset):
    torch.manual_seed(1)
    first = draw(dataset, 3, **settings())
    torch.manual_seed(2)
    draw(dataset, 4, **settings())
    again = draw(dataset, 3, **settings())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (draw(dataset, 4, **settings()), draw(dataset, 3, **settings(seed=8))):
        assert not torch.equal(first.eps, other.eps)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_are_dropped_at_the_asked_rate(share, dataset):
    batches = [draw(dataset, step, **settings(caption_dropout=share)) for step in range(250)]
    dropped = torch.cat([(b.context == 0).flatten(1).all(1) for b in batches]).float().mean().item()
    assert dropped == pytest.approx(share, abs=0.05)


def test_timesteps_cover_the_schedule_evenly(dataset):
    t = torch.cat([draw(dataset, step, **settings(num_timesteps=10)).t for step in range(500)])
    assert (torch.bincount(t, minlength=10).float() / len(t) - 0.1).abs().max() < 0.03


def test_latents_keep_their_captions():
    numbered = torch.arange(6.0)
    data = LatentDataset(latents=numbered.reshape(6, 1, 1, 1), contexts=numbered.reshape(6, 1, 1))
    batch = draw(data, 0, **settings(batch_size=6))
    assert torch.equal(batch.x0.flatten(), batch.context.flatten())


def test_counts_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="one context"):
        LatentDataset(latents=torch.zeros(4, 4, 8, 8), contexts=torch.zeros(3, 5, 6))


def test_fingerprints_tell_tensors_apart():
    tensors = {"a": torch.arange(100.0), "b": torch.zeros(3)}
    assert fingerprint(tensors) == fingerprint(dict(reversed(tensors.items())))
    assert fingerprint(tensors) == fingerprint({n: t.half() for n, t in tensors.items()})
    assert fingerprint(tensors) != fingerprint(tensors | {"b": torch.ones(3)})
    assert fingerprint(tensors) != fingerprint({"a": tensors["a"]})
