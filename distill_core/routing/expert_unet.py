"""Experts as the single UNet of a diffusers pipeline.

``StableDiffusionPipeline.from_pretrained(..., unet=ExpertUNet.from_pretrained(folder))``: the expert for the timestep handles
each call, with any scheduler. Timesteps are those of the scheduler and may be fractional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from ..diffusion.denoiser import DiffusersDenoiser
from ..diffusion.ranges import TimestepRanges
from ..lora.remap import remap_lora
from ..lora.switch import AdapterSwitch
from ..networks.architecture import Architecture
from ..networks.build import load_unet
from ..networks.files import UNetFile, open_unet
from ..networks.name_map import NameMap
from ..networks.residuals import KeptSkips, kept_in
from .experts import Experts
from .router import dispatch

_ALIKE = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
)
"""Config entries that all networks of one pipeline must share: their inputs and outputs."""


def _on_each(name: str, *, of_loras: bool = False) -> Callable[..., None]:
    """A method that pipelines call on their UNet, forwarded to each network."""

    def method(self: ExpertUNet, *inputs, **options) -> None:
        if of_loras:
            self._refuse_loras_if_shared()
        for network in dict.fromkeys(self.networks):
            getattr(network, name)(*inputs, **options)

    method.__name__, method.__doc__ = name, f"``{name}`` of each network."
    return method


class ExpertUNet(ModelMixin, ConfigMixin):
    """Several networks, each for a range of timesteps, behind the interface of a ``UNet2DConditionModel``."""

    config_name = "config.json"

    def __init__(self, networks: Sequence[UNet2DConditionModel], ranges: TimestepRanges):
        """networks: one for each range, noisiest first; a network may appear more than once.

        ``ValueError`` for networks with different inputs or outputs.
        """
        super().__init__()
        if len(networks) != len(ranges):
            raise ValueError(f"there are {len(ranges)} ranges but {len(networks)} networks; give one network per range")
        _check_alike(networks)
        self.ranges, self.networks = ranges, nn.ModuleList(networks)
        self.predictors: tuple[Callable[..., tuple[Tensor]], ...] = tuple(networks)
        """The function called for each range."""
        self.register_to_config(**networks[-1].config)

    @classmethod
    def from_pretrained(cls, folder: Path | str, torch_dtype: torch.dtype = torch.float32) -> ExpertUNet:
        """Open a folder of experts (`experts.Experts`); with a shared base, one network with a LoRA per range.

        ``ValueError`` if the folder is incomplete, or its files do not match.
        """
        experts = Experts.read(folder)
        count = len(experts.ranges)
        if experts.base is None:
            networks = {path: _open(open_unet(path), torch_dtype) for path in dict.fromkeys(experts.to_load)}
            return cls([networks[path] for path in experts.to_load], experts.ranges)
        file = experts.unet(0)
        network = _open(file, torch_dtype)
        shared = AdapterSwitch(DiffusersDenoiser(network=network, architecture=file.architecture), experts.to_load)
        routed = cls([network] * count, experts.ranges)
        routed.predictors = tuple(shared.using(number).running for number in range(count))
        return routed

    def forward(
        self, sample: Tensor, timestep: Tensor | float, *inputs, return_dict: bool = True, **options
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """As ``UNet2DConditionModel.forward``: sample (B, C, H, W), timestep a number or (B,); other arguments are passed on."""
        t = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, dtype=torch.float64)

        def predict(number: int, which: Tensor | slice) -> Tensor:
            own = partial(_examples, which=which, batch=len(sample))
            when = t[which] if t.ndim else timestep
            return self.predictors[number](own(sample), when, *own(inputs), **own(options), return_dict=False)[0]

        output = dispatch(self.ranges.of(t.detach().cpu().reshape(-1)), predict)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    @property
    def _last(self) -> UNet2DConditionModel:
        """The network of the least noisy range."""
        return self.networks[-1]

    # --- attributes and methods that pipelines use

    @property
    def add_embedding(self) -> nn.Module:
        """SDXL's pipeline reads the label width from it."""
        return self._last.add_embedding

    @property
    def peft_config(self) -> dict[str, Any]:
        """LoRAs loaded on all networks."""
        return self._last.peft_config

    def load_lora_adapter(self, state_dict: Mapping[str, Tensor], **options) -> None:
        """Load a LoRA on each network; ``ValueError`` if one of them does not fit."""
        self._refuse_loras_if_shared()
        networks: list[UNet2DConditionModel] = list(dict.fromkeys(self.networks))
        for number, network in enumerate(networks):
            _check_lora(state_dict, network, number)
        for network in networks:
            network.load_lora_adapter({**state_dict}, **options)

    set_adapters = _on_each("set_adapters", of_loras=True)
    delete_adapters = _on_each("delete_adapters", of_loras=True)
    enable_lora = _on_each("enable_lora", of_loras=True)
    disable_lora = _on_each("disable_lora", of_loras=True)
    fuse_lora = _on_each("fuse_lora", of_loras=True)
    unfuse_lora = _on_each("unfuse_lora", of_loras=True)
    unload_lora = _on_each("unload_lora", of_loras=True)
    enable_freeu = _on_each("enable_freeu")
    disable_freeu = _on_each("disable_freeu")
    set_attention_slice = _on_each("set_attention_slice")

    def save_pretrained(self, *_, **__) -> None:
        raise ValueError(
            "the pipeline cannot save an ExpertUNet; keep the folder of experts, save the pipeline without it (unet=None), "
            "and pass unet=ExpertUNet.from_pretrained(folder) when you load it"
        )

    def _refuse_loras_if_shared(self) -> None:
        if self.predictors != tuple(self.networks):
            raise ValueError(
                "these experts are LoRAs on one base, and a LoRA of the pipeline would disable them; use a folder of full "
                "experts, or load the LoRA in ComfyUI"
            )


