"""MODELs built from weights: pruned, loaded from a student's file, or trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...distill_core.demo.teacher import teacher_file
from ...distill_core.networks.architecture import Architecture
from ...distill_core.networks.files import open_unet
from ...distill_core.pruning.plan import PruningPlan
from ...distill_core.pruning.prune import describe, prune, pruning_metadata
from .control import with_control
from .demo import DemoModelConfig, build_demo, is_demo
from .model import LDM, ORIGIN, Model, Origin
from .sampling import name_type, put_sampling


def build_model(
    state_dict: Mapping[str, Tensor],
    architecture: Architecture,
    config_class: type | None,
    *,
    markers: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """A new MODEL from canonical weights, built by ComfyUI's own loader, so that stock ComfyUI can load it too.

    config_class: class of the teacher's model config; it matters only for the demo's, which ComfyUI does not detect. markers:
    tensors by which ComfyUI recognises how the model is sampled.
    """
    names = LDM.from_canonical(architecture.shapes)
    weights = dict(markers or {}) | {names[name]: weight for name, weight in state_dict.items()}
    if config_class is DemoModelConfig:
        model = build_demo(weights, disable_dynamic)
    else:
        options = {} if dtype is None else {"dtype": dtype}
        model = comfy.sd.load_diffusion_model_state_dict(weights, model_options=options, disable_dynamic=disable_dynamic)
        if model is None:
            raise ValueError(
                "ComfyUI does not recognise this UNet; if it is a student, prune the teacher with another plan, or with pad"
            )
    return model


def make_student(
    state_dict: Mapping[str, Tensor], architecture: Architecture, teacher: Model, origin: Origin | None
) -> ModelPatcher:
    """A finished student MODEL with the teacher's precision and sampling, which ComfyUI can reload."""
    patcher, sampling = teacher.patcher, teacher.sampling
    own_sampling, latent_format = (patcher.get_model_object(name) for name in ("model_sampling", "latent_format"))
    config_class, dtype = type(patcher.model.model_config), patcher.model.get_dtype_inference()
    state_dict = {name: weight.to(dtype) for name, weight in state_dict.items()}

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        markers = sampling.markers(architecture.family)
        student = build_model(
            state_dict, architecture, config_class, markers=markers, dtype=dtype, disable_dynamic=disable_dynamic
        )
        student.model.latent_format = latent_format
        student.add_object_patch("model_sampling", own_sampling)
        name_type(student, sampling)
        return _with_origin(student, origin)

    return _reloadable(load)


def _with_origin(student: ModelPatcher, origin: Origin | None) -> ModelPatcher:
    """Attach a student's origin, and make it accept ControlNets of its teacher."""
    if origin is not None:
        student.set_attachments(ORIGIN, origin)
        with_control(student, origin)
    return student


def _reloadable(load: Callable[..., ModelPatcher]) -> ModelPatcher:
    """A MODEL that ComfyUI can reload to train a LoRA on it, compile it, or copy it to a second GPU."""
    model = load()
    model.cached_patcher_init = (load, ())
    return model


def prune_model(teacher: Model, plan: PruningPlan, pad: bool = False) -> ModelPatcher:
    """The teacher without the blocks that a plan removes; the teacher does not change. pad: see `prune.prune`."""
    architecture, weights = teacher.architecture, teacher.state_dict()
    pruning = prune(architecture, plan, pad=pad)
    metadata, skips = pruning_metadata(pruning, weights, architecture), pruning.mapping.skips(architecture)
    if before := teacher.origin:
        skips = before.skips.then(skips)
        metadata["distill.skips"] = skips.to_text()
    return make_student(pruning.weights(weights), pruning.student, teacher, Origin(pruning.plan, skips, metadata))


def load_student(path: Path) -> tuple[ModelPatcher, dict]:
    """A student's file as a MODEL, with everything that ComfyUI's own loaders leave out, and a description of the file."""
    file = open_unet(path)
    config_class = DemoModelConfig if is_demo(file.architecture) else None

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        weights = {name: tensor.read() for name, tensor in file.tensors.items()}  # not kept in memory besides the MODEL's own
        student = build_model(weights, file.architecture, config_class, markers=file.markers, disable_dynamic=disable_dynamic)
        put_sampling(student, file.sampling)
        return _with_origin(student, Origin.of_file(file))

    return _reloadable(load), describe(file)


def demo_teacher() -> ModelPatcher:
    """The bundled teacher as a MODEL."""
    file = teacher_file()

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        return build_model(file.state_dict, file.architecture, DemoModelConfig, disable_dynamic=disable_dynamic)

    return _reloadable(load)
