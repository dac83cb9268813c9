import json
import shutil
import stat
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_core.base.storage import atomic, fingerprint, write_tensors
from distill_core.diffusion.schedule import PREDICTIONS
from distill_core.networks.build import load_unet
from distill_core.networks.files import open_unet, save_unet
from distill_core.networks.layouts import LAYOUTS
from distill_core.networks.model_sampling import ModelSampling
from distill_core.pruning.plan import PruningPlan, name_map, plan_in, preset, preset_names, pruned
from distill_core.pruning.prune import prune_file, pruned_file

from ...conftest import SMALL

pytestmark = pytest.mark.slow


@pytest.fixture
def teacher_path(small_teacher, tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_unet(path, small_teacher.named_parameters(), small_teacher.architecture)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"])
def test_kept_weights_are_bit_equal_and_both_layouts_agree(name, layout, teacher_path, small_teacher, tmp_path, batch):
    out = tmp_path / "student"
    prune_file(open_unet(teacher_path), out, preset(name), layout=layout)
    student, weights = open_unet(out), small_teacher.named_parameters()
    mapping = name_map(small_teacher.architecture, preset(name))
    inherited = mapping.apply({n: n for n in small_teacher.architecture.shapes})
    assert set(student.state_dict) == set(inherited)
    for student_name, teacher_name in inherited.items():
        assert torch.equal(student.state_dict[student_name], weights[teacher_name])
    # What was written in the one layout answers as what diffusers loads from the other.
    x, t, context = batch
    other = tmp_path / "other"
    save_unet(other, student.state_dict, student.architecture, layout="diffusers")
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel.from_pretrained(other).eval()
    with torch.no_grad():
        torch.testing.assert_close(load_unet(student)(x, t, context).sample, theirs(x, t, context).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "kept"),
    [({"sample_size": 96, "upcast_attention": True}, True), ({"sample_size": "96", "upcast_attention": 1}, False)],
)
def test_a_student_in_diffusers_has_what_only_the_teachers_config_says(said, kept, small_teacher, tmp_path):
    save_unet(tmp_path / "teacher", small_teacher.named_parameters(), small_teacher.architecture, layout="diffusers")
    usual = json.loads((tmp_path / "teacher" / "config.json").read_text())
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(usual | said))
    prune_file(open_unet(tmp_path / "teacher"), tmp_path / "student", preset("bk-sdm-base"), layout="diffusers")
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert {name: written.get(name) for name in said} == (said if kept else {name: usual.get(name) for name in said})


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_checkpoint_reads_the_same(prefix, layout, small_teacher, tmp_path):
    weights = small_teacher.named_parameters()
    names = LAYOUTS[layout].from_canonical(weights)
    tensors = {prefix + names[n]: w.detach().contiguous() for n, w in weights.items()}
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.zeros(3)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    if not prefix:
        tensors.pop("first_stage_model.decoder.conv_in.weight")
        save_file(tensors, path)
    file = open_unet(path)
    assert file.architecture.shapes == small_teacher.architecture.shapes
    assert all(torch.equal(file.state_dict[n], w) for n, w in weights.items())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_metadata_tells_plan_prediction_and_dtype(prediction, small_teacher, tmp_path):
    plan = preset("bk-sdm-base")
    path = tmp_path / "s.safetensors"
    weights = {n: w for n, w in small_teacher.named_parameters().items()}
    save_unet(
        path,
        weights,
        small_teacher.architecture,
        dtype="bf16",
        sampling=ModelSampling(prediction=prediction),
        metadata=plan.metadata,
    )
    file = open_unet(path)
    assert (file.prediction, file.dtype, plan_in(file.metadata).remove) == (prediction, "bf16", plan.remove)


