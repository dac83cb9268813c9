"""One teacher, many experts, each distilled for its own range of timesteps (Zhang & Ma 2024, arXiv 2410.04191).

Experts with the same plan start from one student that was distilled over all timesteps, or from the pruned teacher. Every
stage is a `run.Run` in its own folder, so that training can stop at any step, and can train one range at a time:

run/joint/        the student that all start from (joint_0, joint_1, ... if there are several plans)
run/range_0/      the expert of the noisiest range, or its LoRA on the joint student
run/ranges.json   boundaries, if they were measured
run/stages.json   steps of each stage
run/experts/      the result when all are complete (`experts.Experts`)
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..base.documents import numbers, read_json
from ..base.locks import locked
from ..base.settings import OR_NONE, check_settings, setting
from ..base.storage import fingerprint, ignore, write_text
from ..data.dataset import Dataset
from ..diffusion.denoiser import Denoiser, Load
from ..diffusion.ranges import MOST_RANGES, SPLITS, TimestepRanges, balanced, read_ranges
from ..diffusion.schedule import NoiseSchedule
from ..evaluation.metrics import output_error
from ..networks.files import open_unet, save_unet
from ..pruning.plan import PruningPlan
from ..training.checkpoints import checkpoints_in, own, sound, step_in
from ..training.loop import Progress, distill
from ..training.processes import ALONE, Processes
from ..training.run import Inputs, Run
from ..training.run_folders import OWN_OF_EXPERTS, STAGES
from ..training.settings import TrainingSettings
from ..training.teachers import Teachers
from .experts import MANIFEST, Experts, write_experts

MEASURED = "error"
"""Split that needs a measurement: every range has the same total error of the jointly distilled student."""
NUM_ERROR_BINS, NUM_ERROR_EXAMPLES = 50, 16  # examples per bin


@dataclass(frozen=True, kw_only=True)
class ExpertsSettings:
    """Number of experts, their timestep ranges, and the student they start from."""

    count: int = setting(
        4,
        "Number of experts, unless boundaries is set. Each expert adds disk space and training time.",
        within=(1, MOST_RANGES),
    )
    boundaries: str = setting(
        "",
        "Where one range ends and the next begins; replaces the number of experts and split. 500, 250 are timesteps; 50%, 75% are shares of the "
        "sampling; sigma 4.5, 1.2 are noise levels.",
    )
    split: str = setting(
        "timesteps",
        "What is divided evenly between the ranges. timesteps: their number. log-snr: the logarithm of the signal-to-noise ratio. "
        "error: the error of the jointly trained student; needs joint_steps.",
        choices=(*SPLITS, MEASURED),
    )
    overlap: int = setting(0, "Timesteps of each neighbouring range that an expert is also trained on.", within=(0, 10_000))
    joint_steps: int | None = setting(
        None,
        "Steps to train one student on all timesteps first; every expert then starts from it. 0: every expert starts from the "
        "untrained student.",
        unset="as many as all experts train together",
        within=OR_NONE,
    )
    plans: tuple[str, ...] = setting((), "A preset or plan for each expert, noisiest first; empty for one plan for all.")

    def __post_init__(self):
        check_settings(self)
        if self.measured and self.joint_steps == 0:
            raise ValueError("split error measures the joint student; set joint_steps above 0")

    @property
    def measured(self) -> bool:
        """Whether the boundaries are measured."""
        return self.split == MEASURED and not self.boundaries

    def num_experts(self, schedule: NoiseSchedule) -> int:
        return len(read_ranges(self.boundaries, schedule)) if self.boundaries else self.count

    def steps_together(self, training: TrainingSettings, count: int) -> int:
        """Steps of a joint stage. count: number of experts."""
        return count * training.total_steps if self.joint_steps is None else self.joint_steps

    def check_number(self, number: int | None, schedule: NoiseSchedule) -> None:
        """``ValueError`` unless there is an expert of a number; None stands for all."""
        count = self.num_experts(schedule)
        if number is not None and not 0 <= number < count:
            raise ValueError(f"there is no expert {number}; choose one of 0 to {count - 1}")

    def stages(self, training: TrainingSettings, schedule: NoiseSchedule, num_plans: int = 1) -> list[TrainingSettings]:
        """Settings of every stage: of a joint student for each plan, then of each expert. training: of an expert in its range.

        ``ValueError`` for settings that cannot be combined.
        """
        self.check(training, num_plans)
        count = self.num_experts(schedule)
        steps = self.steps_together(training, count)
        return (num_plans * [joint_settings(training, steps)] if steps else []) + [training] * count

    def check(self, training: TrainingSettings, num_plans: int) -> None:
        """``ValueError`` for settings that cannot be combined. training: of an expert. num_plans: different ones."""
        if training.timestep_range:
            raise ValueError("timestep_range cannot be set for several experts, as each has its own; remove it")
        if training.weighted_objective.dmd:
            raise ValueError(
                "experts cannot learn by the objective dmd, which needs whole samplings; choose the objective consistency"
            )
        if training.sample_every_steps:
            raise ValueError("sample_every_steps needs a student for all timesteps; set it to 0 for several experts")
        if num_plans > 1 and (training.lora_rank or self.measured):
            what = "the LoRAs share one base" if training.lora_rank else "the boundaries are measured on one student"
            raise ValueError(f"{what}, so all experts need one plan, got {num_plans}")

    def check_stored(self, stored: Tensor | None, schedule: NoiseSchedule) -> None:
        """``ValueError`` if a range holds none of the timesteps at which a dataset has states, (K,); None for a dataset without states."""
        if stored is None:
            return
        if self.measured:
            empty = num_error_bins(stored, schedule) < self.count
        else:
            ranges = self.ranges(schedule)
            within = [ranges.timesteps(number, self.overlap) for number in range(len(ranges))]
            empty = not all(any(t in timesteps for t in stored.tolist()) for timesteps in within)
        if empty:
            raise ValueError(
                "the stored trajectories have no state in the range of some expert; store more states, or set trajectory_states to 0"
            )

    def ranges(self, schedule: NoiseSchedule) -> TimestepRanges:
        """The ranges, if no measurement is needed."""
        return read_ranges(self.boundaries, schedule) if self.boundaries else SPLITS[self.split](schedule, self.count)


def num_error_bins(stored: Tensor | None, schedule: NoiseSchedule) -> int:
    """Bins of equal width in which an error is measured: as many as hold stored states each, (K,); None for any timesteps."""
    most, count = min(NUM_ERROR_BINS, schedule.num_timesteps), schedule.num_timesteps
    if stored is None:
        return most
    held = stored.tolist()  # timestep t is in bin ((t + 1) * bins - 1) // count
    return next(bins for bins in range(most, 0, -1) if len({((t + 1) * bins - 1) // count for t in held}) == bins)


def joint_settings(training: TrainingSettings, steps: int) -> TrainingSettings:
    """Settings of a joint stage of so many steps: all timesteps, all weights. ``ValueError`` if only a LoRA can be trained so."""
    whole: dict[str, Any] = {
        "lora_rank": 0,
        "lora_alpha": None,
        "lora_targets": TrainingSettings.lora_targets,
        "lora_dora": False,
    }
    try:
        return replace(training, total_steps=steps, **whole)
    except ValueError as error:
        raise ValueError(f"the joint student is trained as a whole, without a LoRA: {error}; or set joint_steps to 0") from error


class Start(NamedTuple):
    """The model an expert starts from, before any training."""

    plan: PruningPlan | None
    """The plan that pruned the teacher to this model; None for the teacher's shape."""
    make: Callable[[], Denoiser]
    """Creates a new model on each call."""


