"""Comparison of any MODELs, each sampled as by KSampler, and evaluation of their images with the user's CLIP models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.sd2_clip
import comfy.utils
import latent_preview
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...distill_core.base.settings import SEEDS, check_settings, setting
from ...distill_core.diffusion.macs import counted_macs
from ...distill_core.evaluation.compare import NUM_BINS, NUM_WARM_UPS
from ...distill_core.evaluation.comparison import Comparison, Measured
from ...distill_core.evaluation.measuring import device_words, each_round, synchronize, watched_memory
from .asking import at_levels, even_levels
from .images import pixels_of, to_images
from .interface import throw_if_cancelled
from .progress import Progress
from .training import PLAIN_ATTENTION

KEY = "distill_compare"  # key of the wrappers that measure
NUM_EXAMPLES = 8  # images that the distances are measured on
CLIP_BATCH = 16
PROJECTING = (comfy.sdxl_clip.SDXLClipG, comfy.text_encoders.sd2_clip.SD2ClipHModel)
"""Text encoders whose files have CLIP's projection. If a file lacks it, ComfyUI leaves the matrix uninitialised or sets it to 1."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What every model samples: the conditioning, the latents, and the settings of KSampler."""

    positive: list
    negative: list
    latent: Mapping[str, Any]
    """LATENT for one seed."""
    vae: comfy.sd.VAE
    seed: int = setting(within=(0, SEEDS[1]))
    num_seeds: int = setting(within=(1, 10_000))
    steps: int = setting(within=(1, 10_000))
    cfg: Sequence[float] = setting(within=(0, 100))
    """One per model."""
    sampler_name: str
    scheduler: str

    def __post_init__(self):
        check_settings(self)

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def num_parts(self) -> int:
        """Number of parts in which the distance of a bin is measured, so that no part is larger than a sampled batch."""
        count = len(self.latent["samples"])
        return math.ceil(min(NUM_EXAMPLES, self.num_seeds * count) / count)

    @property
    def places(self) -> list[str]:
        """Labels of a model's images: seed, and place in the batch."""
        count = len(self.latent["samples"])
        return [f"seed {seed}" + f" #{n + 1}" * (count > 1) for seed in self.seeds for n in range(count)]


def compare_models(models: Mapping[str, ModelPatcher], settings: SampleSettings, node_id: str) -> Comparison:
    """Sample every model from the same noise, and measure what that costs; the given MODELs do not change.

    Distances compare what the sampler receives, guidance included: the noise, or the velocity of a flow. ``ValueError`` for
    models that do not share latents.
    """
    _check(models, settings)
    of_each = 1 + NUM_WARM_UPS + settings.num_seeds * settings.steps + NUM_BINS * settings.num_parts
    progress = Progress(node_id, total=len(models) * of_each)
    candidates = [
        Candidate(name=name, model=model, cfg=cfg, settings=settings, progress=progress)
        for (name, model), cfg in zip(models.items(), settings.cfg, strict=True)
    ]
    for candidate in candidates:
        candidate.prepare()
    seconds = each_round([candidate.draw for candidate in candidates], settings.num_seeds)
    first, *_ = candidates
    examples = torch.cat(first.latents)[:NUM_EXAMPLES]
    reference, measured = first.predictions(examples, first.model), []
    for candidate, of_rounds in zip(candidates, seconds, strict=True):
        predictions = reference if candidate is first else candidate.predictions(examples, first.model)
        measured.append(
            Measured(
                name=candidate.name,
                parameters=candidate.num_parameters,
                weight_bytes=candidate.weight_bytes,
                gmacs=candidate.macs / 1e9,
                ms_of_rounds=tuple(1000 * of_a_step for of_a_step in of_rounds),
                peak_bytes=candidate.peak_bytes,
                steps_per_image=settings.steps / len(settings.latent["samples"]),
                distances=None
                if predictions is None or reference is None
                else tuple((ours - theirs).square().mean().item() for ours, theirs in zip(predictions, reference, strict=True)),
            )
        )
    images = {candidate.name: candidate.images() for candidate in candidates}
    return Comparison(
        models=tuple(measured), settings=_settings(candidates, images[first.name]), images=images, seeds=settings.places
    )


