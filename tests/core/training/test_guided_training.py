"""A student that learns the guided answer in one pass, on the weights of its teacher."""

import copy
from dataclasses import replace

import pytest
import torch

from distill_core.base.storage import read_header
from distill_core.data.dataset import draw
from distill_core.diffusion.guidance import combined
from distill_core.diffusion.schedule import scaled_linear
from distill_core.networks.model_sampling import ModelSampling
from distill_core.pruning.plan import preset
from distill_core.training.checkpoints import checkpoints_in
from distill_core.training.loop import distill
from distill_core.training.processes import ALONE
from distill_core.training.run import Run
from distill_core.training.settings import TrainingSettings
from distill_core.training.teachers import Teachers
from distill_core.training.trainer import Trainer

from ...students import student_of
from ..lora.test_layers import copied, filled

pytest.importorskip("peft")
from distill_core.lora.layers import Lora, WithoutLora, attach  # noqa: E402

pytestmark = pytest.mark.slow

RECIPE = TrainingSettings(objective="guidance", guidance=3.0, caption_dropout=0.0, total_steps=6, batch_size=4, learning_rate=1e-2,
                lora_rank=4, save_every_steps=100)  # fmt: skip


def train(folder, base, data, recipe=RECIPE, teacher=None):
    """Train a LoRA on a network that is its own teacher."""
    run = Run(folder, recipe)
    distill(run, student=base, teacher=teacher or WithoutLora(base), plan=None, dataset=data)
    return run


def test_the_student_learns_the_guided_answer(small_teacher, small_data, tmp_path):
    base = copied(small_teacher)
    first = train(tmp_path / "run", base, small_data).metrics()[0]
    batch = draw(small_data, 0, base.schedule, RECIPE.batching)
    with torch.no_grad():
        conditional = small_teacher(batch.x_t, batch.t, batch.context)
        unconditional = small_teacher(batch.x_t, batch.t, small_data.null.context.expand_as(batch.context))
    target = combined(conditional, unconditional, 3.0)
    assert first["total"] == first["output"] == pytest.approx((conditional - target).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_teacher_is_the_base_before_while_and_after_it_trains(dora, small_teacher, small_data, tmp_path, batch):
    base = copied(small_teacher)
    teacher, answers = WithoutLora(base), []

    class Listening(type(teacher)):
        def __call__(self, *inputs):
            answers.append(super().__call__(*inputs))
            return answers[-1]

    listening = Listening(base)
    weights = copy.deepcopy(base.network.state_dict())
    with torch.no_grad():
        before = small_teacher(*batch)
        assert torch.equal(teacher(*batch), before)
    metrics = train(tmp_path / "run", base, small_data, replace(RECIPE, lora_dora=dora), listening).metrics()
    with torch.no_grad():
        drawn = [draw(small_data, step, base.schedule, RECIPE.batching) for step in range(RECIPE.total_steps)]
        for answer, (_, _, x_t, t, context, *_) in zip(answers, drawn, strict=True):
            null = small_data.null.context.expand_as(context)
            assert torch.equal(answer, small_teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([context, null])))
        assert torch.equal(teacher(*batch), before) and not torch.allclose(base(*batch), before, atol=1e-3)
    assert metrics[-1]["total"] < metrics[0]["total"]
    own = {
        name: weight
        for name, weight in base.network.state_dict().items()
        if not {"lora_A", "lora_B", "dora_scale"} & {*name.split(".")}
    }
    now = {name.replace(".base_layer", ""): weight for name, weight in own.items()}
    assert now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in weights)


def test_no_weight_is_there_twice(small_teacher, small_data, tmp_path):
    base = copied(small_teacher)
    count = sum(parameter.numel() for parameter in base.network.parameters())
    teacher = WithoutLora(base)
    train(tmp_path / "run", base, small_data, teacher=teacher)
    held = {id(p): p.numel() for denoiser in (base, teacher) for n, p in denoiser.network.named_parameters() if ".lora_" not in n}
    assert sum(held.values()) == count


