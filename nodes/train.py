"""The node that distils a student."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..distill_core.training.lesson import check_trajectories
from ..distill_core.training.run import Run
from ..distill_core.training.settings import REFIT_EXAMPLES
from . import bridge
from .inputs import data_inputs, learning_inputs, refit_input, run_inputs, run_outputs, setting_input, vae_input

DEFAULT_RANK = 64


class DistillTrainStep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistillTrainStep",
            display_name="Distill Train Step",
            category="distill",
            description="Trains a pruned student to predict what its teacher predicts. Each execution trains some steps of a "
            "named run and saves it under output/distill_runs; queue again to continue. Cancel at any time: every finished step "
            "is kept. A complete run returns its student at once. A transformer shares its weights with its teacher and learns by a "
            "LoRA, in the memory of one model.",
            search_aliases=[
                "distill",
                "train student",
                "knowledge distillation",
                "BK-SDM",
                "finetune",
                "KOALA",
                "heal",
                "flux",
                "z-image",
            ],
            is_input_list=True,
            inputs=[
                *data_inputs("Prune UNet Blocks or Prune Transformer Blocks"),
                io.Model.Input(
                    "teacher_2",
                    optional=True,
                    tooltip="A second teacher of the same architecture, such as a fine-tune; "
                    "Distillation Recipe sets how the teachers take turns.",
                ),
                io.Model.Input("teacher_3", optional=True, tooltip="A third teacher."),
                vae_input(),
                *run_inputs("student"),
                *learning_inputs(),
                io.Int.Input(
                    "lora_rank",
                    default=DEFAULT_RANK,
                    min=1,
                    max=1024,
                    optional=True,
                    advanced=True,
                    tooltip="For transformers only, which learn by a LoRA on the weights they share with their teacher: its rank. Higher "
                    "learns more and needs more memory. The saved student has it merged.",
                ),
                setting_input("local_steps", optional=True, advanced=True),
                refit_input(),
            ],
            outputs=[
                io.Model.Output(display_name="student", tooltip="The student as trained so far: an ordinary MODEL."),
                *run_outputs(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name, total_steps, steps_per_queue, **_):
        return bridge.SEEN_RUNS.fingerprint(run_name[0], total_steps[0], steps_per_queue[0])

    @classmethod
    def execute(
        cls,
        teacher,
        student,
        latents,
        captions,
        run_name,
        steps_per_queue,
        null_caption=None,
        recipe=({},),
        teacher_2=(),
        teacher_3=(),
        vae=(None,),
        **settings,
    ) -> io.NodeOutput:
        student, run_name, steps_per_queue = bridge.Model(student[0]), run_name[0], steps_per_queue[0]
        teachers = [bridge.Model(model) for model in (teacher[0], *teacher_2, *teacher_3)]
        rank = settings.pop("lora_rank", (DEFAULT_RANK,))[0]
        settings.setdefault("refit_examples", (REFIT_EXAMPLES,))
        settings = {name: values[0] for name, values in settings.items()}
        settings |= recipe[0] or bridge.sampled(settings["total_steps"], vae[0], null_caption)
        lesson = bridge.lesson_of(teachers, student, settings, rank)
        folder, node_id = bridge.run_folder(run_name), cls.hidden.unique_id
        lesson.check(folder)
        bridge.check_samples(lesson.settings, vae[0], null_caption)
        with torch.inference_mode(False), torch.enable_grad():
            lesson.check_something_to_learn()
            data = bridge.dataset(latents, captions, null_caption, teachers[0])
            check_trajectories(lesson.settings, teachers[0].schedule, data.timesteps, data.scales)
            run = Run(folder, lesson.settings, lesson.inputs(data))
            if not run.complete:
                lesson.train(run, data, vae[0], steps_per_queue, node_id)
        trained = lesson.result(run)
        shown = bridge.show_run(run, node_id)
        return io.NodeOutput(trained, *shown, run.step, run_name, ui=ui.PreviewImage(shown[1], cls=cls))


NODES = [DistillTrainStep]
