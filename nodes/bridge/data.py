"""LATENTs and CONDITIONINGs as training data, and a teacher's own data as LATENTs and CONDITIONINGs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ...distill_core.base.storage import fingerprint
from ...distill_core.data.cache import CachedDataset, text_key
from ...distill_core.data.dataset import Bucket, Dataset, LatentDataset
from ...distill_core.data.teacher_data import GenerationSettings, make_dataset
from ...distill_core.diffusion.conditioning import Caption, Label, tile, tiled_length
from ...distill_core.diffusion.denoiser import Denoiser
from ...distill_core.training.previews import Previews
from ...distill_core.training.settings import TrainingSettings
from .asking import EMPTY_LATENTS, check_one_each
from .images import pixels_of
from .model import Model
from .shared_base import check_base, in_own_pixels, opened_base
from .training import check_trainable, denoiser

STATES = "distill_states"  # in a LATENT: noisy states of the teacher's sampling (B, K, C, H, W), and their timesteps
TIMESTEPS = "distill_timesteps"
OF_STATES = "distill_states_of"  # identifies the samples they lead to
SCALES = "distill_scales"  # the guidance scale each was sampled with, (B,)
STORED = "fp16"  # precision on disk
NUM_PREVIEWS = 4
LEAST_PARAMETERS = 50_000_000
"""Of models that are not the demo's."""
GUIDED_THEMSELVES = ("flux1", "flux2", "z-image")
"""Families whose most used models take the scale as an input, or have learnt it."""


def dataset(latents: list[dict], positive: list, null_caption: list | None, model: Model) -> LatentDataset:
    """Training data from ComfyUI's lists: one LATENT with many images, many LATENTs with one each, or buckets of several.

    Latents are scaled once, as by the model's sampler; latents of one size, with captions of one length, form a bucket.
    ``ValueError`` if they do not fit the model, or the number of captions differs.
    """
    timesteps = next((entry[TIMESTEPS] for entry in latents if TIMESTEPS in entry), None)
    if any(not torch.equal(entry.get(TIMESTEPS, torch.zeros(0)), timesteps) for entry in latents if timesteps is not None):
        raise ValueError("all latents must store the same trajectory steps; use one dataset")
    captions = _captions([*positive, *(null_caption or [])], model)
    null = captions.pop() if null_caption else None
    if null is not None:
        _check_one_length([*captions, null], "leave null_caption unconnected, or ")
    buckets = _buckets(latents, captions, model)
    return LatentDataset(buckets, null and Caption(null.context.clone(), null.pooled), timesteps)


def encoded_captions(positive: list, null_caption: list, model: Model) -> tuple[list[Caption], Caption]:
    """Captions, and the empty caption or negative prompt, at one token length; ``ValueError`` if they do not fit the model."""
    encoded = _captions([*positive, *null_caption], model)
    _check_one_length(encoded)
    *captions, null = (Caption(caption.context, caption.pooled) for caption in encoded)
    return captions, null


def num_captions(positive: list, model: Model) -> int:
    """How many captions ComfyUI's list holds."""
    return len(_captions(positive, model))


