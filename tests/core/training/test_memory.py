import contextlib
import copy
import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from distill_core.base.precision import DTYPES
from distill_core.base.sizes import GIB, gib
from distill_core.diffusion.denoiser import DiffusersDenoiser, checkpointing, tap
from distill_core.evaluation.catalog import LATENT_SHAPES, NUM_TOKENS
from distill_core.networks.architecture import Architecture
from distill_core.pruning.plan import PruningPlan, name_map, preset, pruned
from distill_core.training import memory
from distill_core.training.ema import EMA
from distill_core.training.exports import trained
from distill_core.training.memory import (
    PARTS,
    RESERVE,
    STATE_BYTES,
    Forecast,
    Ledger,
    MemorySettings,
    Part,
    changes,
    emptied,
    forecast,
    free_bytes,
    inputs_of,
    norms_as_on_cuda,
    student_loss,
    taught,
    update_bytes,
    without_contents,
)
from distill_core.training.optim import OPTIMIZERS, Optimizer
from distill_core.training.settings import TrainingSettings

from ...students import student_of

pytestmark = pytest.mark.slow

SIZES = {"latent_shape": (4, 16, 16), "num_tokens": 5}
OF_RECIPE = {field.name for field in fields(TrainingSettings)}


def settings_of(base=None, **changes):
    """Memory settings, and of their recipe, by name."""
    base = base or MemorySettings(training=TrainingSettings(batch_size=1))
    recipe = replace(base.training, **{name: value for name, value in changes.items() if name in OF_RECIPE})
    return replace(base, training=recipe, **{name: value for name, value in changes.items() if name not in OF_RECIPE})


@dataclass
class Pair:
    """A teacher and a student of it, and what was forecast for them."""

    teacher: DiffusersDenoiser
    plan: PruningPlan

    def __post_init__(self):
        self.student, self._told = student_of(self.teacher, self.plan), {}

    def points(self, recipe):
        mapping = name_map(self.teacher.architecture, self.plan)
        return recipe.weighted_objective.feature_layers(self.teacher.architecture, self.student.architecture, mapping)

    def forecast(self, base=None, shape=SIZES["latent_shape"], **changes):
        settings = settings_of(base, **changes)
        steps = (
            settings.training.objective,
            settings.training.lora_rank,
            settings.training.guidance,
        )  # what a forecast cannot be told again with
        if steps not in self._told:
            networks = {"teacher": self.teacher.architecture, "student": self.student.architecture, "plan": self.plan}
            self._told[steps] = forecast(**networks, settings=settings, latent_shape=shape, num_tokens=SIZES["num_tokens"])
        return self._told[steps].again(settings, shape)

    def parts(self, *arguments, **changes):
        return dict(self.forecast(*arguments, **changes).parts)


