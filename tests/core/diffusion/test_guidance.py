import pytest
import torch

from distill_core.diffusion.conditioning import Caption
from distill_core.diffusion.guidance import combined, guided
from distill_core.diffusion.schedule import PREDICTIONS, convert, scaled_linear


def test_scales_of_one_and_zero_are_the_answers_themselves():
    conditional, unconditional = torch.randn(2, 3, 4, 5, 5)
    assert torch.equal(combined(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(combined(conditional, unconditional, 1.0), conditional)
    assert torch.equal(combined(conditional, conditional, 7.0), conditional)


def test_each_example_may_have_a_scale_of_its_own():
    conditional, unconditional = torch.randn(2, 3, 4, 5, 5)
    each = combined(conditional, unconditional, torch.tensor([1.5, 4.0, 7.0]))
    for i, scale in enumerate((1.5, 4.0, 7.0)):
        assert torch.equal(each[i], combined(conditional[i], unconditional[i], scale))


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_guiding_is_the_same_in_every_prediction_type(kind):
    schedule, t = scaled_linear(), torch.tensor([20, 500, 999])
    x_t, conditional, unconditional = torch.randn(3, 3, 4, 5, 5, dtype=torch.float64)
    c, u = (convert(answer, x_t, t, schedule, "eps", kind) for answer in (conditional, unconditional))
    back = convert(combined(c, u, 7.5), x_t, t, schedule, kind, "eps")
    torch.testing.assert_close(back, combined(conditional, unconditional, 7.5), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_one_pass_of_twice_the_batch_is_two_passes(small_xl_teacher, xl_batch):
    x_t, t, context, label = xl_batch
    null = Caption(torch.randn_like(context[0]), torch.randn_like(label.pooled[0]))
    calls = []

    class Counting(type(small_xl_teacher)):
        def __call__(self, x, *rest):
            calls.append(len(x))
            return super().__call__(x, *rest)

    network = Counting(network=small_xl_teacher.network, architecture=small_xl_teacher.architecture)
    answer = guided(network, x_t, t, context, label, null, 3.0)
    nulls = null.context.expand_as(context), label._replace(pooled=null.pooled.expand_as(label.pooled))
    torch.testing.assert_close(
        answer, combined(network(x_t, t, context, label), network(x_t, t, *nulls), 3.0), rtol=1e-4, atol=1e-5
    )
    assert calls == [2 * len(x_t), len(x_t), len(x_t)]
    assert torch.equal(guided(network, x_t, t, context, label, null, 1), network(x_t, t, context, label)) and calls[-2] == len(
        x_t
    )
