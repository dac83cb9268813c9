"""A recipe's transformer: a network of diffusers that is teacher and student at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import inf, prod
from typing import Any, cast

import torch
from torch import nn

from ..base.documents import one_line, read_json
from ..base.precision import DTYPES
from ..data.dataset import Dataset, largest_example
from ..data.images import sizes
from ..diffusion.denoiser import READS_MORE, Denoiser
from ..diffusion.pipelines import DENOISERS, PATCH, PipelineDenoiser, denoiser_of, flow_of
from ..diffusion.schedule import NoiseSchedule, flow
from ..lora.layers import NO_DORA, trained_shapes, without_lora
from ..networks.name_map import NameMap
from ..networks.quantised import QUANTISED, computes, fill, held_bytes, is_narrow, store_in
from ..networks.transformers.architecture import FAMILIES, Transformer
from ..networks.transformers.files import TransformerFile, TransformerFolder
from ..pruning.plan import name_map, pruned
from ..recipe import Recipe
from ..training.base_memory import Base
from ..training.lesson import check_lesson, on_own_weights
from ..training.memory import Forecast, MemorySettings
from ..training.processes import Processes
from ..training.run import Inputs
from ..training.settings import TrainingSettings
from ..training.teachers import Teachers
from .models import Models

_SIDE_STEP_PX = 8 * PATCH
_SCHEDULER = ("scheduler", "scheduler_config.json")


class TransformerModels(Models):
    """A transformer whose student skips the blocks that a plan removes, and learns by a LoRA on the weights they share.

    Without a plan the LoRA is one for the whole network.
    """

    shares_base = True

    def __init__(self, recipe: Recipe, processes: Processes, file: TransformerFile):
        super().__init__(recipe, processes, recipe.teachers)
        _check(recipe, processes)
        self.check_shared()
        self._settings = recipe.teachers[0]
        self.file = _folder(file)
        self._empty = empty_network(self.file.config)
        _check_complete(self.file, self._empty)
        self.plan = self.student_plan(self.file.architecture)
        self.mapping = None if self.plan is None else name_map(self.file.architecture, self.plan)
        self.recipe = replace(recipe, training=on_own_weights(recipe.training, self.mapping))
        self._check_lora(self.recipe.training)

    def _check_lora(self, training: TrainingSettings) -> None:
        """``ValueError`` for a LoRA that the network cannot have."""
        trained_shapes(self._denoiser(self._empty), training.lora_rank, training.lora_targets, training.lora_dora)
        if training.lora_dora and self._settings.dtype in QUANTISED:
            raise ValueError(NO_DORA)

    @property
    def teacher_files(self) -> Sequence[TransformerFile]:
        return [self.file]

    @cached_property
    def architecture(self) -> Transformer:
        return self.file.architecture if self.mapping is None else pruned(self.file.architecture, self.mapping)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        largest = max(sizes(self.recipe.data.resolution), key=prod)
        height, width = (side // (self.pixels_per_latent * PATCH) for side in largest)
        return flow_of(self._scheduler, (height, width))

    @property
    def _scheduler(self) -> Mapping[str, Any]:
        """The config of its pipeline's scheduler, which says at which noise levels it samples."""
        folder, encoders = self.file.path.parent, self.recipe.data.encoders
        pipelines = [folder.parent] * (folder.name == "transformer") + ([self.recipe.path(encoders)] if encoders else [])
        found = [path for pipeline in pipelines if (path := pipeline.joinpath(*_SCHEDULER)).exists()]
        if not found:
            raise ValueError(
                f"{folder} is not in the folder of a pipeline, whose {'/'.join(_SCHEDULER)} gives the noise levels; name that of its "
                "teacher as encoders in [data]"
            )
        return read_json(found[0])

    @property
    def latent_channels(self) -> int:
        return self._denoiser(self._empty).latent_channels

    def check_lesson(self) -> None:
        check_lesson(self.recipe.training, None, None, same=self.mapping is None)

    def inputs(self, data: Dataset) -> Inputs:
        return Inputs(teachers=tuple(self.fingerprints), data=data.fingerprint)

    def teacher(self) -> PipelineDenoiser:
        """The network with all its blocks."""
        dtype = self._settings.dtype
        compute = DTYPES[computes(dtype)]
        network = nn.Module.to(empty_network(self.file.config), compute)
        store_in(network, dtype)
        fill(network, self.file.tensors, dtype, self.device)  # never the whole in the computer's memory
        return replace(self._denoiser(network.eval()), computes=(self.device, compute))

    def student(self) -> PipelineDenoiser:
        """The same on the student's way."""
        return replace(self.teacher(), mapping=self.mapping)

    def teachers(self, student: Denoiser) -> Teachers:
        whole = replace(cast("PipelineDenoiser", student), mapping=None)
        return Teachers([without_lora(whole)], self.recipe.training)

    def _denoiser(self, network: nn.Module) -> PipelineDenoiser:
        return denoiser_of(network, self.file.architecture, self.schedule)

    def forecast(self, dataset: Dataset, training: TrainingSettings) -> Forecast:
        example, dtype = largest_example(dataset), self._settings.dtype
        _, channels, height, width = example.latents.shape
        caption = example.contexts.shape[1:], None if example.label is None else example.label.pooled.shape[1]
        settings = MemorySettings(training=training, teacher_dtype=dtype, shares_base=True, device=self.device.type)
        return forecast_of(self.file.config, self.file.architecture, self.mapping, (channels, height, width), caption, settings)


