"""A LoRA learns on a base of eight or four bits, which stays what it is."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from distill_core.base.storage import read_header
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.lora.layers import Lora, WithoutLora
from distill_core.networks.quantised import QUANTISED, kept_bytes, quantise
from distill_core.preparation import prepare
from distill_core.recipe import Recipe
from distill_core.training.loop import distill
from distill_core.training.memory import MemorySettings, forecast
from distill_core.training.run import Run

from ..training.test_guided_training import RECIPE

pytestmark = pytest.mark.slow

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
BOTH = pytest.mark.parametrize("dtype", QUANTISED)


def quantised(denoiser, dtype):
    network = copy.deepcopy(denoiser.network).to(torch.bfloat16)
    quantise(network, dtype)
    return DiffusersDenoiser(network=network.to("cpu"), architecture=denoiser.architecture)


def in_half(batch):
    x_t, t, context = batch
    return x_t.bfloat16(), t, context.bfloat16()


def bytes_of(network):
    """What lies in memory: every storage once, scales of quantised weights included."""
    found = {}

    def add(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    for parameter in network.parameters():
        add(parameter)
        if (state := getattr(parameter, "quant_state", None)) is not None:
            for tensor in (state.absmax, state.code, state.offset, state.state2.absmax):  # the scales' own code is there once
                add(tensor)
        if getattr(parameter, "SCB", None) is not None:
            add(parameter.SCB)
    return sum(found.values())


@BOTH
def test_linear_weights_are_kept_in_as_many_bytes_as_is_said(dtype, small_xl_teacher):
    half = copy.deepcopy(small_xl_teacher.network).to(torch.bfloat16)
    network = quantised(small_xl_teacher, dtype).network
    shapes = {name: tuple(weight.shape) for name, weight in half.named_parameters()}
    assert bytes_of(half) == kept_bytes(shapes, "bf16") == 2 * sum(weight.numel() for weight in half.parameters())
    assert bytes_of(network) == kept_bytes(shapes, dtype)
    wide = {"wide.weight": (1280, 5120)}
    share = {"int8": 1 / 2, "nf4": 1 / 4}[dtype]
    assert kept_bytes(wide, dtype) == pytest.approx(share * kept_bytes(wide, "fp16"), rel=0.05)
    kinds = {type(layer).__name__ for layer in network.modules() if isinstance(layer, nn.Linear)}
    assert kinds == {{"int8": "Linear8bitLt", "nf4": "Linear4bit"}[dtype]}
    assert all(layer.weight.dtype == torch.bfloat16 for layer in network.modules() if isinstance(layer, nn.Conv2d))


@BOTH
def test_it_answers_nearly_as_before(dtype, small_teacher, batch):
    with torch.no_grad():
        expected, got = small_teacher(*batch), quantised(small_teacher, dtype)(*in_half(batch)).float()
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < {"int8": 0.05, "nf4": 0.25}[dtype]


@BOTH
def test_with_the_lora_off_it_is_the_quantised_base_before_and_after_training(dtype, small_teacher, small_data, batch, tmp_path):
    base, alone = quantised(small_teacher, dtype), quantised(small_teacher, dtype)
    teacher = WithoutLora(base)
    run = Run(tmp_path / "run", RECIPE)
    with torch.no_grad():
        before = alone(*in_half(batch))
        assert torch.equal(base(*in_half(batch)), before)
    distill(run, student=base, teacher=teacher, plan=None, dataset=small_data)
    with torch.no_grad():
        assert torch.equal(teacher(*in_half(batch)), before) and not torch.equal(base(*in_half(batch)), before)
    weights = {
        name.replace(".base_layer", ""): weight for name, weight in base.network.named_parameters() if ".lora_" not in name
    }
    theirs = dict(alone.network.named_parameters())
    assert weights.keys() == theirs.keys() and all(torch.equal(weights[name], theirs[name]) for name in theirs)
    losses = [row["total"] for row in run.metrics()]
    assert losses[-1] < losses[0]
    written = read_header(run.result_file).tensors
    plain = read_header_of_a_plain_lora(small_teacher, tmp_path)
    assert {name: (tensor.shape, tensor.code) for name, tensor in written.items()} == plain


def read_header_of_a_plain_lora(denoiser, folder):
    """Names, shapes and precisions in the file of a LoRA on weights as they are."""
    lora = Lora(
        DiffusersDenoiser(network=copy.deepcopy(denoiser.network), architecture=denoiser.architecture), rank=RECIPE.lora_rank
    )
    lora.write(folder / "plain.safetensors", lora.parameters(), {})
    return {name: (tensor.shape, tensor.code) for name, tensor in read_header(folder / "plain.safetensors").tensors.items()}


@BOTH
def test_a_gradient_reaches_every_matrix(dtype, small_teacher, batch):
    """And is nearly that on the weights as they are."""
    plain = DiffusersDenoiser(network=copy.deepcopy(small_teacher.network), architecture=small_teacher.architecture)
    base, found = quantised(small_teacher, dtype), []
    _, t, context = batch
    asked = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), t, context  # no attention to one place alone
    for denoiser, inputs in ((plain, asked), (base, in_half(asked))):
        lora = Lora(denoiser, rank=2, targets=["*"])
        for name, parameter in lora.parameters().items():
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 10
        denoiser(*inputs).float().square().mean().backward()
        found.append({name: parameter.grad for name, parameter in lora.parameters().items()})
    parameters = lora.parameters()
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert not [name for name, gradient in found[1].items() if not gradient.any() or not gradient.isfinite().all()]
    trained = {id(parameter) for parameter in parameters.values()}
    assert {id(p) for p in base.network.parameters() if p.requires_grad} == trained
    one, other = (torch.cat([gradient.flatten() for gradient in gradients.values()]) for gradients in found)
    assert torch.cosine_similarity(one, other, dim=0) > 0.9


@BOTH
def test_a_dora_on_it_is_refused(dtype, small_teacher):
    with pytest.raises(ValueError, match="DoRA does not support int8 or nf4"):
        Lora(quantised(small_teacher, dtype), rank=2, dora=True)


@BOTH
def test_the_forecast_counts_it(dtype, small_teacher):
    recipe, told = replace(RECIPE, optimizer="adafactor"), {}
    networks = {"teacher": small_teacher.architecture, "student": small_teacher.architecture, "plan": None}
    for kept in ("bf16", dtype):
        settings = MemorySettings(training=recipe, teacher_dtype=kept, shares_base=True, device="cpu")
        told[kept] = dict(forecast(**networks, settings=settings, latent_shape=(4, 8, 8), num_tokens=4).parts)
    saved = kept_bytes(small_teacher.architecture.shapes, "bf16") - kept_bytes(small_teacher.architecture.shapes, dtype)
    assert told["bf16"]["student weights"] - told[dtype]["student weights"] == saved > 0
    largest = max(shape[0] * shape[1] for name, shape in small_teacher.architecture.shapes.items() if len(shape) == 2)
    assert told[dtype]["working memory"] == told["bf16"]["working memory"] + 2 * largest
    same = told["bf16"].keys() - {"student weights", "working memory"}
    assert all(told["bf16"][name] == told[dtype][name] for name in same)


JOB = """
run = "run"