class OneToMany:
    """The training of several experts, in one folder."""

    def __init__(
        self,
        folder: Path | str,
        settings: ExpertsSettings,
        training: TrainingSettings,
        *,
        starts: Sequence[Start],
        teachers: Sequence[Load] | None,
        schedule: NoiseSchedule,
        dataset: Dataset,
        inputs: Inputs,
        processes: Processes = ALONE,
    ):
        """Open a training, or a new one if the folder does not exist.

        training: settings of each expert in its range; with ``lora_rank`` the experts are LoRAs on one base, whose weights are
        all trained. starts: one for all, or one for each expert; experts with the same plan share one. teachers: None if LoRAs
        learn from their own base without LoRA. inputs: as for `run.Run`, without plan and joint. Raises ``ValueError`` for
        settings that cannot be combined, or if the folder holds a training with other settings.
        """
        count = settings.num_experts(schedule)
        if len(starts) not in (1, count):
            raise ValueError(f"there are {count} experts but {len(starts)} plans; give one for all, or one for each")
        self.joint_steps = settings.steps_together(training, count)
        self.folder, self.settings, self.training = Path(folder), replace(settings, joint_steps=self.joint_steps), training
        self.teachers, self.inputs, self.schedule, self.dataset = teachers, inputs, schedule, dataset
        self.processes = processes
        self.starts = list(starts) if len(starts) == count else list(starts) * count
        self.plans = list(dict.fromkeys(_spelt(start.plan) for start in self.starts))
        settings.check(training, len(self.plans))
        settings.check_stored(dataset.timesteps, schedule)
        if teachers is None and not (training.lora_rank and self.joint_steps == 0):
            raise ValueError(
                "experts that learn from their own base must be LoRAs on it; set lora_rank above 0 and joint_steps to 0"
            )
        self._check_folder()
        for stage in self.stages:
            if checkpoints_in(self.folder / stage) and (stage.startswith("joint") or self.ranges):
                self._check(stage)

    def _check_folder(self) -> None:
        """Raise ``ValueError`` if the folder holds something else, or a joint student that was trained for longer."""
        there = self.folder.iterdir() if self.folder.exists() else ()
        names = [path.name for path in there if path.name[0] != "." and path.name != STAGES]
        for name in names:
            if name in OWN_OF_EXPERTS or name.startswith(("joint", "range_", "pruned")):
                own(self.folder / name)
        if names and not any(name.startswith(("joint", "range_", "pruned")) for name in names):
            raise ValueError(f"{self.folder} exists but is not a training of several experts; choose another name")
        for path in self.folder.glob("joint*"):
            if (done := step_in(path)) > self.stages.get(path.name, 0):
                raise ValueError(
                    f"the joint student in {self.folder} is trained for {done:,} steps already; set joint_steps to that or more, "
                    "or choose another folder"
                )

    def _check(self, stage: str) -> None:
        """Raise ``ValueError`` if a stage was started with other settings."""
        joint = self._joint_of(self._number(stage))
        if not stage.startswith("joint") and joint in self.stages and self.steps_of(joint) < self.stages[joint]:
            raise ValueError(
                f"the experts in {self.folder} started from a joint student trained for {self.steps_of(joint):,} steps; "
                f"set joint_steps to that, or choose another folder"
            )
        self.run(stage)

    # --- progress

    def __len__(self) -> int:
        """Number of experts."""
        return len(self.starts)

    @property
    def stages(self) -> dict[str, int]:
        """Name of each stage -> its steps, in order."""
        joint = {name: self.joint_steps for name in self._joint_names.values()} if self.joint_steps else {}
        return joint | {f"range_{number}": self.training.total_steps for number in range(len(self))}

    @property
    def _joint_names(self) -> dict[str, str]:
        """Plan -> name of the joint stage of its experts."""
        return {plan: f"joint_{i}" if len(self.plans) > 1 else "joint" for i, plan in enumerate(self.plans)}

    def _joint_of(self, number: int) -> str:
        """Name of the joint stage of an expert."""
        return self._joint_names[_spelt(self.starts[number].plan)]

    def steps_of(self, stage: str) -> int:
        """Completed steps of a stage."""
        return min(step_in(self.folder / stage), self.stages[stage])

    @property
    def step(self) -> int:
        """Completed steps of all stages."""
        return sum(map(self.steps_of, self.stages))

    @property
    def total_steps(self) -> int:
        """Total steps of all stages."""
        return sum(self.stages.values())

    @property
    def complete(self) -> bool:
        return self.step == self.total_steps and (self.folder / "experts" / MANIFEST).exists()

    @property
    def experts(self) -> Experts:
        """The folder of experts; ``ValueError`` before all are complete."""
        return Experts.read(self.folder / "experts")

    @property
    def ranges(self) -> TimestepRanges | None:
        """The ranges; None before they are measured."""
        if not self.settings.measured:
            return self.settings.ranges(self.schedule)
        path = self.folder / "ranges.json"
        if not path.exists():
            return None
        boundaries = numbers(read_json(path).get("boundaries"), f"boundaries of {path}")
        return TimestepRanges(tuple(boundaries), self.schedule.num_timesteps)

    @property
    def heaviest_settings(self) -> TrainingSettings:
        """Settings of the stage that needs the most memory: training all weights needs more than LoRAs."""
        return self._joint_training if self.joint_steps else self.training

    def describe(self) -> str:
        """What is trained: a summary line, then one line per range."""
        begins = f"a student distilled for {self.joint_steps:,} steps" if self.joint_steps else "the pruned teacher"
        kept = f"LoRAs of rank {self.training.lora_rank} on one base" if self.training.lora_rank else "all weights"
        ranges = self.ranges.describe(self.schedule) if self.ranges else "boundaries will be measured"
        return f"experts   {len(self)}, {kept}, started from {begins}\n{ranges}"

    def describe_state(self) -> str:
        """The step reached, and the path of the result or the unfinished stages."""
        if self.complete:
            return f"step {self.step}: {self.folder / 'experts'}"
        left = [stage for stage, steps in self.stages.items() if self.steps_of(stage) < steps]
        return f"step {self.step} of {self.total_steps}: still to train: {', '.join(left)}"

    @property
    def facts(self) -> dict[str, str | None]:
        """Path of the result, for scripts."""
        return {"experts": str(self.experts.folder) if self.complete else None}

    # --- training

    def train(
        self,
        only: int | None = None,
        num_steps: int | None = None,
        on_step: Callable[[Progress], None] = lambda progress: None,
        on_stage: Callable[[str], None] = lambda stage: None,
        on_refit: Callable[[int, int], None] = ignore,
    ) -> None:
        """Train for ``num_steps`` more steps, or to the end; when all are complete, write the folder of experts.

        only: index of the only expert to train (with the joint stage it starts from). ``on_stage`` is called with the name of
        each stage before it trains, ``on_step`` with the progress over all stages, ``on_refit`` with that of refitting a student; any
        exception they raise ends the training, as in `loop.distill`.
        """
        self.settings.check_number(only, self.schedule)
        with locked(self.folder) if self.processes.main else contextlib.nullcontext():
            self._train_stages(range(len(self)) if only is None else [only], num_steps, on_step, on_stage, on_refit)

    def _train_stages(
        self,
        numbers: Sequence[int],
        num_steps: int | None,
        on_step: Callable[[Progress], None],
        on_stage: Callable[[str], None],
        on_refit: Callable[[int, int], None],
    ) -> None:
        joint = dict.fromkeys(map(self._joint_of, numbers))
        stages = [*(stage for stage in joint if stage in self.stages), *(f"range_{number}" for number in numbers)]
        if self.processes.main:
            write_text(self.folder / STAGES, json.dumps(self.stages))
        left = self.total_steps if num_steps is None else num_steps
        for stage in stages:
            before = self.steps_of(stage)
            if before < self.stages[stage] and left > 0:
                on_stage(stage)
                self._train(stage, left, partial(self._tell, on_step, self.step - before), on_refit)
                left -= self.steps_of(stage) - before
            if self.steps_of(stage) < self.stages[stage]:
                return
            if self.settings.measured and stage.startswith("joint"):
                self._measure()
        if self.step == self.total_steps:
            self._assemble()

    def _tell(self, on_step: Callable[[Progress], None], before: int, progress: Progress) -> None:
        on_step(progress._replace(step=before + progress.step, total_steps=self.total_steps))

    def _train(
        self, stage: str, num_steps: int, on_step: Callable[[Progress], None], on_refit: Callable[[int, int], None]
    ) -> None:
        number = self._number(stage)
        plan, make = self.starts[number]
        student = make()
        if not stage.startswith("joint") and self.joint_steps:
            student.load_state_dict(open_unet(sound(self.result_of(self._joint_of(number)))).state_dict)
        with self.processes.main_first():
            run = self.run(stage, main=self.processes.main)
            (self.folder / "experts" / MANIFEST).unlink(missing_ok=True)  # it describes outdated files
        teachers = self.teachers
        if teachers is None:
            from ..lora.layers import without_lora  # needs peft

            teachers = [without_lora(student)]
        distill(
            run,
            student=student,
            teacher=Teachers(teachers, run.settings),
            plan=plan,
            dataset=self.dataset,
            num_steps=num_steps,
            on_step=on_step,
            on_refit=on_refit,
            processes=self.processes,
        )

    def run(self, stage: str, *, main: bool = False) -> Run:
        """The run of a stage; main: False to only read it. ``ValueError`` if it was started with other settings."""
        number = self._number(stage)
        inputs = replace(self.inputs, plan=_spelt(self.starts[number].plan))
        if stage.startswith("joint"):
            training = self._joint_training
        else:
            ranges = self.ranges
            assert ranges is not None  # measured by now
            timesteps = ranges.timesteps(number, self.settings.overlap)
            training = replace(self.training, timestep_range=(timesteps.start, timesteps.stop))
            if self.joint_steps:
                inputs = replace(inputs, joint=fingerprint(open_unet(self.result_of(self._joint_of(number))).tensors))
        return Run(self.folder / stage, training, inputs, main=main)

    @property
    def _joint_training(self) -> TrainingSettings:
        return joint_settings(self.training, self.joint_steps)

    def _number(self, stage: str) -> int:
        """Index of a stage's expert; for a joint stage, of the first expert that starts from it."""
        if stage.startswith("range_"):
            return int(stage.removeprefix("range_"))
        return next(number for number in range(len(self)) if self._joint_of(number) == stage)

    def result_of(self, stage: str) -> Path:
        """Result file of a stage so far: the best one with ``keep_best``, otherwise the newest."""
        run = self.run(stage)
        return run.best_result_file if run.settings.keep_best else run.result_file

    # --- results of trained stages

    def _measure(self) -> None:
        """Measure the error of the joint student and write the boundaries, once."""
        path, file = self.folder / "ranges.json", open_unet(sound(self.result_of("joint")))
        joint = fingerprint(file.tensors)
        with self.processes.main_first():
            if not self.processes.main or (path.exists() and read_json(path).get("joint") == joint):
                return
            student = self.starts[0].make()
            student.load_state_dict(file.state_dict)
            size = min(self.training.batch_size // self.training.accumulation_steps, NUM_ERROR_EXAMPLES)
            assert self.teachers is not None  # else there is no joint student
            teacher = Teachers(self.teachers, self._joint_training).at(self.joint_steps)
            errors = output_error(
                student,
                teacher,
                self.dataset,
                num_bins=num_error_bins(self.dataset.timesteps, self.schedule),
                num_batches=math.ceil(NUM_ERROR_EXAMPLES / size),
                batch_size=size,
                seed=self.training.seed,
                guidance=self.training.guidance,
            ).tolist()
            ranges = balanced(errors, self.schedule.num_timesteps, len(self))
            write_text(path, json.dumps({"joint": joint, "boundaries": ranges.boundaries, "errors": errors}, indent=2) + "\n")

    def _assemble(self) -> None:
        """Write the folder of experts, unless it is there."""
        if self.processes.main and not self.complete:
            steps = [self.training.total_steps] * len(self)
            base = self._base() if self.training.lora_rank else None
            files = [sound(self.result_of(f"range_{number}")) for number in range(len(self))]
            ranges = self.ranges
            assert ranges is not None  # all are trained
            write_experts(
                self.folder / "experts",
                ranges,
                files,
                base=base,
                teacher=self.inputs.teachers[0],
                steps=steps,
                base_steps=self.joint_steps,
            )
        self.processes.wait()

    def _base(self) -> Path:
        """The base file of all LoRAs."""
        if self.joint_steps:
            return sound(self.result_of("joint"))
        path, (plan, make) = self.folder / "base.safetensors", self.starts[0]
        student = make()
        save_unet(
            path,
            student.named_parameters(),
            student.architecture,
            sampling=student.sampling,
            metadata={**(plan.metadata if plan else {}), **student.origin},
            overwrite=True,
        )
        return path


def _spelt(plan: PruningPlan | None) -> str:
    return plan.to_json() if plan else ""
