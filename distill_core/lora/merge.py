"""A LoRA merged into the weights of a network on disk, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.documents import expect, parse_json
from ..base.storage import StoredTensor, read_header
from ..networks.architecture import Architecture
from ..networks.lora_names import kohya_names
from ..networks.network import Network
from ..pruning.plan import name_map, plan_in
from ..pruning.prune import Pruning
from .tensors import check_finite, check_fit, check_tensor, column_lengths, parts_of

if TYPE_CHECKING:
    from torch import Tensor

_HEADS = ("transformer.", "diffusion_model.")
"""What layers of transformers begin with in the LoRAs that are trained here."""


@dataclass(frozen=True)
class Merged(StoredTensor):
    """A stored weight with the change that a LoRA makes to it, in float32 until it is written."""

    change: Mapping[str, StoredTensor] = field(default_factory=dict)
    """The LoRA's tensors of its layer, by role."""

    @property
    def as_stored(self) -> bool:
        return False

    def read(self) -> Tensor:
        return self.exact()

    def exact(self) -> Tensor:
        plain = super().exact().float()
        changed = plain + _difference(self.change).reshape(plain.shape)
        if scale := self.change.get("dora_scale"):
            changed = changed * (scale.read().float() / column_lengths(changed))
        return changed

    def values(self, starts: Sequence[int], count: int) -> Tensor:
        import torch

        flat = self.read().reshape(-1)
        return torch.cat([flat[start : start + count] for start in starts])


def _difference(parts: Mapping[str, StoredTensor]) -> Tensor:
    """``alpha / rank * B A``, in float32."""
    down, up = (parts[name].read().float().flatten(1) for name in ("lora_down", "lora_up"))
    alpha = parts["alpha"].read().item() if "alpha" in parts else len(down)
    return alpha / len(down) * (up @ down)


def merged(
    weights: Mapping[str, Tensor | StoredTensor], pruning: Pruning, *, teacher: Network, lora: Path
) -> dict[str, Tensor | StoredTensor]:
    """A student's weights with a LoRA in them that was trained for it, as `layers.Lora` writes it.

    weights: by the student's names, as they are stored. ``ValueError`` if the LoRA is damaged, was trained for another plan or network,
    or if weights are quantised.
    """
    stored, metadata = read_header(lora)
    try:
        _check_plan(metadata, pruning, teacher)
        return _merged(weights, pruning.student, stored)
    except ValueError as error:
        raise ValueError(f"{lora}: {error}") from error


def _check_plan(metadata: Mapping[str, str], pruning: Pruning, teacher: Network) -> None:
    """``ValueError`` if a LoRA says that it was trained for another plan."""
    inputs = parse_json(metadata.get("distill.inputs", "{}"), "its metadata distill.inputs")
    name, plan = expect(inputs.get("plan", pruning.plan.name), str, "its plan"), plan_in(metadata)
    same = name == pruning.plan.name if plan is None else name_map(teacher, plan) == pruning.mapping
    if not same:
        raise ValueError(f"it was trained for the plan {name}, not for {pruning.plan.name}; give that plan")


def _merged(
    weights: Mapping[str, Tensor | StoredTensor], student: Network, stored: Mapping[str, StoredTensor]
) -> dict[str, Tensor | StoredTensor]:
    with_it, used = dict(weights), set()
    for layer, name in _names(student, stored).items():
        keys = parts_of(stored, name)
        if not keys.keys() & {"lora_down", "lora_up"}:
            continue
        for part, key in keys.items():
            check_tensor(key, part, stored[key])
            check_finite(key, stored[key])
        weight = weights[f"{layer}.weight"]
        check_fit(keys, {part: tuple(stored[key].shape) for part, key in keys.items()}, tuple(weight.shape), None)
        with_it[f"{layer}.weight"] = _with_change(weight, {part: stored[key] for part, key in keys.items()})
        used |= {*keys.values()}
    if left := stored.keys() - used:
        raise ValueError(
            f"the student has no layer for {min(left)}; give a LoRA that was trained for it, as distill train writes it"
        )
    return with_it


def _names(student: Network, stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Layers of a student -> their names in a LoRA with these tensors."""
    if isinstance(student, Architecture):
        return kohya_names(student)
    head = next((head for head in _HEADS if any(key.startswith(head) for key in stored)), "")
    layers = (name.removesuffix(".weight") for name in student.shapes if name.endswith(".weight"))
    return {layer: head + layer for layer in layers}


def _with_change(weight: Tensor | StoredTensor, change: Mapping[str, StoredTensor]) -> Merged:
    if not isinstance(weight, StoredTensor) or weight.code not in ("F16", "BF16", "F32", "F64") or weight.scale:
        raise ValueError("the weights it changes are quantised; give the teacher in bf16, fp16 or fp32")
    return Merged(**vars(weight), change=change)
