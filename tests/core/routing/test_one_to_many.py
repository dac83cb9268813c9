"""Experts of ranges: each sees timesteps of its own alone, and a training left at any step goes on as if it had not been."""

import copy
import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_core.data.dataset import LatentDataset, draw
from distill_core.diffusion.denoiser import DiffusersDenoiser
from distill_core.diffusion.ranges import TimestepRanges, balanced
from distill_core.diffusion.schedule import flow, scaled_linear
from distill_core.evaluation.metrics import output_error
from distill_core.networks.files import open_unet
from distill_core.pruning.plan import plan_in, preset
from distill_core.routing import one_to_many
from distill_core.routing.experts import Experts
from distill_core.routing.one_to_many import ExpertsSettings, OneToMany, Start, num_error_bins
from distill_core.routing.router import ExpertDenoiser
from distill_core.training.live import history
from distill_core.training.run import Inputs, Run
from distill_core.training.run_folders import run_in, steps_kept
from distill_core.training.settings import TrainingSettings

from ...students import student_of
from ..diffusion.strategies import any_boundaries

pytestmark = pytest.mark.slow

PLAN, TINY = preset("bk-sdm-base"), preset("bk-sdm-tiny")
RECIPE = TrainingSettings(
    total_steps=3, batch_size=2, learning_rate=1e-3, lr_schedule="cosine", warmup_steps=1, save_every_steps=2, seed=3
)
TWO = ExpertsSettings(count=2, joint_steps=2)


@pytest.fixture(scope="module")
def data():
    random = torch.Generator().manual_seed(0)
    latents, contexts = torch.randn(5, 4, 8, 8, generator=random), torch.randn(5, 4, 16, generator=random)
    return LatentDataset.of(latents, contexts, torch.zeros(4, 16))


@pytest.fixture(scope="module")
def training(small_teacher, data):
    """Opens a training in a folder."""

    def opened(folder, settings=TWO, recipe=RECIPE, plans=(PLAN,), make=student_of, **options):
        starts = [Start(plan, lambda plan=plan: make(small_teacher, plan)) for plan in plans]
        given = {
            "teachers": [lambda: small_teacher],
            "inputs": Inputs(teachers=("abc",)),
            "schedule": scaled_linear(),
            "dataset": data,
        }
        return OneToMany(folder, settings, recipe, starts=starts, **given | options)

    return opened


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, training):
    whole = training(tmp_path_factory.mktemp("one-to-many") / "whole")
    whole.train()
    return whole


def weights(path):
    return open_unet(path).state_dict


def farthest(a, b):
    return max((a[name] - weight).abs().max() for name, weight in b.items())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def alike(one, other):
    """Whether two trainings came to the same experts and the same metrics."""
    pairs = zip(one.experts.files, other.experts.files, strict=True)
    metrics = (one.run(stage).metrics() == other.run(stage).metrics() for stage in one.stages)
    return all(same(weights(a), weights(b)) for a, b in pairs) and all(metrics)


class Cancelled(BaseException):
    """As ComfyUI's InterruptProcessingException, no Exception."""


# --- what a student is trained on


class Spying(DiffusersDenoiser):
    def __call__(self, x_t, t, context, label=None):
        self.seen.extend(t.tolist())
        return super().__call__(x_t, t, context, label)


def spying(seen):
    def make(teacher, plan):
        student = student_of(teacher, plan)
        spy = Spying(network=student.network, architecture=student.architecture)
        spy.seen = []
        seen.append(spy.seen)
        return spy

    return make