@pytest.fixture(scope="module")
def tiny():
    """Two levels of one layer, to be quick."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    network = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, down_block_types=down, up_block_types=up, cross_attention_dim=16
    ).eval()
    architecture = Architecture.from_state_dict(network.state_dict())
    return Pair(DiffusersDenoiser(network=network, architecture=architecture), PruningPlan(name="p", remove=("mid",)))


@pytest.fixture(scope="module")
def small_xl(small_xl_teacher):
    return Pair(small_xl_teacher, PruningPlan(name="p", remove=("mid",), keep={"down.2.attn.*": (0, 2)}))


def ready(denoiser, recipe):
    """A copy of a denoiser to train as a recipe says, with weights none of which is all zeros."""
    network = copy.deepcopy(denoiser.network).train()
    for weight in network.parameters():
        weight.data = weight.data.to(DTYPES[recipe.weight_dtype]) + 0.01
    denoiser = replace(denoiser, network=network)
    trained(denoiser, recipe, None)
    return denoiser


# --- weights, gradients, optimiser ----------------------------------------------------------------------------------


def test_the_optimisers_are_those_of_a_run():
    assert set(STATE_BYTES) == set(OPTIMIZERS)


def optimizer_for(name, weights, weight_dtype):
    package = OPTIMIZERS[name].package
    pytest.importorskip({"lion-pytorch": "lion_pytorch"}.get(package, package))
    return Optimizer(name, weights, learning_rate=1e-3, weight_decay=1e-2, rounding=weight_dtype == "bf16")


KINDS = [(name, "fp32") for name in STATE_BYTES] + [(name, "bf16") for name, kind in OPTIMIZERS.items() if kind.one_by_one]


@pytest.mark.parametrize("name,weight_dtype", KINDS)
def test_what_a_real_step_leaves_is_counted_to_the_byte(name, weight_dtype, tiny):
    settings = settings_of(
        optimizer=name, weight_dtype=weight_dtype, ema_decay=0.9, batch_size=2, accumulation_steps=2, device="cpu"
    )
    weights = ready(tiny.student, settings.training).named_parameters()
    optimizer = optimizer_for(name, weights, weight_dtype)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    gradients = [weight.grad for weight in weights.values()]
    optimizer.step(1e-3, torch.Generator())
    states = [tensor for key, tensor in optimizer.state()[0].items() if "qmap" not in key]  # two tables of 1 KiB, shared

    counted = tiny.parts(settings)
    for part, tensors in {
        "student weights": weights.values(),
        "gradients": gradients,
        "optimizer": states,
        "EMA": EMA(weights, 0.9).weights.values(),
        "teacher weights": tiny.teacher.network.parameters(),
    }.items():
        assert counted[part] == sum(tensor.nbytes for tensor in tensors), part


@pytest.mark.parametrize("name,weight_dtype", KINDS)
def test_the_update_works_with_what_was_forecast(name, weight_dtype):
    weight = torch.nn.Parameter(torch.randn(64, 64, 3, 3).to(DTYPES[weight_dtype]))
    optimizer = optimizer_for(name, {"weight": weight}, weight_dtype)
    for _ in range(2):  # the first makes the optimiser's state
        weight.grad = torch.randn_like(weight)
        there = [weight.detach(), weight.grad, *optimizer.state()[0].values()]
        with Ledger(there) as ledger:
            optimizer.step(1e-3, torch.Generator())
    counted = update_bytes([weight.shape], TrainingSettings(optimizer=name, weight_dtype=weight_dtype))
    on_cpu = 2 if (name, weight_dtype) == ("adamw", "fp32") else 1  # where AdamW takes one tensor after another
    assert ledger.most.total() <= on_cpu * counted
    if weight_dtype == "bf16":
        assert ledger.most.total() > 0.75 * counted


def test_adamw_on_a_gpu_copies_all_weights(tiny):
    weights = list(ready(tiny.student, TrainingSettings()).network.parameters())
    optimizer = torch.optim.AdamW(weights, foreach=True)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        with Ledger([*weights, *(weight.grad for weight in weights), *states]) as ledger:
            optimizer.step()
    assert ledger.most.total() == update_bytes([weight.shape for weight in weights], TrainingSettings(optimizer="adamw"))


# --- activations ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kept_by(network):
    """Bytes of all that is kept for backward while it is open, by place in memory; the network's weights are not."""
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield seen


