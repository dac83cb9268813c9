"""A LoRA that was trained is one anybody can load: what its file adds to the weights is what the network computed with."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from distill_core.denoiser import DiffusersDenoiser
from distill_core.lora import kohya_names
from distill_core.plan import preset

from .test_plan import student_of

pytest.importorskip("peft")
from distill_core.adapter import ATTENTION, Lora  # noqa: E402


def copied(denoiser):
    return DiffusersDenoiser(network=copy.deepcopy(denoiser.network), architecture=denoiser.architecture)


def filled(lora):
    random = torch.Generator().manual_seed(0)
    for parameter in lora.parameters().values():
        parameter.data = torch.randn(parameter.shape, generator=random) / 10
    return {name: parameter.detach() for name, parameter in lora.parameters().items()}


@pytest.fixture(scope="module", params=["bk-sdm-base", "bk-sdm-tiny"])
def student(request, small_teacher):
    return student_of(small_teacher, preset(request.param))


@pytest.mark.parametrize("targets", [ATTENTION, ("*.conv1", "*.to_q")], ids=["attention", "convolutions"])
def test_the_file_adds_what_the_network_computed_with(targets, student, batch, tmp_path):
    with_lora = copied(student)
    lora = Lora(with_lora, rank=3, alpha=1.5, targets=targets)
    lora.write(tmp_path / "lora.safetensors", filled(lora), {"step": "1"})
    tensors, merged = load_file(tmp_path / "lora.safetensors"), copied(student)
    names = kohya_names(student.architecture)
    for layer in lora.layers:
        down, up, alpha = (tensors.pop(f"{names[layer]}.{rest}") for rest in ("lora_down.weight", "lora_up.weight", "alpha"))
        weight = merged.module(layer).weight
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * alpha / 3
        weight.data = weight.data + change
    assert not tensors
    with torch.no_grad():
        before, expected, got = student(*batch), merged(*batch), with_lora(*batch)
    assert torch.allclose(got, expected, atol=1e-4) and not torch.allclose(got, before, atol=1e-2)


def test_it_changes_nothing_before_the_first_step(student, batch):
    with_lora = copied(student)
    Lora(with_lora, rank=2)
    with torch.no_grad():
        assert torch.equal(with_lora(*batch), student(*batch))


def test_a_file_is_read_back_exactly(student, tmp_path):
    lora = Lora(copied(student), rank=2)
    written = filled(lora)
    lora.write(tmp_path / "lora.safetensors", written, {})
    read = lora.read(tmp_path / "lora.safetensors")
    assert read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in read)


def test_it_begins_by_its_seed_and_disturbs_no_other_random_number(student):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (Lora(copied(student), rank=2, seed=seed).parameters() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) == name.endswith("lora_up") for name in one)


def test_the_matrices_are_float32_on_a_network_of_half_precision(student):
    half = copied(student)
    half.network.to(torch.bfloat16)
    lora = Lora(half, rank=2)
    assert {parameter.dtype for parameter in lora.parameters().values()} == {torch.float32}
    trained = {id(parameter) for parameter in lora.parameters().values()}
    assert {id(p) for p in half.network.parameters() if p.requires_grad} == trained


def test_a_pattern_without_a_layer_is_an_error(student):
    with pytest.raises(ValueError, match="'mid.none' matches no layer"):
        Lora(copied(student), rank=2, targets=["*.to_q", "mid.none"])


def test_diffusers_loads_the_file(student, batch, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    with_lora = copied(student)
    lora = Lora(with_lora, rank=2, alpha=1.0)
    lora.write(tmp_path / "lora.safetensors", filled(lora), {})
    state, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path / "lora.safetensors", unet_config=student.network.config)
    theirs = copied(student)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, theirs.network, adapter_name="x")
    with torch.no_grad():
        assert torch.allclose(theirs(*batch), with_lora(*batch), atol=1e-5)
