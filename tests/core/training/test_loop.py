"""Every option of a recipe does what it says."""

import copy
import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch

from distill_core.base.storage import read_header
from distill_core.data.dataset import Bucket, LatentDataset, draw
from distill_core.diffusion.conditioning import Caption
from distill_core.diffusion.schedule import flow, prediction
from distill_core.networks.files import open_unet
from distill_core.networks.model_sampling import ModelSampling
from distill_core.pruning.plan import PruningPlan, name_map
from distill_core.training.loop import OutOfMemory, distill
from distill_core.training.optim import Optimizer
from distill_core.training.previews import Previews
from distill_core.training.refit import refit
from distill_core.training.run import Run
from distill_core.training.teachers import Teachers
from distill_core.training.trainer import Trainer

from ...students import student_of
from .runs import PLAN, RECIPE, train, weights

pytestmark = pytest.mark.slow


@pytest.fixture
def data(small_data):
    return small_data


@pytest.fixture(scope="module")
def plain(tmp_path_factory, small_teacher, small_data):
    """Weights after one step and after all of a run without a changed setting."""
    folder, counts = tmp_path_factory.mktemp("plain"), (1, RECIPE.total_steps)
    return {n: weights(train(folder / str(n), small_teacher, small_data, num_steps=n)[0]) for n in counts}


def sample_images(data):
    captions = [Caption(context) for context in data.read(0, torch.arange(2)).contexts]
    return Previews(captions=captions, null=data.null, latent_shape=(4, 8, 8), num_steps=2, decode=lambda latents: latents[:, :3])


def in_float64(denoiser):
    """So narrow a network normalises over two or three numbers: in float32 its gradients hang on the last digit."""
    denoiser.network.double()
    return denoiser


def difference(a, b):
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def named(changes):
    return pytest.mark.parametrize("change", changes, ids=lambda change: " ".join(f"{k}={v}" for k, v in change.items()))


@named([
    {"objective": "segmind"}, {"objective": "koala"}, {"objective": "laptop-diff"}, {"objective": "ssd-1b"}, {"task_weight": 0.0},
    {"output_weight": 3.0}, {"feature_weight": 0.1}, {"weighting": "min-snr"}, {"weighting": "debiased"},
    {"weighting": "min-snr", "snr_gamma": 1.0}, {"timesteps": "logit-normal"}, {"timestep_range": (0, 300)}, {"noise_offset": 0.1},
    {"input_perturbation": 0.1}, {"caption_dropout": 0.9}, {"batch_size": 2}, {"learning_rate": 2e-3}, {"weight_decay": 0.5},
    {"max_grad_norm": 0.01, "optimizer": "adafactor"}, {"seed": 4},
])  # fmt: skip
def test_a_setting_changes_what_is_learnt(change, tmp_path, small_teacher, data, plain):
    run, _ = train(tmp_path / "run", small_teacher, data, replace(RECIPE, **change), num_steps=1)
    assert difference(weights(run), plain[1]) > 1e-6


