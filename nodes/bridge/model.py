"""What the core needs to know of a MODEL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...distill_core.base.storage import fingerprint
from ...distill_core.diffusion.schedule import NoiseSchedule
from ...distill_core.networks import files
from ...distill_core.networks.architecture import Architecture
from ...distill_core.networks.layouts import layout_named
from ...distill_core.networks.model_sampling import ModelSampling
from ...distill_core.networks.name_map import NameMap
from ...distill_core.networks.network import Network, NetworkFile
from ...distill_core.networks.residuals import KeptResiduals, kept_in
from ...distill_core.networks.transformers.architecture import Transformer
from ...distill_core.pruning.plan import PruningPlan, plan_between, plan_in
from ...distill_core.pruning.prune import mapping_between
from .demo import DemoModelConfig
from .router import ROUTE
from .sampling import sampling_identity, sampling_of, schedule_of
from .weights import patched_weights, stored_shapes, stored_weights, weights_of

ORIGIN = "distill_origin"  # attachment of a MODEL: its Origin
LDM = layout_named("ldm")


class Model:
    """A MODEL in the core's terms. What is costly to read is read when first asked for, and only once."""

    def __init__(self, patcher: ModelPatcher):
        self.patcher = patcher

    @cached_property
    def network(self) -> Network:
        """What it is made of; ``ValueError`` if it is routed, or neither a UNet of Stable Diffusion nor a known transformer."""
        self._check_not_routed()
        network, head_channels = (
            self.patcher.model.diffusion_model,
            self.patcher.model.model_config.unet_config.get("num_head_channels", -1),
        )
        try:
            if found := Transformer.find(stored_shapes(network)):
                return found[0]
            return Architecture.from_state_dict(weights_of(network), head_channels if head_channels > 0 else "unknown")
        except ValueError as error:
            raise ValueError(f"this MODEL ({self.kind}) cannot be pruned or distilled here: {error}") from error

    @property
    def pixels_per_latent(self) -> int:
        """How many times smaller its latents are than images, on each side: Flux.2's are a sixteenth, most others an eighth."""
        return getattr(self.patcher.model.latent_format, "spacial_downscale_ratio", 8)

    @property
    def has_frames(self) -> bool:
        """Whether it draws images as videos of one frame, as Qwen-Image does, so that its latents are (B, C, 1, H, W)."""
        return self.patcher.model.latent_format.latent_dimensions == 3

    def scaled(self, samples: Tensor) -> Tensor:
        """A LATENT's samples as its sampler scales them, without frames: (B, C, H, W). ``ValueError`` for videos."""
        if samples.ndim == 5 and samples.shape[2] != 1 or samples.ndim not in (4, 5):
            raise ValueError(
                f"latents must be of images, (B, C, H, W), or of one frame each, got {tuple(samples.shape)}; models cannot be trained on "
                "videos here"
            )
        flat = samples.squeeze(2) if samples.ndim == 5 else samples
        scaled = self.patcher.model.process_latent_in(flat.unsqueeze(2) if self.has_frames else flat)
        return scaled.squeeze(2) if self.has_frames else scaled

    def unscaled(self, latents: Tensor) -> Tensor:
        """The samples of a LATENT, with a frame if it needs one, from what `scaled` gives."""
        return self.patcher.model.process_latent_out(latents.unsqueeze(2) if self.has_frames else latents)

    @property
    def kind(self) -> str:
        """ComfyUI's name for what it is."""
        return type(self.patcher.model).__name__

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture of its UNet; ``ValueError`` as for `network`, and for a transformer."""
        if not isinstance(self.network, Architecture):
            raise ValueError(
                f"this MODEL is a transformer ({self.network.title}), and this node takes UNets of SD1.x, SD2 and SDXL; for transformers "
                "there are Analyse Transformer Blocks, Prune Transformer Blocks and Distill Train Step"
            )
        return self.network

    @cached_property
    def transformer(self) -> Transformer:
        """Its transformer; ``ValueError`` as for `network`, and for a UNet."""
        if not isinstance(self.network, Transformer):
            raise ValueError(
                f"this MODEL is a UNet ({self.network.title}), and this node takes transformers; use Prune UNet Blocks or Analyse UNet "
                "Blocks"
            )
        return self.network

    @cached_property
    def known_transformer(self) -> Transformer | None:
        """Its transformer, None if it is a UNet or of a family that is not known; ``ValueError`` if the MODEL is routed."""
        self._check_not_routed()
        try:
            return self.network if isinstance(self.network, Transformer) else None
        except ValueError:
            return None

    @cached_property
    def unet(self) -> Architecture | None:
        """The architecture, or None if `architecture` cannot read it (another family); ``ValueError`` if the MODEL is routed."""
        self._check_not_routed()
        try:
            return self.architecture
        except ValueError:
            return None

    def _check_not_routed(self) -> None:
        if self.patcher.get_attachment(ROUTE) is not None:
            raise ValueError("this MODEL is routed: it holds several models; connect one of them instead")

    @cached_property
    def fingerprint(self) -> str:
        """A text that identifies its weights; see `storage.fingerprint`."""
        with torch.inference_mode():
            return fingerprint(self._weights())

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights on the CPU, with its patches (LoRA): by canonical names for a UNet, by ComfyUI's for other networks.

        Quantised weights of a UNet come in the precision they compute in (``ValueError`` if they cannot be read), those of
        other networks as they are stored.
        """
        with torch.inference_mode():  # the mode ComfyUI's loaders made the weights in
            return {name: weight.to("cpu") for name, weight in self._weights().items()}

    def _weights(self) -> dict[str, Tensor]:
        # Clones share one network: it may hold the patches of another MODEL until this one is loaded.
        comfy.model_management.load_models_gpu([self.patcher])
        if not self.unet:
            return stored_weights(self.patcher)
        weights = patched_weights(self.patcher)
        names = LDM.to_canonical(weights)
        return {names[name]: weight for name, weight in weights.items()}

    @cached_property
    def sampling(self) -> ModelSampling:
        """How it is sampled, with its patches; see `sampling.sampling_of`."""
        return sampling_of(self.patcher)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """Noise levels of its timesteps."""
        return schedule_of(self.patcher)

    @cached_property
    def sampling_identity(self) -> str:
        """A text that identifies how it samples; ``ValueError`` for a MODEL that cannot be trained."""
        return sampling_identity(self.patcher, self.prediction)

    @cached_property
    def identity(self) -> str:
        """A text that identifies what it predicts: its weights and how it samples."""
        return f"{self.fingerprint} {self.sampling_identity}"

    @cached_property
    def prediction(self) -> str:
        """What it predicts, "flow" for flows of any shift; ``ValueError`` for a MODEL that cannot be trained."""
        if self.sampling.prediction == "flow" and hasattr(self.patcher.get_model_object("model_sampling"), "sigmas"):
            return "flow"
        self.sampling.check_trainable()
        return self.sampling.prediction

    @property
    def origin(self) -> Origin | None:
        """Where it comes from if this pack pruned it; None for other MODELs."""
        return self.patcher.get_attachment(ORIGIN)

    @property
    def origin_metadata(self) -> dict[str, str]:
        """Metadata about its origin for files made from it, by the keys of `files.ORIGIN`; empty if it was not pruned here."""
        if self.origin is None:
            return {}
        return {key: self.origin.metadata[key] for key in files.ORIGIN if key in self.origin.metadata}

    @property
    def plan(self) -> PruningPlan | None:
        """The plan that pruned it; None if there is none."""
        return self.origin.plan if self.origin else None

    def plan_from(self, teacher: Model) -> PruningPlan | None:
        """The plan from a teacher to it, None if they have the same shape; ``ValueError`` if they do not belong together."""
        return plan_between(teacher.network, self.network, self.plan)

    def mapping_from(self, teacher: Model) -> NameMap:
        """Name map from a teacher to it; ``ValueError`` if they do not belong together."""
        return mapping_between(teacher.network, self.network, self.origin.metadata if self.origin else {})


@dataclass(frozen=True)
class Origin:
    """The origin of a student: plan, what takes a ControlNet's residuals, and metadata."""

    plan: PruningPlan
    """The plan that pruned it."""
    kept: KeptResiduals
    """Which of its teacher's residuals it takes."""
    metadata: Mapping[str, str]
    """What its file records about its teacher."""

    @classmethod
    def of_file(cls, file: NetworkFile) -> Origin | None:
        """The origin in the metadata of a file that this pack pruned; None for other files."""
        plan, kept = plan_in(file.metadata), kept_in(file.metadata)
        if plan is None or kept is None:
            return None
        return cls(plan, kept, {name: text for name, text in file.metadata.items() if name.startswith("distill.")})


def vae_and_text_encoders(model: Model, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> dict[str, Tensor]:
    """The weights of a full checkpoint besides the UNet, by LDM names, on the CPU."""
    config = model.patcher.model.model_config
    if isinstance(config, DemoModelConfig):
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
