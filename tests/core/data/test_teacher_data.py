import json
import shutil
import time
from dataclasses import replace

import pytest
import torch

from distill_core.base.seeding import generator
from distill_core.base.storage import read_header
from distill_core.data.cache import CachedDataset, key
from distill_core.data.dataset import Batching, draw, held_out_batches
from distill_core.data.teacher_data import GenerationSettings, _jobs, draw_dataset, drawn_fingerprint, make_dataset, make_latents
from distill_core.diffusion.conditioning import Caption
from distill_core.diffusion.schedule import scaled_linear

pytestmark = pytest.mark.slow

GENERATION = GenerationSettings(size=(64, 64), guidance=2.0, num_steps=4)


class Words:
    """Encoders of a vocabulary of their own, that count how often they are asked."""

    fingerprint = "words"

    def __init__(self):
        self.asked = []

    def captions(self, captions):
        self.asked += captions
        return [Caption(torch.randn(5, 16, generator=torch.Generator().manual_seed(sum(map(ord, text))))) for text in captions]


def make(folder, teacher, prompts=("one", "two", "three"), generation=GENERATION, **options):
    return make_dataset(
        lambda: teacher, "teacher", Words(), prompts, generation, folder, batch_size=2, schedule=scaled_linear(), **options
    )


def everything(dataset):
    return dataset.read(0, torch.arange(dataset.bucket_sizes[0]))


