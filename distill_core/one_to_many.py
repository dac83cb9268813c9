"""One teacher, many students, each distilled for its own range of timesteps (Zhang & Ma 2024, arXiv 2410.04191).

Students of one plan begin as one student that was distilled over all timesteps, or as the pruned teacher. Every stage is
a `run.Run` in a folder of its own, so that training may be left at any step, and one range trained at a time:

run/joint/        the student all begin as (joint_0, joint_1, ... where there are several plans)
run/range_0/      the student of the least noisy range, or a LoRA for it on the joint one
run/ranges.json   boundaries, where they were measured
run/students/     what comes out when all are complete (`students.Students`)
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .checkpoints import checkpoints_in, own, sound
from .dataset import Dataset
from .denoiser import Denoiser
from .documents import numbers, read_json
from .evaluate import output_error
from .files import open_unet, save_unet
from .locks import locked
from .plan import PruningPlan
from .processes import ALONE, Processes
from .ranges import MOST_RANGES, SPLITS, TimestepRanges, balanced, read_ranges
from .recipe import OR_NONE, Recipe, check_settings
from .run import Run
from .schedule import NoiseSchedule
from .storage import fingerprint, write_text
from .students import MANIFEST, Students, write_students
from .teachers import Load, Teachers
from .train import Progress, distill

MEASURED = "error"
"""Way to choose boundaries that needs a measurement: each range has as much error of the jointly distilled student."""
NUM_ERROR_BINS, NUM_ERROR_EXAMPLES = 50, 16  # examples in each


@dataclass(frozen=True, kw_only=True)
class StudentsSettings:
    """How many students there are, what each is in charge of, and what they begin as."""

    count: int = 4
    """Students, where ``boundaries`` does not say."""
    boundaries: str = ""
    """Boundaries of their ranges as people write them (`ranges.read_ranges`): ``500, 250``; ``50%, 75%``; ``sigma 4.5``."""
    split: str = "timesteps"
    """Where no boundaries are given, what is even: ``timesteps``, ``log-snr``, or ``error`` of the jointly distilled student."""
    overlap: int = 0
    """Timesteps of each neighbour a student is trained on besides its own."""
    joint_steps: int | None = None
    """Steps one student is trained over all timesteps, which all then begin as; None for as many as all of them have together in
    their ranges, 0 to begin as the pruned teacher."""
    plans: tuple[str, ...] = ()
    """A preset or plan for each student, the least noisy first; empty for one plan for all."""

    def __post_init__(self):
        check_settings(self, {"count": (1, MOST_RANGES), "overlap": (0, 10_000), "joint_steps": OR_NONE})
        if self.split not in (*SPLITS, MEASURED):
            raise ValueError(f"split: unknown {self.split!r}; choose from {[*SPLITS, MEASURED]}")
        if self.measured and self.joint_steps == 0:
            raise ValueError("split error measures the jointly distilled student; set joint_steps above 0")

    @property
    def measured(self) -> bool:
        """Whether boundaries are measured."""
        return self.split == MEASURED and not self.boundaries

    def num_students(self, schedule: NoiseSchedule) -> int:
        return len(read_ranges(self.boundaries, schedule)) if self.boundaries else self.count

    def ranges(self, schedule: NoiseSchedule) -> TimestepRanges:
        """The ranges, where nothing has to be measured."""
        return read_ranges(self.boundaries, schedule) if self.boundaries else SPLITS[self.split](schedule, self.count)


class Start(NamedTuple):
    """What a student begins as, before any training."""

    plan: PruningPlan | None
    """The plan it was pruned from the teacher with; None for one of the teacher's shape."""
    make: Callable[[], Denoiser]
    """Gives a new one each time."""


