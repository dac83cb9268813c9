"""A folder of students is read as it was written, and a folder that was mixed up is refused in words."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from distill_core import router
from distill_core.adapter import Lora
from distill_core.files import open_unet, save_unet
from distill_core.plan import preset
from distill_core.ranges import TimestepRanges, even
from distill_core.schedule import scaled_linear
from distill_core.students import MANIFEST, Students, write_students
from distill_core.unet import load_unet

from .test_plan import student_of

RANGES = TimestepRanges((249.5, 499.0))


def save(path, denoiser, plan, prediction="eps"):
    save_unet(path, denoiser.named_parameters(), denoiser.architecture, plan=preset(plan), prediction=prediction)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory, small_teacher):
    """Three students, the second of another plan, and two LoRAs on the first."""
    folder, names = tmp_path_factory.mktemp("files"), {}
    for number, plan in enumerate(["bk-sdm-base", "bk-sdm-tiny", "bk-sdm-base"]):
        student = student_of(small_teacher, preset(plan))
        with torch.no_grad():
            next(student.network.parameters()).add_(number / 10)
        names[f"student {number}"] = save(folder / f"student {number}.safetensors", student, plan)
    for number, plan in ((0, "bk-sdm-base"), (1, "bk-sdm-base"), (2, "bk-sdm-tiny")):
        lora = Lora(student_of(small_teacher, preset(plan)), rank=2, seed=number)
        names[f"lora {number}"] = folder / f"lora {number}.safetensors"
        lora.write(names[f"lora {number}"], lora.parameters(), {})
    return names


@pytest.fixture
def three(files, tmp_path):
    paths = [files[f"student {number}"] for number in range(3)]
    return write_students(tmp_path / "three", RANGES, paths, teacher="abc", steps=[5, 6, 7])


@pytest.fixture
def shared(files, tmp_path):
    loras = [files["lora 0"], files["lora 1"], files["lora 0"]]
    return write_students(tmp_path / "shared", RANGES, loras, base=files["student 0"], teacher="abc", base_steps=9)


def change(folder, edit):
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_folder_is_read_as_it_was_written(three, shared):
    assert Students.read(three.folder) == three and Students.read(shared.folder) == shared
    assert three.ranges == RANGES and three.teacher == "abc" and three.base is None
    assert [path.name for path in three.files] == ["range_0.safetensors", "range_1.safetensors", "range_2.safetensors"]
    assert [(member.plan, member.steps) for member in three.members] == [
        ("bk-sdm-base", 5),
        ("bk-sdm-tiny", 6),
        ("bk-sdm-base", 7),
    ]
    assert shared.base.name == "base.safetensors" and shared.base_member.steps == 9
    assert [path.name for path in shared.files] == [f"range_{number}.lora.safetensors" for number in range(3)]
    assert shared.num_bytes < 0.6 * three.num_bytes


def test_the_files_are_those_that_were_given_and_outlive_them(files, tmp_path):
    own = shutil.copy(files["student 0"], tmp_path / "own.safetensors")
    students = write_students(tmp_path / "one", TimestepRanges(()), [own], teacher="abc")
    own.unlink()
    assert students.files[0].read_bytes() == files["student 0"].read_bytes()
    assert Students.read(students.folder).unet(0).plan.name == "bk-sdm-base"


def test_where_links_cannot_be_it_copies(files, tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    students = write_students(tmp_path / "one", TimestepRanges(()), [files["student 0"]], teacher="abc")
    assert students.files[0].read_bytes() == files["student 0"].read_bytes()
    assert students.files[0].stat().st_nlink == 1


def test_a_folder_may_be_moved_as_a_whole(three, tmp_path):
    moved = three.folder.rename(tmp_path / "elsewhere")
    assert Students.read(moved) == replace(three, folder=moved)


def test_a_folder_is_unfinished_until_all_files_are_there(files, three, monkeypatch):
    place = write_students.__globals__["_place"]

    def killed(source, target):
        if target.name == "range_1.safetensors":
            raise MemoryError("killed")
        place(source, target)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setitem(write_students.__globals__, "_place", killed)
        write_students(three.folder, RANGES, [files["student 2"]] * 3, teacher="abc")
    with pytest.raises(ValueError, match="not finished"):
        Students.read(three.folder)
    again = write_students(three.folder, RANGES, [files["student 2"]] * 3, teacher="abc")
    assert Students.read(three.folder) == again


def test_it_tells_who_is_in_charge_of_what(three, shared):
    noisiest, _, least = three.describe(scaled_linear()).splitlines()
    assert noisiest.startswith("2: timesteps 500 to 999") and noisiest.endswith("range_2.safetensors, bk-sdm-base")
    assert least.startswith("0: timesteps 0 to 249,") and "range_0.safetensors" in least
    assert "base.safetensors" in shared.describe(scaled_linear())


# --- refused


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/stolen.safetensors", "..\\stolen.safetensors", "range_0.ckpt", "",
                                  ".hidden.safetensors", "range_0.safetensors/../../stolen.safetensors", 3, None])  # fmt: skip
@pytest.mark.parametrize("who", ["students", "base"])
def test_a_name_outside_the_folder_is_refused(who, name, shared):
    shutil.copy(shared.base, shared.folder.parent / "stolen.safetensors")
    change(shared.folder, lambda m: (m["students"][0] if who == "students" else m["base"]).update(file=name))
    with pytest.raises(ValueError, match=r"no .safetensors file in its folder|file must be text|file is missing"):
        Students.read(shared.folder)


@pytest.mark.parametrize("edit,message", [
    (lambda m: m.update(version=2), "version 2, this library reads version 1"),
    (lambda m: m.pop("version"), "version None"),
    (lambda m: m.update(boundaries=[250]), "1 boundaries make 2 ranges, but there are 3 students"),
    (lambda m: m.update(boundaries=[500, 250]), "leave a range without a timestep"),
    (lambda m: m.update(boundaries=[250, 1e999]), "Infinity is not a finite number"),
    (lambda m: m.update(boundaries="250, 500"), "boundaries must be a list"),
    (lambda m: m.update(num_timesteps=400), "leave a range without a timestep"),
    (lambda m: m.update(students=3), "students must list"),
    (lambda m: m.update(base="base.safetensors"), "students must list"),
    (lambda m: m["students"].pop(), "but there are 2 students"),
    (lambda m: m["students"].reverse(), "is not the file"),
    (lambda m: m["students"][0].update(fingerprint="0" * 16), "range_0.safetensors is not the file"),
    (lambda m: m.update(techer="x"), "did you mean 'teacher'"),
])  # fmt: skip
def test_a_manifest_that_does_not_fit_is_refused(edit, message, three):
    def shuffled(manifest):
        edit(manifest)
        for entry, path in zip(manifest["students"] if isinstance(manifest["students"], list) else [], three.files, strict=False):
            entry["file"] = path.name

    change(three.folder, shuffled)
    with pytest.raises(ValueError, match=message):
        Students.read(three.folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x80", "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(text, three):
    (three.folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is not valid JSON|must be an object|is not text in UTF-8"):
        Students.read(three.folder)


def test_files_that_were_swapped_or_are_missing_are_refused(three):
    first, second, _ = three.files
    first.rename(three.folder / "x"), second.rename(first), (three.folder / "x").rename(second)
    with pytest.raises(ValueError, match="range_0.safetensors is not the file students.json tells of"):
        Students.read(three.folder)
    first.unlink()
    with pytest.raises(ValueError, match="range_0.safetensors does not exist"):
        Students.read(three.folder)


def test_students_that_cannot_stand_in_for_each_other_are_refused(files, small_teacher, small_xl_teacher, tmp_path):
    other = save(tmp_path / "v.safetensors", student_of(small_teacher, preset("bk-sdm-base")), "bk-sdm-base", "v")
    two = TimestepRanges((500.0,))
    with pytest.raises(ValueError, match="range_1.safetensors has sampling v prediction, range_0.safetensors has eps prediction"):
        write_students(tmp_path / "mixed", two, [files["student 0"], other], teacher="abc")
    larger = save(tmp_path / "xl.safetensors", small_xl_teacher, "ssd-1b")
    with pytest.raises(ValueError, match="has family"):
        write_students(tmp_path / "mixed", two, [files["student 0"], larger], teacher="abc")
    with pytest.raises(ValueError, match="not finished"):
        Students.read(tmp_path / "mixed")


def test_loras_of_another_network_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match="they do not belong together"):
        write_students(tmp_path / "x", TimestepRanges(()), [files["lora 0"]], base=files["student 1"], teacher="abc")
    with pytest.raises(ValueError, match="3 ranges need as many students, got 1"):
        write_students(tmp_path / "y", RANGES, [files["lora 0"]], base=files["student 1"], teacher="abc")


def test_every_file_is_one_that_stock_loaders_open(shared, three):
    from safetensors.torch import load_file

    assert all(open_unet(path).spelling == "ldm" for path in (*three.files, shared.base))
    assert all(name.startswith("lora_unet_") for path in shared.files for name in load_file(path))


def test_one_file_of_many_ranges_is_loaded_once(files, tmp_path, monkeypatch):
    """Whether the manifest names it often, or it has several names."""
    opened = []
    monkeypatch.setattr(router, "load_unet", lambda file, dtype: opened.append(file) or load_unet(file, dtype))
    ranges = even(scaled_linear(), 4)
    students = write_students(tmp_path / "four", ranges, [files["student 0"], files["student 2"]] * 2, teacher="abc")
    first = asdict(students.members[0])
    change(students.folder, lambda manifest: manifest["students"].__setitem__(3, first))
    routed = router.Routed.open(Students.read(students.folder))
    networks = [routed.student(number).network for number in range(4)]
    assert len(opened) == 2 and networks[0] is networks[2] is networks[3] is not networks[1]


def test_more_students_than_there_may_be_are_refused(three):
    change(three.folder, lambda manifest: manifest.update(students=manifest["students"][:1] * 999))
    with pytest.raises(ValueError, match="lists 999 students, more than the 100"):
        Students.read(three.folder)
