import json
import logging
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distill_core.base.storage import read_header
from distill_core.data import cache
from distill_core.data.cache import CachedDataset, CacheWriter, Entry, encode, latent_key, text_key, tile, writing
from distill_core.data.images import fit, folder
from distill_core.diffusion.conditioning import Caption

pytestmark = pytest.mark.slow

SIZES = [(64, 64), (64, 128), (128, 64)]


class Plain:
    """Encoders whose answers are the same in any company: means of pixels, and numbers drawn for each caption."""

    max_tokens, fingerprint = 10, "plain"

    def num_tokens(self, captions):
        return (len(caption.split()) for caption in captions)

    def latents(self, pixels):
        means = F.avg_pool2d(pixels, 8)
        return torch.cat([means, means.mean(1, keepdim=True)], 1)

    def captions(self, captions):
        drawn = (torch.randn(8, 64, generator=torch.Generator().manual_seed(crc32(text.encode()))) for text in captions)
        return [Caption(context) for context in drawn]

    def decode(self, latents):
        return F.interpolate(latents[:, :3], scale_factor=8)


class Counting(Plain):
    """Encoders that remember what they were asked."""

    def __init__(self):
        self.num_images, self.texts = 0, []

    def latents(self, pixels):
        self.num_images += len(pixels)
        return super().latents(pixels)

    def captions(self, captions):
        self.texts += captions
        return super().captions(captions)


class ForSdxl(Counting):
    """With pooled embeddings, as SDXL's have."""

    def captions(self, captions):
        return [Caption(c.context, c.context.mean(0)[:6]) for c in super().captions(captions)]


def add_picture(path, seed, size=(70, 70), caption=None):
    pixels = torch.randint(256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.frombytes("RGB", size[::-1], pixels.numpy().tobytes()).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def pictures(tmp_path):
    """Nine pictures in three shapes, with five captions."""
    (tmp_path / "pictures").mkdir()
    for i in range(9):
        size = ((70, 80), (70, 150), (140, 64))[i % 3]
        add_picture(tmp_path / "pictures" / f"{i}.png", i, size, f"picture {i // 2}")
    return tmp_path / "pictures"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_ENTRIES", 4)


def encoded(pictures, encoders, to, **options):
    return encode(folder(pictures), encoders, SIZES, to, **{"batch_size": 2} | options)


def everything(dataset):
    """All there is to read, bucket by bucket."""
    read = [dataset.read(b, torch.arange(size)) for b, size in enumerate(dataset.bucket_sizes)]
    return [part for examples in read for part in (examples.latents, examples.contexts)] + [dataset.null.context]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(everything(one), everything(other), strict=True))


def shards(to):
    return sorted(to.glob("shard-*"))


# --- what is read is what was encoded


@pytest.mark.parametrize("dtype,precision", [("fp16", torch.float16), ("fp32", torch.float32)])
def test_what_is_read_is_what_the_encoders_gave(dtype, precision, pictures, tmp_path, small_shards):
    encoders, to = Plain(), tmp_path / "cache"
    dataset = encoded(pictures, encoders, to, dtype=dtype)
    assert dataset.bucket_sizes == [3, 3, 3] and dataset.timesteps is None
    entries = {entry.latent: entry for entry in dataset.entries}
    for picture, size in zip(folder(pictures), 3 * SIZES, strict=True):
        name = latent_key(picture.content(), encoders.fingerprint, dtype, size)
        bucket = sorted((1, 4, h // 8, w // 8) for h, w in SIZES).index((1, 4, size[0] // 8, size[1] // 8))
        number = [entry.latent for entry in dataset._buckets[bucket]].index(name)
        latents, contexts, label, states, _ = dataset.read(bucket, torch.tensor([number]))
        fitted = fit(picture.open(), size)
        assert torch.equal(latents, encoders.latents(fitted.pixels[None]).to(precision)) and label is states is None
        assert torch.equal(contexts[0], encoders.captions([picture.caption])[0].context.to(precision))
        assert entries[name].text == text_key(picture.caption, encoders.fingerprint, dtype)
        assert tuple(entries[name].sizes) == fitted.sizes
    assert torch.equal(dataset.null.context, encoders.captions([""])[0].context.to(precision))
    assert len(shards(to)) == 4  # of 9 pictures, 5 captions and the empty one, four to a shard


def test_examples_are_picked_by_number_in_any_order(pictures, tmp_path):
    dataset = encoded(pictures, Plain(), tmp_path / "cache")
    whole, picked = dataset.read(1, torch.arange(3)), torch.tensor([2, 0, 2, 1])
    assert torch.equal(dataset.read(1, picked).latents, whole.latents[picked])
    assert torch.equal(dataset.read(1, picked).contexts, whole.contexts[picked])


def test_an_sdxl_is_told_the_sizes(pictures, tmp_path):
    encoders = ForSdxl()
    dataset = encoded(pictures, encoders, tmp_path / "cache", dtype="fp32")
    for bucket, told in enumerate([(70, 80, 0, 4, 64, 64), (70, 150, 0, 4, 64, 128), (140, 64, 6, 0, 128, 64)]):
        label = dataset.read(bucket, torch.arange(2)).label
        assert torch.equal(label.sizes, torch.tensor([told] * 2, dtype=torch.float32))
        assert label.pooled.shape == (2, 6)
    assert torch.equal(dataset.null.pooled, encoders.captions([""])[0].pooled)


# --- nothing is computed twice


def test_encoding_twice_is_encoding_once(pictures, tmp_path, small_shards):
    first, again = Counting(), Counting()
    done = []
    dataset = encoded(pictures, first, tmp_path / "cache", on_item=lambda *item: done.append(item))
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "cache")}
    other = encoded(pictures, again, tmp_path / "cache", verify=True)
    assert first.num_images == 9 and sorted(first.texts) == ["", *(f"picture {i}" for i in range(5))]
    assert again.num_images == 0 and again.texts == []
    assert same(dataset, other) and same(dataset, CachedDataset.open(tmp_path / "cache"))
    assert dataset.fingerprint == other.fingerprint and done == [(i + 1, 9) for i in range(9)]
    assert before == {path: path.stat().st_mtime_ns for path in shards(tmp_path / "cache")}


