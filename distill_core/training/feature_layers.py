"""Pairs of teacher and student layers that a feature loss compares."""

from __future__ import annotations

from ..networks.architecture import Architecture
from ..networks.layouts import kind
from ..networks.name_map import NameMap


def of_stages(teacher: Architecture, student: Architecture, mapping: NameMap) -> dict[str, str]:
    """BK-SDM's pairs: the output of every down and up stage of the student, without the mid block.

    A stage that lost its downsampling outputs features of another size, so the last attention's ``proj_out`` replaces it
    (BK-SDM-Tiny).
    """
    pairs = {}
    for teacher_stage, student_stage in mapping.stages.items():
        theirs, ours = _last_module(teacher, teacher_stage), _last_module(student, student_stage)
        if theirs.endswith("sample") != ours.endswith("sample"):
            theirs = _last_module(teacher, teacher_stage, resampling=False)
            ours = _last_module(student, student_stage, resampling=False)
            suffix = ".proj_out" if ".attn." in theirs and ".attn." in ours else ""
            theirs, ours = theirs + suffix, ours + suffix
        pairs[theirs] = ours
    return pairs


def of_stages_and_mid(teacher: Architecture, student: Architecture, mapping: NameMap) -> dict[str, str]:
    """Segmind's pairs: the output of every stage, including the mid block.

    If the innermost stages were removed, the student's new innermost stage learns their output: that of the last removed up
    stage (SD-Tiny: the student's ``down.2`` learns the teacher's ``up.0``).
    """
    pairs = {}
    for theirs, ours in of_stages(teacher, student, mapping).items():
        if theirs.startswith("down.") and theirs.endswith(".proj_out"):
            first_kept = next(stage for stage in mapping.stages if stage.startswith("up."))
            removed = teacher.stages("up")[teacher.stages("up").index(first_kept) - 1]
            theirs, ours = _last_module(teacher, removed), ours.removesuffix(".proj_out")
        pairs[theirs] = ours
    return pairs | _mid_point(teacher, student)


def of_layers(teacher: Architecture, student: Architecture, mapping: NameMap) -> dict[str, str]:
    """SSD-1B's pairs: every resnet and attention of the down and up stages, and the output of the mid block."""
    layers = sorted(m for m in teacher.modules if m.split(".")[0] in ("down", "up") and kind(m) in ("resnet", "attn"))
    pairs = {theirs: mapping.rename(theirs) for theirs in layers}
    return {theirs: ours for theirs, ours in pairs.items() if ours is not None} | _mid_point(teacher, student)


def of_self_attention(teacher: Architecture, student: Architecture, mapping: NameMap) -> dict[str, str]:
    """KOALA's pairs: the output of the self-attention of every transformer block."""
    pairs = {block: mapping.rename(block) for block in sorted(teacher.blocks) if ".block." in block}
    return {f"{theirs}.attn1": f"{ours}.attn1" for theirs, ours in pairs.items() if ours is not None}


def _mid_point(teacher: Architecture, student: Architecture) -> dict[str, str]:
    """The pair of mid block outputs, if both networks have one."""
    last = [[m for m in ("mid.resnet.1", "mid.resnet.0") if m in architecture.modules][:1] for architecture in (teacher, student)]
    return dict(zip(*last, strict=False))


def _last_module(architecture: Architecture, stage: str, resampling: bool = True) -> str:
    """The last module of a stage, whose output is the stage's output."""
    resample = f"{stage}.{stage.split('.')[0]}sample"
    last = architecture.numbers(f"{stage}.resnet")[-1]
    candidates = [resample] * resampling + [f"{stage}.attn.{last}", f"{stage}.resnet.{last}"]
    return next(module for module in candidates if module in architecture.modules)


FEATURE_LAYERS = {
    "stages": of_stages,
    "stages and mid": of_stages_and_mid,
    "layers": of_layers,
    "self-attention": of_self_attention,
}
"""Functions that pair a teacher's and a student's modules, by canonical names, for a feature loss."""
