"""A LoRA that was trained is one anybody can load: what its file adds to the weights is what the network computed with."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_core.base.storage import read_header
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.lora.remap import convert_lora_file
from distill_core.networks.lora_names import kohya_names
from distill_core.pruning.plan import preset

from ...students import student_of

pytest.importorskip("peft")
from distill_core.lora.layers import ATTENTION, Lora, attach, trained_shapes, turn_on  # noqa: E402

pytestmark = pytest.mark.slow


def copied(denoiser):
    return DiffusersDenoiser(network=copy.deepcopy(denoiser.network), architecture=denoiser.architecture)


def filled(lora):
    random = torch.Generator().manual_seed(0)
    for name, parameter in lora.parameters().items():
        change = torch.randn(parameter.shape, generator=random) / 10
        parameter.data = parameter.data * (1 + change) if name.endswith("dora_scale") else change
    return {name: parameter.detach() for name, parameter in lora.parameters().items()}


@pytest.fixture(scope="module", params=["bk-sdm-base", "bk-sdm-tiny"])
def student(request, small_teacher):
    return student_of(small_teacher, preset(request.param))


DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@DORA
@pytest.mark.parametrize("targets", [ATTENTION, ("*",)], ids=["attention", "everything"])
def test_what_a_lora_will_train_is_known_before(targets, dora, student):
    expected = trained_shapes(student, 3, targets, dora)
    found = [parameter.shape for parameter in Lora(copied(student), rank=3, targets=targets, dora=dora).parameters().values()]
    assert sorted(map(tuple, expected)) == sorted(map(tuple, found)) and len(expected) > 8


@DORA
@pytest.mark.parametrize("targets", [ATTENTION, ("*.conv1", "*.to_q")], ids=["attention", "convolutions"])
def test_the_file_adds_what_the_network_computed_with(targets, dora, student, batch, tmp_path):
    with_lora = copied(student)
    lora = Lora(with_lora, rank=3, alpha=1.5, dora=dora, targets=targets)
    lora.write(tmp_path / "lora.safetensors", filled(lora), {"step": "1"})
    tensors, merged = load_file(tmp_path / "lora.safetensors"), copied(student)
    names = kohya_names(student.architecture)
    for layer in lora.layers:
        down, up, alpha = (tensors.pop(f"{names[layer]}.{rest}") for rest in ("lora_down.weight", "lora_up.weight", "alpha"))
        weight = merged.module(layer).weight
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * alpha / 3
        weight.data = weight.data + change
        if dora:
            weight.data = columns_of_length(weight.data, tensors.pop(f"{names[layer]}.dora_scale"))
    assert not tensors
    with torch.no_grad():
        before, expected, got = student(*batch), merged(*batch), with_lora(*batch)
    assert torch.allclose(got, expected, atol=1e-4) and not torch.allclose(got, before, atol=1e-2)


def columns_of_length(weight, lengths):
    """A weight whose columns have other lengths, as arXiv 2402.09353, Eq. 5."""
    norms = torch.stack([column.norm() for column in weight.detach().unbind(1)])
    return weight * (lengths.flatten() / norms).reshape(1, -1, *[1] * (weight.ndim - 2))


@DORA
def test_it_changes_nothing_before_the_first_step(dora, student, batch):
    with_lora = copied(student)
    Lora(with_lora, rank=2, dora=dora, targets=["*"])
    with torch.no_grad():
        assert torch.equal(with_lora(*batch), student(*batch))


@DORA
def test_a_file_is_read_back_exactly(dora, student, tmp_path):
    lora = Lora(copied(student), rank=2, dora=dora)
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


def test_a_dora_learns_by_the_gradient_of_the_paper(student, batch):
    """Through what is merged, the norm a constant (Sec. 4.3)."""
    student = replace(student, network=copy.deepcopy(student.network).double())
    batch = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in batch)
    with_lora = copied(student)
    targets = ("mid.*.to_v", "*.conv1") if student.architecture.stages("mid") else ("*.to_v", "*.conv1")
    lora = Lora(with_lora, rank=3, alpha=1.5, dora=True, targets=targets)
    filled(lora)
    with_lora(*batch).square().mean().backward()
    got = {name: parameter.grad for name, parameter in lora.parameters().items()}
    own = {name: parameter.detach().clone().requires_grad_() for name, parameter in lora.parameters().items()}
    merged = {}
    for layer in lora.layers:
        weight, down, up = student.module(layer).weight.detach(), own[f"{layer}.lora_down"], own[f"{layer}.lora_up"]
        weight = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * 1.5 / 3
        merged[f"{student.path(layer)}.weight"] = columns_of_length(weight, own[f"{layer}.dora_scale"])
    x_t, t, context = batch
    answer = torch.func.functional_call(student.network, merged, (x_t, t, context)).sample
    expected = dict(zip(own, torch.autograd.grad(answer.square().mean(), own.values()), strict=True))
    for name in expected:
        assert torch.allclose(got[name], expected[name], atol=1e-4 * expected[name].abs().max(), rtol=1e-3), name


def test_a_dora_on_half_precision_is_finite_float32_even_where_a_column_is_empty(student, batch):
    half = copied(student)
    layer = next(layer for layer in half.lora_names if layer.endswith("conv2"))
    half.module(layer).weight.data[:, :3] = 0  # as in blocks put back as identities
    half.network.to(torch.float16)
    lora = Lora(half, rank=2, dora=True, targets=["*"])
    parameters = lora.parameters()
    assert {p.dtype for p in parameters.values()} == {torch.float32} and all(p.isfinite().all() for p in parameters.values())
    x_t, t, context = batch
    answer = half(x_t.half(), t, context.half())
    answer.float().square().mean().backward()
    assert answer.isfinite().all() and all(p.grad.isfinite().all() for p in parameters.values())


@DORA
def test_put_on_from_a_file_it_answers_as_it_did(dora, student, batch, tmp_path):
    with_lora, loaded = copied(student), copied(student)
    lora = Lora(with_lora, rank=2, alpha=1.0, dora=dora, targets=["*"])
    lora.write(tmp_path / "lora.safetensors", filled(lora), {})
    other = Lora(copied(student), rank=3, seed=1)
    other.write(tmp_path / "other.safetensors", filled(other), {})
    attach(loaded, tmp_path / "lora.safetensors", "one")
    attach(loaded, tmp_path / "other.safetensors", "two")
    with torch.no_grad():
        for name, expected in {"one": with_lora, "two": other.denoiser}.items():
            turn_on(loaded.network, name)
            assert torch.equal(loaded(*batch), expected(*batch))
        turn_on(loaded.network, "one")
        loaded.network.disable_lora()  # as a pipeline of diffusers does
        assert torch.equal(loaded(*batch), student(*batch))


def test_a_dora_on_a_convolution_in_groups_is_refused(student):
    grouped = copied(student)
    layer = next(layer for layer in grouped.lora_names if layer.endswith("conv2"))
    channels = grouped.module(layer).in_channels
    grouped.network.set_submodule(grouped.path(layer), torch.nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
    with pytest.raises(ValueError, match="DoRA does not support"):
        Lora(grouped, rank=channels, dora=True, targets=[layer])


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


@pytest.fixture(params=["sd", "xl"])
def in_a_pipeline(request, small_teacher, small_xl_teacher, batch, xl_batch):
    """A network, what it is asked, and a pipeline of diffusers around a copy of it."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    network, asked = {"sd": (small_teacher, batch), "xl": (small_xl_teacher, xl_batch)}[request.param]
    parts = dict(vae=None, text_encoder=None, tokenizer=None, unet=copied(network).network, scheduler=EulerDiscreteScheduler())
    if request.param == "xl":
        return network, asked, StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False)
    rest = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return network, asked, StableDiffusionPipeline(**parts, **rest)


