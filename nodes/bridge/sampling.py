"""How a MODEL is sampled: read from one MODEL in the core's terms, and set on another."""

from __future__ import annotations

from typing import cast

import comfy.model_base
import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...distill_core.base.storage import fingerprint
from ...distill_core.diffusion.schedule import NoiseSchedule, from_noise_ratio, of_sampling
from ...distill_core.networks.model_sampling import DISCRETE, EDM, FLOW, OTHER, ZERO_SNR, ModelSampling

_PREDICTIONS = {
    "v": comfy.model_sampling.V_PREDICTION,
    "edm": comfy.model_sampling.EDM,
    "x0": comfy.model_sampling.X0,
    "eps": comfy.model_sampling.EPS,
    "flow": comfy.model_sampling.CONST,
}
_NOISE = {
    DISCRETE: comfy.model_sampling.ModelSamplingDiscrete,
    ZERO_SNR: comfy.model_sampling.ModelSamplingDiscrete,
    EDM: comfy.model_sampling.ModelSamplingContinuousEDM,
    FLOW: comfy.model_sampling.ModelSamplingDiscreteFlow,
}
_TYPES = {
    ("eps", DISCRETE): comfy.model_base.ModelType.EPS,
    ("v", DISCRETE): comfy.model_base.ModelType.V_PREDICTION,
    ("v", ZERO_SNR): comfy.model_base.ModelType.V_PREDICTION,
    ("v", EDM): comfy.model_base.ModelType.V_PREDICTION_EDM,
    ("edm", EDM): comfy.model_base.ModelType.EDM,
    ("flow", FLOW): comfy.model_base.ModelType.FLOW,
}
"""The model types by which ComfyUI's own savers decide."""
_SIGMA_DATA = {"edm": 0.5}


def sampling_of(model: ModelPatcher) -> ModelSampling:
    """How a MODEL is sampled, with its patches; prediction or noise is ``other`` if no file could record it."""
    sampling = model.get_model_object("model_sampling")
    prediction = next((name for name, base in _PREDICTIONS.items() if _computes_as(sampling, base)), OTHER)
    noise, form = _noise_of(sampling, prediction), model.get_model_object("latent_format")
    mean, std = (_numbers(getattr(form, name, None)) for name in ("latents_mean", "latents_std"))
    ends = (float(sampling.sigma_min), float(sampling.sigma_max)) if noise == EDM else None
    return ModelSampling(prediction=prediction, noise=noise, sigmas=ends, latent_mean=mean, latent_std=std)


def _computes_as(sampling: nn.Module, base: type) -> bool:
    """Whether input and prediction mean the same as in one of ComfyUI's kinds; patches such as LCM's build on one and differ."""
    kind = type(sampling)
    return all(getattr(kind, name, None) is getattr(base, name) for name in ("calculate_input", "calculate_denoised"))


def _noise_of(sampling: nn.Module, prediction: str) -> str:
    timestep = getattr(type(sampling), "timestep", None)
    if timestep is comfy.model_sampling.ModelSamplingDiscrete.timestep:
        return next(
            (noise for noise in (DISCRETE, ZERO_SNR) if _same_levels(sampling, of_sampling(ModelSampling(noise=noise)))), OTHER
        )
    if timestep is comfy.model_sampling.ModelSamplingContinuousEDM.timestep and prediction in ("v", "edm"):
        return EDM if sampling.sigma_data == _SIGMA_DATA.get(prediction, 1.0) else OTHER
    flows = timestep is comfy.model_sampling.ModelSamplingDiscreteFlow.timestep and prediction == "flow"
    return FLOW if flows and sampling.shift == 1 and sampling.multiplier == 1000 else OTHER


def _same_levels(sampling: nn.Module, schedule: NoiseSchedule) -> bool:
    sigmas, levels = cast(torch.Tensor, sampling.sigmas), schedule.noise_ratio
    return sigmas.shape == levels.shape and torch.allclose(sigmas.cpu().double(), levels, rtol=1e-3)


def _numbers(values: torch.Tensor | None) -> tuple[float, ...]:
    return () if values is None else tuple(values.float().flatten().tolist())


def put_sampling(model: ModelPatcher, sampling: ModelSampling) -> None:
    """Set the sampling of a newly built MODEL if ComfyUI could not see it from the weights; ``ValueError`` if ComfyUI has none."""
    if sampling_of(model).describe() == sampling.describe():
        return
    if sampling.noise not in _NOISE or sampling.prediction not in _PREDICTIONS:
        raise ValueError(f"ComfyUI cannot sample this file ({sampling.describe()}); open it in diffusers with its own scheduler")
    kind, config = _NOISE[sampling.noise], model.model.model_config
    built = type("ModelSampling", (kind, _PREDICTIONS[sampling.prediction]), {})
    options = {"zsnr": sampling.noise == ZERO_SNR} if kind is comfy.model_sampling.ModelSamplingDiscrete else {}
    made = built(config, **options)
    if sampling.sigmas:
        made.set_parameters(*sampling.sigmas, _SIGMA_DATA.get(sampling.prediction, 1.0))
    model.add_object_patch("model_sampling", made)
    name_type(model, sampling)


def name_type(model: ModelPatcher, sampling: ModelSampling) -> None:
    """Set the model type of a MODEL; ComfyUI's savers choose their markers by it."""
    model.model.model_type = _TYPES.get((sampling.prediction, sampling.noise), model.model.model_type)


# --- for training ---------------------------------------------------------------------------------------------------


def schedule_of(model: ModelPatcher) -> NoiseSchedule:
    """Noise levels of a MODEL's timesteps."""
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST):
        return from_noise_ratio(sampling.sigmas)
    sigmas = sampling.sigmas.detach().cpu().double().clone()
    sigmas[-1] = (sigmas[-2] + 1) / 2  # pure noise has an infinite noise ratio
    return NoiseSchedule(1 - sigmas, sigmas)


def sampling_identity(model: ModelPatcher, prediction: str) -> str:
    """A text that identifies how a MODEL samples."""
    return f"{prediction} {fingerprint({'sigmas': model.get_model_object('model_sampling').sigmas})}"
