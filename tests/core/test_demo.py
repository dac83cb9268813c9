import pytest
import torch

from distill_core.demo import digits
from distill_core.demo.teacher import LATENT_SHAPE, load_dataset, load_denoiser, teacher_file
from distill_core.diffusion.conditioning import Caption
from distill_core.diffusion.sampling import sample
from distill_core.pruning.plan import name_map, preset

pytestmark = pytest.mark.slow


def test_the_data_are_scikit_learns_digits():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is a development extra")
    scans = datasets.load_digits()
    pictures, labels = digits.load_digits()
    assert torch.equal(pictures, digits.enlarge(torch.from_numpy(scans.images)))
    assert labels.tolist() == scans.target.tolist()


def test_latents_have_the_shape_and_scale_of_stable_diffusions():
    pictures, _ = digits.load_digits()
    latents = digits.encode(pictures)
    assert latents.shape == (1797, 4, 8, 8)
    assert abs(latents.mean()) < 0.05 and latents.std() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(digits.decode(latents), pictures)


def test_the_autoencoder_inverts_on_screen_sized_images():
    pictures, _ = digits.load_digits()
    latents, autoencoder = digits.encode(pictures[:8]), digits.DigitsAutoencoder()
    rgb = autoencoder.decode(latents)
    assert rgb.shape == (8, 3, 64, 64) and rgb.abs().max() <= 1
    torch.testing.assert_close(autoencoder.encode(rgb), latents)


def test_captions():
    assert digits.caption(7) == "the digit seven"
    assert digits.tokenize("The digit SEVEN!") == digits.tokenize("the digit 7")
    assert digits.tokenize("") == [0] * digits.NUM_TOKENS
    assert 1 in digits.tokenize("a photo of a cat") and len(digits.tokenize("one " * 50)) == digits.NUM_TOKENS


def test_the_classifier_reads_held_out_digits():
    pictures, labels = digits.load_digits()
    train, held_out = digits.held_out_split()
    assert not set(train.tolist()) & set(held_out.tolist())
    assert digits.accuracy(digits.DigitsClassifier.bundled(), pictures[held_out], labels[held_out]) >= 0.97


def test_the_teacher_is_shaped_like_stable_diffusion_and_small():
    file = teacher_file()
    assert file.path.stat().st_size <= 5_000_000
    assert file.architecture.family == "sd1" and "mid.attn.0" in file.architecture.modules
    assert len(file.architecture.stages("down")) >= 2
    sizes = [len(name_map(file.architecture, preset(name)).removed) for name in ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")]
    assert sizes == sorted(set(sizes))  # base, small, tiny each remove more than the one before


def test_guided_samples_of_the_teacher_are_read_right():
    text, labels = digits.DigitsTextEncoder.bundled(), torch.arange(200) % 10
    contexts, null = text.captions([digits.caption(n) for n in range(10)])[labels], Caption(text.captions([""])[0])
    noise = torch.randn(200, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    drawn = digits.decode(sample(load_denoiser(teacher_file()), contexts, null, noise=noise, guidance=2.0))
    assert digits.accuracy(digits.DigitsClassifier.bundled(), drawn, labels) >= 0.95


def test_the_dataset_pairs_digits_with_their_captions():
    data, (_, labels) = load_dataset(), digits.load_digits()
    text = digits.DigitsTextEncoder.bundled()
    assert torch.equal(data.read(0, torch.tensor([5])).contexts[0], text.captions([digits.caption(int(labels[5]))])[0])
    assert torch.equal(data.null.context, text.captions([""])[0])