@pytest.mark.parametrize("head_channels", [None, 16])
def test_the_number_of_heads_survives_both_layouts(head_channels, small_teacher, tmp_path):
    architecture = replace(small_teacher.architecture, head_channels=head_channels)
    for layout in LAYOUTS:
        save_unet(tmp_path / layout, small_teacher.named_parameters(), architecture, layout=layout)
        assert open_unet(tmp_path / layout).architecture.head_channels == head_channels
    # A folder of others has no metadata of ours.
    weights = tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights), weights)
    assert open_unet(tmp_path / "diffusers").architecture.head_channels == head_channels


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_heads_of_linear_projections_stay_eight(layout, tmp_path):
    """Without a config such attentions would be taken for those of SD2 and SDXL, with heads of 64 channels."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    network = UNet2DConditionModel(**SMALL | dict(attention_head_dim=8, use_linear_projection=True)).eval()
    network.save_pretrained(tmp_path / "of_others")
    first = open_unet(tmp_path / "of_others")
    save_unet(tmp_path / layout, first.tensors, first.architecture, layout=layout)
    file = open_unet(tmp_path / layout)
    assert file.architecture.head_channels is None
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 5, SMALL["cross_attention_dim"])
    with torch.no_grad():
        torch.testing.assert_close(load_unet(file)(x, 10, context).sample, network(x, 10, context).sample)


@pytest.mark.parametrize("width", [1536, 2048])
def test_an_unclip_in_ldm_names_is_refused(width, small_xl_teacher, tmp_path):
    weights = {name: weight for name, weight in small_xl_teacher.named_parameters().items()}
    weights["label_embed.0.weight"] = torch.zeros(len(weights["label_embed.0.weight"]), width)
    architecture = replace(small_xl_teacher.architecture, shapes={name: tuple(w.shape) for name, w in weights.items()})
    save_unet(tmp_path / "x.safetensors", weights, architecture)
    with pytest.raises(ValueError, match="SD2 unCLIP, which reads images"):
        open_unet(tmp_path / "x.safetensors")


def test_pruned_file_names_teacher_and_plan(teacher_path, tmp_path):
    prune_file(open_unet(teacher_path), tmp_path / "s.safetensors", preset("bk-sdm-tiny"))
    metadata = open_unet(tmp_path / "s.safetensors").metadata
    assert json.loads(metadata["distill.plan"])["name"] == "bk-sdm-tiny"
    assert len(metadata["distill.teacher"]) == 16


# --- bad input


def damaged(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda d, t: d / "nowhere.safetensors", "does not exist"),
        (lambda d, t: damaged(d / "notes.txt", b"hello there, this is text"), "not a valid safetensors file"),
        (lambda d, t: damaged(d / "empty.safetensors", b""), "not a valid safetensors file"),
        (lambda d, t: damaged(d / "cut.safetensors", t.read_bytes()[:-1000]), "not a valid safetensors file"),
        (lambda d, t: damaged(d / "header.safetensors", t.read_bytes()[:100]), "not a valid safetensors file"),
        (lambda d, t: damaged(d / "model.ckpt", b"\x80\x02}q."), "pickle checkpoint"),
        (lambda d, t: damaged(d / "renamed.safetensors", b"PK\x03\x04" + bytes(100)), "pickle checkpoint despite its name"),
        (lambda d, t: damaged(d / "model.gguf", b"GGUF" + bytes(100)), "GGUF format, which is not supported; download the .safetensors"),
        (lambda d, t: d, "holds no diffusion_pytorch_model.safetensors"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_sentence(make, message, teacher_path, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        open_unet(make(tmp_path, teacher_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "gone,named",
    [
        ("down.0.resnet.0.conv1.bias", "input_blocks.1.0.in_layers.2.bias is missing"),
        ("down.0.resnet.0.conv1", "input_blocks.1.0.in_layers.2.bias is missing, and 1 more"),
        ("down.1.attn.0.block.0.attn2.to_k", r"transformer_blocks.0.attn2.to_k.weight is missing"),
        ("down.2.resnet.0.conv_shortcut", "down.2.resnet.0.conv_shortcut.weight is missing"),
        ("conv_out.bias", "out.2.bias is missing"),
        ("mid.attn.0.block.0", "mid.attn.0.block.0 is missing"),
        ("up", "up.0 is missing"),
        ("down.1.resnet.1", "input_blocks.5.0.in_layers.2.bias is missing"),
    ],
)
def test_a_unet_that_is_not_whole_is_refused(gone, named, small_teacher, tmp_path):
    weights = {n: w.detach() for n, w in small_teacher.named_parameters().items()}
    names = LAYOUTS["ldm"].from_canonical(weights)
    kept = {names[n]: w for n, w in weights.items() if not f"{n}.".startswith(f"{gone}.")}
    save_file(kept, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"the UNet is incomplete.*: .*{named}.*download it again") as caught:
        open_unet(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_published_students_are_whole(published):
    for name in preset_names():
        teacher = published[preset(name).teacher]
        pruned(teacher, name_map(teacher, preset(name))).check_whole()


@pytest.mark.parametrize("shape", [(), (0,), (2, 2, 2)])
def test_a_weight_of_an_impossible_shape_is_named(shape, small_teacher, tmp_path):
    weights = {n: w.detach() for n, w in small_teacher.named_parameters().items()} | {
        "mid.resnet.0.conv1.weight": torch.ones(shape)
    }
    names = LAYOUTS["ldm"].from_canonical(weights)
    save_file({names[n]: w for n, w in weights.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="mid.resnet.0.conv1.weight has shape"):
        open_unet(tmp_path / "x.safetensors")


def test_a_model_of_another_family_is_refused(tmp_path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match="flux.safetensors.*no Stable Diffusion UNet"):
        open_unet(tmp_path / "flux.safetensors")


def test_nothing_is_overwritten_unless_asked(teacher_path, tmp_path):
    before = teacher_path.read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        prune_file(open_unet(teacher_path), teacher_path, preset("bk-sdm-base"))
    assert teacher_path.read_bytes() == before


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failed_write_leaves_nothing(failure, tmp_path):
    with pytest.raises(type(failure)), atomic(tmp_path / "file") as made:
        made.write_text("half")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_file(tmp_path):
    write_tensors(tmp_path / "f", {"a": torch.ones(2)})
    with pytest.raises(RuntimeError), atomic(tmp_path / "f", overwrite=True) as made:
        made.write_text("half")
        raise RuntimeError
    assert torch.equal(load_file(tmp_path / "f")["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overwriting_never_deletes_a_folder_of_other_things(layout, teacher_path, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "holiday.jpg").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        prune_file(open_unet(teacher_path), folder, preset("bk-sdm-base"), layout=layout, overwrite=True)
    assert (folder / "holiday.jpg").read_text() == "precious"


def test_a_folder_of_ours_is_overwritten_when_asked(teacher_path, tmp_path):
    for name in ("bk-sdm-base", "bk-sdm-tiny"):
        prune_file(open_unet(teacher_path), tmp_path / "s", preset(name), layout="diffusers", overwrite=True)
    assert plan_in(open_unet(tmp_path / "s").metadata).name == "bk-sdm-tiny"


def test_a_broken_config_is_named(teacher_path, tmp_path):
    prune_file(open_unet(teacher_path), tmp_path / "s", preset("bk-sdm-base"), layout="diffusers")
    for text in ("{", "[]", "{}"):
        (tmp_path / "s" / "config.json").write_text(text)
        with pytest.raises(
            ValueError, match="config.json (is not valid JSON|is not the config of a diffusers UNet|must be an object)"
        ):
            open_unet(tmp_path / "s")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*choose another folder"):
        write_tensors(tmp_path / "file" / "student.safetensors", {"a": torch.ones(2)})


@pytest.mark.parametrize("options,reason", [("size=64k", "No space|os error 28"), ("ro", "Read-only")])
def test_a_full_or_read_only_disk_is_named_and_left_clean(options, reason, tmp_path):
    """On a tiny file system of its own, where the machine lets us mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        with pytest.raises(OSError, match=f"cannot write .*({reason})"):
            write_tensors(folder / "big.safetensors", {"a": torch.ones(100_000)})
        with pytest.raises(OSError) as caught, atomic(folder / "run") as made:
            made.mkdir()
            write_tensors(made / "big.safetensors", {"a": torch.ones(100_000)})
        assert str(caught.value).count("cannot write") == 1 and str(folder / "run") + ":" in str(caught.value)
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", folder], check=True)


