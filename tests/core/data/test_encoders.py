import json
import shutil
import string
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_core.data.encoders import Autoencoder, DiffusersEncoders, warn_of_cut
from distill_core.demo.encoders import ScenesEncoders

pytestmark = pytest.mark.slow

CAPTIONS = ["a cat", "", "a photo of a cat, on a mat", "long " * 40]
LENGTH = 16


# --- pipelines of diffusers


def vae(**config):
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks, **config).eval()


def text_encoder(kind, seed, **config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=3, vocab_size=58)
    special = dict(bos_token_id=56, eos_token_id=57, pad_token_id=57, max_position_embeddings=LENGTH)
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**{**sizes, **special, **config})).eval()


def write_tokenizer(path):
    path.mkdir(parents=True)
    letters = string.ascii_lowercase
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "ca",
        "cat</w>",
        "ph",
        ",</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\np h\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}))


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """SD1.x or SD2, which differ in nothing that is done here."""
    folder = tmp_path_factory.mktemp("sd")
    vae(scaling_factor=0.18215).save_pretrained(folder / "vae")
    text_encoder("CLIPTextModel", 2).save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    vae(scaling_factor=0.13025).save_pretrained(folder / "vae")
    text_encoder("CLIPTextModel", 2).save_pretrained(folder / "text_encoder")
    second = text_encoder("CLIPTextModelWithProjection", 3, hidden_size=24, projection_dim=20, hidden_act="gelu")
    second.save_pretrained(folder / "text_encoder_2")
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name)
    return folder


def test_captions_are_those_of_the_stable_diffusion_pipeline(sd):
    from diffusers import StableDiffusionPipeline

    encoders = DiffusersEncoders.from_folder(sd)
    pipeline = StableDiffusionPipeline(
        encoders.autoencoder.vae,
        encoders.reader.text_encoders[0],
        encoders.reader.tokenizers[0],
        None,
        None,
        None,
        None,
        requires_safety_checker=False,
    )
    positive, negative = pipeline.encode_prompt(CAPTIONS, "cpu", 1, True)
    captions = encoders.captions(CAPTIONS)
    assert torch.equal(torch.stack([caption.context for caption in captions]), positive)
    assert torch.equal(captions[1].context, negative[0]) and captions[1].pooled is None
    assert positive.shape == (4, LENGTH, 16) and len({tuple(row.flatten().tolist()) for row in positive}) == 4


def test_captions_are_those_of_the_sdxl_pipeline(sdxl):
    from diffusers import StableDiffusionXLPipeline

    encoders = DiffusersEncoders.from_folder(sdxl)
    pipeline = StableDiffusionXLPipeline(
        encoders.autoencoder.vae, *encoders.reader.text_encoders, *encoders.reader.tokenizers, None, None, add_watermarker=False
    )
    contexts, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
    captions = encoders.captions(CAPTIONS)
    assert torch.equal(torch.stack([caption.context for caption in captions]), contexts)
    assert torch.equal(torch.stack([caption.pooled for caption in captions]), pooled)
    assert contexts.shape == (4, LENGTH, 40) and pooled.shape == (4, 20)


def test_captions_that_are_cut_are_counted_in_one_warning(sd, sdxl, caplog):
    for encoders in (DiffusersEncoders.from_folder(sd), DiffusersEncoders.from_folder(sdxl)):
        caplog.clear()
        whole, longer = "cat " * (LENGTH - 2), "cat " * (LENGTH - 1)
        warn_of_cut([whole, ""], encoders)
        assert not caplog.records
        warn_of_cut([whole, "", *[longer] * 3], encoders)
        (record,) = caplog.records
        assert f"3 of 5 captions exceed the text encoder's {LENGTH} tokens and are truncated" in record.getMessage()
        cut, not_cut = (encoders.captions([text, f"{text} cat"]) for text in (longer, whole[:-4]))
        assert torch.equal(cut[0].context, cut[1].context) and not torch.equal(not_cut[0].context, not_cut[1].context)


def test_the_demo_counts_words(caplog):
    warn_of_cut(["a cat, flat", "a cat, flat " * 4], ScenesEncoders())
    assert "1 of 2 captions exceed the text encoder's 10 tokens" in caplog.text


def test_a_caption_has_the_same_embedding_in_any_company(sdxl):
    encoders = DiffusersEncoders.from_folder(sdxl)
    together, alone = encoders.captions(CAPTIONS)[2], encoders.captions(CAPTIONS[2:3])[0]
    torch.testing.assert_close(together, alone)


def test_latents_are_the_scaled_mean(sd):
    encoders, pixels = DiffusersEncoders.from_folder(sd), torch.rand(2, 3, 16, 24) * 2 - 1
    latents = encoders.latents(pixels)
    assert latents.shape == (2, 4, 8, 12) and torch.equal(latents, encoders.latents(pixels))
    with torch.no_grad():
        posterior = vae(scaling_factor=0.18215).encode(pixels).latent_dist
    torch.testing.assert_close(latents, posterior.mean * 0.18215)
    assert posterior.std.min() > 0


