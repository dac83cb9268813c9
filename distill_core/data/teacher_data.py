"""Training data without a set of images: a list of prompts, from which the teacher generates them, or prompts alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.disk import check_room
from ..base.precision import DTYPES
from ..base.seeding import generator
from ..base.settings import BATCH, GUIDANCE, SAMPLER_STEPS, SEEDS, SIDE_PX, check_range, check_settings, setting
from ..base.storage import ignore
from ..diffusion.conditioning import Caption, conditions
from ..diffusion.denoiser import Denoiser, Load
from ..diffusion.sampling import sample, timesteps
from ..diffusion.schedule import NoiseSchedule
from .cache import CachedDataset, CacheWriter, Entry, fingerprint_of, key, text_key, writing
from .encoders import TextEncoders, pads, warn_of_cut
from .images import Size

MOST_IMAGES = 10_000_000  # a gigabyte of index
TELL_EVERY = 1000  # images that already exist
FEWEST_CHANNELS = 4  # of a latent


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How a teacher generates data."""

    size: Size
    """Height and width of the images, in pixels."""
    guidance: float = setting(7.5, "Classifier-free guidance scale.", within=GUIDANCE)
    guidance_min: float | None = None
    """Lowest of a range of scales up to ``guidance``. Each image and its trajectory get one, drawn uniformly, so that a range is
    trained on the states that each scale leads through (Perez Jensen and Sadat 2025, arXiv 2503.07274). None for one scale."""
    num_steps: int = setting(25, "Sampler steps.", within=SAMPLER_STEPS)
    num_per_prompt: int = setting(1, "Images for each prompt, from different noise.", within=(1, MOST_IMAGES))
    num_states: int = setting(0, "Noisy states stored for each image.", within=(0, SAMPLER_STEPS[1]))
    """They come from the teacher's own trajectory, to train on instead of adding noise. A guided student will see such states
    (Jensen et al. 2025, arXiv 2503.07274, Sec. 3.2). 0 stores none."""
    seed: int = setting(0, "Seed of the noise.", within=SEEDS)

    def __post_init__(self):
        check_settings(self)
        for name, side in zip(("height", "width"), self.size, strict=True):
            check_range(name, side, SIDE_PX)
        if self.num_states > self.num_steps:
            raise ValueError(f"num_states must be between 0 and the {self.num_steps} sampler steps, got {self.num_states}")
        if self.guidance_min is not None and not 1 <= self.guidance_min < self.guidance:
            raise ValueError(f"guidance_min must be between 1 and guidance {self.guidance:g}, got {self.guidance_min:g}")

    @property
    def scales(self) -> tuple[float, float]:
        """Lowest and highest guidance scale."""
        return self.guidance if self.guidance_min is None else self.guidance_min, self.guidance

    def scale(self, number: int, source: str) -> Tensor | None:
        """Guidance scale of an image, from its number and the source of its noise, (); None if all have one scale."""
        if self.guidance_min is None:
            return None
        share = torch.rand((), generator=generator(self.seed, number, f"scale {source}"))
        return self.guidance_min + (self.guidance - self.guidance_min) * share

    @property
    def words(self) -> list:
        """Values that an image depends on besides its caption and number, for its key."""
        values = {name: value for name, value in vars(self).items() if name != "guidance_min" or value is not None}
        return [*(values | {"num_per_prompt": None}).values()]

    def kept(self, schedule: NoiseSchedule) -> Tensor | None:
        """Timesteps of the stored states, evenly spaced among the sampler's, (K,)."""
        if not self.num_states:
            return None
        steps = timesteps(schedule, self.num_steps)
        return steps[torch.arange(self.num_states) * self.num_steps // self.num_states]


def make_latents(
    teacher: Denoiser,
    captions: Sequence[Caption],
    null: Caption,
    noise: Tensor,
    generation: GenerationSettings,
    scales: Tensor | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor | None]:
    """Latents (B, C, H, W) that the teacher generates for captions from noise, and states (B, K, C, H, W) on the way.

    scales: guidance scales, (B,), in place of the one in ``generation``.
    """
    kept, states = generation.kept(teacher.schedule), []
    if generation.scales == (1, 1):  # the empty caption is not asked for, and may have another length
        null = captions[0]
    context, label, null = conditions(captions, null, generation.size)
    latents = sample(
        teacher,
        context,
        null,
        noise=noise,
        label=label,
        num_steps=generation.num_steps,
        guidance=generation.guidance if scales is None else scales,
        on_step=on_step,
        on_state=lambda x_t, t: states.append(x_t.cpu()) if kept is not None and t in kept else None,
    )
    return latents.cpu(), torch.stack(states, 1) if states else None


def make_dataset(
    load_teacher: Load,
    teacher_fingerprint: str,
    encoders: TextEncoders,
    prompts: Sequence[str],
    generation: GenerationSettings,
    folder: Path | str,
    *,
    schedule: NoiseSchedule,
    batch_size: int = 8,
    dtype: str = "fp16",
    one_length: bool = False,
    on_caption: Callable[[int, int], None] = ignore,
    on_item: Callable[[int, int], None] = ignore,
    on_step: Callable[[int, int], None] = ignore,
) -> CachedDataset:
    """Dataset on disk of images that a teacher generates for prompts; only what is not in the folder yet is generated.

    Each image depends only on its prompt, its number and the seed, not on the others. schedule: the teacher's. dtype: as in
    `CacheWriter`. one_length: the teacher cannot be asked for captions of different lengths at once. The teacher is loaded once
    all prompts are encoded, so that it need not share memory with the encoders, and only if there is something to generate.
    ``on_caption(done, total)`` is called after each batch of prompts, ``on_item(done, total)`` before the first batch of images and
    after each, ``on_step`` likewise and after each step of sampling, with the steps of all images. If it is interrupted or
    killed, finished batches stay. ``ValueError`` without prompts.
    """
    check_range("batch_size", batch_size, BATCH)
    with writing(folder, dtype=dtype, padded=pads(encoders)) as writer:
        captions, null = _encoded(writer, encoders, prompts, batch_size, on_caption)
        return _drawn(
            writer,
            load_teacher,
            teacher_fingerprint,
            captions,
            null,
            generation,
            schedule,
            batch_size,
            on_item,
            on_step,
            one_length,
        )


def caption_dataset(
    encoders: TextEncoders,
    prompts: Sequence[str],
    latent_shape: tuple[int, int, int],
    size: Size,
    folder: Path | str,
    *,
    batch_size: int = 8,
    dtype: str = "fp16",
    on_caption: Callable[[int, int], None] = ignore,
) -> CachedDataset:
    """Dataset on disk of prompts without images, for training that needs none: all have one latent of zeros, (C, H, W).

    size: height and width in pixels that SDXL is told. Otherwise as `make_dataset`.
    """
    check_range("batch_size", batch_size, BATCH)
    with writing(folder, dtype=dtype, padded=pads(encoders)) as writer:
        captions, null = _encoded(writer, encoders, prompts, batch_size, on_caption)
        blank = key("blank", *latent_shape, writer.dtype)
        if not writer.has(blank):
            writer.add_latent(blank, torch.zeros(latent_shape))
        sizes = _sizes(writer.caption(null), size)
        return writer.finish([Entry(blank, text, sizes) for _, text in captions], null)


def _encoded(
    writer: CacheWriter,
    encoders: TextEncoders,
    prompts: Sequence[str],
    batch_size: int,
    on_caption: Callable[[int, int], None],
) -> tuple[list[tuple[str, str]], str]:
    """Prompts, each with the key of its caption, and the key of the empty caption; those not written yet are encoded."""
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("there are no prompts; give at least one")
    texts = {prompt: text_key(prompt, encoders.fingerprint, writer.dtype) for prompt in ["", *prompts]}
    missing = [prompt for prompt, name in texts.items() if not writer.has(name)]
    warn_of_cut(missing, encoders)
    for start in range(0, len(missing), batch_size):
        part = missing[start : start + batch_size]
        for prompt, caption in zip(part, encoders.captions(part), strict=True):
            writer.add_text(texts[prompt], caption)
        on_caption(start + len(part), len(missing))
    writer.flush()
    return [(prompt, texts[prompt]) for prompt in prompts], texts[""]


def _sizes(caption: Caption, size: Size) -> tuple[int, ...] | None:
    """What SDXL is told of an image's size; None for models that are not told."""
    return None if caption.pooled is None else (*size, 0, 0, *size)


def draw_dataset(
    load_teacher: Load,
    teacher_fingerprint: str,
    captions: Sequence[Caption],
    null: Caption,
    generation: GenerationSettings,
    folder: Path | str,
    *,
    schedule: NoiseSchedule,
    batch_size: int = 8,
    dtype: str = "fp16",
    on_item: Callable[[int, int], None] = ignore,
    on_step: Callable[[int, int], None] = ignore,
) -> CachedDataset:
    """`make_dataset` for captions that are encoded already, and an empty caption or negative prompt."""
    check_range("batch_size", batch_size, BATCH)
    with writing(folder, dtype=dtype, padded=null.padded) as writer:
        *named, (_, null_text) = _named([*captions, null], dtype)
        for (_, name), caption in zip([*named, (null_text, null_text)], [*captions, null], strict=True):
            if not writer.has(name):
                writer.add_text(name, caption)
        writer.flush()
        return _drawn(
            writer, load_teacher, teacher_fingerprint, named, null_text, generation, schedule, batch_size, on_item, on_step
        )


def drawn_fingerprint(
    teacher_fingerprint: str,
    captions: Sequence[Caption],
    null: Caption,
    generation: GenerationSettings,
    *,
    schedule: NoiseSchedule,
    dtype: str = "fp16",
) -> str:
    """The fingerprint that the dataset of `draw_dataset` has, without drawing it."""
    *named, (_, null_text) = _named([*captions, null], dtype)
    entries = [job.entry(generation, null) for job in _jobs(named, generation, teacher_fingerprint, dtype)]
    kept = generation.kept(schedule)
    return fingerprint_of(entries, null_text, None if kept is None else kept.tolist())


def _named(captions: Sequence[Caption], dtype: str) -> list[tuple[str, str]]:
    """For each caption what determines its noise, and its key: the same, as it has no text."""
    names = []
    for caption in captions:
        parts = (part for part in (caption.context, caption.pooled) if part is not None)
        content = (hashlib.sha256(part.float().numpy().tobytes()).hexdigest() for part in parts)
        names.append(key("caption", *content, dtype))
    return [(name, name) for name in names]


class _Job(NamedTuple):
    """One image to generate."""

    source: str
    """Text that determines its noise."""
    text: str
    """Key of its caption."""
    number: int
    """Its number among the images of its caption."""
    name: str
    """Its key."""

    def entry(self, generation: GenerationSettings, null: Caption) -> Entry:
        return Entry(self.name, self.text, _sizes(null, generation.size), self.text)


def _jobs(
    captions: Sequence[tuple[str, str]], generation: GenerationSettings, teacher_fingerprint: str, dtype: str
) -> Iterator[_Job]:
    """All images, one at a time: one for every caption, then again from other noise."""
    seen: dict[tuple[str, str], int] = {}
    for caption in chain.from_iterable(repeat(captions, generation.num_per_prompt)):
        number = seen[caption] = seen.get(caption, -1) + 1
        name = key("made", caption[1], number, teacher_fingerprint, *generation.words, dtype)
        yield _Job(*caption, number, name)


def _drawn(
    writer: CacheWriter,
    load_teacher: Load,
    teacher_fingerprint: str,
    captions: Sequence[tuple[str, str]],
    null_text: str,
    generation: GenerationSettings,
    schedule: NoiseSchedule,
    batch_size: int,
    on_item: Callable[[int, int], None],
    on_step: Callable[[int, int], None],
    one_length: bool = False,
) -> CachedDataset:
    """Dataset of what a teacher generates for captions that are written.

    captions: for each, the text that determines its noise, and its key.
    """
    null, total = writer.caption(null_text), len(captions) * generation.num_per_prompt
    _check_room(writer, total, generation)
    entries: list[Entry] = []
    waiting: list[_Job] = []
    teacher = None

    def tell(done: int) -> None:
        on_item(done, total)
        on_step(done * generation.num_steps, total * generation.num_steps)

    def draw(done: int) -> None:
        assert teacher is not None
        steps = ((done - len(waiting)) * generation.num_steps + step * len(waiting) for step in range(1, generation.num_steps))

        def tell_step() -> None:
            if (of_all := next(steps, None)) is not None:  # the last is told once the images are written
                on_step(of_all, total * generation.num_steps)

        _draw(writer, teacher, waiting, null, generation, tell_step)
        waiting.clear()

    for done, job in enumerate(_jobs(captions, generation, teacher_fingerprint, writer.dtype), 1):
        entries.append(job.entry(generation, null))
        if not writer.has(job.name):
            if teacher is None:
                tell(done - 1)
                teacher = load_teacher()
            if one_length and waiting and len(writer.caption(job.text).context) != len(writer.caption(waiting[0].text).context):
                draw(done - 1)
            waiting.append(job)
        if len(waiting) == batch_size or (waiting and done == total):
            draw(done)
            tell(done)
        elif not waiting and (done % TELL_EVERY == 0 or done == total):
            tell(done)
    scales = generation.scales if generation.num_states else None
    return writer.finish(entries, null_text, generation.kept(schedule), scales)


def _draw(
    writer: CacheWriter,
    teacher: Denoiser,
    jobs: Sequence[_Job],
    null: Caption,
    generation: GenerationSettings,
    on_step: Callable[[], None],
) -> None:
    """Generate some images and write them."""
    shape = teacher.latent_channels, *(side // 8 for side in generation.size)
    noise = torch.stack([torch.randn(shape, generator=generator(generation.seed, job.number, job.source)) for job in jobs])
    scales = [generation.scale(job.number, job.source) for job in jobs]
    drawn = [scale for scale in scales if scale is not None]
    together = torch.stack(drawn) if drawn else None
    captions = [writer.caption(job.text) for job in jobs]
    latents, states = make_latents(teacher, captions, null, noise, generation, together, on_step)
    for i, job in enumerate(jobs):
        writer.add_latent(job.name, latents[i], None if states is None else states[i], scales[i])
    writer.flush()


def _check_room(writer: CacheWriter, total: int, generation: GenerationSettings) -> None:
    """``ValueError`` for more images than a dataset can hold, or than fit on the disk."""
    if total > MOST_IMAGES:
        raise ValueError(
            f"{total:,} images are more than the {MOST_IMAGES:,} a dataset can hold; give fewer prompts, or fewer images each"
        )
    height, width = generation.size
    values = FEWEST_CHANNELS * (height // 8) * (width // 8) * (1 + generation.num_states)
    check_room(
        writer.folder,
        total * values * DTYPES[writer.dtype].itemsize - writer.num_bytes,
        f"{total:,} images" + f" with {generation.num_states} states each" * bool(generation.num_states),
        "generate fewer or smaller ones, store fewer states, or free some space",
    )