def _check(models: Mapping[str, ModelPatcher], settings: SampleSettings) -> None:
    (first, model), *others = models.items()
    form, latents = model.model.latent_format, settings.latent["samples"]
    if form.latent_dimensions not in (2, 3):
        raise ValueError(f"{first} ({type(model.model).__name__}) is not an image model; only image models can be compared")
    if latents.ndim > 4 and latents.shape[2] > 1:  # Qwen-Image and others draw images as videos of one frame
        raise ValueError(
            f"the latents have {latents.shape[2]} frames; only single images can be compared: use Empty Latent Image"
        )
    for name, other in others:
        theirs = other.model.latent_format
        if type(theirs) is not type(form):
            names = " and ".join(type(one).__name__ for one in (theirs, form))
            raise ValueError(f"{name} does not go with {first}: their latents differ ({names}); compare models of one family")


def _settings(candidates: Sequence[Candidate], images: Tensor) -> dict[str, str]:
    settings, device = candidates[0].settings, candidates[0].device
    guidance = {candidate.name: f"{candidate.cfg:g}" for candidate in candidates}
    precisions = {candidate.name: str(candidate.model.model_dtype()).removeprefix("torch.") for candidate in candidates}
    return {
        "device": device_words(device),
        "precision": _each(precisions),
        "images": f"{images.shape[3]} x {images.shape[2]} px, {len(settings.latent['samples'])} in a batch",
        "seeds": f"{settings.seed}" if settings.num_seeds == 1 else f"{settings.seeds[0]} to {settings.seeds[-1]}",
        "sampling": f"{settings.sampler_name}, {settings.scheduler}, {settings.steps} steps",
        "cfg": _each(guidance),
        "distance": f"{min(NUM_EXAMPLES, len(images))} images by {candidates[0].name} with added noise, in {NUM_BINS} bins of "
        "timesteps",
    }


def _each(words: Mapping[str, str]) -> str:
    """One word if all are the same, else one per name."""
    same = len({*words.values()}) == 1
    return next(iter(words.values())) if same else ", ".join(f"{name}: {word}" for name, word in words.items())


