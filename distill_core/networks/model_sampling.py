"""How a network is sampled: what it predicts, at which noise levels, in which latents.

Weights alone do not give this. Files give it by marker tensors (as ComfyUI reads them), by a pipeline's scheduler, or by
metadata; `ModelSampling` is read from any of these and written back. Nothing here imports torch before a tensor is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..base.storage import StoredTensor

TRAINED = ("eps", "v", "x0")
"""Predictions that the training engine supports, on discrete timesteps."""
DISCRETE, ZERO_SNR, EDM, FLOW, OTHER = "discrete", "zero snr", "edm", "flow", "other"
SD2_V_SIGN = "up.3.attn.2.block.0.norm1.bias"
"""ComfyUI reads an SD2 as a v model if this parameter of the full UNet has a deviation above 0.09 (comfy/supported_models.py,
SD20). Many students have no such block; then a tensor with this name in the LDM layout is only a marker."""
SD2_V_SIGN_LDM = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_V_SPREAD = 0.09
_MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_SCHEDULER_OF_STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_PLAYGROUND_SIGMAS, _EDM_SIGMAS = (0.002, 80.0), (0.002, 120.0)
_WORDS = {
    "epsilon": "eps",
    "eps": "eps",
    "v": "v",
    "v_prediction": "v",
    "sample": "x0",
    "flow": "flow",
    "flow_prediction": "flow",
}
"""Name of a prediction in metadata and schedulers -> its name here."""
_MODELSPEC = {"eps": "epsilon", "v": "v", "x0": "sample", "flow": "flow", "edm": "edm"}
_METADATA = "distill.sampling"
_MOST_CHANNELS = 1024


@dataclass(frozen=True, kw_only=True)
class ModelSampling:
    """How a network is sampled. ``ValueError`` for invalid noise levels."""

    prediction: str = "eps"
    """A key of `schedule.PREDICTIONS`; or ``edm``, a preconditioned denoiser (Karras et al. 2022, arXiv 2206.00364, Table 1)."""
    noise: str = DISCRETE
    """``discrete``: Stable Diffusion's 1000 timesteps. ``zero snr``: the same, rescaled to end in pure noise (Lin et al. 2024,
    arXiv 2305.08891, Alg. 1). ``edm``: any noise level between two; the network reads log(sigma) / 4 in place of a timestep.
    ``flow``: a straight line. ``other``: anything this class cannot describe."""
    sigmas: tuple[float, float] | None = None
    """Lowest and highest noise level of ``edm``."""
    latent_mean: tuple[float, ...] = ()
    """Mean of each latent channel, if latents are normalised per channel; empty if they are only scaled."""
    latent_std: tuple[float, ...] = ()

    def __post_init__(self):
        ends = self.sigmas or ()
        numbers = [*ends, *self.latent_mean, *self.latent_std]
        known = self.prediction in (*_MODELSPEC, OTHER) and self.noise in (DISCRETE, ZERO_SNR, EDM, FLOW, OTHER)
        if not known or not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise ValueError(f"its sampling is invalid ({self.prediction!r}, {self.noise!r}); download the file again")
        if len(ends) != 2 * (self.noise == EDM) or list(ends) != sorted(ends) or min(ends, default=1) <= 0:
            raise ValueError(f"its noise levels are invalid ({self.noise}, {ends}); download the file again")
        if len(self.latent_mean) != len(self.latent_std) or len(self.latent_mean) > _MOST_CHANNELS:
            raise ValueError("its mean and deviation of latents are invalid; download the file again")

    def describe(self) -> str:
        """``v prediction``, ``eps prediction, zero terminal SNR``, ``EDM, sigma 0.002 to 80``."""
        levels = f", sigma {self.sigmas[0]:g} to {self.sigmas[1]:g}" if self.sigmas else ""
        own = {"edm": "EDM", OTHER: "a custom prediction"}
        kind = own.get(self.prediction, f"{self.prediction} prediction{', EDM' if self.noise == EDM else ''}")
        extra = {ZERO_SNR: ", zero terminal SNR", OTHER: ", a custom noise schedule"}.get(self.noise, "")
        return kind + levels + extra

    def check_trainable(self) -> None:
        """``ValueError`` for a sampling that the training engine does not support."""
        if self.prediction not in TRAINED or self.noise not in (DISCRETE, ZERO_SNR):
            patched = "remove the patch that changed it (such as LCM), or " if OTHER in (self.prediction, self.noise) else ""
            raise ValueError(
                f"this model samples with {self.describe()}, which cannot be trained or compared here; {patched}use a model with "
                "eps, v or x0 prediction on Stable Diffusion's 1000 timesteps (pruning works with any)"
            )

    def check_writable(self, layout: str) -> None:
        """``ValueError`` for a sampling that a file cannot store. layout: a key of `files.FILE_LAYOUTS`."""
        if self.prediction == OTHER or (self.noise == OTHER and layout != "diffusers"):
            raise ValueError(
                f"a file cannot store that this model samples with {self.describe()}; remove the patch that changed it (such as "
                "LCM), or write the diffusers layout and use the teacher's scheduler"
            )

    def loading_note(self, family: str, in_channels: int = 4) -> str:
        """What a person must do so that stock ComfyUI samples a file of a UNet family correctly; empty if nothing.

        in_channels: of the UNet; ComfyUI takes an SD2 with more, such as one for inpainting, for one that predicts noise.
        """
        known = self == ModelSampling() or (family == "sdxl" and self.prediction in ("v", "edm"))
        if known or (family == "sd2" and in_channels == 4 and self == ModelSampling(prediction="v")):
            return ""
        return (
            f"ComfyUI's own loaders sample this file as eps; it needs {self.describe()}. Open it with Load Distilled Model, or "
            "add a ModelSampling node after the loader"
        )

    # --- as others read it

    def markers(self, family: str, prefix: str = "") -> dict[str, Tensor]:
        """Marker tensors beside a UNet in the LDM layout, which make ComfyUI sample it so. prefix: of the UNet's parameters.

        ComfyUI ignores them for SD1.x (`loading_note`). A custom schedule and a flow have none.
        """
        import torch

        beside: dict[str, Tensor] = {}
        if self.prediction == "edm":
            mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (self.latent_mean or (0.0,), self.latent_std or (1.0,)))
            beside |= {"edm_mean": mean, "edm_std": std}
        elif self.sigmas:  # of edm noise
            beside |= dict(zip(("edm_vpred.sigma_min", "edm_vpred.sigma_max"), map(torch.tensor, self.sigmas), strict=True))
        elif self.prediction == "v" and family == "sd2":
            beside |= {prefix + SD2_V_SIGN_LDM: torch.tensor([-1.0, 1.0])}
        elif self.prediction == "v":
            beside |= {"v_pred": torch.zeros(0)}
        return beside | ({"ztsnr": torch.zeros(0)} if self.noise == ZERO_SNR else {})

    def metadata(self) -> dict[str, str]:
        """ModelSpec's prediction type, and the whole sampling if that is not enough."""
        plain = self == ModelSampling(prediction=self.prediction)
        return {"modelspec.prediction_type": _MODELSPEC[self.prediction]} | (
            {} if plain else {_METADATA: json.dumps(asdict(self))}
        )


