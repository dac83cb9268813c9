"""Training data without images: the teacher draws it from a list of prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .cache import CachedDataset, CacheWriter, Entry, key, text_key
from .dataset import Caption, conditions, generator
from .denoiser import Denoiser
from .encoders import TextEncoders
from .images import Size
from .sampling import sample, timesteps
from .schedule import NoiseSchedule
from .storage import ignore
from .teachers import Load


@dataclass(frozen=True, kw_only=True)
class Making:
    """How a teacher makes data."""

    size: Size
    """Height and width of the pictures, in pixels."""
    guidance: float = 7.5
    """Classifier-free guidance scale."""
    num_steps: int = 25
    """Sampler steps."""
    num_per_prompt: int = 1
    """Pictures for each prompt, from different noise."""
    num_states: int = 0
    """Noisy states of the teacher's own trajectory kept of each picture, to train on instead of noise that is added.
    Those are what a guided student will see (Jensen et al. 2025, arXiv 2503.07274, Sec. 3.2). 0 keeps none."""
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.num_states <= self.num_steps:
            raise ValueError(f"there are {self.num_steps} sampler steps, so between 0 and as many states, got {self.num_states}")
        if min(self.num_steps, self.num_per_prompt) < 1:
            raise ValueError("a teacher needs at least one sampler step and one picture for each prompt")

    def kept(self, schedule: NoiseSchedule) -> Tensor | None:
        """Timesteps of the states that are kept, evenly from the sampler's, (K,)."""
        if not self.num_states:
            return None
        steps = timesteps(schedule, self.num_steps)
        return steps[torch.arange(self.num_states) * self.num_steps // self.num_states]


def make_latents(
    teacher: Denoiser, captions: Sequence[Caption], null: Caption, noise: Tensor, making: Making
) -> tuple[Tensor, Tensor | None]:
    """Latents (B, C, H, W) the teacher draws for captions from noise, and states (B, K, C, H, W) on the way."""
    kept, states = making.kept(teacher.schedule), []
    context, label, null = conditions(captions, null, making.size)
    latents = sample(
        teacher,
        context,
        null,
        noise=noise,
        label=label,
        num_steps=making.num_steps,
        guidance=making.guidance,
        on_state=lambda x_t, t: states.append(x_t.cpu()) if kept is not None and t in kept else None,
    )
    return latents.cpu(), torch.stack(states, 1) if states else None


def make_dataset(
    load_teacher: Load,
    teacher_fingerprint: str,
    encoders: TextEncoders,
    prompts: Sequence[str],
    making: Making,
    folder: Path | str,
    *,
    schedule: NoiseSchedule,
    batch_size: int = 8,
    dtype: str = "fp16",
    on_caption: Callable[[int, int], None] = ignore,
    on_item: Callable[[int, int], None] = ignore,
) -> CachedDataset:
    """Teacher-made pictures of prompts as a dataset on disk; only what is not in the folder yet is made.

    Each picture depends on its prompt, its number and the seed alone, not on the others. schedule: the teacher's. dtype: as in
    `CacheWriter`. The teacher is loaded once all prompts are encoded, so that it need not share memory with the encoders, and
    only if there is something to draw. ``on_caption(done, total)`` is called after each batch of prompts,
    ``on_item(done, total)`` before the first batch of pictures and after each. If it is interrupted or
    killed, every batch before stays. ``ValueError`` without prompts.
    """
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("a teacher-made dataset needs at least one prompt")
    writer = CacheWriter(folder, dtype=dtype)
    texts = {prompt: text_key(prompt, encoders.fingerprint, writer.dtype) for prompt in ["", *prompts]}
    missing = [prompt for prompt, name in texts.items() if not writer.has(name)]
    try:
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            for prompt, caption in zip(part, encoders.captions(part), strict=True):
                writer.add_text(texts[prompt], caption)
            on_caption(start + len(part), len(missing))
    finally:
        writer.flush()
    captions = [(prompt, texts[prompt]) for prompt in prompts]
    return _drawn(writer, load_teacher, teacher_fingerprint, captions, texts[""], making, schedule, batch_size, on_item)


def draw_dataset(
    load_teacher: Load,
    teacher_fingerprint: str,
    captions: Sequence[Caption],
    null: Caption,
    making: Making,
    folder: Path | str,
    *,
    schedule: NoiseSchedule,
    batch_size: int = 8,
    dtype: str = "fp16",
    on_item: Callable[[int, int], None] = ignore,
) -> CachedDataset:
    """The same of captions that are encoded already, and an empty caption or negative prompt."""
    writer, texts = CacheWriter(folder, dtype=dtype), []
    for caption in [*captions, null]:
        content = (hashlib.sha256(part.float().numpy().tobytes()).hexdigest() for part in caption if part is not None)
        texts.append(key("caption", *content, writer.dtype))
        if not writer.has(texts[-1]):
            writer.add_text(texts[-1], caption)
    writer.flush()
    named = [(name, name) for name in texts[:-1]]
    return _drawn(writer, load_teacher, teacher_fingerprint, named, texts[-1], making, schedule, batch_size, on_item)


def _drawn(
    writer: CacheWriter,
    load_teacher: Load,
    teacher_fingerprint: str,
    captions: Sequence[tuple[str, str]],
    null_text: str,
    making: Making,
    schedule: NoiseSchedule,
    batch_size: int,
    on_item: Callable[[int, int], None],
) -> CachedDataset:
    """A dataset of what a teacher draws for captions that are written.

    captions: for each, what its noise follows from, and its key.
    """
    null = writer.caption(null_text)
    jobs, seen = [], {}
    for caption in [*captions] * making.num_per_prompt:
        number = seen[caption] = seen.get(caption, -1) + 1
        how = vars(making) | {"num_per_prompt": None}
        name = key("made", caption[1], number, teacher_fingerprint, *how.values(), writer.dtype)
        jobs.append((*caption, number, name))
    to_do = [job for job in jobs if not writer.has(job[-1])]
    teacher = load_teacher() if to_do else None
    height, width = making.size
    on_item(len(jobs) - len(to_do), len(jobs))
    for start in range(0, len(to_do), batch_size):
        part = to_do[start : start + batch_size]
        shape = teacher.latent_channels, height // 8, width // 8
        noise = [torch.randn(shape, generator=generator(making.seed, number, source)) for source, _, number, _ in part]
        latents, states = make_latents(teacher, [writer.caption(text) for _, text, *_ in part], null, torch.stack(noise), making)
        for i, (*_, name) in enumerate(part):
            writer.add_latent(name, latents[i], None if states is None else states[i])
        writer.flush()
        on_item(len(jobs) - len(to_do) + start + len(part), len(jobs))
    sizes = (height, width, 0, 0, height, width) if null.pooled is not None else None
    return writer.finish([Entry(name, text, sizes) for _, text, _, name in jobs], null_text, making.kept(schedule))