@dataclass(kw_only=True)
class Candidate:
    """One model, the images it made, and what they cost."""

    name: str
    model: ModelPatcher
    cfg: float
    settings: SampleSettings
    progress: Progress
    latents: list[Tensor] = field(default_factory=list)
    """One batch per seed."""
    macs: float = 0.0
    """For one evaluation of one image; the mean over all evaluations if several networks take turns."""
    num_parameters: int = 0
    """Of all networks that ran."""
    weight_bytes: int = 0
    peak_bytes: int = 0

    @property
    def device(self) -> torch.device:
        return self.model.load_device

    def prepare(self) -> None:
        """Count the multiply-accumulates of an evaluation, warm up, and measure the memory of a step."""
        self.progress.tell(f"measuring {self.name}")
        networks = _Networks()
        counted = _wrapped(self.model, WrappersMP.APPLY_MODEL, networks)
        options = counted.model_options.get("transformer_options", {})
        counted.model_options["transformer_options"] = options | PLAIN_ATTENTION
        self._sample(counted, self.settings.latent["samples"][:1], self.settings.seed, "euler", cfg=1.0)
        weights = networks.weights  # not kept: ComfyUI removes those that a LoRA patches from the network again
        self.macs, self.num_parameters = networks.mean_macs, sum(weight.numel() for weight in weights)
        self.weight_bytes = sum(weight.nbytes for weight in weights)
        self.progress.add()

        def watch(executor, *args, **kwargs):
            with_it = (model for models in self.model.additional_models.values() for model in models)
            loaded = {id(model.model): model.loaded_size() for model in (self.model, *with_it)}
            on_device = sum(loaded.values()) if self.device.type == "cuda" else self.weight_bytes
            with watched_memory(self.device, weights) as peak:
                result = executor(*args, **kwargs)
            self.peak_bytes = on_device + peak.num_bytes
            return result

        watched = _wrapped(self.model, WrappersMP.SAMPLER_SAMPLE, watch)
        steps = NUM_WARM_UPS if networks.count == 1 else self.settings.steps  # every network of a routed MODEL must run
        self._sample(watched, self.settings.latent["samples"], self.settings.seed, self.settings.sampler_name, steps=steps)
        self.progress.add(NUM_WARM_UPS)

    def draw(self) -> float:
        """Sample the images of the next seed; returns the seconds per step."""
        settings, begun, aside, spent = self.settings, self.progress.done, 0.0, 0.0
        seed = settings.seeds[len(self.latents)]
        self.progress.tell(f"{self.name}, seed {seed}")
        previewer = latent_preview.get_previewer(self.device, self.model.model.latent_format)

        def show(step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
            nonlocal aside
            synchronize(self.device)
            started = time.perf_counter()
            self.progress.add(preview=previewer and previewer.decode_latent_to_preview_image("JPEG", x0))
            aside += time.perf_counter() - started

        def clock(executor, *args, **kwargs):
            nonlocal spent
            synchronize(self.device)
            started = time.perf_counter()
            result = executor(*args, **kwargs)
            synchronize(self.device)
            spent = time.perf_counter() - started
            return result

        timed = _wrapped(self.model, WrappersMP.SAMPLER_SAMPLE, clock)
        self.latents.append(self._sample(timed, settings.latent["samples"], seed, settings.sampler_name, callback=show))
        self.progress.add(begun + settings.steps - self.progress.done)  # some samplers report another number of steps
        return (spent - aside) / settings.steps

    def images(self) -> Tensor:
        """The sampled images, (N, 3, H, W) in [-1, 1], float16."""
        made = []
        for latents in self.latents:
            throw_if_cancelled()
            images = self.settings.vae.decode(latents)
            made.append(pixels_of(images.flatten(0, -4)).half())
        return torch.cat(made)

    def _sample(
        self,
        model: ModelPatcher,
        latents: Tensor,
        seed: int,
        sampler_name: str,
        *,
        steps: int | None = None,
        cfg: float | None = None,
        callback: Callable | None = None,
    ) -> Tensor:
        """Sample as KSampler does."""
        settings = self.settings
        ratios = (settings.latent.get(f"downscale_ratio_{of}") for of in ("spacial", "temporal"))
        latents = comfy.sample.fix_empty_latent_channels(model, latents, *ratios)
        return comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(latents, seed, settings.latent.get("batch_index")),
            settings.steps if steps is None else steps,
            self.cfg if cfg is None else cfg,
            sampler_name,
            settings.scheduler,
            settings.positive,
            settings.negative,
            latents,
            noise_mask=settings.latent.get("noise_mask"),
            callback=callback,
            disable_pbar=True,
            seed=seed,
        )

    def predictions(self, latents: Tensor, first: ModelPatcher) -> list[Tensor] | None:
        """The predicted noise, or a flow's velocity, in the middle of each bin of timesteps, the least noisy first.

        None if this model and the first one use incompatible noise schedules.
        """
        sampling, firsts = (model.get_model_object("model_sampling") for model in (self.model, first))
        if isinstance(sampling, comfy.model_sampling.CONST) != isinstance(firsts, comfy.model_sampling.CONST):
            self.progress.add(NUM_BINS * self.settings.num_parts)
            return None
        self.progress.tell(f"{self.name}, distance")
        sigmas, settings = even_levels(first, NUM_BINS), self.settings
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(settings.seed))
        parts: list[list[Tensor]] = []

        def visit(predict: Callable[[], Tensor]) -> None:
            parts[-1].append(predict())
            self.progress.add()

        size = len(settings.latent["samples"])
        for part, its_noise in zip(latents.split(size), noise.split(size), strict=True):
            parts.append([])
            at_levels(
                self.model,
                part,
                its_noise,
                sigmas,
                positive=settings.positive,
                negative=settings.negative,
                cfg=self.cfg,
                seed=settings.seed,
                visit=visit,
            )
        return [torch.cat(predictions) for predictions in zip(*parts, strict=True)]


