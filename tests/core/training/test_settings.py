import math
from dataclasses import replace
from typing import get_type_hints

import pytest

from distill_core import quickstart
from distill_core.base.documents import read_toml
from distill_core.base.settings import check_range, from_mapping, limits_of, to_toml
from distill_core.pruning import analyse
from distill_core.recipe import DataSettings, SampleSettings, StudentSettings, TeacherSettings
from distill_core.routing.one_to_many import ExpertsSettings
from distill_core.training.settings import TrainingSettings

LIMITS = limits_of(TrainingSettings)
RANGES = {name: limits.within for name, limits in LIMITS.items() if limits.within is not None}


@pytest.mark.parametrize(
    "field,value",
    [("total_steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("caption_dropout", 1.5), ("lr_schedule", "cosin"),
     ("objective", "kd"), ("warmup_steps", -1), ("max_grad_norm", 0.0), ("save_every_steps", 0), ("weight_decay", -1.0),
     ("weighting", "snr"), ("optimizer", "adam"), ("precision", "fp8"), ("weight_dtype", "fp16"), ("ema_decay", 1.0),
     ("teacher_mode", "all"), ("teacher_shares", (0.5, 0.0)), ("teacher_shares", (1.0, math.inf)), ("trackers", ("comet",)), ("accumulation_steps", 0),
     ("task_weight", -1.0), ("timestep_range", (5, 5)), ("timestep_range", (5,)), ("lora_rank", -1), ("learning_rate", math.nan), ("noise_offset", 2.0), ("input_perturbation", -0.1),
     ("timesteps", "normal"), ("snr_gamma", 0.0), ("keep_checkpoints", 0), ("validation_share", 0.9), ("lora_alpha", 0.0), ("learning_rate", 1e300), ("max_grad_norm", 1e-320), ("refit_examples", 1)],
)  # fmt: skip
def test_a_bad_setting_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        TrainingSettings(**{field: value})


def test_every_number_of_a_recipe_has_a_range():
    hints = get_type_hints(TrainingSettings)
    numbers = {name for name, hint in hints.items() if hint in (int, float, int | None, float | None)}
    assert numbers == RANGES.keys() | {"lora_alpha", "snr_gamma"}
    assert LIMITS["lora_alpha"].above == LIMITS["snr_gamma"].above == 0


@pytest.mark.parametrize(
    "kind", [TrainingSettings, ExpertsSettings, DataSettings, SampleSettings, TeacherSettings, StudentSettings]
)
def test_every_setting_of_a_recipe_says_what_it_means(kind):
    assert not [name for name, limits in limits_of(kind).items() if not limits.words.endswith(".")]


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [10**30, -(10**30), math.nan, math.inf, True, "1", [1], 1.5], ids=repr)
def test_no_number_is_taken_that_is_none_or_out_of_its_range(name, value):
    """A link in a graph gives whatever comes, past the widget and its bounds."""
    if get_type_hints(TrainingSettings)[name] in (float, float | None) and value == 1.5:
        return
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        TrainingSettings(**{name: value})


def test_the_bounds_of_a_range_are_in_it():
    for name, bounds in RANGES.items():
        for bound in bounds:
            check_range(name, bound, bounds)
        with pytest.raises(ValueError, match=f"{name} must be between"):
            check_range(name, bounds[1] + 1, bounds)


