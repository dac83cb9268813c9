"""A student that learns from what it draws: values, slopes and copies against a plain computation from the papers."""

import copy
from dataclasses import replace

import pytest
import torch

from distill_core.base.seeding import generator
from distill_core.base.storage import read_header
from distill_core.data.dataset import draw
from distill_core.demo.teacher import load_dataset, load_denoiser, teacher_file
from distill_core.diffusion.sampling import timesteps
from distill_core.training.checkpoints import TRAINING, checkpoints_in
from distill_core.training.dmd import FAKE_RATE, drawn
from distill_core.training.loop import OutOfMemory, distill
from distill_core.training.losses import matching_loss
from distill_core.training.objective import OBJECTIVES
from distill_core.training.run import Run
from distill_core.training.settings import TrainingSettings
from distill_core.training.trainer import Trainer

from ...students import student_of
from ..lora.test_layers import copied
from .runs import PLAN
from .test_consistency import opened, predicting, replace_of, weights_of

pytest.importorskip("peft")
from distill_core.lora.layers import WithoutLora  # noqa: E402

RECIPE = TrainingSettings(objective="dmd", guidance=3.0, caption_dropout=0.0, total_steps=8, batch_size=8, learning_rate=1e-2, phases=4,
                fake_updates=2, fake_warmup_steps=1, anchor_steps=3, lora_rank=4, save_every_steps=100)  # fmt: skip


@pytest.fixture(scope="module")
def demo():
    """A network that has learnt: the slopes of random ones at their own drawings turn with the last digits."""
    return load_denoiser(teacher_file())


# --- losses


def test_a_drawing_moves_to_where_the_real_score_sees_it_whatever_its_size():
    drawing, real, fake = (torch.randn(3, 4, 8, 8, dtype=torch.float64) for _ in range(3))
    drawing = (drawing * torch.tensor([0.1, 1.0, 10.0]).reshape(-1, 1, 1, 1)).float().requires_grad_()
    matching_loss(drawing, real, fake).sum().backward()
    for x, slope, to, away in zip(drawing.detach(), drawing.grad, real, fake, strict=True):
        expected = (away - to) / (x - to).abs().mean() / x.numel()
        torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=1e-7)


def numbers(prediction, t):
    """alpha and sigma of a timestep."""
    if prediction == "flow":
        return 1 - (t + 1) / (1000 + 1e-3), (t + 1) / (1000 + 1e-3)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    power = (1 - betas).cumprod(0)[t].item() if t >= 0 else 1.0
    return power**0.5, (1 - power) ** 0.5


def both(prediction, output, x, t):
    """x0 and eps of a prediction."""
    alpha, sigma = numbers(prediction, t)
    if prediction == "eps":
        return (x - sigma * output) / alpha, output
    if prediction == "v":
        return alpha * x - sigma * output, sigma * x + alpha * output
    return x - sigma * output, x + alpha * output


