"""A whole training job as one file: teachers, student, data, recipe, and where the run lives.

```toml
run = "runs/small"

[teacher]                       # [[teacher]] several times for several teachers; none to fine-tune a student
file = "sd15.safetensors"
dtype = "fp16"

[student]
preset = "bk-sdm-small"

[data]
images = "pictures"             # or prompts = "prompts.txt", and the teacher draws them
encoders = "sd15-diffusers"

[training]                      # `recipe.Recipe`
total_steps = 50000

[students]                      # `one_to_many.StudentsSettings`: several students, each of its own range of timesteps
count = 4
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .adapter import WithoutLora
from .architecture import Architecture
from .cache import CachedDataset, encode
from .checkpoints import own
from .dataset import Dataset, largest_example, num_examples
from .denoiser import Denoiser, DiffusersDenoiser, check_trainable
from .documents import MAX_LIST_BYTES, lines, one_line, read_text, read_toml
from .encoders import DiffusersEncoders, DigitsEncoders, Encoders, warn_of_cut
from .files import UNetFile, open_unet
from .images import folder, hugging_face, sizes
from .memory import Forecast, MemorySettings, forecast
from .one_to_many import OneToMany, Start, StudentsSettings
from .packages import check_installed
from .plan import PruningPlan, name_map, plan_between, preset, preset_names, pruned
from .plan_text import read_plan
from .preflight import check_run, check_students_run
from .previews import Previews
from .processes import Processes
from .prune import pruned_file
from .quantised import QUANTISED, computes, kept_bytes, quantise
from .recipe import (
    BATCH,
    DTYPES,
    GUIDANCE,
    SAMPLER_STEPS,
    SEEDS,
    SIDE_PX,
    Recipe,
    check_range,
    check_settings,
    from_mapping,
)
from .run import Run
from .storage import fingerprint
from .teacher_data import MOST_PICTURES, Making, make_dataset
from .teachers import Load, Teachers
from .train import Progress, check_lesson, distill
from .unet import load_unet

DEMO = "demo"
"""In place of a file: the bundled digits."""
OnItem = Callable[[str, int, int], None]
DATA_RANGES = {
    "encode_batch_size": BATCH,
    "guidance": GUIDANCE,
    "sampler_steps": SAMPLER_STEPS,
    "images_per_prompt": (1, MOST_PICTURES),
    "trajectory_states": (0, SAMPLER_STEPS[1]),
}
EXAMPLES = Path(__file__).parent / "recipes"


def example_names() -> list[str]:
    """Names of the example recipes that come with the library."""
    return sorted(path.stem for path in EXAMPLES.glob("*.toml"))


def example(name: str) -> str:
    """Text of an example recipe; ``ValueError`` lists the choices."""
    if name not in example_names():
        raise ValueError(f"unknown recipe {name!r}; choose from {example_names()}")
    return (EXAMPLES / f"{name}.toml").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """One teacher."""

    file: str
    """Checkpoint or diffusers folder, or ``demo``."""
    dtype: str = "fp32"
    """``fp32``, ``bf16``, ``fp16``; or computed in bf16 and kept in fewer bits: ``fp8``, ``int8``, or four, ``nf4``."""
    offload: bool = False
    """Keep it in the computer's memory, each layer on the GPU only while it computes."""

    def __post_init__(self):
        if self.dtype not in (choices := (*DTYPES, *QUANTISED)):
            raise ValueError(f"dtype: unknown {self.dtype!r}; choose from {list(choices)}")
        if self.offload and self.dtype in QUANTISED:
            raise ValueError(f"a teacher in {self.dtype} stays on the GPU; set offload to false, or take fp8")


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """What is trained: a pruned teacher, a student's file, or, where nothing is given, the teacher itself (fine-tuning)."""

    preset: str | None = None
    plan: str | None = None
    """A plan in words or JSON, or a file of one."""
    file: str | None = None

    def __post_init__(self):
        if sum(given is not None for given in (self.preset, self.plan, self.file)) > 1:
            raise ValueError("give one of preset, plan and file")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What it is trained on: ``images``, ``dataset`` or ``prompts``; or nothing but a ``cache`` that is finished."""

    images: str | None = None
    """Folder of pictures with .txt captions, metadata.csv or metadata.jsonl."""
    dataset: str | None = None
    """Folder of a Hugging Face data set."""
    image_column: str = "image"
    caption_column: str = "text"
    prompts: str | None = None
    """Text file, a prompt a line: the teacher draws the pictures."""
    encoders: str | None = None
    """Diffusers pipeline folder with the autoencoder and text encoders; the teacher's own where that is one."""
    cache: str = "cache"
    """Folder for latents and embeddings."""
    resolution: str = "512"
    """``512``, ``768x512,512x768``, ``buckets-768``, ``ssd-1b``."""
    flip: bool = False
    """Each picture also comes mirrored."""
    encode_batch_size: int = 8
    guidance: float = 7.5
    """Of teacher-made pictures."""
    sampler_steps: int = 25
    images_per_prompt: int = 1
    trajectory_states: int = 0
    """Train on so many noisy states of the teacher's own trajectory instead of noise that is added."""

    def __post_init__(self):
        check_settings(self, DATA_RANGES)
        _check_sides(self.resolution)
        if sum(given is not None for given in (self.images, self.dataset, self.prompts)) > 1:
            raise ValueError("give one of images, dataset and prompts")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Sample pictures while it trains, every ``sample_every_steps``."""

    prompts: tuple[str, ...] = ()
    guidance: float = 7.5
    steps: int = 20
    seed: int = 0
    resolution: str = "512"

    def __post_init__(self):
        check_settings(self, {"guidance": (0, GUIDANCE[1]), "steps": SAMPLER_STEPS, "seed": SEEDS})
        _check_sides(self.resolution)


def _check_sides(resolution: str) -> None:
    for size in sizes(resolution):
        for side in size:
            check_range("resolution", side, SIDE_PX)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything ``distill train`` needs to know. Paths are as seen from the file's folder."""

    folder: Path
    run: str
    teachers: tuple[TeacherSettings, ...]
    """None for fine-tuning, by the objective ``task`` alone."""
    student: StudentSettings
    data: DataSettings
    training: Recipe
    samples: SampleSettings
    students: StudentsSettings | None = None
    """None for one student of all timesteps."""

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read a job; ``ValueError`` names what is misspelt, missing or of the wrong kind."""
        table = read_toml(path)
        known = {"run", "teacher", "student", "data", "training", "samples", "students"}
        if unknown := table.keys() - known:
            from_mapping(_Sections, {min(unknown): None}, str(path))
        for name in ("run", "data"):
            if name not in table:
                raise ValueError(f"{path}: {name} is missing")
        if not isinstance(table["run"], str) or not table["run"]:
            raise ValueError(f"{path}: run must be the name of a folder, got {one_line(repr(table['run']))}")
        teachers = table.get("teacher", [])
        teachers = teachers if isinstance(teachers, list) else [teachers]

        def section(kind: type, name: str, value: Any) -> Any:
            if not isinstance(value, Mapping):
                raise ValueError(f"{path}: {name} must be a section, [{name}]")
            return from_mapping(kind, value, f"{path}, [{name}]")

        job = cls(
            folder=path.parent,
            run=table["run"],
            teachers=tuple(section(TeacherSettings, "teacher", teacher) for teacher in teachers),
            student=section(StudentSettings, "student", table.get("student", {})),
            data=section(DataSettings, "data", table["data"]),
            training=section(Recipe, "training", table.get("training", {})),
            samples=section(SampleSettings, "samples", table.get("samples", {})),
            students=section(StudentsSettings, "students", table["students"]) if "students" in table else None,
        )
        if not job.teachers and job.training.aim.uses_teacher:
            raise ValueError(f"{path}: teacher is missing; only the objective task does without one")
        if not job.teachers and job.student.file is None:
            raise ValueError(f"{path}: without a teacher [student] needs a file")
        if job.students and job.students.plans and job.student != StudentSettings():
            raise ValueError(f"{path}: give the plan in [student], or plans in [students]")
        guidance = job.training.guidance
        if job.data.prompts and job.data.trajectory_states and guidance not in (1, job.data.guidance):
            raise ValueError(
                f"{path}: [training] learns guidance {guidance:g} on trajectories that [data] draws with {job.data.guidance:g}; set "
                "both to one guidance"
            )
        return job

    def path(self, name: str) -> Path:
        return self.folder / name


@dataclass(frozen=True, kw_only=True)
class _Sections:
    """Names at the top of a job, for the hint at the nearest."""

    run: str = ""
    teacher: str = ""
    student: str = ""
    data: str = ""
    training: str = ""
    samples: str = ""
    students: str = ""


class Prepared:
    """A job with its files open and its data encoded, ready to train."""

    def __init__(self, job: Job, processes: Processes, on_item: OnItem = lambda what, done, total: None):
        """on_item: called while data are encoded or made, with what is going on."""
        self.job, self.processes, self.device = job, processes, processes.device
        processes.check(job.training)
        if any(teacher.dtype in QUANTISED for teacher in job.teachers):
            check_installed(["bitsandbytes"], f"a teacher in {' or '.join(QUANTISED)}")
        # Fine-tuning, sample pictures are beside those of the student as it was.
        self.teacher_settings = job.teachers or (TeacherSettings(file=job.student.file),)
        self.teacher_files = [_open(job, settings.file) for settings in self.teacher_settings]
        first = self.teacher_files[0]
        for settings, file in zip(self.teacher_settings, self.teacher_files, strict=True):
            if dict(file.architecture.shapes) != dict(first.architecture.shapes):
                raise ValueError(f"teacher {settings.file} is of another architecture than {job.teachers[0].file}")
            _check_trainable(file)
        self.plans = [self._plan(text, first) for text in job.students.plans] if job.students else []
        self.plan, self.student_file = (self._largest(first), None) if self.plans else self._student(first)
        if self.student_file is not None:
            _check_trainable(self.student_file)
        if job.students and self.shares_base and self.teacher_settings[0].dtype in QUANTISED:
            raise ValueError(
                f"students of ranges keep their base in a file, which {self.teacher_settings[0].dtype} has none of; take fp8"
            )
        self._encoders: Encoders | None = None
        self._check_run()
        with processes.main_first():
            self.dataset = self._dataset(on_item)
        origin = {f"teacher {n}" if n > 1 else "teacher": fingerprint(f.tensors) for n, f in enumerate(self.teacher_files, 1)}
        origin |= {"data": self.dataset.fingerprint}
        origin |= {} if self.student_file is None else {"student": fingerprint(self.student_file.tensors)}
        with processes.main_first():
            self.run = self._several(job.students, origin) if job.students else self._one(origin)

    def _check_run(self) -> None:
        """Refuse what can be refused before data are read."""
        recipe, folder, settings = self.job.training, self.job.path(self.job.run), self.job.students
        theirs = {(fingerprint(file.tensors), file.sampling) for file in self.teacher_files}
        ours = self.student_file and (fingerprint(self.student_file.tensors), self.student_file.sampling)
        check_lesson(recipe, self.teacher_files[0].architecture, self.architecture, not settings and theirs == {ours})
        if settings is None:
            check_run(folder, recipe, self.architecture.shapes)
        else:
            check_students_run(
                folder, recipe, self.architecture.shapes, settings.num_students(self.teacher_files[0].sampling.schedule)
            )

    def _one(self, origin: Mapping[str, str]) -> Run:
        origin = {**origin, "plan": self.plan.name if self.plan else "none"}
        return Run(self.job.path(self.job.run), self.job.training, origin, main=self.processes.main)

    def _several(self, settings: StudentsSettings, origin: Mapping[str, str]) -> OneToMany:
        starts = [Start(plan, partial(self.student, plan, f"pruned_{number}")) for number, plan in enumerate(self.plans)]
        return OneToMany(
            self.job.path(self.job.run),
            settings,
            self.job.training,
            starts=starts or [Start(self.plan, self.student)],
            teachers=None if self.shares_base else self._teacher_loads,
            teacher=origin["teacher"],
            schedule=self.teacher_files[0].sampling.schedule,
            dataset=self.dataset,
            origin=origin,
            processes=self.processes,
        )

    def describe(self) -> str:
        """What is about to be trained, a line each."""
        examples = num_examples(self.dataset)
        teachers = ", ".join(f"{teacher.file} ({teacher.dtype})" for teacher in self.job.teachers)
        recipe = self.job.training
        share = f"{self.processes.count} processes share each batch" + ", and the student's weights" * self.processes.shards
        return "\n".join([
            *([share] if self.processes.count > 1 else []),
            f"teacher   {teachers or 'none'}",
            f"student   {self.architecture.num_parameters:,} parameters, plan {self.plan.name if self.plan else 'none'}",
            *filter(None, [self.run.describe()]),
            f"data      {examples:,} examples, sizes of pictures: {len(self.dataset.bucket_sizes)}",
            f"training  {recipe.objective}{f', LoRA of rank {recipe.lora_rank}' * bool(recipe.lora_rank)}, {recipe.total_steps:,} steps of batch {recipe.batch_size}, {recipe.optimizer} at "
            f"{recipe.learning_rate:g}, from step {self.run.step}",
            f"run       {self.run.folder}",
        ])  # fmt: skip

    def describe_memory(self, free_bytes: int | None) -> str:
        """What a step needs on the device, part by part; and where that is more than is free, what to change.

        free_bytes: as from `memory.free_bytes`.
        """
        told = self.forecast()
        return "\n".join(filter(None, [told.describe(), told.describe_shortage(free_bytes)]))

    def forecast(self) -> Forecast:
        """The memory a step needs on the device."""
        example, teachers = largest_example(self.dataset), self.teacher_settings
        settings = MemorySettings(
            recipe=self.run.heaviest_recipe,
            teacher_dtype=max(
                (teacher.dtype for teacher in teachers), key=partial(kept_bytes, self.teacher_files[0].architecture.shapes)
            ),
            teacher_offloaded=self.device.type != "cpu" and all(teacher.offload for teacher in teachers),
            shares_base=self.shares_base,
            num_teachers=len(teachers),
            num_processes=self.processes.count,
            shards=self.processes.shards,
            device=self.device.type,
        )
        return forecast(
            teacher=self.teacher_files[0].architecture,
            student=self.architecture,
            plan=self.plan,
            latent_shape=tuple(example.latents.shape[1:]),
            num_tokens=example.contexts.shape[1],
            settings=settings,
        )

    # --- teacher and student

    @property
    def architecture(self) -> Architecture:
        """What the student is made of."""
        if self.student_file is not None:
            return self.student_file.architecture
        teacher = self.teacher_files[0].architecture
        return pruned(teacher, name_map(teacher, self.plan))

    def _student(self, teacher: UNetFile) -> tuple[PruningPlan | None, UNetFile | None]:
        """The plan that leads from teacher to student, and the student's file where it has one of its own."""
        settings = self.job.student
        if settings.file is not None:
            file = _open(self.job, settings.file)
            if not self.job.teachers:
                return file.plan, file
            return plan_between(teacher.architecture, file.architecture, file.plan), file
        if settings.preset is not None:
            return preset(settings.preset), None
        if settings.plan is not None:
            return self._plan(settings.plan, teacher), None
        return None, teacher

    def _plan(self, text: str, teacher: UNetFile) -> PruningPlan:
        """A plan by the name of a preset, in words or JSON, or from a file."""
        if text in preset_names():
            return preset(text)
        words = text.startswith(("keep ", "{"))
        return read_plan(text if words else read_text(self.job.path(text)), teacher.architecture)

    def _largest(self, teacher: UNetFile) -> PruningPlan:
        """The plan that leaves the largest student."""
        shape = teacher.architecture
        return max(self.plans, key=lambda plan: pruned(shape, name_map(shape, plan)).num_parameters)

    def student(self, plan: PruningPlan | None = None, name: str = "pruned") -> Denoiser:
        """The student as it begins, on the device; of a plan of its own under a name of its own."""
        if self.shares_base:
            return self.teacher(self.teacher_settings[0], self.teacher_files[0])
        file = self.student_file
        if file is None:
            with self.processes.main_first():
                file = pruned_file(self.teacher_files[0], own(self.run.folder / f"{name}.safetensors"), plan or self.plan)
        dtype = DTYPES[self.job.training.weight_dtype]
        return DiffusersDenoiser.of_file(file, load_unet(file, dtype).to(self.device))

    @property
    def shares_base(self) -> bool:
        """Whether students are their one teacher with a LoRA on it, so that its weights are there once."""
        same = self.student_file is self.teacher_files[0] and len(self.job.teachers) == 1
        parted = self.job.students is None or self.job.students.joint_steps == 0
        return same and parted and bool(self.job.training.lora_rank)

    def teachers(self, student: Denoiser) -> Teachers:
        """Those of a student."""
        loads = [lambda: WithoutLora(student)] if self.shares_base else self._teacher_loads
        return Teachers(loads, self.job.training)

    @property
    def _teacher_loads(self) -> list[Load]:
        pairs = zip(self.teacher_settings, self.teacher_files, strict=True)
        return [partial(self.teacher, settings, file) for settings, file in pairs]

    def teacher(self, settings: TeacherSettings, file: UNetFile) -> Denoiser:
        """A teacher as its settings have it."""
        compute = DTYPES[computes(settings.dtype)]
        network = load_unet(file, compute)
        if settings.dtype in QUANTISED:
            quantise(network, settings.dtype)
        if settings.dtype == "fp8":
            from diffusers.hooks import apply_layerwise_casting

            apply_layerwise_casting(network, storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
        if settings.offload:
            from diffusers.hooks import apply_group_offloading

            apply_group_offloading(
                network,
                onload_device=self.device,
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                use_stream=self.device.type == "cuda",
            )
        else:
            network.to(self.device)
        return replace(DiffusersDenoiser.of_file(file, network), computes=(self.device, compute))

    # --- data

    @property
    def encoders(self) -> Encoders:
        """Autoencoder and text encoders; opened when they are first needed."""
        if self._encoders is None:
            name, first = self.job.data.encoders, self.teacher_settings[0].file
            if name is None and first == DEMO:
                name = DEMO
            if name is None and self.job.path(first).is_dir() and (self.job.path(first) / "vae").is_dir():
                name = first
            if name is None:
                raise ValueError(
                    "[data]: encoders is missing: a diffusers pipeline folder with the autoencoder and text encoders of the teacher"
                )
            self._encoders = DigitsEncoders() if name == DEMO else DiffusersEncoders.from_folder(self.job.path(name), self.device)
        return self._encoders

    def _dataset(self, on_item: OnItem) -> Dataset:
        data, cache = self.job.data, self.job.path(self.job.data.cache)
        if data.prompts is not None:
            return self._made(cache, on_item)
        if data.images is None and data.dataset is None:
            return CachedDataset.open(cache)
        pictures = (
            folder(self.job.path(data.images))
            if data.images is not None
            else hugging_face(self.job.path(data.dataset), image_column=data.image_column, caption_column=data.caption_column)
        )
        return encode(
            pictures,
            self.encoders,
            sizes(data.resolution),
            cache,
            batch_size=data.encode_batch_size,
            flip=data.flip,
            on_item=partial(on_item, "encoding"),
        )

    def _made(self, cache: Path, on_item: OnItem) -> Dataset:
        data = self.job.data
        (size, *others) = sizes(data.resolution)
        if others:
            raise ValueError(f"[data]: teacher-made pictures are of one size, got resolution {data.resolution!r}")
        making = Making(
            size=size,
            guidance=data.guidance,
            guidance_min=self.job.training.guidance_min if data.trajectory_states else None,
            num_steps=data.sampler_steps,
            num_per_prompt=data.images_per_prompt,
            num_states=data.trajectory_states,
            seed=self.job.training.seed,
        )
        file = self.teacher_files[0]
        return make_dataset(
            partial(self.teacher, self.teacher_settings[0], file),
            fingerprint(file.tensors),
            self.encoders,
            lines(read_text(self.job.path(data.prompts), MAX_LIST_BYTES)),
            making,
            cache,
            schedule=file.sampling.schedule,
            batch_size=data.encode_batch_size,
            on_item=partial(on_item, "drawing"),
        )

    def previews(self) -> Previews | None:
        """Sample pictures, where they are asked for."""
        samples = self.job.samples
        if not self.job.training.sample_every_steps:
            return None
        if not samples.prompts:
            raise ValueError("[samples]: prompts is missing, but sample_every_steps asks for pictures")
        warn_of_cut(samples.prompts, self.encoders)
        *captions, null = self.encoders.captions([*samples.prompts, ""])
        height, width = sizes(samples.resolution)[0]
        channels = self.teacher_files[0].architecture.channels("conv_in")[0]
        return Previews(
            captions=captions,
            null=null,
            latent_shape=(channels, height // 8, width // 8),
            decode=self.encoders.decode,
            guidance=samples.guidance,
            num_steps=samples.steps,
            seed=samples.seed,
        )

    def train(
        self,
        on_step: Callable[[Progress], None],
        only: int | None = None,
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> None:
        """Train to the end. only, on_stage: as for `OneToMany.train`, where there are several students."""
        if isinstance(self.run, OneToMany):
            self.run.train(only, on_step=on_step, on_stage=on_stage)
            return
        if only is not None:
            raise ValueError("there is one student of all timesteps; add [students] to train one for a range")
        student = self.student()
        distill(
            self.run,
            student=student,
            teacher=self.teachers(student),
            plan=self.plan,
            dataset=self.dataset,
            previews=self.previews(),
            on_step=on_step,
            processes=self.processes,
        )


def _check_trainable(file: UNetFile) -> None:
    """``ValueError`` naming the file, before data are encoded."""
    try:
        check_trainable(file.architecture, file.sampling)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _open(job: Job, name: str) -> UNetFile:
    if name == DEMO:
        from .demo.teacher import teacher_file

        return teacher_file()
    return open_unet(job.path(name))
