"""The teacher's ControlNets on its student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import comfy.controlnet
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...distill_core.networks.residuals import KeptBlocks, KeptSkips
from .model import ORIGIN, Origin
from .router import CONTROL
from .weights import shapes_of


def with_control(student: ModelPatcher, origin: Origin) -> ModelPatcher:
    """Route a ControlNet's residuals to the kept blocks, and refuse Control-LoRAs that need removed blocks."""
    kept = origin.kept
    remap = partial(remapped_control, kept) if isinstance(kept, KeptSkips) else partial(selected_control, kept)
    student.add_wrapper_with_key(WrappersMP.APPLY_MODEL, ORIGIN, partial(_remap_control, remap))
    student.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, CONTROL, partial(_check_control, origin))
    return student


def _remap_control(remap, executor, x, t, c_concat=None, c_crossattn=None, control=None, *args, **kwargs):
    """A wrapper around ``BaseModel.apply_model`` that gives each kept block the residual made for it."""
    return executor(x, t, c_concat, c_crossattn, control and remap(control), *args, **kwargs)


def selected_control(kept: KeptBlocks, control: Mapping[str, list]) -> dict[str, list]:
    """A ControlNet's residuals for the blocks of a transformer as residuals for the student's; missing ones stay missing."""
    given = {
        key: [*control.get(key, []), *[None] * blocks.num_teacher][: blocks.num_teacher] for key, blocks in kept.lists.items()
    }
    return {**control, **{key: blocks.select(given[key]) for key, blocks in kept.lists.items()}}


def remapped_control(skips: KeptSkips, control: Mapping[str, list]) -> dict[str, list]:
    """A ControlNet's or T2I-Adapter's residuals for the teacher as residuals for the student.

    ComfyUI pops them from the ends of its lists: the deepest block's first from ``output``, the outermost's first from
    ``input``. Residuals made for the student do not change.
    """
    output, inputs, middle = ([*control.get(key, [])] for key in ("output", "input", "middle"))
    if len(output) == len(skips.kept) or len(inputs) == len(skips.kept):
        return {"input": inputs, "middle": middle, "output": output}
    missing = [None] * skips.num_teacher
    from_conv_in = (missing + output)[-skips.num_teacher :], (inputs[::-1] + missing)[: skips.num_teacher]
    output, inputs = (skips.select(residuals) for residuals in from_conv_in)
    return {"input": inputs[::-1], "middle": middle if skips.mid else [], "output": output}


def _check_control(origin: Origin, executor, model: ModelPatcher, noise_shape, conds: Mapping[str, list], *args, **kwargs):
    """A wrapper around ``prepare_sampling``: ComfyUI builds a Control-LoRA's network from the weights of the sampled model."""
    for conditioning in conds.values():
        for control in _controls(conditioning):
            if isinstance(control, comfy.controlnet.ControlLora):
                _check_control_lora(control, model, origin)
    return executor(model, noise_shape, conds, *args, **kwargs)


def _controls(conditioning: list[dict]) -> Iterator[comfy.controlnet.ControlBase]:
    """All ControlNets of a conditioning, including chained ones."""
    for entry in conditioning:
        control = entry.get("control")
        while control is not None:
            yield control
            control = control.previous_controlnet


def _check_control_lora(control: comfy.controlnet.ControlLora, model: ModelPatcher, origin: Origin) -> None:
    """``ValueError`` unless the model has the encoder and mid block that a Control-LoRA modifies."""
    padding = [block for block in origin.metadata.get("distill.padding", "").split() if not block.startswith("up.")]
    missing = padding or _missing(control.control_weights, model)
    if missing:
        raise ValueError(
            f"a Control-LoRA changes a copy of the model's encoder and mid block, but this student lacks a part of the teacher's "
            f"({missing[0]}); use a full ControlNet, which works on every student"
        )


def _missing(control_weights: Mapping[str, Tensor], model: ModelPatcher) -> list[str]:
    """Layers that a Control-LoRA changes but that the model lacks or has in another shape."""
    shapes = shapes_of(model.model.diffusion_model)
    found = []
    for name, up in control_weights.items():
        layer = name.removesuffix(".up")
        if layer != name:
            down, weight = control_weights.get(f"{layer}.down"), shapes.get(f"{layer}.weight", ())
            if down is None or len(weight) < 2 or len(up) != weight[0] or down[0].numel() != weight[1:].numel():
                found.append(layer)
    return found