def plainly(teacher, student, fake, prediction, null, batch, draws, recipe):
    """The student's loss as the papers have it, an example at a time: numbers in place of tables and masks."""

    def stepped(network, x, t, end, context, scale=1.0):
        output = network(x, torch.tensor([t]), context)
        if scale != 1:
            output = (1 - scale) * network(x, torch.tensor([t]), null[None]) + scale * output
        x0, eps = both(prediction, output, x, t)
        alpha, sigma = numbers(prediction, end)
        return alpha * x0 + sigma * eps

    steps, losses = recipe.phases, []
    grid = [1000 * i // steps - 1 for i in range(steps, -1, -1)]
    for i in range(len(draws.t)):
        x, context, number = draws.noise[i : i + 1].double(), batch.context[i : i + 1].double(), int(draws.sampling_step[i])
        least = recipe.guidance if recipe.guidance_min is None else recipe.guidance_min
        w = least + (recipe.guidance - least) * draws.share[i].item()
        with torch.no_grad():
            z = x
            for now, end in zip(grid[:number], grid[1 : number + 1], strict=True):
                x = stepped(student, x, now, end, context)
        anchored = recipe.diversity_weight != 0
        if number == 0 and anchored:
            path = [round(1000 - k * 1000 / (2 * recipe.anchor_steps)) - 1 for k in range(recipe.anchor_steps + 1)]
            with torch.no_grad():
                for now, end in zip(path[:-1], path[1:], strict=True):
                    z = stepped(teacher, z, now, end, context, w)
            (a, s), (a_end, s_end) = numbers(prediction, 999), numbers(prediction, path[-1])
            wrong = (stepped(student, x, 999, path[-1], context) - z) / (s * a_end - a * s_end)
            # every example that trains this role stands for as many as there are steps
            losses.append(steps * OBJECTIVES["dmd"].diversity * (wrong**2).mean())
            continue
        drawing = both(prediction, student(x, torch.tensor([grid[number]]), context), x, grid[number])[0]
        t, eps = int(draws.t[i]), draws.eps[i : i + 1].double()
        alpha, sigma = numbers(prediction, t)
        with torch.no_grad():
            x_t = alpha * drawing + sigma * eps
            conditional = teacher(x_t, torch.tensor([t]), context)
            guided = conditional if w == 1 else (1 - w) * teacher(x_t, torch.tensor([t]), null[None]) + w * conditional
            real = both(prediction, guided, x_t, t)[0]
            seen = both(prediction, fake(x_t, torch.tensor([t]), context), x_t, t)[0]
            slope = (seen - real) / (drawing - real).abs().mean()
        share = steps / (steps - 1) if anchored else 1
        losses.append(share * 0.5 * ((drawing - (drawing - slope).detach()) ** 2).mean())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("prediction", "phases", "guidance", "weight"),
    [
        ("eps", 4, (3.0, None), None),
        ("v", 2, (1.0, None), None),
        ("v", 4, (5.0, 2.0), None),
        ("flow", 4, (3.0, None), None),
        ("flow", 2, (5.0, 2.0), 0.0),
    ],
)
def test_the_loss_and_its_slope_are_those_of_the_papers(prediction, phases, guidance, weight, demo, tmp_path):
    data = load_dataset(24)
    scale, least = guidance
    base, alone = (predicting(prediction, copied(demo)) for _ in range(2))
    for denoiser in (base, alone):
        denoiser.network.double()  # as the plain computation
    recipe = replace(RECIPE, phases=phases, guidance=scale, guidance_min=least, diversity_weight=weight)
    training = opened(base, data, recipe, tmp_path / "run")
    with training.open():
        for step in range(3):
            training.step(step)
        batch = draw(data, 3, base.schedule, recipe.batching)
        draws = drawn(batch.x0.shape, base.schedule, phases=phases, first=0, seed=7, batch=1, purpose="test")
        draws.t[-2:] = torch.tensor([0, 999])
        assert set(draws.sampling_step.tolist()) == set(range(phases))
        terms, total = training.losses(batch, 3, training.objective, draws)
        slopes = torch.autograd.grad(total.mean(), list(training.parameters.values()))
        fake = copy.deepcopy(base)
        for name, parameter in replace_of(training, fake).items():
            parameter.data = training.fake.parameters[name].detach().clone()
        assert any(not torch.equal(weight, training.fake.parameters[name]) for name, weight in weights_of(training).items())
        null = data.null.context.double()
        expected = plainly(alone, base, fake, prediction, null, batch, draws, recipe)
        wanted = torch.autograd.grad(expected.mean(), list(training.parameters.values()))
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-7)
    ours, theirs = (torch.cat([slope.flatten().double() for slope in each]) for each in (slopes, wanted))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    judged = draws.sampling_step > 0 if weight is None else torch.ones(len(draws.t), dtype=torch.bool)
    assert bool((terms["cosine_distance"] >= -1e-6).all()) and torch.equal(terms["cosine_distance"] != 0, judged)


