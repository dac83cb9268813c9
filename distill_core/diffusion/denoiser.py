"""Any noise-predicting network behind one call, and taps that collect the outputs of its blocks."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..networks.architecture import Architecture
from ..networks.layouts import heads, layout_named, split
from ..networks.lora_names import kohya_names
from ..networks.model_sampling import STABLE_DIFFUSION, ModelSampling
from .conditioning import Label
from .schedule import NoiseSchedule, of_sampling

if TYPE_CHECKING:
    from ..networks.files import UNetFile


READS_MORE = "this model reads {} channels and predicts {}: inpainting and editing models can be pruned but not trained here"


def check_trainable(architecture: Architecture | None, sampling: ModelSampling) -> None:
    """``ValueError`` for a network that cannot be trained: of an unsupported sampling, or that reads more than a latent."""
    sampling.check_trainable()
    if architecture is not None:
        reads, predicts = architecture.channels("conv_in")[0], architecture.channels("conv_out")[1]
        if reads != predicts:
            raise ValueError(READS_MORE.format(reads, predicts))


_INNER_BLOCK = re.compile(r".*\.(resnet|block)\.\d+")


class Predictor(Protocol):
    """What sampling and evaluation call: a denoiser, or several from which the timestep selects one."""

    @property
    def prediction(self) -> str:
        """What it predicts: a key of `schedule.PREDICTIONS`."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Noise levels of its timesteps."""

    @property
    def architecture(self) -> Architecture:
        """Architecture that gives its inputs and outputs."""

    @property
    def device(self) -> torch.device:
        """Device on which it computes."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which it computes."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        """x_t: (B, C, H, W); t: integer timesteps (B,); context: text embedding (B, L, D); label: for SDXL. (B, C, H, W)."""


@dataclass(kw_only=True)
class Denoiser:
    """``denoiser(x_t, t, context, label) -> prediction`` for a network, its noise schedule and its named blocks."""

    network: nn.Module
    architecture: Architecture
    sampling: ModelSampling = STABLE_DIFFUSION
    """How it is sampled."""
    noise_levels: NoiseSchedule | None = None
    """Noise levels of its timesteps, if they differ from those of ``sampling``."""
    forward: Callable[..., Any] | None = None
    """What is called in place of the network: the compiled network, or one wrapped to run on several devices."""
    computes: tuple[torch.device, torch.dtype] | None = None
    """Device and precision in which it computes, if its weights are stored on or in another."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """What it was pruned from, according to its file: see `files.UNetFile.origin`."""

    lora_as_peft: ClassVar[bool] = False
    """Whether LoRAs for it have peft's form, the only one that diffusers reads for it."""
    layout: ClassVar[str]
    """Layout of the network's parameter names: a key of `layouts.LAYOUTS`."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        """See `Predictor`."""
        raise NotImplementedError

    @property
    def prediction(self) -> str:
        """What the network predicts: a key of `schedule.PREDICTIONS`."""
        return self.sampling.prediction

    @functools.cached_property
    def schedule(self) -> NoiseSchedule:
        """Noise levels of its timesteps."""
        return of_sampling(self.sampling) if self.noise_levels is None else self.noise_levels

    @property
    def skipped(self) -> frozenset[str]:
        """Blocks of the network that it skips: one network may be a teacher and its student."""
        return frozenset()

    @property
    def runs(self) -> Mapping[str, tuple[str, str]]:
        """Blocks of the network that stand for a run of blocks when it skips those -> the first and the last of the run."""
        return {}

    @property
    def kept_blocks(self) -> Mapping[str, str]:
        """Blocks of a teacher whose hidden states its student should have, on one network -> the student's that make them."""
        return {}

    def tapped(self, value: Any) -> Tensor:
        """Of what a module returns, or is given, what `tap` collects: the first tensor."""
        return value[0] if isinstance(value, tuple) else getattr(value, "sample", value)

    @property
    def running(self) -> Callable[..., Any]:
        """What is called to predict."""
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
        """Path of a module in the network, by its canonical name."""
        return self._paths[name]

    @property
    def lora_names(self) -> dict[str, str]:
        """Layers that can have a LoRA, by canonical name -> their names in a LoRA file."""
        return kohya_names(self.architecture)

    @property
    def inner_blocks(self) -> list[str]:
        """Resnets and transformer blocks, by canonical name."""
        return list(filter(_INNER_BLOCK.fullmatch, sorted(self.architecture.blocks)))

    @property
    def latent_channels(self) -> int:
        """Channels of its input and of its predictions."""
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
        """Paths of parameters, layers and blocks, by canonical name; built once, because SDXL has thousands."""
        names = {head for name in self.architecture.shapes for head in heads(name) if head.startswith(split(name)[0])}
        return layout_named(self.layout).from_canonical(names)


class DiffusersDenoiser(Denoiser):
    """A ``UNet2DConditionModel``."""

    layout = "diffusers"

    @classmethod
    def of_file(cls, file: UNetFile, network: nn.Module) -> DiffusersDenoiser:
        """A denoiser with what a file gives besides the weights."""
        return cls(network=network, architecture=file.architecture, sampling=file.sampling, origin=file.origin)

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        added = None if label is None else {"text_embeds": label.pooled, "time_ids": label.sizes}
        return self.running(x_t, t, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0]


class LdmDenoiser(Denoiser):
    """A ``UNetModel`` in the LDM layout, called as CompVis and ComfyUI call it."""

    layout = "ldm"

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        y = None if label is None else label.vector()
        return self.running(x_t, timesteps=t.float(), context=context, y=y)


@contextlib.contextmanager
def tap(denoiser: Denoiser, names: Iterable[str], *, of_input: bool = False) -> Iterator[dict[str, Tensor]]:
    """While open, collect the outputs of the named modules: ``{name: tensor}``, refilled by every forward pass.

    of_input: collect their inputs instead.
    """
    seen: dict[str, Tensor] = {}

    def listen(name: str):
        def hook(module, inputs, output):
            seen[name] = denoiser.tapped(inputs if of_input else output)

        return denoiser.module(name).register_forward_hook(hook)

    handles = [listen(name) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def checkpointing(denoiser: Denoiser) -> Iterator[None]:
    """While open, resnets and transformer blocks keep only their inputs for the backward pass, and compute the rest again.

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
    """While open, a module runs another function in place of its own, or of one that already replaces it."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


Load = Callable[[], Denoiser]