def test_one_process_at_a_time_writes_and_the_second_is_told_which(pictures, tmp_path, monkeypatch):
    """Otherwise the index of one names what the other has not written."""
    monkeypatch.setattr("distill_core.data.cache._WAIT_S", 0.1)
    with writing(tmp_path / "cache"), pytest.raises(ValueError, match=r"cache is in use by process \d+ on"):
        encoded(pictures, Plain(), tmp_path / "cache")
    assert len(encoded(pictures, Plain(), tmp_path / "cache").entries) == 9


@pytest.mark.parametrize("after", [1, 4, 8])
def test_interrupted_and_resumed_equals_uninterrupted(after, pictures, tmp_path, small_shards):
    def stop(done, total):
        if done == after:
            raise KeyboardInterrupt

    encoders = Counting()
    with pytest.raises(KeyboardInterrupt):
        encoded(pictures, encoders, tmp_path / "cache", on_item=stop)
    with pytest.raises(ValueError, match="holds no finished cache"):
        CachedDataset.open(tmp_path / "cache")
    dataset = encoded(pictures, encoders, tmp_path / "cache")
    assert encoders.num_images == 9 and len(encoders.texts) == 6
    whole = encoded(pictures, Plain(), tmp_path / "whole")
    assert same(dataset, whole) and dataset.fingerprint == whole.fingerprint


def test_only_what_is_new_is_encoded(pictures, tmp_path):
    to, first = tmp_path / "cache", encoded(pictures, Plain(), tmp_path / "cache")
    (pictures / "3.txt").write_text("a three")
    add_picture(pictures / "4.png", 44, (70, 150))
    add_picture(pictures / "9.png", 9, (70, 70), "picture 0")
    encoders = Counting()
    dataset = encoded(pictures, encoders, to)
    assert encoders.num_images == 2 and encoders.texts == ["a three"]
    assert sum(dataset.bucket_sizes) == 10 and dataset.fingerprint != first.fingerprint
    assert same(dataset, encoded(pictures, Plain(), tmp_path / "fresh"))
    encoded(pictures, encoders, to, flip=True)
    assert encoders.num_images == 12  # the mirrored ones
    encode(folder(pictures), encoders, [(64, 64)], to)
    assert encoders.num_images == 18  # those of other shapes
    assert encoders.texts == ["a three"]


def test_each_precision_and_each_encoder_has_its_own_entries(pictures, tmp_path):
    encoders = Counting()
    half, single = (encoded(pictures, encoders, tmp_path / "cache", dtype=dtype) for dtype in ("fp16", "fp32"))
    assert encoders.num_images == 18 and half.fingerprint != single.fingerprint
    assert {part.dtype for part in everything(single)} == {torch.float32}
    encoders.fingerprint = "another"
    assert encoded(pictures, encoders, tmp_path / "cache").fingerprint not in (half.fingerprint, single.fingerprint)
    assert encoders.num_images == 27