# --- reading --------------------------------------------------------------------------------------------------------


STABLE_DIFFUSION = ModelSampling()
"""Sampling of Stable Diffusion 1 and SDXL."""


def is_marker(name: str) -> bool:
    """Whether a tensor of a file only marks how its network is sampled and is not a weight."""
    return name in _MARKERS


def read_sampling(
    markers: Mapping[str, StoredTensor],
    scheduler: Mapping[str, Any],
    metadata: Mapping[str, str],
    sd2_v_sign: StoredTensor | None,
) -> ModelSampling:
    """Sampling of a file: from its markers, else its pipeline's scheduler, else its metadata, else the weights of an SD2.

    sd2_v_sign: `SD2_V_SIGN` of an SD2. ``ValueError`` for a damaged marker or metadata.
    """
    if found := _of_markers(markers):
        return found
    if sd2_v_sign is not None and sd2_v_sign.shape == (2,):  # a marker written here, not a weight
        return ModelSampling(prediction="v", noise=ZERO_SNR if "ztsnr" in markers else DISCRETE)
    found = _of_scheduler(scheduler) or _of_metadata(metadata)
    if found is None:
        found = ModelSampling(prediction="v" if sd2_v_sign is not None and _spreads(sd2_v_sign) else "eps")
    return replace(found, noise=ZERO_SNR) if "ztsnr" in markers and found == ModelSampling(prediction="v") else found