def test_the_fake_score_learns_to_denoise_what_the_student_samples(demo, tmp_path):
    """An update by plain SGD goes down the slope of its denoising loss of the student's samples."""
    recipe, data = replace(RECIPE, fake_updates=1, max_grad_norm=1e9), load_dataset(24)
    base = copied(demo)
    training = opened(base, data, recipe, tmp_path / "run")
    with training.open():
        for step in range(3):
            training.step(step)
        before = {name: weight.detach().clone() for name, weight in training.fake.parameters.items()}
        training.fake.learner.optimizer.parts = [torch.optim.SGD(training.fake.parameters.values(), lr=0.0)]
        own = weights_of(training)
        assert not any(torch.equal(weight, before[name]) or torch.equal(weight, 0 * weight) for name, weight in own.items())
        training.learning_rate = lambda step: 500.0  # so large that float32 tells differences
        found = training._fake_step(3)
        assert all(torch.equal(weight, own[name]) for name, weight in weights_of(training).items())  # only the fake score learns
        seeded = recipe.batching._replace(seed=generator(recipe.seed, 0, "fake score").initial_seed())
        batch = draw(data, 3, base.schedule, seeded)
        draws = training._drawn(batch, 3, of_fake=True)
        assert int(draws.sampling_step.min()) == 1
        losses, fake = [], copy.deepcopy(base)
        grid = timesteps(base.schedule, recipe.phases).tolist()
        theirs = replace_of(training, fake)
        for name, parameter in theirs.items():
            parameter.data = before[name].clone()
        for i in range(recipe.batch_size):
            x, context = draws.noise[i : i + 1], batch.context[i : i + 1]
            with torch.no_grad():
                for now, end in zip(grid[: draws.sampling_step[i]], grid[1 : draws.sampling_step[i] + 1], strict=True):
                    x0, eps = both("eps", base(x, torch.tensor([now]), context), x, now)
                    x = numbers("eps", end)[0] * x0 + numbers("eps", end)[1] * eps
                now = grid[draws.sampling_step[i]]
                sample = both("eps", base(x, torch.tensor([now]), context), x, now)[0]
            alpha, sigma = numbers("eps", int(draws.t[i]))
            x_t = alpha * sample + sigma * draws.eps[i : i + 1]
            losses.append(((fake(x_t, draws.t[i : i + 1], context) - draws.eps[i : i + 1]) ** 2).mean())
        slopes = torch.autograd.grad(torch.stack(losses).mean(), [theirs[name] for name in before])
        assert found["fake"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
        rate = FAKE_RATE * 500.0
        ours = torch.cat([(before[name] - weight.detach()).flatten() / rate for name, weight in training.fake.parameters.items()])
        wanted = torch.cat([slope.flatten() for slope in slopes])
        assert (ours - wanted).norm() < 1e-3 * wanted.norm()


# --- a run


def test_the_base_stays_and_the_fake_score_is_apart(small_teacher, small_data, tmp_path):
    base = copied(small_teacher)
    before = copy.deepcopy(base.network.state_dict())
    training = opened(base, small_data, RECIPE, tmp_path / "run")
    with training.open():
        for step in range(4):
            fake = {name: weight.detach().clone() for name, weight in training.fake.parameters.items()}
            own = weights_of(training)
            training.step(step)
            assert any(not torch.equal(weight, fake[name]) for name, weight in training.fake.parameters.items())
            moved = any(not torch.equal(weight, own[name]) for name, weight in weights_of(training).items())
            assert moved == (step >= RECIPE.fake_warmup_steps)
            assert all(parameter.grad is None for parameter in training.parameters.values())
    now = {name.replace(".base_layer", ""): weight for name, weight in base.network.state_dict().items()}
    assert all(torch.equal(now[name], weight) for name, weight in before.items())


def run_to(stop, folder, recipe, small_teacher, data):
    """A run continued with new objects, as after a crash."""
    base = copied(small_teacher)
    student, teacher = (base, WithoutLora(base)) if recipe.lora_rank else (student_of(base, PLAN), base)
    plan = None if recipe.lora_rank else PLAN
    distill(run := Run(folder, recipe), student=student, teacher=teacher, plan=plan, dataset=data, num_steps=stop)
    return run


def same(ours, theirs):
    ours, theirs = (read_header(path).tensors for path in (ours, theirs))
    return ours.keys() == theirs.keys() and all(torch.equal(tensor.read(), theirs[name].read()) for name, tensor in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"consistency_steps": 3},
        {"lora_rank": 0},
        {"lora_rank": 0, "consistency_steps": 3, "optimizer": "schedulefree", "lr_schedule": "constant"},
        {"lora_dora": True},
        {"precision": "fp16", "accumulation_steps": 2, "consistency_steps": 3},
    ],
    ids=["lora", "consistency first", "whole", "schedule-free", "dora", "fp16"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(changes, small_teacher, small_data, tmp_path):
    recipe = replace(RECIPE, total_steps=7, batch_size=4, phases=2, anchor_steps=2, **changes)
    if recipe.optimizer == "schedulefree":
        pytest.importorskip("schedulefree")
    whole = run_to(None, tmp_path / "whole", recipe, small_teacher, small_data)
    for stop in (1, 2, 1, 2, None):  # before, at and after each change of objective
        stopped = run_to(stop, tmp_path / "stopped", recipe, small_teacher, small_data)
    assert same(whole.result_file, stopped.result_file)
    assert same(*(checkpoints_in(run.folder)[-1] / TRAINING for run in (whole, stopped)))
    assert str(whole.metrics()) == str(stopped.metrics())  # where fp16 overflows, the norm is no number
    last = whole.metrics()[-1]
    assert {"dmd", "diversity", "fake", "cosine_distance"} <= last.keys()
    assert ("consistency" in whole.metrics()[0]) == bool(recipe.consistency_steps)


def test_after_an_error_in_the_middle_of_a_step_it_goes_on_as_if_there_had_been_none(
    small_teacher, small_data, tmp_path, monkeypatch
):
    """The fake score has made all its updates of that step, the student none."""
    whole = run_to(None, tmp_path / "whole", RECIPE, small_teacher, small_data)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "losses", failing_at(4, Trainer.losses))
        with pytest.raises(OutOfMemory):
            run_to(None, tmp_path / "stopped", RECIPE, small_teacher, small_data)
    assert Run(tmp_path / "stopped", RECIPE).step == 4
    stopped = run_to(None, tmp_path / "stopped", RECIPE, small_teacher, small_data)
    assert same(whole.result_file, stopped.result_file)
    assert same(*(checkpoints_in(run.folder)[-1] / TRAINING for run in (whole, stopped)))