@pytest.mark.parametrize("overlap", [0, 40])
def test_a_student_sees_timesteps_of_its_range_alone(overlap, training, tmp_path):
    seen, choice = [], ExpertsSettings(boundaries="200, 300.5", joint_steps=1, overlap=overlap)
    training(tmp_path / "x", choice, replace(RECIPE, batch_size=20), make=spying(seen)).train()
    joint, *ranges = [(min(t), max(t)) for t in seen]
    assert joint[0] < 200 and joint[1] > 300
    bounds = [(301 - overlap, 999), (201 - overlap, 300 + overlap), (0, 200 + overlap)]
    for (least, most), (low, high) in zip(ranges, bounds, strict=True):
        assert low <= least and most <= high
    if overlap:
        assert ranges[1][0] < 201 and ranges[1][1] > 300


@given(any_boundaries, st.integers(0, 200), st.sampled_from(["uniform", "logit-normal"]), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_any_boundaries_are_drawn_from_within(boundaries, overlap, timesteps, step):
    random = torch.Generator().manual_seed(0)
    data = LatentDataset.of(torch.randn(5, 1, 1, 1, generator=random), torch.zeros(1, 1, 1))
    ranges = TimestepRanges(boundaries)
    for number in range(len(ranges)):
        own = ranges.timesteps(number, overlap)
        recipe = replace(RECIPE, timestep_range=(own.start, own.stop), timesteps=timesteps, batch_size=32)
        assert all(t in own for t in draw(data, step, scaled_linear(), recipe.batching).t.tolist())


# --- stages


def test_students_begin_as_the_one_they_were_together(uninterrupted, tmp_path, training):
    """Trained by hand, stage by stage, they are the same."""
    assert list(uninterrupted.stages.items()) == [("joint", 2), ("range_0", 3), ("range_1", 3)]
    assert uninterrupted.complete and uninterrupted.step == uninterrupted.total_steps == 8
    joint = uninterrupted.run("joint").settings
    assert (joint.total_steps, joint.timestep_range) == (2, ())
    assert uninterrupted.run("range_0").settings.timestep_range == (500, 1000)
    experts = uninterrupted.experts
    assert experts == Experts.read(uninterrupted.folder / "experts") and experts.ranges.boundaries == (499.0,)
    assert [(member.plan, member.steps) for member in experts.members] == [("bk-sdm-base", 3)] * 2
    started = weights(uninterrupted.run("joint").result_file)
    assert all(not same(weights(path), started) for path in experts.files)
    changed = [farthest(weights(path), started) for path in experts.files]
    from_pruned = training(tmp_path / "pruned", replace(TWO, joint_steps=0))
    from_pruned.train()
    farther = [farthest(weights(path), started) for path in from_pruned.experts.files]
    assert list(from_pruned.stages) == ["range_0", "range_1"] and max(changed) < min(farther)


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5, 8])
def test_cancelled_and_resumed_equals_uninterrupted_bit_for_bit(stop_at, training, tmp_path, uninterrupted):
    def cancel(progress):
        if progress.step == stop_at:
            raise Cancelled

    with pytest.raises(Cancelled):
        training(tmp_path / "x").train(on_step=cancel)
    again = training(tmp_path / "x")
    assert again.step == stop_at and not again.complete and steps_kept(tmp_path / "x") == stop_at
    again.train()
    assert again.complete and alike(again, uninterrupted)


def test_killed_between_checkpoints_it_goes_on_from_the_last(training, tmp_path, uninterrupted, monkeypatch):
    save = Run.save

    def killed(self, state, *rest):
        if self.folder.name == "range_0" and state.step > 2:
            raise MemoryError("killed")
        save(self, state, *rest)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(Run, "save", killed)
        training(tmp_path / "x").train()
    again = training(tmp_path / "x")
    assert again.step == 4
    again.train()
    assert alike(again, uninterrupted)


def test_one_range_at_a_time_in_any_order_equals_all_at_once(training, tmp_path, uninterrupted):
    training(tmp_path / "x").train(only=1)
    half = training(tmp_path / "x")
    assert half.step == 5 and "still to train: range_0" in half.describe_state()
    with pytest.raises(ValueError, match="not finished"):
        half.experts  # noqa: B018
    half.train(only=0)
    assert half.complete and alike(half, uninterrupted) and str(half.folder / "experts") in half.describe_state()


