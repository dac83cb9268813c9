"""A student that learns the guided answer in one pass, on the weights of its teacher."""

import copy

import pytest
import torch

from distill_core.dataset import draw
from distill_core.guidance import combined
from distill_core.recipe import Recipe
from distill_core.run import Run
from distill_core.train import distill

from .test_adapter import copied

pytest.importorskip("peft")
from distill_core.adapter import answering_with  # noqa: E402

RECIPE = Recipe(objective="guidance", guidance=3.0, caption_dropout=0.0, total_steps=6, batch_size=4, learning_rate=1e-2,
                lora_rank=4, save_every_steps=100)  # fmt: skip


def train(folder, base, data, recipe=RECIPE, teacher=None):
    """Train a LoRA on a network that is its own teacher."""
    run = Run(folder, recipe, {})
    distill(run, student=base, teacher=teacher or answering_with(base, None), plan=None, dataset=data)
    return run


def test_the_student_learns_the_guided_answer(small_teacher, small_data, tmp_path):
    base = copied(small_teacher)
    first = train(tmp_path / "run", base, small_data).metrics()[0]
    batch = draw(small_data, 0, base.schedule, RECIPE.drawing)
    with torch.no_grad():
        conditional = small_teacher(batch.x_t, batch.t, batch.context)
        unconditional = small_teacher(batch.x_t, batch.t, small_data.null.context.expand_as(batch.context))
    target = combined(conditional, unconditional, 3.0)
    assert first["total"] == first["output"] == pytest.approx((conditional - target).square().mean().item(), rel=1e-4)


def test_the_teacher_is_the_base_before_while_and_after_it_trains(small_teacher, small_data, tmp_path, batch):
    base = copied(small_teacher)
    teacher, answers = answering_with(base, None), []

    class Listening(type(teacher)):
        def __call__(self, *inputs):
            answers.append(super().__call__(*inputs))
            return answers[-1]

    listening = Listening(**{**vars(teacher)})
    weights = copy.deepcopy(base.network.state_dict())
    with torch.no_grad():
        before = small_teacher(*batch)
        assert torch.equal(teacher(*batch), before)
    metrics = train(tmp_path / "run", base, small_data, teacher=listening).metrics()
    with torch.no_grad():
        drawn = [draw(small_data, step, base.schedule, RECIPE.drawing) for step in range(RECIPE.total_steps)]
        for answer, (_, _, x_t, t, context, _) in zip(answers, drawn, strict=True):
            null = small_data.null.context.expand_as(context)
            assert torch.equal(answer, small_teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([context, null])))
        assert torch.equal(teacher(*batch), before) and not torch.allclose(base(*batch), before, atol=1e-3)
    assert metrics[-1]["total"] < metrics[0]["total"]
    now = {name.replace(".base_layer", ""): weight for name, weight in base.network.state_dict().items() if ".lora_" not in name}
    assert now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in weights)


def test_no_weight_is_there_twice(small_teacher, small_data, tmp_path):
    base = copied(small_teacher)
    count = sum(parameter.numel() for parameter in base.network.parameters())
    teacher = answering_with(base, None)
    train(tmp_path / "run", base, small_data, teacher=teacher)
    held = {id(p): p.numel() for denoiser in (base, teacher) for n, p in denoiser.network.named_parameters() if ".lora_" not in n}
    assert sum(held.values()) == count


def test_guidance_without_an_empty_caption_is_refused(small_teacher, small_data, tmp_path):
    data = type(small_data)(small_data.buckets, None)
    with pytest.raises(ValueError, match="connect null_caption"):
        train(tmp_path / "run", copied(small_teacher), data)


def test_guidance_and_features_do_not_go_together():
    with pytest.raises(ValueError, match="take objective guidance"):
        Recipe(objective="bk-sdm", guidance=2.0)
