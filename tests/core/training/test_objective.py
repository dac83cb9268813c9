import pytest
import torch

from distill_core.diffusion.denoiser import tap
from distill_core.diffusion.distance import squared_error
from distill_core.diffusion.schedule import NoiseSchedule, from_signal_power
from distill_core.pruning.plan import name_map, preset, pruned
from distill_core.training.objective import OBJECTIVES, Objective, Outputs
from distill_core.training.weighting import example_weights

from ...students import student_of

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
    assert OBJECTIVES["bk-sdm"].feature_layers(sd15, pruned(sd15, mapping), mapping) == POINTS[name]


def points_of(objective_name, preset_name, teacher):
    mapping = name_map(teacher, preset(preset_name))
    return OBJECTIVES[objective_name].feature_layers(teacher, pruned(teacher, mapping), mapping)


def test_segmind_also_compares_the_mid_block(sd15):
    small = points_of("segmind", "segmind-small-sd", sd15)
    assert small == POINTS["bk-sdm-base"] | {"mid.resnet.1": "mid.resnet.1"} and len(small) == 9


def test_segmind_tiny_learns_what_came_out_of_the_stages_that_went(sd15):
    assert points_of("segmind", "segmind-tiny-sd", sd15) == {
        "down.0.downsample": "down.0.downsample", "down.1.downsample": "down.1.downsample", "up.0.upsample": "down.2.attn.0",
        "up.1.upsample": "up.0.upsample", "up.2.upsample": "up.1.upsample", "up.3.attn.2": "up.2.attn.1",
    }  # fmt: skip


def test_ssd_1b_compares_26_layers(published):
    points = points_of("ssd-1b", "ssd-1b", published["sdxl"])
    sides = [(name.split(".")[0], name.split(".")[2] if "." in name else "") for name in points.values()]
    assert len(points) == 26 and points["mid.resnet.1"] == "mid.resnet.0"
    assert [sides.count(s) for s in (("down", "resnet"), ("down", "attn"), ("up", "resnet"), ("up", "attn"))] == [6, 4, 9, 6]


def test_koala_compares_the_self_attention_of_every_block_that_stays(published):
    points = points_of("koala", "koala-700m", published["sdxl"])
    student = pruned(published["sdxl"], name_map(published["sdxl"], preset("koala-700m")))
    blocks = [block for block in student.blocks if ".block." in block]
    assert sorted(points.values()) == sorted(f"{block}.attn1" for block in blocks) and len(blocks) == 21