def test_some_steps_at_a_time_equal_all_at_once(training, tmp_path, uninterrupted):
    for expected in (3, 6, 8):
        some = training(tmp_path / "x")
        some.train(num_steps=3)
        assert some.step == expected
    assert alike(some, uninterrupted)


def test_its_folder_says_all_stages_from_the_first_step_on(training, tmp_path, uninterrupted):
    begun = training(tmp_path / "run")
    begun.train(num_steps=1)
    assert json.loads((begun.folder / "stages.json").read_text()) == begun.stages
    assert run_in(begun.folder)[:4] == ("run", "experts", 1, 8)
    assert run_in(uninterrupted.folder).result == uninterrupted.experts.folder


def test_one_that_failed_before_its_first_step_begins_again(training, tmp_path):
    def fail(*_):
        raise MemoryError

    with pytest.raises(MemoryError):
        training(tmp_path / "run", make=fail).train(num_steps=1)
    again = training(tmp_path / "run")
    again.train(num_steps=1)
    assert again.step == 1


def test_stages_begin_where_those_before_them_ended(training, tmp_path):
    """Whichever ranges are trained, and in whatever order."""
    begun = training(tmp_path / "run", replace(TWO, count=3))
    for number in (0, 2):
        begun.train(only=number)
    told = history(begun.folder)
    assert told["stages"] == [{"name": name, "after": after} for name, after in (("joint", 0), ("range_0", 2), ("range_2", 5))]
    assert told["step"] == 8 and told["total_steps"] == 2 + 3 * 3


def test_progress_is_over_all_stages(training, tmp_path):
    steps, stages = [], []
    training(tmp_path / "x").train(on_step=lambda p: steps.append((p.step, p.total_steps)), on_stage=stages.append)
    assert steps == [(step, 8) for step in range(1, 9)] and stages == ["joint", "range_0", "range_1"]
    training(tmp_path / "x").train(on_step=lambda p: pytest.fail("trained"), on_stage=stages.append)
    assert len(stages) == 3


def test_trained_on_the_folder_of_students_is_written_anew(training, tmp_path):
    recipe = replace(RECIPE, lr_schedule="constant", total_steps=1)
    training(tmp_path / "x", recipe=recipe).train()
    longer = training(tmp_path / "x", recipe=replace(recipe, total_steps=2))
    longer.train(num_steps=1)
    assert not longer.complete
    with pytest.raises(ValueError, match="not finished"):
        longer.experts  # noqa: B018
    longer.train()
    assert [member.steps for member in longer.experts.members] == [2, 2]
    assert same(weights(longer.experts.files[0]), weights(longer.run("range_0").result_file))
    with pytest.raises(ValueError, match="started from a joint student trained for 2 steps; set joint_steps to that"):
        training(tmp_path / "x", replace(TWO, joint_steps=9), replace(recipe, total_steps=2))


