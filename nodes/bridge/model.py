"""The architecture, origin and weights of a MODEL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...distill_core.base.storage import fingerprint
from ...distill_core.networks import files
from ...distill_core.networks.architecture import Architecture
from ...distill_core.networks.files import UNetFile
from ...distill_core.networks.layouts import layout
from ...distill_core.pruning import plan as plans
from ...distill_core.pruning.plan import KeptSkips, NameMap, PruningPlan, name_map, plan_in
from .demo import DigitsModelConfig
from .router import ROUTE
from .weights import patched_weights, weights_of

ORIGIN = "distill_origin"  # attachment of a MODEL: its Origin
LDM = layout("ldm")


def architecture_of(model: ModelPatcher) -> Architecture:
    """The architecture of a MODEL's UNet; ``ValueError`` if it is routed, or not a UNet of the Stable Diffusion family."""
    _check_not_routed(model)
    weights = weights_of(model.model.diffusion_model)
    head_channels = model.model.model_config.unet_config.get("num_head_channels", -1)
    try:
        return Architecture.from_state_dict(weights, head_channels if head_channels > 0 else None)
    except ValueError as error:
        raise ValueError(f"this MODEL ({type(model.model).__name__}) cannot be pruned or distilled here: {error}") from error


def _check_not_routed(model: ModelPatcher) -> None:
    if model.get_attachment(ROUTE) is not None:
        raise ValueError("this MODEL is routed: it holds several models; connect one of them instead")


def unet_of(model: ModelPatcher) -> Architecture | None:
    """The same, or None for another family; ``ValueError`` if the MODEL is routed."""
    _check_not_routed(model)
    try:
        return architecture_of(model)
    except ValueError:
        return None


def state_dict_of(model: ModelPatcher) -> dict[str, Tensor]:
    """Weights of a MODEL on the CPU, with its patches (LoRA): by canonical names for a UNet, by ComfyUI's for other networks.

    Quantised weights come in the precision they compute in; ``ValueError`` for weights that cannot be read.
    """
    with torch.inference_mode():  # the mode ComfyUI's loaders made the weights in
        # Clones share one network: it may hold the patches of another MODEL until this one is loaded.
        comfy.model_management.load_models_gpu([model])
        weights = patched_weights(model)
        names = LDM.to_canonical(weights) if unet_of(model) else {name: name for name in weights}
        return {names[name]: weight for name, weight in weights.items()}


def model_fingerprint(model: ModelPatcher) -> str:
    return fingerprint(state_dict_of(model))


@dataclass(frozen=True)
class Origin:
    """The origin of a student: plan, skip connections and metadata."""

    plan: PruningPlan
    """The plan that pruned it."""
    skips: KeptSkips
    """Which skip connections of the teacher it keeps."""
    metadata: Mapping[str, str]
    """What its file records about its teacher."""

    @classmethod
    def of_file(cls, file: UNetFile) -> Origin | None:
        """The origin in the metadata of a file that this pack pruned; None for other files."""
        if (plan := plan_in(file.metadata)) is None or "distill.skips" not in file.metadata:
            return None
        metadata = {name: text for name, text in file.metadata.items() if name.startswith("distill.")}
        return cls(plan, KeptSkips.from_text(metadata["distill.skips"]), metadata)


def origin_of(model: ModelPatcher) -> Origin | None:
    """The origin of a MODEL that this pack pruned; None for other MODELs."""
    return model.get_attachment(ORIGIN)


def told_of(model: ModelPatcher) -> dict[str, str]:
    """Metadata about a MODEL's origin for files made from it, by the keys of `files.ORIGIN`; empty if it was not pruned here."""
    if (origin := origin_of(model)) is None:
        return {}
    return {key: origin.metadata[key] for key in files.ORIGIN if key in origin.metadata}


def plan_of(model: ModelPatcher) -> PruningPlan | None:
    """The plan that pruned a MODEL; None if there is none."""
    return origin.plan if (origin := origin_of(model)) else None


def plan_between(student: ModelPatcher, teacher: ModelPatcher) -> PruningPlan | None:
    """The plan from teacher to student, None if they have the same shape; ``ValueError`` if they do not belong together."""
    return plans.plan_between(architecture_of(teacher), architecture_of(student), plan_of(student))


def mapping_between(student: ModelPatcher, teacher: ModelPatcher) -> NameMap:
    """Name map from teacher to student; ``ValueError`` if they do not belong together."""
    found, architecture = plan_between(student, teacher), architecture_of(teacher)
    return NameMap.identity(architecture) if found is None else name_map(architecture, found)


def vae_and_text_encoders(model: ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> dict[str, Tensor]:
    """The weights of a full checkpoint besides the UNet, by LDM names, on the CPU."""
    config = model.model.model_config
    if isinstance(config, DigitsModelConfig):
        raise ValueError("other programs cannot read the demo's CLIP and VAE; choose the ldm layout")
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([clip.load_model()])
        text = config.process_clip_state_dict_for_saving(clip.state_dict_for_saving())
        pixels = config.process_vae_state_dict_for_saving(vae.get_sd())
        return {name: weight.to("cpu").detach() for name, weight in {**text, **pixels}.items() if isinstance(weight, Tensor)}


def with_lora(
    model: ModelPatcher, clip: comfy.sd.CLIP | None, lora: dict[str, Tensor], strength_model: float, strength_clip: float
) -> tuple[ModelPatcher, comfy.sd.CLIP | None]:
    """MODEL and CLIP with a LoRA, by ComfyUI's own loader; the given MODEL and CLIP do not change."""
    patched_model, patched_clip = comfy.sd.load_lora_for_models(model, clip, dict(lora), strength_model, strength_clip)
    return patched_model, patched_clip
