"""What is left before a cut makes up for what was removed, against a plain computation."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from distill_core.data.dataset import Batching, draw
from distill_core.demo.teacher import load_dataset, load_denoiser, teacher_file
from distill_core.evaluation.metrics import output_error
from distill_core.networks.name_map import NameMap
from distill_core.pruning.plan import PruningPlan, name_map, preset
from distill_core.pruning.plan_text import read_plan
from distill_core.training.refit import NUM_PLACES, RIDGES, Cut, cuts, refit

from ...students import student_of

PLAN = preset("bk-sdm-base")


def asked(teacher, data, batch_size=3, count=3):
    """Examples, as `refit` takes them."""

    def part(number):
        batch = draw(data, number, teacher.schedule, Batching(batch_size, seed=5))
        return batch.x_t, batch.t, batch.context, batch.label

    return [partial(part, number) for number in range(count)]


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


def seen(teacher, parts, name):
    """Inputs and outputs of a module, as rows: those of examples with even numbers, and of the others."""
    rows = {"in": [], "out": []}

    def keep(module, inputs, output):
        for kind, value in (
            ("in", inputs[0]),
            ("out", output[0] if isinstance(output, tuple) else getattr(output, "sample", output)),
        ):
            value = value.flatten(2).transpose(1, 2) if value.ndim == 4 else value
            rows[kind] += list(value[:, :: -(-value.shape[1] // NUM_PLACES)].double())

    handle = teacher.module(name).register_forward_hook(keep)
    with torch.no_grad():
        for part in parts:
            teacher(*part())
    handle.remove()
    return {kind: [torch.cat(found[start::2]) for start in (0, 1)] for kind, found in rows.items()}


def ridge_map(x, d, ridge):
    """By least squares on rows to which those of the ridge are added."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    root = (ridge * x[:, :-1].square().sum(0).mean() + 1e-12).sqrt()
    pull = root * torch.eye(x.shape[1], dtype=x.dtype)
    pull[-1] = 0  # the constant is free
    extended = torch.cat([x, pull])
    return torch.linalg.lstsq(extended, torch.cat([d, torch.zeros(x.shape[1], d.shape[1], dtype=x.dtype)])).solution


def missed(x, d, fitted):
    return (d - x @ fitted[:-1] - fitted[-1]).square().sum()


@pytest.mark.parametrize("cut", [Cut("up.2.attn.0", "up.2.attn.1"), Cut("down.3.resnet.0", "down.3.resnet.1")], ids=" ".join)
def test_the_map_is_that_of_plain_least_squares(cut, small_teacher, small_data):
    parts = asked(small_teacher, small_data)
    x = seen(small_teacher, parts, cut.layer)["in"]
    before, after = (seen(small_teacher, parts, name)["out"] for name in cut)
    d = [b - a for a, b in zip(before, after, strict=True)]
    missing = {r: missed(x[0], d[0], ridge_map(x[1], d[1], r)) + missed(x[1], d[1], ridge_map(x[0], d[0], r)) for r in RIDGES}
    best = min(missing, key=missing.get)
    expected, whole = ridge_map(torch.cat(x), torch.cat(d), best), torch.cat(d).square().sum()
    mapping = name_map(small_teacher.architecture, PLAN)
    change = refit(student_of(small_teacher, PLAN), small_teacher, mapping, parts)[cut]
    assert (change.weight.T - expected[:-1]).norm() < 1e-3 * expected[:-1].norm()
    assert (change.bias - expected[-1]).norm() < 1e-3 * expected[-1].norm() + 1e-5
    assert change.explained == pytest.approx(1 - (missing[best] / whole).item(), abs=1e-3)


