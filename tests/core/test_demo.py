"""The demo: what captions say, what pictures show, and what the judge reads."""

import random

import pytest
import torch
from PIL import Image

from distill_core.demo import files, grammar
from distill_core.demo.autoencoder import ScenesAutoencoder, copied, mean_of_copies
from distill_core.demo.drawing import RGB, as_images, draw, draw_all
from distill_core.demo.encoders import ScenesEncoders
from distill_core.demo.grammar import CATEGORIES, COLORS, OBJECTS, Group, Scene, prompts, random_scenes, tokenize
from distill_core.demo.judge import ScenesJudge, asked_of
from distill_core.demo.score import all_prompts, judged, score, spread
from distill_core.demo.teacher import DATA_SEED, load_dataset, load_denoiser, teacher_file
from distill_core.demo.text import CONTEXT_WIDTH, ScenesTextEncoder
from distill_core.demo.transformer import load_transformer, load_transformer_dataset
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.networks.build import build_unet
from distill_core.networks.network import open_network
from distill_core.pruning.plan import name_map, preset


@pytest.mark.parametrize(
    "scene,caption",
    [
        (Scene(Group("apple", 2, "red"), "left of", Group("cat"), "flat"), "two red apples left of a cat, flat"),
        (Scene(Group("octopus")), "an octopus"),
        (Scene(Group("owl", 1, "orange"), style="shaded"), "an orange owl, shaded"),
        (Scene(Group("strawberry", 3)), "three strawberries"),
        (Scene(Group("bus", 2), "above", Group("fish", 1, "blue")), "two buses above a blue fish"),
    ],
)
def test_captions_are_english(scene, caption):
    assert scene.caption == caption


def test_every_word_is_known_and_every_caption_fits():
    scenes = random_scenes(2000, 7, held_out=None)
    ids = [grammar.token_ids(scene.caption) for scene in scenes]
    assert max(map(len, ids)) <= grammar.NUM_TOKENS and not any(1 in row for row in ids)
    assert tokenize("Two RED apples!") == tokenize("two red apple") != tokenize("red apple")
    assert 1 in tokenize("a photo of a cat") and tokenize("") == [0] * grammar.NUM_TOKENS


def test_there_are_sixty_objects_or_more_and_no_two_words_are_one():
    assert len(set(OBJECTS)) == len(OBJECTS) >= 60
    assert len(set(grammar.WORDS)) == len(grammar.WORDS)


def test_what_is_held_out_is_never_trained_on():
    trained = random_scenes(3000, 1)
    assert not any(scene.held_out for scene in trained)
    pairs = {(group.object, group.color) for scene in trained for group in scene.groups if group.color}
    counts = {(group.object, group.count) for scene in trained for group in scene.groups}
    together = {frozenset((scene.first.object, scene.second.object)) for scene in trained if scene.second}
    for category in CATEGORIES:
        for scene in [] if category == "object" else prompts(category, 100, 0, held_out=True):
            unseen = [
                *((group.object, group.color) not in pairs for group in scene.groups if group.color),
                *((group.object, group.count) not in counts for group in scene.groups if group.count > 1),
                scene.second is not None and frozenset((scene.first.object, scene.second.object)) not in together,
            ]
            assert any(unseen), scene.caption


def test_a_part_of_every_kind_of_combination_is_held_out_and_every_word_is_trained_on():
    all_scenes = random_scenes(4000, 2, held_out=None)
    assert 0.1 < sum(scene.held_out for scene in all_scenes) / 4000 < 0.4
    words = {word for scene in random_scenes(4000, 3) for word in grammar.token_ids(scene.caption)}
    assert words == set(range(2, len(grammar.WORDS)))
    with pytest.raises(ValueError, match="no single object"):
        prompts("object", 1, 0, held_out=True)


def test_the_other_side_of_a_relation_is_the_same_picture():
    cat, dog = Group("cat"), Group("dog", 2)
    for one, other in (("left of", "right of"), ("above", "below")):
        here, there = Scene(cat, one, dog, "flat"), Scene(dog, other, cat, "flat")
        assert here.placed == there.placed and (draw(here, random.Random(5)) == draw(there, random.Random(5))).all()
        assert here.placed != Scene(dog, one, cat, "flat").placed


def test_pictures_are_decided_by_the_seed_and_vary_with_it():
    scenes = [Scene(Group("castle"), style="flat")] * 20
    assert torch.equal(draw_all(scenes, 3), draw_all(scenes, 3))
    assert len({picture.numpy().tobytes() for picture in draw_all(scenes, 3)}) > 10


