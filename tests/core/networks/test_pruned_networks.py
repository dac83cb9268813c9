"""Laws over random plans: what is pruned answers as the teacher with those blocks passed over, in either layout."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from distill_core.diffusion.conditioning import Label
from distill_core.networks.build import load_unet
from distill_core.networks.files import open_unet, save_unet
from distill_core.pruning.plan import name_map
from distill_core.pruning.plan_text import read_plan, write_plan
from distill_core.pruning.prune import prune, prune_file
from distill_core.pruning.skip import skipping

from ...students import plans

pytestmark = pytest.mark.slow

CLOSE = dict(rtol=1e-4, atol=1e-5)


SD1_PLANS = plans(4, [1, 1, 1, 0], 1)
SDXL_PLANS = plans(3, [0, 2, 4], 4)


def _student(text, teacher):
    """What is left after a plan, or None where the widths of the skip connections rule it out."""
    try:
        return prune(teacher.architecture, read_plan(text, teacher.architecture))
    except ValueError as error:
        assert "channels" in str(error) or "keeps everything" in str(error), error
        return None


def _check(text, teacher, inputs, folder):
    pruning = _student(text, teacher)
    assume(pruning is not None)
    original = {name: weight.detach() for name, weight in teacher.named_parameters().items()}
    if not (folder / "teacher.safetensors").exists():
        save_unet(folder / "teacher.safetensors", original, teacher.architecture)
    file = open_unet(folder / "teacher.safetensors")
    shutil.rmtree(folder / "diffusers", ignore_errors=True)
    (folder / "student.safetensors").unlink(missing_ok=True)
    prune_file(file, folder / "student.safetensors", pruning.plan)
    student = open_unet(folder / "student.safetensors")
    assert dict(student.architecture.shapes) == dict(pruning.student.shapes)
    kept = pruning.weights(original)
    assert student.state_dict.keys() == kept.keys()
    assert all(torch.equal(student.state_dict[name], weight) for name, weight in kept.items())
    # The plan says the same in a line of text.
    again = read_plan(write_plan(pruning.plan, teacher.architecture), teacher.architecture)
    assert name_map(teacher.architecture, again).removed == pruning.mapping.removed
    # So narrow networks normalise over two or three numbers: in float32 the answer hangs on the last digit.
    x, t, context, *label = inputs
    inputs = (x.double(), t, context.double(), *(one.to(context.double()) for one in label))
    exact = replace(teacher, network=copy.deepcopy(teacher.network).double())
    with torch.no_grad():
        answer = _forward(load_unet(student).double(), inputs)
        # The diffusers route, where its config has words for the student.
        try:
            prune_file(file, folder / "diffusers", pruning.plan, layout="diffusers")
        except ValueError as error:
            assert "the diffusers layout cannot express" in str(error)
        else:
            from diffusers import UNet2DConditionModel

            theirs = UNet2DConditionModel.from_pretrained(folder / "diffusers").eval()
            torch.testing.assert_close(_forward(theirs.double(), inputs), answer, rtol=0, atol=1e-5)
        # And the teacher with those blocks passed over, wherever that is defined.
        try:
            with skipping(exact, pruning.mapping):
                skipped = exact(*inputs)
        except ValueError as error:
            assert "cannot be skipped" in str(error)
        else:
            torch.testing.assert_close(skipped, answer, **CLOSE)
            COMPARED.append(text)


COMPARED = []


def _forward(network, inputs):
    x, t, context, *label = inputs
    added = {"text_embeds": label[0].pooled, "time_ids": label[0].sizes} if label else None
    return network(x, t, context, added_cond_kwargs=added).sample


def _folder(tmp_path_factory, name):
    (folder := tmp_path_factory.getbasetemp() / name).mkdir(exist_ok=True)
    return folder


LAW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@LAW
@given(text=SD1_PLANS)
def test_random_plans_of_sd1(text, small_teacher, tmp_path_factory):
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([400]), torch.randn(1, 3, 16)
    _check(text, small_teacher, (x, t, context), _folder(tmp_path_factory, "law"))


@LAW
@given(text=SDXL_PLANS)
def test_random_plans_of_sdxl(text, small_xl_teacher, tmp_path_factory):
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([400]), torch.randn(1, 3, 16)
    label = Label(torch.randn(1, 8), torch.tensor([[64.0, 64, 0, 0, 64, 64]]))
    _check(text, small_xl_teacher, (x, t, context, label), _folder(tmp_path_factory, "law_xl"))


def test_most_plans_could_be_compared_with_the_teacher():
    if not COMPARED:
        pytest.skip("the laws above were not run")
    assert len(COMPARED) >= 50


def test_the_teacher_is_as_it_was_after_passing_over(small_teacher, batch):
    with torch.no_grad():
        before = small_teacher(*batch)
        mapping = prune(small_teacher.architecture, read_plan("keep down 1 mid none up 2", small_teacher.architecture)).mapping
        with pytest.raises(RuntimeError), skipping(small_teacher, mapping):
            assert not torch.equal(small_teacher(*batch), before)
            raise RuntimeError
        assert torch.equal(small_teacher(*batch), before)
