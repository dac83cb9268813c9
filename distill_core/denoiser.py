"""Any noise-predicting network behind one call, and the taps that listen to its blocks."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .architecture import Architecture
from .layouts import heads, layout, split
from .lora import kohya_names
from .model_sampling import ModelSampling
from .schedule import NoiseSchedule

if TYPE_CHECKING:
    from .files import UNetFile


class Label(NamedTuple):
    """What an SDXL is told besides the caption (Podell et al. 2023, arXiv 2307.01952, Sec. 2.2)."""

    pooled: Tensor
    """Pooled text embedding, (B, 1280)."""
    sizes: Tensor
    """Original height and width, crop from top and left, target height and width, in pixels, (B, 6)."""

    @classmethod
    def neutral(cls, label_width: int, batch: int, size_px: tuple[int, int], like: Tensor) -> Label:
        """An empty caption, for an uncropped picture of a height and width."""
        sizes = like.new_tensor([*size_px, 0, 0, *size_px]).expand(batch, 6)
        return cls(like.new_zeros(batch, label_width - 6 * SIZE_CHANNELS), sizes)

    def to(self, like: Tensor) -> Label:
        """On a device and, for the embedding, in a precision; the sizes stay exact in float32."""
        return Label(self.pooled.to(like), self.sizes.to(like.device, torch.float32))

    def vector(self) -> Tensor:
        """The one vector a network in the LDM layout takes, (B, P + 6 * 256): each size as 256 cosines and sines."""
        half = SIZE_CHANNELS // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=self.sizes.device, dtype=torch.float32) / half)
        angles = self.sizes.float()[..., None] * frequencies
        return torch.cat([self.pooled, torch.cat([angles.cos(), angles.sin()], -1).flatten(1).to(self.pooled)], 1)


def check_trainable(architecture: Architecture | None, sampling: ModelSampling) -> None:
    """``ValueError`` for a network that the training engine cannot ask: of another sampling, or that reads more than a latent."""
    sampling.check_trainable()
    if architecture is not None:
        reads, predicts = architecture.channels("conv_in")[0], architecture.channels("conv_out")[1]
        if reads != predicts:
            raise ValueError(
                f"this model reads {reads} channels and predicts {predicts}: inpainting and editing models can be pruned, but "
                "not trained, here"
            )


SIZE_CHANNELS = 256
_INNER_BLOCK = re.compile(r".*\.(resnet|block)\.\d+")


@dataclass(kw_only=True)
class Denoiser:
    """``denoiser(x_t, t, context, label) -> prediction`` for a network, its noise schedule and its named blocks."""

    network: nn.Module
    architecture: Architecture
    sampling: ModelSampling = ModelSampling()
    """How it is sampled."""
    noise_levels: NoiseSchedule | None = None
    """Noise levels of its timesteps where they are others than ``sampling`` tells."""
    forward: Callable[..., Any] | None = None
    """What is called in place of the network: it compiled, or wrapped to run on several devices."""
    computes: tuple[torch.device, torch.dtype] | None = None
    """Where and in what it computes, if its weights are kept elsewhere or otherwise."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """What it was pruned from, as its file tells it: see `files.UNetFile.origin`."""

    spelling: ClassVar[str]
    """Layout of the network's parameter names: a key of `layouts.LAYOUTS`."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        """x_t: (B, C, H, W); t: integer timesteps (B,); context: text embedding (B, L, D); label: for SDXL. (B, C, H, W)."""
        raise NotImplementedError

    @property
    def prediction(self) -> str:
        """What the network predicts: a key of `schedule.PREDICTIONS`."""
        return self.sampling.prediction

    @functools.cached_property
    def schedule(self) -> NoiseSchedule:
        """Noise levels of its timesteps."""
        return self.sampling.schedule if self.noise_levels is None else self.noise_levels

    @property
    def running(self) -> Callable[..., Any]:
        """What is called to answer."""
        return self.network if self.forward is None else self.forward

    @property
    def device(self) -> torch.device:
        return self.computes[0] if self.computes else next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.computes[1] if self.computes else next(self.network.parameters()).dtype

    @property
    def computes_in_fp16(self) -> bool:
        """Whether gradients pass through float16 even without autocast, so that the loss has to be scaled."""
        return self.dtype == torch.float16

    def module(self, name: str) -> nn.Module:
        """Module by canonical name, such as ``down.0.downsample`` or ``up.1.attn.0.proj_out``."""
        return self.network.get_submodule(self.path(name))

    def path(self, name: str) -> str:
        """Where in the network a module is, by its canonical name."""
        return self._paths[name]

    @property
    def lora_names(self) -> dict[str, str]:
        """Layers a LoRA may sit on, by canonical name -> how a LoRA file calls them."""
        return kohya_names(self.architecture)

    @property
    def inner_blocks(self) -> list[str]:
        """Resnets and transformer blocks, by canonical name."""
        return list(filter(_INNER_BLOCK.fullmatch, sorted(self.architecture.blocks)))

    @property
    def latent_channels(self) -> int:
        """Channels of what it is shown and of its answers."""
        return self.architecture.channels("conv_in")[0]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by canonical name."""
        theirs = dict(self.network.named_parameters())
        return {name: theirs[self._paths[name]] for name in self.architecture.shapes}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy weights by canonical name into the network."""
        self.network.load_state_dict({self._paths[name]: weight for name, weight in state_dict.items()})

    @functools.cached_property
    def _paths(self) -> dict[str, str]:
        """Where parameters, layers and blocks are, by canonical name: made once, for SDXL has thousands."""
        names = {head for name in self.architecture.shapes for head in heads(name) if head.startswith(split(name)[0])}
        return layout(self.spelling).from_canonical(names)


