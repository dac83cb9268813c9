import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from distill_core.data.dataset import (
    TIMESTEPS,
    Batching,
    Bucket,
    LatentDataset,
    draw,
    fingerprint,
    held_out_batches,
    indices,
    largest_example,
    which_bucket,
)
from distill_core.diffusion.conditioning import Caption
from distill_core.diffusion.schedule import scaled_linear

SCHEDULE = scaled_linear()


@pytest.fixture
def dataset():
    return LatentDataset.of(torch.randn(10, 4, 8, 8), torch.randn(10, 3, 5), torch.zeros(3, 5))


def settings(**changes):
    return Batching(**dict(batch_size=4, caption_dropout=0.5, seed=7) | changes)


def drawn(dataset, step, **changes):
    return draw(dataset, step, SCHEDULE, settings(**changes))


def test_the_largest_example_is_of_the_largest_size_that_has_any():
    shapes = {(8, 8): 3, (16, 8): 1, (8, 12): 2}
    buckets = [Bucket(latents=torch.randn(count, 4, *size), contexts=torch.randn(1, 3, 5)) for size, count in shapes.items()]
    example = largest_example(LatentDataset([*buckets, Bucket(latents=torch.zeros(0, 4, 32, 32), contexts=torch.randn(1, 3, 5))]))
    assert example.latents.shape == (1, 4, 16, 8) and example.contexts.shape == (1, 3, 5)


@given(num_examples=st.integers(1, 40), batch_size=st.integers(1, 17), seed=st.integers(0, 2**40))
def test_each_example_comes_once_an_epoch(num_examples, batch_size, seed):
    order = torch.cat([indices(step, batch_size, num_examples, seed) for step in range(2 * num_examples)])
    for epoch in range(2):
        part = order[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(part.tolist()) == list(range(num_examples))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))


def test_a_draw_depends_on_seed_and_step_alone(dataset):
    torch.manual_seed(1)
    first = drawn(dataset, 3)
    torch.manual_seed(2)
    drawn(dataset, 4)
    assert equal(first, drawn(dataset, 3))
    for other in (drawn(dataset, 4), drawn(dataset, 3, seed=8)):
        assert not torch.equal(first.eps, other.eps)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_are_dropped_at_the_asked_rate(share, dataset):
    batches = [drawn(dataset, step, caption_dropout=share) for step in range(250)]
    dropped = torch.cat([(b.context == 0).flatten(1).all(1) for b in batches]).float().mean().item()
    assert dropped == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("how", TIMESTEPS)
def test_timesteps_of_a_range_are_drawn_and_no_other(how, dataset):
    t = torch.cat([drawn(dataset, step, timesteps=how, within=(250, 260)).t for step in range(300)])
    assert sorted(set(t.tolist())) == list(range(250, 260))
    with pytest.raises(ValueError, match="ends at 1001, but the schedule has 1000"):
        drawn(dataset, 0, within=(0, 1001))


