"""Short runs, and the weights that come out of them."""

from __future__ import annotations

from distill_core.networks.files import open_unet
from distill_core.pruning.plan import preset
from distill_core.training.loop import distill
from distill_core.training.run import Run
from distill_core.training.settings import TrainingSettings

from ...students import student_of

PLAN = preset("bk-sdm-base")
RECIPE = TrainingSettings(total_steps=3, batch_size=4, learning_rate=1e-3, save_every_steps=2, seed=3)


def train(folder, teacher, data, recipe=RECIPE, student=None, teachers=None, **options):
    run = Run(folder, recipe)
    student = student or student_of(teacher, PLAN)
    distill(run, student=student, teacher=teachers or teacher, plan=PLAN, dataset=data, **options)
    return run, student


def weights(run):
    return open_unet(run.result_file).state_dict
