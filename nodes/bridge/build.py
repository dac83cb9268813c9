"""MODELs built from weights: pruned, loaded from a student's file, or trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...distill_core.demo.teacher import teacher_file
from ...distill_core.networks.architecture import Architecture
from ...distill_core.networks.files import UNetFile, save_unet
from ...distill_core.networks.network import open_network
from ...distill_core.networks.residuals import KEY, KeptBlocks, KeptResiduals, kept_in, read_kept
from ...distill_core.networks.transformers.architecture import Transformer
from ...distill_core.networks.transformers.files import TransformerFile, rewritten, save_transformer, stated
from ...distill_core.networks.transformers.precision import allows_fp16, note_on_fp16
from ...distill_core.pruning.plan import PruningPlan
from ...distill_core.pruning.prune import Pruning, describe, prune, pruning_metadata
from .control import with_control
from .demo import DemoModelConfig, build_demo, is_demo
from .loading import loaded
from .model import LDM, ORIGIN, Model, Origin, vae_and_text_encoders
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
    """A new MODEL from a UNet's canonical weights, built by ComfyUI's own loader, so that stock ComfyUI can load it too.

    config_class: class of the teacher's model config; it matters only for the demo's, which ComfyUI does not detect. markers:
    tensors by which ComfyUI recognises how the model is sampled.
    """
    names = LDM.from_canonical(architecture.shapes)
    weights = dict(markers or {}) | {names[name]: weight for name, weight in state_dict.items()}
    if config_class is DemoModelConfig:
        return build_demo(weights, disable_dynamic)
    way_out = "if it is a student, prune the teacher with another plan, or with pad"
    return loaded(weights, way_out, dtype=dtype, disable_dynamic=disable_dynamic)


def make_student(
    state_dict: Mapping[str, Tensor], architecture: Architecture, teacher: Model, origin: Origin | None
) -> ModelPatcher:
    """A finished student MODEL with the teacher's precision and sampling, which ComfyUI can reload."""
    patcher, sampling = teacher.patcher, teacher.sampling
    config_class, dtype = type(patcher.model.model_config), patcher.model.get_dtype_inference()
    state_dict = {name: weight.to(dtype) for name, weight in state_dict.items()}

    def build(disable_dynamic: bool) -> ModelPatcher:
        markers = sampling.markers(architecture.family)
        student = build_model(
            state_dict, architecture, config_class, markers=markers, dtype=dtype, disable_dynamic=disable_dynamic
        )
        name_type(student, sampling)
        return student

    return _sampled_as(teacher, build, origin)


def _cut_transformer(weights: Mapping[str, Tensor], network: Transformer, teacher: Model, origin: Origin) -> ModelPatcher:
    """A transformer's student as ComfyUI holds it: weights as they are stored, the teacher's precision and sampling."""
    quantised = teacher.patcher.model.model_config.quant_config is not None

    def build(disable_dynamic: bool) -> ModelPatcher:
        dtype = None if quantised else teacher.patcher.model.get_dtype_inference()
        return loaded(
            dict(weights),
            "cut the teacher with another plan",
            dtype=dtype,
            disable_dynamic=disable_dynamic,
            metadata=origin.metadata,
            depths=network.told_depths,
            entries=_entries(network, origin.kept),
        )

    return _sampled_as(teacher, build, origin)


def _entries(network: Transformer, kept: KeptResiduals | None) -> dict[str, list[int]]:
    """Which entries of lists in ComfyUI's config, one for each block, are those of a student's blocks."""
    return {network.of.entries_in: kept.places} if network.of.entries_in and isinstance(kept, KeptBlocks) else {}


def _sampled_as(teacher: Model, build: Callable[[bool], ModelPatcher], origin: Origin | None) -> ModelPatcher:
    """A MODEL that ComfyUI can reload, sampled as its teacher is."""
    own_sampling, latent_format = (teacher.patcher.get_model_object(name) for name in ("model_sampling", "latent_format"))

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        student = build(disable_dynamic)
        student.model.latent_format = latent_format
        student.add_object_patch("model_sampling", own_sampling)
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
    network = teacher.network
    if isinstance(network, Architecture):
        pruning, weights = prune(network, plan, pad=pad), teacher.state_dict()
        return make_student(pruning.weights(weights), pruning.student, teacher, _origin(teacher, pruning, weights))
    cut, weights = prune(network, plan, pad=pad), teacher.state_dict()
    origin, kept = _origin(teacher, cut, weights), cut.weights(weights)
    config = teacher.patcher.model.model_config.unet_config
    if network.of.believes_config:
        origin = replace(
            origin, metadata={**origin.metadata, **rewritten(stated(config), network, cut.student, cut.mapping.rename)}
        )
    if network.of.marker:
        key, value, name = network.of.marker
        kept |= {name: torch.zeros(1)} if config.get(key) == value else {}
    return _cut_transformer(kept, cut.student, teacher, origin)


