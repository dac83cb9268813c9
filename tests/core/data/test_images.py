import io
import os
import struct
import subprocess
import sys
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, PngImagePlugin

from distill_core.data import images
from distill_core.data.images import RESOLUTIONS, SSD_1B_SIZES, ImageFile, best_size, bucket_sizes, crop, fit, folder, sizes

sides = st.integers(16, 4000)


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 6), "red")).save(path, **options)
    return path


def picture(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return ImageFile("it", "", buffer.getvalue)


# --- sizes


@pytest.mark.parametrize("name", RESOLUTIONS)
def test_no_size_is_larger_than_the_square_and_each_can_lie_on_its_side(name):
    found = RESOLUTIONS[name]
    area = max(height * width for height, width in found if height == width)
    assert len(set(found)) == len(found) and {(width, height) for height, width in found} == set(found)
    assert all(height * width <= area and height % 64 == width % 64 == 0 for height, width in found)


@given(side=st.integers(2, 20).map(lambda n: 64 * n), step=st.sampled_from([8, 32, 64]))
def test_buckets_fill_the_area(side, step):
    for height, width in bucket_sizes(side, step):
        assert height * width <= side**2 and side // 2 <= min(height, width) and max(height, width) <= 2 * side
        taller, wider = height + step, width + step
        assert taller * width > side**2 or height * wider > side**2 or max(taller, wider) > 2 * side


@given(size=st.tuples(sides, sides), name=st.sampled_from(["ssd-1b", "buckets-512", "buckets-1024"]))
def test_the_best_size_loses_least(size, name):
    def kept(other):
        left, top, right, bottom = crop(size, other).box
        return (right - left) * (bottom - top) / (size[0] * size[1])

    best = best_size(size, RESOLUTIONS[name])
    assert kept(best) == pytest.approx(max(map(kept, RESOLUTIONS[name])))
    if 0.5 < size[0] / size[1] < 2:
        assert kept(best) > 0.8


def test_shapes_are_near_by_their_ratio_not_their_difference():
    assert best_size((100, 149), [(100, 100), (100, 200)]) == (100, 200)
    assert best_size((149, 100), [(100, 100), (200, 100)]) == (200, 100)


def test_the_sizes_of_ssd_1b():
    assert len(SSD_1B_SIZES) == 9 and best_size((3000, 4000), SSD_1B_SIZES) == (896, 1152)
    assert best_size((700, 700), SSD_1B_SIZES) == (1024, 1024) and best_size((1000, 100), SSD_1B_SIZES) == (1536, 640)


def test_sizes_by_name_or_written_out():
    assert sizes("ssd-1b") == SSD_1B_SIZES and sizes("512") == sizes("512x512") == [(512, 512)]
    assert sizes("768x512, 512x768") == [(768, 512), (512, 768)] and sizes("64") == [(64, 64)]


@pytest.mark.parametrize(
    "text,said",
    [("ssd1b", "did you mean 'ssd-1b'"), ("", "buckets-512"), ("512x", "height x width"), ("0", "512"), ("500", "got 500")],
)
def test_odd_sizes_are_refused(text, said):
    with pytest.raises(ValueError, match=said) as caught:
        sizes(text)
    assert "\n" not in str(caught.value) and repr(text) in str(caught.value)


def test_no_bucket_at_all_is_refused():
    with pytest.raises(ValueError, match="no size"):
        bucket_sizes(100, 64, min_px=300)


# --- cropping


@given(original=st.tuples(sides, sides), size=st.tuples(sides, sides))
def test_crops_have_the_shape_of_the_size_and_lie_in_the_middle(original, size):
    (left, top, right, bottom), told = crop(original, size)
    assert 0 <= left < right <= original[1] and 0 <= top < bottom <= original[0]
    assert (bottom - top) / (right - left) == pytest.approx(size[0] / size[1])
    assert left == pytest.approx(original[1] - right, abs=1e-6) and top == pytest.approx(original[0] - bottom, abs=1e-6)
    assert min(left, top) == pytest.approx(0, abs=1e-6)  # nothing is cut off that need not be
    assert told[:2] == original and told[4:] == size
    scale = size[0] / (bottom - top)
    assert told[2:4] == pytest.approx((top * scale, left * scale), abs=1)


@pytest.mark.parametrize("original", [(300, 300), (200, 500), (777, 301)])
@pytest.mark.parametrize("size", [(128, 128), (192, 64), (64, 192), (512, 384)])
def test_a_circle_stays_a_circle(original, size):
    image = Image.new("RGB", original[::-1], "black")
    x, y, r = original[1] / 2, original[0] / 2, 45
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill="white")
    ink = fit(image, size).pixels.mean(0) > 0
    scale = max(size[0] / original[0], size[1] / original[1])
    for axis, side in ((0, size[1]), (1, size[0])):
        assert ink.any(axis).sum() == pytest.approx(min(2 * r * scale, side), abs=3)


