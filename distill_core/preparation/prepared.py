"""From a recipe to a training: models open, data encoded or drawn, the run's folder checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ..data.dataset import Dataset, num_examples
from ..recipe import Recipe
from ..routing.one_to_many import OneToMany, Start
from ..training.loop import Progress, distill
from ..training.memory import Forecast
from ..training.preflight import check_experts_run, check_run
from ..training.processes import ALONE, Processes
from ..training.run import Run
from ..training.teachers import shares_of
from .data import Data, OnItem
from .models import Models
from .opening import open_models
from .unets import UNetModels


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A recipe with its models and data, ready to train; see `prepare`."""

    recipe: Recipe
    models: Models
    data: Data
    dataset: Dataset
    run: Run | OneToMany
    only: int | None = None
    """The only expert to train, as in `OneToMany.train`."""

    def describe(self) -> str:
        """What will be trained, one line per topic."""
        examples = num_examples(self.dataset)
        teachers = ", ".join(f"{teacher.file} ({teacher.dtype})" for teacher in self.recipe.teachers)
        training = self.recipe.training
        share = (
            f"{self.models.processes.count} processes share each batch"
            + " and the student's weights" * self.models.processes.shards
        )
        return "\n".join([
            *([share] if self.models.processes.count > 1 else []),
            f"teacher   {teachers or 'none'}",
            f"student   {self.models.architecture.num_parameters:,} parameters, plan {self.models.plan.name if self.models.plan else 'none'}",
            *filter(None, [self.run.describe()]),
            f"data      {examples:,} examples, image sizes: {len(self.dataset.bucket_sizes)}",
            f"training  {training.objective}{f', LoRA of rank {training.lora_rank}' * bool(training.lora_rank)}, {training.total_steps:,} steps of batch {training.batch_size}, {training.optimizer} at "
            f"{training.learning_rate:g}, from step {self.run.step}",
            f"run       {self.run.folder}",
        ])  # fmt: skip

    def describe_memory(self, free_bytes: int | None) -> str:
        """The memory of a step on the device, part by part, and advice if that exceeds the free memory.

        free_bytes: as returned by `memory.free_bytes`.
        """
        forecast = self.forecast()
        return "\n".join(filter(None, [forecast.describe(), forecast.describe_shortage(free_bytes)]))

    def forecast(self) -> Forecast:
        """Forecast of the memory a step needs on the device."""
        return self.models.forecast(self.dataset, self.run.heaviest_settings)

    def train(self, on_step: Callable[[Progress], None], on_stage: Callable[[str], None] = lambda stage: None) -> None:
        """Train to the end. on_stage: called with what begins."""
        if isinstance(self.run, OneToMany):
            self.run.train(self.only, on_step=on_step, on_stage=on_stage)
            return
        previews = self.data.previews()
        self.data.close_texts()
        student = self.models.student()
        distill(
            self.run,
            student=student,
            teacher=self.models.teachers(student),
            plan=self.models.plan,
            dataset=self.dataset,
            previews=previews,
            on_step=on_step,
            on_refit=lambda done, total: on_stage("refitting" if done < total else "training"),
            processes=self.models.processes,
        )


def prepare(
    recipe: Recipe,
    processes: Processes = ALONE,
    on_item: OnItem = lambda what, done, total: None,
    *,
    only: int | None = None,
) -> Prepared:
    """Open the models of a recipe, encode or draw its data, which may take hours, and open its run.

    What can be checked without data is checked first. on_item: called with (task, done, total) while data are encoded or drawn.
    only: of several experts the only one to train. ``ValueError`` for a recipe that cannot be trained.
    """
    processes.check(recipe.training)
    recipe.check_paths()
    models = open_models(recipe, processes)
    recipe = models.recipe
    _check_run(models, only)
    data = Data(recipe, models)
    data.check()
    with processes.main_first():
        dataset = data.dataset(on_item)
    with processes.main_first():
        run: Run | OneToMany
        run = _one_to_many(models, dataset) if recipe.experts and isinstance(models, UNetModels) else _run(models, dataset)
    return Prepared(recipe=recipe, models=models, data=data, dataset=dataset, run=run, only=only)


def _check_run(models: Models, only: int | None) -> None:
    """Raise errors that can be found before data are read."""
    training, experts, shapes = models.recipe.training, models.recipe.experts, models.architecture.shapes
    models.check_lesson()
    training.batching.timesteps_of(models.schedule)
    if training.uses_teacher:
        shares_of(training, len(models.recipe.teachers))
    if experts is None or not isinstance(models, UNetModels):
        if only is not None:
            raise ValueError("this recipe trains a single student; add [experts] to train one for a range")
        check_run(models.run_folder, training, shapes)
    else:
        experts.check_number(only, models.schedule)
        num_plans = len({repr(plan) for plan in models.plans}) or 1
        check_experts_run(models.run_folder, training, shapes, experts.stages(training, models.schedule, num_plans))


def _run(models: Models, dataset: Dataset) -> Run:
    inputs = replace(models.inputs(dataset), plan=models.plan.name if models.plan else "")
    return Run(models.run_folder, models.recipe.training, inputs, main=models.processes.main)


def _one_to_many(models: UNetModels, dataset: Dataset) -> OneToMany:
    assert models.recipe.experts is not None
    starts = [Start(plan, partial(models.student, plan, f"pruned_{number}")) for number, plan in enumerate(models.plans)]
    return OneToMany(
        models.run_folder,
        models.recipe.experts,
        models.recipe.training,
        starts=starts or [Start(models.plan, models.student)],
        teachers=None if models.shares_base else models.teacher_loads,
        schedule=models.schedule,
        dataset=dataset,
        inputs=models.inputs(dataset),
        processes=models.processes,
    )
