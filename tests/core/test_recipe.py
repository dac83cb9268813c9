"""``distill train`` from the outside: what people write, what they see, what is left when it is killed."""

import csv
import json
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill_core.cli import main
from distill_core.data.cache import CachedDataset
from distill_core.data.images import sizes
from distill_core.networks.files import open_unet
from distill_core.preparation import Data, prepare
from distill_core.pruning.plan import plan_in, preset
from distill_core.recipe import Recipe, TeacherSettings, example, example_names
from distill_core.routing.experts import Experts
from distill_core.training.checkpoints import checkpoints_in
from distill_core.training.processes import ALONE, Processes
from tests.programs import Program

pytestmark = pytest.mark.slow

JOB = """
run = "run"
[teacher]
file = "demo"
[student]
preset = "bk-sdm-base"
[data]
prompts = "prompts.txt"
resolution = "64"
guidance = 2.0
sampler_steps = 4
images_per_prompt = 2
[training]
total_steps = 4
batch_size = 4
learning_rate = 1e-3
save_every_steps = 2
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with prompts and their pictures, so that the teacher draws once for all tests."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "prompts.txt").write_text("a cat, flat\ntwo dogs, shaded\na red bus above a key, flat\n\nthree drums, flat\n")
    (folder / "job.toml").write_text(JOB)
    prepare(Recipe.read(folder / "job.toml"))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    (tmp_path / "cache").symlink_to(made / "cache")
    (tmp_path / "prompts.txt").write_text((made / "prompts.txt").read_text())
    return tmp_path


def write(folder, *changes, name="job.toml"):
    text = JOB
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / name).write_text(text)
    return folder / name


def weights(folder, step=-1):
    return open_unet(checkpoints_in(folder)[step] / "student.safetensors").state_dict


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_job_trains_to_a_student_anyone_can_open(folder, capsys):
    assert main(["train", str(write(folder))]) == 0
    out = capsys.readouterr()
    assert "2,142,788 parameters, plan bk-sdm-base" in out.out and "8 examples" in out.out and "step 4:" in out.out
    student = open_unet(folder / "run" / "checkpoints" / "00000004" / "student.safetensors")
    assert plan_in(student.metadata).name == "bk-sdm-base" and student.architecture.num_parameters == 2_142_788
    assert student.origin == open_unet(folder / "run" / "pruned.safetensors").origin != {}


def test_the_memory_of_a_step_is_told_before_the_first(folder, capsys):
    job = write(folder)
    assert main(["train", str(job)]) == 0
    out = capsys.readouterr().out
    assert out.index("The most memory is needed in") < out.index("teacher weights") < out.index("total  ") < out.index("step 4:")
    assert main(["train", str(job), "--resume"]) == 0
    assert "The most memory" not in capsys.readouterr().out  # there is no step left


def test_where_memory_is_short_it_says_what_helps(folder):
    prepared = prepare(Recipe.read(write(folder, ('file = "demo"', 'file = "demo"\noffload = true'))))
    told = prepared.describe_memory(None)
    assert prepared.describe_memory(1 << 40) == told and "offloaded" not in told
    table, advice = prepared.describe_memory(30 << 20).split("A step needs about ")
    assert table.strip() == told and "0.03 GiB is free" in advice and "saves" in advice and "offloaded" not in advice


def test_json_tells_where_the_student_is(folder, capsys):
    assert main(["train", str(write(folder)), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 4 and Path(facts["file"]).exists()


def test_a_run_that_has_begun_goes_on_only_when_asked(folder, capsys):
    job = write(folder, ("total_steps = 4", "total_steps = 2"))
    assert main(["train", str(job)]) == 0
    longer = write(folder)
    assert main(["train", str(longer)]) == 2
    assert "resume it with --resume" in capsys.readouterr().err
    assert main(["train", str(longer), "--resume"]) == 0 and checkpoints_in(folder / "run")[-1].name == "00000004"
    assert main(["train", str(longer), "--resume"]) == 0  # a run that is complete returns at once


@pytest.mark.parametrize("changes,message", [
    ([("preset =", "preste =")], "did you mean 'preset'"),
    ([("[training]", "[trainin]")], "did you mean 'training'"),
    ([('run = "run"', "")], "run is missing"),
    ([("[data]", "[datta]")], "there is no setting 'datta'; did you mean 'data'"),
    ([('file = "demo"', 'file = "none.safetensors"')], r"\[teacher\] file: .*none.safetensors does not exist; write a path that begins"),
    ([('file = "demo"', 'file = "demo"\ndtype = "int3"')], "dtype: unknown 'int3'"),
    ([('file = "demo"', 'file = "demo"\noffload = true\ndtype = "int8"')], "int8 teacher cannot be offloaded"),
    ([('prompts = "prompts.txt"', 'prompts = "none.txt"')], r"\[data\] prompts: .*none.txt does not exist"),
    ([('prompts = "prompts.txt"', 'prompts = "prompts.txt"\nimages = "x"')], "one of images, dataset and prompts"),
    ([('resolution = "64"', 'resolution = "abc"')], "abc"),
    ([("batch_size = 4", "batch_size = 4\naccumulation_steps = 3")], "3 equal parts"),
    ([('preset = "bk-sdm-base"', 'preset = "ssd-1b"')], "plan for SDXL"),
    ([("learning_rate = 1e-3", "learning_rate = 1e-3\nsample_every_steps = 1")], r"\[samples\]: prompts is missing"),
    ([("sampler_steps = 4", "sampler_steps = 25\ntrajectory_states = 8"), ("[training]", '[training]\nobjective = "consistency"\nphases = 4')],
     "no states at timesteps 749, 499, 249, .* such as 24"),
    ([("[training]", "[training]\ntimestep_range = [0, 5000]")], "timestep_range ends at 5000, but the schedule has 1000"),
    ([("[training]", "[training]\nteacher_shares = [1.0, 2.0]")], "2 entries, but there are 1 teachers"),
    ([("[training]", '[training]\nlora_rank = 2\nlora_targets = ["*nowhere*"]')], "matches no layer"),
    ([("[student]", "student = 3\n[x]")], "there is no setting 'x'|student must be a section"),
    ([("images_per_prompt = 2", f"images_per_prompt = {10**9}")], "images_per_prompt must be between 1 and 10,000,000"),
    ([('preset = "bk-sdm-base"', "")], "student and teacher are the same model"),
    ([('preset = "bk-sdm-base"', ""), ("[training]", '[training]\nobjective = "guidance"\nlora_rank = 2')], "are the same model"),
    ([("sampler_steps = 4", "sampler_steps = 4\ntrajectory_states = 2"), ("[training]", '[training]\nobjective = "guidance"\nguidance = 3.0')],
     r"\[training\] learns guidance 3, but \[data\] samples trajectories with 2; set both"),
])  # fmt: skip
def test_bad_jobs_end_in_one_sentence_before_data_are_made(changes, message, folder, capsys, monkeypatch):
    import re

    monkeypatch.setattr(Data, "dataset", None)
    assert main(["train", str(write(folder, *changes))]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


def test_a_lora_on_its_own_teacher_shares_the_weights(folder):
    pytest.importorskip("peft")
    training = 'objective = "guidance"\nguidance = 2.0\ncaption_dropout = 0.0\nlora_rank = 4'
    path = write(folder, ("[student]\npreset = \"bk-sdm-base\"\n", ""), ("[training]", f"[training]\n{training}"),
                 ('file = "demo"', 'file = "demo"\ndtype = "bf16"'))  # fmt: skip
    prepared = prepare(Recipe.read(path))
    student = prepared.models.student()
    teacher = prepared.models.teachers(student).at(0)
    assert prepared.models.shares_base and teacher.network is student.network and student.dtype == torch.bfloat16
    parts = dict(prepared.forecast().parts)
    assert parts["teacher weights"] == 0 and parts["student weights"] < 2.5 * prepared.models.architecture.num_parameters
    prepared.train(lambda progress: None)
    assert prepared.run.result_file.name == "lora.safetensors"
    changes = ("[training]", f"[training]\n{training}"), ('run = "run"', 'run = "pruned"')
    with pytest.raises(ValueError, match="offload is for a teacher beside its student"):
        prepare(
            Recipe.read(
                write(
                    folder,
                    ('[student]\npreset = "bk-sdm-base"\n', ""),
                    changes[0],
                    ('file = "demo"', 'file = "demo"\noffload = true'),
                )
            )
        )
    unshared = Recipe.read(write(folder, *changes))
    assert not prepare(unshared).models.shares_base
    for joint_steps, shares in ((0, True), (5, False)):
        experts = f"[experts]\ncount = 2\njoint_steps = {joint_steps}\n\n[training]\n{training}"
        several = write(
            folder,
            ('[student]\npreset = "bk-sdm-base"\n', ""),
            ("[training]", experts),
            ('run = "run"', f'run = "{joint_steps}"'),
        )
        assert prepare(Recipe.read(several)).models.shares_base == shares


def test_paths_begin_in_the_folder_of_the_recipe_or_at_home(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    (tmp_path / "job.toml").write_text(JOB)
    recipe = Recipe.read(tmp_path / "job.toml")
    told = {"runs/x": tmp_path / "runs" / "x", "~/x": tmp_path / "home" / "x", str(tmp_path / "x"): tmp_path / "x"}
    assert {name: recipe.path(name) for name in told} == told


@pytest.mark.parametrize("dtype,stored", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp8", torch.float8_e4m3fn)])
def test_a_teacher_is_kept_in_its_precision(dtype, stored, folder, made):
    prepared = prepare(Recipe.read(write(folder)))
    file = prepared.models.teacher_files[0]
    plain = prepared.models.load(TeacherSettings(file="demo"), file)
    teacher = prepared.models.load(TeacherSettings(file="demo", dtype=dtype), file)
    convolution = teacher.module("down.0.resnet.0").conv1.weight
    assert convolution.dtype == stored and teacher.dtype == {"fp8": torch.bfloat16}.get(dtype, stored)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 8, 64)
    with torch.no_grad():
        answer = teacher(inputs[0].to(teacher.dtype), inputs[1], inputs[2].to(teacher.dtype)).float()
        expected = plain(*inputs)
    assert 0 < (answer - expected).norm() < 0.15 * expected.norm()


def test_an_offloaded_teacher_lies_in_the_computers_memory(folder):
    prepared = prepare(Recipe.read(write(folder)))
    teacher = prepared.models.load(TeacherSettings(file="demo", offload=True), prepared.models.teacher_files[0])
    hooks = [m for m in teacher.network.modules() if getattr(m, "_diffusers_hook", None) is not None]
    assert hooks and {p.device.type for p in teacher.network.parameters()} == {"cpu"} and teacher.device == prepared.models.device


@pytest.mark.parametrize(
    "run,message", [("file/run", "cannot write"), ("begun", "was started with learning_rate"), ("full", "is not a run")]
)
def test_a_run_that_cannot_be_is_refused_before_data_are_made(run, message, folder, capsys, monkeypatch):
    def late(*_):
        raise AssertionError("too late")

    (folder / "file").write_text("")
    (folder / "full").mkdir()
    (folder / "full" / "thing").write_text("")
    if run == "begun":
        assert main(["train", str(write(folder, ('run = "run"', 'run = "begun"'), ("total_steps = 4", "total_steps = 1")))]) == 0
    monkeypatch.setattr(Data, "dataset", late)
    job = write(folder, ('run = "run"', f'run = "{run}"'), ("learning_rate = 1e-3", "learning_rate = 2e-3"))
    assert main(["train", str(job), "--resume"]) == 2
    assert message in capsys.readouterr().err


def test_a_range_of_guidance_is_drawn_and_learnt(tmp_path):
    pytest.importorskip("peft")
    training = 'objective = "guidance"\nguidance = 2.0\nguidance_min = 1.0\ncaption_dropout = 0.0\nlora_rank = 2'
    (tmp_path / "prompts.txt").write_text("a cat, flat\ntwo dogs, shaded\n")
    states = ("sampler_steps = 4", "sampler_steps = 4\ntrajectory_states = 2")
    path = write(tmp_path, states, ('[student]\npreset = "bk-sdm-base"\n', ""), ("[training]", f"[training]\n{training}"))
    prepared = prepare(Recipe.read(path))
    assert prepared.dataset.scales == (1.0, 2.0)
    prepared.train(lambda progress: None)
    assert prepared.run.complete


def test_fine_tuning_a_finished_student_is_the_same_engine(folder):
    assert main(["train", str(write(folder))]) == 0
    student = checkpoints_in(folder / "run")[-1] / "student.safetensors"
    tune = write(folder, ('file = "demo"', f'file = "{student}"'), ("[student]\npreset", "[student]\n# preset"),
                 ('run = "run"', 'run = "tuned"'), ("[training]", '[training]\nobjective = "task"'),
                 ('prompts = "prompts.txt"', 'encoders = "demo"'))  # fmt: skip
    assert main(["train", str(tune)]) == 0
    before, after = open_unet(student).state_dict, weights(folder / "tuned")
    assert before.keys() == after.keys() and not same(before, after)


def test_a_student_from_a_file_learns_from_its_teacher(folder, capsys):
    assert main(["train", str(write(folder))]) == 0
    file = checkpoints_in(folder / "run")[-1] / "student.safetensors"
    again = write(folder, ('preset = "bk-sdm-base"', f'file = "{file}"'), ('run = "run"', 'run = "again"'))
    assert main(["train", str(again)]) == 0
    assert "plan bk-sdm-base" in capsys.readouterr().out
    wrong = write(folder, ('file = "demo"', f'file = "{file}"'), ('preset = "bk-sdm-base"', 'preset = "bk-sdm-tiny"'),
                  ('run = "run"', 'run = "wrong"'), ('prompts = "prompts.txt"', 'encoders = "demo"'))  # fmt: skip
    assert main(["train", str(wrong)]) == 2 and "already pruned" in capsys.readouterr().err


def test_images_are_encoded_and_trained_on(folder, tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("L", (80, 64), 60 * number).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"a {('cat', 'dog', 'fox')[number]}, flat")
    job = write(folder, ('prompts = "prompts.txt"', 'images = "pictures"\ncache = "encoded"\nflip = true'))
    assert main(["train", str(job)]) == 0
    assert prepare(Recipe.read(job)).dataset.bucket_sizes == [6]


def test_a_split_of_a_dataset_and_its_columns_are_chosen(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    files = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number, file in enumerate(files):
        Image.new("L", (64, 64), 60 * number).save(file)
    rows = datasets.Dataset.from_dict({"drawn": files, "said": ["a cat, flat"] * 3}).cast_column("drawn", datasets.Image())
    datasets.DatasetDict(train=rows, best=rows.select([0, 2])).save_to_disk(tmp_path / "set")
    columns = 'dataset = "set"\nimage_column = "drawn"\ncaption_column = "said"\ncache = "encoded"'
    job = write(folder, ('prompts = "prompts.txt"', f'{columns}\nsplit = "best"'))
    assert prepare(Recipe.read(job)).dataset.bucket_sizes == [2]
    with pytest.raises(ValueError, match="no split 'bestt'; did you mean 'best'"):
        prepare(Recipe.read(write(folder, ('prompts = "prompts.txt"', f'{columns}\nsplit = "bestt"'))))


# --- killed


@pytest.mark.parametrize("name", example_names())
def test_example_recipes_are_as_people_get_them(name, tmp_path, capsys):
    assert main(["recipes", name]) == 0
    (tmp_path / "recipe.toml").write_text(capsys.readouterr().out)
    job = Recipe.read(tmp_path / "recipe.toml")
    assert job.run.endswith(name) or name == "student-lora"
    assert (job.experts is not None) == ("experts" in name)
    assert sizes(job.data.resolution) and (job.student.preset is None or preset(job.student.preset))
    ALONE.check(job.training)


def test_published_recipes_say_what_was_published(tmp_path):
    (tmp_path / "recipe.toml").write_text(example("portrait"))
    recipe = Recipe.read(tmp_path / "recipe.toml").training
    assert (recipe.total_steps, recipe.learning_rate, recipe.precision) == (131_000, 1e-4, "fp16")
    assert (recipe.batch_size, recipe.accumulation_steps) == (32 * 4, 4)
    (tmp_path / "recipe.toml").write_text(example("ssd-1b"))
    job = Recipe.read(tmp_path / "recipe.toml")
    assert len(job.teachers) == 3 and job.training.teacher_mode == "sequence" and len(sizes(job.data.resolution)) == 9


def test_recipes_are_listed_by_their_first_line(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == example_names()
    assert main(["recipes", "none"]) == 2 and "unknown recipe 'none'; choose from" in capsys.readouterr().err
    assert main(["recipes", "heal-flx"]) == 2 and "did you mean 'heal-flux'?" in capsys.readouterr().err


LONG = [("total_steps = 4", "total_steps = 24"), ("save_every_steps = 2", "save_every_steps = 3\nema_decay = 0.9")]
FEW_STEPS = """[training]
objective = "dmd"
phases = 2
fake_updates = 2
fake_warmup_steps = 2
lora_rank = 2
guidance = 2.0
caption_dropout = 0.0"""
TURBO = [
    ('[student]\npreset = "bk-sdm-base"\n', ""),
    ("[training]", f"{FEW_STEPS}\nconsistency_steps = 5"),
    ("total_steps = 4", "total_steps = 12"),
    ("save_every_steps = 2", "save_every_steps = 3"),
]


def test_prompts_alone_are_enough_where_no_image_is_learnt_from(tmp_path, capsys):
    pytest.importorskip("peft")
    (tmp_path / "prompts.txt").write_text("a cat, flat\ntwo dogs, shaded\n")
    path = write(tmp_path, TURBO[0], ("[training]", FEW_STEPS), ("sampler_steps = 4", "sampler_steps = 4\ntrajectory_states = 2"))
    assert main(["train", str(path)]) == 0
    assert "drawing" not in capsys.readouterr().err
    dataset = CachedDataset.open(tmp_path / "cache")
    assert sum(dataset.bucket_sizes) == 2 and dataset.timesteps is None
    examples = dataset.read(0, torch.arange(2))
    assert examples.latents.shape == (2, 4, 8, 8) and not examples.latents.any()
    assert not torch.equal(*examples.contexts)


@pytest.fixture(scope="module")
def uninterrupted(made):
    return _whole(made, "whole", LONG)


@pytest.fixture(scope="module")
def uninterrupted_turbo(made):
    pytest.importorskip("peft")
    return _whole(made, "whole_turbo", TURBO)


def _whole(made, name, changes):
    """The run of a job with these changes."""
    job = write(made, *changes, ('run = "run"', f'run = "{name}"'), name=f"{name}.toml")
    assert main(["train", str(job), "--json"]) == 0
    return made / name


@pytest.mark.parametrize(("changes", "whole"), [(LONG, "uninterrupted"), (TURBO, "uninterrupted_turbo")], ids=["bk-sdm", "dmd"])
def test_killed_at_any_moment_and_resumed_it_is_as_if_nothing_had_happened(changes, whole, folder, request):
    """Kill -9 within a fifth of a second of a new step, twice; then it goes through."""
    whole = request.getfixturevalue(whole)
    job, moment, kills = write(folder, *changes), random.Random(0), 0
    for last in (False, False, True):
        program = Program("train", job, "--resume", cwd=folder)
        if not last:
            _wait_for_a_step(program, folder / "run" / "metrics.csv")
            time.sleep(moment.random() * 0.2)
            program.kill()
        assert (ended := program.wait()) in (0, -signal.SIGKILL), program.said
        kills += ended != 0
    last, expected = checkpoints_in(folder / "run")[-1], checkpoints_in(whole)[-1]
    assert kills == 2 and last.name == expected.name
    written = sorted(path.name for path in expected.glob("*.safetensors"))
    assert written and sorted(path.name for path in last.glob("*.safetensors")) == written
    assert all(same(load_file(last / name), load_file(expected / name)) for name in written)
    assert (folder / "run" / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def _wait_for_a_step(program, metrics):
    """Until it has logged a step, after the header, that was not there."""

    def num_lines():
        return metrics.read_text().count("\n") if metrics.exists() else 0

    deadline, seen = time.monotonic() + 60, max(1, num_lines())
    while not program.ended and time.monotonic() < deadline and num_lines() <= seen:
        time.sleep(0.01)


def test_ctrl_c_keeps_every_step_and_says_how_to_go_on(folder):
    program = Program("train", write(folder, ("total_steps = 4", "total_steps = 4000")), cwd=folder)
    metrics = folder / "run" / "metrics.csv"
    while not program.ended and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.01)
    program.send(signal.SIGINT)
    assert program.wait() == 130 and "resume with the same command and --resume" in program.said
    assert int(checkpoints_in(folder / "run")[-1].name) == len(metrics.read_text().splitlines()) - 1


# --- fine-tuning a finished student

FINE_TUNING = [
    ('[teacher]\nfile = "demo"', ""),
    ('preset = "bk-sdm-base"', 'file = "finished.safetensors"'),
    ('prompts = "prompts.txt"', ""),
    ("[training]", '[training]\nobjective = "task"'),
]


@pytest.fixture
def finished(folder, uninterrupted):
    (folder / "finished.safetensors").symlink_to(checkpoints_in(uninterrupted)[-1] / "student.safetensors")
    return weights(uninterrupted)


def test_a_finished_student_is_fine_tuned_without_a_teacher(folder, finished, capsys):
    assert main(["train", str(write(folder, *FINE_TUNING))]) == 0
    assert "teacher   none" in capsys.readouterr().out
    tuned = weights(folder / "run")
    assert tuned.keys() == finished.keys() and not same(tuned, finished)
    assert "distill.skips" in open_unet(checkpoints_in(folder / "run")[-1] / "student.safetensors").origin


def test_a_lora_of_a_student_is_trained_and_resumed(folder, finished):
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    lora = ("[training]", "[training]\nlora_rank = 2\nlora_alpha = 1.0\nema_decay = 0.9")
    assert main(["train", str(write(folder, *FINE_TUNING, lora))]) == 0
    whole = load_file(checkpoints_in(folder / "run")[-1] / "lora.safetensors")
    other = ('run = "run"', 'run = "other"')
    shorter = write(folder, *FINE_TUNING, lora, other, ("total_steps = 4", "total_steps = 3"))
    assert main(["train", str(shorter)]) == 0
    assert main(["train", str(write(folder, *FINE_TUNING, lora, other)), "--resume"]) == 0
    resumed = load_file(checkpoints_in(folder / "other")[-1] / "lora.safetensors")
    assert same(whole, resumed) and any(w.abs().max() for name, w in whole.items() if "lora_up" in name)
    assert {float(w) for name, w in whole.items() if name.endswith(".alpha")} == {1.0}


@pytest.mark.parametrize("changes,message", [
    ([*FINE_TUNING[:3]], "teacher is missing; add"),
    ([FINE_TUNING[0], FINE_TUNING[3]], r"\[student\] needs a file if there is no teacher"),
    ([*FINE_TUNING, ("[training]", '[training]\nlora_rank = 2\nlora_targets = ["*.attn3.*"]')], r"'\*.attn3.\*' matches no layer"),
])  # fmt: skip
def test_fine_tuning_that_cannot_be_is_refused(changes, message, folder, finished, capsys):
    import re

    assert main(["train", str(write(folder, *changes))]) == 2
    assert re.search(message, capsys.readouterr().err)


# --- several processes


def launch(folder, job, environment):
    """Train in two processes as torchrun starts them; accelerate launch starts several on GPUs, and on a CPU by MPI alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                    "ACCELERATE_USE_CPU": "true"} | environment  # fmt: skip
    return [
        Program("train", job, cwd=folder, environment=together | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)
    ]