def test_files_are_readable_by_others(tmp_path):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "f", {"a": torch.ones(2)})
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_plan_of_ones_own(teacher_path, tmp_path):
    student = prune_file(open_unet(teacher_path), tmp_path / "s", PruningPlan(name="mine", remove=("mid", "down.0.attn.*")))
    assert not {"mid.resnet.0", "down.0.attn.0"} & student.student.modules


def test_whatever_variant_a_diffusers_folder_holds_is_read(small_teacher, tmp_path):
    network = small_teacher.network
    for options in ({"variant": "fp16"}, {"variant": "bf16", "max_shard_size": "200KB"}, {"max_shard_size": "200KB"}):
        folder = tmp_path / "-".join(map(str, options.values()))
        network.save_pretrained(folder, **options)
        assert not (folder / "diffusion_pytorch_model.safetensors").exists()
        file = open_unet(folder)
        names = LAYOUTS["diffusers"].from_canonical(file.architecture.shapes)
        state = network.state_dict()
        assert all(torch.equal(weight, state[names[name]]) for name, weight in file.state_dict.items())


def test_a_shard_that_lacks_what_the_index_says_is_refused(small_teacher, tmp_path):
    small_teacher.network.save_pretrained(tmp_path, max_shard_size="200KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    table = json.loads(index.read_text())
    first, second = sorted(set(table["weight_map"].values()))[:2]
    table["weight_map"] = {name: first if shard == second else shard for name, shard in table["weight_map"].items()}
    index.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=f"{first} lacks .*, which {index.name} says it holds"):
        open_unet(tmp_path)