@pytest.mark.parametrize("which,precision,again", [("tiny", "fp32", True), ("tiny", "bf16", False), ("small_xl", "bf16", True)])
def test_what_is_kept_without_contents_is_what_a_real_run_keeps(which, precision, again, request):
    pair, recipe = request.getfixturevalue(which), TrainingSettings(precision=precision)
    points = pair.points(recipe)

    def forward(student, teacher):
        answer = taught(teacher, points, inputs_of(teacher, **SIZES, micro_batch=2))
        with checkpointing(student) if again else contextlib.nullcontext(), tap(student, points.values()) as features:
            return student_loss(student, points, inputs_of(student, **SIZES, micro_batch=2), recipe, features, answer)

    student = ready(pair.student, recipe)
    with kept_by(student.network) as seen:
        loss = forward(student, pair.teacher)
    with without_contents(FakeTensorMode(allow_non_fake_inputs=True)):
        student, teacher = emptied(student), emptied(replace(pair.teacher, network=copy.deepcopy(pair.teacher.network)))
        with Ledger([*student.network.parameters(), *teacher.network.parameters()]) as ledger, ledger.keeping():
            loss = forward(student, teacher)  # noqa: F841  it holds what is kept
            kept = ledger.alive["kept activations"] + ledger.alive["half-precision weights"]
    # Without contents the norms of a CPU keep their means in the precision of what comes in, with contents in float32.
    assert kept == pytest.approx(sum(seen.values()), rel=0 if precision == "fp32" else 5e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "objective": "koala"},
        {"precision": "bf16", "objective": "laptop-diff"},
        {"precision": "bf16", "weight_dtype": "bf16"},
        {"precision": "bf16", "lora_rank": 4},
        {"precision": "bf16", "lora_rank": 4, "lora_dora": True},
        {"objective": "task", "accumulation_steps": 2, "batch_size": 16},
    ],
)
def test_a_real_step_needs_what_was_forecast(changes, tiny):
    told = tiny.forecast(**{"optimizer": "adafactor", "device": "cpu", "batch_size": 8, **changes})
    recipe, points = told.settings.training, tiny.points(told.settings.training)
    assert told.moment == "the student's forward and backward pass"
    resident = sum(dict(told.parts)[name] for name in ("teacher weights", "student weights", "optimizer"))

    if recipe.lora_rank:
        pytest.importorskip("peft")
    student, teacher, aim = ready(tiny.student, recipe), tiny.teacher, recipe.weighted_objective
    with contextlib.ExitStack() as stack:
        if recipe.gradient_checkpointing:
            stack.enter_context(checkpointing(student))
        features = stack.enter_context(tap(student, points.values()))
        ledger = stack.enter_context(Ledger([*student.network.parameters(), *teacher.network.parameters()]))
        for weight in student.network.parameters() if recipe.accumulation_steps > 1 else ():
            weight.grad = torch.zeros_like(weight)
        answer = taught(teacher, points, inputs_of(teacher, **SIZES, micro_batch=8)) if aim.uses_teacher else None
        loss = student_loss(student, points, inputs_of(student, **SIZES, micro_batch=8), recipe, features, answer)
        features.clear()
        del answer
        loss.backward()
    assert told.total_bytes - resident == pytest.approx(ledger.most.total(), rel=0.02)


class FusedOnCuda(TorchFunctionMode):
    """Attention as a GPU has it, which where there is none cannot be chosen."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        half = [tensor.bfloat16() for tensor in args]
        return torch.ops.aten._scaled_dot_product_efficient_attention(*half, None, True)[0]


@contextlib.contextmanager
def autocast_of_cuda():
    """``torch.autocast("cuda")``, which does nothing where there is no GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def test_autocast_keeps_what_cuda_keeps(tiny):
    def kept(device, precision, *contexts, prepare=lambda network: None):
        with without_contents(FakeTensorMode(allow_non_fake_inputs=True)), torch.device(device):
            student = emptied(ready(tiny.student, TrainingSettings()))
            prepare(student.network)
            inputs, recipe = inputs_of(student, **SIZES, micro_batch=2), TrainingSettings(objective="task", precision=precision)
            with Ledger(student.network.parameters()) as ledger, ledger.keeping():
                with contextlib.ExitStack() as stack:
                    for context in contexts:
                        stack.enter_context(context)
                    loss = student_loss(student, {}, inputs, recipe, {}, None)  # noqa: F841  it holds what is kept
                return ledger.alive["kept activations"] + ledger.alive["half-precision weights"]

    on_cuda = kept("cuda", "fp32", autocast_of_cuda(), FusedOnCuda())
    assert kept("cpu", "bf16", prepare=norms_as_on_cuda) == pytest.approx(on_cuda, rel=1e-3)
    assert kept("cpu", "bf16") < 0.95 * on_cuda


def test_attention_keeps_no_matrix_of_all_pairs(tiny):
    few, many = (tiny.parts(shape=(4, side, side), objective="task") for side in (64, 128))
    assert few["kept activations"] and many["kept activations"] < 4.1 * few["kept activations"]


# --- settings -------------------------------------------------------------------------------------------------------

BASE = settings_of(batch_size=8, optimizer="lion", teacher_mode="mixture")
LESS = {
    "accumulation_steps": (8, "kept activations"),
    "num_processes": (8, "kept activations"),
    "precision": ("bf16", "kept activations"),
    "weight_dtype": ("bf16", "student weights"),
    "teacher_dtype": ("fp16", "teacher weights"),
    "teacher_offloaded": (True, "teacher weights"),
    "optimizer": ("adafactor", "optimizer"),
    "gradient_checkpointing": (True, "kept activations"),
}
MORE = {
    "ema_decay": (0.9, "EMA"),
    "optimizer": ("prodigy", "optimizer"),
    "num_teachers": (2, "teacher weights"),
}


