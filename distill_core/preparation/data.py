"""A recipe's data: images encoded, or drawn by the teacher, once, and what encodes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

from ..base.documents import MAX_LIST_BYTES, lines, read_text
from ..data.cache import CachedDataset, encode
from ..data.dataset import Dataset
from ..data.encoders import DiffusersEncoders, Encoders, warn_of_cut
from ..data.images import Size, folder, hugging_face, sizes
from ..data.teacher_data import GenerationSettings, caption_dataset, make_dataset
from ..demo.encoders import ScenesEncoders
from ..diffusion.denoiser import Denoiser
from ..recipe import DEMO, Recipe
from ..training.lesson import check_trajectories
from ..training.previews import Previews
from .models import Models

OnItem = Callable[[str, int, int], None]
OF_SAMPLES = "[samples]: all sample images have one size"


class Data:
    """The data of a recipe, and what encodes them."""

    def __init__(self, recipe: Recipe, models: Models):
        self.recipe, self.models = recipe, models

    @cached_property
    def encoders(self) -> Encoders:
        """Autoencoder and text encoders, opened when first needed."""
        name, first = self.recipe.data.encoders, self.models.teacher_settings[0].file
        if name is None and first == DEMO:
            name = DEMO
        if name is None and self.recipe.path(first).is_dir() and (self.recipe.path(first) / "vae").is_dir():
            name = first
        if name is None:
            raise ValueError(
                "[data]: encoders is missing; give a diffusers folder with the teacher's autoencoder and text encoders"
            )
        if name == DEMO:
            return ScenesEncoders()
        return DiffusersEncoders.from_folder(
            self.recipe.path(name),
            self.models.device,
            family=self.models.family,
            text_device="cpu" if self.recipe.data.captions_on_cpu else None,
        )

    def close_texts(self) -> None:
        """Free the memory of the text encoders for a network; see `DiffusersEncoders.close_texts`."""
        if isinstance(encoders := vars(self).get("encoders"), DiffusersEncoders):
            encoders.close_texts()

    def dataset(self, on_item: OnItem) -> Dataset:
        """The training data: images are encoded, or drawn by the teacher, unless the cache holds them already."""
        data, cache = self.recipe.data, self.recipe.path(self.recipe.data.cache)
        if data.prompts is not None:
            prompts = lines(read_text(self.recipe.path(data.prompts), MAX_LIST_BYTES))
            return (
                self._made(prompts, cache, on_item)
                if self.recipe.training.uses_images
                else self._captions(prompts, cache, on_item)
            )
        if data.images is not None:
            images = folder(self.recipe.path(data.images))
        elif data.dataset is not None:
            path = self.recipe.path(data.dataset)
            images = hugging_face(path, data.split, data.image_column, data.caption_column)
        else:
            return CachedDataset.open(cache)
        return encode(
            images,
            self.encoders,
            sizes(data.resolution),
            cache,
            batch_size=data.encode_batch_size,
            flip=data.flip,
            on_item=partial(on_item, "encoding"),
        )

    def _captions(self, prompts: Sequence[str], cache: Path, on_item: OnItem) -> Dataset:
        """Prompts without images, and the size in which the student draws them while it learns."""
        return caption_dataset(
            self.encoders,
            prompts,
            self._latent_shape(self._size),
            self._size,
            cache,
            batch_size=self.recipe.data.encode_batch_size,
            on_caption=partial(on_item, "encoding"),
        )

    @property
    def _size(self) -> Size:
        return _one_size(self.recipe.data.resolution, "[data]: with prompts all images have one size")

    def _latent_shape(self, size: Size) -> tuple[int, int, int]:
        each = self.models.pixels_per_latent
        return self.models.latent_channels, size[0] // each, size[1] // each

    @property
    def _generation(self) -> GenerationSettings:
        data = self.recipe.data
        return GenerationSettings(
            size=self._size,
            guidance=data.guidance,
            guidance_min=self.recipe.training.guidance_min if data.trajectory_states else None,
            num_steps=data.sampler_steps,
            num_per_prompt=data.images_per_prompt,
            num_states=data.trajectory_states,
            seed=self.recipe.training.seed,
        )

    def check(self) -> None:
        """``ValueError`` if the recipe's data and sample images cannot be used, before they are made."""
        data, training, samples = self.recipe.data, self.recipe.training, self.recipe.samples
        if data.prompts is not None and training.uses_images:
            generation, schedule = self._generation, self.models.schedule
            check_trajectories(training, schedule, generation.kept(schedule), generation.scales)
            if self.recipe.experts:
                self.recipe.experts.check_stored(generation.kept(schedule), schedule)
        if training.sample_every_steps:
            if not samples.prompts:
                raise ValueError("[samples]: prompts is missing; give prompts, or set sample_every_steps to 0")
            _one_size(samples.resolution, OF_SAMPLES)

    def _made(self, prompts: Sequence[str], cache: Path, on_item: OnItem) -> Dataset:
        def load() -> Denoiser:
            self.close_texts()
            return self.models.teacher()

        return make_dataset(
            load,
            self.models.fingerprints[0],
            self.encoders,
            prompts,
            self._generation,
            cache,
            schedule=self.models.schedule,
            batch_size=self.recipe.data.encode_batch_size,
            on_item=partial(on_item, "drawing"),
        )

    def previews(self) -> Previews | None:
        """Sample images, if the recipe asks for them; see `check`."""
        samples = self.recipe.samples
        if not self.recipe.training.sample_every_steps:
            return None
        warn_of_cut(samples.prompts, self.encoders)
        *captions, null = self.encoders.captions([*samples.prompts, ""])
        return Previews(
            captions=captions,
            null=null,
            latent_shape=self._latent_shape(_one_size(samples.resolution, OF_SAMPLES)),
            decode=self.encoders.decode,
            guidance=samples.guidance,
            num_steps=samples.steps,
            seed=samples.seed,
        )


def _one_size(resolution: str, rule: str) -> Size:
    (size, *others) = sizes(resolution)
    if others:
        raise ValueError(f"{rule}, got resolution {resolution!r}")
    return size