def test_the_teacher_draws_each_prompt_as_a_sampler_would(tmp_path, small_teacher):
    from distill_core.base.seeding import generator
    from distill_core.diffusion.sampling import sample

    dataset = make(tmp_path / "cache", small_teacher, prompts=["one"])
    words = Words()
    caption, null = words.captions(["one", ""])
    noise = torch.randn(4, 8, 8, generator=generator(0, 0, "one"))[None]
    expected = sample(small_teacher, caption.context[None], null, noise=noise, guidance=2.0, num_steps=4)
    examples = everything(dataset)
    torch.testing.assert_close(examples.latents.float(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(examples.contexts[0].float(), caption.context, rtol=1e-3, atol=1e-3)


def test_what_was_made_is_not_made_again(tmp_path, small_teacher):
    calls = []
    small = type(small_teacher)(network=small_teacher.network, architecture=small_teacher.architecture)
    whole = make(tmp_path / "whole", small)

    class Stop(BaseException):
        pass

    def stop(done, total):
        calls.append((done, total))
        if done:
            raise Stop

    with pytest.raises(Stop):
        make(tmp_path / "parts", small, on_item=stop)
    assert calls == [(0, 3), (2, 3)]
    progress, steps = [], []
    told = {"on_item": lambda *item: progress.append(item), "on_step": lambda *step: steps.append(step)}
    parts = make(tmp_path / "parts", small, **told)
    each = GENERATION.num_steps
    assert progress == [(2, 3), (3, 3)] and steps == [(done, 3 * each) for done in range(2 * each, 3 * each + 1)]
    assert parts.fingerprint == whole.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(everything(parts)[:2], everything(whole)[:2], strict=True))
    small.network = None  # a teacher that could not answer
    assert make(tmp_path / "parts", small).fingerprint == whole.fingerprint
    assert CachedDataset.open(tmp_path / "parts").fingerprint == whole.fingerprint


def test_a_batch_is_on_disk_before_the_next_is_begun(tmp_path, small_teacher):
    """A process that is killed runs nothing more, no finally either."""
    counts, folder = [], tmp_path / "c"

    def count(done, total):
        shapes = [tensor.shape for file in folder.glob("shard-*") for tensor in read_header(file).tensors.values()]
        counts.append((done, shapes.count((4, 8, 8))))

    make(folder, small_teacher, on_item=count)
    assert counts == [(0, 0), (2, 2), (3, 3)]


def test_the_teacher_is_loaded_once_all_prompts_are_encoded_and_only_if_needed(tmp_path, small_teacher):
    order, words = [], Words()

    def load():
        order.append(f"teacher after {len(words.asked)} prompts")
        return small_teacher

    for _ in range(2):
        make_dataset(
            load, "teacher", words, ["one", "two", "three"], GENERATION, tmp_path / "c", batch_size=2, schedule=scaled_linear()
        )
    assert order == ["teacher after 4 prompts"] and sorted(words.asked) == ["", "one", "three", "two"]


def test_prompts_of_different_lengths_are_drawn_together(tmp_path, small_teacher):
    class OfLengths(Words):
        def captions(self, captions):
            return [
                Caption(torch.randn(5 * (1 + len(text) // 4), 16, generator=torch.Generator().manual_seed(len(text))))
                for text in captions
            ]

    def drawn(folder, *prompts):
        dataset = make_dataset(
            lambda: small_teacher, "teacher", OfLengths(), prompts, GENERATION, folder, batch_size=2, schedule=scaled_linear()
        )
        return dict(zip((entry.latent for entry in dataset.entries), everything(dataset).latents.float(), strict=True))

    alone, together = drawn(tmp_path / "alone", "one"), drawn(tmp_path / "together", "one", "a longer one")
    (name,) = alone
    torch.testing.assert_close(together[name], alone[name], rtol=2e-3, atol=2e-3)


def test_several_images_of_a_prompt_differ(tmp_path, small_teacher):
    dataset = make(
        tmp_path / "c",
        small_teacher,
        prompts=["one", "two"],
        generation=GenerationSettings(size=(64, 64), num_steps=2, num_per_prompt=3),
    )
    latents = everything(dataset).latents
    assert len(latents) == 6 and len({tuple(latent.flatten()[:4].tolist()) for latent in latents}) == 6
    assert sorted(dataset.sources(0).tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("change", [{"guidance": 3.0}, {"num_steps": 5}, {"seed": 1}, {"num_states": 2}, {"size": (64, 128)}])
def test_every_setting_makes_other_data(change, tmp_path, small_teacher):
    plain = make(tmp_path / "plain", small_teacher, prompts=["one"])
    other = make(tmp_path / "other", small_teacher, prompts=["one"], generation=GenerationSettings(**vars(GENERATION) | change))
    assert plain.fingerprint != other.fingerprint
    a, b = everything(plain), everything(other)
    assert a.latents.shape != b.latents.shape or not torch.equal(a.latents, b.latents) or b.states is not None


def test_states_lie_on_the_trajectory_and_are_trained_on(tmp_path, small_teacher):
    generation = GenerationSettings(size=(64, 64), guidance=2.0, num_steps=4, num_states=2)
    dataset = make(tmp_path / "c", small_teacher, generation=generation)
    assert dataset.timesteps.tolist() == [999, 499]
    words = Words()
    caption, null = words.captions(["one", ""])
    noise = torch.randn(1, 4, 8, 8)
    latents, states = make_latents(small_teacher, [caption], null, noise, generation)
    assert torch.equal(states[0, 0], noise[0]) and states.shape == (1, 2, 4, 8, 8)
    batch = draw(dataset, 0, scaled_linear(), Batching(batch_size=8, seed=0))
    assert set(batch.t.tolist()) <= {999, 499}
    stored = everything(dataset).states.float().flatten(0, 1)
    assert all((stored - x_t).abs().amax((1, 2, 3)).min() == 0 for x_t in batch.x_t)


@pytest.mark.parametrize("change,message", [({"num_states": 9}, "between 0 and the"), ({"num_steps": 0}, "num_steps must be between 1 and 1,000, got 0"),
                                            ({"num_per_prompt": 0}, "num_per_prompt must be between 1"), ({"num_per_prompt": 10**9}, "and 10,000,000, got 1,000,000,000"),
                                            ({"size": (64, 10**6)}, "width must be between 8 and"), ({"guidance": float("nan")}, "guidance must be .*, got nan"),
                                            ({"num_per_prompt": True}, "must be a whole number, got True"), ({"seed": 2**70}, "seed must be"),
                                            ({"guidance_min": 2.0}, "guidance_min must be between 1 and guidance 2")])  # fmt: skip
def test_settings_that_make_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**vars(GENERATION) | change)


def test_no_prompt_is_refused(tmp_path, small_teacher):
    with pytest.raises(ValueError, match="there are no prompts"):
        make(tmp_path / "c", small_teacher, prompts=["", "  "])


@pytest.mark.parametrize("change", [{}, {"num_per_prompt": 2}, {"num_states": 2}, {"seed": 5}])
def test_the_fingerprint_is_known_before_anything_is_drawn(change, tmp_path, small_teacher):
    *captions, null = (Caption(context) for context in torch.randn(3, 5, small_teacher.architecture.context_width))
    generation, how = replace(GENERATION, **change), {"schedule": scaled_linear()}
    drawn = draw_dataset(lambda: small_teacher, "teacher", captions, null, generation, tmp_path / "drawn", **how)
    assert drawn_fingerprint("teacher", captions, null, generation, **how) == drawn.fingerprint
    assert drawn_fingerprint("another", captions, null, generation, **how) != drawn.fingerprint


def test_encoded_captions_are_drawn_as_prompts_are(tmp_path, small_teacher):
    *captions, null = Words().captions(["one", "two", "two", "nothing of this"])
    generation, counts = replace(GENERATION, num_states=2), []
    options = {"batch_size": 2, "schedule": scaled_linear(), "on_item": lambda done, total: counts.append((done, total))}
    drawn = draw_dataset(lambda: small_teacher, "teacher", captions, null, generation, tmp_path / "c", **options)
    assert counts == [(0, 3), (2, 3), (3, 3)] and drawn.null.context.float().allclose(null.context, atol=1e-3)
    examples = everything(drawn)
    assert examples.states.shape == (3, 2, 4, 8, 8) and not torch.equal(examples.latents[1], examples.latents[2])
    loaded = []
    again = draw_dataset(lambda: loaded.append(1), "teacher", captions, null, generation, tmp_path / "c", **options)
    assert counts[3:] == [(3, 3)] and not loaded and again.fingerprint == drawn.fingerprint
    other = draw_dataset(
        lambda: small_teacher,
        "teacher",
        captions,
        captions[0],
        generation,
        tmp_path / "d",
        batch_size=2,
        schedule=scaled_linear(),
    )
    assert other.fingerprint != drawn.fingerprint  # guidance leads away from something else


RANGED = replace(GENERATION, guidance=3.0, guidance_min=1.0, num_states=2)


def scales_of(dataset):
    examples = everything(dataset)
    return dict(zip((entry.latent for entry in dataset.entries), examples.scale.tolist(), strict=True))


def test_each_trajectory_of_a_range_has_a_scale_of_its_own(tmp_path, small_teacher):
    """It is what the sampler was guided by, whatever else is drawn with it, and is there when the cache is opened again."""
    made = make(tmp_path / "c", small_teacher, prompts=["one", "two"], generation=replace(RANGED, num_per_prompt=3))
    scales = scales_of(made)
    assert len({*scales.values()}) == 6 and all(1 <= scale <= 3 for scale in scales.values())
    assert made.scales == (1.0, 3.0) == CachedDataset.open(tmp_path / "c").scales
    assert scales_of(CachedDataset.open(tmp_path / "c")) == scales
    alone = make(tmp_path / "alone", small_teacher, prompts=["two"], generation=RANGED)
    assert scales_of(alone).items() <= scales.items()
    (scale,) = scales_of(alone).values()
    words = Words()
    caption, null = words.captions(["two", ""])
    noise = torch.randn(4, 8, 8, generator=generator(0, 0, "two"))[None]
    latents, states = make_latents(small_teacher, [caption], null, noise, replace(GENERATION, guidance=scale, num_states=2))
    examples = everything(alone)
    torch.testing.assert_close(examples.latents.float(), latents, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(examples.states.float(), states, rtol=2e-3, atol=2e-3)


def test_scales_of_many_trajectories_fill_the_range():
    scales = torch.stack([RANGED.scale(number, source) for number in range(200) for source in ("a", "b")])
    assert 1 <= scales.min() < 1.05 and 2.95 < scales.max() <= 3 and scales.mean() == pytest.approx(2, abs=0.1)
    assert GENERATION.scale(0, "a") is None


def test_a_state_is_trained_at_the_scale_it_was_drawn_with(tmp_path, small_teacher):
    made = make(tmp_path / "c", small_teacher, generation=RANGED)
    batching = Batching(batch_size=4, seed=0, held_out=0.4, scales=made.scales)
    examples = everything(made)
    batches = [draw(made, step, scaled_linear(), batching) for step in range(3)]
    for batch in [*batches, *held_out_batches(made, scaled_linear(), batching, 1)]:
        for x0, scale in zip(batch.x0, batch.scale, strict=True):
            (number,) = [n for n, latent in enumerate(examples.latents) if torch.equal(latent.float(), x0)]
            assert scale == examples.scale[number]


def test_one_scale_makes_the_images_it_made_before_and_tells_the_scale(tmp_path, small_teacher):
    states = replace(GENERATION, num_states=2)
    made = make(tmp_path / "c", small_teacher, generation=states)
    assert made.scales == (2.0, 2.0) and everything(made).scale.tolist() == [2.0] * 3
    assert not any(".scale" in name for file in (tmp_path / "c").glob("shard-*") for name in read_header(file).tensors)
    text = "9dba4a64a4a8a1f5"
    names = [key("made", text, 0, "teacher", (64, 64), 2.0, 4, None, 2, 0, "fp16")]  # as released
    assert [job.name for job in _jobs([("source", text)], states, "teacher", "fp16")] == names
    assert make(tmp_path / "plain", small_teacher).scales is None


def test_a_cache_that_does_not_tell_its_scale_is_read(tmp_path, small_teacher):
    made = make(tmp_path / "c", small_teacher, generation=replace(GENERATION, num_states=2))
    index = json.loads((tmp_path / "c" / "index.json").read_text())
    del index["scales"]
    (tmp_path / "c" / "index.json").write_text(json.dumps(index))
    old = CachedDataset.open(tmp_path / "c")
    assert old.scales is None and everything(old).scale is None and old.fingerprint == made.fingerprint


@pytest.mark.parametrize("scales", [5, "ab", [1], [None, 2], {"a": 1}])
def test_scales_that_are_none_are_refused(scales, tmp_path, small_teacher):
    make(tmp_path / "c", small_teacher, generation=replace(GENERATION, num_states=2))
    index = json.loads((tmp_path / "c" / "index.json").read_text())
    (tmp_path / "c" / "index.json").write_text(json.dumps(index | {"scales": scales}))
    with pytest.raises(ValueError, match="is not a valid cache index"):
        CachedDataset.open(tmp_path / "c")


def test_images_are_told_before_they_are_counted(tmp_path):
    """Neither time nor memory goes by how many there are to be."""

    class Stop(BaseException):
        pass

    def stop(done, total):
        assert (done, total) == (0, 5_000_000)
        raise Stop

    began = time.process_time()
    with pytest.raises(Stop):
        make(tmp_path / "c", None, prompts=["one"], generation=replace(GENERATION, num_per_prompt=5_000_000), on_item=stop)
    assert time.process_time() - began < 2


def test_more_images_than_there_is_room_for_are_refused(tmp_path, small_teacher, monkeypatch):
    def load():
        raise AssertionError("too late")

    with pytest.raises(ValueError, match="20,000,000 images are more than the 10,000,000"):
        generation = replace(GENERATION, num_per_prompt=10_000_000)
        make_dataset(load, "teacher", Words(), ["one", "two"], generation, tmp_path / "c", schedule=scaled_linear())
    each = 4 * 8 * 8 * 2 * 3
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 2 * each))
    with pytest.raises(ValueError, match="3 images with 2 states each need at least .* generate fewer"):
        make_dataset(
            load, "teacher", Words(), ["a", "b", "c"], replace(GENERATION, num_states=2), tmp_path / "c", schedule=scaled_linear()
        )
    generation = replace(GENERATION, num_states=2)
    make(tmp_path / "c", small_teacher, prompts=["a", "b"], generation=generation)
    assert make(tmp_path / "c", small_teacher, prompts=["a", "b", "c"], generation=generation).bucket_sizes == [
        3
    ]  # two are there
