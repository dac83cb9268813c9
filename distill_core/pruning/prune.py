"""Pruning: the teacher's weights without the blocks that a plan removes, under the student's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..base.storage import OnBytes, fingerprint, ignore, zeros_like
from ..networks.architecture import Architecture
from ..networks.files import UNetFile, open_unet
from ..networks.layouts import ADDED_BY, kind
from ..networks.name_map import NameMap
from ..networks.network import Network, NetworkFile, Same
from ..networks.residuals import KEY as KEPT
from ..networks.residuals import KeptResiduals, after, kept_in
from ..networks.stock import SDXL_DEPTHS, encoder_depths, opens_in_comfyui
from ..networks.transformers.precision import allows_fp16, note_on_fp16
from .plan import PruningPlan, name_map, plan_between, plan_in, pruned

if TYPE_CHECKING:
    from torch import Tensor

    from ..base.storage import StoredTensor

PADDING = "distill.padding"
"""Key of a file's metadata on the blocks that were put back as identity blocks."""
Weight = TypeVar("Weight", bound="Tensor | StoredTensor")
Weights = Mapping[str, "Tensor | StoredTensor"]


@dataclass(frozen=True)
class Pruning(Generic[Same]):
    """A plan applied to a teacher."""

    plan: PruningPlan
    """The plan; with identity blocks, the plan that does not remove these."""
    mapping: NameMap
    student: Same
    identity: frozenset[str] = frozenset()
    """The student's parameters that are zero, so that an identity block outputs its input."""
    padding: tuple[str, ...] = ()
    """The teacher's blocks that were put back as identity blocks."""

    def weights(self, teacher: Mapping[str, Weight]) -> dict[str, Weight | Tensor]:
        """The student's weights from the teacher's, by canonical name: the same tensors, renamed."""
        kept = self.mapping.apply(teacher)
        return {name: zeros_like(weight) if name in self.identity else weight for name, weight in kept.items()}


def prune(teacher: Same, plan: PruningPlan, *, pad: bool = False, for_comfyui: bool = True) -> Pruning[Same]:
    """Pruning by a plan; ``ValueError`` if it does not fit the teacher, or if stock ComfyUI could not open the result.

    pad: put removed blocks of a UNet back as identity blocks where ComfyUI needs them; the output stays bit-equal.
    for_comfyui: False allows students that only diffusers, and this library, open.
    """
    mapping = name_map(teacher, plan)
    if not isinstance(teacher, Architecture):
        if pad:
            raise ValueError("identity blocks (pad) are for UNets; a transformer opens in ComfyUI without them")
        return Pruning(plan, mapping, pruned(teacher, mapping))
    padding = padding_blocks(teacher, mapping) if pad else frozenset()
    if not padding:
        student = pruned(teacher, mapping)
        if for_comfyui:
            check_opens(teacher, plan, student)
        return Pruning(plan, mapping, student)
    if padding == mapping.removed:
        raise ValueError(f"{plan.name}: identity blocks would put back all that it removes; change the plan")
    padded = PruningPlan.removing(mapping.removed - padding, teacher, f"{plan.name}, padded", plan.teacher)
    mapping = replace(name_map(teacher, padded), padded=padding)
    zero = mapping.apply({name: block for block in padding for name in teacher.shapes if _is_output(name, block)})
    return Pruning(padded, mapping, pruned(teacher, mapping), frozenset(zero), tuple(sorted(padding)))


def mapping_between(teacher: Network, student: Network, metadata: Mapping[str, str]) -> NameMap:
    """The map from a teacher to a student, by what the student's file says of its plan and its identity blocks.

    The one that changes nothing if both have one shape; ``ValueError`` if they do not belong together.
    """
    plan = plan_between(teacher, student, plan_in(metadata))
    mapping = NameMap.identity(teacher) if plan is None else name_map(teacher, plan)
    return replace(mapping, padded=frozenset(metadata.get(PADDING, "").split()))


def _is_output(name: str, block: str) -> bool:
    """Whether a parameter belongs to what a block adds to its input."""
    return any(name.startswith(f"{block}.{layer}.") for layer in ADDED_BY[kind(block)])


def prune_file(
    teacher: NetworkFile,
    out: Path | str,
    plan: PruningPlan,
    *,
    layout: str = "ldm",
    dtype: str | None = None,
    pad: bool = False,
    change: Callable[[Weights, Pruning], Weights] = lambda weights, pruning: weights,
    overwrite: bool = False,
    on_bytes: OnBytes = ignore,
) -> Pruning:
    """Prune a checkpoint into another, one weight in memory at a time.

    Kept weights are bit-equal unless ``dtype`` asks for another precision; scales of quantised weights stay with their block.
    layout: a key of `files.FILE_LAYOUTS`. pad: see `prune`. change: makes of the student's weights what is written, such as
    `lora.merge.merged`. Raises ``ValueError`` if the plan does not fit the teacher, if ComfyUI could not open the file, or if ``out``
    exists.
    """
    architecture: Network = teacher.architecture
    pruning: Pruning[Any] = prune(architecture, plan, pad=pad, for_comfyui=layout != "diffusers")
    title = {"modelspec.title": f"{teacher.path.stem} pruned by {plan.name}"}
    teacher.save_student(
        out,
        change(pruning.weights(teacher.tensors), pruning),
        pruning.student,
        layout=layout,
        rename=pruning.mapping.rename,
        metadata={**title, **pruning_metadata(pruning, teacher.tensors, architecture, kept_in(teacher.metadata))},
        dtype=dtype,
        overwrite=overwrite,
        on_bytes=on_bytes,
    )
    return pruning


