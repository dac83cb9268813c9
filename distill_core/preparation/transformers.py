"""A recipe's transformer: a network of diffusers that is teacher and student at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import Any, cast

from torch import nn

from ..base.documents import read_json
from ..base.precision import DTYPES
from ..data.dataset import Dataset, largest_example
from ..data.images import sizes
from ..diffusion.denoiser import Denoiser
from ..diffusion.pipelines import DENOISERS, PATCH, PipelineDenoiser, denoiser_of, flow_of
from ..diffusion.schedule import NoiseSchedule, flow
from ..lora.layers import without_lora
from ..networks.name_map import NameMap
from ..networks.quantised import QUANTISED, computes, fill, is_linear, kept_bytes, store_in
from ..networks.transformers.architecture import FAMILIES, Transformer
from ..networks.transformers.files import TransformerFile, TransformerFolder, find_transformer
from ..pruning.plan import PruningPlan, name_map, pruned
from ..pruning.plan_text import find_plan
from ..recipe import Recipe, TeacherSettings
from ..training.base_memory import Base, on_meta
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

    def __init__(self, recipe: Recipe, processes: Processes, teacher_settings: Sequence[TeacherSettings]):
        super().__init__(recipe, processes, teacher_settings)
        self.check_shared()
        _check(recipe, processes)
        self._settings = teacher_settings[0]
        self.file = _folder(find_transformer(recipe.path(self._settings.file)))
        self.plan = self._plan()
        self.mapping = None if self.plan is None else name_map(self.file.architecture, self.plan)
        self.recipe = replace(recipe, training=on_own_weights(recipe.training, self.mapping))

    def _plan(self) -> PruningPlan | None:
        given = self.recipe.student.preset or self.recipe.student.plan
        return None if given is None else find_plan(given, self.file.architecture, self.recipe.folder)

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
        """The config of the pipeline's scheduler, which says at which noise levels it samples; empty if it has none."""
        pipeline = self.file.path.parent.parent
        path = pipeline.joinpath(*_SCHEDULER)
        return read_json(path) if path.exists() else {}

    @cached_property
    def latent_channels(self) -> int:
        return self._denoiser(unfilled(self.file.config)).latent_channels

    shares_base = True

    def check_lesson(self) -> None:
        check_lesson(self.recipe.training, None, None, same=self.mapping is None)

    def inputs(self, data: Dataset) -> Inputs:
        return Inputs(teachers=tuple(self.fingerprints), data=data.fingerprint)

    def teacher(self) -> PipelineDenoiser:
        """The network with all its blocks."""
        dtype = self._settings.dtype
        compute = DTYPES[computes(dtype)]
        network = nn.Module.to(unfilled(self.file.config), compute)
        _check_complete(self.file, network)
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


def unfilled(config: Mapping[str, Any]) -> nn.Module:
    """The network of a config of diffusers, without contents."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        network = getattr(diffusers, config["_class_name"]).from_config(config)
    return network.requires_grad_(False)


def forecast_of(
    config: Mapping[str, Any],
    transformer: Transformer,
    mapping: NameMap | None,
    latent_shape: tuple[int, int, int],
    caption: tuple[Sequence[int], int | None],
    settings: MemorySettings,
) -> Forecast:
    """Forecast for a transformer of diffusers that is teacher and student at once, in the dtype of its teacher.

    config: of diffusers. mapping: to the student; None for a LoRA on the whole network. caption: its tokens and their width; width of the
    pooled embedding.
    """
    dtype, (context, pooled_width) = settings.teacher_dtype, caption

    def on_meta_device() -> PipelineDenoiser:
        network = nn.Module.to(unfilled(config), DTYPES[computes(dtype)])
        for module in network.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, on_meta(weight))
        return denoiser_of(network, transformer, flow())

    base = Base(
        on_meta_device,
        mapping,
        kept_bytes(transformer.shapes, dtype),
        (context[0], context[1]),
        pooled_width,
        widened_bytes=_widened(transformer, mapping, dtype, settings.training),
    )
    return base.forecast(settings, latent_shape)


def _widened(transformer: Transformer, mapping: NameMap | None, dtype: str, training: TrainingSettings) -> int:
    """Bytes of 16-bit copies that a pass makes of weights stored in fewer bits."""
    if dtype in QUANTISED:  # one layer at a time, also for the backward pass
        return 2 * max(prod(shape) for name, shape in transformer.shapes.items() if is_linear(name, shape))
    if dtype != "fp8":
        return 0
    student = transformer if mapping is None else pruned(transformer, mapping)
    if not training.gradient_checkpointing:  # the backward pass keeps them
        return 2 * student.num_parameters
    in_block = (
        sum(prod(shape) for name, shape in student.shapes.items() if name.startswith(f"{block}.")) for block in student.in_order
    )
    return 2 * max(in_block)


def _check(recipe: Recipe, processes: Processes) -> None:
    """``ValueError`` for a recipe that asks of a transformer what only UNets can."""
    if len(recipe.teachers) > 1:
        raise ValueError("a transformer learns from one teacher, with which it shares its weights; remove the other [[teacher]]")
    if recipe.experts is not None:
        raise ValueError("[experts] are for UNets; remove the section to train a transformer")
    if recipe.teachers and recipe.student.file is not None:
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


def _folder(file: TransformerFile | None) -> TransformerFolder:
    """The transformer, if diffusers can run it and its pipeline is known; ``ValueError`` otherwise."""
    assert file is not None  # `open_models` has opened it
    title, known = file.architecture.of.title, ", ".join(FAMILIES[name].title for name in DENOISERS)
    if file.architecture.family not in DENOISERS:
        raise ValueError(
            f"{file.path}: {title} can be cut but not trained outside ComfyUI, where Distill Train Step may teach it; these can: {known}"
        )
    if not isinstance(file, TransformerFolder):
        raise ValueError(
            f"{file.path} is a single file of {title}; to train it here, give its diffusers folder, or use Distill Train Step in ComfyUI"
        )
    return file
