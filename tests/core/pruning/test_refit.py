"""What is left before a cut makes up for what was removed, against a plain computation."""

import copy
from dataclasses import replace

import pytest
import torch

from distill_core.data.dataset import Drawing, draw
from distill_core.demo.teacher import load_dataset, load_denoiser, teacher_file
from distill_core.evaluation.metrics import output_error
from distill_core.networks.name_map import NameMap
from distill_core.pruning.plan import PruningPlan, name_map, preset
from distill_core.pruning.plan_text import read_plan
from distill_core.pruning.recover import RIDGES
from distill_core.pruning.refit import NUM_ROWS, Cut, changes, cuts, refit

from ...students import student_of

PLAN = preset("bk-sdm-base")


def asked(teacher, data, batch_size=4, count=2):
    for number in range(count):
        batch = draw(data, number, teacher.schedule, Drawing(batch_size, seed=5))
        yield batch.x_t, batch.t, batch.context, batch.label


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (PLAN, ["down.0.attn.0 down.0.attn.1", "down.1.attn.0 down.1.attn.1", "down.2.attn.0 down.2.attn.1",
                "down.3.resnet.0 down.3.resnet.1", "up.0.resnet.0 up.0.resnet.1", "up.1.attn.0 up.1.attn.1",
                "up.2.attn.0 up.2.attn.1", "up.3.attn.0 up.3.attn.1"]),
        ("keep down 2,2:0+1,2,2", ["down.1.resnet.0 down.1.attn.0"]),
        ("keep mid resnet", ["mid.resnet.0 mid.resnet.1"]),
        ("keep mid none", []),
        ("keep down 2,2,2,1 up [1,2],3,3,3", ["down.3.resnet.0 down.3.resnet.1"]),  # nothing is before up.0.resnet.0 in its stage
    ],
    ids=["bk-sdm-base", "attention", "mid", "whole mid", "first"],
)  # fmt: skip
def test_a_kept_block_stands_for_the_run_behind_it(plan, expected, small_teacher):
    plan = read_plan(plan, small_teacher.architecture) if isinstance(plan, str) else plan
    found = cuts(small_teacher.architecture, name_map(small_teacher.architecture, plan))
    assert [" ".join(cut) for cut in found] == expected


def test_a_transformer_block_stands_for_those_behind_it_in_its_stack(small_xl_teacher):
    keep = PruningPlan(name="thinned", keep={"down.2.attn.0": (1, 3), "mid.attn.0": (0,)})
    depths = {attention: small_xl_teacher.architecture.depth(attention) for attention in keep.keep}
    found = cuts(small_xl_teacher.architecture, name_map(small_xl_teacher.architecture, keep))
    ends = [(1, 2), *([(3, depths["down.2.attn.0"] - 1)] if depths["down.2.attn.0"] > 4 else [])]
    expected = [Cut(f"down.2.attn.0.block.{a}", f"down.2.attn.0.block.{b}") for a, b in ends]
    expected.append(Cut("mid.attn.0.block.0", f"mid.attn.0.block.{depths['mid.attn.0'] - 1}"))
    assert found == expected
    assert found[0].layer == "down.2.attn.0.block.1.ff.net.2"


