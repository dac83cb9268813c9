"""How a MODEL is sampled, as the core tells it, and put on another MODEL."""

from __future__ import annotations

import comfy.model_base
import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...distill_core.model_sampling import DISCRETE, EDM, FLOW, OTHER, ZERO_SNR, ModelSampling
from ...distill_core.schedule import NoiseSchedule, from_noise_ratio
from ...distill_core.storage import fingerprint

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
"""What ComfyUI's own savers go by."""
_SIGMA_DATA = {"edm": 0.5}


def sampling_of(model: ModelPatcher) -> ModelSampling:
    """How a MODEL is sampled, with the patches that are on it; prediction or noise is ``other`` where no file could tell it."""
    sampling = model.get_model_object("model_sampling")
    prediction = next((name for name, base in _PREDICTIONS.items() if _computes_as(sampling, base)), OTHER)
    noise, form = _noise_of(sampling, prediction), model.get_model_object("latent_format")
    mean, std = (_numbers(getattr(form, name, None)) for name in ("latents_mean", "latents_std"))
    ends = (float(sampling.sigma_min), float(sampling.sigma_max)) if noise == EDM else None
    return ModelSampling(prediction=prediction, noise=noise, sigmas=ends, latent_mean=mean, latent_std=std)


def _computes_as(sampling: nn.Module, base: type) -> bool:
    """Whether input and prediction mean what they mean for a kind of ComfyUI's: patches such as LCM's build on one and differ."""
    kind = type(sampling)
    return all(getattr(kind, name, None) is getattr(base, name) for name in ("calculate_input", "calculate_denoised"))


def _noise_of(sampling: nn.Module, prediction: str) -> str:
    timestep = getattr(type(sampling), "timestep", None)
    if timestep is comfy.model_sampling.ModelSamplingDiscrete.timestep:
        return next(
            (noise for noise in (DISCRETE, ZERO_SNR) if _same_levels(sampling, ModelSampling(noise=noise).schedule)), OTHER
        )
    if timestep is comfy.model_sampling.ModelSamplingContinuousEDM.timestep and prediction in ("v", "edm"):
        return EDM if sampling.sigma_data == _SIGMA_DATA.get(prediction, 1.0) else OTHER
    flows = timestep is comfy.model_sampling.ModelSamplingDiscreteFlow.timestep and prediction == "flow"
    return FLOW if flows and sampling.shift == 1 and sampling.multiplier == 1000 else OTHER


def _same_levels(sampling: nn.Module, schedule: NoiseSchedule) -> bool:
    levels = schedule.noise_ratio
    return sampling.sigmas.shape == levels.shape and torch.allclose(sampling.sigmas.cpu().double(), levels, rtol=1e-3)


def _numbers(values: torch.Tensor | None) -> tuple[float, ...]:
    return () if values is None else tuple(values.float().flatten().tolist())


def put_sampling(model: ModelPatcher, sampling: ModelSampling) -> None:
    """Have a MODEL that was just built sampled so, where its weights did not tell ComfyUI. ``ValueError`` where it cannot be."""
    if sampling_of(model).describe() == sampling.describe():
        return
    if sampling.noise not in _NOISE or sampling.prediction not in _PREDICTIONS:
        raise ValueError(
            f"ComfyUI has no sampling for this file ({sampling.describe()}); open it in diffusers with its own scheduler"
        )
    kind, config = _NOISE[sampling.noise], model.model.model_config
    built = type("ModelSampling", (kind, _PREDICTIONS[sampling.prediction]), {})
    options = {"zsnr": sampling.noise == ZERO_SNR} if kind is comfy.model_sampling.ModelSamplingDiscrete else {}
    made = built(config, **options)
    if sampling.noise == EDM:
        made.set_parameters(*sampling.sigmas, _SIGMA_DATA.get(sampling.prediction, 1.0))
    model.add_object_patch("model_sampling", made)
    name_type(model, sampling)


def name_type(model: ModelPatcher, sampling: ModelSampling) -> None:
    """Say what a MODEL of its own is to ComfyUI's savers, which write markers by that."""
    model.model.model_type = _TYPES.get((sampling.prediction, sampling.noise), model.model.model_type)


# --- for training ---------------------------------------------------------------------------------------------------


def prediction_of(model: ModelPatcher) -> str:
    """What a MODEL predicts on Stable Diffusion's timesteps; ``ValueError`` for others."""
    sampling = sampling_of(model)
    sampling.check_trainable()
    return sampling.prediction


def prediction_or_flow(model: ModelPatcher) -> str:
    """The same, and flows of any shift."""
    sampling = sampling_of(model)
    if sampling.prediction == "flow" and hasattr(model.get_model_object("model_sampling"), "sigmas"):
        return "flow"
    return prediction_of(model)


def schedule_of(model: ModelPatcher) -> NoiseSchedule:
    """Noise levels of a MODEL's timesteps."""
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST):
        return from_noise_ratio(sampling.sigmas)
    sigmas = sampling.sigmas.detach().cpu().double().clone()
    sigmas[-1] = (sigmas[-2] + 1) / 2  # pure noise has no ratio of noise to data
    return NoiseSchedule(1 - sigmas, sigmas)


def sampling_words(model: ModelPatcher) -> str:
    """Tells how a MODEL samples from how others do."""
    return f"{prediction_or_flow(model)} {fingerprint({'sigmas': model.get_model_object('model_sampling').sigmas})}"