def test_students_do_not_begin_as_a_damaged_student(training, tmp_path):
    begun = training(tmp_path / "x", TWO)
    begun.train(num_steps=2)
    file = begun.run("joint").result_file
    content = bytearray(file.read_bytes())
    content[-400] ^= 255
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint .*joint.checkpoints.00000002 is damaged \(student.safetensors has changed"):
        training(tmp_path / "x", TWO).train()


@pytest.mark.parametrize("joint_steps", [0, 1])
def test_one_student_that_was_trained_is_not_passed_over(joint_steps, training, tmp_path):
    recipe = replace(RECIPE, lr_schedule="constant")
    training(tmp_path / "x", recipe=recipe).train(num_steps=2)
    with pytest.raises(ValueError, match="is trained for 2 steps already; set joint_steps to that or more"):
        training(tmp_path / "x", replace(TWO, joint_steps=joint_steps), recipe)


def test_what_was_trained_outlives_its_runs(training, tmp_path):
    training(tmp_path / "x", replace(TWO, joint_steps=0)).train()
    (tmp_path / "x" / "experts").rename(tmp_path / "kept")
    shutil.rmtree(tmp_path / "x")
    assert Experts.read(tmp_path / "kept").teacher == "abc"


# --- plans, adapters, measured boundaries


def test_students_of_different_plans(training, tmp_path):
    several = training(tmp_path / "x", ExpertsSettings(count=3, joint_steps=1), plans=(TINY, PLAN, TINY))
    assert list(several.stages) == ["joint_0", "joint_1", "range_0", "range_1", "range_2"]
    several.train(only=1)
    assert several.steps_of("joint_0") == 0 and several.steps_of("joint_1") == 1
    several.train()
    assert [member.plan for member in several.experts.members] == ["bk-sdm-tiny", "bk-sdm-base", "bk-sdm-tiny"]
    x = torch.randn(3, 4, 8, 8), torch.tensor([3, 500, 999]), torch.randn(3, 4, 16)
    with torch.no_grad():
        assert ExpertDenoiser.open(several.experts)(*x).isfinite().all()


@pytest.mark.parametrize("change,words", [
    ({"objective": "guidance", "guidance": 3.0, "guidance_min": 1.5, "caption_dropout": 0.0}, "guidance_min must be below guidance"),
    ({"weight_dtype": "bf16", "optimizer": "prodigy"}, "prodigy updates all weights together"),
    ({"weight_dtype": "bf16", "objective": "consistency"}, "needs weight_dtype fp32"),
], ids=["scales", "prodigy", "consistency"])  # fmt: skip
def test_what_only_a_lora_can_learn_is_not_asked_of_the_joint_student(change, words, training, tmp_path):
    recipe = replace(RECIPE, lora_rank=2, **change)
    several = training(tmp_path / "x", replace(TWO, joint_steps=0), recipe)
    assert several.heaviest_settings == recipe and several.run("range_0").settings.lora_rank == 2
    assert replace(TWO, joint_steps=0).stages(recipe, scaled_linear()) == [recipe] * 2
    with pytest.raises(
        ValueError, match=f"joint student is trained as a whole, without a LoRA: .*{words}.*; or set joint_steps to 0"
    ):
        training(tmp_path / "y", TWO, recipe).run("joint")


@pytest.mark.parametrize("joint_steps,dora", [(0, False), (2, False), (2, True)], ids=str)
def test_one_base_and_an_adapter_for_each_range(joint_steps, dora, training, tmp_path, uninterrupted):
    pytest.importorskip("peft")
    recipe = replace(RECIPE, lora_rank=2, lora_dora=dora, learning_rate=1e-2)
    shared = training(tmp_path / "x", replace(TWO, joint_steps=joint_steps), recipe)
    shared.train()
    experts = shared.experts
    assert [path.name for path in experts.files] == ["range_0.lora.safetensors", "range_1.lora.safetensors"]
    began = shared.run("joint").result_file if joint_steps else None
    expected = weights(began) if began else weights(shared.folder / "base.safetensors")
    assert same(weights(experts.base), expected) and plan_in(experts.unet(1).metadata).name == "bk-sdm-base"
    assert experts.num_bytes < 0.65 * uninterrupted.experts.num_bytes
    x = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 4, 16)
    base = student_of_weights(experts)
    with torch.no_grad():
        assert not torch.allclose(ExpertDenoiser.open(experts)(*x), base(*x), atol=1e-4)
    again = training(tmp_path / "y", replace(TWO, joint_steps=joint_steps), recipe)
    for _ in range(4):
        again.train(num_steps=2)
    assert [p.read_bytes() for p in again.experts.files] == [p.read_bytes() for p in experts.files]


