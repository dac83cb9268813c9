"""A folder of experts is read as it was written, and a folder that was mixed up is refused in words."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from distill_core.diffusion.ranges import TimestepRanges, even
from distill_core.diffusion.schedule import scaled_linear
from distill_core.lora.layers import Lora
from distill_core.networks.build import load_unet
from distill_core.networks.files import open_unet, save_unet
from distill_core.networks.model_sampling import ModelSampling
from distill_core.pruning.plan import plan_in, preset
from distill_core.routing import router
from distill_core.routing.experts import MANIFEST, Experts, write_experts

from ...students import student_of

RANGES = TimestepRanges((499.0, 249.5))


def save(path, denoiser, plan, prediction="eps"):
    save_unet(
        path,
        denoiser.named_parameters(),
        denoiser.architecture,
        sampling=ModelSampling(prediction=prediction),
        metadata=preset(plan).metadata,
    )
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory, small_teacher):
    """Three experts, the second of another plan, and two LoRAs on the first."""
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
    return write_experts(tmp_path / "three", RANGES, paths, teacher="abc", steps=[5, 6, 7])


@pytest.fixture
def shared(files, tmp_path):
    loras = [files["lora 0"], files["lora 1"], files["lora 0"]]
    return write_experts(tmp_path / "shared", RANGES, loras, base=files["student 0"], teacher="abc", base_steps=9)


def change(folder, edit):
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_folder_is_read_as_it_was_written(three, shared):
    assert Experts.read(three.folder) == three and Experts.read(shared.folder) == shared
    assert three.ranges == RANGES and three.teacher == "abc" and three.base is None
    assert [path.name for path in three.files] == ["range_0.safetensors", "range_1.safetensors", "range_2.safetensors"]
    assert [(member.plan, member.steps) for member in three.members] == [
        ("bk-sdm-base", 5),
        ("bk-sdm-tiny", 6),
        ("bk-sdm-base", 7),
    ]
    assert shared.base.name == "base.safetensors" and shared.base_file.steps == 9
    assert [path.name for path in shared.files] == [f"range_{number}.lora.safetensors" for number in range(3)]
    assert shared.num_bytes < 0.6 * three.num_bytes


def test_the_files_are_those_that_were_given_and_outlive_them(files, tmp_path):
    own = shutil.copy(files["student 0"], tmp_path / "own.safetensors")
    experts = write_experts(tmp_path / "one", TimestepRanges(()), [own], teacher="abc")
    own.unlink()
    assert experts.files[0].read_bytes() == files["student 0"].read_bytes()
    assert plan_in(Experts.read(experts.folder).unet(0).metadata).name == "bk-sdm-base"


def test_where_links_cannot_be_it_copies(files, tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    experts = write_experts(tmp_path / "one", TimestepRanges(()), [files["student 0"]], teacher="abc")
    assert experts.files[0].read_bytes() == files["student 0"].read_bytes()
    assert experts.files[0].stat().st_nlink == 1


def test_a_folder_may_be_moved_as_a_whole(three, tmp_path):
    moved = three.folder.rename(tmp_path / "elsewhere")
    assert Experts.read(moved) == replace(three, folder=moved)


def test_a_folder_is_unfinished_until_all_files_are_there(files, three, monkeypatch):
    place = write_experts.__globals__["_place"]

    def killed(source, target):
        if target.name == "range_1.safetensors":
            raise MemoryError("killed")
        place(source, target)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setitem(write_experts.__globals__, "_place", killed)
        write_experts(three.folder, RANGES, [files["student 2"]] * 3, teacher="abc")
    with pytest.raises(ValueError, match="not finished"):
        Experts.read(three.folder)
    again = write_experts(three.folder, RANGES, [files["student 2"]] * 3, teacher="abc")
    assert Experts.read(three.folder) == again


def test_it_tells_who_is_in_charge_of_what(three, shared):
    noisiest, _, least = three.describe(scaled_linear()).splitlines()
    assert noisiest.startswith("0: timesteps 999 to 500") and noisiest.endswith("range_0.safetensors, bk-sdm-base")
    assert least.startswith("2: timesteps 249 to 0,") and "range_2.safetensors" in least
    assert "base.safetensors" in shared.describe(scaled_linear())


# --- refused


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/stolen.safetensors", "..\\stolen.safetensors", "range_0.ckpt", "",
                                  ".hidden.safetensors", "range_0.safetensors/../../stolen.safetensors", 3, None])  # fmt: skip
@pytest.mark.parametrize("who", ["experts", "base"])
def test_a_name_outside_the_folder_is_refused(who, name, shared):
    shutil.copy(shared.base, shared.folder.parent / "stolen.safetensors")
    change(shared.folder, lambda m: (m["experts"][0] if who == "experts" else m["base"]).update(file=name))
    with pytest.raises(ValueError, match=r"not a .safetensors file in its folder|file must be text|file is missing"):
        Experts.read(shared.folder)


@pytest.mark.parametrize("edit,message", [
    (lambda m: m.update(version=2), "version 2, but this library reads 1"),
    (lambda m: m.pop("version"), "version None"),
    (lambda m: m.update(boundaries=[250]), "1 boundaries make 2 ranges, but there are 3 experts"),
    (lambda m: m.update(boundaries=[250, 500]), "leave a range without a timestep"),
    (lambda m: m.update(boundaries=[1e999, 250]), "Infinity is not a finite number"),
    (lambda m: m.update(boundaries="250, 500"), "boundaries must be a list"),
    (lambda m: m.update(num_timesteps=400), "leave a range without a timestep"),
    (lambda m: m.update(experts=3), "experts must list"),
    (lambda m: m.update(base="base.safetensors"), "experts must list"),
    (lambda m: m["experts"].pop(), "but there are 2 experts"),
    (lambda m: m["experts"].reverse(), "is not the file"),
    (lambda m: m["experts"][0].update(fingerprint="0" * 16), "range_0.safetensors is not the file"),
    (lambda m: m.update(techer="x"), "did you mean 'teacher'"),
])  # fmt: skip
def test_a_manifest_that_does_not_fit_is_refused(edit, message, three):
    def shuffled(manifest):
        edit(manifest)
        for entry, path in zip(manifest["experts"] if isinstance(manifest["experts"], list) else [], three.files, strict=False):
            entry["file"] = path.name

    change(three.folder, shuffled)
    with pytest.raises(ValueError, match=message):
        Experts.read(three.folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x80", "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(text, three):
    (three.folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is not valid JSON|must be an object|is not text in UTF-8"):
        Experts.read(three.folder)


def test_files_that_were_swapped_or_are_missing_are_refused(three):
    first, second, _ = three.files
    first.rename(three.folder / "x"), second.rename(first), (three.folder / "x").rename(second)
    with pytest.raises(ValueError, match="range_0.safetensors is not the file listed in experts.json"):
        Experts.read(three.folder)
    first.unlink()
    with pytest.raises(ValueError, match="range_0.safetensors does not exist"):
        Experts.read(three.folder)


def test_students_that_cannot_stand_in_for_each_other_are_refused(files, small_teacher, small_xl_teacher, tmp_path):
    other = save(tmp_path / "v.safetensors", student_of(small_teacher, preset("bk-sdm-base")), "bk-sdm-base", "v")
    two = TimestepRanges((500.0,))
    with pytest.raises(
        ValueError, match="range_1.safetensors has sampling v prediction, but range_0.safetensors has eps prediction"
    ):
        write_experts(tmp_path / "mixed", two, [files["student 0"], other], teacher="abc")
    larger = save(tmp_path / "xl.safetensors", small_xl_teacher, "ssd-1b")
    with pytest.raises(ValueError, match="has family"):
        write_experts(tmp_path / "mixed", two, [files["student 0"], larger], teacher="abc")
    with pytest.raises(ValueError, match="not finished"):
        Experts.read(tmp_path / "mixed")


def test_loras_of_another_network_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match="has no such layer; use LoRAs for this base"):
        write_experts(tmp_path / "x", TimestepRanges(()), [files["lora 0"]], base=files["student 1"], teacher="abc")
    with pytest.raises(ValueError, match="there are 3 ranges but 1 experts"):
        write_experts(tmp_path / "y", RANGES, [files["lora 0"]], base=files["student 1"], teacher="abc")


def test_every_file_is_one_that_stock_loaders_open(shared, three):
    from safetensors.torch import load_file

    assert all(open_unet(path).layout == "ldm" for path in (*three.files, shared.base))
    assert all(name.startswith("lora_unet_") for path in shared.files for name in load_file(path))


def test_one_file_of_many_ranges_is_loaded_once(files, tmp_path, monkeypatch):
    """Whether the manifest names it often, or it has several names."""
    opened = []
    monkeypatch.setattr(router, "load_unet", lambda file, dtype: opened.append(file) or load_unet(file, dtype))
    ranges = even(scaled_linear(), 4)
    experts = write_experts(tmp_path / "four", ranges, [files["student 0"], files["student 2"]] * 2, teacher="abc")
    first = asdict(experts.members[0])
    change(experts.folder, lambda manifest: manifest["experts"].__setitem__(3, first))
    routed = router.ExpertDenoiser.open(Experts.read(experts.folder))
    networks = [routed.expert(number).network for number in range(4)]
    assert len(opened) == 2 and networks[0] is networks[2] is networks[3] is not networks[1]


def test_more_students_than_there_may_be_are_refused(three):
    change(three.folder, lambda manifest: manifest.update(experts=manifest["experts"][:1] * 999))
    with pytest.raises(ValueError, match="lists 999 experts, but at most 100"):
        Experts.read(three.folder)