def seen(teacher, batches, name):
    """Inputs and outputs of a module, as rows: those of examples with even numbers, and of the others."""
    rows = {"in": [], "out": []}

    def keep(module, inputs, output):
        for kind, value in (
            ("in", inputs[0]),
            ("out", output[0] if isinstance(output, tuple) else getattr(output, "sample", output)),
        ):
            value = value.flatten(2).transpose(1, 2) if value.ndim == 4 else value
            rows[kind] += list(value[:, :: -(-value.shape[1] // NUM_ROWS)].double())

    handle = teacher.module(name).register_forward_hook(keep)
    with torch.no_grad():
        for batch in batches:
            teacher(*batch)
    handle.remove()
    return {kind: [torch.cat(found[start::2]) for start in (0, 1)] for kind, found in rows.items()}


def ridge_map(x, d, ridge):
    """By least squares on rows to which those of the ridge are added."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    root = (ridge * x[:, :-1].square().sum(0).mean() + 1e-12).sqrt()
    extended = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(extended, torch.cat([d, torch.zeros(x.shape[1], d.shape[1], dtype=x.dtype)])).solution


def missed(x, d, fitted):
    return (d - x @ fitted[:-1] - fitted[-1]).square().sum()


@pytest.mark.parametrize("cut", [Cut("up.2.attn.0", "up.2.attn.1"), Cut("down.3.resnet.0", "down.3.resnet.1")], ids=" ".join)
def test_the_map_is_that_of_plain_least_squares(cut, small_teacher, small_data):
    batches = list(asked(small_teacher, small_data))
    x = seen(small_teacher, batches, cut.layer)["in"]
    before, after = (seen(small_teacher, batches, name)["out"] for name in cut)
    d = [b - a for a, b in zip(before, after, strict=True)]
    best = min(RIDGES, key=lambda r: missed(x[0], d[0], ridge_map(x[1], d[1], r)) + missed(x[1], d[1], ridge_map(x[0], d[0], r)))
    x, d = torch.cat(x), torch.cat(d)
    expected = ridge_map(x, d, best)
    change = changes(small_teacher, batches, [cut])[cut]
    assert (change.weight.T - expected[:-1]).norm() < 1e-3 * expected[:-1].norm()
    assert (change.bias - expected[-1]).norm() < 1e-3 * expected[-1].norm() + 1e-5
    assert change.explained == pytest.approx(1 - (missed(x, d, expected) / d.square().sum()).item(), abs=1e-3)


def test_only_the_layers_before_cuts_change_by_what_was_found(small_teacher, small_data):
    student, batches = student_of(small_teacher, PLAN), list(asked(small_teacher, small_data))
    mapping = name_map(small_teacher.architecture, PLAN)
    before = {name: weight.detach().clone() for name, weight in student.named_parameters().items()}
    theirs = copy.deepcopy(small_teacher.network.state_dict())
    made = refit(student, small_teacher, mapping, batches)
    expected = changes(small_teacher, batches, cuts(small_teacher.architecture, mapping))
    assert made.keys() == expected.keys()
    changed = set()
    for cut, change in expected.items():
        weight, bias = (f"{mapping.rename(cut.layer)}.{part}" for part in ("weight", "bias"))
        moved = {name: student.named_parameters()[name].detach() - before[name] for name in (weight, bias)}
        middle = (
            moved[weight]
            if moved[weight].ndim == 2
            else moved[weight][..., moved[weight].shape[2] // 2, moved[weight].shape[3] // 2]
        )
        torch.testing.assert_close(middle, change.weight, rtol=1e-3, atol=1e-6)
        assert moved[weight].norm() == pytest.approx(middle.norm())  # the rest of a kernel stays
        torch.testing.assert_close(moved[bias], change.bias, rtol=1e-3, atol=1e-6)
        changed |= {weight, bias}
    now = student.named_parameters()
    assert {name for name in before if not torch.equal(now[name], before[name])} == changed
    assert all(torch.equal(weight, theirs[name]) for name, weight in small_teacher.network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_student_that_was_trained_stays_as_it_is(dtype, small_teacher, small_data):
    teacher = replace(small_teacher, network=copy.deepcopy(small_teacher.network).to(dtype).float())
    teacher.network.to(dtype)
    student, mapping = student_of(small_teacher, PLAN), name_map(small_teacher.architecture, PLAN)
    batches = [tuple(part if part is None or not part.is_floating_point() else part.to(dtype) for part in batch)
               for batch in asked(small_teacher, small_data)]  # fmt: skip
    assert len(refit(student, teacher, mapping, batches)) == 8
    assert not refit(student, teacher, mapping, batches)  # it has been refitted
    trained = student_of(small_teacher, PLAN)
    with torch.no_grad():
        for weight in trained.network.parameters():
            weight += 1e-3 * torch.randn_like(weight)
    assert not refit(trained, teacher, mapping, batches)


def test_nothing_is_fitted_where_nothing_was_removed_or_there_is_one_example(small_teacher, small_data):
    student = student_of(small_teacher, PLAN)
    assert not changes(
        small_teacher, asked(small_teacher, small_data, batch_size=1, count=1), [Cut("up.1.attn.0", "up.1.attn.1")]
    )
    assert not refit(student, small_teacher, NameMap.identity(small_teacher.architecture), [])


def test_it_makes_up_for_more_than_half_of_the_error_in_a_model_that_has_learnt():
    teacher, data = load_denoiser(teacher_file()), load_dataset(256)
    student = student_of(teacher, PLAN)
    before = output_error(student, teacher, data, seed=9).mean()
    refit(student, teacher, name_map(teacher.architecture, PLAN), asked(teacher, data, batch_size=64))
    assert output_error(student, teacher, data, seed=9).mean() < 0.5 * before