@pytest.mark.parametrize("name", LESS)
def test_a_setting_lowers_its_part_and_the_total(name, tiny):
    other, part = LESS[name]
    before, after = tiny.forecast(BASE), tiny.forecast(BASE, **{name: other})
    assert dict(after.parts)[part] < dict(before.parts)[part]
    assert after.total_bytes < before.total_bytes


@pytest.mark.parametrize("name", MORE)
def test_a_setting_raises_its_part_and_the_total(name, tiny):
    other, part = MORE[name]
    before, after = tiny.forecast(BASE), tiny.forecast(BASE, **{name: other})
    assert dict(after.parts)[part] > dict(before.parts)[part]
    assert after.total_bytes > before.total_bytes


def test_norms_keep_more_on_a_gpu(tiny):
    kept = {device: tiny.parts(BASE, precision="bf16", device=device)["kept activations"] for device in ("cpu", "cuda", "mps")}
    assert kept["cpu"] < kept["cuda"] == kept["mps"]


def test_of_teachers_in_sequence_one_is_there(tiny):
    one = tiny.forecast(BASE, teacher_mode="sequence")
    assert tiny.forecast(BASE, teacher_mode="sequence", num_teachers=3).parts == one.parts


def test_processes_hold_gradients_twice_and_shards_hold_parts(tiny):
    light = {"optimizer": "adamw", "gradient_checkpointing": True}  # so that the update is what needs the most
    alone = tiny.forecast(BASE, **light, batch_size=1)
    both, sharded = (tiny.forecast(BASE, **light, batch_size=2, num_processes=2, shards=shards) for shards in (False, True))
    assert alone.moment == both.moment == "the update of the weights"
    alone, both, sharded = (dict(told.parts) for told in (alone, both, sharded))
    assert both["gradients"] == 2 * alone["gradients"] and both["student weights"] == alone["student weights"]
    assert sharded["student weights"] == alone["student weights"] // 2 and sharded["optimizer"] == alone["optimizer"] // 2
    assert sharded["gradients"] < alone["gradients"]
    assert sharded["teacher weights"] == alone["teacher weights"]


def test_points_tokens_and_the_teacher_are_counted(tiny):
    def total(num_tokens=5, **changes):
        networks = {"teacher": tiny.teacher.architecture, "student": tiny.student.architecture, "plan": tiny.plan}
        settings = settings_of(BASE, **changes)
        return forecast(**networks, settings=settings, latent_shape=(4, 16, 16), num_tokens=num_tokens).total_bytes

    assert total(objective="task") < total(feature_weight=0.0) < total() < total(num_tokens=77)


def test_no_teacher_no_memory_for_it(tiny):
    parts = tiny.parts(BASE, objective="task", teacher_dtype="fp8", num_teachers=3)
    assert not any(parts[name] for name in PARTS if name.startswith("teacher"))


def test_a_student_of_the_teachers_shape_needs_no_plan(tiny):
    teacher = tiny.teacher.architecture
    parts = dict(forecast(teacher=teacher, student=teacher, plan=None, settings=BASE, **SIZES).parts)
    assert parts["student weights"] == parts["teacher weights"] == 4 * teacher.num_parameters


def test_a_weight_of_the_teacher_takes_as_many_bytes_as_its_dtype_says(tiny):
    counted = {dtype: tiny.parts(BASE, teacher_dtype=dtype)["teacher weights"] for dtype in DTYPES}
    assert counted["fp32"] == 2 * counted["bf16"] == 2 * counted["fp16"] == 4 * counted["fp8"] > 0