@named([
    {"optimizer": "adafactor"}, {"optimizer": "lion"}, {"optimizer": "adamw8bit"}, {"optimizer": "prodigy"},
    {"optimizer": "schedulefree"}, {"lr_schedule": "linear"}, {"warmup_steps": 2}, {"ema_decay": 0.9}, {"precision": "bf16"},
    {"precision": "fp16"}, {"weight_dtype": "bf16"}, {"validation_share": 0.25, "validate_every_steps": 2}, {"refit_examples": 6},
    {"objective": "segmind", "weighting": "min-snr", "timesteps": "logit-normal", "noise_offset": 0.1, "input_perturbation": 0.1,
     "caption_dropout": 0.5, "batch_size": 2},
])  # fmt: skip
def test_what_a_setting_keeps_from_step_to_step_outlasts_a_stop(change, tmp_path, small_teacher, data, plain):
    """What was learnt with it is learnt again bit for bit, in two parts."""
    pytest.importorskip({"lion": "lion_pytorch", "adamw8bit": "bitsandbytes", "prodigy": "prodigyopt",
                         "schedulefree": "schedulefree"}.get(change.get("optimizer"), "torch"))  # fmt: skip
    recipe = replace(RECIPE, **change)
    whole, _ = train(tmp_path / "whole", small_teacher, data, recipe)
    assert difference(weights(whole), plain[RECIPE.total_steps]) > 1e-6
    train(tmp_path / "parts", small_teacher, data, recipe, num_steps=1)
    parts, _ = train(tmp_path / "parts", small_teacher, data, recipe)
    assert difference(weights(parts), weights(whole)) == 0
    assert parts.metrics_file.read_bytes() == whole.metrics_file.read_bytes()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_refit_sees_the_first_examples_of_the_run_and_comes_before_the_first_step(parts, tmp_path, small_teacher, data):
    recipe, student = replace(RECIPE, refit_examples=6, accumulation_steps=parts), student_of(small_teacher, PLAN)
    batches = [draw(data, number, student.schedule, recipe.batching) for number in range(2)]
    expected = student_of(small_teacher, PLAN)
    examples = [
        lambda batch=batch: (batch.x_t, batch.t, batch.context, batch.label) for batch in (batches[0], batches[1].part(slice(2)))
    ]
    refit(expected, small_teacher, name_map(small_teacher.architecture, PLAN), examples)

    told, before = [], {}

    def on_refit(done, total):
        told.append((done, total))
        before.update({name: weight.detach().clone() for name, weight in student.named_parameters().items()})

    run, _ = train(tmp_path / "run", small_teacher, data, recipe, student=student, num_steps=1, on_refit=on_refit)
    total = {1: 2, 2: 3}[parts] + 8
    assert told == [(done, total) for done in range(total + 1)]
    assert difference(before, dict(expected.named_parameters())) < 1e-3  # of changes a hundred times as large
    # A step of AdamW moves a weight by the learning rate at most, and its decay.
    assert difference(dict(student.named_parameters()), before) < 1.1 * recipe.learning_rate
    told.clear()
    train(tmp_path / "run", small_teacher, data, replace(recipe, refit_examples=0), on_refit=on_refit)  # it may change by now
    assert not told and Run(tmp_path / "run", recipe).complete


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_teachers_in_half_precision_refit_their_students(dtype, tmp_path, small_teacher, small_xl_teacher, data):
    labelled = LatentDataset([
        Bucket(latents=torch.randn(8, 4, 8, 8), contexts=torch.randn(8, 4, 16), pooled=torch.randn(8, 8), sizes=torch.full((8, 6), 64.0))
    ], Caption(torch.zeros(4, 16), torch.zeros(8)))  # fmt: skip
    recipe = replace(RECIPE, refit_examples=6, total_steps=1)
    told: list[tuple] = []
    thinned = PruningPlan(name="thinned", keep={"down.2.attn.*": (0, 2), "mid.attn.0": (0,)})
    for full, plan, examples in ((small_teacher, PLAN, data), (small_xl_teacher, thinned, labelled)):
        teacher = replace(full, network=copy.deepcopy(full.network).half().to(dtype))
        student = student_of(replace(full, network=copy.deepcopy(teacher.network).float()), plan)
        run = Run(tmp_path / full.architecture.family, recipe)
        distill(run, student=student, teacher=teacher, plan=plan, dataset=examples, on_refit=lambda *done: told.append(done))
        assert told[-1][0] == told[-1][1] > 4 and all(weight.isfinite().all() for weight in student.network.parameters())