@pytest.mark.parametrize("targets", [ATTENTION, ("*",)], ids=["attention", "all"])
def test_diffusers_own_form_is_loaded_whole(targets, in_a_pipeline, tmp_path, caplog):
    network, asked, pipeline = in_a_pipeline
    with_lora = copied(network)
    lora = Lora(with_lora, rank=3, alpha=1.5, targets=targets)
    lora.write(tmp_path / "lora.safetensors", filled(lora), {"distill.step": "1"})
    num_layers = convert_lora_file(tmp_path / "lora.safetensors", tmp_path / "converted.safetensors", network.architecture)
    told = read_header(tmp_path / "converted.safetensors")
    assert num_layers == len(lora.layers) and len(told.tensors) == 2 * num_layers
    assert all(name.startswith("unet.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in told.tensors)
    assert told.metadata["distill.step"] == "1" and "ss_network_alpha" not in told.metadata
    pipeline.load_lora_weights(tmp_path / "converted.safetensors")
    warned = [record.getMessage() for record in caplog.records]  # of keys that are left over, for one
    assert all("prefix='text_encoder" in message for message in warned)
    loaded = {name for name, _ in pipeline.unet.named_parameters() if ".lora_" in name}
    assert {f"unet.{name}".replace(".default_0", "") for name in loaded} == told.tensors.keys()
    theirs = DiffusersDenoiser(network=pipeline.unet.eval(), architecture=network.architecture)
    with torch.no_grad():
        got, expected, before = theirs(*asked), with_lora(*asked), network(*asked)
    scale = expected.abs().max()
    assert (got - expected).abs().max() < 1e-4 * scale and (expected - before).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("damage", ["lone up", "NaN", "ranks", "no alpha"])
def test_a_file_that_is_damaged_is_not_attached(damage, small_teacher, tmp_path):
    lora = Lora(copied(small_teacher), rank=2, alpha=1.0)
    lora.write(tmp_path / "lora.safetensors", filled(lora), {})
    tensors = load_file(tmp_path / "lora.safetensors")
    name = next(iter(tensors)).split(".")[0]
    up, down = f"{name}.lora_up.weight", f"{name}.lora_down.weight"
    if damage == "no alpha":  # which means alpha is the rank
        save_file({key: tensor for key, tensor in tensors.items() if not key.endswith("alpha")}, tmp_path / "damaged.safetensors")
        loaded = copied(small_teacher)
        attach(loaded, tmp_path / "damaged.safetensors", "one")
        assert {loaded.module(layer).scaling["one"] for layer in lora.layers} == {1.0}
        return
    tensors[up] = tensors[up] * float("nan") if damage == "NaN" else torch.ones(len(tensors[up]), 3)
    save_file(
        {key: tensor for key, tensor in tensors.items() if damage != "lone up" or key != down}, tmp_path / "damaged.safetensors"
    )
    with pytest.raises(ValueError, match=name):
        attach(copied(small_teacher), tmp_path / "damaged.safetensors", "one")


@pytest.mark.parametrize(
    "key,message",
    [
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "of a kind"),
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "of a kind"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_mid.weight", "of a kind"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "belongs to a text encoder"),
        ("unet.mid_block.attentions.0.proj_in.lora_B.weight", "two tensors for one place"),
        ("lora_unet_mid_block_attentions_0_proj_out.lora_up.weight", "one of the two matrices"),
        ("lora_unet_mid_block_attentions_7_proj_in.lora_up.weight", "made for another model"),
    ],
)
def test_what_has_no_place_in_diffusers_form_is_refused(key, message, small_teacher, tmp_path):
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{layer}.lora_up.weight": torch.ones(64, 2), f"{layer}.lora_down.weight": torch.ones(2, 64)}
    save_file({**tensors, key: torch.ones(64, 1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_lora_file(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", small_teacher.architecture)
    assert not (tmp_path / "out.safetensors").exists()
