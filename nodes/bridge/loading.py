"""MODELs from weights by names of ComfyUI's own."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor


def loaded(
    weights: dict[str, Tensor],
    way_out: str,
    *,
    dtype: torch.dtype | None = None,
    disable_dynamic: bool = False,
    metadata: Mapping[str, str] | None = None,
    depths: Mapping[str, int] | None = None,
    entries: Mapping[str, list[int]] | None = None,
) -> ModelPatcher:
    """A MODEL as ComfyUI's own loader makes it; ``ValueError`` with a way out if it does not know the network.

    metadata: of a file, which ComfyUI believes. depths: to be told to families whose blocks its loader does not count. entries: of
    lists in ComfyUI's config, those to be kept.
    """
    known = None if metadata is None else dict(metadata)
    if depths:
        return _told(weights, depths, entries or {}, dtype, disable_dynamic, known)
    options = {} if dtype is None else {"dtype": dtype}
    model = comfy.sd.load_diffusion_model_state_dict(weights, options, known, disable_dynamic=disable_dynamic)
    if model is None:
        raise ValueError(f"ComfyUI does not recognise this network; {way_out}")
    return model


def _told(
    weights: dict[str, Tensor],
    depths: Mapping[str, int],
    entries: Mapping[str, list[int]],
    dtype: torch.dtype | None,
    disable_dynamic: bool,
    metadata: dict[str, str] | None,
) -> ModelPatcher:
    weights, metadata = comfy.utils.convert_old_quants(weights, "", metadata=metadata)
    config = comfy.model_detection.model_config_from_unet(weights, "", metadata=metadata)
    config.unet_config |= depths
    for key, places in entries.items():
        config.unet_config[key] = [config.unet_config[key][place] for place in places]
    device, supported = comfy.model_management.get_torch_device(), list(config.supported_inference_dtypes)
    quantised = config.quant_config is not None
    if dtype is None:
        stored = None if quantised else comfy.utils.weight_dtype(weights)
        count = comfy.utils.calculate_parameters(weights)
        dtype = comfy.model_management.unet_dtype(model_params=count, supported_dtypes=supported, weight_dtype=stored)
    cast = comfy.model_management.unet_manual_cast(None if quantised else dtype, device, supported)
    config.set_inference_dtype(dtype, cast, device=device)
    return built(config, weights, disable_dynamic)


def built(config: comfy.supported_models_base.BASE, weights: dict[str, Tensor], disable_dynamic: bool) -> ModelPatcher:
    """A MODEL of a config whose precision is set."""
    model = config.get_model(weights, "")
    patcher_class = ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    model_patcher = patcher_class(model, load_device=device, offload_device=offload_device)
    model.load_model_weights(weights, "", assign=model_patcher.is_dynamic())
    return model_patcher