@pytest.mark.parametrize("objective", ["guidance", "consistency"])
def test_adapters_of_ranges_learn_from_their_own_base(objective, small_teacher, training, tmp_path):
    """The base is the teacher, and stays it; each adapter is a run of its own on it."""
    pytest.importorskip("peft")
    recipe = replace(RECIPE, objective=objective, phases=2, guidance=3.0, caption_dropout=0.0, lora_rank=2, learning_rate=1e-2)
    made, seen = [], []

    def make(teacher, plan):
        made.append(DiffusersDenoiser(network=copy.deepcopy(teacher.network), architecture=teacher.architecture))
        return made[-1]

    settings = replace(TWO, joint_steps=0)
    options = {"plans": (None,), "make": make, "teachers": None}
    shared = training(tmp_path / "x", settings, recipe, **options)
    shared.train(on_step=lambda progress: seen.append(progress.losses["total"]))
    assert len(seen) == 2 * RECIPE.total_steps and all(loss > 0 for loss in seen)
    assert same(weights(shared.experts.base), {n: p.detach() for n, p in small_teacher.named_parameters().items()})
    apart = training(tmp_path / "y", settings, recipe, **options | {"teachers": [lambda: small_teacher]})
    apart.train()
    assert [p.read_bytes() for p in shared.experts.files] == [p.read_bytes() for p in apart.experts.files]
    with pytest.raises(ValueError, match="set lora_rank above 0 and joint_steps to 0"):
        training(tmp_path / "z", TWO, recipe, **options)


def student_of_weights(experts):
    from distill_core.networks.build import load_unet

    file = experts.unet(0)
    return DiffusersDenoiser(network=load_unet(file), architecture=file.architecture)


def test_measured_boundaries_even_out_the_error_of_the_joint_student(training, tmp_path, small_teacher, data, monkeypatch):
    monkeypatch.setattr(one_to_many, "NUM_ERROR_BINS", 10)
    choice = ExpertsSettings(count=3, split="error", joint_steps=2)
    recipe = replace(RECIPE, batch_size=8)
    measured = training(tmp_path / "x", choice, recipe)
    assert measured.ranges is None and "will be measured" in measured.describe()
    measured.train(num_steps=2)
    kept = json.loads((tmp_path / "x" / "ranges.json").read_text())
    assert measured.ranges == balanced(kept["errors"], 1000, 3) and len(kept["errors"]) == 10
    joint = student_of(small_teacher, PLAN)
    joint.load_state_dict(weights(measured.run("joint").result_file))
    errors = output_error(joint, small_teacher, data, num_bins=10, num_batches=2, batch_size=8, seed=3)
    assert kept["errors"] == errors.tolist()
    measured.train()
    again = training(tmp_path / "x", choice, recipe)
    assert again.complete and again.experts.ranges == measured.ranges and len(again.experts.ranges) == 3


def of_states(data, *timesteps):
    (bucket,) = data.buckets
    states = bucket.latents[:, None].expand(-1, len(timesteps), -1, -1, -1)
    return LatentDataset([replace(bucket, states=states)], data.null, torch.tensor(timesteps))