def test_only_the_layers_before_cuts_change_by_what_was_found(small_teacher, small_data):
    student, mapping, told = student_of(small_teacher, PLAN), name_map(small_teacher.architecture, PLAN), []
    before = {name: weight.detach().clone() for name, weight in student.named_parameters().items()}
    theirs = copy.deepcopy(small_teacher.network.state_dict())
    made = refit(student, small_teacher, mapping, asked(small_teacher, small_data), lambda *done: told.append(done))
    assert [*made] == cuts(small_teacher.architecture, mapping)
    assert told == [(done, 3 + 8) for done in range(3 + 8 + 1)]
    now, changed = student.named_parameters(), set()
    for cut, change in made.items():
        weight, bias = (f"{mapping.rename(cut.layer)}.{part}" for part in ("weight", "bias"))
        moved = {name: now[name].detach() - before[name] for name in (weight, bias)}
        kernel = moved[weight].shape[2:]
        middle = moved[weight][(..., *(side // 2 for side in kernel))]
        torch.testing.assert_close(middle, change.weight, rtol=1e-3, atol=1e-6)
        assert moved[weight].norm() == pytest.approx(middle.norm().item())  # the rest of a kernel stays
        torch.testing.assert_close(moved[bias], change.bias, rtol=1e-3, atol=1e-6)
        changed |= {weight, bias}
    assert {name for name in before if not torch.equal(now[name], before[name])} == changed
    assert all(torch.equal(weight, theirs[name]) for name, weight in small_teacher.network.state_dict().items())


@pytest.mark.parametrize("stop", [0, 4, 11])
def test_stopped_at_any_time_it_leaves_the_student_as_it_was_or_as_it_should_be(stop, small_teacher, small_data):
    def cancel(done, total):
        if done == stop:
            raise KeyboardInterrupt

    mapping, parts = name_map(small_teacher.architecture, PLAN), asked(small_teacher, small_data)
    student, expected = student_of(small_teacher, PLAN), student_of(small_teacher, PLAN)
    with pytest.raises(KeyboardInterrupt):
        refit(student, small_teacher, mapping, parts, cancel)
    if stop == 11:
        refit(expected, small_teacher, mapping, parts)
    theirs = expected.named_parameters()
    assert all(torch.equal(weight, theirs[name]) for name, weight in student.named_parameters().items())


@pytest.mark.parametrize("of_student", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_teacher", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_student_that_was_trained_stays_as_it_is(of_teacher, of_student, small_teacher, small_data):
    """In whatever precision: the weights of files are in float16."""
    base = replace(small_teacher, network=copy.deepcopy(small_teacher.network).half().float())
    teacher = replace(base, network=copy.deepcopy(base.network).to(of_teacher))
    mapping, parts = name_map(base.architecture, PLAN), asked(base, small_data)

    def student(change=0.0):
        made = student_of(base, PLAN)
        with torch.no_grad():
            for weight in made.network.parameters():
                weight += change * torch.randn_like(weight)
        made.network.to(of_student)
        return made

    fresh = student()
    assert len(refit(fresh, teacher, mapping, parts)) == 8
    assert all(weight.isfinite().all() for weight in fresh.network.parameters())
    assert not refit(fresh, teacher, mapping, parts)  # it has been refitted
    assert not refit(student(1e-4), teacher, mapping, parts)


def test_one_example_and_a_student_without_cuts_change_nothing(small_teacher, small_data):
    mapping = name_map(small_teacher.architecture, PLAN)
    student, parts = student_of(small_teacher, PLAN), asked(small_teacher, small_data, batch_size=1, count=1)
    assert not refit(student, small_teacher, mapping, parts)
    assert not refit(small_teacher, small_teacher, NameMap.identity(small_teacher.architecture), parts)


def test_activations_that_are_not_finite_are_one_clear_sentence(small_teacher, small_data):
    teacher = replace(small_teacher, network=copy.deepcopy(small_teacher.network))
    student, mapping = student_of(small_teacher, PLAN), name_map(small_teacher.architecture, PLAN)
    teacher.named_parameters()["up.2.attn.1.proj_in.weight"].data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="the teacher's up.2.attn.1 is not finite in this precision"):
        refit(student, teacher, mapping, asked(small_teacher, small_data))


def test_it_makes_up_for_more_than_half_of_the_error_in_a_model_that_has_learnt():
    teacher, data = load_denoiser(teacher_file()), load_dataset(256)
    student = student_of(teacher, PLAN)
    before = output_error(student, teacher, data, seed=9).mean()
    refit(student, teacher, name_map(teacher.architecture, PLAN), asked(teacher, data, batch_size=64, count=2))
    assert output_error(student, teacher, data, seed=9).mean() < 0.5 * before