def test_guidance_without_an_empty_caption_is_refused(small_teacher, small_data, tmp_path):
    data = type(small_data)(small_data.buckets, None)
    with pytest.raises(ValueError, match="connect null_caption"):
        train(tmp_path / "run", copied(small_teacher), data)


def test_guidance_and_features_do_not_go_together():
    with pytest.raises(ValueError, match='use objective "guidance"'):
        TrainingSettings(objective="bk-sdm", guidance=2.0)


def test_a_dora_goes_on_as_if_it_had_not_been_left(small_teacher, small_data, tmp_path):
    recipe, files = replace(RECIPE, lora_dora=True), []
    for name, parts in {"whole": [6], "parts": [2, 4]}.items():
        for num_steps in parts:
            base = copied(small_teacher)
            run = Run(tmp_path / name, recipe)
            distill(run, student=base, teacher=WithoutLora(base), plan=None, dataset=small_data, num_steps=num_steps)
        files.append({key: tensor.read() for key, tensor in read_header(run.result_file).tensors.items()})
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    begun = Lora(copied(small_teacher), rank=4, dora=True).parameters()
    names = small_teacher.lora_names
    moved = [
        name
        for name, m in begun.items()
        if name.endswith("dora_scale") and not torch.equal(m, files[0][f"{names[name.removesuffix('.dora_scale')]}.dora_scale"])
    ]
    assert len(moved) == len(begun) // 3  # it has learnt lengths


@pytest.mark.parametrize(
    "changes,message", [({"lora_rank": 0}, "set lora_rank above 0"), ({"guidance_min": 1.0}, "does not scale linearly")]
)
def test_what_does_not_go_with_a_dora_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, lora_dora=True, **changes)


RANGE = replace(RECIPE, guidance_min=1.0)


def test_each_example_has_a_scale_of_its_own(small_data):
    batchings = [recipe.batching for recipe in (RECIPE, RANGE)]
    fixed, ranged = (draw(small_data, 3, scaled_linear(), batching) for batching in batchings)
    assert fixed.scale is None and all(torch.equal(a, b) for a, b in zip(fixed[:5], ranged[:5], strict=True))
    assert torch.equal(ranged.scale, draw(small_data, 3, scaled_linear(), batchings[1]).scale)
    assert torch.equal(ranged.part(slice(1, 3)).scale, ranged.scale[1:3])
    many = torch.cat([draw(small_data, step, scaled_linear(), batchings[1]).scale for step in range(300)])
    assert 1 <= many.min() < 1.05 and 2.95 < many.max() <= 3 and many.mean() == pytest.approx(2, abs=0.1)


def test_an_example_has_the_lora_at_its_strength(small_teacher, batch):
    with_lora = copied(small_teacher)
    lora = Lora(with_lora, rank=3, targets=["*"])
    matrices = {name: matrix.clone() for name, matrix in filled(lora).items()}
    strengths = torch.linspace(0, 1, len(batch[0]))
    with torch.no_grad():
        lora.strengths = strengths
        each = with_lora(*batch)
        lora.strengths = None
        for i, strength in enumerate(strengths):
            for name, parameter in lora.parameters().items():
                parameter.copy_(matrices[name] * (strength if name.endswith("lora_up") else 1))
            assert torch.allclose(with_lora(*batch)[i], each[i], atol=1e-5)
    assert not torch.allclose(each[0], each[1])


def test_a_range_of_scales_is_learnt_at_the_strength_of_each(small_teacher, small_data, tmp_path):
    """At a strength of 0 the LoRA is not there, and nothing is to learn; the first step tells what is at each scale."""
    first = train(tmp_path / "run", copied(small_teacher), small_data, RANGE).metrics()[0]
    batch = draw(small_data, 0, small_teacher.schedule, RANGE.batching)
    with torch.no_grad():
        conditional = small_teacher(batch.x_t, batch.t, batch.context)
        unconditional = small_teacher(batch.x_t, batch.t, small_data.null.context.expand_as(batch.context))
    target = combined(conditional, unconditional, batch.scale)
    assert first["total"] == pytest.approx((conditional - target).square().mean().item(), rel=1e-4)


