"""Pruning: the teacher's weights, less the blocks a plan removes, under the student's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .architecture import Architecture
from .files import UNetFile, open_unet, save_unet
from .plan import NameMap, PruningPlan, name_map, pruned
from .stock import check_opens, padding_blocks
from .storage import OnBytes, fingerprint, ignore, zeros_like

if TYPE_CHECKING:
    from torch import Tensor

    from .storage import StoredTensor

Weight = TypeVar("Weight", bound="Tensor | StoredTensor")
_OUTPUTS = {"block": ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2"), "attn": ("proj_out",)}
"""What a transformer block, and an attention, add to what comes in: zero there makes them the identity."""
_CARRIED = ("author", "license", "resolution", "tags", "trigger_phrase", "usage_hint")
"""ModelSpec fields of a teacher that hold for its student."""


@dataclass(frozen=True)
class Pruning:
    """A plan applied to a teacher."""

    plan: PruningPlan
    """The plan; where blocks were put back as padding, the one without them."""
    mapping: NameMap
    student: Architecture
    identity: frozenset[str] = frozenset()
    """The student's parameters that are zero, so that a block of padding puts out what comes in."""
    padding: tuple[str, ...] = ()
    """The teacher's blocks that came back as padding."""

    def weights(self, teacher: Mapping[str, Weight]) -> dict[str, Weight | Tensor]:
        """The student's weights from the teacher's, by canonical name: the same tensors, renamed."""
        kept = self.mapping.apply(teacher)
        return {name: zeros_like(weight) if name in self.identity else weight for name, weight in kept.items()}


def prune(teacher: Architecture, plan: PruningPlan, *, pad: bool = False, for_comfyui: bool = True) -> Pruning:
    """Apply a plan; ``ValueError`` if it fits the teacher badly, or if stock ComfyUI could not open what comes out.

    pad: put removed blocks back as identities, where that is what ComfyUI needs; the output stays the same to the bit.
    for_comfyui: False allows students that only diffusers, and this library, open.
    """
    mapping = name_map(teacher, plan)
    padding = padding_blocks(teacher, mapping) if pad else frozenset()
    if not padding:
        student = pruned(teacher, mapping)
        if for_comfyui:
            check_opens(teacher, plan, student)
        return Pruning(plan, mapping, student)
    if padding == mapping.removed:
        raise ValueError(f"{plan.name}: padding would put back all that it removes; change the plan")
    padded = PruningPlan.removing(mapping.removed - padding, teacher, f"{plan.name}, padded", plan.teacher)
    mapping = name_map(teacher, padded)
    zero = {mapping.rename(name) for block in padding for name in teacher.shapes if _is_output(name, block)}
    return Pruning(padded, mapping, pruned(teacher, mapping), frozenset(zero), tuple(sorted(padding)))


def _is_output(name: str, block: str) -> bool:
    """Whether a parameter belongs to what a block adds to its input."""
    outputs = _OUTPUTS["block" if ".block." in block else "attn"]
    return any(name.startswith(f"{block}.{output}.") for output in outputs)


def prune_file(
    teacher: UNetFile,
    out: Path | str,
    plan: PruningPlan,
    *,
    form: str = "ldm",
    dtype: str | None = None,
    pad: bool = False,
    overwrite: bool = False,
    on_bytes: OnBytes = ignore,
) -> Pruning:
    """Prune a checkpoint into another, one weight in memory at a time.

    Kept weights are bit-equal unless ``dtype`` asks for another precision. form: a key of `files.FORMS`. pad: see `prune`.
    Raises ``ValueError`` if the plan does not fit the teacher, if ComfyUI could not open the file, or if ``out`` exists.
    """
    pruning = prune(teacher.architecture, plan, pad=pad, for_comfyui=form != "diffusers")
    if form == "checkpoint" and not teacher.is_whole_checkpoint:
        raise ValueError(f"{teacher.path} holds no VAE and text encoder to carry over; write the ldm layout")
    carried = {key: text for name in _CARRIED if (text := teacher.metadata.get(key := f"modelspec.{name}"))}
    save_unet(
        out,
        pruning.weights(teacher.tensors),
        pruning.student,
        form=form,
        dtype=dtype,
        sampling=teacher.sampling,
        title=f"{teacher.path.stem} pruned by {plan.name}",
        plan=pruning.plan,
        others=teacher.others,
        overwrite=overwrite,
        on_bytes=on_bytes,
        metadata={**carried, **pruning_metadata(pruning, teacher.tensors, teacher.architecture)},
    )
    return pruning


def pruned_file(teacher: UNetFile, path: Path, plan: PruningPlan) -> UNetFile:
    """The file of a student as it begins: that which is there, or where it is of another plan or teacher, one made now."""
    try:
        file = open_unet(path)
        same = file.origin.get("distill.teacher") == fingerprint(teacher.tensors) and file.sampling == teacher.sampling
        if same and file.metadata.get("distill.plan") == plan.to_json():
            return file
    except (ValueError, OSError):  # it is not there, or damaged
        pass
    prune_file(teacher, path, plan, overwrite=True)
    return open_unet(path)


def pruning_metadata(pruning: Pruning, teacher: Mapping[str, Weight], architecture: Architecture) -> dict[str, str]:
    """What a student's file tells of where it comes from."""
    return {
        "distill.teacher": fingerprint(teacher),
        "distill.skips": pruning.mapping.skips(architecture).to_text(),
        **({"distill.padding": " ".join(pruning.padding)} if pruning.padding else {}),
    }
