"""Architecture of a UNet, read from the names and shapes of its parameters alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

from .layouts import find_unet, kind, layout_named, split
from .residuals import KeptSkips, Rename

if TYPE_CHECKING:
    from torch import Tensor

    from ..base.storage import StoredTensor

Shape = tuple[int, ...]
TITLES = {"sd1": "SD1.x-shaped", "sd2": "SD2-shaped", "sdxl": "SDXL-shaped", "unet": "of no known family"}
"""What UNets of a family are."""
_ENDS = ("conv_in", "conv_out", "norm_out", "time_embed.0", "time_embed.1")


def _pairs(*layers: str) -> list[str]:
    return [f"{layer}.{last}" for layer in layers for last in ("weight", "bias")]


_PARAMETERS = {
    "resnet": _pairs("norm1", "conv1", "time_emb_proj", "norm2", "conv2"),
    "attn": _pairs("norm", "proj_in", "proj_out"),
    "block": [
        *_pairs("norm1", "norm2", "norm3", "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"),
        *(f"{attention}.to_{part}.weight" for attention in ("attn1", "attn2") for part in "qkv"),
    ],
    "downsample": _pairs("conv"),
    "upsample": _pairs("conv"),
}
"""Parameters of every block of a kind; a resnet that changes the width also has a ``conv_shortcut``."""


def _ranks(name: str) -> tuple[int, ...]:
    """Numbers of dimensions a parameter may have."""
    if name.endswith("bias") or "norm" in name:
        return (1,)
    return (4,) if "conv" in name else (2, 4)


@dataclass(frozen=True)
class Architecture:
    """A UNet of the Stable Diffusion family, given by its canonical parameter names and shapes.

    Everything else (stages, channels, depths, parameter count, the diffusers config) is derived from them.
    """

    shapes: Mapping[str, Shape]
    """Canonical parameter name -> shape."""
    head_channels: int | None = None
    """Channels of one attention head; None for SD1.x, whose attentions have eight heads of any width. It is the one
    property of the network that the shapes do not give."""

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Tensor | StoredTensor | Shape], head_channels: int | Literal["unknown"] | None = "unknown"
    ) -> Architecture:
        """Architecture of a state dict, or of its shapes, in either layout, with or without a prefix.

        ``head_channels`` is guessed if it is unknown: 64 if the attentions project with linear layers (SD2, SDXL),
        eight heads otherwise (SD1.x).
        """
        layout, prefix = find_unet(tensors)
        names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        canonical = layout_named(layout).to_canonical(names)
        found = ((canonical[name], tensors[prefix + name]) for name in names)
        shapes = {name: tuple(of if isinstance(of, Sequence) else of.shape) for name, of in found}
        if head_channels == "unknown":
            head_channels = 64 if cls(shapes).linear_projection else None
        return cls(shapes, head_channels)

    @cached_property
    def modules(self) -> frozenset[str]:
        """Canonical modules: ``down.0.resnet.1``, ``mid.attn.0``, ``conv_in``, ..."""
        return frozenset(split(name)[0] for name in self.shapes)

    @cached_property
    def blocks(self) -> frozenset[str]:
        """Modules, and the transformer blocks within attentions: the smallest parts a plan can remove."""
        inner = (re.match(r".*\.attn\.\d+\.block\.\d+", name) for name in self.shapes)
        return self.modules | {match[0] for match in inner if match}

    @cached_property
    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    def numbers(self, head: str) -> list[int]:
        """Numbers that follow a head in the block names: ``numbers("down")`` is ``[0, 1, 2, 3]`` for SD1.x."""
        found = (re.match(rf"{re.escape(head)}\.(\d+)(?:\.|$)", block) for block in self.blocks)
        return sorted({int(match[1]) for match in found if match})

    def stages(self, side: str) -> list[str]:
        """``["down.0", "down.1", ...]``; ``up.0`` is the innermost."""
        return [f"{side}.{n}" for n in self.numbers(side)]

    def depth(self, attention: str) -> int:
        """Number of transformer blocks in an attention, 0 where there is none."""
        return len(self.numbers(f"{attention}.block"))

    def channels(self, module: str) -> tuple[int, int]:
        """(in, out) channels of a resnet, or of the convolution of any other module."""
        for conv_in, conv_out in (("conv1", "conv2"), ("conv", "conv"), ("proj_in", "proj_out")):
            if (name := f"{module}.{conv_in}.weight") in self.shapes:
                return self.shapes[name][1], self.shapes[f"{module}.{conv_out}.weight"][0]
        shape = self.shapes[f"{module}.weight"]
        return shape[1], shape[0]

    @property
    def context_width(self) -> int | None:
        """Width of the text embedding that the cross-attentions read; None without cross-attention."""
        return next((s[1] for n, s in self.shapes.items() if n.endswith("attn2.to_k.weight")), None)

    @property
    def label_width(self) -> int | None:
        """Width of the pooled vector (SDXL: 2816); None if the network reads none."""
        shape = self.shapes.get("label_embed.0.weight")
        return shape[1] if shape else None

    @property
    def linear_projection(self) -> bool:
        """Whether attentions project with linear layers (SD2, SDXL) instead of convolutions (SD1)."""
        return any(len(shape) == 2 for name, shape in self.shapes.items() if name.endswith("proj_in.weight"))

    @property
    def family(self) -> str:
        """``sd1``, ``sd2``, ``sdxl``, or ``unet`` for any other, judged by attention and conditioning."""
        linear = self.linear_projection
        if self.label_width is None and self.context_width is not None:
            return "sd2" if linear else "sd1"
        return "sdxl" if linear and self.label_width == 2816 else "unet"

    def heads(self, width: int) -> int:
        """Number of attention heads at a width in channels."""
        return 8 if self.head_channels is None else width // self.head_channels

    @property
    def skips(self) -> list[str]:
        """Modules whose outputs feed the skip connections, in the order they run: the last module of each layer."""
        sources = ["conv_in"]
        for stage in self.stages("down"):
            for j in self.numbers(f"{stage}.resnet"):
                sources.append(attention if (attention := f"{stage}.attn.{j}") in self.modules else f"{stage}.resnet.{j}")
            if f"{stage}.downsample" in self.modules:
                sources.append(f"{stage}.downsample")
        return sources

    def mirror(self, stage: str) -> str:
        """The stage on the other side of the UNet at the same resolution: ``down.0`` <-> ``up.3`` for SD1.x."""
        side = stage.split(".")[0]
        others = self.stages({"down": "up", "up": "down"}[side])
        return others[-1 - self.stages(side).index(stage)]

    def missing_parameters(self) -> list[str]:
        """Parameters that the network needs but lacks, at its ends and in every block it has."""
        required, blocks = set(_pairs(*_ENDS)), set(self.blocks)
        # The LDM layout counts by these: the resnet before each attention, and the first resnet of each stage.
        blocks |= {block.replace(".attn.", ".resnet.") for block in self.modules if kind(block) == "attn"}
        blocks |= {f"{stage}.resnet.0" for side in ("down", "up") for stage in self.stages(side)}
        for block in blocks:
            required |= {f"{block}.{name}" for name in _PARAMETERS.get(kind(block), ())}
        return sorted(required - self.shapes.keys())

    def check_whole(self) -> None:
        """``ValueError`` unless the parameters form a working UNet with valid shapes."""
        if missing := self.missing_parameters():
            raise ValueError(f"{missing[0]} is missing")
        for name, shape in self.shapes.items():
            if not all(shape) or len(shape) not in _ranks(name):
                raise ValueError(f"{name} has shape {list(shape)[:8]}, which no UNet has")
        for block in self.modules:
            if (
                kind(block) == "resnet"
                and len({*self.channels(block)}) > 1
                and f"{block}.conv_shortcut.weight" not in self.shapes
            ):
                raise ValueError(f"{block}.conv_shortcut.weight is missing")
            if kind(block) == "attn" and self.channels(block)[1] % (self.head_channels or 8):
                raise ValueError(f"{block} has {self.channels(block)[1]} channels, which do not divide into whole heads")
        stages = [*self.stages("down"), *self.stages("up")]
        attentions = [block for block in self.modules if kind(block) == "attn"]
        lists = ["down", "up", *(f"{stage}.resnet" for stage in stages), *(f"{attention}.block" for attention in attentions)]
        for head in lists:
            if (numbers := self.numbers(head)) != [*range(max(1, len(numbers)))]:
                raise ValueError(f"{head}.{min({*range(len(numbers) + 1)} - {*numbers})} is missing")
        self.check_wiring()

    def check_wiring(self) -> None:
        """Follow the channels through the network, skip connections included; ``ValueError`` names the block at fault."""
        self._check_layers()
        _, channels = self.channels("conv_in")
        skips = [channels]
        for stage in self.stages("down"):
            for j in self.numbers(f"{stage}.resnet"):
                channels = self._enter(f"{stage}.resnet.{j}", channels)
                channels = self._enter_if_present(f"{stage}.attn.{j}", channels)
                skips.append(channels)
            if f"{stage}.downsample" in self.modules:
                channels = self._enter(f"{stage}.downsample", channels)
                skips.append(channels)
        for module in ("mid.resnet.0", "mid.attn.0", "mid.resnet.1"):
            channels = self._enter_if_present(module, channels)
        for stage in self.stages("up"):
            for j in self.numbers(f"{stage}.resnet"):
                channels = self._enter(f"{stage}.resnet.{j}", channels, skips.pop())
                channels = self._enter_if_present(f"{stage}.attn.{j}", channels)
            channels = self._enter_if_present(f"{stage}.upsample", channels)
        self._enter("conv_out", channels)

    def _check_layers(self) -> None:
        """``ValueError`` unless both sides have the same stages and each takes the skip connections its mirror sends."""
        down, up = self.stages("down"), self.stages("up")
        if len(down) != len(up):
            raise ValueError(
                f"{len(down)} down stages but {len(up)} up stages remain; remove a stage on both sides or on neither"
            )
        for stage in down:
            sent, taken = len(self.numbers(f"{stage}.resnet")), len(self.numbers(f"{self.mirror(stage)}.resnet"))
            if not sent:
                raise ValueError(f"{stage} keeps its downsampling but no resnet; keep a resnet, or remove the whole stage")
            if taken != sent + 1:
                raise ValueError(
                    f"{stage} keeps {sent} resnets and {self.mirror(stage)} {taken}: an up stage must keep one resnet more than "
                    "the down stage it mirrors, for the skip connections"
                )
        resampling = [f"{s}.downsample" for s in down[:-1]] + [f"{s}.upsample" for s in up[:-1]]
        if missing := [module for module in resampling if module not in self.modules]:
            raise ValueError(f"{missing[0]} is missing, but the stage after it remains")

    def _enter(self, module: str, channels: int, skip: int = 0) -> int:
        expected, out = self.channels(module)
        if expected != channels + skip:
            got = f"{channels} + {skip} from the skip connection" if skip else f"{channels}"
            raise ValueError(f"{module} was built for {expected} input channels but would receive {got}")
        return out

    def _enter_if_present(self, module: str, channels: int) -> int:
        return self._enter(module, channels) if module in self.modules else channels

    # --- pruning

    kind = "UNet"
    stack_words = "an attention"

    depths: ClassVar[Mapping[str, int]] = {}
    """A UNet's blocks are in no plain lists."""

    @property
    def title(self) -> str:
        """What kind of UNet it is."""
        return f"{TITLES[self.family]} (context width {self.context_width})"

    def example(self) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
        """What a plan may remove and keep, as a starting point for a person."""
        deep = [a for a in sorted(self.modules) if ".attn." in a and not a.startswith("mid") and self.depth(a) > 1]
        first = next(a for a in sorted(self.modules) if ".attn." in a)
        remove = ("mid",) if "mid.resnet.0" in self.modules else () if deep else (first,)
        return remove, {deep[0]: tuple(range(self.depth(deep[0]) // 2))} if deep else {}

    def spelled_out(self, pattern: str) -> str:
        """A pattern of blocks without ``down.inner`` and ``up.inner``."""
        return pattern.replace("down.inner", self.stages("down")[-1]).replace("up.inner", "up.0")

    def nodes(self, block: str) -> Iterable[str]:
        """A block and everything that contains it, outermost first: ``down.2``, ``down.2.attn.0``, ``down.2.attn.0.block.3``."""
        parts = block.split(".")
        if parts[0] == "mid":
            yield "mid"
        for n in range(2, len(parts) + 1):
            head = ".".join(parts[:n])
            if re.search(r"\d$|sample$", head):
                yield head
        if len(parts) == 1:
            yield block

    def stack_of(self, block: str) -> str | None:
        """The stack of transformer blocks that an attention holds: its blocks are this name and a number."""
        return f"{block}.block" if kind(block) == "attn" else None

    def orphans(self, removed: Set[str]) -> set[str]:
        """The downsampling into, and the upsampling out of, removed stages."""

        def remaining(side: str) -> list[str]:
            return [s for s in self.stages(side) if any(b.startswith(f"{s}.resnet.") for b in self.blocks - removed)]

        down, up = remaining("down"), remaining("up")
        if not down or not up:
            raise ValueError("removes every resnet on one side of the UNet; keep some")
        return {f"{down[-1]}.downsample", f"{up[-1]}.upsample"} & (self.blocks - removed)

    def check_kept(self, shapes: Mapping[str, Shape]) -> None:
        """``ValueError`` unless the parameters of this UNet that are kept form one; its words follow the name of a plan."""
        kept = replace(self, shapes=shapes)
        for end in sorted(self.modules - kept.modules):
            if end.split(".")[0] not in ("down", "mid", "up"):
                raise ValueError(f"removes {end}, which every UNet needs; keep it")
        mid = {module for module in kept.modules if module.startswith("mid.")}
        if mid not in (set(), {"mid.resnet.0"}, {"mid.resnet.0", "mid.attn.0", "mid.resnet.1"}):
            raise ValueError(
                f"leaves a mid block of {', '.join(sorted(mid))}, which no UNet has; keep it whole, keep one resnet of it, or remove it"
            )
        for attention in sorted(block for block in kept.modules if ".attn." in block):
            if attention.replace("attn", "resnet") not in kept.modules:
                raise ValueError(f"keeps an attention but removes the resnet before it ({attention}); remove both")
            if not kept.depth(attention):
                raise ValueError(f"keeps an attention without any transformer block ({attention}); remove it whole")
        try:
            kept.check_wiring()
        except ValueError as error:
            raise ValueError(f"leaves no working UNet: {error}") from error

    def kept_residuals(self, rename: Rename) -> KeptSkips:
        """Its skip connections that a student has."""

        def stays(source: str) -> bool:
            # A layer without its attention still sends the output of its resnet.
            return rename(source.replace(".attn.", ".resnet.")) is not None

        kept = tuple(i for i, source in enumerate(self.skips) if stays(source))
        return KeptSkips(len(self.skips), kept, mid=rename(f"{self.stages('up')[0]}.resnet.0") is not None)

    @staticmethod
    def renumbered(blocks: Iterable[str]) -> dict[str, str]:
        """Renumber the remaining stages, resnets and transformer blocks from 0; an attention follows its resnet."""
        order = sorted(blocks, key=lambda block: [int(part) if part.isdigit() else part for part in block.split(".")])
        numbers: dict[str, dict[str, int]] = {}

        def new(scope: str, number: str) -> str:
            seen = numbers.setdefault(scope, {})
            return str(seen.setdefault(number, len(seen)))

        # Resnets first: they give their attentions the new number.
        for block in order:
            if match := re.match(r"((?:down|up))\.(\d+)\.resnet\.(\d+)", block):
                new(match[1], match[2])
                new(f"{match[1]}.{match[2]}", match[3])
        table = {}
        for block in order:
            parts = block.split(".")
            renamed = list(parts)
            if parts[0] in ("down", "up"):
                renamed[1] = new(parts[0], parts[1])
                if len(parts) > 3:
                    renamed[3] = new(f"{parts[0]}.{parts[1]}", parts[3])
            elif parts[:2] == ["mid", "resnet"]:
                renamed[2] = new("mid", parts[2])
            if len(parts) > 4 or parts[:2] == ["mid", "attn"] and len(parts) > 3:
                renamed[-1] = new(block.rsplit(".", 1)[0], parts[-1])
            table[block] = ".".join(renamed)
        return table
