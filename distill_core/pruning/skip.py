"""A teacher that predicts as its student would, without being pruned: it skips the removed blocks while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser, instead, tap
from ..networks.architecture import Architecture
from ..networks.layouts import kind
from ..networks.name_map import NameMap


@dataclass(frozen=True)
class Detour:
    """How a teacher runs as its student: which modules pass on their input, and which skip connections are rewired."""

    passed_through: dict[str, int]
    """Skipped module or transformer block -> channels that arrive from the layer before: all of its input or, if a skip
    connection is joined to it, the first part."""
    rewired: dict[str, tuple[int, str]]
    """Resnet of an up stage -> channels that arrive from the layer before, and the module whose output replaces the
    teacher's skip connection."""


def detour(teacher: Architecture, mapping: NameMap) -> Detour:
    """Detour through the teacher that follows the student's wiring.

    Raises ``ValueError`` naming the block if a removed block changes the number of channels: then the teacher has no
    tensor that the student would see in its place.
    """
    gone, passed, rewired = mapping.removed, {}, {}
    skips = [source for source in teacher.skips if source.replace(".attn.", ".resnet.") not in gone]
    teachers_skips = list(teacher.skips)
    _, channels = teacher.channels("conv_in")

    def enter(module: str, arriving: int) -> int:
        _, leaving = teacher.channels(module)
        for n in teacher.numbers(f"{module}.block"):
            if f"{module}.block.{n}" in gone and module not in gone:
                passed[f"{module}.block.{n}"] = arriving
        if module not in gone:
            return leaving
        if arriving != leaving:
            raise ValueError(f"{module} turns {arriving} channels into {leaving}, so it cannot be skipped")
        passed[module] = arriving
        return arriving

    for stage in teacher.stages("down"):
        for module in _in_order(teacher, stage):
            channels = enter(module, channels)
    for module in ("mid.resnet.0", "mid.attn.0", "mid.resnet.1"):
        if module in teacher.modules:
            channels = enter(module, channels)
    for stage in teacher.stages("up"):
        for module in _in_order(teacher, stage):
            if kind(module) == "resnet":
                teachers_own = teachers_skips.pop()
                if module not in gone and (source := skips.pop()) != teachers_own:
                    rewired[module] = channels, source
            channels = enter(module, channels)
    return Detour(passed, rewired)


def _in_order(architecture: Architecture, stage: str) -> Iterator[str]:
    """Modules of a stage as the data passes through them."""
    for j in architecture.numbers(f"{stage}.resnet"):
        yield f"{stage}.resnet.{j}"
        if (attention := f"{stage}.attn.{j}") in architecture.modules:
            yield attention
    if (resampling := f"{stage}.{stage.split('.')[0]}sample") in architecture.modules:
        yield resampling


@contextlib.contextmanager
def skipping(denoiser: Denoiser, mapping: NameMap, stand_ins: Mapping[str, Callable[[Tensor], Tensor]] = {}) -> Iterator[None]:
    """While open, the denoiser predicts as the student of ``mapping`` would.

    stand_ins: by skipped module, what turns its input into its output; by default it passes its input on. ``ValueError`` as
    in `detour`. Afterwards the network is unchanged, whatever happens in between.
    """
    way = detour(denoiser.architecture, mapping)
    with contextlib.ExitStack() as stack:
        sources = stack.enter_context(tap(denoiser, {source for _, source in way.rewired.values()}))
        for name, channels in way.passed_through.items():
            in_tuple = denoiser.layout == "diffusers" and kind(name) == "attn"
            stack.enter_context(instead(denoiser.module(name), _pass_on(channels, in_tuple, stand_ins.get(name))))
        for name, (channels, source) in way.rewired.items():
            module = denoiser.module(name)
            stack.enter_context(instead(module, _with_skip(module.forward, channels, sources, source)))
        yield


def _pass_on(channels: int, in_tuple: bool, stand_in: Callable[[Tensor], Tensor] | None) -> Callable:
    def forward(x: Tensor, *_, **__):
        x = x[:, :channels] if x.ndim == 4 else x
        x = x if stand_in is None else stand_in(x)
        return (x,) if in_tuple else x

    return forward


def _with_skip(forward: Callable, channels: int, sources: dict[str, Tensor], source: str) -> Callable:
    def rewired(x: Tensor, *args, **kwargs):
        return forward(torch.cat([x[:, :channels], sources[source]], 1), *args, **kwargs)

    return rewired