def failing_at(step, losses):
    def fail(trainer, batch, now, *rest):
        if now == step:
            raise torch.OutOfMemoryError("no memory")
        return losses(trainer, batch, now, *rest)

    return fail


def test_a_damaged_student_is_not_saved(small_teacher, small_data, tmp_path):
    training = opened(copied(small_teacher), small_data, RECIPE, tmp_path / "run")
    with training.open():
        for step in range(3):
            training.step(step)
        next(iter(training.parameters.values())).data.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match="fake score is not finite at step 4; the run keeps its last checkpoint"):
            training.step(3)
        training.save_if_sound()
    assert not Run(tmp_path / "run", RECIPE).step


def test_parts_of_a_batch_are_the_batch(demo, tmp_path):
    runs = [
        run_to(None, tmp_path / f"{parts}", replace(RECIPE, accumulation_steps=parts, total_steps=3), demo, load_dataset(24))
        for parts in (1, 4)
    ]
    for ours, theirs in zip(*(run.metrics() for run in runs), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(value == pytest.approx(theirs[name], rel=2e-3, abs=1e-5) for name, value in ours.items())


def test_the_consistency_steps_are_those_of_that_objective(small_teacher, small_data, tmp_path):
    """At the full learning rate; afterwards nothing lags behind."""
    recipe = replace(RECIPE, consistency_steps=2)
    alike = replace(RECIPE, objective="consistency", consistency_steps=0)
    ours, theirs = (opened(copied(small_teacher), small_data, each, tmp_path / each.objective) for each in (recipe, alike))
    with ours.open(), theirs.open():
        for step in range(2):
            ours.step(step), theirs.step(step)
        assert all(torch.equal(weight, weights_of(theirs)[name]) for name, weight in weights_of(ours).items())
        assert ours.target is None and theirs.target is not None
        fresh = FakeBeginning(ours)
        assert fresh.untouched()
        ours.step(2)
        assert not fresh.untouched()


class FakeBeginning:
    """The values of a fake score that is the teacher: its LoRA changes nothing."""

    def __init__(self, training):
        self.own = training.fake.parameters

    def untouched(self):
        return all(not weight.any() for name, weight in self.own.items() if name.endswith("lora_up"))


# --- what cannot be


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weighting": "min-snr"}, "weighting"),
        ({"lora_rank": 0, "weight_dtype": "bf16"}, "weight_dtype fp32"),
        ({"phases": 1}, "phases of 2 or more"),
        ({"timestep_range": (0, 500)}, "range of timesteps; choose the objective consistency"),
        ({"validate_every_steps": 5, "validation_share": 0.1}, "no validation loss"),
        ({"total_steps": 3, "fake_warmup_steps": 3}, "total_steps must be above 3 for the objective dmd: 3 in which"),
        ({"total_steps": 9, "consistency_steps": 9}, "above 10 for the objective dmd: 9 steps of consistency and 1 in which"),
        ({"fake_updates": 0}, "fake_updates"),
        ({"task_weight": 1.0}, "samples alone"),
        ({"objective": "consistency", "consistency_steps": 2}, "consistency_steps are for the objective dmd"),
        ({"objective": "output", "diversity_weight": 1.0}, "diversity_weight is for the objective dmd"),
    ],
)
def test_settings_that_do_not_go_together(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(RECIPE, **changes)