def test_a_color_is_the_color_of_the_picture():
    for color in COLORS:
        picture = draw_all([Scene(Group("book", 1, color), style="flat")], 0)[0].float()
        off = (picture - picture[:, :1, :1]).abs().sum(0) > 60
        mean = picture[:, off].mean(1)
        assert min(COLORS, key=lambda name: (mean - torch.tensor(RGB[name])).norm()) == color


def test_the_emoji_are_all_there_and_their_licences_too():
    with Image.open(files.DATA / "emoji.png") as atlas:
        assert atlas.mode == "RGBA" and atlas.size == (48 * 16, 48 * 8)
        for number in range(len(OBJECTS) * 2):
            left, top = 48 * (number % 16), 48 * (number // 16)
            assert atlas.crop((left, top, left + 48, top + 48)).getextrema()[3][1] == 255
    notice = (files.DATA / "NOTICE.md").read_text("utf-8")
    assert all(word in notice for word in ("Noto Emoji", "Apache License", "Fluent Emoji", "MIT", "Microsoft"))


# --- judge, autoencoder, score


@pytest.fixture(scope="module")
def unseen():
    """Scenes of no training set, held out or not, and their pictures."""
    scenes = random_scenes(1500, 999, held_out=None)
    return scenes, as_images(draw_all(scenes, 999))


@pytest.mark.slow
def test_the_judge_reads_nearly_every_picture_whole(unseen):
    scenes, images = unseen
    assert ScenesJudge.bundled().agrees(images, scenes).float().mean() >= 0.98


@pytest.mark.slow
def test_the_judge_tells_a_wrong_picture(unseen):
    scenes, images = unseen
    judge = ScenesJudge.bundled()
    assert judge.agrees(images, scenes[1:] + scenes[:1]).float().mean() < 0.02
    two = [Scene(Group("cat"), "left of", Group("dog"), "flat"), Scene(Group("cat", 1, "red"), style="flat")]
    wrong = [Scene(Group("cat"), "right of", Group("dog"), "flat"), Scene(Group("cat", 1, "blue"), style="flat")]
    assert judge.agrees(as_images(draw_all(two, 0)), two).all() and not judge.agrees(as_images(draw_all(two, 0)), wrong).any()


@pytest.mark.slow
def test_the_autoencoder_keeps_what_the_judge_reads(unseen):
    scenes, images = unseen
    autoencoder, judge = ScenesAutoencoder.bundled(), ScenesJudge.bundled()
    with torch.no_grad():
        latents = autoencoder.encode(images)
        assert latents.shape == (1500, 4, 8, 8) and abs(latents.mean()) < 0.05 and latents.std() == pytest.approx(1, abs=0.05)
        assert judge.agrees(autoencoder.decode(latents), scenes).float().mean() >= 0.95


@pytest.mark.slow
def test_the_encoders_are_those_the_teacher_was_trained_with():
    encoders, scenes = ScenesEncoders(), random_scenes(2, 0)
    pixels, captions = as_images(draw_all(scenes, 0)), [scenes[0].caption, ""]
    latents, (caption, null) = encoders.latents(pixels), encoders.captions(captions)
    assert torch.equal(latents, ScenesAutoencoder.bundled().encode(pixels))
    assert torch.equal(encoders.decode(latents), ScenesAutoencoder.bundled().decode(latents))
    assert caption.pooled is None and caption.context.shape == null.context.shape == (grammar.NUM_TOKENS, CONTEXT_WIDTH)
    assert torch.equal(torch.stack([caption.context, null.context]), ScenesTextEncoder.bundled().captions(captions))
    assert encoders.fingerprint == ScenesEncoders().fingerprint


def test_what_a_scene_leaves_open_is_not_asked():
    asked = asked_of([Scene(Group("cat"))])
    assert {question for question, answer in asked.items() if answer.item() >= 0} == {
        "arrangement",
        "first object",
        "first count",
    }


def test_a_score_is_the_mean_of_the_categories_with_an_interval_around_it():
    right = {"object": torch.tensor([True] * 60 + [False] * 40), "color": torch.ones(10, 4, dtype=torch.bool)}
    found = score(right)
    assert found.by_category == {"object": pytest.approx(0.6), "color": 1.0} and found.overall == pytest.approx(0.8)
    low, high = found.interval
    assert 0.75 - 0.03 < low < 0.8 < high < 0.85 + 0.03
    assert score({"color": right["color"]}).interval == (1.0, 1.0)


def test_spread_is_the_mean_distance_within_a_prompt():
    features = torch.tensor([[[0.0], [2.0]], [[5.0], [9.0]]])
    assert spread(features) == pytest.approx(3.0) and spread(torch.zeros(2, 3, 4)) == 0


def test_prompts_are_of_their_category():
    found = all_prompts(30, 4, held_out=False)
    assert set(found) == set(CATEGORIES) and set(all_prompts(1, 4, held_out=True)) == set(CATEGORIES) - {"object"}
    assert all(scene.first.count > 1 and not scene.first.color and not scene.second for scene in found["count"])
    assert all(scene.second and scene.first.color != scene.second.color is not None for scene in found["binding"])
    assert found == all_prompts(30, 4, held_out=False) != all_prompts(30, 5, held_out=False)


# --- teacher


def test_the_teacher_is_shaped_like_stable_diffusion_and_small():
    file = teacher_file()
    assert file.path.stat().st_size <= 7_000_000 and 3e6 <= file.architecture.num_parameters <= 8e6
    assert file.architecture.family == "sd1" and "mid.attn.0" in file.architecture.modules
    sizes = [len(name_map(file.architecture, preset(name)).removed) for name in ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")]
    assert sizes == sorted(set(sizes))  # base, small, tiny each remove more than the one before


@pytest.mark.slow
def test_the_teacher_draws_what_it_is_asked_for_held_out_or_not():
    found = judged(load_denoiser(teacher_file()), num_prompts=8, seed=3, guidance=3.0)
    assert found.images.shape == (72, 3, 64, 64) and found.images.abs().max() <= 1
    assert [prompt.scene.held_out for prompt in found.prompts] == [prompt.kind == "held out" for prompt in found.prompts]
    assert found.score("trained").overall >= 0.9 and found.score("held out").overall >= 0.9
    by_category = found.by_category("held out")
    assert list(by_category) == ["count", "color", "position", "binding"] and all(
        len(right) == 8 for right in by_category.values()
    )


def test_the_transformer_is_shaped_like_flux_and_small():
    file = open_network(files.TRANSFORMER)
    assert file.architecture.title == "Flux.1" and file.architecture.depths == {"double": 4, "single": 8}
    assert files.TRANSFORMER.stat().st_size <= 10_000_000


def test_each_latent_channel_comes_four_times_and_the_transformer_reads_their_mean():
    latents = torch.randn(2, 4, 8, 8)
    assert copied(latents).shape == (2, 16, 8, 8) and torch.equal(copied(latents)[:, 4:8], latents[:, 1:2].expand(2, 4, 8, 8))
    torch.testing.assert_close(mean_of_copies(copied(latents)), latents)
    transformer, examples = load_transformer(), load_transformer_dataset(50).read(0, torch.tensor([3, 7]))
    assert torch.equal(mean_of_copies(examples.latents), load_dataset(50).read(0, torch.tensor([3, 7])).latents)
    apart = torch.randn(2, 16, 8, 8)
    apart -= copied(mean_of_copies(apart))  # of mean 0 over copies
    asked = torch.tensor([100, 800]), examples.contexts, examples.label
    answer = transformer(examples.latents, *asked)
    assert torch.equal(answer, copied(mean_of_copies(answer)))
    torch.testing.assert_close(transformer(examples.latents + apart, *asked), answer, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_transformer_draws_what_it_is_asked_for_held_out_or_not():
    found = judged(load_transformer(), num_prompts=8, seed=3, guidance=3.0, transformer=True)
    assert found.score("trained").overall >= 0.6 and found.score("held out").overall >= 0.6


@pytest.mark.slow
def test_an_untrained_network_does_not_draw_what_it_was_asked_for():
    architecture = teacher_file().architecture
    untrained = DiffusersDenoiser(network=build_unet(architecture).eval(), architecture=architecture)
    assert judged(untrained, num_prompts=4, seed=3, guidance=1.0, num_steps=2).score("trained").overall < 0.1


def test_scenes_are_learnt_with_their_captions_and_none_is_held_out():
    data, scenes, text = load_dataset(50), random_scenes(50, DATA_SEED), ScenesTextEncoder.bundled()
    examples = data.read(0, torch.tensor([7]))
    assert torch.equal(examples.contexts[0], text.captions([scenes[7].caption])[0]) and not any(s.held_out for s in scenes)
    assert torch.equal(data.null.context, text.captions([""])[0])
    assert (
        ScenesJudge.bundled().agrees(ScenesAutoencoder.bundled().decode(data.read(0, torch.arange(50)).latents), scenes).sum()
        > 40
    )