def test_weights_that_teacher_and_student_share_are_there_once(tiny):
    pytest.importorskip("peft")
    networks = {"teacher": tiny.teacher.architecture, "student": tiny.teacher.architecture, "plan": None}
    settings = settings_of(BASE, objective="guidance", guidance=3.0, lora_rank=4, teacher_dtype="fp16")
    apart, shared = (
        dict(forecast(**networks, settings=replace(settings, shares_base=shares), **SIZES).parts) for shares in (False, True)
    )
    count = tiny.teacher.architecture.num_parameters
    assert shared["teacher weights"] == 0 and apart["teacher weights"] == 2 * count
    assert shared["student weights"] == apart["student weights"] - 2 * count  # kept in float16, not float32
    assert shared["optimizer"] == apart["optimizer"] > 0


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_shared_base_that_computes_in_its_own_precision_is_not_copied(dtype, tiny):
    pytest.importorskip("peft")
    networks = {"teacher": tiny.teacher.architecture, "student": tiny.teacher.architecture, "plan": None}
    lora = {"objective": "guidance", "guidance": 3.0, "lora_rank": 4, "device": "cuda"}
    copies = {}
    for precision in ("fp16", "bf16"):
        settings = replace(settings_of(BASE, precision=precision, teacher_dtype=dtype, **lora), shares_base=True)
        parts = dict(forecast(**networks, settings=settings, **SIZES).parts)
        copies[precision == dtype] = parts["half-precision weights"]
    assert copies[False] > copies[True] + tiny.teacher.architecture.num_parameters


def test_a_guided_teacher_answers_twice_the_batch(tiny):
    def activations(batch_size, **changes):
        settings = settings_of(BASE, objective="guidance", batch_size=batch_size, **changes)
        step = memory._Step(tiny.teacher.architecture, tiny.student.architecture, tiny.plan, 5, settings.training)
        return step._in_teacher_pass(settings, SIZES["latent_shape"])["teacher activations"]

    assert activations(4, guidance=3.0) == pytest.approx(activations(8), rel=0.05)


def test_an_offloaded_teacher_is_there_for_its_own_pass_alone(tiny):
    whole, offloaded = tiny.parts(BASE), tiny.parts(BASE, teacher_offloaded=True)
    assert whole["teacher weights"] and offloaded == whole | {"teacher weights": 0}
    light = {"shape": (4, 4, 4), "optimizer": "adafactor", "weight_dtype": "bf16", "lora_rank": 1}
    pytest.importorskip("peft")
    told = tiny.forecast(**light, teacher_offloaded=True)
    assert told.moment == "the teacher's forward pass"
    two_layers = 2 * 4 * max(weight.numel() for weight in tiny.teacher.network.parameters())
    assert dict(told.parts)["teacher weights"] == two_layers and dict(told.parts)["teacher activations"]
    half, quarter = (tiny.parts(**light, teacher_offloaded=True, teacher_dtype=dtype) for dtype in ("fp16", "fp8"))
    assert 4 * quarter["teacher weights"] == 2 * half["teacher weights"] == two_layers
    widened = two_layers // 4  # a layer of eight bits computes in sixteen
    assert quarter["teacher activations"] == half["teacher activations"] + widened


def test_a_forecast_reads_as_a_table(tiny):
    told = tiny.forecast(BASE)
    assert tuple(part.name for part in told.parts) == PARTS
    title, *lines, total = told.describe().splitlines()
    assert told.moment in title
    assert [line.split("  ")[1] for line in lines] == [part.name for part in told.parts if part.num_bytes]
    assert total.split() == ["total", *gib(told.total_bytes).split()]


# --- what to change -------------------------------------------------------------------------------------------------

ORDER = ["gradient_checkpointing", "accumulation_steps", "precision bf16", "teacher in fp16", "teacher in fp8", "teacher offloaded",
         "optimizer adamw8bit", "optimizer adafactor", "weight_dtype bf16", "ema_decay 0", "smaller images"]  # fmt: skip


def named(lines):
    return [next(words for words in ORDER if line.startswith(words)) for line in lines if "is still needed" not in line]


def test_advice_ends_where_the_step_fits(tiny):
    told = tiny.forecast(BASE)
    assert told.advice(told.total_bytes) == []
    lines = told.advice(told.total_bytes - 1)
    assert named(lines) == ["gradient_checkpointing"]
    saved = told.total_bytes - tiny.forecast(BASE, gradient_checkpointing=True).total_bytes
    assert lines[0].endswith(f"saves {gib(saved)}")


def test_where_the_update_alone_is_too_much_nothing_else_is_looked_at(tiny):
    told = tiny.forecast(BASE)
    update = told.again(BASE, told.latent_shape, enough=0)
    assert update.moment == "the update of the weights" != told.moment and update.total_bytes < told.total_bytes
    assert told.again(BASE, told.latent_shape, enough=update.total_bytes) == told


