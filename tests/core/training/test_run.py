import copy
import shutil
from dataclasses import replace

import pytest
import torch

from distill_core.data.dataset import LatentDataset
from distill_core.networks.files import open_unet
from distill_core.pruning.plan import plan_in, preset
from distill_core.training.loop import distill
from distill_core.training.run import Inputs, Run
from distill_core.training.settings import TrainingSettings

from ...students import student_of

pytestmark = pytest.mark.slow

PLAN = preset("bk-sdm-base")
RECIPE = TrainingSettings(
    total_steps=6, batch_size=2, learning_rate=1e-3, lr_schedule="cosine", warmup_steps=2, save_every_steps=2, seed=3
)


@pytest.fixture(scope="module")
def data():
    random = torch.Generator().manual_seed(0)
    latents, contexts = torch.randn(5, 4, 8, 8, generator=random), torch.randn(5, 4, 16, generator=random)
    return LatentDataset.of(latents, contexts, torch.zeros(4, 16))


def train(folder, teacher, data, recipe=RECIPE, **options):
    run = Run(folder, recipe, Inputs(data=data.fingerprint))
    student = student_of(teacher, PLAN)
    distill(run, student=student, teacher=teacher, plan=PLAN, dataset=data, **options)
    return run, student


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, small_teacher, data):
    return train(tmp_path_factory.mktemp("run") / "whole", small_teacher, data)


def same_weights(run, other):
    ours, theirs = open_unet(run.result_file).state_dict, open_unet(other.result_file).state_dict
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


class Cancelled(BaseException):
    """As ComfyUI's InterruptProcessingException, no Exception."""


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_cancelled_and_resumed_equals_uninterrupted_bit_for_bit(stop_at, tmp_path, small_teacher, data, uninterrupted):
    def cancel(progress):
        if progress.step == stop_at:
            raise Cancelled

    with pytest.raises(Cancelled):
        train(tmp_path / "run", small_teacher, data, on_step=cancel)
    assert Run(tmp_path / "run", RECIPE, Inputs(data=data.fingerprint)).step == stop_at
    run, student = train(tmp_path / "run", small_teacher, data)
    assert run.complete and same_weights(run, uninterrupted[0])
    assert run.metrics_file.read_bytes() == uninterrupted[0].metrics_file.read_bytes()


def test_an_interrupt_in_mid_forward_loses_that_step_alone(tmp_path, small_teacher, data, uninterrupted):
    calls = []

    class Interrupting(type(small_teacher)):
        def __call__(self, *inputs):
            calls.append(1)
            if len(calls) == 4:
                raise Cancelled
            return super().__call__(*inputs)

    teacher = Interrupting(network=small_teacher.network, architecture=small_teacher.architecture)
    with pytest.raises(Cancelled):
        train(tmp_path / "run", teacher, data)
    run, _ = train(tmp_path / "run", small_teacher, data)
    assert same_weights(run, uninterrupted[0])


def test_a_crash_between_checkpoints_resumes_from_the_last(tmp_path, small_teacher, data, uninterrupted, monkeypatch):
    """A killed process saves nothing at the end, and leaves metrics of steps that are lost."""
    save, saved = Run.save, []

    def save_until_killed(self, state, *rest):
        if state.step > 2:
            raise MemoryError("killed")
        saved.append(state.step)
        save(self, state, *rest)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(Run, "save", save_until_killed)
        train(tmp_path / "run", small_teacher, data)
    assert saved == [2]
    run, _ = train(tmp_path / "run", small_teacher, data)
    assert same_weights(run, uninterrupted[0])
    assert run.metrics_file.read_bytes() == uninterrupted[0].metrics_file.read_bytes()


def test_some_steps_at_a_time_equal_all_at_once(tmp_path, small_teacher, data, uninterrupted):
    for expected in (2, 4, 6):
        run, _ = train(tmp_path / "run", small_teacher, data, num_steps=2)
        assert run.step == expected
    assert same_weights(run, uninterrupted[0])


def test_a_complete_run_trains_no_more(small_teacher, data, uninterrupted):
    run, student = uninterrupted
    before = run.metrics_file.stat().st_mtime_ns
    distill(run, student=student, teacher=small_teacher, plan=PLAN, dataset=data, on_step=lambda _: pytest.fail("trained"))
    assert run.metrics_file.stat().st_mtime_ns == before


def test_the_trained_network_is_the_saved_one(uninterrupted):
    run, student = uninterrupted
    saved = open_unet(run.result_file)
    assert all(torch.equal(saved.state_dict[n], w) for n, w in student.named_parameters().items())
    assert plan_in(saved.metadata).name == PLAN.name
    assert [int(c.name) for c in run.checkpoints] == [4, 6]


def test_the_teacher_is_untouched(tmp_path, small_teacher, data):
    before = {n: w.clone() for n, w in small_teacher.named_parameters().items()}
    train(tmp_path / "run", small_teacher, data, num_steps=1)
    assert all(torch.equal(before[n], w) and w.grad is None for n, w in small_teacher.named_parameters().items())


def test_metrics_hold_every_term_and_add_up(uninterrupted):
    rows = uninterrupted[0].metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        points = [value for name, value in row.items() if name.startswith("feature/")]
        assert len(points) == 8
        assert row["feature"] == pytest.approx(sum(points), rel=1e-5)
        assert row["total"] == pytest.approx(row["task"] + row["output"] + row["feature"], rel=1e-5)


def test_training_lowers_the_loss(tmp_path, small_teacher, data):
    run, _ = train(tmp_path / "run", small_teacher, data, replace(RECIPE, total_steps=40, batch_size=4, learning_rate=2e-3))
    total = [row["total"] for row in run.metrics()]
    assert sum(total[-5:]) < 0.8 * sum(total[:5])


