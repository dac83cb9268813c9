"""A LoRA merged into a student's file is what the LoRA makes of the student."""

from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
pytest.importorskip("diffusers")

from distill_core.base.storage import fingerprint
from distill_core.demo.teacher import teacher_file
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.lora.layers import Lora, attach
from distill_core.lora.merge import merged
from distill_core.networks.build import load_unet
from distill_core.networks.files import open_unet
from distill_core.pruning.plan import PruningPlan, preset
from distill_core.pruning.prune import prune, prune_file

PLAN = preset("bk-sdm-small")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    prune_file(teacher_file(), path, PLAN)
    return open_unet(path)


def opened(file):
    return DiffusersDenoiser.of_file(file, load_unet(file))


def trained(student, path, **how):
    """A LoRA on the student, as if it had been trained."""
    lora = Lora(opened(student), rank=4, alpha=2.0, targets=("*",), **how)
    random = torch.Generator().manual_seed(0)
    weights = {
        name: weight + 0.05 * torch.randn(weight.shape, generator=random)
        for name, weight in lora.parameters().items()
    }  # fmt: skip
    lora.write(path, {name: weight.detach() for name, weight in weights.items()}, {"distill.inputs": '{"plan": "bk-sdm-small"}'})
    return path


def put_in(weights, lora, plan=PLAN):
    teacher = teacher_file().architecture
    return merged(weights, prune(teacher, plan), teacher=teacher, lora=lora)


def asked():
    random = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=random), torch.tensor([100, 800]), torch.randn(2, 10, 64, generator=random)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_file_predicts_as_the_student_with_the_lora(student, tmp_path, dora):
    lora = trained(student, tmp_path / "lora.safetensors", dora=dora)
    change = partial(merged, teacher=teacher_file().architecture, lora=lora)
    prune_file(teacher_file(), tmp_path / "merged.safetensors", PLAN, dtype="fp32", change=change)
    with_lora = opened(student)
    plain = with_lora(*asked())
    attach(with_lora, lora, "own")
    whole = opened(open_unet(tmp_path / "merged.safetensors"))
    expected = with_lora(*asked())
    assert not torch.allclose(plain, expected, atol=1e-2)
    torch.testing.assert_close(whole(*asked()), expected, atol=2e-3, rtol=2e-3)


def test_what_is_merged_is_read_in_parts_and_whole_alike(student, tmp_path):
    lora = trained(student, tmp_path / "lora.safetensors")
    weights = put_in(student.tensors, lora)
    whole = {name: weight.read() for name, weight in weights.items()}
    assert fingerprint(weights) == fingerprint(whole) != fingerprint(student.tensors)
    assert {whole[name].dtype for name in whole if weights[name] is not student.tensors[name]} == {torch.float32}  # until written


@pytest.mark.parametrize("damage,said", [
    (lambda tensors: tensors | {"lora_unet_nothing.lora_up.weight": torch.zeros(4, 4)}, "has no layer for lora_unet_nothing"),
    (lambda tensors: {name: weight * torch.nan if "lora_up" in name else weight for name, weight in tensors.items()}, "holds NaN or Inf"),
    (lambda tensors: {name: weight for name, weight in tensors.items() if "lora_down" not in name}, "has no lora_down beside it"),
    (lambda tensors: {name: weight[:, :1].contiguous() if weight.ndim > 1 and "lora_down" in name else weight for name, weight in tensors.items()}, "the model's layer has"),
])  # fmt: skip
def test_a_damaged_lora_is_refused_by_key(student, tmp_path, damage, said):
    lora = trained(student, tmp_path / "lora.safetensors")
    with safe_open(lora, "pt") as opened_file:
        metadata = opened_file.metadata()
    save_file(damage(load_file(lora)), tmp_path / "damaged.safetensors", metadata)
    with pytest.raises(ValueError, match=f"damaged.safetensors: .*{said}"):
        put_in(student.tensors, tmp_path / "damaged.safetensors")


def test_a_lora_of_another_student_is_refused(student, tmp_path):
    lora = trained(student, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="it was trained for the plan bk-sdm-small, not for bk-sdm-base; give that plan"):
        put_in(student.tensors, lora, preset("bk-sdm-base"))


def test_plans_of_one_name_are_told_apart_by_their_blocks(student, tmp_path):
    from dataclasses import replace

    teacher = teacher_file().architecture
    mine, other = (PruningPlan(name="a plan of your own", remove=(f"down.{stage}.attn.1",)) for stage in (0, 1))
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.alpha": torch.zeros(())}, lora, mine.metadata)
    with pytest.raises(ValueError, match="it was trained for the plan a plan of your own, not for a plan of your own"):
        merged(student.tensors, prune(teacher, other), teacher=teacher, lora=lora)
    assert replace(mine, name="x").metadata != mine.metadata  # a name alone makes no other plan
    save_file({"lora_unet_x.alpha": torch.zeros(())}, lora, replace(mine, name="x").metadata)
    with pytest.raises(ValueError, match="has no layer for lora_unet_x.alpha"):
        merged(student.tensors, prune(teacher, mine), teacher=teacher, lora=lora)


def test_quantised_weights_cannot_take_it(student, tmp_path):
    from dataclasses import replace

    lora = trained(student, tmp_path / "lora.safetensors")
    narrow = {name: replace(tensor, code="F8_E4M3") for name, tensor in student.tensors.items()}
    with pytest.raises(ValueError, match="the weights it changes are quantised; give the teacher in bf16, fp16 or fp32"):
        put_in(narrow, lora)