def test_mirrored_images_are_mirrored(pictures, tmp_path):
    dataset = encoded(pictures, Plain(), tmp_path / "cache", flip=True, dtype="fp32")
    assert dataset.bucket_sizes == [6, 6, 6]
    decoded = Plain().decode(dataset.read(0, torch.arange(6)).latents)
    partners = [[torch.allclose(one, other.flip(-1), atol=1e-6) for other in decoded] for one in decoded]
    assert all(sum(row) == 1 for row in partners) and not any(partners[i][i] for i in range(6))
    sources = CachedDataset.open(tmp_path / "cache").sources(0)
    of_one = sources[:, None] == sources
    assert of_one.fill_diagonal_(False).tolist() == partners
    assert encoded(pictures, Plain(), tmp_path / "other").sources(0) is None


def test_the_same_image_twice_is_of_one_source(pictures, tmp_path):
    (pictures / "twin.png").write_bytes((pictures / "0.png").read_bytes())
    (pictures / "twin.txt").write_text("other words")
    dataset = encoded(pictures, Plain(), tmp_path / "cache")
    sources = [dataset.sources(bucket) for bucket in range(3)]
    (sizes,) = ([int(each.unique().numel()), len(each)] for each in sources if each is not None)
    assert sizes == [3, 4]


def test_names_and_order_of_files_do_not_matter(pictures, tmp_path):
    dataset = encoded(pictures, Plain(), tmp_path / "cache")
    for i in range(9):
        for suffix in (".png", ".txt"):
            (pictures / f"{i}{suffix}").rename(pictures / f"renamed {9 - i}{suffix}")
    other = encoded(pictures, Plain(), tmp_path / "other")
    assert dataset.fingerprint == other.fingerprint and same(dataset, other)
    (pictures / "renamed 1.txt").write_text("another")
    assert encoded(pictures, Plain(), tmp_path / "other").fingerprint != dataset.fingerprint


# --- damage


def flip_bits(path):
    """One of each tensor."""
    data = bytearray(path.read_bytes())
    for tensor in read_header(path).tensors.values():
        data[tensor.offset + 3] ^= 1
    path.write_bytes(data)


def flip_a_name(path):
    """One letter of a key in the header."""
    data = path.read_bytes()
    at = data.rindex(b'":{"dtype"') - 1
    path.write_bytes(data[:at] + (b"0" if data[at : at + 1] != b"0" else b"1") + data[at + 1 :])


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def cut_to_nothing(path):
    path.write_bytes(b"")


def delete(path):
    path.unlink()


def forget_checksums(path):
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path)


DAMAGE = [flip_bits, flip_a_name, cut, cut_to_nothing, delete, forget_checksums]


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_rebuilt_to_the_bit(damage, number, pictures, tmp_path, small_shards, caplog):
    to = tmp_path / "cache"
    whole = everything(encoded(pictures, Plain(), to))
    damaged, encoders = shards(to)[number], Counting()
    num_entries = len(read_header(damaged).tensors)
    damage(damaged)
    dataset = encoded(pictures, encoders, to, verify=True)
    assert all(torch.equal(a, b) for a, b in zip(everything(dataset), whole, strict=True))
    assert encoders.num_images + len(encoders.texts) == num_entries
    assert len(caplog.records) == (damage is not delete) and "Traceback" not in caplog.text


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_while_reading(damage, pictures, tmp_path, small_shards):
    to, encoders = tmp_path / "cache", Counting()
    dataset = encoded(pictures, encoders, to)
    whole = everything(dataset)
    damaged = shards(to)[1]
    damage(damaged)
    if damage in (flip_a_name, forget_checksums):  # which an open dataset knows already
        dataset = None
    with pytest.raises(ValueError, match="was damaged or missing and is deleted; start the run again") as caught:
        everything(dataset or CachedDataset.open(to))
    assert damaged.name in str(caught.value) and "\n" not in str(caught.value) and not damaged.exists()
    with pytest.raises(ValueError, match=r"lacks \d latents or embeddings; start the run again"):
        CachedDataset.open(to)
    again = everything(encoded(pictures, encoders, to))
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