def _spreads(sign: StoredTensor) -> bool:
    return bool(sign.read().float().std(unbiased=False) > _SD2_V_SPREAD)


def _of_markers(markers: Mapping[str, StoredTensor]) -> ModelSampling | None:
    """Sampling from markers, as ComfyUI reads an SDXL (comfy/supported_models.py, SDXL)."""
    if {"edm_mean", "edm_std"} <= markers.keys():
        mean, std = (tuple(markers[name].read().float().flatten().tolist()) for name in ("edm_mean", "edm_std"))
        return ModelSampling(prediction="edm", noise=EDM, sigmas=_PLAYGROUND_SIGMAS, latent_mean=mean, latent_std=std)
    if "edm_vpred.sigma_max" in markers:
        least, largest = (
            markers[name].read().float().mean().item() if (name := f"edm_vpred.{end}") in markers else otherwise
            for end, otherwise in zip(("sigma_min", "sigma_max"), _EDM_SIGMAS, strict=True)
        )
        return ModelSampling(prediction="v", noise=EDM, sigmas=(least, largest))
    if "v_pred" in markers:
        return ModelSampling(prediction="v", noise=ZERO_SNR if "ztsnr" in markers else DISCRETE)
    return None


def _of_scheduler(config: Mapping[str, Any]) -> ModelSampling | None:
    """Sampling from the config of a diffusers scheduler; None if it does not give the prediction."""
    name = str(config.get("_class_name", ""))
    if name.startswith("FlowMatch"):
        return ModelSampling(prediction="flow", noise=FLOW)
    prediction = _WORDS.get(said) if isinstance(said := config.get("prediction_type"), str) else None
    if name.startswith("EDM") or config.get("timestep_type") == "continuous":
        ends = (config.get("sigma_min", 0.002), config.get("sigma_max", 80.0))
        if not all(isinstance(end, (int, float)) for end in ends):
            raise ValueError(f"its scheduler's sigma_min and sigma_max must be numbers, got {ends}; download the file again")
        return ModelSampling(prediction="v" if prediction == "v" else "edm", noise=EDM, sigmas=ends)
    own = any(config.get(key, value) != value for key, value in _SCHEDULER_OF_STABLE_DIFFUSION.items()) or config.get(
        "trained_betas"
    )
    noise = OTHER if own else ZERO_SNR if config.get("rescale_betas_zero_snr") is True else DISCRETE
    if prediction is None and noise == DISCRETE:
        return None
    return ModelSampling(prediction=prediction or "eps", noise=noise)


def _of_metadata(metadata: Mapping[str, str]) -> ModelSampling | None:
    """Sampling from the metadata that this library, ModelSpec and ComfyUI's own savers write."""
    if (text := metadata.get(_METADATA)) is not None:
        try:
            fields: dict[str, Any] = json.loads(text)
            fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
            return ModelSampling(**fields)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its metadata {_METADATA} is damaged ({error}); download the file again") from error
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if (prediction := _WORDS.get(metadata.get(key, ""))) is not None:
            return ModelSampling(prediction=prediction, noise=FLOW if prediction == "flow" else DISCRETE)
    return None
