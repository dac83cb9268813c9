"""A recipe: one TOML file that describes a whole training: teachers, student, data, settings, and folder of the run.

```toml
run = "runs/small"

[teacher]                       # use [[teacher]] for several teachers; leave out to fine-tune a student
file = "sd15.safetensors"
dtype = "fp16"

[student]
preset = "bk-sdm-small"

[data]
images = "pictures"             # or prompts = "prompts.txt", and the teacher draws them
encoders = "sd15-diffusers"

[training]                      # `settings.TrainingSettings`
total_steps = 50000

[experts]                       # `one_to_many.ExpertsSettings`: several experts, each for a range of timesteps
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

from .base.documents import MAX_LIST_BYTES, lines, one_line, read_text, read_toml
from .base.packages import check_installed
from .base.precision import DTYPES
from .base.settings import BATCH, GUIDANCE, SAMPLER_STEPS, SEEDS, SIDE_PX, check_range, check_settings, from_mapping, setting
from .base.storage import fingerprint
from .data.cache import CachedDataset, encode
from .data.dataset import Dataset, largest_example, num_examples
from .data.encoders import DiffusersEncoders, Encoders, warn_of_cut
from .data.images import folder, hugging_face, sizes
from .data.teacher_data import MOST_PICTURES, Making, make_dataset
from .demo.encoders import DigitsEncoders
from .diffusion.denoiser import Denoiser, DiffusersDenoiser, Load, check_trainable
from .diffusion.schedule import of_sampling
from .lora.layers import without_lora
from .networks.architecture import Architecture
from .networks.build import load_unet
from .networks.files import UNetFile, open_unet
from .networks.quantised import QUANTISED, computes, kept_bytes, quantise
from .pruning.plan import PruningPlan, name_map, plan_between, plan_in, preset, preset_names, pruned
from .pruning.plan_text import read_plan
from .pruning.prune import pruned_file
from .routing.one_to_many import ExpertsSettings, OneToMany, Start
from .training.checkpoints import own
from .training.loop import Progress, check_lesson, distill
from .training.memory import Forecast, MemorySettings, forecast
from .training.preflight import check_experts_run, check_run
from .training.previews import Previews
from .training.processes import Processes
from .training.run import Inputs, Run
from .training.settings import TrainingSettings
from .training.teachers import Teachers

DEMO = "demo"
"""Name of the bundled digits, in place of a file."""
OnItem = Callable[[str, int, int], None]
EXAMPLES = Path(__file__).parent / "recipes"


def example_names() -> list[str]:
    """Names of the bundled example recipes."""
    return sorted(path.stem for path in EXAMPLES.glob("*.toml"))


def example(name: str) -> str:
    """Text of an example recipe; ``ValueError`` lists the choices."""
    if name not in example_names():
        raise ValueError(f"unknown recipe {name!r}; choose from {example_names()}")
    return (EXAMPLES / f"{name}.toml").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """One teacher."""

    file: str = setting(words="Checkpoint or diffusers folder, or `demo`.")
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
    image_column: str = setting("image", "Column of the dataset with the images.")
    caption_column: str = setting("text", "Column of the dataset with the captions.")
    prompts: str | None = setting(None, "Text file with one prompt per line, from which the teacher draws the images.")
    encoders: str | None = setting(
        None,
        "Diffusers pipeline folder with the autoencoder and text encoders.",
        unset="the teacher, if it is such a folder",
    )
    cache: str = setting("cache", "Folder for latents and embeddings.")
    resolution: str = setting("512", "Sizes of the images: `512`, `768x512,512x768`, `buckets-768` or `ssd-1b`.")
    flip: bool = setting(False, "Add a mirrored copy of each image.")
    encode_batch_size: int = setting(8, "Images or captions that are encoded at once.", within=BATCH)
    guidance: float = setting(7.5, "Guidance scale of teacher-made images.", within=GUIDANCE)
    sampler_steps: int = setting(25, "Sampling steps of teacher-made images.", within=SAMPLER_STEPS)
    images_per_prompt: int = setting(
        1, "Teacher-made images for each prompt, each from its own noise.", within=(1, MOST_PICTURES)
    )
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
        known = {"run", "teacher", "student", "data", "training", "samples", "experts"}
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
        if not recipe.teachers and recipe.training.weighted_objective.uses_teacher:
            raise ValueError(f'{path}: teacher is missing; add [teacher], or use objective "task", which needs none')
        if not recipe.teachers and recipe.student.file is None:
            raise ValueError(f"{path}: [student] needs a file if there is no teacher")
        if recipe.experts and recipe.experts.plans and recipe.student != StudentSettings():
            raise ValueError(f"{path}: give either a plan in [student] or plans in [experts], not both")
        guidance = recipe.training.guidance
        if recipe.data.prompts and recipe.data.trajectory_states and guidance not in (1, recipe.data.guidance):
            raise ValueError(
                f"{path}: [training] learns guidance {guidance:g}, but [data] samples trajectories with "
                f"{recipe.data.guidance:g}; set both to the same guidance"
            )
        return recipe

    def path(self, name: str) -> Path:
        return self.folder / name


@dataclass(frozen=True, kw_only=True)
class _Sections:
    """Top-level names of a recipe, to suggest the nearest one for a misspelt name."""

    run: str = ""
    teacher: str = ""
    student: str = ""
    data: str = ""
    training: str = ""
    samples: str = ""
    experts: str = ""


class Prepared:
    """A recipe with its files open and its data encoded, ready to train."""

    def __init__(self, recipe: Recipe, processes: Processes, on_item: OnItem = lambda what, done, total: None):
        """on_item: called with (task, done, total) while data are encoded or made."""
        self.recipe, self.processes, self.device = recipe, processes, processes.device
        processes.check(recipe.training)
        if any(teacher.dtype in QUANTISED for teacher in recipe.teachers):
            check_installed(["bitsandbytes"], f"a teacher in {' or '.join(QUANTISED)}")
        # When fine-tuning, sample images are compared with those of the untrained student.
        self.teacher_settings = recipe.teachers
        if not self.teacher_settings:
            assert recipe.student.file is not None  # `Recipe.read` asks for it
            self.teacher_settings = (TeacherSettings(file=recipe.student.file),)
        self.teacher_files = [_open(recipe, settings.file) for settings in self.teacher_settings]
        first = self.teacher_files[0]
        for settings, file in zip(self.teacher_settings, self.teacher_files, strict=True):
            if dict(file.architecture.shapes) != dict(first.architecture.shapes):
                raise ValueError(
                    f"teacher {settings.file} has another architecture than {recipe.teachers[0].file}; use teachers of one"
                    " architecture"
                )
            _check_trainable(file)
        self.plans = [self._plan(text, first) for text in recipe.experts.plans] if recipe.experts else []
        self.plan, self.student_file = (self._largest(first), None) if self.plans else self._student(first)
        if self.student_file is not None:
            _check_trainable(self.student_file)
        if recipe.experts and self.shares_base and self.teacher_settings[0].dtype in QUANTISED:
            raise ValueError(
                f"a shared base is saved to disk, and {self.teacher_settings[0].dtype} weights cannot be saved; use fp8"
            )
        self._encoders: Encoders | None = None
        self._check_run()
        with processes.main_first():
            self.dataset = self._dataset(on_item)
        inputs = Inputs(
            teachers=tuple(fingerprint(file.tensors) for file in self.teacher_files),
            student="" if self.student_file is None else fingerprint(self.student_file.tensors),
            data=self.dataset.fingerprint,
        )
        with processes.main_first():
            self.run = self._several(recipe.experts, inputs) if recipe.experts else self._one(inputs)

    def _check_run(self) -> None:
        """Raise errors that can be found before data are read."""
        training, folder, settings = self.recipe.training, self.recipe.path(self.recipe.run), self.recipe.experts
        theirs = {(fingerprint(file.tensors), file.sampling) for file in self.teacher_files}
        ours = self.student_file and (fingerprint(self.student_file.tensors), self.student_file.sampling)
        check_lesson(training, self.teacher_files[0].architecture, self.architecture, not settings and theirs == {ours})
        if settings is None:
            check_run(folder, training, self.architecture.shapes)
        else:
            check_experts_run(
                folder, training, self.architecture.shapes, settings.num_experts(of_sampling(self.teacher_files[0].sampling))
            )

    def _one(self, inputs: Inputs) -> Run:
        inputs = replace(inputs, plan=self.plan.name if self.plan else "")
        return Run(self.recipe.path(self.recipe.run), self.recipe.training, inputs, main=self.processes.main)

    def _several(self, settings: ExpertsSettings, inputs: Inputs) -> OneToMany:
        starts = [Start(plan, partial(self.student, plan, f"pruned_{number}")) for number, plan in enumerate(self.plans)]
        return OneToMany(
            self.recipe.path(self.recipe.run),
            settings,
            self.recipe.training,
            starts=starts or [Start(self.plan, self.student)],
            teachers=None if self.shares_base else self._teacher_loads,
            schedule=of_sampling(self.teacher_files[0].sampling),
            dataset=self.dataset,
            inputs=inputs,
            processes=self.processes,
        )

    def describe(self) -> str:
        """What will be trained, one line per topic."""
        examples = num_examples(self.dataset)
        teachers = ", ".join(f"{teacher.file} ({teacher.dtype})" for teacher in self.recipe.teachers)
        training = self.recipe.training
        share = f"{self.processes.count} processes share each batch" + " and the student's weights" * self.processes.shards
        return "\n".join([
            *([share] if self.processes.count > 1 else []),
            f"teacher   {teachers or 'none'}",
            f"student   {self.architecture.num_parameters:,} parameters, plan {self.plan.name if self.plan else 'none'}",
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
        example, teachers = largest_example(self.dataset), self.teacher_settings
        _, channels, height, width = example.latents.shape
        settings = MemorySettings(
            training=self.run.heaviest_settings,
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
            latent_shape=(channels, height, width),
            num_tokens=example.contexts.shape[1],
            settings=settings,
        )

    # --- teacher and student

    @property
    def architecture(self) -> Architecture:
        """Architecture of the student."""
        if self.student_file is not None:
            return self.student_file.architecture
        teacher = self.teacher_files[0].architecture
        assert self.plan is not None  # else the student has a file
        return pruned(teacher, name_map(teacher, self.plan))

    def _student(self, teacher: UNetFile) -> tuple[PruningPlan | None, UNetFile | None]:
        """The plan from teacher to student, and the student's file if it has its own."""
        settings = self.recipe.student
        if settings.file is not None:
            file = _open(self.recipe, settings.file)
            if not self.recipe.teachers:
                return plan_in(file.metadata), file
            return plan_between(teacher.architecture, file.architecture, plan_in(file.metadata)), file
        if settings.preset is not None:
            return preset(settings.preset), None
        if settings.plan is not None:
            return self._plan(settings.plan, teacher), None
        return None, teacher

    def _plan(self, text: str, teacher: UNetFile) -> PruningPlan:
        """A plan from a preset's name, from text or JSON, or from a file."""
        if text in preset_names():
            return preset(text)
        words = text.startswith(("keep ", "{"))
        return read_plan(text if words else read_text(self.recipe.path(text)), teacher.architecture)

    def _largest(self, teacher: UNetFile) -> PruningPlan:
        """The plan of the largest student."""
        shape = teacher.architecture
        return max(self.plans, key=lambda plan: pruned(shape, name_map(shape, plan)).num_parameters)

    def student(self, plan: PruningPlan | None = None, name: str = "pruned") -> Denoiser:
        """The untrained student on the device. plan, name: of an expert with its own plan, and the name of its file."""
        if self.shares_base:
            return self.teacher(self.teacher_settings[0], self.teacher_files[0])
        file = self.student_file
        if file is None:
            plan = plan or self.plan
            assert plan is not None  # else the student has a file
            with self.processes.main_first():
                file = pruned_file(self.teacher_files[0], own(self.run.folder / f"{name}.safetensors"), plan)
        dtype = DTYPES[self.recipe.training.weight_dtype]
        return DiffusersDenoiser.of_file(file, load_unet(file, dtype).to(self.device))

    @property
    def shares_base(self) -> bool:
        """Whether the students are LoRAs on their only teacher, so that its weights are in memory once."""
        same = self.student_file is self.teacher_files[0] and len(self.recipe.teachers) == 1
        parted = self.recipe.experts is None or self.recipe.experts.joint_steps == 0
        return same and parted and bool(self.recipe.training.lora_rank)

    def teachers(self, student: Denoiser) -> Teachers:
        """The teachers of a student."""
        loads = [without_lora(student)] if self.shares_base else self._teacher_loads
        return Teachers(loads, self.recipe.training)

    @property
    def _teacher_loads(self) -> list[Load]:
        pairs = zip(self.teacher_settings, self.teacher_files, strict=True)
        return [partial(self.teacher, settings, file) for settings, file in pairs]

    def teacher(self, settings: TeacherSettings, file: UNetFile) -> Denoiser:
        """Load a teacher in the dtype of its settings, offloaded if they say so."""
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
        """Autoencoder and text encoders, opened when first needed."""
        if self._encoders is None:
            name, first = self.recipe.data.encoders, self.teacher_settings[0].file
            if name is None and first == DEMO:
                name = DEMO
            if name is None and self.recipe.path(first).is_dir() and (self.recipe.path(first) / "vae").is_dir():
                name = first
            if name is None:
                raise ValueError(
                    "[data]: encoders is missing; give a diffusers folder with the teacher's autoencoder and text encoders"
                )
            self._encoders = (
                DigitsEncoders() if name == DEMO else DiffusersEncoders.from_folder(self.recipe.path(name), self.device)
            )
        return self._encoders

    def _dataset(self, on_item: OnItem) -> Dataset:
        data, cache = self.recipe.data, self.recipe.path(self.recipe.data.cache)
        if data.prompts is not None:
            return self._made(data.prompts, cache, on_item)
        if data.images is not None:
            images = folder(self.recipe.path(data.images))
        elif data.dataset is not None:
            path = self.recipe.path(data.dataset)
            images = hugging_face(path, image_column=data.image_column, caption_column=data.caption_column)
        else:
            return CachedDataset.open(cache)
        return encode(
            images,
            self.encoders,
            sizes(data.resolution),
            cache,
            batch_size=data.encode_batch_size,
            flip=data.flip,
            on_item=partial(on_item, "encoding"),
        )

    def _made(self, prompts: str, cache: Path, on_item: OnItem) -> Dataset:
        data = self.recipe.data
        (size, *others) = sizes(data.resolution)
        if others:
            raise ValueError(f"[data]: teacher-made images must all have one size, got resolution {data.resolution!r}")
        making = Making(
            size=size,
            guidance=data.guidance,
            guidance_min=self.recipe.training.guidance_min if data.trajectory_states else None,
            num_steps=data.sampler_steps,
            num_per_prompt=data.images_per_prompt,
            num_states=data.trajectory_states,
            seed=self.recipe.training.seed,
        )
        file = self.teacher_files[0]
        return make_dataset(
            partial(self.teacher, self.teacher_settings[0], file),
            fingerprint(file.tensors),
            self.encoders,
            lines(read_text(self.recipe.path(prompts), MAX_LIST_BYTES)),
            making,
            cache,
            schedule=of_sampling(file.sampling),
            batch_size=data.encode_batch_size,
            on_item=partial(on_item, "drawing"),
        )

    def previews(self) -> Previews | None:
        """Sample images, if the recipe asks for them."""
        samples = self.recipe.samples
        if not self.recipe.training.sample_every_steps:
            return None
        if not samples.prompts:
            raise ValueError("[samples]: prompts is missing; give prompts, or set sample_every_steps to 0")
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
        """Train to the end. only, on_stage: for several experts, as in `OneToMany.train`."""
        if isinstance(self.run, OneToMany):
            self.run.train(only, on_step=on_step, on_stage=on_stage)
            return
        if only is not None:
            raise ValueError("this recipe trains a single student; add [experts] to train one for a range")
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
    """Raise ``ValueError`` naming a file that cannot be trained, before data are encoded."""
    try:
        check_trainable(file.architecture, file.sampling)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _open(recipe: Recipe, name: str) -> UNetFile:
    if name == DEMO:
        from .demo.teacher import teacher_file

        return teacher_file()
    return open_unet(recipe.path(name))
