import pytest
import torch

from distill_core.denoiser import tap
from distill_core.objective import OBJECTIVES, Objective, Outputs, feature_points, objective, squared_error
from distill_core.plan import name_map, preset, pruned

from .test_plan import student_of

# BK-SDM's own points, teacher <- student, in canonical names: outputs of every down and up stage, the mid block none.
POINTS = {
    "bk-sdm-base": {
        "down.0.downsample": "down.0.downsample", "down.1.downsample": "down.1.downsample",
        "down.2.downsample": "down.2.downsample", "down.3.resnet.1": "down.3.resnet.0",
        "up.0.upsample": "up.0.upsample", "up.1.upsample": "up.1.upsample", "up.2.upsample": "up.2.upsample",
        "up.3.attn.2": "up.3.attn.1",
    },
    "bk-sdm-tiny": {
        "down.0.downsample": "down.0.downsample", "down.1.downsample": "down.1.downsample",
        "down.2.attn.1.proj_out": "down.2.attn.0.proj_out",
        "up.1.upsample": "up.0.upsample", "up.2.upsample": "up.1.upsample", "up.3.attn.2": "up.2.attn.1",
    },
}  # fmt: skip
POINTS["bk-sdm-small"] = POINTS["bk-sdm-base"]


@pytest.mark.parametrize("name", POINTS)
def test_features_are_taken_at_the_papers_points(name, sd15):
    mapping = name_map(sd15, preset(name))
    assert feature_points(sd15, pruned(sd15, mapping), mapping) == POINTS[name]


@pytest.mark.parametrize("name", POINTS)
def test_bk_sdm_equals_a_plain_computation_in_value_and_gradient(name, small_teacher, batch):
    student = student_of(small_teacher, preset(name))
    x_t, t, context = batch
    target = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
    mapping = name_map(small_teacher.architecture, preset(name))
    points = feature_points(small_teacher.architecture, student.architecture, mapping)
    with tap(student, points.values()) as ours, tap(small_teacher, points) as theirs:
        with torch.no_grad():
            answer = small_teacher(x_t, t, context)
        from_teacher = Outputs(answer, {points[n]: f for n, f in theirs.items()})
        from_student = Outputs(student(x_t, t, context), dict(ours))
    aim = OBJECTIVES["bk-sdm"]
    terms = aim.terms(target, from_student, from_teacher)
    parameters = list(student.network.parameters())
    gradient = torch.autograd.grad(aim.total(terms), parameters, retain_graph=True)

    # arXiv 2305.15798, Eq. 1 to 4, with diffusers' own block outputs for features.
    mse = torch.nn.functional.mse_loss
    plain = mse(from_student.prediction, target) + mse(from_student.prediction, answer)
    for theirs_name, ours_name in points.items():
        plain = plain + mse(ours[ours_name], theirs[theirs_name])
    expected = torch.autograd.grad(plain, parameters)
    torch.testing.assert_close(aim.total(terms), plain)
    for got, wanted in zip(gradient, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_tapped_stage_outputs_are_what_diffusers_blocks_return(small_teacher, batch):
    blocks = {"down.0.downsample": "down_blocks.0", "down.3.resnet.1": "down_blocks.3", "up.0.upsample": "up_blocks.0",
              "up.3.attn.2": "up_blocks.3"}  # fmt: skip
    seen = {}
    handles = [
        small_teacher.network.get_submodule(path).register_forward_hook(
            lambda m, i, o, name=name: seen.update({name: o[0] if isinstance(o, tuple) else o})
        )
        for name, path in blocks.items()
    ]
    with torch.no_grad(), tap(small_teacher, blocks) as features:
        small_teacher(*batch)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(features[name], seen[name]) for name in blocks)


def test_taps_are_gone_after_use(small_teacher, batch):
    with tap(small_teacher, ["mid.resnet.0"]) as features:
        pass
    with torch.no_grad():
        small_teacher(*batch)
    assert not features


def test_losses_are_per_sample():
    a, b = torch.zeros(3, 2, 2), torch.stack([torch.full((2, 2), float(n)) for n in range(3)])
    assert squared_error(a, b).tolist() == [0.0, 1.0, 4.0]


def test_weights_scale_their_terms():
    outputs = Outputs(torch.zeros(2, 1, 2, 2), {})
    teacher = Outputs(torch.full((2, 1, 2, 2), 3.0), {})
    aim = Objective(weights={"task": 0.5, "output": 2.0})
    terms = aim.terms(torch.ones(2, 1, 2, 2), outputs, teacher)
    assert aim.total(terms).item() == 0.5 * 1 + 2.0 * 9
    assert set(Objective(weights={"task": 1.0, "output": 0.0}).terms(torch.ones(2, 1, 2, 2), outputs, teacher)) == {"task"}


@pytest.mark.parametrize("weights", [{"taks": 1.0}, {"task": -1.0}, {"task": 0.0}, {}])
def test_bad_objectives_are_refused(weights):
    with pytest.raises(ValueError):
        Objective(weights=weights)
    with pytest.raises(ValueError, match="bk-sdm"):
        objective("bk")