def test_fine_tuning_needs_no_features(tmp_path, small_teacher, data):
    run, _ = train(tmp_path / "run", small_teacher, data, replace(RECIPE, objective="task", total_steps=1))
    assert {name.split("/")[0] for name in run.metrics()[0]} == {"step", "lr", "total", "task", "norm", "timesteps"}


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"seed": 4}, {"batch_size": 3}, {"objective": "task"}])
def test_a_run_with_other_settings_is_refused_by_name(change, small_teacher, data, uninterrupted):
    (name,) = change
    with pytest.raises(ValueError, match=f"started with {name} = .*another name"):
        Run(uninterrupted[0].folder, replace(RECIPE, **change), Inputs(data=data.fingerprint))


def test_a_run_older_than_a_setting_goes_on_where_that_is_left_alone(data, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted[0].folder, tmp_path / "older")
    written = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(written.replace("snr_gamma = 5.0\n", ""))
    assert Run(folder, RECIPE, Inputs(data=data.fingerprint)).complete
    (folder / "recipe.toml").write_text(written.replace("snr_gamma = 5.0\n", ""))
    with pytest.raises(ValueError, match="started with snr_gamma = 5.0"):
        Run(folder, replace(RECIPE, snr_gamma=2.0), Inputs(data=data.fingerprint))


def test_a_run_on_other_data_is_refused(uninterrupted):
    with pytest.raises(ValueError, match="started with data = "):
        Run(uninterrupted[0].folder, RECIPE, Inputs(data="0" * 16))


def test_the_total_may_be_raised_where_that_changes_no_step(tmp_path, small_teacher, data):
    recipe = replace(RECIPE, lr_schedule="constant", total_steps=2)
    train(tmp_path / "run", small_teacher, data, recipe)
    run, _ = train(tmp_path / "run", small_teacher, data, replace(recipe, total_steps=3))
    assert run.step == 3


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a run"):
        Run(tmp_path, RECIPE)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_that_never_finished_a_step_may_change_its_settings(tmp_path, small_teacher, data):
    def fail(*inputs, **named):
        raise MemoryError

    with pytest.raises(MemoryError):
        teacher = replace(small_teacher, network=copy.deepcopy(small_teacher.network))
        teacher.network.forward = fail
        run = Run(tmp_path / "run", RECIPE, Inputs(data=data.fingerprint))
        distill(run, student=student_of(small_teacher, PLAN), teacher=teacher, plan=PLAN, dataset=data)
    run, _ = train(tmp_path / "run", small_teacher, data, replace(RECIPE, batch_size=1, total_steps=1))
    assert run.complete


def test_spoilt_weights_never_replace_a_good_checkpoint(tmp_path, small_teacher, data):
    run = Run(tmp_path / "run", replace(RECIPE, save_every_steps=50))
    student = student_of(small_teacher, PLAN)

    def spoil(progress):
        if progress.step == 4:
            with torch.no_grad():
                next(student.network.parameters()).fill_(float("nan"))

    options = dict(student=student, teacher=small_teacher, plan=PLAN, dataset=data)
    distill(run, num_steps=3, **options)
    with pytest.raises(FloatingPointError, match="step 5 .*new run with a lower learning rate"):
        distill(run, on_step=spoil, **options)
    assert run.step == 3
    assert all(w.isfinite().all() for w in open_unet(run.result_file).state_dict.values())


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path, small_teacher, data):
    run, student = Run(tmp_path / "run", RECIPE), student_of(small_teacher, PLAN)
    options = dict(student=student, teacher=small_teacher, plan=PLAN, dataset=data)
    distill(run, num_steps=1, **options)
    before = {n: w.detach().clone() for n, w in student.named_parameters().items()}
    weight = next(student.network.parameters())
    weight.requires_grad_(True)
    handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="gradient is not finite at step 2;"):
        distill(run, **options)
    handle.remove()
    assert run.step == 1 and all(torch.equal(before[n], w) for n, w in student.named_parameters().items())


def test_ctrl_c_waits_for_the_end_of_an_update(tmp_path, small_teacher, data, uninterrupted, monkeypatch):
    import os
    import signal

    update, updates = torch.optim.AdamW.step, []

    def interrupted_update(self, *rest):
        updates.append(1)
        if len(updates) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch.optim.AdamW, "step", interrupted_update)
        train(tmp_path / "run", small_teacher, data)
    assert Run(tmp_path / "run", RECIPE, Inputs(data=data.fingerprint)).step == 3
    assert same_weights(train(tmp_path / "run", small_teacher, data)[0], uninterrupted[0])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, small_teacher, data):
    (bucket,) = data.buckets
    bad = LatentDataset.of(bucket.latents.clone(), bucket.contexts, data.null.context)
    train(tmp_path / "run", small_teacher, bad, num_steps=2)
    run = Run(tmp_path / "run", RECIPE, Inputs(data=bad.fingerprint))
    bad.buckets[0].latents[:] = float("inf")
    with pytest.raises(FloatingPointError, match="step 3 .*lower learning rate"):
        distill(run, student=student_of(small_teacher, PLAN), teacher=small_teacher, plan=PLAN, dataset=bad)
    assert run.step == 2


def test_a_feature_point_without_gradient_is_an_error_at_the_first_step(tmp_path, small_teacher, data):
    student = student_of(small_teacher, PLAN)
    handle = student.module("up.1.upsample").register_forward_hook(lambda m, i, o: o.detach())
    with pytest.raises(RuntimeError, match="up.1.upsample has no gradient"):
        distill(Run(tmp_path / "r", RECIPE), student=student, teacher=small_teacher, plan=PLAN, dataset=data)
    handle.remove()