def test_a_reserve_is_left(tiny):
    told = tiny.forecast(BASE)
    enough = math.ceil(told.total_bytes / (1 - RESERVE))
    assert told.describe_shortage(None) == told.describe_shortage(enough + 1) == ""
    first, *lines = told.describe_shortage(enough - 2).splitlines()
    assert gib(told.total_bytes) in first and named([line.strip() for line in lines]) == ["gradient_checkpointing"]


def made_up(settings, shape=(4, 64, 64), enough=math.inf):
    """A forecast in which every setting costs a little, whatever the others are."""
    recipe = settings.training
    cost = {
        "kept activations": settings.micro_batch * shape[1] * (30 if recipe.compute_dtype == "fp32" else 20),
        "working memory": 0 if recipe.gradient_checkpointing else 2000,
        "teacher weights": 0 if settings.teacher_offloaded else 1000 * DTYPES[settings.teacher_dtype].itemsize,
        "optimizer": 10 * STATE_BYTES[recipe.optimizer](torch.Size([16, 1024])) // 1024,
        "student weights": 1000 * DTYPES[recipe.weight_dtype].itemsize,
        "EMA": 4000 * bool(recipe.ema_decay),
    }
    parts = tuple(Part(*part) for part in cost.items())
    return Forecast(moment="", parts=parts, settings=settings, latent_shape=shape, again=made_up)


EVERYTHING = settings_of(batch_size=6, ema_decay=0.9)


def test_advice_names_what_helps_the_least_harmful_first():
    told = made_up(EVERYTHING)
    lines = told.advice(0)
    accumulated = ["accumulation_steps"] * 2  # six at once, then three, then one
    assert named(lines) == [
        ORDER[0],
        *accumulated,
        *ORDER[2:],
        *["smaller images"] * (named(lines).count("smaller images") - 1),
    ]
    assert "accumulation_steps 2 (3 examples at once" in lines[1] and "accumulation_steps 6 (1 example at once" in lines[2]
    assert "384 x 384 px instead of 512 x 512 px" in lines[-3] and "is still needed" in lines[-1]
    for free in range(told.total_bytes, 0, -100):  # less memory, more of the same
        some = told.advice(free)
        assert some == lines or some == lines[: len(some)]


def test_advice_leaves_teachers_to_others():
    named_without = named(made_up(EVERYTHING).advice(0, of_teacher=False))
    assert named_without and not any(words.startswith("teacher") for words in named_without)


IN_USE = {"gradient_checkpointing": (True, False), "precision": ("bf16", "fp32"), "teacher_dtype": ("fp8", "fp32"),
          "teacher_offloaded": (True, False), "optimizer": ("adafactor", "lion"), "weight_dtype": ("bf16", "fp32")}  # fmt: skip


def test_nothing_is_named_that_is_in_use():
    in_use = settings_of(**{name: used for name, (used, _) in IN_USE.items()})
    assert [change.what for change in changes(in_use)] == ["smaller images"]
    for name, (_, unused) in IN_USE.items():
        without = settings_of(in_use, **{name: unused})
        words = [change.what for change in changes(without)][:-1]
        # bfloat16 weights compute in bfloat16 whatever the precision says.
        assert bool(words) == (name != "precision")
        assert all(name.split("_")[0] in word.replace("teacher in", "teacher_dtype") for word in words)


def test_every_change_is_a_recipe_that_can_be_run():
    for optimizer in OPTIMIZERS:
        for change in changes(now := settings_of(EVERYTHING, optimizer=optimizer)):
            assert change.smaller or change.settings != now
    prodigy = [change.what for change in changes(settings_of(optimizer="prodigy"))]
    assert "weight_dtype bf16" not in prodigy and "optimizer adamw8bit" in prodigy
    assert "weight_dtype bf16" in [change.what for change in changes(settings_of(optimizer="prodigy", lora_rank=4))]
    sharded = {change.what.split()[0] for change in changes(settings_of(num_processes=2, batch_size=2, shards=True))}
    assert not sharded & {"optimizer", "weight_dtype"}
    for held in ({"device": "cpu"}, {"teacher_dtype": "nf4"}, {"teacher_dtype": "int8"}):
        assert "teacher offloaded" not in [change.what for change in changes(settings_of(**held))]