def _open(file: UNetFile, dtype: torch.dtype) -> UNet2DConditionModel:
    """Load a network; residuals of a teacher's ControlNet go to the blocks that were kept."""
    network = load_unet(file, dtype)
    if isinstance(skips := kept_in(file.metadata), KeptSkips):
        network.register_forward_pre_hook(partial(_keep_residuals, skips), with_kwargs=True)
    return network


def _keep_residuals(skips: KeptSkips, network: nn.Module, inputs: tuple, options: dict[str, Any]) -> tuple[tuple, dict]:
    """Forward pre-hook of ``UNet2DConditionModel``: select the ControlNet residuals of the kept blocks."""
    residuals, of_mid = options.get("down_block_additional_residuals"), options.get("mid_block_additional_residual")
    if residuals is None or len(residuals) != skips.num_teacher:
        return inputs, options
    kept = {"down_block_additional_residuals": tuple(skips.select(residuals))}
    if of_mid is not None and not skips.mid:
        kept["mid_block_additional_residual"] = of_mid.new_zeros(1)  # diffusers wants one, and adds it whatever the shape
    return inputs, options | kept


def _examples(value: Any, which: Tensor | slice, batch: int) -> Any:
    """Select examples from every tensor of batch length in a structure; keep the rest."""
    if isinstance(value, Tensor):
        return value[which] if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {name: _examples(entry, which, batch) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_examples(entry, which, batch) for entry in value)
    return value


def _check_alike(networks: Sequence[UNet2DConditionModel]) -> None:
    first = networks[0].config
    for number, network in enumerate(networks):
        for name in _ALIKE:
            if network.config.get(name) != first.get(name):
                raise ValueError(
                    f"network {number} has {name} {network.config.get(name)!r}, but network 0 has {first.get(name)!r}; "
                    "use networks with the same inputs and outputs"
                )


def _check_lora(state_dict: Mapping[str, Tensor], network: UNet2DConditionModel, number: int) -> None:
    """Raise ``ValueError`` unless a network has all layers of a LoRA; a teacher's LoRA would land on the wrong blocks."""
    of_unet = {name: tensor for name, tensor in state_dict.items() if name.startswith("unet.")}
    weights = {name.replace(".base_layer.", "."): w for name, w in network.state_dict().items() if ".lora_" not in name}
    architecture = Architecture.from_state_dict(weights)
    try:
        if of_unet:
            remap_lora(of_unet, architecture, NameMap.identity(architecture))
    except ValueError as error:
        raise ValueError(
            f"this LoRA does not fit network {number}: {error}. Convert it for a pruned student with distill remap-lora; for "
            "networks of different shapes, call load_lora_adapter of each network in .networks with its own LoRA"
        ) from error
