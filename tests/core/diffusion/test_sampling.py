import copy

import pytest
import torch

from distill_core.diffusion.conditioning import Caption
from distill_core.diffusion.sampling import sample, timesteps
from distill_core.diffusion.schedule import flow, prediction, scaled_linear
from distill_core.networks.model_sampling import ModelSampling

pytestmark = pytest.mark.slow


@pytest.fixture
def inputs():
    random = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 5, 16, generator=random)


def denoiser_like(small_teacher, **changes):
    fields = dict(network=small_teacher.network, architecture=small_teacher.architecture)
    return type(small_teacher)(**fields | changes)


def test_sampling_is_a_function_of_noise_and_prompt(small_teacher, inputs):
    noise, context = inputs
    options = dict(null=Caption(torch.zeros(5, 16)), num_steps=3, guidance=3.0)
    first = sample(small_teacher, context, noise=noise, **options)
    assert first.isfinite().all() and first.shape == noise.shape
    assert torch.equal(first, sample(small_teacher, context, noise=noise, **options))
    assert not torch.equal(first, sample(small_teacher, context.flip(0), noise=noise, **options))


def test_guidance_one_is_the_conditional_answer_at_half_the_cost(small_teacher, inputs):
    noise, context = inputs
    calls = []

    class Counting(type(small_teacher)):
        def __call__(self, x, *rest):
            calls.append(len(x))
            return super().__call__(x, *rest)

    counting = Counting(network=copy.deepcopy(small_teacher.network).double(), architecture=small_teacher.architecture)
    results = [
        sample(counting, context, Caption(torch.zeros(5, 16)), noise=noise, num_steps=2, guidance=g) for g in (1.0, 1.0000001)
    ]
    assert calls == [2, 2, 4, 4]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("num_steps", [1, 5, 20])  # of others diffusers takes steps of another width than its timesteps lie apart
def test_on_diffusion_it_is_diffusers_ddim(kind, num_steps, small_teacher, inputs):
    from diffusers import DDIMScheduler

    denoiser, (noise, context) = denoiser_like(small_teacher, sampling=ModelSampling(prediction=kind)), inputs
    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing", prediction_type={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[kind],
    )  # fmt: skip
    theirs.set_timesteps(num_steps)
    assert timesteps(scaled_linear(), num_steps).tolist() == theirs.timesteps.tolist()
    x = noise
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(denoiser(x, t.expand(2), context), t, x).prev_sample
    # diffusers keeps its tables in float32, and their last steps divide by the little noise there is.
    ours = sample(denoiser, context, Caption(context[0]), noise=noise, num_steps=num_steps, guidance=1.0)
    torch.testing.assert_close(ours, x, rtol=2e-3, atol=2e-3)


def test_on_flow_it_is_eulers_method(small_teacher, inputs):
    denoiser, (noise, context) = (
        denoiser_like(small_teacher, sampling=ModelSampling(prediction="flow"), noise_levels=flow()),
        inputs,
    )
    at, x = timesteps(flow(), 5), noise
    sigmas = [*flow().sigmas[at].tolist(), 0.0]
    with torch.no_grad():
        for t, now, then in zip(at, sigmas, sigmas[1:], strict=False):
            x = x + (then - now) * denoiser(x, t.expand(2), context)
    ours = sample(denoiser, context, Caption(context[0]), noise=noise, num_steps=5, guidance=1.0)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_states_on_the_way_are_told(small_teacher, inputs):
    noise, context = inputs
    states = []
    sample(
        small_teacher,
        context,
        Caption(context[0]),
        noise=noise,
        num_steps=4,
        on_state=lambda x, t: states.append((x.clone(), t.item())),
    )
    assert [t for _, t in states] == [999, 749, 499, 249] and torch.equal(states[0][0], noise)
    assert all(not torch.equal(a, b) for (a, _), (b, _) in zip(states, states[1:], strict=False))


def test_sdxl_samples_with_its_label(small_xl_teacher, xl_batch):
    x, _, context, label = xl_batch
    options = dict(noise=x, num_steps=2, guidance=2.0)
    null = Caption(context[0], torch.zeros(8))
    first = sample(small_xl_teacher, context, null, label=label, **options)
    other = sample(small_xl_teacher, context, null, label=label._replace(pooled=label.pooled + 1), **options)
    assert first.shape == x.shape and not torch.equal(first, other)


def test_the_prediction_decides_the_sample(small_teacher, inputs):
    noise, context = inputs
    results = [sample(denoiser_like(small_teacher, sampling=ModelSampling(prediction=kind)), context, Caption(context[0]), noise=noise, num_steps=2)
               for kind in ("eps", "v", "x0")]  # fmt: skip
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    assert prediction("x0")


def test_with_noise_anew_it_is_the_sampling_of_consistency_models(small_teacher, inputs):
    noise, context = inputs
    options = dict(null=None, noise=noise, num_steps=3, guidance=1.0)
    drawn = sample(small_teacher, context, **options, anew=torch.Generator().manual_seed(5))
    random, x, schedule = torch.Generator().manual_seed(5), noise, small_teacher.schedule
    for t, end in ((999, 666), (666, 332), (332, None)):  # as `timesteps` has them
        with torch.no_grad():
            eps = small_teacher(x, torch.tensor([t, t]), context)
        x0 = (x - schedule.sigmas[t].float() * eps) / schedule.alphas[t].float()
        fresh = torch.randn(noise.shape, generator=random)
        x = x0 if end is None else schedule.alphas[end].float() * x0 + schedule.sigmas[end].float() * fresh
    assert timesteps(schedule, 3).tolist() == [999, 666, 332]
    torch.testing.assert_close(drawn, x)
