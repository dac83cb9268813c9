"""Nodes that train and load experts: one student for each range of timesteps."""

import contextlib
import logging
from dataclasses import replace
from functools import partial

import torch
from comfy_api.latest import io, ui

from ..distill_core.base.settings import limits_of
from ..distill_core.diffusion.ranges import read_boundaries
from ..distill_core.evaluation import plots
from ..distill_core.networks.files import open_unet
from ..distill_core.routing.experts import Experts
from ..distill_core.routing.one_to_many import ExpertsSettings, OneToMany, Start
from ..distill_core.training.lesson import check_lesson
from ..distill_core.training.live import metrics_of
from ..distill_core.training.preflight import check_experts_run, disk_bytes
from ..distill_core.training.run import Inputs
from ..distill_core.training.settings import REFIT_EXAMPLES, TrainingSettings
from . import bridge
from .inputs import data_inputs, learning_inputs, refit_input, setting_input

log = logging.getLogger("distill")
_default = ExpertsSettings()


class TrainTimestepExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillTrainExperts",
            display_name="Train Timestep Experts",
            category="distill",
            description="Trains several experts from one teacher, each for its own range of timesteps, and outputs them as one "
            "MODEL that uses the right expert at every sampling step. A step costs as much as one student; together the experts "
            "match the teacher more closely. Each execution trains some steps and saves them under output/distill_runs; queue "
            "again to continue. Cancel at any time: every finished step is kept.",
            search_aliases=["o2mkd", "one to many", "timestep experts", "distill", "train experts", "knowledge distillation"],
            is_input_list=True,
            inputs=[
                *data_inputs(),
                io.String.Input(
                    "run_name",
                    default="experts",
                    tooltip="Folder of the training under output/distill_runs. The same name continues it; a new name starts a "
                    "new one.",
                ),
                setting_input("count", ExpertsSettings, display_name="experts"),
                setting_input("split", ExpertsSettings),
                io.Int.Input(
                    "lora_rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="0: each expert is a network of its own. Above 0: all experts share one network, and each is a LoRA "
                    "of this rank on it, so disk and memory hold about one model; 16 to 64 is usual.",
                ),
                setting_input("joint_steps", ExpertsSettings, default=_default.count * 1000),
                setting_input("total_steps", default=1000, tooltip="Training steps of each expert in its range."),
                *learning_inputs(),
                io.String.Input(
                    "boundaries",
                    default=_default.boundaries,
                    advanced=True,
                    tooltip=limits_of(ExpertsSettings)["boundaries"].words,
                ),
                setting_input("overlap", ExpertsSettings, advanced=True),
                refit_input(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The experts as trained so far, as one MODEL for any stock sampler."
                ),
                io.String.Output(display_name="folder", tooltip="Folder of the finished experts; empty until all are complete."),
                io.String.Output(
                    display_name="ranges", tooltip="The range of each expert: timesteps, share of the sampling, sigma."
                ),
                io.Image.Output(display_name="loss_curve", tooltip="The loss of all experts, one after another."),
                io.Int.Output(display_name="step", tooltip="Steps done so far, by all experts together."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name, count, boundaries, joint_steps, total_steps, steps_per_queue, **_):
        """The fingerprint of a run with the steps of all stages."""
        total = None
        if None not in (count[0], boundaries[0], joint_steps[0], total_steps[0]):
            try:
                num_experts = len(read_boundaries(boundaries[0])) + 1 if boundaries[0] else count[0]
            except ValueError as error:  # execute raises it again
                return str(error)
            total = joint_steps[0] + num_experts * total_steps[0]
        return bridge.SEEN_RUNS.fingerprint(run_name[0], total, steps_per_queue[0])

    @classmethod
    def execute(
        cls, teacher, student, latents, captions, run_name, steps_per_queue, null_caption=None, recipe=({},), **settings
    ) -> io.NodeOutput:
        teacher, student, node_id = bridge.Model(teacher[0]), bridge.Model(student[0]), cls.hidden.unique_id
        settings = {"refit_examples": REFIT_EXAMPLES} | {name: values[0] for name, values in settings.items()}
        of_experts = {name: settings.pop(name) for name in ("count", "split", "boundaries", "overlap", "joint_steps")}
        recipe = TrainingSettings(**settings, **recipe[0])
        if recipe.sample_every_steps:
            log.warning("sample_every_steps has no effect here: only Distill Train Step and Shared-Base LoRA make sample images")
            recipe = replace(recipe, sample_every_steps=0)
        folder, experts = bridge.run_folder(run_name[0]), ExpertsSettings(**of_experts)
        stages, shapes = experts.stages(recipe, teacher.schedule), student.architecture.shapes
        check_experts_run(folder, recipe, shapes, stages)
        check_lesson(recipe, teacher.architecture, student.architecture, same=False)
        plan = student.plan_from(teacher)
        bridge.check_trainable(student, teacher)
        shares_base = student.patcher is teacher.patcher and recipe.lora_rank > 0 and of_experts["joint_steps"] == 0
        with torch.inference_mode(False), torch.enable_grad():
            data = bridge.dataset(latents, captions, null_caption, teacher)
            training = OneToMany(
                folder,
                experts,
                recipe,
                starts=[Start(plan, partial(bridge.shared_base if shares_base else bridge.trainable, student))],
                teachers=None if shares_base else [partial(bridge.denoiser, teacher, student.architecture)],
                schedule=teacher.schedule,
                dataset=data,
                inputs=Inputs(
                    teachers=(teacher.fingerprint,),
                    student=student.fingerprint,
                    data=data.fingerprint,
                ),
            )
            if not training.complete:
                whole = replace(recipe, lora_rank=0) if training.step < of_experts["joint_steps"] else recipe
                forecast = bridge.forecast_memory([teacher], student, plan, data, whole, shares_base=shares_base)
                needs = bridge.tell_needs(forecast, bridge.free_bytes(student), node_id, disk_bytes(shapes, stages))
                with bridge.opened_base(student) if shares_base else contextlib.nullcontext():  # handed back after all stages
                    _train(training, run_name[0], steps_per_queue[0], node_id, needs)
        ranges = training.ranges.describe(training.schedule) if training.ranges else "measured after joint_steps"
        curve = bridge.to_image(plots.loss_curve(metrics_of(training.folder), run_name[0]))
        bridge.SEEN_RUNS.look(run_name[0])
        written = str(training.folder / "experts") if training.complete else ""
        state = "complete" if training.complete else "queue again to go on"
        bridge.show_text(f"step {training.step} of {training.total_steps}: {state}\n{_begins(training)}", node_id)
        return io.NodeOutput(
            _routed(training, student), written, ranges, curve, training.step, ui=ui.PreviewImage(curve, cls=cls)
        )


def _train(training: OneToMany, run_name: str, num_steps: int, node_id: str, needs: str) -> None:
    last = min(training.total_steps, training.step + num_steps)
    watch = bridge.Watch(run_name, training.step, last, node_id)

    def on_stage(stage: str) -> None:
        bridge.release_memory()  # of the previous stage
        watch.stage = _words(training, stage)

    try:
        training.train(num_steps=num_steps, on_step=watch, on_stage=on_stage, on_refit=bridge.refit_progress(node_id, needs))
    finally:
        watch.end()
        bridge.release_memory()


def _begins(training: OneToMany) -> str:
    """Where the ranges begin, short enough for a node: ``experts begin at timesteps 999, 665, 332``."""
    if training.ranges is None:
        return "boundaries are measured after joint_steps"
    begins = (str(training.ranges.timesteps(number)[-1]) for number in range(len(training)))
    return f"experts begin at timesteps {', '.join(begins)}"


def _words(training: OneToMany, stage: str) -> str:
    """What is being trained, for display: ``range 0, timesteps 999 to 667``."""
    if not stage.startswith("range_"):
        return "all timesteps"
    number = int(stage.removeprefix("range_"))
    assert training.ranges is not None  # measured by now
    held = training.ranges.timesteps(number)
    return f"range {number}, timesteps {held[-1]} to {held[0]}"


def _routed(training: OneToMany, student: bridge.Model):
    """The experts as trained so far as one MODEL; a range that has not started uses the model it will start from."""

    def trained(stage: str):
        state_dict = open_unet(training.result_of(stage)).state_dict
        return bridge.make_student(state_dict, student.architecture, student, student.origin)

    start = trained("joint") if "joint" in training.stages and training.steps_of("joint") else student.patcher
    if training.ranges is None:
        return start
    experts = []
    for number in range(len(training)):
        stage = f"range_{number}"
        if not training.steps_of(stage):
            experts.append(start)
        elif training.training.lora_rank:
            experts.append(bridge.with_lora_file(start, training.result_of(stage)))
        else:
            experts.append(trained(stage))
    return bridge.route_experts(experts, training.ranges)


class LoadTimestepExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillLoadExperts",
            display_name="Load Timestep Experts",
            category="distill",
            description="Loads a folder of experts, each trained for a range of timesteps, as one MODEL for any stock sampler. "
            "The expert in charge of the noise level predicts. Loads what Train Timestep Experts and distill train write.",
            search_aliases=["o2mkd", "one to many", "load experts", "timestep experts", "load distilled", "distill"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(bridge.experts_folders()),
                    tooltip="A complete run under output/distill_runs, or a folder with experts.json under "
                    "models/diffusion_models. Press R after training a new one.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="All experts as one MODEL."),
                io.String.Output(display_name="ranges", tooltip="Which file is in charge of which timesteps and noise levels."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str):
        return bridge.fingerprint_of(bridge.experts_written, name)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        experts = Experts.read(bridge.experts_folder(name))
        model = bridge.load_experts(experts)
        ranges = experts.describe(bridge.Model(model).schedule)
        bridge.show_text(ranges, cls.hidden.unique_id)
        return io.NodeOutput(model, ranges)


NODES = [TrainTimestepExperts, LoadTimestepExperts]