def with_states(data, scales=None):
    """The same with states, drawn with some scales."""
    (bucket,) = data.buckets
    states = torch.randn(len(bucket.latents), 2, *bucket.latents.shape[1:], generator=torch.Generator().manual_seed(1))
    bucket = replace(bucket, states=states, scales=scales)
    return type(data)([bucket], data.null, torch.tensor([999, 499]))


SPREAD = torch.linspace(1, 3, 12)


def test_a_range_is_learnt_on_the_states_each_scale_leads_through(small_teacher, small_data, tmp_path):
    """The target, the strength of the LoRA and the state have one scale."""
    data = with_states(small_data, SPREAD)
    first = train(tmp_path / "run", copied(small_teacher), data, RANGE).metrics()[0]
    batch = draw(data, 0, small_teacher.schedule, RANGE.batching)
    (bucket,) = data.buckets
    for x0, scale in zip(batch.x0, batch.scale, strict=True):
        (number,) = (bucket.latents == x0).all((1, 2, 3)).nonzero()[0].tolist()
        assert scale == SPREAD[number]
    with torch.no_grad():
        conditional = small_teacher(batch.x_t, batch.t, batch.context)
        unconditional = small_teacher(batch.x_t, batch.t, small_data.null.context.expand_as(batch.context))
    target = combined(conditional, unconditional, batch.scale)
    assert first["total"] == pytest.approx((conditional - target).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    "recipe,scales,message",
    [(RANGE, None, "one unknown guidance, but this run learns guidance 1 to 3"), (RANGE, torch.full((12,), 3.0), "guidance 3, but"),
     (RANGE, SPREAD + 1, "guidance 2 to 4, but this run learns guidance 1 to 3"), (RECIPE, torch.full((12,), 7.5), "guidance 7.5, but this run learns guidance 3;"),
     (RECIPE, SPREAD, "guidance 1 to 3, but this run learns guidance 3;")],
)  # fmt: skip
def test_trajectories_of_another_guidance_are_refused(recipe, scales, message, small_teacher, small_data, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", copied(small_teacher), with_states(small_data, scales), recipe)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "changes,scales", [({}, None), ({}, torch.full((12,), 3.0)), ({"guidance": 1.0, "task_weight": 1.0}, SPREAD)]
)
def test_trajectories_of_the_same_guidance_are_trained_on(changes, scales, small_teacher, small_data, tmp_path):
    assert train(tmp_path / "run", copied(small_teacher), with_states(small_data, scales), replace(RECIPE, **changes)).complete


def test_data_of_one_scale_are_the_data_they_were(small_data):
    plain, one, spread = (with_states(small_data, scales).fingerprint for scales in (None, torch.full((12,), 3.0), SPREAD))
    assert plain == one != spread


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"accumulation_steps": 2}], ids=str)
def test_a_range_of_scales_is_learnt_the_same_with_less_memory(changes, small_teacher, small_data, tmp_path):
    slow = replace(RANGE, learning_rate=1e-5)  # Adam makes much of how gradients near zero are rounded
    runs = [train(tmp_path / name, copied(small_teacher), small_data, replace(slow, **more)) for name, more in
            {"plain": {}, "less": changes}.items()]  # fmt: skip
    plain, less = ([row["total"] for row in run.metrics()] for run in runs)
    assert less == pytest.approx(plain, rel=1e-2) and plain[0] != plain[-1]


def test_what_is_given_out_is_judged_at_full_strength(small_teacher, small_data, tmp_path):
    base, seen = copied(small_teacher), []

    class Previews:
        latest = None

        def draw(self, folder, step, student, teacher, training, **options):
            with torch.no_grad():
                seen.append(student(*asked))

    recipe = replace(RANGE, sample_every_steps=RANGE.total_steps)
    run = Run(tmp_path / "run", recipe)
    batch = draw(small_data, 0, base.schedule, RANGE.batching)
    asked = batch.x_t[:3], batch.t[:3], batch.context[:3]
    distill(run, student=base, teacher=WithoutLora(base), plan=None, dataset=small_data, previews=Previews())
    loaded = copied(small_teacher)
    attach(loaded, run.result_file, "x")
    with torch.no_grad():
        assert torch.allclose(seen[0], loaded(*asked), atol=1e-6)
        assert torch.equal(base(*asked), seen[0])  # and so it is left behind


