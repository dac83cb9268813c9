import pytest
import torch

from distill_core.evaluation.trial import PATTERN_SIZE, WARM_UPS, fill, random_data, random_denoiser, training_cost
from distill_core.pruning.plan import name_map, preset, pruned
from distill_core.training.settings import TrainingSettings
from distill_core.training.teachers import Teachers

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_random_weights_are_small_spread_and_the_same_each_time(small_teacher, dtype):
    first, again = (random_denoiser(small_teacher.architecture, CPU, dtype).named_parameters() for _ in range(2))
    assert {name: weight.shape for name, weight in first.items()} == dict(small_teacher.architecture.shapes)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]) and weight.abs().max() <= 0.0201
    largest = max(first.values(), key=torch.numel)
    assert largest.float().std() == pytest.approx(0.04 / 12**0.5, rel=0.02) and largest.unique().numel() > 100


def test_a_layer_larger_than_the_pattern_has_no_two_equal_rows():
    weight = torch.nn.Linear(1280, 1280 * 2, bias=False).weight
    assert weight.numel() > PATTERN_SIZE
    fill(weight, torch.arange(PATTERN_SIZE, dtype=torch.float32))
    assert weight.data[:, 0].unique().numel() == len(weight)
    assert weight.data.view(-1)[PATTERN_SIZE + 5] == 5 and weight.data.view(-1)[-1] == (weight.numel() - 1) % PATTERN_SIZE


def test_what_training_costs(small_teacher):
    plan, teacher = preset("bk-sdm-small"), random_denoiser(small_teacher.architecture, CPU, "fp32")
    student = random_denoiser(pruned(teacher.architecture, name_map(teacher.architecture, plan)), CPU, "fp32")
    training, counts = TrainingSettings(total_steps=1 + WARM_UPS + 2, batch_size=2), []
    cost = training_cost(
        training,
        student=student,
        teachers=Teachers.single(teacher, training),
        plan=plan,
        data=random_data(teacher.architecture, 4, (64, 64), 5, seed=0),
        on_step=lambda: counts.append(1),
    )
    assert len(cost.seconds) == 2 and len(counts) == 3 and all(second > 0 for second in cost.seconds)
    sizes = [4 * denoiser.architecture.num_parameters for denoiser in (teacher, student)]
    assert cost.peak_bytes > sizes[0] + 4 * sizes[1]  # weights, gradients, two moments
    assert cost.peak_bytes < 2 * (sizes[0] + 4 * sizes[1])
