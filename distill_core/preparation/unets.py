"""A recipe's models that are UNets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch

from ..base.precision import DTYPES
from ..base.storage import fingerprint
from ..data.dataset import Dataset, largest_example
from ..demo.teacher import teacher_file
from ..diffusion.denoiser import Denoiser, DiffusersDenoiser, Load, check_trainable
from ..diffusion.schedule import NoiseSchedule, of_sampling
from ..lora.layers import trained_shapes, without_lora
from ..networks.architecture import Architecture
from ..networks.build import build_unet, load_unet
from ..networks.files import UNetFile, open_unet
from ..networks.quantised import QUANTISED, computes, hold, kept_bytes
from ..pruning.plan import PruningPlan, name_map, plan_between, plan_in, pruned
from ..pruning.plan_text import find_plan
from ..pruning.prune import pruned_file
from ..recipe import DEMO, Recipe, TeacherSettings
from ..training.checkpoints import own
from ..training.lesson import check_lesson
from ..training.memory import Forecast, MemorySettings, forecast
from ..training.processes import Processes
from ..training.run import Inputs
from ..training.settings import TrainingSettings
from ..training.teachers import Teachers
from .models import Models


class UNetModels(Models):
    """UNets: several teachers, and a student that is pruned, has its own file, or is the teacher itself."""

    def __init__(self, recipe: Recipe, processes: Processes, teacher_settings: Sequence[TeacherSettings]):
        super().__init__(recipe, processes, teacher_settings)
        self._files = [open_file(recipe, settings.file) for settings in teacher_settings]
        self._check_teachers()
        first = self.teacher_files[0]
        self.plans = (
            [find_plan(text, first.architecture, recipe.folder) for text in recipe.experts.plans] if recipe.experts else []
        )
        self.plan, self.student_file = (self._largest(first), None) if self.plans else self._student(first)
        if self.student_file is not None:
            _check_trainable(self.student_file)
        self.check_shared()
        if recipe.experts and self.shares_base and self.teacher_settings[0].dtype in QUANTISED:
            raise ValueError(
                f"a shared base is saved to disk, and {self.teacher_settings[0].dtype} weights cannot be saved; use fp8"
            )

    @property
    def teacher_files(self) -> list[UNetFile]:
        return self._files

    def _check_teachers(self) -> None:
        first, settings_of_first = self.teacher_files[0], self.teacher_settings[0]
        for settings, file in zip(self.teacher_settings, self.teacher_files, strict=True):
            if dict(file.architecture.shapes) != dict(first.architecture.shapes):
                raise ValueError(
                    f"teacher {settings.file} has another architecture than {settings_of_first.file}; use teachers of one"
                    " architecture"
                )
            _check_trainable(file)

    def _student(self, teacher: UNetFile) -> tuple[PruningPlan | None, UNetFile | None]:
        """The plan from teacher to student, and the student's file if it has its own."""
        settings = self.recipe.student
        if settings.file is not None:
            file = open_file(self.recipe, settings.file)
            if not self.recipe.teachers:
                return plan_in(file.metadata), file
            return plan_between(teacher.architecture, file.architecture, plan_in(file.metadata)), file
        plan = self.student_plan(teacher.architecture)
        return plan, teacher if plan is None else None

    def _largest(self, teacher: UNetFile) -> PruningPlan:
        """The plan of the largest student."""
        shape = teacher.architecture
        return max(self.plans, key=lambda plan: pruned(shape, name_map(shape, plan)).num_parameters)

    @cached_property
    def architecture(self) -> Architecture:
        """Architecture of the student."""
        if self.student_file is not None:
            return self.student_file.architecture
        teacher = self.teacher_files[0].architecture
        assert self.plan is not None  # else the student has a file
        return pruned(teacher, name_map(teacher, self.plan))

    @property
    def latent_channels(self) -> int:
        return self.teacher_files[0].architecture.channels("conv_in")[0]

    @property
    def schedule(self) -> NoiseSchedule:
        return of_sampling(self.teacher_files[0].sampling)

    @cached_property
    def student_fingerprint(self) -> str:
        """What identifies the student's own weights; empty if it is made by pruning."""
        return "" if self.student_file is None else fingerprint(self.student_file.tensors)

    def check_lesson(self) -> None:
        theirs = {(weights, file.sampling) for weights, file in zip(self.fingerprints, self.teacher_files, strict=True)}
        ours = self.student_file and (self.student_fingerprint, self.student_file.sampling)
        same = not self.recipe.experts and theirs == {ours}
        training = self.recipe.training
        check_lesson(training, self.teacher_files[0].architecture, self.architecture, same)
        if training.lora_rank:
            self._check_lora(training)

    def _check_lora(self, training: TrainingSettings) -> None:
        """``ValueError`` for a LoRA that the student cannot have."""
        with torch.device("meta"):
            network = build_unet(self.architecture)
        student = DiffusersDenoiser(network=network, architecture=self.architecture)
        trained_shapes(student, training.lora_rank, training.lora_targets, training.lora_dora)

    def inputs(self, data: Dataset) -> Inputs:
        return Inputs(teachers=tuple(self.fingerprints), student=self.student_fingerprint, data=data.fingerprint)

    def student(self, plan: PruningPlan | None = None, name: str = "pruned") -> Denoiser:
        """The untrained student on the device. plan: an expert's own, in place of the recipe's. name: of the pruned file, without its suffix."""
        if self.shares_base:
            return self.teacher()
        file = self.student_file
        if file is None:
            plan = plan or self.plan
            assert plan is not None  # else the student has a file
            with self.processes.main_first():
                file = pruned_file(self.teacher_files[0], own(self.run_folder / f"{name}.safetensors"), plan)
        dtype = DTYPES[self.recipe.training.weight_dtype]
        return DiffusersDenoiser.of_file(file, load_unet(file, dtype).to(self.device))

    @property
    def shares_base(self) -> bool:
        """Whether every student is a LoRA on the only teacher, without joint training, so that its weights are in memory once."""
        same = self.student_file is self.teacher_files[0] and len(self.recipe.teachers) == 1
        parted = self.recipe.experts is None or self.recipe.experts.joint_steps == 0
        return same and parted and bool(self.recipe.training.lora_rank)

    def teachers(self, student: Denoiser) -> Teachers:
        loads = [without_lora(student)] if self.shares_base else self.teacher_loads
        return Teachers(loads, self.recipe.training)

    @property
    def teacher_loads(self) -> list[Load]:
        pairs = zip(self.teacher_settings, self.teacher_files, strict=True)
        return [partial(self.load, settings, file) for settings, file in pairs]

    def teacher(self) -> Denoiser:
        return self.load(self.teacher_settings[0], self.teacher_files[0])

    def load(self, settings: TeacherSettings, file: UNetFile) -> Denoiser:
        """Load a teacher in the dtype of its settings, offloaded if they say so."""
        compute = DTYPES[computes(settings.dtype)]
        network = load_unet(file, compute)
        hold(network, settings.dtype, self.device, offloaded=settings.offload)
        return replace(DiffusersDenoiser.of_file(file, network), computes=(self.device, compute))

    def forecast(self, dataset: Dataset, training: TrainingSettings) -> Forecast:
        example, first = largest_example(dataset), self.teacher_files[0].architecture
        _, channels, height, width = example.latents.shape
        dtypes = (teacher.dtype for teacher in self.teacher_settings)
        settings = MemorySettings(
            training=training,
            teacher_dtype=max(dtypes, key=partial(kept_bytes, first.shapes)),
            teacher_offloaded=self.device.type != "cpu" and all(teacher.offload for teacher in self.teacher_settings),
            shares_base=self.shares_base,
            num_teachers=len(self.teacher_settings),
            num_processes=self.processes.count,
            shards=self.processes.shards,
            device=self.device.type,
        )
        return forecast(
            teacher=first,
            student=self.architecture,
            plan=self.plan,
            latent_shape=(channels, height, width),
            num_tokens=example.contexts.shape[1],
            settings=settings,
        )


def _check_trainable(file: UNetFile) -> None:
    """Raise ``ValueError`` naming a file that cannot be trained, before data are encoded."""
    try:
        check_trainable(file.architecture, file.sampling)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def open_file(recipe: Recipe, name: str) -> UNetFile:
    """The UNet of a file that a recipe names, or of the demo."""
    return teacher_file() if name == DEMO else open_unet(recipe.path(name))