@pytest.mark.parametrize(
    "change,words",
    [({"time_cond_proj_dim": 16}, "it is an LCM"), ({"class_embed_type": "timestep"}, "class labels"),
     ({"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"}, "reads images")],
)  # fmt: skip
def test_networks_that_only_look_like_stable_diffusion_are_named(change, words, tmp_path):
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(**SMALL | change).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        open_unet(tmp_path)


def test_buffers_of_a_schedule_are_no_vae(small_teacher, tmp_path):
    """As original checkpoints of Stable Diffusion have them."""
    names = LAYOUTS["ldm"].from_canonical(small_teacher.architecture.shapes)
    weights = {f"model.diffusion_model.{names[n]}": w.detach() for n, w in small_teacher.named_parameters().items()}
    beside = {
        "betas": torch.ones(1000),
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.ones(()),
        "logvar": torch.ones(1000),
    }
    save_file(weights | beside, tmp_path / "t.safetensors")
    file = open_unet(tmp_path / "t.safetensors")
    assert not file.others and not file.is_whole_checkpoint
    with pytest.raises(ValueError, match="no VAE and text encoder"):
        prune_file(file, tmp_path / "s.safetensors", preset("bk-sdm-base"), layout="checkpoint")
    vae = {"first_stage_model.x": torch.ones(1)}
    save_file(weights | beside | vae, tmp_path / "t.safetensors")
    assert not open_unet(tmp_path / "t.safetensors").is_whole_checkpoint
    save_file(weights | beside | vae | {"cond_stage_model.x": torch.ones(1)}, tmp_path / "t.safetensors")
    assert open_unet(tmp_path / "t.safetensors").is_whole_checkpoint


def test_a_pruned_file_is_used_again_only_for_the_plan_and_teacher_it_is_of(teacher_path, tmp_path):
    teacher, path = open_unet(teacher_path), tmp_path / "pruned.safetensors"
    pruned_file(teacher, path, preset("bk-sdm-base"))
    written = path.stat().st_mtime_ns
    assert plan_in(pruned_file(teacher, path, preset("bk-sdm-base")).metadata).name == "bk-sdm-base"
    assert path.stat().st_mtime_ns == written
    assert plan_in(pruned_file(teacher, path, preset("bk-sdm-tiny")).metadata).name == "bk-sdm-tiny"
    path.write_bytes(path.read_bytes()[:-100])
    assert plan_in(pruned_file(teacher, path, preset("bk-sdm-tiny")).metadata).name == "bk-sdm-tiny"
    weights = {name: tensor + 1 for name, tensor in teacher.state_dict.items()}
    save_unet(tmp_path / "other.safetensors", weights, teacher.architecture, sampling=teacher.sampling)
    other = open_unet(tmp_path / "other.safetensors")
    again = pruned_file(other, path, preset("bk-sdm-tiny"))
    assert again.origin["distill.teacher"] == fingerprint(other.tensors) != fingerprint(teacher.tensors)