def test_the_file_tells_what_it_was_made_for(small_teacher, small_data, tmp_path):
    told = read_header(train(tmp_path / "run", copied(small_teacher), small_data, RANGE).result_file).metadata
    assert {"distill.guidance": "3.0", "distill.guidance_min": "1.0", "distill.step": "6"}.items() <= told.items()


def test_gradients_that_pass_through_float16_are_scaled(small_teacher, small_data, tmp_path):
    """They would vanish: at SD1.5's size more than half of them."""
    for dtype, precision in ((torch.float32, "fp32"), (torch.float16, "fp32"), (torch.bfloat16, "fp32"), (torch.float32, "fp16")):
        base = copied(small_teacher)
        base.network.to(dtype)
        recipe = replace(RECIPE, precision=precision)
        training = Trainer(
            Run(tmp_path / f"{dtype} {precision}", recipe), base, Teachers.single(base, recipe), None, small_data, ALONE
        )
        assert training.in_fp16 == (torch.float16 in (dtype, {"fp16": torch.float16}.get(precision)))


def test_a_model_has_nothing_to_learn_of_itself(small_teacher, small_data, tmp_path):
    """Neither of a copy, nor of itself without its LoRA; nor a full model of one that was pruned."""
    whole = {"guidance": 1.0, "lora_rank": 0}
    nothing = [whole, {"guidance": 1.0}, whole | {"objective": "bk-sdm"}, whole | {"objective": "koala", "task_weight": 0.0}]
    for number, changes in enumerate(nothing):
        base = copied(small_teacher)
        teacher = copied(small_teacher) if "lora_rank" in changes else None
        with pytest.raises(ValueError, match="the same model, so there is nothing to learn"):
            train(tmp_path / str(number), base, small_data, replace(RECIPE, **changes), teacher)
        assert not checkpoints_in(tmp_path / str(number))
    pruned = student_of(small_teacher, preset("bk-sdm-base"))
    with pytest.raises(ValueError, match="they are swapped, as the student has .* give the full model as teacher"):
        train(tmp_path / "swapped", copied(small_teacher), small_data, RECIPE, pruned)


@pytest.mark.parametrize(
    "changes",
    [{"objective": "task", "guidance": 1.0, "lora_rank": 0}, {"guidance": 3.0, "lora_rank": 0}, {"guidance": 1.0, "task_weight": 1.0},
     {"objective": "bk-sdm", "guidance": 1.0, "lora_rank": 0, "timestep_range": (0, 500)}],
    ids=str,
)  # fmt: skip
def test_a_model_learns_the_data_or_guidance_of_itself(changes, small_teacher, small_data, tmp_path):
    recipe = replace(RECIPE, total_steps=1, **changes)
    assert train(tmp_path / "run", copied(small_teacher), small_data, recipe, copied(small_teacher)).complete


@pytest.mark.parametrize("what", ["weights", "prediction", "second teacher"])
def test_a_teacher_of_the_same_shape_is_learnt_from(what, small_teacher, small_data, tmp_path):
    teacher, recipe = copied(small_teacher), replace(RECIPE, total_steps=1, guidance=1.0, lora_rank=0)
    if what == "weights":
        with torch.no_grad():
            next(teacher.network.parameters()).add_(0.1)
    teacher = replace(teacher, sampling=ModelSampling(prediction="v")) if what == "prediction" else teacher
    if what == "second teacher":
        teacher = Teachers([lambda: copied(small_teacher)] * 2, recipe)
    assert train(tmp_path / "run", copied(small_teacher), small_data, recipe, teacher).complete