def test_few_files_are_open_at_once(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_ENTRIES", 1)
    monkeypatch.setattr(cache, "OPEN_SHARDS", 2)
    dataset = encoded(pictures, Plain(), tmp_path / "cache")
    assert len(shards(tmp_path / "cache")) == 15
    for _ in range(2):
        everything(dataset)
        assert dataset._shards._open.cache_info().currsize == 2


def test_shards_are_no_larger_than_they_should_be(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 4096)
    writer = CacheWriter(tmp_path, dtype="fp32")
    for i in range(8):
        writer.add_latent(f"{i}", torch.full((1, 16, 16), float(i)))
    writer.flush()
    assert [path.stat().st_size < 6000 for path in shards(tmp_path)] == [True] * 2


# --- examples that are latents already


def test_trajectories_are_stored_beside_their_latents(tmp_path):
    writer, latents, states = CacheWriter(tmp_path / "cache", dtype="fp32"), torch.randn(5, 4, 8, 8), torch.randn(5, 3, 4, 8, 8)
    context = torch.randn(7, 16)
    writer.add_text("text", Caption(context))
    for i in range(5):
        assert not writer.has(f"latent {i}")
        writer.add_latent(f"latent {i}", latents[i], states[i])
        assert writer.has(f"latent {i}")
    dataset = writer.finish([Entry(f"latent {i}", "text") for i in range(5)], None, torch.tensor([999, 500, 1]))
    examples = dataset.read(0, torch.tensor([3, 1]))
    assert torch.equal(examples.latents, latents[[3, 1]]) and torch.equal(examples.states, states[[3, 1]])
    assert torch.equal(examples.contexts, context.expand(2, 7, 16)) and dataset.null is None
    assert dataset.timesteps.tolist() == [999, 500, 1] and dataset.timesteps.dtype == torch.int64
    more = CacheWriter(tmp_path / "cache", dtype="fp32")
    assert more.has("latent 4") and more.has("text") and not more.has("latent 5")
    more.add_latent("latent 5", latents[0], states[0])
    extended = more.finish([*dataset.entries, Entry("latent 5", "text")], "text", dataset.timesteps)
    assert extended.bucket_sizes == [6] and extended.fingerprint != dataset.fingerprint
    assert torch.equal(extended.null.context, context)


@pytest.mark.parametrize(
    "entries,timesteps,said",
    [
        ([], None, "holds no examples"),
        ([("plain", "text"), ("gone", "text"), ("plain", "lost")], None, "lacks 2 latents or embeddings"),
        ([("plain", "text"), ("plain", "wide")], None, "differ in their width of embeddings"),
        ([("plain", "text"), ("plain", "pooled")], None, "differ in their kind of embeddings"),
        ([("plain", "text"), ("states", "text")], None, "differ in their number of states"),
        ([("states", "text")], [3, 2, 1], "differ in their number of states"),
        ([("states", "text")], None, "differ in their number of states"),
        ([("plain", "text")], [1], "differ in their number of states"),
        ([("plain", "pooled")], None, "are for SDXL and need sizes"),
        ([("plain", "text"), ("plain", "long")], None, r"captions of \[71, 77\] tokens need a common length of 5,467"),
    ],
)
def test_examples_that_do_not_go_together_are_refused(entries, timesteps, said, tmp_path):
    writer = CacheWriter(tmp_path)
    for name, length, width in (("text", 77, 8), ("wide", 77, 9), ("long", 71, 8)):
        writer.add_text(name, Caption(torch.zeros(length, width)))
    writer.add_text("pooled", Caption(torch.zeros(77, 8), torch.zeros(3)))
    writer.add_latent("plain", torch.zeros(4, 8, 8))
    writer.add_latent("states", torch.zeros(4, 8, 8), torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match=said) as caught:
        writer.finish([Entry(*entry) for entry in entries], None, timesteps)
    assert "\n" not in str(caught.value)


# --- captions of different lengths


@settings(deadline=None)
@given(length=st.integers(1, 9), times=st.integers(1, 6), heads=st.integers(1, 3))
def test_tiling_does_not_change_attention(length, times, heads):
    random = torch.Generator().manual_seed(length)
    query, context = (torch.randn(n, 12, generator=random, dtype=torch.float64) for n in (5, length))
    tiled = tile(context, length * times)
    assert tiled.shape == (length * times, 12)

    def attention(keys):
        return F.scaled_dot_product_attention(query.expand(heads, 5, 12), *2 * [keys.expand(heads, -1, 12)])

    torch.testing.assert_close(attention(tiled), attention(context))


def test_captions_of_different_lengths_become_equally_long(tmp_path):
    writer = CacheWriter(tmp_path, dtype="fp32")
    contexts = {length: torch.randn(length, 4) for length in (2, 3, 4)}
    for length, context in contexts.items():
        writer.add_text(f"{length}", Caption(context))
        writer.add_latent(f"latent {length}", torch.zeros(4, 8, 8))
    dataset = writer.finish([Entry(f"latent {length}", f"{length}") for length in (3, 4)], "2")
    read = dataset.read(0, torch.arange(2)).contexts
    assert torch.equal(read[0], contexts[3].repeat(4, 1)) and torch.equal(read[1], contexts[4].repeat(3, 1))
    assert torch.equal(dataset.null.context, contexts[2].repeat(6, 1))


# --- what is refused


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e6])
def test_numbers_that_are_not_finite_are_not_stored(number, tmp_path):
    writer = CacheWriter(tmp_path)
    with pytest.raises(ValueError, match=r"overflows in fp16 \(NaN or Inf\); run the encoders in float32, or store fp32"):
        writer.add_latent("a", torch.tensor([[[0.0, number]]]))
    assert not writer.has("a")