@pytest.mark.parametrize("extra,environment", [
    ([("batch_size = 4", "batch_size = 4\naccumulation_steps = 2")], {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    ([("batch_size = 4", "batch_size = 4\naccumulation_steps = 2\nema_decay = 0.9\ngradient_checkpointing = true")],
     {"ACCELERATE_USE_FSDP": "true"}),
], ids=["DDP", "FSDP"])  # fmt: skip
def test_two_processes_lose_as_one_does(extra, environment, folder):
    pytest.importorskip("accelerate")
    alone = write(folder, *extra, ('run = "run"', 'run = "alone"'), name="alone.toml")
    assert main(["train", str(alone), "--json"]) == 0
    job = write(folder, *extra, ('run = "run"', 'run = "two"'), name="two.toml")
    first, second = launch(folder, job, environment)
    assert first.wait() == second.wait() == 0, (first.said, second.said)
    assert ("and the student's weights" in first.said) == ("ACCELERATE_USE_FSDP" in environment) and "2 processes" in first.said
    rows = [list(csv.DictReader(open(folder / name / "metrics.csv"))) for name in ("alone", "two")]
    assert len(rows[0]) == len(rows[1]) == 4
    for one, two in zip(*rows, strict=True):
        for name in ("total", "task", "output", "feature"):
            assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-5), name
    ours, theirs = weights(folder / "alone"), weights(folder / "two")
    # AdamW moves a weight of nearly no gradient by its sign, which rounding decides; so few are a step apart.
    assert max((theirs[name] - ours[name]).abs().mean() for name in ours) < 1e-4


@pytest.mark.parametrize("setting", [
    'optimizer = "lion"', 'precision = "fp16"', 'weight_dtype = "bf16"\nprecision = "bf16"', "lora_rank = 4",
])  # fmt: skip
def test_what_a_sharded_student_cannot_do_is_said(setting, folder):
    recipe = Recipe.read(write(folder, ("[training]", f"[training]\n{setting}"))).training
    ALONE.check(recipe)
    with pytest.raises(ValueError, match=setting.split()[0]):
        Processes(shards=True).check(recipe)


# --- several experts


STUDENTS = [("[training]", '[experts]\ncount = 2\njoint_steps = 2\n[training]'), ("total_steps = 4", "total_steps = 2"),
            ("save_every_steps = 2", "save_every_steps = 1")]  # fmt: skip


@pytest.fixture(scope="module")
def two_experts(made):
    job = write(made, *STUDENTS, ('run = "run"', 'run = "two-experts"'), name="two-experts.toml")
    assert main(["train", str(job)]) == 0
    return Experts.read(made / "two-experts" / "experts")


def test_a_job_trains_a_folder_of_students(two_experts, folder, capsys):
    assert [member.plan for member in two_experts.members] == ["bk-sdm-base"] * 2 and len(two_experts.ranges) == 2
    pruned = open_unet(two_experts.folder.parent / "pruned.safetensors")
    experts = [open_unet(path) for path in two_experts.files]
    assert not any(same(pruned.state_dict, student.state_dict) for student in experts)
    assert all(student.origin == pruned.origin != {} for student in experts)
    assert two_experts.teacher == pruned.metadata["distill.teacher"]


def test_it_is_told_before_the_first_step_and_at_the_end(folder, two_experts, capsys):
    job = write(folder, *STUDENTS, ("count = 2", 'boundaries = "300"'))
    assert main(["train", str(job), "--range", "0"]) == 0
    out = capsys.readouterr()
    assert "experts   2, all weights, started from a student distilled for 2 steps\n0: timesteps 999 to 301" in out.out
    assert "The most memory" in out.out and "step 4 of 6: still to train: range_1" in out.out
    assert main(["train", str(job)]) == 2 and "resume it with --resume" in capsys.readouterr().err
    assert main(["train", str(job), "--resume", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 6 and Experts.read(facts["experts"]).ranges.boundaries == (300.0,)
    assert main(["train", str(job), "--resume"]) == 0  # a training that is complete returns at once
    assert f"step 6: {facts['experts']}" in capsys.readouterr().out


def test_students_of_plans_of_their_own(folder, capsys):
    plans = ("count = 2", 'count = 2\nplans = ["bk-sdm-tiny", "bk-sdm-base"]')
    job = write(folder, *STUDENTS, plans, ('[student]\npreset = "bk-sdm-base"', ""))
    assert main(["train", str(job)]) == 0
    assert "2,142,788 parameters" in capsys.readouterr().out  # the largest is what memory is counted for
    experts = Experts.read(folder / "run" / "experts")
    assert [member.plan for member in experts.members] == ["bk-sdm-tiny", "bk-sdm-base"]
    both = write(folder, *STUDENTS, plans)
    assert main(["train", str(both)]) == 2 and "give either a plan in [student] or plans in [experts]" in capsys.readouterr().err


def test_memory_is_told_for_the_stage_that_needs_the_most(folder):
    lora = ("batch_size = 4", "batch_size = 4\nlora_rank = 2")
    needed = [prepare(Recipe.read(write(folder, *changes))).describe_memory(None)
              for changes in ([("run = \"run\"", "run = \"one\"")], [*STUDENTS, lora], [*STUDENTS, lora, ("joint_steps = 2", "joint_steps = 0")])]  # fmt: skip
    assert needed[0] == needed[1] != needed[2]


def test_killed_while_students_train_and_resumed_it_is_as_if_nothing_had_happened(folder, two_experts):
    job, kills = write(folder, *STUDENTS), 0
    for stage in ("joint", "range_1"):
        program = Program("train", job, "--resume", cwd=folder)
        _wait_for_a_step(program, folder / "run" / stage / "metrics.csv")
        program.kill()
        assert (ended := program.wait()) in (0, -signal.SIGKILL), program.said
        kills += ended != 0
    assert kills and main(["train", str(job), "--resume", "--json"]) == 0
    experts = Experts.read(folder / "run" / "experts")
    for ours, theirs in zip(experts.files, two_experts.files, strict=True):
        assert same(open_unet(ours).state_dict, open_unet(theirs).state_dict)
    for stage in ("joint", "range_0", "range_1"):
        expected = (two_experts.folder.parent / stage / "metrics.csv").read_bytes()
        assert (folder / "run" / stage / "metrics.csv").read_bytes() == expected


@pytest.mark.parametrize("changes,arguments,message", [
    ([("count = 2", "cuont = 2")], [], r"\[experts\]: there is no setting 'cuont'; did you mean 'count'"),
    ([("count = 2", 'boundaries = "abc"')], [], "boundaries must be numbers"),
    ([("count = 2", 'split = "error"'), ("joint_steps = 2", "joint_steps = 0")], [], "set joint_steps above 0"),
    ([("count = 2", 'plans = ["none"]'), ('preset = "bk-sdm-base"', "")], [], "none does not exist"),
    ([], ["--range", "2"], "there is no expert 2; choose one of 0 to 1"),
    ([], ["--range", "-1"], "must be at least 0"),
    ([("learning_rate = 1e-3", "learning_rate = 1e-3\nsample_every_steps = 1\n")], [], "needs a student for all timesteps"),
    ([("learning_rate = 1e-3", "learning_rate = 1e-3\ntimestep_range = [0, 500]")], [], "each has its own; remove it"),
    ([("[experts]\ncount = 2\njoint_steps = 2", "")], ["--range", "0"], "this recipe trains a single student"),
])  # fmt: skip
def test_experts_that_cannot_be_end_in_one_sentence_before_data_are_made(
    changes, arguments, message, folder, capsys, monkeypatch
):
    import re

    monkeypatch.setattr(Data, "dataset", None)
    try:
        assert main(["train", str(write(folder, *STUDENTS, *changes)), *arguments]) == 2
    except SystemExit as error:  # by argparse
        assert error.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error
