"""Which runs of a transformer's blocks become one."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distill_core.diffusion.transformers import skipping_blocks
from distill_core.evaluation import plots
from distill_core.networks.transformers.architecture import FAMILIES, Transformer
from distill_core.pruning.plan import folded, name_map
from distill_core.pruning.plan_text import read_plan
from distill_core.pruning.recover import RIDGES
from distill_core.pruning.runs import (
    BY_PLACE,
    Analysis,
    Examples,
    Planner,
    Run,
    Score,
    Settings,
    analyse,
    candidates,
    decide,
    left_over_by_linear_map,
)

WIDTH, DEPTH = 6, 8


class Block(nn.Module):
    """Adds to what it is given by writing over it, as ComfyUI's blocks of Flux do."""

    def __init__(self, strength: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * strength)

    def forward(self, x, vec):
        x += torch.tanh(x @ self.weight) * vec
        return x


class Network(nn.Module):
    """A transformer of one list, with blocks that count their calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(0.0 if number in (4, 5) else 0.5) for number in range(DEPTH))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        x = x.clone()
        for block in self.layers:
            x = block(x, vec=0.7)
        return x


@pytest.fixture
def network():
    return Network().requires_grad_(False)


@pytest.fixture
def teacher(network):
    family = FAMILIES["z-image"]
    return Transformer(family, {name: tuple(weight.shape) for name, weight in network.state_dict().items()})


def examples(network, num_images=2, num_levels=2):
    inputs = torch.randn(num_images * num_levels, 3, 20, WIDTH, generator=torch.Generator().manual_seed(1))

    def visit(measure):
        for x in inputs:
            measure(lambda x=x: network(x))

    return Examples(num_images, num_levels, visit)


SMALL = Settings(first_stay=2, num_tokens=120, saving=0.1)


def test_runs_leave_the_ends_alone(teacher):
    found = candidates(teacher, SMALL)
    assert [run.numbers for run in found] == [(2, 3), (3, 4), (4, 5), (5, 6), (2, 3, 4), (3, 4, 5), (4, 5, 6)]
    assert [sorted(run.lost) for run in found[3:5]] == [["layers.6"], ["layers.2", "layers.4"]]
    assert found[-1].name(teacher) == "layer 4-6"
    with pytest.raises(
        ValueError, match=r"this Z-Image \(layer 0-7\) has no two blocks in a row that may be folded; let fewer stay"
    ):
        candidates(teacher, Settings(first_stay=6))
    for last_stay in (6, 9, 14):
        with pytest.raises(ValueError, match="let fewer stay"):
            candidates(teacher, Settings(first_stay=2, last_stay=last_stay, longest_run=2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_refused(value, teacher, network):
    broken = Examples(1, 1, lambda visit: visit(lambda: torch.full((1, 4), value)))
    with pytest.raises(ValueError, match="NaN or Inf in the precision it is loaded in; load it in bf16 or fp32"):
        analyse(network, teacher, broken, SMALL)


def test_the_last_block_of_another_shape_never_goes():
    shapes = {f"joint_blocks.{number}.weight": (2, 2) for number in range(5)}
    found = candidates(Transformer(FAMILIES["sd3"], shapes), Settings(first_stay=0, last_stay=0, longest_run=2))
    assert [run.numbers for run in found] == [(0, 1), (1, 2), (2, 3)]


def test_what_does_nothing_goes_first_by_every_criterion(network, teacher):
    before = network(torch.ones(1, 4, WIDTH))
    for criterion in ("linear replaceability", "output error", "similarity"):
        asked = Settings(**{**vars(SMALL), "criterion": criterion})
        network.passes = 0
        parts = []
        analysis = analyse(network, teacher, examples(network), asked, lambda *part, parts=parts: parts.append(part))
        assert network.passes == 4 * (1 + 7 * (criterion == "output error"))
        assert [done for done, _ in parts] == [*range(parts[-1][1] + 1)]
        by_run = {score.run.numbers: score.by(criterion) for score in analysis.scores}
        # Of (3, 4) the later goes, which does nothing; of (5, 6) too, which does something.
        assert by_run[4, 5] == pytest.approx(0, abs=1e-6)
        assert by_run[3, 4] == pytest.approx(0, abs=1e-6) if criterion == "output error" else by_run[3, 4] > 0.01
        assert by_run[5, 6] > 0.01 and by_run[2, 3, 4] > 0.01
        decision = decide(network, examples(network), analysis)
        assert decision.errors[criterion] == pytest.approx(0, abs=1e-6) and decision.plan is decision.plans[criterion]
        assert decision.errors[BY_PLACE] >= 0 and not name_map(teacher, decision.plan).removed & {"layers.0", "layers.7"}
        assert decision.report().startswith(f"Chosen by {criterion}: 1 layer block fewer, 12.5% of the parameters\n  fold layer")
        assert plots.run_chart(analysis, decision.plan).size[0] > 500
    assert torch.equal(network(torch.ones(1, 4, WIDTH)), before)
    with pytest.raises(ValueError, match="the output error was not measured"):
        Planner(analysis, "output error").choose()


def test_the_error_of_a_plan_is_that_of_the_student(network, teacher):
    decision = decide(network, examples(network), analyse(network, teacher, examples(network), SMALL))
    plan = decision.plans[BY_PLACE]
    removed, student = name_map(teacher, plan).removed, Network().requires_grad_(False)
    student.layers = nn.ModuleList(network.layers[n] for n in range(DEPTH) if f"layers.{n}" not in removed)
    errors = []

    def measure(predict):
        whole = predict()
        with skipping_blocks(network, teacher, removed):
            skipped = predict()
        errors.append(((skipped - whole).square().mean() / whole.square().mean()).item())

    examples(network).visit(measure)
    inputs = []
    examples(student).visit(lambda predict: inputs.append(predict()))
    wholes = []
    examples(network).visit(lambda predict: wholes.append(predict()))
    by_student = [((a - b).square().mean() / b.square().mean()).item() for a, b in zip(inputs, wholes, strict=True)]
    assert decision.errors[BY_PLACE] == pytest.approx(sum(errors) / 4) == pytest.approx(sum(by_student) / 4)


def test_measuring_can_be_cancelled_and_leaves_nothing_behind(network, teacher):
    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    for criterion in ("linear replaceability", "output error"):
        with pytest.raises(KeyboardInterrupt):
            analyse(network, teacher, examples(network), Settings(**{**vars(SMALL), "criterion": criterion}), stop)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
        assert not any("forward" in vars(module) for module in network.modules())


def by_normal_equations(x, y, half, ridge):
    """The same in as many dimensions as there are channels, with a constant that costs nothing."""
    weight = 1 / y.norm(dim=1, keepdim=True)
    rows = (torch.cat([x, torch.ones(len(x), 1)], 1) * weight).double()
    added, missed = ((y - x) * weight).double(), 0.0
    for fitted_to in range(2):
        own, other = half == fitted_to, half != fitted_to
        lengths = weight[own].double()
        mean = (lengths * rows[own, :-1]).sum(0) / lengths.square().sum()
        strength = ridge * (rows[own, :-1] - lengths * mean).square().sum(1).mean() + 1e-12
        penalty = strength * torch.eye(rows.shape[1], dtype=torch.float64)
        penalty[-1, -1] = 0
        fitted = torch.linalg.solve(rows[own].T @ rows[own] + penalty, rows[own].T @ added[own])
        missed += (added[other] - rows[other] @ fitted).square().sum().item()
    return missed / len(y)


@pytest.mark.parametrize("seed", range(4))
def test_what_a_linear_map_leaves_over_by_the_normal_equations(seed):
    torch.manual_seed(seed)
    x = torch.randn(90, 7) * 3 + 1
    y, half = torch.relu(x @ torch.randn(7, 7)) + x + 0.5 * seed, torch.arange(90) // 3 % 2
    assert left_over_by_linear_map(x, y, half) == pytest.approx(min(by_normal_equations(x, y, half, r) for r in RIDGES), rel=1e-5)


def test_an_affine_map_leaves_nothing_over_and_chance_everything():
    torch.manual_seed(0)
    x, half = torch.randn(400, 20), torch.arange(400) % 2
    assert left_over_by_linear_map(x, x + x @ torch.randn(20, 20) + 3, half) < 1e-6
    assert 0.9 < left_over_by_linear_map(x, torch.randn(400, 20), half) < 1.3
    assert left_over_by_linear_map(x, x, torch.zeros(400)) == 1.0  # nothing to test on


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_plan_costs_least_of_all_that_save_enough(data):
    shapes = {f"double_blocks.{n}.weight": (3, 1) for n in range(4)} | {f"single_blocks.{n}.weight": (2, 1) for n in range(5)}
    teacher = Transformer(FAMILIES["flux1"], shapes)
    asked = Settings(first_stay=0, last_stay=0, longest_run=3, saving=data.draw(st.sampled_from([0.1, 0.3, 0.5])))
    scores = [
        Score(run, data.draw(st.integers(1, 50)) / 10, 0.0, None, sum(shapes[f"{block}.weight"][0] for block in run.lost))
        for run in candidates(teacher, asked)
    ]
    analysis, best = Analysis(teacher, tuple(scores), asked), None
    for count in range(1, 5):
        for chosen in combinations(scores, count):
            blocks = [(score.run.path, number) for score in chosen for number in score.run.numbers]
            if len(set(blocks)) == len(blocks) and sum(s.parameters for s in chosen) >= asked.saving * teacher.num_parameters:
                cost = sum(score.left_over for score in chosen)
                best = cost if best is None else min(best, cost)
    choice = Planner(analysis, "linear replaceability").choose()
    assert choice.cost == pytest.approx(best)
    plan = Planner(analysis, "linear replaceability").plan()
    assert read_plan(plan.name, teacher).fold == plan.fold
    assert {(path, *run) for path, found in folded(teacher, plan).items() for run in found} == {
        (run.path, *run.numbers) for run in choice.runs
    }


def test_too_much_says_how_much_is_possible(network, teacher):
    with pytest.raises(ValueError, match=r"folding at most 3 blocks into one saves 38% of the parameters at most, not 80%; ask"):
        decide(
            network, examples(network), analyse(network, teacher, examples(network), Settings(**{**vars(SMALL), "saving": 0.8}))
        )


def test_one_run():
    assert Run("layers", (3, 4, 5, 6)).lost == {"layers.3", "layers.5", "layers.6"}