class DiffusersDenoiser(Denoiser):
    """A ``UNet2DConditionModel``."""

    spelling = "diffusers"

    @classmethod
    def of_file(cls, file: UNetFile, network: nn.Module) -> DiffusersDenoiser:
        """With what a file tells besides the weights."""
        return cls(network=network, architecture=file.architecture, sampling=file.sampling, origin=file.origin)

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        added = None if label is None else {"text_embeds": label.pooled, "time_ids": label.sizes}
        return self.running(x_t, t, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0]


class LdmDenoiser(Denoiser):
    """A ``UNetModel`` in the LDM layout, called as CompVis and ComfyUI call it."""

    spelling = "ldm"

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        y = None if label is None else label.vector()
        return self.running(x_t, timesteps=t.float(), context=context, y=y)


@contextlib.contextmanager
def tap(denoiser: Denoiser, names: Iterable[str], *, of_input: bool = False) -> Iterator[dict[str, Tensor]]:
    """While open, collect what the named modules put out: ``{name: tensor}``, refilled by every forward pass.

    of_input: collect what goes into them instead.
    """
    seen: dict[str, Tensor] = {}

    def listen(name: str):
        def hook(module, inputs, output):
            value = inputs if of_input else output
            seen[name] = value[0] if isinstance(value, tuple) else getattr(value, "sample", value)

        return denoiser.module(name).register_forward_hook(hook)

    handles = [listen(name) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def checkpointing(denoiser: Denoiser) -> Iterator[None]:
    """While open, resnets and transformer blocks keep their inputs alone for the backward pass, and compute the rest again.

    Not reentrant, so that a tapped feature within a block carries its gradient.
    """
    from torch.utils.checkpoint import checkpoint

    with contextlib.ExitStack() as stack:
        for name in denoiser.inner_blocks:
            module = denoiser.module(name)
            again = functools.partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(instead(module, again))
        yield


@contextlib.contextmanager
def instead(module: nn.Module, forward: Callable) -> Iterator[None]:
    """While open, a module runs another function than its own, or than one that stands in for it already."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