def test_timesteps_cover_the_schedule_evenly_or_as_a_bell(dataset):
    def histogram(how):
        t = torch.cat([drawn(dataset, step, timesteps=how).t for step in range(1000)])
        return torch.bincount(t // 100, minlength=10).float() / len(t)

    assert (histogram("uniform") - 0.1).abs().max() < 0.03
    # Of a standard normal's logistic, 10 % lie on either side of ... its tenths by the normal's own table.
    inner = torch.distributions.Normal(0, 1).cdf(torch.tensor([0.4, 0.5, 0.6]).logit())
    assert histogram("logit-normal")[4:6].tolist() == pytest.approx(inner.diff().tolist(), abs=0.03)


def test_what_the_networks_see_is_the_noised_picture(dataset):
    batch = drawn(dataset, 0)
    torch.testing.assert_close(batch.x_t, SCHEDULE.add_noise(batch.x0, batch.eps, batch.t))


def test_noise_offset_moves_whole_channels(dataset):
    def spread(offset):
        eps = torch.cat([drawn(dataset, step, noise_offset=offset).eps for step in range(200)])
        return eps.mean((2, 3)).var().item()

    assert spread(0.0) == pytest.approx(1 / 64, rel=0.2)
    assert spread(0.5) == pytest.approx(1 / 64 + 0.25, rel=0.2)


def test_input_perturbation_is_seen_but_not_to_be_found(dataset):
    plain, perturbed = drawn(dataset, 0), drawn(dataset, 0, input_perturbation=0.1)
    assert torch.equal(plain.eps, perturbed.eps)
    _, sigma = SCHEDULE.at(plain.t, plain.x_t)
    extra = (perturbed.x_t - plain.x_t) / sigma
    assert extra.std().item() == pytest.approx(0.1, rel=0.15)


def test_latents_keep_their_captions():
    numbered = torch.arange(6.0)
    data = LatentDataset.of(numbered.reshape(6, 1, 1, 1), numbered.reshape(6, 1, 1))
    batch = draw(data, 0, SCHEDULE, Batching(batch_size=6, seed=7))
    assert torch.equal(batch.x0.flatten(), batch.context.flatten())


def bucket(count, height, first=0, **more):
    numbers = torch.arange(first, first + count).float()
    latents = numbers[:, None, None, None].expand(count, 1, height, 2)
    return Bucket(latents=latents, contexts=numbers[:, None, None].expand(count, 1, 1), **more)


@hypothesis_settings(deadline=None)  # the first draw orders whole rounds
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any), batch_size=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_a_batch_is_of_one_bucket_and_each_bucket_gets_its_share(sizes, batch_size, seed):
    chosen = [which_bucket(step, batch_size, sizes, seed) for step in range(300)]
    for number, size in enumerate(sizes):
        earlier = [e for b, e in chosen if b == number]
        assert earlier == list(range(len(earlier)))
        assert bool(size) or not earlier


def test_buckets_are_drawn_from_by_their_size_each_example_equally_often():
    data = LatentDataset([bucket(30, 2), bucket(10, 4, first=100)])
    seen = {}
    for step in range(400):
        batch = draw(data, step, SCHEDULE, Batching(batch_size=4, seed=1))
        assert batch.x0.shape[2] == (4 if batch.x0.flatten()[0] >= 100 else 2)
        assert torch.equal(batch.x0[:, 0, 0, 0], batch.context.flatten())
        for number in batch.context.flatten().tolist():
            seen[number] = seen.get(number, 0) + 1
    assert len(seen) == 40 and max(seen.values()) - min(seen.values()) <= 4


def test_labels_follow_their_examples_and_are_dropped_with_the_caption():
    sizes = torch.arange(4.0)[:, None].expand(4, 6)
    data = LatentDataset(
        [bucket(4, 2, pooled=torch.arange(4.0)[:, None] + 1, sizes=sizes)], Caption(torch.zeros(1, 1), torch.zeros(1))
    )
    batch = draw(data, 0, SCHEDULE, Batching(batch_size=64, seed=0, caption_dropout=0.5))
    assert torch.equal(batch.label.sizes[:, 0], batch.x0[:, 0, 0, 0])
    dropped = batch.label.pooled[:, 0] == 0
    assert 16 < dropped.sum() < 48
    assert torch.equal(batch.label.pooled[~dropped, 0], batch.x0[~dropped, 0, 0, 0] + 1)
    assert (batch.context[dropped] == 0).all()


def test_parts_of_a_batch_are_the_batch():
    sizes = torch.arange(4.0)[:, None].expand(4, 6)
    data = LatentDataset([bucket(4, 2, pooled=torch.ones(4, 1), sizes=sizes)])
    batch = draw(data, 0, SCHEDULE, Batching(batch_size=6, seed=0))
    parts = [batch.part(slice(0, 2)), batch.part(slice(2, 6))]
    assert all(torch.equal(torch.cat([p[i] for p in parts]), batch[i]) for i in range(5))
    assert torch.equal(torch.cat([p.label.sizes for p in parts]), batch.label.sizes)