def test_pixels_keep_their_values():
    red = fit(Image.new("RGB", (50, 40), (255, 0, 51)), (16, 24))
    assert red.pixels.shape == (3, 16, 24) and red.pixels.dtype == torch.float32
    torch.testing.assert_close(red.pixels[:, 3, 4], torch.tensor([1.0, -1.0, -0.6]))
    assert red.sizes == (40, 50, 1, 0, 16, 24)


def test_a_picture_of_the_size_is_left_as_it_is():
    values = torch.randint(256, (16, 24, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    image = Image.frombytes("RGB", (24, 16), values.numpy().tobytes())
    assert torch.equal(((fit(image, (16, 24)).pixels + 1) * 127.5).round().to(torch.uint8), values.permute(2, 0, 1))


# --- one picture


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    opened = picture(image).open()
    assert opened.mode == "RGB" and [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    paletted = Image.new("P", (1, 1), 0)
    paletted.putpalette([0, 0, 0])
    assert picture(paletted, transparency=0).open().getpixel((0, 0)) == (255, 255, 255)
    assert picture(Image.new("LA", (1, 1), (0, 0))).open().getpixel((0, 0)) == (255, 255, 255)


TURNED = [(0, 0), (39, 0), (39, 19), (0, 19), (0, 0), (19, 0), (19, 39), (0, 39)]
"""Where the first corner of a picture of 40 x 20 pixels belongs, for each orientation of the EXIF standard."""


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation,corner", list(enumerate(TURNED, 1)))
def test_images_are_turned_upright(format, orientation, corner):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 12, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = picture(image, format, exif=exif)
    opened = turned.open()
    assert turned.size() == (opened.height, opened.width) == ((40, 20) if orientation > 4 else (20, 40))
    assert min(opened.getpixel(corner)) > 200
    assert sum(min(opened.getpixel((x, y))) > 200 for x in (0, opened.width - 1) for y in (0, opened.height - 1)) == 1


def test_sixteen_bits_of_grey_keep_their_shades():
    assert picture(Image.new("I;16", (2, 2), 257 * 100)).open().getpixel((0, 0)) == (100, 100, 100)


def test_the_content_tells_images_apart(tmp_path):
    red, blue = picture(Image.new("RGB", (4, 4), "red")), picture(Image.new("RGB", (4, 4), "blue"))
    assert red.content() == red.content() != blue.content()


def test_a_damaged_picture_is_named_in_one_sentence():
    whole = picture(Image.effect_noise((64, 64), 50), "JPEG").read()
    for data in (b"", b"no picture", whole[:30], whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match=r"^cat\.jpg cannot be read as an image .*or remove it$") as caught:
            ImageFile("cat.jpg", "", lambda data=data: data).open()
        assert "BytesIO" not in str(caught.value)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n0 0 64 64 rectfill\nshowpage\n%%EOF\n"


def test_an_eps_under_another_name_starts_no_ghostscript(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match="it is not a BMP, JPEG, PNG or WebP"):
        ImageFile("cat.png", "", lambda: EPS).open()


@pytest.mark.parametrize("format", ["GIF", "TIFF", "PPM", "ICO", "TGA", "PCX"])
def test_formats_that_are_not_named_are_not_decoded(format):
    for use in (ImageFile.open, ImageFile.size):
        with pytest.raises(ValueError, match="it is not a BMP, JPEG, PNG or WebP"):
            use(picture(Image.new("RGB", (16, 16)), format))


def test_a_drawing_in_svg_is_no_picture():
    with pytest.raises(ValueError, match="it is not a BMP"):
        ImageFile("x.png", "", lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>').open()


@pytest.mark.parametrize("format", ["PNG", "BMP", "JPEG"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 10_000, 60_000])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(side, format):
    """Its header is changed alone, so that decoding it would say something else."""
    data = bytearray(picture(Image.new("RGB", (8, 8)), format).read())
    at, form = {"PNG": (16, ">II"), "BMP": (18, "<ii"), "JPEG": (data.find(b"\xff\xc0") + 5, ">HH")}[format]
    struct.pack_into(form, data, at, side, side)
    if format == "PNG":
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    for use in (ImageFile.open, ImageFile.size):
        with pytest.raises(ValueError, match="more than 67,108,864 pixels; make it smaller, or remove it"):
            use(ImageFile("x", "", lambda: bytes(data)))


def test_text_in_a_picture_does_not_unpack_without_end():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * (64 << 20), zip=True)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        picture(Image.new("RGB", (8, 8)), pnginfo=info).open()


def test_of_an_animation_the_first_picture_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("PNG", "WEBP"):
        moving = picture(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert moving.open().getpixel((0, 0)) == (255, 0, 0)


# --- folders


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names, and links only for administrators")
def test_links_to_files_are_images_and_captions_as_files_are(tmp_path):
    """A data set is commonly a folder of links into a store."""
    save(tmp_path / "store" / "x.png")
    (tmp_path / "store" / "x.txt").write_text("a cat")
    (tmp_path / "set").mkdir()
    for name in ("x.png", "x.txt"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "store" / name)
    (found,) = folder(tmp_path / "set")
    assert found.caption == "a cat" and found.open().size == (8, 6)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
@pytest.mark.parametrize("name", ["a.txt", "metadata.csv", "metadata.jsonl"])
def test_pipes_in_a_folder_are_not_waited_for(name, tmp_path):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    assert len(folder(tmp_path)) == 1
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a device or a pipe, not a file"):
        folder(tmp_path)


def test_a_picture_that_became_a_pipe_is_not_waited_for(tmp_path):
    (found,) = folder(save(tmp_path / "a.png").parent)
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ValueError, match="a.png cannot be read as an image"):
        found.open()


def test_captions_that_are_not_read_and_repeats_are_told_in_one_warning(tmp_path, caplog):
    for name in ("10_cat/a.png", "10_cat/b.png", "c.png", "2024_trip/d.png"):
        save(tmp_path / name)
    used = ("10_cat/a.txt", "c.txt", "metadata.csv")
    unused = ("10_cat/a.caption", "10_cat/b.caption.txt", "10_cat/metadata.jsonl", "c.png.txt", "c.json")
    beside = ("notes.txt", "recipe.json", ".hidden/metadata.csv")
    for name in (*used, *unused, *beside):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("file_name,text\n" if name.endswith("csv") else "x")
    folder(tmp_path)
    _, unread = (record.getMessage() for record in caplog.records)
    assert unread == (
        f"in {tmp_path} 5 caption files are not read, such as 10_cat/a.caption; repeats are not applied, as in 10_cat; "
        "captions are read from .txt files named like the images, or from metadata.csv or .jsonl at the top"
    )


def test_a_folder_is_read_in_order_with_its_captions(tmp_path, caplog):
    for name in ("b.png", "a.JPG", "sub/c.webp", "sub/d.jpeg", "e.bmp", ".hidden.png", ".thumbs/x.png"):
        save(tmp_path / name)
    (tmp_path / "notes.md").write_text("none")
    (tmp_path / "a.txt").write_text("\ufeffa caption, ä\n", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("two")
    (tmp_path / "e.txt").write_text("")
    found = folder(tmp_path)
    assert [(p.name.removeprefix(f"{tmp_path}/"), p.caption) for p in found] == [
        ("a.JPG", "a caption, ä"), ("b.png", ""), ("e.bmp", ""), ("sub/c.webp", "two"), ("sub/d.jpeg", ""),
    ]  # fmt: skip
    assert found[0].open().size == (8, 6) and found[1].size() == (6, 8)
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of 5 images in {tmp_path} have no caption; they get an empty one"
    ]


METADATA = {
    "csv": 'file_name,text\na.png,"one, two\nthree"\nsub\\b.png,four\ngone.png,five\n',
    "jsonl": '{"file_name": "a.png", "caption": "one, two\\nthree"}\n\n{"file_name": "sub/b.png", "caption": "four", "n": 1}\n'
    '{"file_name": "gone.png", "caption": "five"}\n{"file_name": "c.png", "caption": null}\n',
}


@pytest.mark.parametrize("kind", METADATA)
def test_captions_from_metadata(kind, tmp_path, caplog):
    for name in ("a.png", "c.png", "sub/b.png"):
        save(tmp_path / name)
    (tmp_path / f"metadata.{kind}").write_text(METADATA[kind])
    assert [p.caption for p in folder(tmp_path)] == ["one, two\nthree", "", "four"]
    (tmp_path / "a.txt").write_text("beside it")
    caplog.clear()
    assert folder(tmp_path)[0].caption == "beside it"
    lost, missing = (record.getMessage() for record in caplog.records)
    assert "1 images that do not exist, such as gone.png" in lost and "1 of 3 images" in missing


@pytest.mark.parametrize(
    "name,data,said",
    [
        ("metadata.csv", b"name,text\na.png,x\n", "entry 1 must have file_name and text or caption, got name, text"),
        ("metadata.csv", b"file_name,words\na.png,x\n", "got file_name, words"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{', "line 2 is not valid JSON"),
        ("metadata.jsonl", b"[1]", "line 1 must be an object, got a list"),
        ("metadata.jsonl", b"{}", "got nothing"),
        ("metadata.jsonl", b"[" * 200_000, "line 1 is not valid JSON .it nests too deeply"),
        ("metadata.csv", b"file_name,text\na.png," + b"x" * 200_000, "line 2: field larger than field limit"),
        ("a.txt", b"\xff\xfe\x00", "not text in UTF-8"),
    ],
)
def test_captions_that_cannot_be_read_are_one_sentence(name, data, said, tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said) as caught:
        folder(tmp_path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images; add files that end in \.bmp"):
        folder(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        folder(tmp_path / "none")


# --- Hugging Face data sets


def test_without_the_library_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="python -m pip install datasets"):
        images.hugging_face(tmp_path)


def test_nothing_is_downloaded():
    with pytest.raises(ValueError, match="nothing is downloaded"):
        images.hugging_face("lambdalabs/pokemon-blip-captions")


@pytest.fixture
def rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [str(save(tmp_path / "files" / f"{i}.png", Image.new("RGB", (8, 8 + i), (i, 0, 0)))) for i in range(3)]
    return datasets.Dataset.from_dict({"image": files, "text": ["a", None, " c "]}).cast_column("image", datasets.Image())


def test_a_saved_data_set_is_the_folder_it_came_from(rows, tmp_path, caplog):
    import datasets

    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "many")
    plain = folder(tmp_path / "files")
    for name in ("one", "many"):
        caplog.clear()
        found = images.hugging_face(tmp_path / name)
        assert [p.caption for p in found] == ["a", "", "c"] and "1 of 3 images" in caplog.text
        assert [p.content() for p in found] == [p.content() for p in plain] and found[2].size() == (10, 8)
    for options, said in (
        ({"split": "test"}, r"no split 'test'; choose from train"),
        ({"caption_column": "caption"}, "no column 'caption'"),
        ({"caption_column": "image"}, "not text"),
    ):
        with pytest.raises(ValueError, match=said):
            images.hugging_face(tmp_path / "many", **options)


def test_a_downloaded_repository_is_read_without_a_network(rows, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    (tmp_path / "repository" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "repository" / "data" / "train-00000-of-00001.parquet")
    assert [p.open().size for p in images.hugging_face(tmp_path / "repository")] == [(8, 8), (8, 9), (8, 10)]
    assert datasets.config.HF_HUB_OFFLINE is False
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be read as a data set") as caught:
        images.hugging_face(tmp_path / "empty")
    assert "\n" not in str(caught.value)