@pytest.mark.parametrize(
    "kind,settings,message",
    [(ExpertsSettings, {"count": 10**7}, "count must be between 1 and 100, got 10,000,000"), (ExpertsSettings, {"overlap": -1}, "overlap must be"),
     (ExpertsSettings, {"joint_steps": 1.0}, "joint_steps must be a whole number, got 1.0"), (ExpertsSettings, {"boundaries": 5}, "boundaries must be text"),
     (DataSettings, {"images_per_prompt": 10**9}, "images_per_prompt must be between 1 and 10,000,000"), (DataSettings, {"encode_batch_size": 0}, "encode_batch_size must be"),
     (DataSettings, {"guidance": math.nan}, "guidance must be between 1 and 100, got nan"), (DataSettings, {"resolution": "64000000"}, "resolution must be between 8 and 16,384"),
     (DataSettings, {"sampler_steps": 10**6}, "sampler_steps must be"), (DataSettings, {"trajectory_states": -1}, "trajectory_states must be"),
     (SampleSettings, {"steps": 0}, "steps must be between 1 and 1,000"), (SampleSettings, {"guidance": math.inf}, "guidance must be"),
     (SampleSettings, {"resolution": "64x6400000"}, "resolution must be"), (SampleSettings, {"prompts": "one"}, "prompts must be a list, each entry text"),
     (quickstart.Settings, {"num_prompts": 0}, "num_prompts must be"), (quickstart.Settings, {"train_steps": 10**12}, "train_steps must be"),
     (quickstart.Settings, {"seed": 2**70}, "seed must be"), (quickstart.Settings, {"sample_steps": 0}, "sample_steps must be"),
     (analyse.Settings, {"saving": 1.0}, "saving must be between 0.01 and 0.95, got 1"), (analyse.Settings, {"saving": math.nan}, "saving must be"),
     (analyse.Settings, {"num_examples": 10**9}, "num_examples must be"), (analyse.Settings, {"num_timesteps": 0}, "num_timesteps must be"),
     (analyse.Settings, {"measure": "time"}, "measure: unknown 'time'"), (analyse.Settings, {"criterion": "size"}, "criterion: unknown 'size'")],
)  # fmt: skip
def test_all_settings_are_held_to_their_ranges(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize(
    "settings,message",
    [({"batch_size": 6, "accumulation_steps": 4}, "split into 4 equal parts"),
     ({"validate_every_steps": 5}, "set validate_every_steps and validation_share both above 0"),
     ({"keep_best": 1}, "keep_best needs a validation loss"),
     ({"objective": "task", "task_weight": 0.0}, "at least one loss"),
     ({"objective": "guidance", "guidance": 3.0, "guidance_min": 3.0, "lora_rank": 4}, "guidance_min must be below guidance"),
     ({"objective": "guidance", "guidance": 3.0, "guidance_min": 2.0}, "set lora_rank above 0"),
     ({"weight_dtype": "bf16", "precision": "fp16"}, "precision to bf16"),
     ({"objective": "task", "guidance": 7.5}, "set guidance to 1"),
     ({"objective": "local", "guidance": 7.5}, "set guidance to 1"),
     ({"objective": "dmd", "total_steps": 100, "local_steps": 20, "consistency_steps": 20}, "must be above local_steps, got 20 and 20"),
     ({"weight_dtype": "bf16", "optimizer": "prodigy"}, "needs weight_dtype fp32")],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**settings)


def test_learning_rate_schedules():
    recipe = TrainingSettings(total_steps=12, warmup_steps=2, lr_schedule="cosine")
    factors = [recipe.lr_factor(step) for step in range(13)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.5) and factors[12] == pytest.approx(0, abs=1e-9)
    assert replace(recipe, lr_schedule="linear").lr_factor(7) == pytest.approx(0.5)
    assert replace(recipe, lr_schedule="constant").lr_factor(11) == 1.0
    assert all(math.isfinite(f) for f in factors)


def test_a_recipe_survives_the_way_through_a_file(tmp_path):
    recipe = TrainingSettings(
        objective="segmind", feature_weight=0.25, teacher_shares=(2.0, 1.0), trackers=("tensorboard",), ema_decay=0.99
    )
    (tmp_path / "recipe.toml").write_text(to_toml(recipe.to_mapping()))
    assert from_mapping(TrainingSettings, read_toml(tmp_path / "recipe.toml"), "recipe") == recipe


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_file_that_powershell_wrote_is_read(encoding, tmp_path):
    (tmp_path / "r.toml").write_bytes('run = "ä"\r\n[training]\r\ntotal_steps = 3\r\n'.encode(encoding))
    assert read_toml(tmp_path / "r.toml") == {"run": "ä", "training": {"total_steps": 3}}


@pytest.mark.parametrize(
    "table,message",
    [({"learning_rat": 1e-3}, "did you mean 'learning_rate'"), ({"zzz": 1}, "the settings are"),
     ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"), ({"compile": 1}, "compile must be true or false"),
     ({"trackers": "wandb"}, "trackers must be a list, each entry text"), ({"optimizer": "adm"}, "recipe: optimizer: unknown 'adm'")],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named(table, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(TrainingSettings, table, "recipe")


def test_a_whole_number_will_do_where_a_number_is_asked():
    assert from_mapping(TrainingSettings, {"learning_rate": 1}, "recipe").learning_rate == 1


@pytest.mark.parametrize("text", ["total_steps = ", "\x00"])
def test_a_damaged_file_is_one_sentence(text, tmp_path):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ValueError, match="r.toml is not valid TOML"):
        read_toml(tmp_path / "r.toml")


def test_weights_override_the_objectives_own():
    def used(**settings):
        return {name: weight for name, weight in TrainingSettings(**settings).weighted_objective.weights.items() if weight}

    assert used(objective="laptop-diff", task_weight=0.0, feature_weight=3.0) == {"output": 1.0, "feature": 3.0}
    assert TrainingSettings(objective="laptop-diff", task_weight=0.0).weighted_objective.feature_loss == "normalised"
    assert used(objective="task", output_weight=0.5) == {"task": 1.0, "output": 0.5}
    assert used(objective="dmd", diversity_weight=0.0) == {"dmd": 1.0}


def test_local_steps_come_before_the_objective():
    settings = TrainingSettings(objective="output", local_steps=3, local_loss="squared")
    assert [settings.objective_at(step).only_local for step in range(5)] == [True, True, True, False, False]
    assert settings.objective_at(0).feature_loss == "squared" and settings.objective_at(3) == settings.weighted_objective
    assert settings.learns_locally and settings.uses_teacher and not settings.weighted_objective.local
    assert TrainingSettings(objective="task", local_steps=1).uses_teacher and not TrainingSettings(objective="task").uses_teacher
    assert TrainingSettings(objective="local").objective_at(9).only_local
    assert TrainingSettings(objective="local", local_loss="normalised").weighted_objective.feature_loss == "normalised"


@pytest.mark.parametrize("settings,several,free", [
    ({}, False, True), ({}, True, False), ({"teacher_mode": "mixture"}, True, True), ({"lr_schedule": "linear"}, False, False),
])  # fmt: skip
def test_the_total_may_change_where_no_step_depends_on_it(settings, several, free):
    assert ("total_steps" in TrainingSettings(**settings).may_change(several)) == free


@pytest.mark.parametrize(
    "settings,sampling",
    [
        ({}, {}),
        ({"objective": "guidance", "guidance": 3.0}, {"cfg": "1"}),
        ({"objective": "consistency"}, {"steps": "4", "sampler": "euler", "scheduler": "simple"}),
        (
            {"objective": "consistency", "phases": 1, "guidance": 3.0},
            {"steps": "4", "sampler": "lcm", "scheduler": "simple", "cfg": "1"},
        ),
    ],
)
def test_settings_say_how_the_result_is_sampled(settings, sampling):
    assert TrainingSettings(**settings).sampling == sampling