def test_stored_states_are_trained_on_as_they_are():
    x0, eps = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8)
    at = torch.tensor([900, 300])
    states = torch.stack([SCHEDULE.add_noise(x0, eps, t.expand(5)) for t in at], 1)
    data = LatentDataset([Bucket(latents=x0, contexts=torch.zeros(1, 3, 5), states=states)], timesteps=at)
    batch = draw(data, 0, SCHEDULE, Batching(batch_size=20, seed=0))
    assert set(batch.t.tolist()) == {900, 300}
    torch.testing.assert_close(SCHEDULE.add_noise(batch.x0, batch.eps, batch.t), batch.x_t)
    known = {tuple(s.flatten()[:3].tolist()) for s in states.flatten(0, 1)}
    assert {tuple(x.flatten()[:3].tolist()) for x in batch.x_t} <= known
    assert set(draw(data, 0, SCHEDULE, Batching(batch_size=20, seed=0, within=(300, 900))).t.tolist()) == {300}
    with pytest.raises(ValueError, match="contains none of the teacher's states"):
        draw(data, 0, SCHEDULE, Batching(batch_size=20, seed=0, within=(0, 300)))


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_held_out_examples_are_never_trained_on(share):
    data = LatentDataset([bucket(20, 2), bucket(10, 4, first=100)])
    batching = Batching(batch_size=4, seed=3, held_out=share, caption_dropout=0.5)
    trained = {n for step in range(200) for n in draw(data, step, SCHEDULE, batching).context.flatten().tolist()}
    batches = held_out_batches(data, SCHEDULE, batching, 100)
    held_out = {n for batch in batches for n in batch.context.flatten().tolist()}
    assert len(held_out) == 30 * share
    assert not trained & held_out and len(trained | held_out) == 30
    assert all(equal(a, b) for a, b in zip(batches, held_out_batches(data, SCHEDULE, batching, 100), strict=True))
    assert len(held_out_batches(data, SCHEDULE, batching, 1)) == 1


def test_held_out_batches_are_of_every_size_and_no_more_is_read():
    read = []

    class Counting(LatentDataset):
        def read(self, bucket, picked):
            read.append(len(picked))
            return super().read(bucket, picked)

    shapes = [(8, 8), (8, 12), (16, 8)]
    data = Counting([Bucket(latents=torch.randn(40, 4, *shape), contexts=torch.randn(1, 3, 5)) for shape in shapes])
    batches = held_out_batches(data, SCHEDULE, Batching(batch_size=4, seed=3, held_out=0.2), 4)
    assert [tuple(batch.x0.shape[2:]) for batch in batches] == [*shapes, shapes[0]] and read == [4] * 4


class Mirrored(LatentDataset):
    """Every two examples that follow one another are of one image."""

    def sources(self, bucket):
        return torch.arange(self.bucket_sizes[bucket]) // 2


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_what_was_made_of_one_image_is_held_out_as_one(share):
    data, batching = Mirrored([bucket(20, 2)]), Batching(batch_size=4, seed=3, held_out=share, caption_dropout=0.5)
    trained = {n for step in range(200) for n in draw(data, step, SCHEDULE, batching).context.flatten().tolist()}
    held_out = {n for batch in held_out_batches(data, SCHEDULE, batching, 100) for n in batch.context.flatten().tolist()}
    images = [{n // 2 for n in side} for side in (trained, held_out)]
    assert len(held_out) == 20 * share and len(trained | held_out) == 20 and not images[0] & images[1]


@pytest.mark.parametrize("make,message", [
    (lambda: LatentDataset.of(torch.zeros(4, 4, 8, 8), torch.zeros(3, 5, 6)), "one context"),
    (lambda: LatentDataset.of(torch.zeros(0, 4, 8, 8), torch.zeros(1, 5, 6)), "at least one example"),
    (lambda: bucket(2, 2, pooled=torch.zeros(2, 1)), "both pooled embeddings and sizes"),
    (lambda: bucket(2, 2, states=torch.zeros(2, 3, 1, 4, 2)), "must belong to latents"),
    (lambda: LatentDataset([bucket(2, 2)], timesteps=torch.tensor([1])), "timesteps of its stored states"),
])  # fmt: skip
def test_data_that_does_not_fit_together_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fingerprints_tell_tensors_apart():
    tensors = {"a": torch.arange(100.0), "b": torch.zeros(3)}
    assert fingerprint(tensors) == fingerprint(dict(reversed(tensors.items())))
    assert fingerprint(tensors) == fingerprint({n: t.half() for n, t in tensors.items()})
    assert fingerprint(tensors) != fingerprint(tensors | {"b": torch.ones(3)})
    assert fingerprint(tensors) != fingerprint({"a": tensors["a"]})