def test_the_free_memory_of_a_device(monkeypatch):
    assert free_bytes(torch.device("cpu")) > 0
    monkeypatch.setattr(memory, "find_spec", lambda name: None)  # where psutil is not installed
    assert free_bytes(torch.device("cpu")) is None
    assert free_bytes(torch.device("meta")) is None


# --- at real size ---------------------------------------------------------------------------------------------------

FITS = {
    ("sdxl", "ssd-1b", 24): settings_of(precision="bf16", teacher_dtype="fp16", optimizer="adamw8bit"),
    ("sd1", "bk-sdm-small", 8): settings_of(batch_size=2, precision="bf16", teacher_dtype="fp16", optimizer="adamw8bit"),
}


@pytest.mark.parametrize("family,plan,memory_gib", FITS)
def test_it_fits(family, plan, memory_gib, published):
    settings, teacher, plan = FITS[family, plan, memory_gib], published[family], preset(plan)
    told = forecast(
        teacher=teacher,
        student=pruned(teacher, name_map(teacher, plan)),
        plan=plan,
        latent_shape=LATENT_SHAPES[family],
        num_tokens=NUM_TOKENS,
        settings=settings,
    )
    assert 0.5 * memory_gib * GIB < told.total_bytes < (1 - RESERVE) * memory_gib * GIB
    plain = settings_of(settings, optimizer="adamw", precision="fp32", teacher_dtype="fp32")
    assert told.again(plain, told.latent_shape, enough=memory_gib * GIB).total_bytes > memory_gib * GIB


def test_few_steps_need_what_guidance_needs_and_one_more_lora(tiny):
    layers = pytest.importorskip("distill_core.lora.layers")
    networks = {"teacher": tiny.teacher.architecture, "student": tiny.teacher.architecture, "plan": None}
    lora = {"guidance": 3.0, "lora_rank": 4, "lora_targets": ("*",)}
    of_guidance, of_few = (
        dict(
            forecast(
                **networks, settings=replace(settings_of(BASE, objective=objective, **lora), shares_base=True), **SIZES
            ).parts
        )
        for objective in ("guidance", "consistency")
    )
    one_more = 4 * sum(shape.numel() for shape in layers.trained_shapes(tiny.teacher, 4, ("*",)))
    assert of_few == of_guidance | {"EMA": one_more} and of_guidance["EMA"] == 0 < one_more


def test_dmd_needs_a_second_lora_that_is_trained_too(tiny):
    layers = pytest.importorskip("distill_core.lora.layers")
    told = tiny.forecast(objective="dmd", lora_rank=4, lora_targets=("*",), consistency_steps=0)
    shapes = layers.trained_shapes(tiny.student, 4, ("*",))
    assert dict(told.parts)["fake score"] == sum(4 * shape.numel() + STATE_BYTES["adamw"](shape) for shape in shapes)
    assert dict(told.parts)["EMA"] == 0
    begins = tiny.forecast(told.settings, objective="dmd", consistency_steps=10)
    assert dict(begins.parts)["EMA"] == 4 * sum(shape.numel() for shape in shapes)


def test_the_student_waits_while_both_scores_see_what_it_drew(tiny):
    pytest.importorskip("peft")
    asked = {
        "objective": "dmd",
        "guidance": 3.0,
        "lora_rank": 4,
        "batch_size": 8,
        "device": "cpu",
        "gradient_checkpointing": True,
    }
    told = tiny.forecast(**asked)
    assert told.moment == "the comparison of a sample by both scores"
    student, recipe = ready(tiny.student, told.settings.training), told.settings.training
    inputs = inputs_of(student, **SIZES, micro_batch=8)
    with checkpointing(student), Ledger([*student.network.parameters(), *tiny.teacher.network.parameters()]) as ledger:
        loss = student_loss(student, {}, inputs, recipe, {}, None)
        taught(tiny.teacher, {}, inputs, guided=True)
        seen = ledger.most.total()
        del loss
    resident = sum(dict(told.parts)[name] for name in ("teacher weights", "student weights", "optimizer", "fake score"))
    assert told.total_bytes - resident == pytest.approx(seen, rel=0.02)
