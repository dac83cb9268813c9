"""A student that learns to jump along the teacher's path: values, slopes and copies against a plain computation from the papers."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill_core.base.storage import read_header
from distill_core.data.dataset import LatentDataset, draw
from distill_core.diffusion.sampling import timesteps
from distill_core.diffusion.schedule import CLEAN, PREDICTIONS, ddim_step, flow, scaled_linear
from distill_core.networks.model_sampling import ModelSampling
from distill_core.training.checkpoints import TRAINING, checkpoints_in
from distill_core.training.consistency import course
from distill_core.training.lesson import check_trajectories
from distill_core.training.loop import distill
from distill_core.training.processes import ALONE
from distill_core.training.run import Run
from distill_core.training.settings import TrainingSettings
from distill_core.training.teachers import Teachers
from distill_core.training.trainer import Trainer

from ...students import student_of
from ..lora.test_layers import copied
from .runs import PLAN

pytest.importorskip("peft")
from distill_core.lora.layers import WithoutLora  # noqa: E402

RECIPE = TrainingSettings(objective="consistency", guidance=3.0, caption_dropout=0.0, total_steps=6, batch_size=4, learning_rate=1e-2,
                lora_rank=4, save_every_steps=100)  # fmt: skip
SCHEDULE = scaled_linear()


# --- the course


@pytest.mark.parametrize("phases", range(2, 21))
def test_phases_end_where_samplers_begin_their_next_step(phases):
    simple = [999 - int(number * 1000 / phases) for number in range(phases)]  # ComfyUI's scheduler
    for starts in (simple, timesteps(SCHEDULE, phases).tolist()):
        way = course(torch.tensor(starts), SCHEDULE, phases=phases, solver_steps=1000)
        assert way.end.tolist() == [*simple[1:], CLEAN]


@given(st.lists(st.integers(0, 999), min_size=1, max_size=8), st.integers(1, 60), st.integers(0, 60), st.integers(0, 900))
def test_a_step_leads_to_the_end_of_its_phase_and_not_beyond(t, phases, more, lowest):
    t = torch.tensor(t).clamp(min=lowest)
    way = course(t, SCHEDULE, phases=phases, solver_steps=phases + more, lowest=lowest)
    assert bool(((way.end <= way.step) & (way.step < t) & (way.end >= lowest - 1)).all())
    assert bool((t - way.step <= 1000 // (phases + more)).all())
    ends = {CLEAN, *(math.ceil(1000 * i / phases) - 1 for i in range(phases))}
    for start, end in zip(t.tolist(), way.end.tolist(), strict=True):
        assert end == max(lowest - 1, *(each for each in ends if each < start))


@pytest.mark.parametrize("phases", [1, 2, 4, 5, 8])
def test_a_sampler_of_as_many_steps_goes_from_end_to_end(phases):
    asked = timesteps(SCHEDULE, phases)
    assert course(asked, SCHEDULE, phases=phases, solver_steps=50).end.tolist() == [*asked[1:].tolist(), CLEAN]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", [SCHEDULE, flow(shift=3.0)], ids=["diffusion", "flow"])
def test_a_jump_to_where_it_starts_stays_whatever_the_network_predicts(prediction, schedule):
    t, x, predicted = torch.tensor([0, 19, 499, 999]), *torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(ddim_step(predicted, x, t, t, schedule, prediction), x, atol=1e-6)
    x0 = PREDICTIONS[prediction].to_x0(predicted, x, schedule.at(t, x))
    assert torch.equal(ddim_step(predicted, x, t, torch.full((4,), CLEAN), schedule, prediction), x0)


# --- the loss


def opened(base, data, recipe, folder, student=None):
    student = student or base
    teacher = WithoutLora(base) if student is base else base
    return Trainer(
        Run(folder, recipe), student, Teachers.single(teacher, recipe), PLAN if student is not base else None, data, ALONE
    )


def predicting(prediction, denoiser):
    """A denoiser as if it had been trained to predict so."""
    flows = prediction == "flow"
    sampling = ModelSampling(prediction=prediction, noise="flow" if flows else "discrete")
    return replace(denoiser, sampling=sampling, noise_levels=flow() if flows else None)


def plainly(teacher, target, student, prediction, null, batch, scale, phases, stride):
    """The loss as the papers have it, an example at a time: numbers in place of tables and masks."""
    alphas = [
        abar**0.5 for abar in (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).tolist()
    ]

    def numbers(t):
        if prediction == "flow":
            return 1 - (t + 1) / (1000 + 1e-3), (t + 1) / (1000 + 1e-3)
        return (1.0, 0.0) if t < 0 else (alphas[t], (1 - alphas[t] ** 2) ** 0.5)

    def moved(output, x, t, end):
        (alpha, sigma), (alpha_end, sigma_end) = numbers(t), numbers(end)
        if prediction == "eps":
            x0, eps = (x - sigma * output) / alpha, output
        elif prediction == "v":
            x0, eps = alpha * x - sigma * output, sigma * x + alpha * output
        elif prediction == "flow":
            x0, eps = x - sigma * output, x + alpha * output
        else:
            x0, eps = output, (x - alpha * output) / sigma
        return alpha_end * x0 + sigma_end * eps

    losses = []
    for i, t in enumerate(batch.t.tolist()):
        x, context = batch.x_t[i : i + 1].double(), batch.context[i : i + 1].double()
        w = scale if batch.scale is None else batch.scale[i].item()
        end = max(end for phase in range(phases) if (end := math.ceil(1000 * phase / phases) - 1) < t)
        step, now = max(t - stride, end), torch.tensor([t])
        with torch.no_grad():
            conditional = teacher(x, now, context)
            guided = conditional if w == 1 else (1 - w) * teacher(x, now, null[None]) + w * conditional
            aim = moved(guided, x, t, step)
            if step != end:
                aim = moved(target(aim, torch.tensor([step]), context), aim, step, end)
        d = moved(student(x, now, context), x, t, end) - aim
        losses.append(((d**2 + 1e-6).sqrt() - 1e-3).mean())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("prediction", "phases", "guidance"),
    [
        ("eps", 4, (3.0, None)),
        ("eps", 1, (5.0, 2.0)),
        ("v", 2, (3.0, None)),
        ("v", 4, (1.0, None)),
        ("x0", 1, (3.0, None)),
        ("flow", 4, (3.0, None)),
        ("flow", 1, (5.0, 2.0)),
    ],
)
def test_the_loss_and_its_slope_are_those_of_the_papers(prediction, phases, guidance, small_teacher, small_data, tmp_path):
    scale, least = guidance
    # In float64: near 0 the loss bends within 0.001, so that rounding would turn its slope.
    base, alone = (predicting(prediction, copied(small_teacher)) for _ in range(2))
    for denoiser in (base, alone):
        denoiser.network.double()
    recipe = replace(RECIPE, phases=phases, guidance=scale, guidance_min=least, batch_size=8, total_steps=3)
    training = opened(base, small_data, recipe, tmp_path / "run")
    with training.open():
        for step in range(2):
            training.step(step)
        batch = draw(small_data, 2, base.schedule, recipe.batching)
        batch.t[:4] = torch.tensor([999, 1000 // phases % 1000 + 3, 12, 0])  # the noisiest, steps to the ends of phases, the last
        batch = batch._replace(x_t=base.schedule.add_noise(batch.x0, batch.eps, batch.t))
        terms, total = training.losses(batch, 2, training.objective)
        slopes = torch.autograd.grad(total.mean(), list(training.parameters.values()))
        student, target = base, copy.deepcopy(base)
        for name, parameter in replace_of(training, target).items():
            parameter.data = training.target.weights[name].clone()
        with torch.enable_grad():
            null = small_data.null.context.double()
            expected = plainly(alone, target, student, prediction, null, batch, scale, phases, 1000 // 50)
        wanted = torch.autograd.grad(expected.mean(), list(training.parameters.values()))
    assert torch.equal(terms["consistency"], total)
    torch.testing.assert_close(total, expected.float(), rtol=1e-4, atol=1e-6)
    ours, theirs = (torch.cat([slope.flatten() for slope in each]) for each in (slopes, wanted))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def replace_of(training, denoiser):
    """The trained parameters of a copy of the student."""
    ours = {id(parameter): name for name, parameter in training.parameters.items()}
    theirs = dict(denoiser.network.named_parameters())
    return {ours[id(p)]: theirs[path] for path, p in training.student.network.named_parameters() if id(p) in ours}


# --- a run


def weights_of(training):
    return {name: parameter.detach().clone() for name, parameter in training.parameters.items()}


def test_the_target_is_a_lagged_copy_and_the_base_stays(small_teacher, small_data, tmp_path):
    base = copied(small_teacher)
    before = copy.deepcopy(base.network.state_dict())
    training = opened(base, small_data, RECIPE, tmp_path / "run")
    with training.open():
        lagged = weights_of(training)
        for step in range(4):
            training.step(step)
            decay = min(RECIPE.target_decay, (1 + step) / (10 + step))
            lagged = {name: lagged[name].lerp(weight, 1 - decay) for name, weight in weights_of(training).items()}
            assert all(torch.equal(lagged[name], weight) for name, weight in training.target.weights.items())
            assert any(not torch.equal(weight, training.parameters[name]) for name, weight in lagged.items())
    now = {name.replace(".base_layer", ""): weight for name, weight in base.network.state_dict().items()}
    assert all(torch.equal(now[name], weight) for name, weight in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [4, 0], ids=["lora", "whole"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(lora_rank, small_teacher, small_data, tmp_path):
    recipe = replace(RECIPE, lora_rank=lora_rank)

    def trained(folder, *stops):
        for stop in (*stops, None):
            base = copied(small_teacher)
            student, teacher = (base, WithoutLora(base)) if lora_rank else (student_of(base, PLAN), base)
            plan = None if lora_rank else PLAN
            distill(run := Run(folder, recipe), student=student, teacher=teacher, plan=plan, dataset=small_data, num_steps=stop)
        return run

    whole, stopped = trained(tmp_path / "whole"), trained(tmp_path / "stopped", 1, 3)
    for ours, theirs in zip(
        (whole.result_file, checkpoints_in(whole.folder)[-1] / TRAINING),
        (stopped.result_file, checkpoints_in(stopped.folder)[-1] / TRAINING),
        strict=True,
    ):
        ours, theirs = (read_header(path).tensors for path in (ours, theirs))
        assert ours.keys() == theirs.keys() and all(
            torch.equal(tensor.read(), theirs[name].read()) for name, tensor in ours.items()
        )
    assert whole.metrics() == stopped.metrics() and "consistency" in whole.metrics()[0]


def test_an_expert_is_asked_only_in_its_range(small_teacher, small_data, tmp_path):
    base, asked = copied(small_teacher), []

    class Listening(type(base)):
        def __call__(self, x_t, t, *rest):
            asked.append(t)
            return super().__call__(x_t, t, *rest)

    listening = Listening(**vars(base))
    recipe = replace(RECIPE, timestep_range=(600, 800), phases=4, total_steps=3)
    distill(Run(tmp_path / "run", recipe), student=listening, teacher=WithoutLora(base), plan=None, dataset=small_data)
    seen = torch.cat(asked)
    assert 599 <= seen.min() and seen.max() < 800  # 599 only where its answer is not used


def test_validation_asks_after_the_last_step_too(small_teacher, small_data, tmp_path):
    recipe = replace(RECIPE, total_steps=2, validate_every_steps=1, validation_share=0.25)
    base = copied(small_teacher)
    distill(run := Run(tmp_path / "run", recipe), student=base, teacher=WithoutLora(base), plan=None, dataset=small_data)
    assert run.complete and all(row["validation"] > 0 for row in run.metrics())


def test_a_complete_run_is_given_more_steps(small_teacher, small_data, tmp_path):
    runs = []
    for name, parts in (("parts", (2, 4)), ("whole", (4,))):
        base = copied(small_teacher)
        for total in parts:
            run = Run(tmp_path / name, replace(RECIPE, total_steps=total, lr_schedule="constant"))
            distill(run, student=base, teacher=WithoutLora(base), plan=None, dataset=small_data)
            base = copied(small_teacher)
        runs.append(read_header(run.result_file).tensors)
    assert all(torch.equal(runs[0][name].read(), weight.read()) for name, weight in runs[1].items())


# --- what cannot be


@pytest.mark.parametrize(
    ("num_steps", "phases", "fits"), [(24, 4, True), (24, 3, True), (20, 4, True), (25, 4, False), (25, 5, True), (25, 1, False)]
)
def test_stored_states_must_lie_where_the_student_is_sampled(num_steps, phases, fits, small_data):
    (bucket,) = small_data.buckets
    states = bucket.latents[:, None].expand(-1, num_steps, -1, -1, -1)
    data = LatentDataset([replace(bucket, states=states)], small_data.null, timesteps(SCHEDULE, num_steps))
    recipe = replace(RECIPE, guidance=1.0, phases=phases)
    if fits:
        check_trajectories(recipe, SCHEDULE, data.timesteps, data.scales)
        return
    with pytest.raises(
        ValueError, match="no states at timesteps 749, 499, 249, where a student of 4 steps is sampled; set phases to 5, 25, or"
    ):
        check_trajectories(recipe, SCHEDULE, data.timesteps, data.scales)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weighting": "min-snr"}, "weighting"),
        ({"lora_rank": 0, "weight_dtype": "bf16"}, "weight_dtype fp32"),
        ({"phases": 60}, "solver_steps must be at least phases"),
        ({"phases": 0}, "phases"),
    ],
)
def test_settings_that_do_not_go_together(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(RECIPE, **changes)
