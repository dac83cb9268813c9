"""What a UNet is made of, read from the names and shapes of its parameters alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import Tensor

from .layouts import find_unet, layout, split

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """A UNet of the Stable Diffusion family as its canonical parameter names and shapes.

    Everything else (stages, channels, depths, parameter count, the diffusers config) is derived from them.
    """

    shapes: Mapping[str, Shape]
    """Canonical parameter name -> shape."""
    head_channels: int | None = None
    """Channels of one attention head; None for SD1.x, whose attentions have eight heads of whatever width. It is the
    one property of the network that the shapes do not tell."""

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor | Shape], head_channels: int | None = None) -> Architecture:
        """Read a state dict, or the shapes of one, in either layout, with or without a prefix.

        ``head_channels`` is guessed where it is not given: 64 where the attentions project with linear layers (SD2,
        SDXL), eight heads otherwise (SD1.x).
        """
        spelling, prefix = find_unet(tensors)
        names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        canonical = layout(spelling).to_canonical(names)
        shapes = {canonical[n]: tuple(getattr(tensors[prefix + n], "shape", tensors[prefix + n])) for n in names}
        if head_channels is None and any(len(s) == 2 for n, s in shapes.items() if n.endswith("proj_in.weight")):
            head_channels = 64
        return cls(shapes, head_channels)

    @cached_property
    def modules(self) -> frozenset[str]:
        """Canonical modules: ``down.0.resnet.1``, ``mid.attn.0``, ``conv_in``, ..."""
        return frozenset(split(name)[0] for name in self.shapes)

    @cached_property
    def blocks(self) -> frozenset[str]:
        """Modules, and within attentions their transformer blocks: the finest grain a plan can remove."""
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
        """Width of the text embedding the cross-attentions read; None where there is no cross-attention."""
        return next((s[1] for n, s in self.shapes.items() if n.endswith("attn2.to_k.weight")), None)

    @property
    def label_width(self) -> int | None:
        """Width of the pooled vector (SDXL: 2816); None where the network takes none."""
        shape = self.shapes.get("label_embed.0.weight")
        return shape and shape[1]

    @property
    def family(self) -> str:
        """``sd1``, ``sd2``, ``sdxl``, or ``unet`` for any other; by how attention and conditioning are built."""
        linear = any(len(s) == 2 for n, s in self.shapes.items() if n.endswith("proj_in.weight"))
        if self.label_width is None and self.context_width is not None:
            return "sd2" if linear else "sd1"
        return "sdxl" if linear and self.label_width == 2816 else "unet"

    def heads(self, width: int) -> int:
        """Number of attention heads at a width in channels."""
        return 8 if self.head_channels is None else width // self.head_channels

    def check_wiring(self) -> None:
        """Follow the channels through the network, skip connections included; ``ValueError`` names the block at fault."""
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
                if not skips:
                    raise ValueError(
                        f"{stage}.resnet.{j} has no skip connection left: the up stages keep more resnets "
                        "than the down stages send"
                    )
                channels = self._enter(f"{stage}.resnet.{j}", channels, skips.pop())
                channels = self._enter_if_present(f"{stage}.attn.{j}", channels)
            channels = self._enter_if_present(f"{stage}.upsample", channels)
        if skips:
            raise ValueError(
                f"{len(skips)} skip connections of the down stages reach no up stage: an up stage must keep "
                "one resnet more than the down stage it mirrors"
            )
        self._enter("conv_out", channels)

    def _enter(self, module: str, channels: int, skip: int = 0) -> int:
        expected, out = self.channels(module)
        if expected != channels + skip:
            got = f"{channels} + {skip} from the skip connection" if skip else f"{channels}"
            raise ValueError(f"{module} was built for {expected} input channels but would receive {got}")
        return out

    def _enter_if_present(self, module: str, channels: int) -> int:
        return self._enter(module, channels) if module in self.modules else channels


def nodes(block: str) -> Iterable[str]:
    """A block and what contains it, from the outside in: ``down.2``, ``down.2.attn.0``, ``down.2.attn.0.block.3``."""
    parts = block.split(".")
    if parts[0] == "mid":
        yield "mid"
    for n in range(2, len(parts) + 1):
        head = ".".join(parts[:n])
        if re.search(r"\d$|sample$", head):
            yield head
    if len(parts) == 1:
        yield block