def _wrapped(model: ModelPatcher, kind: str, wrapper: Callable) -> ModelPatcher:
    copy = model.clone()
    copy.add_wrapper_with_key(kind, KEY, wrapper)
    return copy


class _Networks:
    """A wrapper around ``apply_model`` that counts the MACs of each network in its first evaluation, and how often each runs.

    Later evaluations return zeros, so sampling with this wrapper gives no image.
    """

    def __init__(self):
        self._models: dict[int, BaseModel] = {}
        self._macs: dict[int, float] = {}
        self._asked: list[int] = []

    def __call__(self, executor, x: Tensor, *args, **kwargs) -> Tensor:
        model = executor.class_obj
        key = id(model.diffusion_model)
        self._asked.append(key)
        if key in self._macs:
            return torch.zeros_like(x)
        with counted_macs() as count:
            result = executor(x, *args, **kwargs)
        self._models[key], self._macs[key] = model, count() / len(x)
        return result

    @property
    def count(self) -> int:
        return len(self._models)

    @property
    def mean_macs(self) -> float:
        return sum(self._macs[key] for key in self._asked) / len(self._asked)

    @property
    def weights(self) -> list[Tensor]:
        return [weight for model in self._models.values() for weight in model.diffusion_model.parameters()]


# --- evaluation of images -------------------------------------------------------------------------------------------


def image_features(
    clip_vision: comfy.clip_vision.ClipVisionModel, images: Tensor, on_batch: Callable[[int], Any] = lambda count: None
) -> Tensor:
    """Embeddings (N, D) of images (N, 3, H, W). ``on_batch`` receives the size of each finished batch."""
    found = []
    for part in images.split(CLIP_BATCH):
        throw_if_cancelled()
        found.append(clip_vision.encode_image(to_images(part))["image_embeds"].float().cpu())
        on_batch(len(part))
    return torch.cat(found)


def text_features(clip: comfy.sd.CLIP, prompt: str, width: int) -> Tensor:
    """Embedding of a prompt in the space of CLIP's image embeddings, (width,); ``ValueError`` for a CLIP that has none."""
    pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)[1]
    encoders = [module for module in clip.cond_stage_model.modules() if isinstance(module, PROJECTING)]
    projected = [encoder for encoder in encoders if encoder.return_projected_pooled and _is_projection(encoder, pooled.shape[-1])]
    if not projected:
        raise ValueError(
            "clip: this text encoder came without CLIP's projection, as in SD1.x and Flux, so its texts cannot be compared with "
            "images; connect SDXL's CLIP with CLIP ViT-bigG as clip_vision, or SD2's with CLIP ViT-H"
        )
    if pooled.shape[-1] != width:
        raise ValueError(
            f"clip embeds texts in {pooled.shape[-1]} dimensions but clip_vision embeds images in {width}; connect the two "
            "halves of one CLIP, such as SDXL's CLIP and CLIP ViT-bigG"
        )
    return pooled[0].float().cpu()


def _is_projection(encoder: comfy.sd1_clip.SDClipModel, width: int) -> bool:
    """Whether an encoder projects to a width with a matrix from its file, not with ComfyUI's placeholder."""
    layer = getattr(encoder.transformer, "text_projection", None)
    if layer is None or layer.weight.shape[0] != width:
        return False
    weight = layer.weight.detach().float().cpu()
    return bool(weight.isfinite().all() and weight.any()) and not torch.equal(weight, torch.eye(*weight.shape))