def test_a_cancelled_refit_leaves_nothing_behind(tmp_path, small_teacher, data):
    recipe = replace(RECIPE, refit_examples=6)

    def cancel(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", small_teacher, data, recipe, on_refit=cancel)
    cancelled, _ = train(tmp_path / "run", small_teacher, data, recipe)
    whole, _ = train(tmp_path / "whole", small_teacher, data, recipe)
    assert difference(weights(cancelled), weights(whole)) == 0


def test_a_lora_and_a_student_without_a_teacher_are_not_refitted(tmp_path, small_teacher, data):
    pytest.importorskip("peft")
    for number, changes in enumerate(({"lora_rank": 2}, {"objective": "task"})):
        runs = [
            train(tmp_path / f"{number} {n}", small_teacher, data, replace(RECIPE, refit_examples=n, **changes))[0]
            for n in (0, 6)
        ]
        a, b = ({name: t.read() for name, t in read_header(run.result_file).tensors.items()} for run in runs)
        assert a.keys() == b.keys() and difference(a, b) == 0


def test_snr_gamma_is_the_cap_of_min_snr(tmp_path, small_teacher, data):
    runs = [weights(train(tmp_path / str(gamma), small_teacher, data, replace(RECIPE, weighting="min-snr", snr_gamma=gamma))[0])
            for gamma in (1.0, 5.0)]  # fmt: skip
    assert difference(*runs) > 1e-6


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing_but_memory(parts, tmp_path, small_teacher, data):
    seen, rows = [], []
    teacher = in_float64(replace(small_teacher, network=copy.deepcopy(small_teacher.network)))
    for accumulation_steps in (1, parts):
        student = in_float64(student_of(small_teacher, PLAN))
        student.network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        recipe = replace(RECIPE, accumulation_steps=accumulation_steps, learning_rate=1e-5)
        run, _ = train(tmp_path / str(accumulation_steps), teacher, data, recipe, student=student)
        rows.append(run.metrics())
    assert seen == [4] * 3 + [4 // parts] * 3 * parts
    for whole, cut in zip(*rows, strict=True):
        assert cut.pop("norm") == pytest.approx(whole.pop("norm"), rel=1e-2)
        assert cut == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("objective", ["bk-sdm", "koala"])
def test_gradient_checkpointing_keeps_less_and_changes_no_bit(objective, tmp_path, small_teacher, data):
    kept = {}
    for on in (False, True):
        storages = {}
        recipe = replace(RECIPE, objective=objective, gradient_checkpointing=on, total_steps=1)

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run, student = train(tmp_path / str(on), small_teacher, data, recipe)
        kept[on] = weights(run), sum(storages.values())
        assert all("forward" not in vars(module) for module in student.network.modules())
    assert difference(kept[True][0], kept[False][0]) == 0 and kept[True][1] < 0.8 * kept[False][1]


def test_compile_is_used_and_taken_off(tmp_path, small_teacher, data, plain, monkeypatch):
    compiled, compile = [], torch.compile

    def eager(network):
        compiled.append(network)
        return compile(network, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    run, student = train(tmp_path / "run", small_teacher, data, replace(RECIPE, compile=True))
    assert compiled == [student.network] and student.forward is None
    assert difference(weights(run), plain[3]) < 1e-4


def test_bf16_weights_stay_bf16(tmp_path, small_teacher, data):
    run, student = train(tmp_path / "run", small_teacher, data, replace(RECIPE, weight_dtype="bf16"))
    assert {w.dtype for w in weights(run).values()} == {torch.bfloat16} == {w.dtype for w in student.network.parameters()}


@pytest.mark.parametrize("precision,dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_student_computes_in_its_precision_and_keeps_its_weights(precision, dtype, tmp_path, small_teacher, data):
    student, seen = student_of(small_teacher, PLAN), set()
    student.module("down.0.resnet.0").conv1.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    run, _ = train(tmp_path / "run", small_teacher, data, replace(RECIPE, precision=precision), student=student)
    assert seen == {dtype} and {w.dtype for w in weights(run).values()} == {torch.float32}


def test_the_loss_scaler_skips_a_step_that_overflows_and_goes_on(tmp_path, small_teacher, data):
    student = student_of(small_teacher, PLAN)
    weight, calls = next(student.network.parameters()), []
    weight.requires_grad_(True)

    def overflow_once(gradient):
        calls.append(1)
        return gradient * float("inf") if len(calls) == 6 else gradient

    weight.register_hook(overflow_once)
    after = []
    run, _ = train(tmp_path / "run", small_teacher, data, replace(RECIPE, precision="fp16", total_steps=8), student=student,
                   on_step=lambda progress: after.append(weight.detach().clone()))  # fmt: skip
    scales = [row["scale"] for row in run.metrics()]
    assert torch.equal(after[4], after[5]) and not torch.equal(after[5], after[7])
    assert scales[6] == scales[5] / 2 and run.complete


def test_the_average_is_given_out_and_the_weights_go_on(tmp_path, small_teacher, data, plain):
    run, student = train(tmp_path / "run", small_teacher, data, replace(RECIPE, ema_decay=0.9))
    assert difference({n: w.detach() for n, w in student.named_parameters().items()}, plain[3]) == 0
    start = {n: w.detach() for n, w in student_of(small_teacher, PLAN).named_parameters().items()}
    # With so few steps the average lies between the start and the end, nearer to the end.
    assert 0 < difference(weights(run), plain[3]) < difference(start, plain[3])


# --- teachers


def teacher_like(small_teacher, seed, **changes):
    """A teacher of the same shape that knows something else."""
    network = copy.deepcopy(small_teacher.network)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=random))
    return type(small_teacher)(network=network, architecture=small_teacher.architecture, **changes)


def which(teachers, recipe, steps):
    return [teachers.number_at(step) for step in range(steps)]


def test_teachers_in_sequence_take_their_shares_in_turn(small_teacher):
    recipe = replace(RECIPE, total_steps=10, teacher_shares=(3.0, 1.0, 1.0))
    loaded = []
    teachers = Teachers([lambda n=n: loaded.append(n) or small_teacher for n in range(3)], recipe)
    assert which(teachers, recipe, 10) == [0] * 6 + [1] * 2 + [2] * 2
    for step in range(10):
        teachers.at(step)
    assert loaded == [0, 1, 2] and len(teachers._loaded) == 1
    assert which(Teachers([lambda: small_teacher] * 2, replace(recipe, teacher_shares=())), recipe, 10) == [0] * 5 + [1] * 5


def test_a_mixture_draws_teachers_by_their_shares(small_teacher):
    recipe = replace(RECIPE, teacher_mode="mixture", teacher_shares=(3.0, 1.0))
    drawn = which(Teachers([lambda: small_teacher] * 2, recipe), recipe, 2000)
    assert drawn.count(1) / 2000 == pytest.approx(0.25, abs=0.03)
    assert drawn == which(Teachers([lambda: small_teacher] * 2, recipe), recipe, 2000)


def test_of_teachers_in_sequence_only_one_is_in_memory(tmp_path, small_teacher, data):
    recipe, there, most = replace(RECIPE, total_steps=3), [], []

    def load(seed):
        gc.collect()
        assert not any(network() is not None for network in there)
        there.append(weakref.ref((teacher := teacher_like(small_teacher, seed)).network))
        return teacher

    def count(progress):
        gc.collect()
        most.append(sum(network() is not None for network in there))

    train(tmp_path / "run", None, data, recipe, student=student_of(small_teacher, PLAN), on_step=count,
          teachers=Teachers([lambda n=n: load(n) for n in range(3)], recipe))  # fmt: skip
    assert len(there) == 3 and most == [1, 1, 1]


def test_sample_images_are_beside_those_of_the_teacher_who_taught(tmp_path, small_teacher, data):
    recipe = replace(RECIPE, total_steps=4, sample_every_steps=1)
    pair = [small_teacher, teacher_like(small_teacher, 1)]
    previews = sample_images(data)
    train(tmp_path / "run", None, data, recipe, student=student_of(small_teacher, PLAN), previews=previews,
          teachers=Teachers([lambda t=t: t for t in pair], recipe))  # fmt: skip
    first, second = (previews._by_teacher[name] for name in ("teacher 1", "teacher 2"))
    assert len(previews._by_teacher) == 2 and not torch.equal(first, second)


@pytest.mark.parametrize("mode", ["sequence", "mixture"])
def test_each_teacher_teaches_its_steps(mode, tmp_path, small_teacher, data):
    recipe = replace(RECIPE, total_steps=4, teacher_mode=mode)
    pair = [small_teacher, teacher_like(small_teacher, 1)]
    run, _ = train(tmp_path / "both", small_teacher, data, recipe, teachers=Teachers([lambda t=t: t for t in pair], recipe))
    numbers = [int(row["teacher"]) for row in run.metrics()]
    assert set(numbers) == {0, 1}
    # The output loss of a step is the distance to the teacher of that step: the first step tells which.
    student = student_of(small_teacher, PLAN)
    alone, _ = train(tmp_path / "alone", pair[numbers[0]], data, replace(recipe, total_steps=1), student=student)
    assert run.metrics()[0]["output"] == pytest.approx(alone.metrics()[0]["output"], rel=1e-5)
    parts = {"teachers": Teachers([lambda t=t: t for t in pair], recipe)}
    train(tmp_path / "parts", small_teacher, data, recipe, num_steps=2, **parts)
    again, _ = train(tmp_path / "parts", small_teacher, data, recipe, **parts)
    assert difference(weights(again), weights(run)) == 0


def test_shares_and_teachers_must_match(small_teacher):
    with pytest.raises(ValueError, match="2 entries, but there are 1 teachers"):
        Teachers([lambda: small_teacher], replace(RECIPE, teacher_shares=(1.0, 1.0)))


@pytest.mark.parametrize("kind", ["v", "x0"])
def test_a_teacher_of_another_prediction_teaches_the_same(kind, tmp_path, small_teacher, data):
    """A teacher that states the same knowledge in another way gives the same loss."""

    class Restated(type(small_teacher)):
        def __call__(self, x_t, t, *rest):
            out, now = super().__call__(x_t, t, *rest), self.schedule.at(t, x_t)
            return prediction(kind).target(prediction("eps").to_x0(out, x_t, now), out, now)

    teacher = Restated(
        network=small_teacher.network, architecture=small_teacher.architecture, sampling=ModelSampling(prediction=kind)
    )
    plain, _ = train(tmp_path / "plain", small_teacher, data, replace(RECIPE, total_steps=1))
    restated, _ = train(tmp_path / "restated", teacher, data, replace(RECIPE, total_steps=1))
    assert restated.metrics()[0]["output"] == pytest.approx(plain.metrics()[0]["output"], rel=1e-3)


def test_teacher_and_student_must_share_a_schedule(tmp_path, small_teacher, data):
    teacher = teacher_like(small_teacher, 1, noise_levels=flow())
    with pytest.raises(ValueError, match="same noise schedule"):
        train(tmp_path / "run", teacher, data, student=student_of(small_teacher, PLAN))


@pytest.mark.parametrize("kind,schedule", [("v", None), ("x0", None), ("flow", flow()), ("v", flow())])
@pytest.mark.parametrize("weighting", ["none", "min-snr", "debiased"])
def test_every_prediction_trains_with_every_weighting(kind, schedule, weighting, tmp_path, small_teacher, data):
    teacher, student = teacher_like(small_teacher, 1), student_of(small_teacher, PLAN)
    for denoiser in (teacher, student):
        denoiser.sampling, denoiser.noise_levels = ModelSampling(prediction=kind), schedule
    run, _ = train(tmp_path / "run", teacher, data, replace(RECIPE, weighting=weighting, total_steps=1), student=student)
    row = run.metrics()[0]
    plain = row["task"] + row["output"] + row["feature"]
    assert (row["total"] == pytest.approx(plain, rel=1e-5)) == (weighting == "none")
    assert open_unet(run.result_file).prediction == kind


# --- data of other kinds


def test_sdxl_learns_with_its_label_and_buckets(tmp_path, small_xl_teacher):
    random = torch.Generator().manual_seed(0)

    def bucket(height):
        sizes = torch.tensor([[64.0, 64, 0, 0, 8 * height, 64]]).expand(5, 6)
        return Bucket(latents=torch.randn(5, 4, height, 8, generator=random), contexts=torch.randn(5, 4, 16, generator=random),
                      pooled=torch.randn(5, 8, generator=random), sizes=sizes)  # fmt: skip

    from distill_core.pruning.plan_text import read_plan

    data = LatentDataset([bucket(8), bucket(16)], Caption(torch.zeros(4, 16), torch.zeros(8)))
    plan = read_plan("keep down 2,2:1,2:2 mid resnet up 3:2,3:1,3", small_xl_teacher.architecture)
    student = student_of(small_xl_teacher, plan)
    run = Run(tmp_path / "run", replace(RECIPE, objective="ssd-1b", total_steps=6, learning_rate=1e-4))
    distill(run, student=student, teacher=small_xl_teacher, plan=plan, dataset=data)
    assert run.complete and "feature/mid.resnet.0" in run.metrics()[0]


def test_small_data_is_warned_of_with_the_published_figure(tmp_path, small_teacher, data, caplog):
    with caplog.at_level(logging.WARNING, "distill"):
        train(tmp_path / "few", small_teacher, data)
        assert not caplog.records
        train(tmp_path / "many", small_teacher, data, replace(RECIPE, total_steps=1000), num_steps=1)
    assert "each of the 12 examples will be seen 333 times" in caplog.text and "212,776" in caplog.text


# --- what a run writes


def test_loss_by_timestep_adds_up(tmp_path, small_teacher, data):
    run, _ = train(tmp_path / "run", small_teacher, data, replace(RECIPE, batch_size=1))
    for row in run.metrics():
        (by_timestep,) = (value for name, value in row.items() if name.startswith("timesteps/"))
        assert by_timestep == pytest.approx(row["total"], rel=1e-6)


def test_the_newest_and_the_best_checkpoints_stay(tmp_path, small_teacher, data):
    recipe = replace(RECIPE, total_steps=8, save_every_steps=1, keep_checkpoints=3, keep_best=1, validate_every_steps=2,
                     validation_share=0.25, learning_rate=1e-2)  # fmt: skip
    run, _ = train(tmp_path / "run", small_teacher, data, recipe)
    losses = {int(row["step"]): row["validation"] for row in run.metrics() if "validation" in row}
    assert sorted(losses) == [2, 4, 6, 8]
    best = min(losses, key=losses.get)
    assert {int(c.name) for c in run.checkpoints} == {6, 7, 8, best}
    assert int(run.best_result_file.parent.name) == best


def test_validation_is_of_what_is_given_out_and_disturbs_nothing(tmp_path, small_teacher, data):
    with_it = replace(RECIPE, validation_share=0.25, validate_every_steps=1, ema_decay=0.5)
    run, _ = train(tmp_path / "often", small_teacher, data, with_it)
    seldom, _ = train(tmp_path / "seldom", small_teacher, data, replace(with_it, validate_every_steps=3))
    assert difference(weights(run), weights(seldom)) == 0
    assert run.metrics()[2]["validation"] == seldom.metrics()[2]["validation"]


@pytest.mark.parametrize("change", [{"ema_decay": 0.5}, {"optimizer": "schedulefree"}], ids=["average", "schedule-free"])
def test_interrupted_while_it_gives_out_weights_a_run_keeps_its_own(change, tmp_path, small_teacher, data, monkeypatch):
    """In the middle of putting others into the network, and the step that was done has its row."""
    if "optimizer" in change:
        pytest.importorskip("schedulefree")
    recipe = replace(RECIPE, validation_share=0.25, validate_every_steps=2, save_every_steps=100, **change)
    whole, _ = train(tmp_path / "whole", small_teacher, data, recipe)
    place, name = (Trainer, "_put") if "ema_decay" in change else (Optimizer, "_call")
    plainly = getattr(place, name)

    def half(self, what):
        if isinstance(what, str):
            plainly(self, what)
            next(iter(self.parameters.values())).data.zero_()
        else:
            plainly(self, dict(list(what.items())[: len(what) // 2]))
        raise KeyboardInterrupt

    def interrupt(progress):
        monkeypatch.setattr(place, name, half)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", small_teacher, data, recipe, on_step=interrupt)
    monkeypatch.undo()
    run, _ = train(tmp_path / "run", small_teacher, data, recipe)
    assert difference(weights(run), weights(whole)) == 0
    assert [row["step"] for row in run.metrics()] == [1, 2, 3] and run.metrics()[1]["total"] == whole.metrics()[1]["total"]


def test_validation_without_examples_is_refused_before_the_first_step(tmp_path, small_teacher, data):
    recipe = replace(RECIPE, validation_share=0.01, validate_every_steps=1)
    with pytest.raises(ValueError, match="holds out no example"):
        train(tmp_path / "run", small_teacher, data, recipe, on_step=pytest.fail)


def test_validation_computes_no_more_at_once_than_training(tmp_path, small_teacher, data):
    recipe = replace(RECIPE, batch_size=4, accumulation_steps=4, validation_share=0.25, validate_every_steps=1, total_steps=1)
    student, sizes = student_of(small_teacher, PLAN), []
    student.network.register_forward_pre_hook(lambda module, inputs: sizes.append((module.training, len(inputs[0]))))
    parts, _ = train(tmp_path / "parts", small_teacher, data, recipe, student=student)
    assert {*sizes} == {(True, 1), (False, 1)}
    whole, _ = train(tmp_path / "whole", small_teacher, data, replace(recipe, accumulation_steps=1))
    assert parts.metrics()[0]["validation"] == pytest.approx(whole.metrics()[0]["validation"], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_student_of_16_bits_is_trained_in_the_precision_of_the_setting(dtype, tmp_path, small_teacher, data):
    student = student_of(small_teacher, PLAN)
    student.network.to(dtype)
    run, _ = train(tmp_path / "run", small_teacher, data, replace(RECIPE, total_steps=1), student=student)
    assert {weight.dtype for weight in weights(run).values()} == {torch.float32}
    assert "scale" not in run.metrics()[0]


def test_previews_are_drawn_beside_the_teachers_every_so_often(tmp_path, small_teacher, data):
    from PIL import Image

    previews = sample_images(data)
    run, _ = train(tmp_path / "run", small_teacher, data, replace(RECIPE, sample_every_steps=2, total_steps=4), previews=previews)
    files = sorted((run.folder / "samples").iterdir())
    assert [file.name for file in files] == ["00000002.png", "00000004.png"] and previews.latest == files[1]
    assert len({Image.open(file).tobytes() for file in files}) == 2
    without, _ = train(tmp_path / "without", small_teacher, data, replace(RECIPE, total_steps=4))
    assert difference(weights(run), weights(without)) == 0


def test_tensorboard_gets_every_term(tmp_path, small_teacher, data):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = train(tmp_path / "run", small_teacher, data, replace(RECIPE, trackers=("tensorboard",)))
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("output")] == pytest.approx([row["output"] for row in run.metrics()])


def test_wandb_is_offline_unless_asked(tmp_path, small_teacher, data, monkeypatch):
    import sys
    import types

    logged, options = [], {}

    class Session:
        def log(self, row, step):
            logged.append((step, row["total"]))

        def finish(self):
            logged.append("finished")

    fake = types.SimpleNamespace(init=lambda **named: options.update(named) or Session())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run, _ = train(tmp_path / "run", small_teacher, data, replace(RECIPE, trackers=("wandb",)))
    assert options["mode"] == "offline" and options["config"]["batch_size"] == 4
    assert logged == [*((int(row["step"]), row["total"]) for row in run.metrics()), "finished"]


# --- when something goes wrong


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
], ids=["CUDA", "MPS", "CPU", "Windows"])  # fmt: skip
def test_out_of_memory_says_what_to_lower_in_order(error, tmp_path, small_teacher, data):
    def explode(*inputs, **named):
        raise error

    teacher = teacher_like(small_teacher, 1)
    train(tmp_path / "run", teacher, data, num_steps=1)
    teacher.network.forward = explode
    with pytest.raises(OutOfMemory, match="gradient_checkpointing on, accumulation_steps 2, precision bf16, optimizer adamw8bit"):
        train(tmp_path / "run", teacher, data)
    del teacher.network.forward
    recipe = replace(RECIPE, gradient_checkpointing=True, accumulation_steps=2)
    run, _ = train(tmp_path / "run", teacher, data, recipe)  # the way out may be taken in mid-run
    assert run.complete


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, small_teacher, data, monkeypatch):
    import errno

    import distill_core.training.run as run_module

    train(tmp_path / "run", small_teacher, data, num_steps=1)

    def full(*rest, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left on device; free some space"):
        patched.setattr(run_module, "write_tensors", full)
        train(tmp_path / "run", small_teacher, data)
    run, _ = train(tmp_path / "run", small_teacher, data)
    assert run.complete
