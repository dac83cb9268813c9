"""A recipe: one TOML file that describes a whole training: teachers, student, data, settings, and folder of the run.

```toml
run = "runs/small"

[teacher]                       # use [[teacher]] for several teachers; leave out to fine-tune a student
file = "sd15.safetensors"
dtype = "fp16"

[student]
preset = "bk-sdm-small"

[data]
images = "my_images"            # or prompts = "prompts.txt", and the teacher draws them
encoders = "sd15-diffusers"

[training]                      # `settings.TrainingSettings`
total_steps = 50000

[experts]                       # `one_to_many.ExpertsSettings`: several experts, each for a range of timesteps
count = 4
```
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .base.documents import one_line, read_toml
from .base.precision import DTYPES
from .base.settings import (
    BATCH,
    GUIDANCE,
    SAMPLER_STEPS,
    SEEDS,
    SIDE_PX,
    check_choice,
    check_names,
    check_range,
    check_settings,
    from_mapping,
    setting,
)
from .data.images import sizes
from .data.teacher_data import MOST_IMAGES
from .networks.quantised import QUANTISED
from .routing.one_to_many import ExpertsSettings
from .training.settings import TrainingSettings

DEMO = "demo"
"""Name of the bundled teacher, in place of a file."""
EXAMPLES = Path(__file__).parent / "recipes"


def example_names() -> list[str]:
    """Names of the bundled example recipes."""
    return sorted(path.stem for path in EXAMPLES.glob("*.toml"))


def example(name: str) -> str:
    """Text of an example recipe; ``ValueError`` lists the choices."""
    check_choice(name, example_names(), "unknown recipe")
    return (EXAMPLES / f"{name}.toml").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """One teacher."""

    file: str = setting(words="Checkpoint or diffusers folder, or `demo`; a transformer must be a folder.")
    dtype: str = setting(
        "fp32",
        "Data type of its weights. fp8, int8 and nf4 (4 bits) compute in bf16.",
        choices=(*DTYPES, *QUANTISED),
    )
    offload: bool = setting(False, "Keep the teacher in system memory, with each layer on the GPU only while it computes.")

    def __post_init__(self):
        check_settings(self)
        if self.offload and self.dtype in QUANTISED:
            raise ValueError(f"an {self.dtype} teacher cannot be offloaded; set offload to false, or use fp8")


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """The student: a pruned teacher, a file, or, without settings, the teacher itself (fine-tuning)."""

    preset: str | None = setting(None, "Name of a published plan, as `distill presets` lists them.")
    plan: str | None = setting(None, "A plan as text or JSON, or a file with one.")
    file: str | None = setting(None, "A finished student to go on from; its plan is read from the file.")

    def __post_init__(self):
        if sum(given is not None for given in (self.preset, self.plan, self.file)) > 1:
            raise ValueError("give one of preset, plan and file")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Training data: ``images``, ``dataset`` or ``prompts``; or only a finished ``cache``."""

    images: str | None = setting(None, "Folder of images with .txt captions, metadata.csv or metadata.jsonl.")
    dataset: str | None = setting(None, "Folder of a Hugging Face dataset.")
    split: str = setting("train", "Split of the dataset.")
    image_column: str = setting("image", "Column of the dataset with the images.")
    caption_column: str = setting("text", "Column of the dataset with the captions.")
    prompts: str | None = setting(None, "Text file with one prompt per line, from which the teacher draws the images.")
    encoders: str | None = setting(
        None,
        "Diffusers pipeline folder with the autoencoder and text encoders.",
        unset="the teacher, if it is such a folder",
    )
    captions_on_cpu: bool = setting(False, "Read captions on the CPU, where their encoders do not fit on the GPU; slower.")
    cache: str = setting("cache", "Folder for latents and embeddings.")
    resolution: str = setting("512", "Sizes of the images: `512`, `768x512,512x768`, `buckets-768` or `ssd-1b`.")
    flip: bool = setting(False, "Add a mirrored copy of each image.")
    encode_batch_size: int = setting(8, "Images or captions that are encoded at once.", within=BATCH)
    guidance: float = setting(7.5, "Guidance scale of teacher-made images.", within=GUIDANCE)
    sampler_steps: int = setting(25, "Sampling steps of teacher-made images.", within=SAMPLER_STEPS)
    images_per_prompt: int = setting(1, "Teacher-made images for each prompt, each from its own noise.", within=(1, MOST_IMAGES))
    trajectory_states: int = setting(
        0,
        "Number of noisy states of the teacher's trajectory to train on; 0 adds random noise to the images instead.",
        within=(0, SAMPLER_STEPS[1]),
    )

    def __post_init__(self):
        check_settings(self)
        _check_sides(self.resolution)
        if sum(given is not None for given in (self.images, self.dataset, self.prompts)) > 1:
            raise ValueError("give one of images, dataset and prompts")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Sample images during training, every ``sample_every_steps``."""

    prompts: tuple[str, ...] = setting((), "What to draw; one image for each prompt.")
    guidance: float = setting(7.5, "Guidance scale; 1 = no guidance.", within=(0, GUIDANCE[1]))
    steps: int = setting(20, "Sampling steps.", within=SAMPLER_STEPS)
    seed: int = setting(0, "Seed of the noise, the same each time.", within=SEEDS)
    resolution: str = setting("512", "One size, as in `[data]`.")

    def __post_init__(self):
        check_settings(self)
        _check_sides(self.resolution)


def _check_sides(resolution: str) -> None:
    for size in sizes(resolution):
        for side in size:
            check_range("resolution", side, SIDE_PX)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All inputs of ``distill train``. Paths are relative to the folder of the file."""

    folder: Path
    run: str
    teachers: tuple[TeacherSettings, ...] = setting(words="Leave it out for fine-tuning, which needs the objective task.")
    student: StudentSettings
    data: DataSettings
    training: TrainingSettings
    samples: SampleSettings
    experts: ExpertsSettings | None = setting(None, "Leave it out for a single student.")

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe; ``ValueError`` names a setting that is misspelt, missing or of the wrong type."""
        table = read_toml(path)
        known = {own.name.replace("teachers", "teacher") for own in fields(cls)} - {"folder"}
        check_names(table, known, str(path))
        for name, what in (("run", "run"), ("data", "the section [data]")):
            if name not in table:
                raise ValueError(f"{path}: {what} is missing")
        if not isinstance(table["run"], str) or not table["run"]:
            raise ValueError(f"{path}: run must be the name of a folder, got {one_line(repr(table['run']))}")
        teachers = table.get("teacher", [])
        teachers = teachers if isinstance(teachers, list) else [teachers]

        def section(kind: type, name: str, value: Any) -> Any:
            if not isinstance(value, Mapping):
                raise ValueError(f"{path}: {name} must be a section, [{name}]")
            return from_mapping(kind, value, f"{path}, [{name}]")

        recipe = cls(
            folder=path.parent,
            run=table["run"],
            teachers=tuple(section(TeacherSettings, "teacher", teacher) for teacher in teachers),
            student=section(StudentSettings, "student", table.get("student", {})),
            data=section(DataSettings, "data", table["data"]),
            training=section(TrainingSettings, "training", table.get("training", {})),
            samples=section(SampleSettings, "samples", table.get("samples", {})),
            experts=section(ExpertsSettings, "experts", table["experts"]) if "experts" in table else None,
        )
        if not recipe.teachers and recipe.training.uses_teacher:
            raise ValueError(f'{path}: teacher is missing; add [teacher], or use objective "task", which needs none')
        if not recipe.teachers and recipe.student.file is None:
            raise ValueError(f"{path}: [student] needs a file if there is no teacher")
        if recipe.experts and recipe.experts.plans and recipe.student != StudentSettings():
            raise ValueError(f"{path}: give either a plan in [student] or plans in [experts], not both")
        guidance, stores = recipe.training.guidance, recipe.data.trajectory_states and recipe.training.uses_images
        if recipe.data.prompts and stores and guidance not in (1, recipe.data.guidance):
            raise ValueError(
                f"{path}: [training] learns guidance {guidance:g}, but [data] samples trajectories with "
                f"{recipe.data.guidance:g}; set both to the same guidance"
            )
        return recipe

    def path(self, name: str) -> Path:
        """A path of the recipe, which begins in its folder, at the root, or with ``~`` at home."""
        return self.folder / os.path.expanduser(name)

    def check_paths(self) -> None:
        """``ValueError`` naming a setting whose file or folder does not exist."""
        of_data = {f"[data] {name}": getattr(self.data, name) for name in ("images", "dataset", "prompts")}
        named = [*(("[teacher] file", teacher.file) for teacher in self.teachers), ("[student] file", self.student.file)]
        for name, given in (*named, *of_data.items()):
            if given not in (None, DEMO) and not self.path(given).exists():
                raise ValueError(f"{name}: {self.path(given)} does not exist; write a path that begins in the recipe's folder")
