import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_core.cli import main
from distill_core.demo.teacher import teacher_file
from distill_core.evaluation import catalog
from distill_core.networks.files import open_unet, save_unet
from distill_core.pruning.plan import all_preset_names, plan_in

pytestmark = pytest.mark.slow


@pytest.fixture
def teacher(small_teacher, tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_unet(path, small_teacher.named_parameters(), small_teacher.architecture)
    return path


def test_prune_writes_a_student(teacher, tmp_path, capsys):
    out = tmp_path / "student.safetensors"
    assert main(["prune", str(teacher), str(out), "--preset", "bk-sdm-small", "--dtype", "fp16"]) == 0
    assert open_unet(out).dtype == "f16" and plan_in(open_unet(out).metadata).name == "bk-sdm-small"
    assert "fewer than the teacher" in capsys.readouterr().out


def test_prune_takes_a_plan_file(teacher, tmp_path):
    (tmp_path / "plan.json").write_text('{"name": "mine", "remove": ["mid"]}')
    assert main(["prune", str(teacher), str(tmp_path / "s"), "--plan", str(tmp_path / "plan.json"), "--layout", "diffusers"]) == 0
    assert open_unet(tmp_path / "s").layout == "diffusers"


def test_inspect_and_presets_print_json(teacher, capsys, monkeypatch):
    monkeypatch.setattr(catalog, "macs_of", lambda architecture, *_: 10**9)  # counted in test_plan.py, for most of a minute
    assert main(["inspect", str(teacher), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "sd1" and len(facts["stages"]) == 8
    assert main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {*all_preset_names()} and rows["ssd-1b"]["parameters"] and rows["flux-mini"]["teacher"] == "flux1"
    assert main(["presets"]) == 0 and "flux-mini" in capsys.readouterr().out


def test_inspect_reads_the_demo(capsys):
    assert main(["inspect", str(teacher_file().path)]) == 0
    assert "3,187,716" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ["prune", "nowhere.safetensors", "{tmp}/o.safetensors", "--preset", "bk-sdm-base"],
            "nowhere.safetensors does not exist",
        ),
        (
            ["prune", "{teacher}", "{tmp}/there.safetensors", "--preset", "bk-sdm-base"],
            "exists already; choose another name, or add --overwrite",
        ),
        (
            ["prune", "{teacher}", "{tmp}/../{tmp.name}/teacher.safetensors", "--preset", "bk-sdm-base", "--overwrite"],
            "which it is made from; choose another name",
        ),
        (
            ["prune", "{teacher}", "{tmp}", "--preset", "bk-sdm-base", "--layout", "diffusers", "--overwrite"],
            "which it is made from; choose another name",
        ),
        (
            ["prune", "{teacher}", "{tmp}/there.safetensors", "--preset", "bk-sdm-base", "--lora", "{tmp}/there.safetensors"],
            "which it is made from; choose another name",
        ),
        (
            [
                "remap-lora",
                "l",
                "{folder}/diffusion_pytorch_model.safetensors",
                "--teacher",
                "{folder}",
                "--preset",
                "bk-sdm-base",
            ],
            "which it is made from; choose another name",
        ),
        (
            ["convert-lora", "{tmp}/there.safetensors", "{tmp}/there.safetensors", "--model", "{teacher}", "--overwrite"],
            "which it is made from; choose another name",
        ),
        (["prune", "{teacher}", "{tmp}/o.safetensors", "--plan", "nowhere.json"], "nowhere.json does not exist"),
        (["prune", "{teacher}", "{tmp}/o.ckpt", "--preset", "bk-sdm-base"], "o.ckpt must end in .safetensors"),
        (
            ["prune", "{teacher}", "{tmp}/o.safetensors", "--preset", "bk-sdm-base", "--layout", "diffusers"],
            "leave out .safetensors",
        ),
        (["prune", "{teacher}", "{tmp}/o.safetensors", "--plan", "remove mid"], "an example for"),
        (
            ["remap-lora", "{teacher}", "{tmp}/o.safetensors", "--teacher", "{teacher}", "--preset", "bk-sdm-base"],
            "this is not a LoRA",
        ),
        (["convert-lora", "{teacher}", "{tmp}/o.safetensors", "--model", "{teacher}"], "this is not a LoRA"),
        (["train", "{teacher}"], "holds weights, not text"),
        (["train", "bk-sdm-small"], "distill recipes bk-sdm-small > my_run.toml"),
        (["remap-lora", "l", "{tmp}/o.pt", "--teacher", "{teacher}", "--preset", "bk-sdm-base"], "o.pt must end in .safetensors"),
        (["prune", "{teacher}", "{teacher}/o.safetensors", "--preset", "bk-sdm-base"], "cannot write"),
        (["inspect", "{tmp}"], "holds no diffusion_pytorch_model.safetensors"),
        (["quickstart", "--out", "{tmp}"], "is not an unfinished quickstart"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_2(arguments, message, teacher, tmp_path, capsys):
    (tmp_path / "there.safetensors").write_bytes(b"")
    file, folder = open_unet(teacher), tmp_path / "folder"
    save_unet(folder, file.state_dict, file.architecture, layout="diffusers")
    before = sorted(tmp_path.rglob("*"))
    assert main([a.format(teacher=teacher, tmp=tmp_path, folder=folder) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("distill: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["prune", "a", "b"], ["prune", "a", "b", "--preset", "bk"], ["quickstart", "--steps", "0"],
                                       ["quickstart", "--prompts", "0"], ["frobnicate"], []])  # fmt: skip
def test_bad_options_exit_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no error of its own for it")
def test_it_ends_quietly_when_nobody_reads_its_output_any_more():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "distill_core", "recipes", "four-experts"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize("as_json", [False, True])
def test_remap_lora_tells_what_fits(as_json, teacher, tmp_path, capsys):
    matrices = {"lora_up.weight": torch.ones(64, 2), "lora_down.weight": torch.ones(2, 64)}
    save_file({f"lora_unet_{layer}_proj_in.{name}": matrix.clone() for name, matrix in matrices.items()
               for layer in ("mid_block_attentions_0", "up_blocks_1_attentions_2")}, tmp_path / "lora.safetensors")  # fmt: skip
    arguments = ["remap-lora", str(tmp_path / "lora.safetensors"), str(tmp_path / "out.safetensors"), "--teacher", str(teacher)]
    assert main([*arguments, "--preset", "bk-sdm-small", *(["--json"] if as_json else [])]) == 0
    told = capsys.readouterr().out
    if as_json:
        assert json.loads(told)["num_kept"] == json.loads(told)["num_dropped"] == 1
    else:
        assert "1 of 2 layers kept; 1 dropped" in told
    written = load_file(tmp_path / "out.safetensors")
    assert written.keys() == {f"lora_unet_up_blocks_1_attentions_1_proj_in.{name}" for name in matrices}
    student = tmp_path / "student.safetensors"
    assert main(["prune", str(teacher), str(student), "--preset", "bk-sdm-small"]) == 0
    assert main([*arguments, "--student", str(student), "--overwrite"]) == 0
    by_student = load_file(tmp_path / "out.safetensors")
    assert by_student.keys() == written.keys() and all(torch.equal(by_student[name], written[name]) for name in written)


@pytest.mark.parametrize("as_json", [False, True])
def test_convert_lora_tells_what_it_wrote(as_json, teacher, tmp_path, capsys):
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{layer}.lora_up.weight": torch.ones(64, 2), f"{layer}.lora_down.weight": torch.ones(2, 64)}
    save_file({**tensors, f"{layer}.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    arguments = ["convert-lora", str(tmp_path / "lora.safetensors"), str(tmp_path / "out.safetensors"), "--model", str(teacher)]
    assert main([*arguments, *(["--json"] if as_json else [])]) == 0
    told = capsys.readouterr().out
    assert json.loads(told)["num_layers"] == 1 if as_json else "1 layer, " in told
    written = load_file(tmp_path / "out.safetensors")
    assert torch.equal(written["unet.mid_block.attentions.0.proj_in.lora_B.weight"], torch.full((64, 2, 1, 1), 0.5))
    assert main(arguments) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "quickstart", "presets", "inspect", "prune", "remap-lora", "convert-lora", "compare"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0 and capsys.readouterr().out


def test_the_library_imports_lightly():
    """Nothing heavy beyond torch comes in with the package; counted in modules, since seconds depend on the machine."""
    code = "import torch, sys; import distill_core.cli, distill_core.training.run, distill_core.quickstart; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"diffusers", "transformers", "peft", "matplotlib", "torchvision", "PIL"}
    assert not heavy & {name.split(".")[0] for name in loaded}


def test_inspect_and_help_need_no_torch(teacher):
    """They answer from a header, so they start at once."""
    code = f"import sys; from distill_core.cli import main; main(['inspect', {str(teacher)!r}]); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" not in loaded and "numpy" not in loaded


@pytest.mark.parametrize("plan", ["keep down 1 mid none up 2", '{"name": "mine", "remove": ["mid"]}'])
def test_prune_takes_the_text_of_a_plan(plan, teacher, tmp_path):
    assert main(["prune", str(teacher), str(tmp_path / "s.safetensors"), "--plan", plan]) == 0
    assert "mid.resnet.0" not in open_unet(tmp_path / "s.safetensors").architecture.modules


def test_keep_chooses_other_blocks_of_a_preset_and_nothing_else(teacher, tmp_path, capsys):
    arguments = ["prune", str(teacher), str(tmp_path / "s.safetensors")]
    assert main([*arguments, "--preset", "bk-sdm-base", "--keep", "mid.attn.0=0"]) == 2
    assert "does not thin out 'mid.attn.0'" in capsys.readouterr().err
    assert main([*arguments, "--plan", "keep mid none", "--keep", "mid.attn.0=0"]) == 2
    assert "--keep changes a preset" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--preset", "ssd-1b", "--keep", "half of it"])


def test_inspect_says_yes_and_no(teacher, capsys):
    assert main(["inspect", str(teacher)]) == 0
    told = capsys.readouterr().out
    assert {"with vae and text encoder no", "pruned by none", "sampling eps prediction"} <= {
        " ".join(line.split()).partition(",")[0] for line in told.splitlines()
    }
