"""From a recipe to a training: files open, data encoded or drawn, the run's folder checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from .base.documents import MAX_LIST_BYTES, lines, read_text
from .base.packages import check_installed
from .base.precision import DTYPES
from .base.storage import fingerprint
from .data.cache import CachedDataset, encode
from .data.dataset import Dataset, largest_example, num_examples
from .data.encoders import DiffusersEncoders, Encoders, warn_of_cut
from .data.images import Size, folder, hugging_face, sizes
from .data.teacher_data import Making, caption_dataset, make_dataset
from .demo.encoders import ScenesEncoders
from .demo.teacher import teacher_file
from .diffusion.denoiser import Denoiser, DiffusersDenoiser, Load, check_trainable
from .diffusion.schedule import NoiseSchedule, of_sampling
from .lora.layers import without_lora
from .networks.architecture import Architecture
from .networks.build import load_unet
from .networks.files import UNetFile, open_unet
from .networks.quantised import QUANTISED, computes, hold, kept_bytes
from .pruning.plan import PruningPlan, name_map, plan_between, plan_in, preset, preset_names, pruned
from .pruning.plan_text import read_plan
from .pruning.prune import pruned_file
from .recipe import DEMO, Recipe, TeacherSettings
from .routing.one_to_many import OneToMany, Start
from .training.checkpoints import own
from .training.lesson import check_lesson
from .training.loop import Progress, distill
from .training.memory import Forecast, MemorySettings, forecast
from .training.preflight import check_experts_run, check_run
from .training.previews import Previews
from .training.processes import ALONE, Processes
from .training.run import Inputs, Run
from .training.teachers import Teachers

OnItem = Callable[[str, int, int], None]


class Models:
    """The models of a recipe: files open and checked, plans read; networks are loaded when asked for."""

    def __init__(self, recipe: Recipe, processes: Processes):
        self.recipe, self.processes, self.device = recipe, processes, processes.device
        if any(teacher.dtype in QUANTISED for teacher in recipe.teachers):
            check_installed(["bitsandbytes"], f"a teacher in {' or '.join(QUANTISED)}")
        self.teacher_settings = recipe.teachers
        if not self.teacher_settings:  # fine-tuning: sample images are compared with those of the untrained student
            assert recipe.student.file is not None  # `Recipe.read` asks for it
            self.teacher_settings = (TeacherSettings(file=recipe.student.file),)
        self.teacher_files = [_open(recipe, settings.file) for settings in self.teacher_settings]
        self._check_teachers()
        first = self.teacher_files[0]
        self.plans = [self._plan(text, first) for text in recipe.experts.plans] if recipe.experts else []
        self.plan, self.student_file = (self._largest(first), None) if self.plans else self._student(first)
        if self.student_file is not None:
            _check_trainable(self.student_file)
        if recipe.experts and self.shares_base and self.teacher_settings[0].dtype in QUANTISED:
            raise ValueError(
                f"a shared base is saved to disk, and {self.teacher_settings[0].dtype} weights cannot be saved; use fp8"
            )

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

    @cached_property
    def architecture(self) -> Architecture:
        """Architecture of the student."""
        if self.student_file is not None:
            return self.student_file.architecture
        teacher = self.teacher_files[0].architecture
        assert self.plan is not None  # else the student has a file
        return pruned(teacher, name_map(teacher, self.plan))

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the teachers."""
        return of_sampling(self.teacher_files[0].sampling)

    @property
    def run_folder(self) -> Path:
        return self.recipe.path(self.recipe.run)

    @cached_property
    def fingerprints(self) -> list[str]:
        """What identifies the weights of each teacher."""
        return [fingerprint(file.tensors) for file in self.teacher_files]

    @cached_property
    def student_fingerprint(self) -> str:
        """What identifies the student's own weights; empty if it is made by pruning."""
        return "" if self.student_file is None else fingerprint(self.student_file.tensors)

    def check_lesson(self) -> None:
        """``ValueError`` if the student could learn nothing from its teachers."""
        theirs = {(weights, file.sampling) for weights, file in zip(self.fingerprints, self.teacher_files, strict=True)}
        ours = self.student_file and (self.student_fingerprint, self.student_file.sampling)
        same = not self.recipe.experts and theirs == {ours}
        check_lesson(self.recipe.training, self.teacher_files[0].architecture, self.architecture, same)

    def inputs(self, data: Dataset) -> Inputs:
        """What a run on these models starts with."""
        return Inputs(teachers=tuple(self.fingerprints), student=self.student_fingerprint, data=data.fingerprint)

    def student(self, plan: PruningPlan | None = None, name: str = "pruned") -> Denoiser:
        """The untrained student on the device. plan: an expert's own, in place of the recipe's. name: of the pruned file, without its suffix."""
        if self.shares_base:
            return self.teacher(self.teacher_settings[0], self.teacher_files[0])
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
        """The teachers of a student."""
        loads = [without_lora(student)] if self.shares_base else self.teacher_loads
        return Teachers(loads, self.recipe.training)

    @property
    def teacher_loads(self) -> list[Load]:
        pairs = zip(self.teacher_settings, self.teacher_files, strict=True)
        return [partial(self.teacher, settings, file) for settings, file in pairs]

    def teacher(self, settings: TeacherSettings, file: UNetFile) -> Denoiser:
        """Load a teacher in the dtype of its settings, offloaded if they say so."""
        compute = DTYPES[computes(settings.dtype)]
        network = load_unet(file, compute)
        hold(network, settings.dtype, self.device, offloaded=settings.offload)
        return replace(DiffusersDenoiser.of_file(file, network), computes=(self.device, compute))


