import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distill_core.diffusion.schedule import (
    CLEAN,
    PREDICTIONS,
    convert,
    flow,
    from_noise_ratio,
    from_signal_power,
    prediction,
    scaled_linear,
    x0_gain,
)


@pytest.fixture(params=[scaled_linear, flow], ids=["diffusion", "flow"])
def noised(request):
    schedule = request.param()
    random = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(6, 4, 8, 8, generator=random, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    return x0, eps, schedule.add_noise(x0, eps, t), schedule.at(t, x0)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_target_and_conversions_are_inverses(name, noised):
    x0, eps, x_t, coefficients = noised
    kind = prediction(name)
    output = kind.target(x0, eps, coefficients)
    torch.testing.assert_close(kind.to_x0(output, x_t, coefficients), x0)
    torch.testing.assert_close(kind.to_eps(output, x_t, coefficients), eps)


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_a_prediction_is_restated_as_what_the_other_type_would_be(source, target):
    schedule, random, t = scaled_linear(), torch.Generator().manual_seed(0), torch.tensor([0, 400, 999])
    x0, eps = (torch.randn(3, 4, 8, 8, generator=random, dtype=torch.float64) for _ in range(2))
    x_t, at = schedule.add_noise(x0, eps, t), schedule.at(t, x0)
    theirs, ours = (prediction(name).target(x0, eps, at) for name in (source, target))
    torch.testing.assert_close(convert(theirs, x_t, t, schedule, source, target), ours)


def test_scaled_linear_is_the_schedule_of_stable_diffusion():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(scaled_linear().alphas.square().float(), theirs, rtol=1e-5, atol=1e-7)


def test_noise_ratios_lead_back_to_the_schedule():
    schedule = scaled_linear()
    torch.testing.assert_close(from_noise_ratio(schedule.noise_ratio).alphas, schedule.alphas)
    assert from_noise_ratio(schedule.noise_ratio.float()).num_timesteps == 1000 and schedule == scaled_linear() != flow()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_the_straight_line_of_sd3(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = flow(shift=shift)
    torch.testing.assert_close(schedule.alphas + schedule.sigmas, torch.ones_like(schedule.sigmas))
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0)[-1000:]
    torch.testing.assert_close(schedule.sigmas.float(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name,at_half", [("eps", 1.0), ("v", 0.5**0.5), ("x0", 1.0)])
def test_how_far_an_error_moves_the_picture(name, at_half):
    """At equal parts of signal and noise: eps by sigma / alpha, v by sigma, x0 by itself."""
    schedule = from_signal_power(torch.tensor([0.5]))
    assert x0_gain(name, schedule, torch.tensor([0])).item() == pytest.approx(at_half)


def test_noise_preserves_variance_at_every_timestep():
    schedule = scaled_linear()
    alpha, sigma = schedule.at(torch.arange(1000), torch.zeros(1000, 1))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, 1))


def test_coefficients_have_the_asked_precision():
    coefficients = scaled_linear().at(torch.tensor([0, 999]), torch.zeros(2, 4, 8, 8, dtype=torch.float16))
    assert {c.dtype for c in coefficients} == {torch.float16} and {c.shape for c in coefficients} == {(2, 1, 1, 1)}


def test_a_table_that_is_no_schedule_is_refused():
    with pytest.raises(ValueError, match="strictly increasing"):
        from_signal_power(torch.tensor([0.1, 0.5]))


def test_unknown_prediction_lists_the_choices():
    with pytest.raises(ValueError, match="eps.*v.*x0"):
        prediction("epsilon")


def test_clean_data_is_a_timestep_before_the_first():
    schedule = scaled_linear()
    alpha, sigma = schedule.at(torch.tensor([CLEAN, 0, 999]), torch.empty(3, 1, dtype=torch.float64))
    assert (alpha[0], sigma[0]) == (1, 0)
    assert torch.equal(alpha[1:, 0], schedule.alphas[[0, 999]]) and torch.equal(sigma[1:, 0], schedule.sigmas[[0, 999]])


def test_a_schedule_asked_by_a_forecast_keeps_its_contents():
    """A forecast runs the network on tensors without contents; the run after it asks the same schedule."""
    schedule = scaled_linear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        schedule.at(torch.zeros(1, dtype=torch.long), torch.zeros(1))
    assert float(schedule.at(torch.tensor([0]), torch.zeros(1)).alpha) == float(schedule.alphas[0].float())
