"""Whether ComfyUI lets a transformer compute in float16, where it tells that by a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .architecture import Transformer

if TYPE_CHECKING:
    from torch import Tensor

    from ...base.storage import StoredTensor


def allows_fp16(network: Transformer, weights: Mapping[str, Tensor | StoredTensor]) -> bool | None:
    """Whether it may; None for families of which ComfyUI tells it otherwise. weights: by the network's names."""
    if network.of.spread is None:
        return None
    inner, most = network.of.spread
    (path,) = network.lists
    weight = weights.get(f"{path}.{len(network.numbers(path)) - 2}.{inner}")
    if weight is None:
        return None
    tensor: Tensor = weight.read() if hasattr(weight, "read") else weight
    return tensor.float().std(unbiased=False).item() < most


def note_on_fp16(teacher: bool | None, student: bool | None) -> str:
    """What a person must know if a student's answer is not its teacher's; empty if it is."""
    if teacher is student or teacher is None or student is None:
        return ""
    told = "ComfyUI decides by the second-to-last block whether a model of this family may compute in float16, and pruning changed that block. "
    if student:
        return told + (
            "The student may, its teacher may not: on cards without bfloat16 images may turn black. Keep the teacher's second-to-last block."
        )
    return told + (
        "The student may not, its teacher may: cards without bfloat16 will compute in float32, which takes longer. Keep the teacher's "
        "second-to-last block to avoid that."
    )