class Data:
    """The data of a recipe, and what encodes them."""

    def __init__(self, recipe: Recipe, models: Models):
        self.recipe, self.models = recipe, models

    @cached_property
    def encoders(self) -> Encoders:
        """Autoencoder and text encoders, opened when first needed."""
        name, first = self.recipe.data.encoders, self.models.teacher_settings[0].file
        if name is None and first == DEMO:
            name = DEMO
        if name is None and self.recipe.path(first).is_dir() and (self.recipe.path(first) / "vae").is_dir():
            name = first
        if name is None:
            raise ValueError(
                "[data]: encoders is missing; give a diffusers folder with the teacher's autoencoder and text encoders"
            )
        return ScenesEncoders() if name == DEMO else DiffusersEncoders.from_folder(self.recipe.path(name), self.models.device)

    def dataset(self, on_item: OnItem) -> Dataset:
        """The training data: images are encoded, or drawn by the teacher, unless the cache holds them already."""
        data, cache = self.recipe.data, self.recipe.path(self.recipe.data.cache)
        if data.prompts is not None:
            prompts = lines(read_text(self.recipe.path(data.prompts), MAX_LIST_BYTES))
            return (
                self._made(prompts, cache, on_item)
                if self.recipe.training.uses_images
                else self._captions(prompts, cache, on_item)
            )
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

    def _captions(self, prompts: Sequence[str], cache: Path, on_item: OnItem) -> Dataset:
        """Prompts without images, and the size in which the student draws them while it learns."""
        return caption_dataset(
            self.encoders,
            prompts,
            self._latent_shape(self._one_size),
            self._one_size,
            cache,
            batch_size=self.recipe.data.encode_batch_size,
            on_caption=partial(on_item, "encoding"),
        )

    @property
    def _one_size(self) -> Size:
        resolution = self.recipe.data.resolution
        (size, *others) = sizes(resolution)
        if others:
            raise ValueError(f"[data]: with prompts all images have one size, got resolution {resolution!r}")
        return size

    def _latent_shape(self, size: Size) -> tuple[int, int, int]:
        channels = self.models.teacher_files[0].architecture.channels("conv_in")[0]
        return channels, size[0] // 8, size[1] // 8

    def _made(self, prompts: Sequence[str], cache: Path, on_item: OnItem) -> Dataset:
        data = self.recipe.data
        making = Making(
            size=self._one_size,
            guidance=data.guidance,
            guidance_min=self.recipe.training.guidance_min if data.trajectory_states else None,
            num_steps=data.sampler_steps,
            num_per_prompt=data.images_per_prompt,
            num_states=data.trajectory_states,
            seed=self.recipe.training.seed,
        )
        file = self.models.teacher_files[0]
        return make_dataset(
            partial(self.models.teacher, self.models.teacher_settings[0], file),
            self.models.fingerprints[0],
            self.encoders,
            prompts,
            making,
            cache,
            schedule=self.models.schedule,
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
        return Previews(
            captions=captions,
            null=null,
            latent_shape=self._latent_shape(sizes(samples.resolution)[0]),
            decode=self.encoders.decode,
            guidance=samples.guidance,
            num_steps=samples.steps,
            seed=samples.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A recipe with its models and data, ready to train; see `prepare`."""

    recipe: Recipe
    models: Models
    data: Data
    dataset: Dataset
    run: Run | OneToMany

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
        example, teachers = largest_example(self.dataset), self.models.teacher_settings
        _, channels, height, width = example.latents.shape
        settings = MemorySettings(
            training=self.run.heaviest_settings,
            teacher_dtype=max(
                (teacher.dtype for teacher in teachers), key=partial(kept_bytes, self.models.teacher_files[0].architecture.shapes)
            ),
            teacher_offloaded=self.models.device.type != "cpu" and all(teacher.offload for teacher in teachers),
            shares_base=self.models.shares_base,
            num_teachers=len(teachers),
            num_processes=self.models.processes.count,
            shards=self.models.processes.shards,
            device=self.models.device.type,
        )
        return forecast(
            teacher=self.models.teacher_files[0].architecture,
            student=self.models.architecture,
            plan=self.models.plan,
            latent_shape=(channels, height, width),
            num_tokens=example.contexts.shape[1],
            settings=settings,
        )

    def train(
        self,
        on_step: Callable[[Progress], None],
        only: int | None = None,
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> None:
        """Train to the end. only: for several experts, as in `OneToMany.train`. on_stage: called with what begins."""
        if isinstance(self.run, OneToMany):
            self.run.train(only, on_step=on_step, on_stage=on_stage)
            return
        if only is not None:
            raise ValueError("this recipe trains a single student; add [experts] to train one for a range")
        student = self.models.student()
        distill(
            self.run,
            student=student,
            teacher=self.models.teachers(student),
            plan=self.models.plan,
            dataset=self.dataset,
            previews=self.data.previews(),
            on_step=on_step,
            on_refit=lambda done, total: on_stage("refitting" if done < total else "training"),
            processes=self.models.processes,
        )


def prepare(recipe: Recipe, processes: Processes = ALONE, on_item: OnItem = lambda what, done, total: None) -> Prepared:
    """Open the models of a recipe, encode or draw its data, which may take hours, and open its run.

    What can be checked without data is checked first. on_item: called with (task, done, total) while data are encoded or drawn.
    ``ValueError`` for a recipe that cannot be trained.
    """
    processes.check(recipe.training)
    models = Models(recipe, processes)
    _check_run(models)
    data = Data(recipe, models)
    with processes.main_first():
        dataset = data.dataset(on_item)
    with processes.main_first():
        run = _one_to_many(models, dataset) if recipe.experts else _run(models, dataset)
    return Prepared(recipe=recipe, models=models, data=data, dataset=dataset, run=run)


def _check_run(models: Models) -> None:
    """Raise errors that can be found before data are read."""
    training, experts, shapes = models.recipe.training, models.recipe.experts, models.architecture.shapes
    models.check_lesson()
    if experts is None:
        check_run(models.run_folder, training, shapes)
    else:
        num_plans = len({repr(plan) for plan in models.plans}) or 1
        check_experts_run(models.run_folder, training, shapes, experts.stages(training, models.schedule, num_plans))


def _run(models: Models, dataset: Dataset) -> Run:
    inputs = replace(models.inputs(dataset), plan=models.plan.name if models.plan else "")
    return Run(models.run_folder, models.recipe.training, inputs, main=models.processes.main)


def _one_to_many(models: Models, dataset: Dataset) -> OneToMany:
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


def _check_trainable(file: UNetFile) -> None:
    """Raise ``ValueError`` naming a file that cannot be trained, before data are encoded."""
    try:
        check_trainable(file.architecture, file.sampling)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _open(recipe: Recipe, name: str) -> UNetFile:
    return teacher_file() if name == DEMO else open_unet(recipe.path(name))
