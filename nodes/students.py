"""A student for each range of timesteps."""

from dataclasses import replace
from functools import partial

import torch
from comfy_api.latest import io, ui

from ..distill_core import plots
from ..distill_core.files import open_unet
from ..distill_core.live import metrics_of
from ..distill_core.one_to_many import MEASURED, OneToMany, Start, StudentsSettings
from ..distill_core.preflight import check_students_run
from ..distill_core.ranges import SPLITS, read_boundaries
from ..distill_core.recipe import Recipe
from ..distill_core.students import MANIFEST, Students
from ..distill_core.train import check_lesson
from . import bridge
from .inputs import data_inputs, learning_inputs
from .train import Watch, log, tell_memory

_default = StudentsSettings()
MAX_STUDENTS = 8


class TrainTimestepStudents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillTrainStudents",
            display_name="Train Timestep Students",
            category="distill",
            description="Teaches several students from one teacher, each for its own range of timesteps, and gives them out as one "
            "MODEL that asks the right one at every step of a sampler. A step costs what one student costs; together they "
            "answer more like the teacher. Each execution trains some steps and saves them under output/distill_runs; queue "
            "again to go on. Cancel at any time: every finished step is kept.",
            search_aliases=["o2mkd", "one to many", "timestep experts", "distill", "train experts", "knowledge distillation"],
            is_input_list=True,
            inputs=[
                *data_inputs(),
                io.String.Input(
                    "run_name",
                    default="students",
                    tooltip="Folder of the training under output/distill_runs. The same name goes on with it; a new name starts anew.",
                ),
                io.Int.Input(
                    "count",
                    display_name="students",
                    default=_default.count,
                    min=1,
                    max=MAX_STUDENTS,
                    tooltip="How many students there are, where boundaries does not say. Each takes its share of disk and training.",
                ),
                io.Combo.Input(
                    "split",
                    options=[*SPLITS, MEASURED],
                    default=_default.split,
                    tooltip="What is even between the ranges. timesteps: their number. log-snr: the logarithm of the "
                    "signal-to-noise ratio. error: what the jointly trained student gets wrong; needs joint_steps.",
                ),
                io.Int.Input(
                    "lora_rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="0: each student is a network of its own. Above: all share one network, and each is a LoRA of this rank "
                    "on it, so that disk and memory hold about one model; 16 to 64 is usual.",
                ),
                io.Int.Input(
                    "joint_steps",
                    default=_default.count * 1000,
                    min=0,
                    max=10_000_000,
                    tooltip="Steps one student is trained over all timesteps first, which all then begin as. 0: they begin as the "
                    "student that is connected.",
                ),
                io.Int.Input("total_steps", default=1000, min=1, max=10_000_000, tooltip="Steps of each student in its range."),
                *learning_inputs(),
                io.String.Input(
                    "boundaries",
                    default=_default.boundaries,
                    advanced=True,
                    tooltip="Where one range ends and the next begins, in place of students and split: 500, 250 are timesteps; "
                    "50%, 75% shares of the sampling; sigma 4.5, 1.2 noise levels.",
                ),
                io.Int.Input(
                    "overlap",
                    default=_default.overlap,
                    min=0,
                    max=999,
                    advanced=True,
                    tooltip="Timesteps of each neighbour a student is trained on besides its own.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The students as trained so far, as one MODEL for any stock sampler."
                ),
                io.String.Output(
                    display_name="folder", tooltip="Where the finished students lie; empty before all are complete."
                ),
                io.String.Output(
                    display_name="ranges", tooltip="What each student is in charge of: timesteps, share of the sampling, sigma."
                ),
                io.Image.Output(display_name="loss_curve", tooltip="The loss of all students, one after another."),
                io.Int.Output(display_name="step", tooltip="Steps done so far, of all students."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name, count, boundaries, joint_steps, total_steps, steps_per_queue, **_):
        """The step an execution ends at: a training that can go on is executed again, a complete one is not.

        NaN, which is never as before, where one of these is linked: it is not known yet.
        """
        if None in (run_name[0], count[0], boundaries[0], joint_steps[0], total_steps[0], steps_per_queue[0]):
            return float("nan")  # one of its own each time: ComfyUI takes one object for the same
        try:
            num_students = len(read_boundaries(boundaries[0])) + 1 if boundaries[0] else count[0]
        except ValueError as error:  # execute will say it
            return str(error)
        total = joint_steps[0] + num_students * total_steps[0]
        newest = bridge.newest_step(run_name[0])
        return f"{min(total, newest + steps_per_queue[0])}, lost {bridge.times_lost(run_name[0])}"

    @classmethod
    def execute(
        cls, teacher, student, latents, captions, run_name, steps_per_queue, null_caption=None, recipe=({},), **settings
    ) -> io.NodeOutput:
        teacher, student, node_id = teacher[0], student[0], cls.hidden.unique_id
        settings = {name: values[0] for name, values in settings.items()}
        of_students = {name: settings.pop(name) for name in ("count", "split", "boundaries", "overlap", "joint_steps")}
        recipe = Recipe(**settings, **recipe[0])
        if recipe.sample_every_steps:
            log.warning("sample_every_steps has no effect here: sample pictures are drawn by Distill Train Step alone")
            recipe = replace(recipe, sample_every_steps=0)
        folder, architecture, students = (
            bridge.run_folder(run_name[0]),
            bridge.architecture_of(student),
            StudentsSettings(**of_students),
        )
        check_students_run(folder, recipe, architecture.shapes, students.num_students(bridge.schedule_of(teacher)))
        check_lesson(recipe, bridge.architecture_of(teacher), architecture, same=False)
        plan = bridge.plan_between(student, teacher)
        bridge.check_trainable(student, teacher)
        shares_base = student is teacher and recipe.lora_rank > 0 and of_students["joint_steps"] == 0
        with torch.inference_mode(False), torch.enable_grad():
            data = bridge.dataset(latents, captions, null_caption, teacher)
            training = OneToMany(
                folder,
                students,
                recipe,
                starts=[Start(plan, partial(bridge.shared_base if shares_base else bridge.trainable, student))],
                teachers=None if shares_base else [partial(bridge.denoiser, teacher, architecture)],
                teacher=bridge.model_fingerprint(teacher),
                schedule=bridge.schedule_of(teacher),
                dataset=data,
                origin={"student": bridge.model_fingerprint(student), "data": data.fingerprint},
            )
            if not training.complete:
                whole = replace(recipe, lora_rank=0) if training.step < of_students["joint_steps"] else recipe
                told = bridge.forecast_memory([teacher], student, plan, data, whole, shares_base=shares_base)
                tell_memory(told, bridge.free_bytes(student), node_id)
                _train(training, run_name[0], steps_per_queue[0], node_id)
        ranges = training.ranges.describe(training.schedule) if training.ranges else "measured after joint_steps"
        curve = bridge.to_image(plots.loss_curve(metrics_of(training.folder), run_name[0]))
        bridge.newest_step(run_name[0])  # so that it is noticed if they are gone next time
        written = str(training.folder / "students") if training.complete else ""
        state = "complete" if training.complete else "queue again to go on"
        bridge.show_text(f"step {training.step} of {training.total_steps}: {state}\n{ranges}", node_id)
        return io.NodeOutput(
            _routed(training, student), written, ranges, curve, training.step, ui=ui.PreviewImage(curve, cls=cls)
        )


def _train(training: OneToMany, run_name: str, num_steps: int, node_id: str) -> None:
    last = min(training.total_steps, training.step + num_steps)
    watch = Watch(run_name, training.step, last, node_id)

    def on_stage(stage: str) -> None:
        bridge.release_memory()  # of the stage before
        watch.stage = _words(training, stage)

    try:
        training.train(num_steps=num_steps, on_step=watch, on_stage=on_stage)
    finally:
        bridge.release_memory()


def _words(training: OneToMany, stage: str) -> str:
    """What is trained, for a person: ``range 2, timesteps 667 to 999``."""
    if not stage.startswith("range_"):
        return "all timesteps"
    number = int(stage.removeprefix("range_"))
    held = training.ranges.timesteps(number)
    return f"range {number}, timesteps {held[0]} to {held[-1]}"


def _routed(training: OneToMany, student):
    """The students as trained so far as one MODEL; a range that was not begun has what it will begin with."""
    architecture, origin = bridge.architecture_of(student), bridge.origin_of(student)

    def trained(stage: str):
        state_dict = open_unet(training.run(stage).result_file).state_dict
        return bridge.make_student(state_dict, architecture, student, origin)

    start = trained("joint") if "joint" in training.stages and training.steps_of("joint") else student
    if training.ranges is None:
        return start
    students = []
    for number in range(len(training)):
        stage = f"range_{number}"
        if not training.steps_of(stage):
            students.append(start)
        elif training.recipe.lora_rank:
            students.append(bridge.with_lora_file(start, training.run(stage).result_file))
        else:
            students.append(trained(stage))
    return bridge.route_students(students, training.ranges)


class LoadTimestepStudents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillLoadStudents",
            display_name="Load Timestep Students",
            category="distill",
            description="Loads a folder of students, each trained for a range of timesteps, as one MODEL for any stock sampler: the "
            "one in charge of the noise level answers. Loads what Train Timestep Students and distill train have written.",
            search_aliases=["o2mkd", "one to many", "load students", "timestep experts", "load distilled", "distill"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(bridge.students_folders()),
                    tooltip="A run under output/distill_runs that is complete, or a folder with students.json under "
                    "models/diffusion_models. Press R after training a new one.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="All students as one MODEL."),
                io.String.Output(display_name="ranges", tooltip="Which file is in charge of which timesteps and noise levels."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str):
        return (bridge.students_folder(name) / MANIFEST).stat().st_mtime_ns

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        students = Students.read(bridge.students_folder(name))
        model = bridge.load_students(students)
        ranges = students.describe(bridge.schedule_of(model))
        bridge.show_text(ranges, cls.hidden.unique_id)
        return io.NodeOutput(model, ranges)


NODES = [TrainTimestepStudents, LoadTimestepStudents]