def empty_network(config: Mapping[str, Any]) -> nn.Module:
    """The network of a config of diffusers, without contents; ``ValueError`` if there is no such network."""
    import diffusers
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            network = getattr(diffusers, config["_class_name"]).from_config(config)
    except Exception as error:  # each class raises its own errors
        raise ValueError(f"diffusers {diffusers.__version__} cannot build a network of this config: {one_line(error)}") from error
    return network.requires_grad_(False)


def forecast_of(
    config: Mapping[str, Any],
    transformer: Transformer,
    mapping: NameMap | None,
    latent_shape: tuple[int, int, int],
    caption: tuple[Sequence[int], int | None],
    settings: MemorySettings,
    enough: float = inf,
) -> Forecast:
    """Forecast for a transformer of diffusers that is teacher and student at once, in the dtype of its teacher.

    config: of diffusers. mapping: to the student; None for a LoRA on the whole network. caption: its tokens and their width; width of the
    pooled embedding. enough: as in `Forecast.again`.
    """
    dtype, (context, pooled_width) = settings.teacher_dtype, caption

    def empty() -> nn.Module:
        return nn.Module.to(empty_network(config), DTYPES[computes(dtype)])

    held = empty()
    store_in(held, dtype)
    base = Base(
        lambda: denoiser_of(empty(), transformer, flow()),
        mapping,
        held_bytes(held),
        (context[0], context[1]),
        pooled_width,
        widened_bytes=_widened(held, transformer, mapping, settings.training),
    )

    def again(settings: MemorySettings, latent_shape: tuple[int, int, int], enough: float = inf) -> Forecast:
        return forecast_of(config, transformer, mapping, latent_shape, caption, settings, enough)

    return replace(base.forecast(settings, latent_shape, enough), again=again)


def _widened(held: nn.Module, transformer: Transformer, mapping: NameMap | None, training: TrainingSettings) -> int:
    """Bytes of 16-bit copies that a student's pass makes of weights stored in fewer bits. held: the network as it is held, without contents."""
    narrow = {name: weight for name, weight in held.named_parameters() if is_narrow(weight)}
    kept = {name: weight.numel() for name, weight in narrow.items() if mapping is None or mapping.rename(name) is not None}
    if any(weight.dtype != torch.float8_e4m3fn for weight in narrow.values()):  # one layer at a time, also for the backward pass
        return 2 * max(kept.values(), default=0)
    if not training.gradient_checkpointing:  # the backward pass keeps them
        return 2 * sum(kept.values())
    in_block = (sum(count for name, count in kept.items() if name.startswith(f"{block}.")) for block in transformer.in_order)
    return 2 * max(in_block, default=0)


def _check(recipe: Recipe, processes: Processes) -> None:
    """``ValueError`` for a recipe that asks of a transformer what only UNets can."""
    if not recipe.teachers:
        raise ValueError(
            "[student]: a transformer is fine-tuned by a LoRA: give it as [teacher] file, in the dtype to hold it in, in place of [student] "
            'file, and keep objective "task"'
        )
    if len(recipe.teachers) > 1:
        raise ValueError("a transformer learns from one teacher, with which it shares its weights; remove the other [[teacher]]")
    if recipe.experts is not None:
        raise ValueError("[experts] are for UNets; remove the section to train a transformer")
    if recipe.student.file is not None:
        raise ValueError("[student]: a transformer's student shares its teacher's weights; give plan or preset in place of file")
    if not recipe.training.lora_rank:
        raise ValueError('[training]: a transformer learns by a LoRA; set lora_rank, and lora_targets to ["*"]')
    for section, resolution in (("data", recipe.data.resolution), ("samples", recipe.samples.resolution)):
        if odd := [side for size in sizes(resolution) for side in size if side % _SIDE_STEP_PX]:
            raise ValueError(f"[{section}]: a transformer needs sides that are multiples of {_SIDE_STEP_PX} px, got {odd[0]}")
    if processes.count > 1:
        raise ValueError("a transformer trains in one process; start it without accelerate")


def _check_complete(file: TransformerFolder, network: nn.Module) -> None:
    """``ValueError`` unless a folder holds just the weights of the network that its config describes."""
    built = {name: tuple(weight.shape) for name, weight in network.named_parameters()}
    stored = {name: tensor.shape for name, tensor in file.tensors.items()}
    if odd := {*built.items()} ^ {*stored.items()}:
        raise ValueError(
            f"{file.path.parent}: its config and its weights differ, first in {min(odd)[0]}; download the model again"
        )


def _folder(file: TransformerFile) -> TransformerFolder:
    """The transformer, if diffusers can run it and its pipeline is known; ``ValueError`` otherwise."""
    title, known = file.architecture.of.title, ", ".join(FAMILIES[name].title for name in DENOISERS)
    if file.architecture.family not in DENOISERS:
        raise ValueError(
            f"{file.path}: {title} can be cut but not trained outside ComfyUI, where Distill Train Step may teach it; these can: {known}"
        )
    if not isinstance(file, TransformerFolder):
        raise ValueError(
            f"{file.path} is a single file of {title}; to train it here, give its diffusers folder, or use Distill Train Step in ComfyUI"
        )
    reads, predicts = file.config.get("in_channels"), file.config.get("out_channels")
    if file.architecture.family == "flux1" and predicts not in (None, reads):
        raise ValueError(f"{file.path.parent}: {READS_MORE.format(reads, predicts)}")
    return file