def precision_note(teacher: Model, student: Model) -> str:
    """What a person must know of the precision that ComfyUI computes a student's file in; empty if it is the teacher's."""
    answers = [
        allows_fp16(model.network, model.patcher.model.diffusion_model.state_dict())
        for model in (teacher, student)
        if isinstance(model.network, Transformer)
    ]
    return note_on_fp16(*answers) if answers else ""


def _origin(teacher: Model, pruning: Pruning, weights: Mapping[str, Tensor]) -> Origin:
    """Where a student comes from, its teacher's own origin included."""
    network, before = teacher.network, teacher.origin
    metadata: dict[str, str] = pruning_metadata(pruning, weights, network, before.kept if before else None)
    return Origin(pruning.plan, read_kept(metadata[KEY]), metadata)


def save_model(
    model: Model,
    path: Path,
    *,
    layout: str,
    dtype: str | None,
    clip: comfy.sd.CLIP | None = None,
    vae: comfy.sd.VAE | None = None,
    about: Mapping[str, str] | None = None,
) -> str:
    """Write a MODEL's network with all that is known of its origin; returns what a person must know to open the file.

    layout: a key of `files.FILE_LAYOUTS`; with ``checkpoint``, also CLIP and VAE. dtype: None for the precision it is held in.
    about: more entries for the header.
    """
    network, origin = model.network, {} if model.origin is None else model.origin.metadata
    metadata = {**origin, **(about or {})}
    if isinstance(network, Architecture):
        others = None if clip is None or vae is None or layout != "checkpoint" else vae_and_text_encoders(model, clip, vae)
        save_unet(
            path,
            model.state_dict(),
            network,
            layout=layout,
            dtype=dtype,
            sampling=model.sampling,
            others=others,
            metadata=metadata,
        )
        return "" if layout == "diffusers" else model.sampling.loading_note(network.family, network.channels("conv_in")[0])
    if layout != "ldm":
        raise ValueError("a transformer is saved alone, for Load Diffusion Model; choose the ldm layout")
    save_transformer(path, model.state_dict(), network, dtype=dtype, metadata=metadata)
    return network.loading_note if model.origin else ""


def load_student(path: Path) -> tuple[ModelPatcher, dict]:
    """A student's file as a MODEL, with everything that ComfyUI's own loaders leave out, and a description of the file."""
    file = open_network(path)
    build = _of_unet_file(file) if isinstance(file, UNetFile) else _of_transformer_file(file)

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        return _with_origin(build(disable_dynamic), Origin.of_file(file))

    student = _reloadable(load)
    return student, {"prediction": Model(student).sampling.prediction} | describe(file)


def _of_unet_file(file: UNetFile) -> Callable[[bool], ModelPatcher]:
    config_class = DemoModelConfig if is_demo(file.architecture) else None

    def build(disable_dynamic: bool) -> ModelPatcher:
        weights = {name: tensor.read() for name, tensor in file.tensors.items()}  # not kept in memory besides the MODEL's own
        student = build_model(weights, file.architecture, config_class, markers=file.markers, disable_dynamic=disable_dynamic)
        put_sampling(student, file.sampling)
        return student

    return build


def _of_transformer_file(file: TransformerFile) -> Callable[[bool], ModelPatcher]:
    contiguous = file.architecture.contiguous
    metadata = rewritten(file.metadata, file.architecture, file.architecture, contiguous, file.prefix)

    def build(disable_dynamic: bool) -> ModelPatcher:
        stored = comfy.utils.load_torch_file(str(file.path))  # mapped, not read
        weights = {contiguous(name): stored[file.prefix + name] for name in file.tensors}
        return loaded(
            weights,
            "open it with the stock loader",
            disable_dynamic=disable_dynamic,
            metadata=metadata,
            depths=file.architecture.told_depths,
            entries=_entries(file.architecture, kept_in(file.metadata)),
        )

    return build


def demo_teacher() -> ModelPatcher:
    """The bundled teacher as a MODEL."""
    file = teacher_file()

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        return build_model(file.state_dict, file.architecture, DemoModelConfig, disable_dynamic=disable_dynamic)

    return _reloadable(load)