# Written out by hand from the papers, in diffusers' names: teacher's module, student's module.
BY_HAND = {
    ("segmind", "bk-sdm-tiny"): (1.0, 0.5, 0.5, False, [
        ("down_blocks.0", "down_blocks.0"), ("down_blocks.1", "down_blocks.1"), ("up_blocks.0", "down_blocks.2"),
        ("up_blocks.1", "up_blocks.0"), ("up_blocks.2", "up_blocks.1"), ("up_blocks.3", "up_blocks.2")]),
    ("segmind", "bk-sdm-base"): (1.0, 0.5, 0.5, False, [
        *((f"{side}_blocks.{i}", f"{side}_blocks.{i}") for side in ("down", "up") for i in range(4)), ("mid_block", "mid_block")]),
    ("bk-sdm", "bk-sdm-base"): (1.0, 1.0, 1.0, False, [
        (f"{side}_blocks.{i}", f"{side}_blocks.{i}") for side in ("down", "up") for i in range(4)]),
    ("bk-sdm", "bk-sdm-tiny"): (1.0, 1.0, 1.0, False, [
        ("down_blocks.0", "down_blocks.0"), ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
        ("up_blocks.1", "up_blocks.0"), ("up_blocks.2", "up_blocks.1"), ("up_blocks.3", "up_blocks.2")]),
    ("laptop-diff", "bk-sdm-small"): (1.0, 1.0, 1.0, True, [
        (f"{side}_blocks.{i}", f"{side}_blocks.{i}") for side in ("down", "up") for i in range(4)]),
    ("koala", "bk-sdm-base"): (1.0, 1.0, 1.0, False, [
        *((f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn1",) * 2 for i in range(3)),
        *((f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.attn1", f"up_blocks.{i}.attentions.{k}.transformer_blocks.0.attn1")
          for i in (1, 2, 3) for j, k in ((0, 0), (2, 1))),
        ("mid_block.attentions.0.transformer_blocks.0.attn1",) * 2]),
    ("ssd-1b", "bk-sdm-base"): (1.0, 0.5, 0.5, False, [
        *((f"down_blocks.{i}.resnets.0",) * 2 for i in range(4)), *((f"down_blocks.{i}.attentions.0",) * 2 for i in range(3)),
        *((f"up_blocks.{i}.resnets.{j}", f"up_blocks.{i}.resnets.{k}") for i in range(4) for j, k in ((0, 0), (2, 1))),
        *((f"up_blocks.{i}.attentions.{j}", f"up_blocks.{i}.attentions.{k}") for i in (1, 2, 3) for j, k in ((0, 0), (2, 1))),
        ("mid_block", "mid_block")]),
    ("task", "bk-sdm-base"): (1.0, 0.0, 0.0, False, []),
}  # fmt: skip


def caught(denoiser, paths, inputs):
    """The network's answer and the outputs of its modules by diffusers' own names."""
    seen = {}

    def catch(path):
        def hook(module, inputs, output):
            seen[path] = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)

        return denoiser.network.get_submodule(path).register_forward_hook(hook)

    handles = [catch(path) for path in paths]
    answer = denoiser(*inputs)
    for handle in handles:
        handle.remove()
    return answer, seen


@pytest.mark.parametrize("objective_name,preset_name", BY_HAND)
def test_each_objective_equals_a_plain_computation_in_value_and_gradient(objective_name, preset_name, small_teacher, batch):
    student, aim = student_of(small_teacher, preset(preset_name)), OBJECTIVES[objective_name]
    mapping = name_map(small_teacher.architecture, preset(preset_name))
    points = aim.feature_layers(small_teacher.architecture, student.architecture, mapping)
    target = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(5))
    parameters = list(student.network.parameters())
    with tap(student, points.values()) as ours, tap(small_teacher, points) as theirs:
        with torch.no_grad():
            answer = small_teacher(*batch)
        from_teacher = Outputs(answer, {points[n]: f for n, f in theirs.items()})
        total = aim.total(aim.terms(target, Outputs(student(*batch), dict(ours)), from_teacher)).mean()
    gradient = torch.autograd.grad(total, parameters, allow_unused=True)

    task, output, feature, normalised, pairs = BY_HAND[objective_name, preset_name]
    with torch.no_grad():
        answer, theirs = caught(small_teacher, [pair[0] for pair in pairs], batch)
    own, ours = caught(student, [pair[1] for pair in pairs], batch)
    plain = task * ((own - target) ** 2).mean() + output * ((own - answer) ** 2).mean()
    for theirs_name, ours_name in pairs:
        error = ((ours[ours_name] - theirs[theirs_name]) ** 2).flatten(1).sum(1)
        scale = (theirs[theirs_name] ** 2).flatten(1).sum(1) if normalised else ours[ours_name][0].numel()
        plain = plain + feature * (error / scale).mean()
    expected = torch.autograd.grad(plain, parameters, allow_unused=True)
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(gradient, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=5e-6)


# alpha^2 = 0.8 and 0.2: SNR 4 and 1/4. By hand from the papers' own forms.
@pytest.mark.parametrize("weighting,prediction_name,expected", [
    ("none", "eps", [1, 1]),
    ("min-snr", "eps", [2 / 4, 1]), ("min-snr", "v", [2 / 5, 0.25 / 1.25]), ("min-snr", "x0", [2, 0.25]),
    ("debiased", "eps", [1 / 2, 2]), ("debiased", "v", [2 / 5, 0.5 / 1.25]), ("debiased", "x0", [2, 0.5]),
])  # fmt: skip
def test_weightings_by_hand(weighting, prediction_name, expected):
    schedule = from_signal_power(torch.tensor([0.8, 0.2]))
    weights = example_weights(weighting, prediction_name, schedule, torch.tensor([0, 1]), gamma=2.0)
    assert weights.tolist() == pytest.approx(expected)


def test_weightings_of_a_flow_by_hand():
    # x_t = 3/4 x0 + 1/4 eps: SNR 9, and an error of the velocity is a quarter of it in x0.
    schedule = NoiseSchedule(torch.tensor([0.75], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64))
    at = schedule, torch.tensor([0])
    assert example_weights("min-snr", "flow", *at, gamma=5.0).item() == pytest.approx(5 / 16)
    assert example_weights("debiased", "flow", *at).item() == pytest.approx(3 / 16)


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


@pytest.mark.parametrize("kind", ["squared", "normalised"])
def test_of_features_nothing_but_their_difference_is_kept(kind):
    ours = {name: torch.randn(2, 3, 8, 8).requires_grad_(True) for name in ("a", "b")}
    theirs = {name: torch.randn(2, 3, 8, 8) for name in ours}
    student, teacher, kept = Outputs(torch.zeros(0), dict(ours)), Outputs(torch.zeros(0), dict(theirs)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        terms = Objective(feature=1.0, feature_loss=kind).terms(torch.zeros(0), student, teacher)
    assert not student.features and not teacher.features
    large = [tensor.reshape(ours["a"].shape) for tensor in kept if tensor.numel() == ours["a"].numel()]
    for name, difference in zip(ours, large, strict=True):
        torch.testing.assert_close(difference, ours[name] - theirs[name])
    # And it is enough for the gradient.
    (gradient,) = torch.autograd.grad(sum(terms.values()).sum(), ours["a"])
    scale = theirs["a"].square().flatten(1).mean(1) if kind == "normalised" else torch.ones(2)
    torch.testing.assert_close(gradient, 2 * (ours["a"] - theirs["a"]) / (3 * 8 * 8 * scale[:, None, None, None]))


def test_weights_scale_their_terms():
    outputs = Outputs(torch.zeros(2, 1, 2, 2), {})
    teacher = Outputs(torch.full((2, 1, 2, 2), 3.0), {})
    aim = Objective(task=0.5, output=2.0)
    terms = aim.terms(torch.ones(2, 1, 2, 2), outputs, teacher)
    assert aim.total(terms).tolist() == [0.5 * 1 + 2.0 * 9] * 2
    assert set(Objective(task=1.0, output=0.0).terms(torch.ones(2, 1, 2, 2), outputs, teacher)) == {"task"}


@pytest.mark.parametrize("weights", [{"task": -1.0}, {"task": float("nan")}, {"feature": float("inf")}, {"task": 0.0}, {}])
def test_bad_objectives_are_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        Objective(**weights)