def test_errors_are_measured_in_bins_that_hold_stored_states():
    assert num_error_bins(None, scaled_linear()) == 50 and num_error_bins(torch.arange(1000), scaled_linear()) == 50
    for stored in (torch.tensor([999, 879, 759, 639, 519, 399, 279, 159]), torch.arange(999, -1, -40), torch.tensor([3])):
        bins = num_error_bins(stored, scaled_linear())
        edges = [1000 * i // bins for i in range(bins + 1)]
        assert all(((stored >= start) & (stored < end)).any() for start, end in itertools.pairwise(edges))
    assert num_error_bins(torch.arange(39, 1000, 40), scaled_linear()) == 25


@pytest.mark.parametrize(("settings", "timesteps", "fits"), [
    (TWO, (999, 700, 100), True), (TWO, (999, 700, 600), False), (replace(TWO, overlap=120), (999, 700, 600), True),
    (replace(TWO, split="error"), (999, 700, 100), True), (replace(TWO, split="error"), (999, 700, 600), False),
])  # fmt: skip
def test_each_expert_needs_stored_states(settings, timesteps, fits, training, data, tmp_path):
    if fits:
        training(tmp_path / "x", settings, dataset=of_states(data, *timesteps)).train()
        return
    with pytest.raises(ValueError, match="no state in the range of some expert"):
        training(tmp_path / "x", settings, dataset=of_states(data, *timesteps))


# --- refused


@pytest.mark.parametrize("wrong,message", [
    ({"split": "none"}, "choose from timesteps, log-snr, error"),
    ({"count": 0}, "count must be between 1 and 100, got 0"),
    ({"overlap": -1}, "overlap must be between 0"),
    ({"joint_steps": -1}, "joint_steps must be between 0"),
    ({"split": "error", "joint_steps": 0}, "set joint_steps above 0"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ExpertsSettings(**wrong)


@pytest.mark.parametrize("options,message", [
    ({"plans": (PLAN, TINY, PLAN)}, "there are 2 experts but 3 plans"),
    ({"plans": (PLAN, TINY), "recipe": replace(RECIPE, lora_rank=2)}, "LoRAs share one base, so all experts need one plan, got 2"),
    ({"plans": (PLAN, TINY), "settings": replace(TWO, split="error")}, "measured on one student, so all experts need one plan"),
    ({"recipe": replace(RECIPE, timestep_range=(0, 500))}, "timestep_range cannot be set for several experts"),
    ({"recipe": replace(RECIPE, sample_every_steps=1)}, "sample_every_steps needs a student for all timesteps"),
    ({"settings": ExpertsSettings(boundaries="1200")}, "leave a range without a timestep"),
])  # fmt: skip
def test_a_training_that_cannot_be_is_refused(options, message, training, tmp_path):
    with pytest.raises(ValueError, match=message):
        training(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change,message", [
    ({"recipe": replace(RECIPE, learning_rate=2e-3)}, "started with learning_rate = 0.001, but is now 0.002"),
    ({"settings": replace(TWO, overlap=5)}, r"'range_0' was started with timestep_range = \[500, 1000\], but is now \[495, 1000\]"),
    ({"settings": replace(TWO, count=3)}, "'range_0' was started with timestep_range"),
    ({"settings": replace(TWO, joint_steps=0)}, "is trained for 2 steps already"),
    ({"plans": (TINY,)}, "started with plan = "),
    ({"inputs": Inputs(teachers=("other",))}, r"started with teachers = \['abc'\], but is now \['other'\]"),
])  # fmt: skip
def test_a_training_goes_on_by_the_settings_it_began_with(change, message, training, uninterrupted):
    with pytest.raises(ValueError, match=message):
        training(uninterrupted.folder, **change)


def test_a_folder_that_is_something_else_is_left_alone(training, tmp_path, small_teacher, data):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a training of several experts"):
        training(tmp_path)
    with Run(tmp_path / "run", RECIPE).training():
        pass
    with pytest.raises(ValueError, match="not a training of several experts"):
        training(tmp_path / "run")


def test_by_default_half_of_all_steps_are_together(training, tmp_path):
    stages = training(tmp_path / "x", ExpertsSettings(count=3)).stages
    assert stages == {"joint": 9, "range_0": 3, "range_1": 3, "range_2": 3}


def test_there_is_no_student_beyond_the_last(training, tmp_path):
    with pytest.raises(ValueError, match="there is no expert 2; choose one of 0 to 1"):
        training(tmp_path / "x").train(only=2)


def test_a_schedule_of_its_own_has_ranges_of_its_own(training, tmp_path):
    settings = ExpertsSettings(count=2, split="log-snr")
    assert training(tmp_path / "x", settings, schedule=flow()).ranges != training(tmp_path / "x", settings).ranges
