"""Which UNets stock ComfyUI opens, and what to add to a student so that it does.

ComfyUI recognises a UNet by its shapes (comfy/model_detection.py, comfy/supported_models.py of 0.33): the decoder, the mid
block and the number of layers are free, but it reads the kind of model off the attentions of the encoder, and for SDXL it
knows five lists of their transformer depths.
"""

from __future__ import annotations

from .architecture import Architecture
from .plan import NameMap, PruningPlan, name_map

_CONTEXT_WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
_HEAD_CHANNELS = {"sd1": None, "sd2": 64, "sdxl": 64}
SDXL_DEPTHS = {
    "SDXL": (0, 0, 2, 2, 10, 10),
    "SSD-1B": (0, 0, 2, 2, 4, 4),
    "Segmind Vega": (0, 0, 1, 1, 2, 2),
    "KOALA-700M": (0, 2, 5),
    "KOALA-1B": (0, 2, 6),
}
"""Model -> transformer depth behind each resnet of the down stages, the only ones an SDXL may have."""


def encoder_depths(architecture: Architecture) -> dict[str, int]:
    """Attention behind each resnet of the down stages -> its transformer depth, 0 where there is none."""
    layers = (f"{s}.attn.{j}" for s in architecture.stages("down") for j in architecture.numbers(f"{s}.resnet"))
    return {attention: architecture.depth(attention) for attention in layers}


def opens_in_comfyui(architecture: Architecture) -> bool:
    """Whether ComfyUI's own loaders open the network, from a file in the LDM layout."""
    family = architecture.family
    if architecture.channels("conv_in")[1] != 320 or architecture.head_channels != _HEAD_CHANNELS.get(family, -1):
        return False
    depths = tuple(encoder_depths(architecture).values())
    if architecture.context_width != _CONTEXT_WIDTHS[family] or not any(depths):
        return False
    return depths in SDXL_DEPTHS.values() if family == "sdxl" else True


def check_opens(teacher: Architecture, plan: PruningPlan, student: Architecture) -> None:
    """``ValueError`` with the ways out if ComfyUI opens the teacher but would refuse the student."""
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
    way_out = "change the plan, or pad it with identity blocks (--pad)" if padding else "change the plan"
    raise ValueError(f"{plan.name} {reason}; {way_out}")


def padding_blocks(teacher: Architecture, mapping: NameMap) -> frozenset[str]:
    """Removed blocks of the teacher that, put back without effect, make the student one that ComfyUI opens.

    As few as possible; none if the student opens as it is, or if no padding helps.
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