def blank_latents(model: Model, width: int, height: int, count: int) -> dict:
    """A LATENT without images, for training that needs none. width, height: in pixels."""
    height, width = (side // model.pixels_per_latent for side in (height, width))
    return {"samples": torch.zeros(count, _reads(model).channels, height, width)}


def _check_one_length(captions: list[_Encoded], way_out: str = "") -> None:
    """``ValueError`` for captions of a transformer that cannot stand in for one another."""
    if len({len(caption.context) for caption in captions}) > 1:
        raise ValueError(
            "the captions and the empty one are encoded to different lengths, which this family of models cannot exchange; "
            f"{way_out}give captions with equally many tokens"
        )


def calibration(
    latents: list[dict], positive: list, model: Model, num_examples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Label | None]:
    """A few random latents with their captions' conditioning: (B, C, H, W), (B, L, D), and the label of an SDXL.

    All have one size: the most frequent one.
    """
    bucket = max(_buckets(latents, _captions(positive, model), model), key=lambda bucket: len(bucket.latents))
    if not bucket.latents.any():
        raise ValueError(EMPTY_LATENTS)
    return bucket.read(torch.randperm(len(bucket.latents), generator=generator)[:num_examples])[:3]


def check_samples(settings: TrainingSettings, vae: comfy.sd.VAE | None, null_caption: list | None) -> None:
    """``ValueError`` if a run makes sample images and lacks what they need."""
    if settings.sample_every_steps and (vae is None or not null_caption):
        what = "a VAE" if vae is None else "null_caption (the empty prompt, encoded)"
        raise ValueError(
            f"sample_every_steps asks for sample images, which need {what}; connect it, or set sample_every_steps to 0"
        )


def previews(data: Dataset, vae: comfy.sd.VAE, model: Model, *, stays: bool = False) -> Previews:
    """Sample images of a few captions while a run trains; see `check_samples`.

    stays: whether all that is loaded must stay so, since it is being trained.
    """
    assert data.null is not None  # checked
    examples = data.read(0, torch.arange(NUM_PREVIEWS) * data.bucket_sizes[0] // NUM_PREVIEWS)
    _, channels, height, width = examples.latents.shape
    pooled = [None] * len(examples.contexts) if examples.label is None else examples.label.pooled
    captions = [Caption(context, of_caption) for context, of_caption in zip(examples.contexts, pooled, strict=True)]

    def decode(latents: Tensor) -> Tensor:
        with nothing_unloaded() if stays else contextlib.nullcontext():
            images = vae.decode(model.unscaled(latents))
            return pixels_of(images.flatten(0, 1) if images.ndim == 5 else images)

    return Previews(
        captions=captions,
        null=data.null,
        latent_shape=(channels, height, width),
        decode=decode,
        guidance=_guidance(model),
    )


@contextlib.contextmanager
def nothing_unloaded() -> Iterator[None]:
    """While open, ComfyUI does not know of the MODELs that are loaded, so it unloads none to make room; those it loads meanwhile
    are unloaded at the end. A VAE that lacks room decodes in tiles."""
    loaded = comfy.model_management.current_loaded_models
    before = list(loaded)
    loaded.clear()
    try:
        yield
    finally:
        comfy.model_management.unload_all_models()
        loaded.extend(before)


def _guidance(model: Model) -> float:
    """The scale at which models of this kind sample well."""
    network = model.unet or model.known_transformer
    if network and network.num_parameters < LEAST_PARAMETERS:
        return 3.0  # the demo's
    if model.unet is not None:
        return 7.0
    return 1.0 if network and network.family in GUIDED_THEMSELVES else 4.0


class _Reads(NamedTuple):
    """The inputs a MODEL reads; None where any value works."""

    channels: int
    context_width: int | None
    labelled: bool | None
    """Whether the MODEL needs a pooled output with each caption."""


def _reads(model: Model) -> _Reads:
    architecture = model.unet
    if architecture is None:  # a LoRA can still be trained on it
        return _Reads(model.patcher.model.latent_format.latent_channels, None, None)
    return _Reads(architecture.channels("conv_in")[0], architecture.context_width, bool(architecture.label_width))


class _Encoded(NamedTuple):
    """One caption with everything its conditioning holds."""

    context: Tensor
    pooled: Tensor | None
    options: dict

    def sizes(self, height: int, width: int) -> list[int]:
        """SDXL's six size numbers, by default those of the image itself."""
        options = self.options
        height, width = options.get("height", height), options.get("width", width)
        target = options.get("target_height", height), options.get("target_width", width)
        return [height, width, options.get("crop_h", 0), options.get("crop_w", 0), *target]


def _captions(conditioning: list, model: Model) -> list[_Encoded]:
    """Captions of all conditioning; those of UNets at one length, as repeating a context does not change their prediction."""
    reads = _reads(model)
    encoded = _encoded(conditioning, reads)
    if reads.context_width is None:
        return encoded
    length = tiled_length([len(caption.context) for caption in encoded])
    return [caption._replace(context=tile(caption.context, length)) for caption in encoded]


def _encoded(conditioning: list, reads: _Reads) -> list[_Encoded]:
    """Captions of all conditioning; ``ValueError`` if they do not fit what the model reads."""
    encoded = []
    for embedding, options in (entry for one in conditioning for entry in one):
        if reads.context_width not in (None, embedding.shape[-1]):
            raise ValueError(
                f"the captions' conditioning is {embedding.shape[-1]} wide but the model reads {reads.context_width}; "
                "encode the captions with the model's own CLIP"
            )
        pooled = None if reads.labelled is False else options.get("pooled_output")
        if reads.labelled and pooled is None:
            raise ValueError("the captions' conditioning has no pooled output; encode the captions with the model's own CLIP")
        for i, context in enumerate(embedding.float().cpu()):
            encoded.append(_Encoded(context, None if pooled is None else pooled[min(i, len(pooled) - 1)].float().cpu(), options))
    if len({caption.pooled is None for caption in encoded}) > 1:
        raise ValueError("some captions have a pooled output and some not; encode all of them with the model's own CLIP")
    return encoded


def _buckets(latents: list[dict], captions: list[_Encoded], model: Model) -> list[Bucket]:
    """Latents by size and length of their caption; ``ValueError`` if they do not fit the model."""
    wanted = _reads(model).channels
    for samples in (entry["samples"] for entry in latents):
        if samples.shape[1] != wanted:
            raise ValueError(
                f"the latents have {samples.shape[1]} channels but the model takes {wanted}; "
                "encode the images with the model's own VAE, and do not use inpainting models"
            )
    num_latents = sum(len(entry["samples"]) for entry in latents)
    check_one_each(num_latents, len(captions))
    by_shape: dict[tuple[int, int, int], list[tuple[Tensor, Tensor | None, Tensor | None, _Encoded]]] = {}
    encoded = iter(captions if len(captions) > 1 else captions * num_latents)
    for entry in latents:
        samples = model.scaled(entry["samples"].float().cpu())
        states, scales = (entry.get(name, [None] * len(samples)) for name in (STATES, SCALES))
        if STATES in entry and entry.get(OF_STATES) != fingerprint({"samples": entry["samples"]}):
            raise ValueError(
                "the latents have trajectories, but another node changed them after Teacher Dataset, so that the trajectories do not "
                "belong to them; connect Teacher Dataset directly, or set its trajectory_states to 0"
            )
        for example in zip(samples, states, scales, islice(encoded, len(samples)), strict=True):
            by_shape.setdefault((*samples.shape[2:], len(example[-1].context)), []).append(example)
    return [
        _bucket(examples, 8 * height, 8 * width, one_for_all=len(captions) == 1)
        for (height, width, _), examples in by_shape.items()
    ]


def _bucket(
    examples: list[tuple[Tensor, Tensor | None, Tensor | None, _Encoded]], height: int, width: int, one_for_all: bool
) -> Bucket:
    latents, states, scales, captions = zip(*examples, strict=True)
    sizes = [caption.sizes(height, width) for caption in captions]
    captions = captions[:1] if one_for_all else captions
    labelled = captions[0].pooled is not None
    return Bucket(
        latents=torch.stack(latents),
        contexts=torch.stack([caption.context for caption in captions]),
        pooled=torch.stack([caption.pooled for caption in captions]) if labelled else None,
        sizes=torch.tensor(sizes, dtype=torch.float32) if labelled else None,
        states=None if states[0] is None else torch.stack(states),
        scales=None if any(scale is None for scale in scales) else torch.stack(scales),
    )


class ClipEncoders:
    """The text encoders of a CLIP, with its LoRA and clip skip."""

    def __init__(self, clip: comfy.sd.CLIP, reads: _Reads):
        self._clip, self._reads = clip, reads
        with torch.inference_mode():
            patcher = clip.load_model()
            weights = {name: weight.to("cpu").detach() for name, weight in patcher.model_state_dict_for_saving().items()}
            self.fingerprint = f"{fingerprint(weights)} {clip.layer_idx}"

    def captions(self, captions: list[str]) -> list[Caption]:
        encoded = [self._clip.encode_from_tokens_scheduled(self._clip.tokenize(caption)) for caption in captions]
        return [Caption(caption.context, caption.pooled) for caption in _encoded(encoded, self._reads)]


def make_data(
    teacher: Model,
    clip: comfy.sd.CLIP,
    prompts: list[str],
    generation: GenerationSettings,
    folder: Path,
    batch_size: int,
    on_caption: Callable[[int, int], None],
    on_step: Callable[[int, int], None],
) -> tuple[list[dict], list, list]:
    """Images a teacher samples: one LATENT and CONDITIONING each, in the order of the prompts, and the empty prompt's CONDITIONING.

    Images that are already in the folder are not sampled again; see `teacher_data.make_dataset`.
    """
    is_transformer = teacher.known_transformer is not None
    if is_transformer:
        check_base(teacher)
        generation = in_own_pixels(generation, teacher)
    else:
        check_trainable(teacher)
    encoders = ClipEncoders(clip, _reads(teacher))
    with contextlib.ExitStack() as stack:

        def load() -> Denoiser:
            if is_transformer:
                return stack.enter_context(opened_base(teacher))
            height, width = (side // 8 for side in generation.size)
            return denoiser(teacher, batch_shape=(2 * batch_size, teacher.architecture.channels("conv_in")[0], height, width))

        data = make_dataset(
            load,
            teacher.identity,
            encoders,
            prompts,
            generation,
            folder,
            schedule=teacher.schedule,
            batch_size=batch_size,
            dtype=STORED,
            one_length=is_transformer,
            on_caption=on_caption,
            on_step=on_step,
        )
    assert data.null is not None  # encoded with the prompts
    return *_in_order(data, prompts, encoders, teacher), _conditioning(data.null.context.float(), data.null.pooled)


def _in_order(data: CachedDataset, prompts: list[str], encoders: ClipEncoders, teacher: Model) -> tuple[list, list]:
    """LATENT and CONDITIONING of each example, in the order of the prompts; examples of one prompt share a CONDITIONING."""
    order = {text_key(prompt.strip(), encoders.fingerprint, STORED): number for number, prompt in enumerate(prompts)}
    latents, captions, of_text = [], [], {}
    for number in sorted(range(len(data.entries)), key=lambda number: order[data.entries[number].text]):
        example, text = data.read(0, torch.tensor([number])), data.entries[number].text
        samples = teacher.unscaled(example.latents.float())
        latent: dict[str, Any] = {"samples": samples}
        if example.states is not None:
            latent |= {STATES: example.states, TIMESTEPS: data.timesteps, OF_STATES: fingerprint({"samples": samples})}
        if example.scale is not None:
            latent[SCALES] = example.scale
        if text not in of_text:
            of_text[text] = _conditioning(example.contexts[0].float(), example.label and example.label.pooled[0].float())
        latents.append(latent)
        captions.append(of_text[text])
    return latents, captions


def _conditioning(context: Tensor, pooled: Tensor | None) -> list:
    return [[context[None], {} if pooled is None else {"pooled_output": pooled[None].float()}]]
