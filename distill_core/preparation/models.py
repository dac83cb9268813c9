"""The interface that a recipe's models offer to training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from ..base.packages import check_installed
from ..base.storage import fingerprint
from ..data.dataset import Dataset
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedule import NoiseSchedule
from ..networks.network import Network, NetworkFile
from ..networks.quantised import QUANTISED
from ..pruning.plan import PruningPlan, preset
from ..pruning.plan_text import find_plan
from ..recipe import Recipe, TeacherSettings
from ..training.memory import Forecast
from ..training.processes import Processes
from ..training.run import Inputs
from ..training.settings import TrainingSettings
from ..training.teachers import Teachers


class Models(ABC):
    """The models of a recipe: files open and checked, plans read; networks are loaded when asked for."""

    plan: PruningPlan | None
    """From teacher to student; None if they have the same shape."""
    pixels_per_latent: ClassVar[int] = 8

    def __init__(self, recipe: Recipe, processes: Processes, teacher_settings: Sequence[TeacherSettings]):
        """teacher_settings: of the networks that teach, or of the student that is fine-tuned."""
        self.recipe, self.processes, self.device, self.teacher_settings = recipe, processes, processes.device, teacher_settings
        if any(teacher.dtype in QUANTISED for teacher in recipe.teachers):
            check_installed(["bitsandbytes"], f"a teacher in {' or '.join(QUANTISED)}")

    def check_shared(self) -> None:
        """``ValueError`` for settings that weights cannot have which teacher and student share."""
        if self.shares_base and any(teacher.offload for teacher in self.teacher_settings):
            raise ValueError(
                "[teacher]: offload is for a teacher beside its student, and here both share their weights; set it to false, and choose "
                "the dtype fp8 or nf4 to save memory"
            )

    def student_plan(self, teacher: Network) -> PruningPlan | None:
        """The plan that the recipe gives for the student; None if it gives none."""
        given = self.recipe.student
        if given.preset is not None:
            return preset(given.preset)
        return None if given.plan is None else find_plan(given.plan, teacher, self.recipe.folder)

    @property
    @abstractmethod
    def teacher_files(self) -> Sequence[NetworkFile]:
        """Files of the networks of ``teacher_settings``."""

    @property
    @abstractmethod
    def architecture(self) -> Network:
        """Architecture of the student; of several, the largest one's."""

    @property
    @abstractmethod
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the teachers."""

    @property
    @abstractmethod
    def latent_channels(self) -> int: ...

    @property
    @abstractmethod
    def shares_base(self) -> bool:
        """Whether every student is a LoRA on the only teacher, so that its weights are in memory once."""

    @abstractmethod
    def check_lesson(self) -> None:
        """``ValueError`` if the student could learn nothing from its teachers."""

    @abstractmethod
    def inputs(self, data: Dataset) -> Inputs:
        """What a run on these models starts with."""

    @abstractmethod
    def teacher(self) -> Denoiser:
        """The first teacher, loaded in the dtype of its settings."""

    @abstractmethod
    def student(self) -> Denoiser:
        """The untrained student on the device."""

    @abstractmethod
    def teachers(self, student: Denoiser) -> Teachers:
        """The teachers of a student."""

    @abstractmethod
    def forecast(self, dataset: Dataset, training: TrainingSettings) -> Forecast:
        """Forecast of the memory a step needs on the device."""

    @property
    def family(self) -> str:
        return self.teacher_files[0].architecture.family

    @property
    def run_folder(self) -> Path:
        return self.recipe.path(self.recipe.run)

    @cached_property
    def fingerprints(self) -> list[str]:
        """What identifies the weights of each teacher."""
        return [fingerprint(file.tensors) for file in self.teacher_files]