[teacher]
file = "demo"
dtype = "{dtype}"

[data]
prompts = "prompts.txt"
cache = "cache"
guidance = 2.0
sampler_steps = 2
resolution = "64"

[training]
objective = "guidance"
guidance = 2.0
caption_dropout = 0.0
lora_rank = 4
total_steps = 2
batch_size = 2
learning_rate = 1e-3
"""


@BOTH
def test_a_recipe_asks_for_it_by_the_teachers_dtype(dtype, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat, flat\na red bus, shaded\n")
    (tmp_path / "job.toml").write_text(JOB.format(dtype=dtype))
    prepared = prepare(Recipe.read(tmp_path / "job.toml"))
    assert prepared.models.shares_base
    parts = dict(prepared.forecast().parts)
    assert parts["student weights"] < 2 * prepared.models.architecture.num_parameters
    prepared.train(lambda progress: None)
    assert prepared.run.complete and prepared.run.result_file.name == "lora.safetensors"
    several = JOB.format(dtype=dtype).replace('"run"', '"several"') + "\n[experts]\ncount = 2\njoint_steps = 0\n"
    (tmp_path / "several.toml").write_text(several)
    with pytest.raises(ValueError, match=f"{dtype} weights cannot be saved"):
        prepare(Recipe.read(tmp_path / "several.toml"))


@BOTH
def test_without_the_package_the_pip_line_is_named(dtype, small_teacher, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="python -m pip install bitsandbytes"):
        quantised(small_teacher, dtype)


def test_other_precisions_are_counted_as_ever():
    shapes = {"a.weight": (8, 4, 3, 3), "a.bias": (8,), "b.weight": (16, 8)}
    assert [kept_bytes(shapes, dtype) for dtype in ("fp32", "fp16", "fp8")] == [4 * 424, 2 * 424, 424]