@pytest.mark.parametrize(
    "config,normalised",
    [
        ({"scaling_factor": 0.5}, lambda z: z * 0.5),
        ({"scaling_factor": 0.5, "shift_factor": 0.1}, lambda z: (z - 0.1) * 0.5),
        (
            {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 8.0]},
            lambda z: (z - torch.tensor([1.0, 2, 3, 4])[:, None, None]) * 0.5 / torch.tensor([1.0, 2, 4, 8])[:, None, None],
        ),
    ],
)
def test_latents_are_normalised_as_the_autoencoder_says_and_decoding_undoes_it(config, normalised):
    network = vae(**config).requires_grad_(False)
    encoders, pixels = Autoencoder(network), torch.rand(1, 3, 16, 16) * 2 - 1
    mean = network.encode(pixels).latent_dist.mean
    torch.testing.assert_close(encoders.latents(pixels), normalised(mean))
    torch.testing.assert_close(encoders.decode(normalised(mean)), network.decode(mean).sample.clamp(-1, 1))


def test_texts_may_be_read_on_another_device(sdxl):
    encoders = DiffusersEncoders.from_folder(sdxl, text_device="meta")
    assert {encoder.device.type for encoder in encoders.reader.text_encoders} == {"meta"}
    assert encoders.autoencoder.vae.device.type == "cpu"


def test_closed_text_encoders_are_opened_again_when_there_are_captions(sdxl):
    encoders = DiffusersEncoders.from_folder(sdxl)
    before, first = encoders.captions(["a cat"])[0], encoders.reader
    encoders.close_texts()
    assert encoders.max_tokens == LENGTH and encoders._reader is None  # which need none of them
    after = encoders.captions(["a cat"])[0]
    assert torch.equal(before.context, after.context) and encoders.reader is not first


def test_an_autoencoder_that_overflows_in_half_precision_stays_in_single(sdxl):
    encoders = DiffusersEncoders.from_folder(sdxl, dtype=torch.float16)
    assert encoders.autoencoder.vae.dtype == torch.float32 and {e.dtype for e in encoders.reader.text_encoders} == {torch.float16}
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(encoders.latents(pixels), DiffusersEncoders.from_folder(sdxl).latents(pixels))
    assert DiffusersEncoders.from_folder(sdxl, dtype=torch.bfloat16).autoencoder.vae.dtype == torch.bfloat16


def copied(folder, to):

    shutil.copytree(folder, to)
    return to


def test_the_fingerprint_is_that_of_the_weights(sd, sdxl, tmp_path):
    first = DiffusersEncoders.from_folder(sd).fingerprint
    other = copied(sd, tmp_path / "other")
    assert DiffusersEncoders.from_folder(other).fingerprint == first
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: weight + 0.01 for name, weight in load_file(file).items()}, file)
    assert len({first, DiffusersEncoders.from_folder(other).fingerprint, DiffusersEncoders.from_folder(sdxl).fingerprint}) == 3


def test_the_fp16_variant_is_read_where_there_is_no_other(sd, tmp_path):
    half = copied(sd, tmp_path / "half")
    for name in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        file = half / f"{name}.safetensors"
        save_file({n: w.half() for n, w in load_file(file).items()}, half / f"{name}.fp16.safetensors", {"format": "pt"})
        file.unlink()
    encoders = DiffusersEncoders.from_folder(half)
    assert encoders.autoencoder.vae.dtype == torch.float32
    ours, theirs = (e.captions(["a cat"])[0].context for e in (encoders, DiffusersEncoders.from_folder(sd)))
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    "damage,said",
    [
        (lambda f: (f / "vae").rename(f / "VAE"), "has no folder vae; give the folder of a whole diffusers pipeline"),
        (lambda f: (f / "tokenizer_2").rename(f / "gone"), "has no folder tokenizer_2"),
        (
            lambda f: (f / "text_encoder" / "model.safetensors").rename(f / "text_encoder" / "pytorch_model.bin"),
            "no .safetensors",
        ),
        (lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"cut"), "not a valid safetensors file"),
        (lambda f: (f / "vae" / "config.json").write_text("{"), "vae cannot be opened"),
        (lambda f: (f / "text_encoder_2" / "config.json").unlink(), "text_encoder_2 cannot be opened"),
        (lambda f: (f / "tokenizer" / "vocab.json").unlink(), "holds no vocab.json"),
        (lambda f: (f / "tokenizer" / "vocab.json").write_text("{"), "tokenizer cannot be opened"),
        (
            lambda f: save_file({"x": torch.zeros(1)}, f / "text_encoder" / "model.safetensors", {"format": "pt"}),
            "lacks .* weights",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_one_sentence(damage, said, sdxl, tmp_path):
    folder = copied(sdxl, tmp_path / "pipeline")
    damage(folder)
    with pytest.raises(ValueError, match=said) as caught:
        DiffusersEncoders.from_folder(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_without_the_library_the_package_is_named(tmp_path, monkeypatch):
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="python -m pip install transformers"):
        DiffusersEncoders.from_folder(tmp_path)
