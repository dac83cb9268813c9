"""Pruning: the teacher's weights, less the blocks a plan removes, under the student's names."""

from __future__ import annotations

from pathlib import Path

from .architecture import Architecture
from .dataset import fingerprint
from .files import UNetFile, save_unet
from .plan import PruningPlan, name_map, pruned


def prune_file(
    teacher: UNetFile,
    out: Path | str,
    plan: PruningPlan,
    *,
    spelling: str = "ldm",
    dtype: str | None = None,
    overwrite: bool = False,
) -> Architecture:
    """Prune a checkpoint into another; kept weights are bit-equal unless ``dtype`` asks for another precision.

    Returns the student's architecture. Raises ``ValueError`` if the plan does not fit the teacher or ``out`` exists.
    """
    mapping = name_map(teacher.architecture, plan)
    student = pruned(teacher.architecture, mapping, plan.name)
    save_unet(
        out,
        mapping.apply(teacher.state_dict),
        student,
        spelling=spelling,
        dtype=dtype,
        prediction=teacher.prediction,
        title=f"{teacher.path.stem} pruned by {plan.name}",
        plan=plan,
        overwrite=overwrite,
        metadata={"distill.teacher": fingerprint(teacher.state_dict)},
    )
    return student