class OneToMany:
    """The folder of several students' training."""

    def __init__(
        self,
        folder: Path | str,
        settings: StudentsSettings,
        recipe: Recipe,
        *,
        starts: Sequence[Start],
        teachers: Sequence[Load] | None,
        teacher: str,
        schedule: NoiseSchedule,
        dataset: Dataset,
        origin: Mapping[str, str] | None = None,
        processes: Processes = ALONE,
    ):
        """Open a training, or begin it if the folder does not exist.

        recipe: of each student in its range; with ``lora_rank`` they are LoRAs on one base, which is trained whole. starts:
        one for all, or one for each student, those of one plan being the same. teachers: None where LoRAs learn from the
        base they are on, as it is without them. teacher: its fingerprint. origin: as for `run.Run`; it tells these starts
        from others. Raises ``ValueError`` where settings do not go together, or the folder holds a training with others.
        """
        count = settings.num_students(schedule)
        joint_steps = count * recipe.total_steps if settings.joint_steps is None else settings.joint_steps
        self.folder, self.settings, self.recipe = Path(folder), replace(settings, joint_steps=joint_steps), recipe
        self.teachers, self.teacher, self.schedule, self.dataset = teachers, teacher, schedule, dataset
        self.origin, self.processes = dict(origin or {}), processes
        if len(starts) not in (1, count):
            raise ValueError(f"there are {count} students, but {len(starts)} plans; give one for all, or one for each")
        if teachers is None and not (recipe.lora_rank and joint_steps == 0):
            raise ValueError(
                "students that learn from their own base are LoRAs on it: set lora_rank above 0 and joint_steps to 0"
            )
        if recipe.timestep_range:
            raise ValueError("timestep_range is each student's own; leave it out where several are trained")
        if recipe.sample_every_steps:
            raise ValueError("sample_every_steps draws with a student of all timesteps; leave it out where several are trained")
        self.starts = list(starts) if len(starts) == count else list(starts) * count
        self.plans = list(dict.fromkeys(_spelt(start.plan) for start in self.starts))
        if len(self.plans) > 1 and (recipe.lora_rank or settings.measured):
            what = "LoRAs are on one base" if recipe.lora_rank else "boundaries are measured on one student"
            raise ValueError(f"{what}, so all students need one plan, got {len(self.plans)}")
        names = [path.name for path in self.folder.iterdir() if path.name[0] != "."] if self.folder.exists() else []
        for name in names:
            if name in ("students", "ranges.json", "base.safetensors") or name.startswith(("joint", "range_", "pruned")):
                own(self.folder / name)
        if names and not any(name.startswith(("joint", "range_", "pruned")) for name in names):
            raise ValueError(f"{self.folder} exists and is not a training of several students; choose another name")
        for path in self.folder.glob("joint*"):
            if (done := _steps_in(path)) > self.stages.get(path.name, 0):
                raise ValueError(
                    f"{self.folder} holds one student trained for {done:,} steps, of which all are to begin; set joint_steps to that "
                    "or more, or give the new ones another folder"
                )
        for stage in self.stages:
            if checkpoints_in(self.folder / stage) and (stage.startswith("joint") or self.ranges):
                self._check(stage)

    def _check(self, stage: str) -> None:
        """``ValueError`` where a stage has begun by other settings."""
        joint = self._joint_of(self._number(stage))
        if not stage.startswith("joint") and joint in self.stages and self.steps_of(joint) < self.stages[joint]:
            raise ValueError(
                f"the students in {self.folder} have begun as one that had been trained for {self.steps_of(joint):,} steps; "
                f"set joint_steps to that, or give the new ones another folder"
            )
        self.run(stage)

    # --- where it stands

    def __len__(self) -> int:
        """How many students there are."""
        return len(self.starts)

    @property
    def stages(self) -> dict[str, int]:
        """Name of each stage, in order -> its steps."""
        joint = {name: self.settings.joint_steps for name in self._joint_names.values()} if self.settings.joint_steps else {}
        return joint | {f"range_{number}": self.recipe.total_steps for number in range(len(self))}

    @property
    def _joint_names(self) -> dict[str, str]:
        """Plan -> name of the stage its students begin with."""
        return {plan: f"joint_{i}" if len(self.plans) > 1 else "joint" for i, plan in enumerate(self.plans)}

    def _joint_of(self, number: int) -> str:
        """Name of the stage a student begins with."""
        return self._joint_names[_spelt(self.starts[number].plan)]

    def steps_of(self, stage: str) -> int:
        """Steps of a stage that are done."""
        return min(_steps_in(self.folder / stage), self.stages[stage])

    @property
    def step(self) -> int:
        """Steps done in all stages."""
        return sum(map(self.steps_of, self.stages))

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(self.stages.values())

    @property
    def complete(self) -> bool:
        return self.step == self.total_steps and (self.folder / "students" / MANIFEST).exists()

    @property
    def students(self) -> Students:
        """What came out; ``ValueError`` before all are complete."""
        return Students.read(self.folder / "students")

    @property
    def ranges(self) -> TimestepRanges | None:
        """None before they are measured."""
        if not self.settings.measured:
            return self.settings.ranges(self.schedule)
        path = self.folder / "ranges.json"
        if not path.exists():
            return None
        boundaries = numbers(read_json(path).get("boundaries"), f"boundaries of {path}")
        return TimestepRanges(tuple(boundaries), self.schedule.num_timesteps)

    @property
    def heaviest_recipe(self) -> Recipe:
        """That of the stage which needs the most memory: whole weights need more than LoRAs on them."""
        return self._joint_recipe if self.settings.joint_steps else self.recipe

    def describe(self) -> str:
        """What is trained, a line each."""
        begins = f"one distilled for {self.settings.joint_steps:,} steps" if self.settings.joint_steps else "the pruned teacher"
        kept = f"LoRAs of rank {self.recipe.lora_rank} on one base" if self.recipe.lora_rank else "whole"
        ranges = self.ranges.describe(self.schedule) if self.ranges else "boundaries will be measured"
        return f"students  {len(self)}, {kept}, begun as {begins}\n{ranges}"

    def describe_state(self) -> str:
        """How far it is, and where what came out is."""
        if self.complete:
            return f"step {self.step}: {self.folder / 'students'}"
        left = [stage for stage, steps in self.stages.items() if self.steps_of(stage) < steps]
        return f"step {self.step} of {self.total_steps}: still to train are {', '.join(left)}"

    @property
    def facts(self) -> dict[str, str | None]:
        """What came out, for scripts."""
        return {"students": str(self.students.folder) if self.complete else None}

    # --- training

    def train(
        self,
        only: int | None = None,
        num_steps: int | None = None,
        on_step: Callable[[Progress], None] = lambda progress: None,
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> None:
        """Train for ``num_steps`` more steps, or to the end; when all are complete, write the folder of students.

        only: number of the one student to train, and what it begins with. ``on_stage`` is called with the name of each
        stage that is about to be trained, ``on_step`` with the progress over all stages; what they raise ends the
        training, as in `train.distill`.
        """
        if only is not None and not 0 <= only < len(self):
            raise ValueError(f"there are students 0 to {len(self) - 1}, got {only}")
        with locked(self.folder) if self.processes.main else contextlib.nullcontext():
            self._train_stages(range(len(self)) if only is None else [only], num_steps, on_step, on_stage)

    def _train_stages(
        self,
        numbers: Sequence[int],
        num_steps: int | None,
        on_step: Callable[[Progress], None],
        on_stage: Callable[[str], None],
    ) -> None:
        joint = dict.fromkeys(map(self._joint_of, numbers))
        stages = [*(stage for stage in joint if stage in self.stages), *(f"range_{number}" for number in numbers)]
        left = self.total_steps if num_steps is None else num_steps
        for stage in stages:
            before = self.steps_of(stage)
            if before < self.stages[stage] and left > 0:
                on_stage(stage)
                self._train(stage, left, partial(self._tell, on_step, self.step - before))
                left -= self.steps_of(stage) - before
            if self.steps_of(stage) < self.stages[stage]:
                return
            if self.settings.measured and stage.startswith("joint"):
                self._measure()
        if self.step == self.total_steps and not self.complete:
            self._assemble()

    def _tell(self, on_step: Callable[[Progress], None], before: int, progress: Progress) -> None:
        on_step(progress._replace(step=before + progress.step, total_steps=self.total_steps))

    def _train(self, stage: str, num_steps: int, on_step: Callable[[Progress], None]) -> None:
        number = self._number(stage)
        plan, make = self.starts[number]
        student = make()
        if not stage.startswith("joint") and self.settings.joint_steps:
            student.load_state_dict(open_unet(sound(self._result(self._joint_of(number)))).state_dict)
        with self.processes.main_first():
            run = self.run(stage, main=self.processes.main)
            (self.folder / "students" / MANIFEST).unlink(missing_ok=True)  # what it tells of is no more
        teachers = self.teachers
        if teachers is None:
            from .adapter import WithoutLora  # which needs peft

            teachers = [partial(WithoutLora, student)]
        distill(
            run,
            student=student,
            teacher=Teachers(teachers, run.recipe),
            plan=plan,
            dataset=self.dataset,
            num_steps=num_steps,
            on_step=on_step,
            processes=self.processes,
        )

    def run(self, stage: str, *, main: bool = False) -> Run:
        """The run of a stage that can begin; main: False to look at it alone. ``ValueError`` if it has other settings."""
        number, recipe = self._number(stage), self._joint_recipe
        origin = self.origin | {"teacher": self.teacher, "plan": _spelt(self.starts[number].plan)}
        if not stage.startswith("joint"):
            timesteps = self.ranges.timesteps(number, self.settings.overlap)
            recipe = replace(self.recipe, timestep_range=(timesteps.start, timesteps.stop))
            if self.settings.joint_steps:
                origin["joint"] = fingerprint(open_unet(self._result(self._joint_of(number))).tensors)
        return Run(self.folder / stage, recipe, origin, main=main)

    @property
    def _joint_recipe(self) -> Recipe:
        """Over all timesteps, and all weights."""
        weights = {"lora_rank": 0, "lora_alpha": None, "lora_targets": Recipe.lora_targets, "lora_dora": False}
        return replace(self.recipe, total_steps=max(1, self.settings.joint_steps), **weights)

    def _number(self, stage: str) -> int:
        """The student of a stage; of a joint stage the first that begins with it."""
        if stage.startswith("range_"):
            return int(stage.removeprefix("range_"))
        return next(number for number in range(len(self)) if self._joint_of(number) == stage)

    def _result(self, stage: str) -> Path:
        """What came out of a stage: with ``keep_best`` its best, otherwise its newest."""
        run = self.run(stage)
        return run.best_result_file if run.recipe.keep_best else run.result_file

    # --- what follows from trained stages

    def _measure(self) -> None:
        """Write boundaries by the error of the jointly distilled student, once."""
        path, file = self.folder / "ranges.json", open_unet(sound(self._result("joint")))
        joint = fingerprint(file.tensors)
        with self.processes.main_first():
            if not self.processes.main or (path.exists() and read_json(path).get("joint") == joint):
                return
            student = self.starts[0].make()
            student.load_state_dict(file.state_dict)
            size = min(self.recipe.batch_size // self.recipe.accumulation_steps, NUM_ERROR_EXAMPLES)
            teacher = Teachers(self.teachers, self._joint_recipe).at(self.settings.joint_steps)
            errors = output_error(
                student,
                teacher,
                self.dataset,
                num_bins=min(NUM_ERROR_BINS, self.schedule.num_timesteps),
                num_batches=math.ceil(NUM_ERROR_EXAMPLES / size),
                batch_size=size,
                seed=self.recipe.seed,
                guidance=self.recipe.guidance,
            ).tolist()
            ranges = balanced(errors, self.schedule.num_timesteps, len(self))
            write_text(path, json.dumps({"joint": joint, "boundaries": ranges.boundaries, "errors": errors}, indent=2) + "\n")

    def _assemble(self) -> None:
        """Write the folder of students."""
        if self.processes.main:
            steps = [self.recipe.total_steps] * len(self)
            base = self._base() if self.recipe.lora_rank else None
            files = [sound(self._result(f"range_{number}")) for number in range(len(self))]
            options = {"base": base, "teacher": self.teacher, "steps": steps, "base_steps": self.settings.joint_steps}
            write_students(self.folder / "students", self.ranges, files, **options)
        self.processes.wait()

    def _base(self) -> Path:
        """The file all LoRAs are on."""
        if self.settings.joint_steps:
            return sound(self._result("joint"))
        path, student = self.folder / "base.safetensors", self.starts[0].make()
        save_unet(
            path,
            student.named_parameters(),
            student.architecture,
            sampling=student.sampling,
            plan=self.starts[0].plan,
            metadata=student.origin,
            overwrite=True,
        )
        return path


def has_begun(folder: Path) -> bool:
    """Whether a folder holds a training of several students of which a step was kept."""
    return any(_steps_in(path.parent) for path in folder.glob("*/checkpoints"))


def _steps_in(folder: Path) -> int:
    """Steps the folder of a run has kept."""
    checkpoints = checkpoints_in(folder)
    return int(checkpoints[-1].name) if checkpoints else 0


def _spelt(plan: PruningPlan | None) -> str:
    return plan.to_json() if plan else ""
