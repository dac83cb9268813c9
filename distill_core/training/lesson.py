"""What a student can learn from which teachers and data."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from torch import Tensor

from ..base.storage import fingerprint
from ..diffusion.denoiser import Denoiser
from ..diffusion.sampling import timesteps
from ..diffusion.schedule import NoiseSchedule
from ..networks.architecture import Architecture
from ..networks.name_map import NameMap
from .settings import TrainingSettings

NOTHING_FOLDED = (
    "the student's plan folds no run of blocks, so none can learn by itself; fold some, as in the plan 'fold single 5-7', or set "
    "local_steps to 0 and choose the objective output"
)
FEATURES_OF_UNETS = "objective {} compares layers of UNets; for a transformer choose blocks, output or local"


def check_lesson(settings: TrainingSettings, teacher: Architecture | None, student: Architecture | None, same: bool) -> None:
    """Raise ``ValueError`` if a student has nothing to learn: it is larger than its teacher, or the same model.

    same: whether all teachers predict exactly what the student predicts before training. Such a student can still learn
    guidance, or to sample in fewer steps; a LoRA or an expert for a range of timesteps can also learn the data, if the task loss counts.
    """
    if not settings.uses_teacher:
        return
    if teacher and settings.of_blocks:
        raise ValueError(
            "the objectives blocks and local, and local_steps, are for transformers; for UNets choose another objective, and local_steps 0"
        )
    if teacher and student and student.num_parameters > teacher.num_parameters:
        raise ValueError(
            f"student and teacher do not match: they are swapped, as the student has {student.num_parameters:,} parameters and "
            f"the teacher {teacher.num_parameters:,}; give the full model as teacher and the pruned one as student"
        )
    specialises = settings.weighted_objective.task and (settings.lora_rank or settings.timestep_range)
    if same and settings.guidance == 1 and not (specialises or settings.weighted_objective.few_steps):
        raise ValueError(
            "student and teacher are the same model, so there is nothing to learn; prune the student, give another teacher, set "
            'guidance above 1 with objective "guidance", or fine-tune with objective "task"'
        )


def on_own_weights(settings: TrainingSettings, mapping: NameMap | None) -> TrainingSettings:
    """Settings for a student of a transformer that learns by a LoRA on the weights it shares with its teacher.

    mapping: to the student; None for a LoRA on the whole network. If blocks that stand for runs learn alone, no other has a LoRA.
    ``ValueError`` for settings that such a student does not have.
    """
    check_own_weights(settings)
    objective = settings.weighted_objective
    if objective.feature and (objective.layers != "blocks" or mapping is None):
        raise ValueError(FEATURES_OF_UNETS.format(settings.objective))
    runs = {} if mapping is None else mapping.folded
    if settings.learns_locally and not runs:
        raise ValueError(NOTHING_FOLDED)
    return replace(settings, lora_targets=tuple(f"{block}.*" for block in runs)) if objective.only_local else settings


def check_own_weights(settings: TrainingSettings) -> None:
    """``ValueError`` for settings that a LoRA on a model's own weights does not have."""
    if settings.weight_dtype != "fp32":
        raise ValueError(
            "the LoRA trains in float32 and the model's weights do not change: set weight_dtype to fp32 in the recipe"
        )
    if settings.compile:
        raise ValueError("compile works only for students of UNets that are trained as a whole; set it to false in the recipe")


def predict_the_same(teacher: Denoiser, student: Denoiser) -> bool:
    """Whether two models predict the same: equal weights, or one network with the LoRA off in the teacher."""
    if teacher.sampling != student.sampling or teacher.skipped != student.skipped:
        return False
    theirs, ours = (dict(denoiser.network.named_parameters()) for denoiser in (teacher, student))
    return teacher.network is student.network or (theirs.keys() == ours.keys() and fingerprint(theirs) == fingerprint(ours))


def check_trajectories(
    settings: TrainingSettings, schedule: NoiseSchedule, stored: Tensor | None, drawn: tuple[float, float] | None
) -> None:
    """Raise ``ValueError`` if a run cannot learn from trajectories, stored ones or those yet to be sampled.

    They may have been sampled with another guidance, or lack the noise levels at which a student of few steps is sampled.
    stored: timesteps of their states, (K,); None without trajectories. drawn: lowest and highest guidance scale, if known.
    """
    if stored is None or not settings.uses_images:
        return
    if settings.few_steps and any(objective.consistency for objective in settings.objectives):
        _check_starts(settings.few_steps, {*stored.tolist()}, schedule)
    if settings.guidance == 1:
        return
    wanted = settings.scales
    if settings.guidance_min is None and drawn is None:  # older data do not store it
        return
    if drawn is None or (drawn[0] < drawn[1]) != (wanted[0] < wanted[1]) or drawn[0] < wanted[0] or drawn[1] > wanted[1]:
        theirs = "one unknown guidance" if drawn is None else f"guidance {_scales(drawn)}"
        raise ValueError(
            f"the stored trajectories were sampled with {theirs}, but this run learns guidance {_scales(wanted)}; create them "
            "again, or set trajectory_states to 0"
        )


def _check_starts(num_steps: int, stored: Set[int], schedule: NoiseSchedule) -> None:
    """``ValueError`` unless there are states wherever a sampler of so many steps asks the student."""
    missing = sorted({*timesteps(schedule, num_steps).tolist()} - stored, reverse=True)
    if missing:
        fitting = [n for n in range(2, len(stored) + 1) if {*timesteps(schedule, n).tolist()} <= stored]
        ways = [f"set phases to {', '.join(map(str, fitting))}"] * bool(fitting)
        ways += [
            f"store all states of a number of sampling steps that {num_steps} divides, such as {24 // num_steps * num_steps or num_steps}"
        ]
        raise ValueError(
            f"the stored trajectories have no states at timesteps {', '.join(map(str, missing[:8]))}, where a student of {num_steps} steps "
            f"is sampled; {', or '.join(ways)}"
        )


def _scales(scales: tuple[float, float]) -> str:
    least, largest = scales
    return f"{largest:g}" if least == largest else f"{least:g} to {largest:g}"


def check_belong_together(student: Denoiser, teacher: Denoiser) -> None:
    """Raise ``ValueError`` if student and teacher cannot take the same inputs."""
    theirs, ours = (
        (denoiser.latent_channels, denoiser.architecture and denoiser.architecture.context_width)
        for denoiser in (teacher, student)
    )
    if theirs != ours:
        raise ValueError(
            f"teacher and student must take the same latents and captions, got {theirs[0]} and {ours[0]} latent channels, "
            f"caption widths {theirs[1]} and {ours[1]}; use models of one family"
        )