def test_a_folder_with_other_things_is_refused_and_left_alone(pictures, tmp_path):
    before = sorted(pictures.iterdir())
    with pytest.raises(ValueError, match="holds other files, such as 0.png, and no cache"):
        encoded(pictures, Plain(), pictures)
    assert sorted(pictures.iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        encoded(pictures, Plain(), tmp_path / "file")


def test_what_others_put_into_a_cache_stays(pictures, tmp_path):
    encoded(pictures, Plain(), tmp_path / "cache")
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    (tmp_path / "cache" / "shard-mine.safetensors").write_text("mine")
    encoded(pictures, Plain(), tmp_path / "cache", verify=True)
    assert (tmp_path / "cache" / "notes.txt").exists() and (tmp_path / "cache" / "shard-mine.safetensors").exists()


LATENT = "0" * 32
INDEX = {"format": "distill cache 1", "null": None, "timesteps": None, "examples": [[LATENT, LATENT, [1, 2, 3, 4, 5, 6]]]}


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 200_000, '{"format": "other"}', '{"format": "distill cache 1"}', *[
    json.dumps(INDEX | change) for change in (
        {"null": 3}, {"timesteps": 3}, {"timesteps": [1.5]}, {"timesteps": [2**31]}, {"timesteps": [True]}, {"examples": {}},
        *({"examples": [example]} for example in (
            {}, [], "ab", [LATENT], [LATENT, 3], [LATENT, LATENT, []], [LATENT, LATENT, [1, 2, 3, 4, 5, "6"]],
            [LATENT, LATENT, [1, 2, 3, 4, 5, 2**40]], [LATENT, LATENT, None, None],
        )),
    )
]])  # fmt: skip
def test_an_index_of_something_else_is_refused(text, pictures, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index.json").write_text(text)
    for use in (lambda: CachedDataset.open(tmp_path / "cache"), lambda: CacheWriter(tmp_path / "cache")):
        with pytest.raises(ValueError, match="index.json is not a valid cache index") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert (tmp_path / "cache" / "index.json").read_text() == text


def test_one_warning_counts_the_captions_that_are_cut(pictures, tmp_path, caplog):
    for number in range(20):
        add_picture(pictures / f"long{number}.png", 100 + number, caption=f"picture number {number} " * 5)
    encoded(pictures, Plain(), tmp_path / "cache")
    cut = [record.getMessage() for record in caplog.records if "truncated" in record.getMessage()]
    assert len(cut) == 1 and cut[0].startswith("20 of ")
    caplog.clear()
    encoded(pictures, Plain(), tmp_path / "cache")
    assert "truncated" not in caplog.text


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown dtype of a cache 'fp8'; choose from "):
        CacheWriter(tmp_path, dtype="fp8")


def test_a_damaged_picture_stops_encoding_and_what_was_encoded_stays(pictures, tmp_path):
    (pictures / "8.png").write_bytes((pictures / "8.png").read_bytes()[:2000])
    encoders = Counting()
    with pytest.raises(ValueError, match="8.png cannot be read as an image"):
        encoded(pictures, encoders, tmp_path / "cache")
    (pictures / "8.png").unlink()
    assert sum(encoded(pictures, encoders, tmp_path / "cache").bucket_sizes) == 8 == encoders.num_images


def test_enlarged_images_are_told(pictures, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "distill"):
        encode(folder(pictures), Plain(), [(72, 72)], tmp_path / "cache", flip=True)
    assert "9 of 9 images are smaller" in caplog.text
    assert json.loads((tmp_path / "cache" / "index.json").read_text())["format"] == "distill cache 1"