def precision_note(teacher: NetworkFile, pruning: Pruning) -> str:
    """What a person must know of the precision that ComfyUI computes a student in; empty if it is the teacher's."""
    if isinstance(teacher.architecture, Architecture):
        return ""
    before, after = (
        allows_fp16(network, weights)
        for network, weights in (
            (teacher.architecture, teacher.tensors),
            (pruning.student, pruning.weights(teacher.tensors)),
        )
    )
    return note_on_fp16(before, after)


def pruned_file(teacher: UNetFile, path: Path, plan: PruningPlan) -> UNetFile:
    """File of a student before training: the existing one, or a new one if that has another plan or teacher."""
    if is_pruned_from(teacher, path) and plan.metadata.items() <= (file := open_unet(path)).metadata.items():
        return file
    prune_file(teacher, path, plan, overwrite=True)
    return open_unet(path)


def is_pruned_from(teacher: UNetFile, path: Path) -> bool:
    """Whether a file is a whole student that this library pruned from a teacher."""
    try:
        file = open_unet(path)
    except (ValueError, OSError):  # it does not exist, or is damaged
        return False
    return file.origin.get("distill.teacher") == fingerprint(teacher.tensors) and file.sampling == teacher.sampling


def describe(file: NetworkFile) -> dict[str, Any]:
    """What ``distill inspect`` shows of a file."""
    plan = plan_in(file.metadata)
    return {**file.describe(), "pruned_by": plan.name if plan else None}


def pruning_metadata(
    pruning: Pruning, teacher: Mapping[str, Weight], architecture: Network, before: KeptResiduals | None = None
) -> dict[str, str]:
    """Metadata of a student's file that says where it comes from. before: the teacher's own kept residuals, if it was pruned."""
    kept = architecture.kept_residuals(pruning.mapping.rename)
    return {
        **pruning.plan.metadata,
        "distill.teacher": fingerprint(teacher),
        KEPT: after(before, kept).to_text(),
        **({PADDING: " ".join(pruning.padding)} if pruning.padding else {}),
    }


def check_opens(teacher: Architecture, plan: PruningPlan, student: Architecture) -> None:
    """``ValueError`` with what to do if ComfyUI opens the teacher but would refuse the student."""
    if not opens_in_comfyui(teacher) or opens_in_comfyui(student):
        return
    depths = list(encoder_depths(student).values())
    if student.family == "sdxl":
        reason = (
            f"leaves transformer depths {depths} in the down stages, which ComfyUI's loaders do not know; they know "
            + ", ".join(f"{list(known)} ({model})" for model, known in SDXL_DEPTHS.items())
        )
    else:
        reason = "leaves no attention in the down stages, by which ComfyUI's loaders recognise the model; keep one there"
    padding = padding_blocks(teacher, name_map(teacher, plan))
    way_out = "change the plan, or add identity blocks (--pad)" if padding else "change the plan"
    raise ValueError(f"{plan.name} {reason}; {way_out}")


def padding_blocks(teacher: Architecture, mapping: NameMap) -> frozenset[str]:
    """Removed blocks of the teacher that must return as identity blocks so that ComfyUI opens the student.

    As few as possible; none if the student opens as it is, or if identity blocks do not help.
    """
    kept = {
        attention: [n for n in teacher.numbers(f"{attention}.block") if f"{attention}.block.{n}" not in mapping.removed]
        for attention in encoder_depths(teacher)
        if attention.replace("attn", "resnet") not in mapping.removed
    }
    depths = [len(blocks) for blocks in kept.values()]
    most = [teacher.depth(attention) for attention in kept]
    if teacher.family == "sdxl":
        targets = [list(known) for known in SDXL_DEPTHS.values()]
    elif any(depths) or not any(most):
        targets = [depths]
    else:
        first = next(i for i, depth in enumerate(most) if depth)
        targets = [[1 if i == first else 0 for i in range(len(most))]]
    fitting = [
        target
        for target in targets
        if len(target) == len(depths) and all(have <= want <= top for have, want, top in zip(depths, target, most, strict=True))
    ]
    if not fitting:
        return frozenset()
    blocks: set[str] = set()
    for (attention, there), want in zip(kept.items(), min(fitting, key=sum), strict=True):
        gone = [n for n in teacher.numbers(f"{attention}.block") if n not in there]
        blocks |= {f"{attention}.block.{n}" for n in gone[: want - len(there)]}
        if want and attention in mapping.removed:
            blocks.add(attention)
    return frozenset(blocks)
