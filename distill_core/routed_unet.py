"""Students of ranges of timesteps as the one UNet of a diffusers pipeline.

``StableDiffusionPipeline.from_pretrained(..., unet=RoutedUNet.from_pretrained(folder))``: each call is answered by the
student in charge of its timestep, whatever the scheduler. Timesteps are those of the scheduler, whole or not.
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

from .architecture import Architecture
from .denoiser import DiffusersDenoiser
from .files import UNetFile, open_unet
from .lora import remap_lora
from .plan import KeptSkips, NameMap
from .ranges import TimestepRanges
from .router import dispatch
from .shared_base import SharedBase
from .students import Students
from .unet import load_unet

_ALIKE = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
)
"""What networks of one pipeline must have in common: what goes in and what comes out."""


def _on_each(name: str, *, of_loras: bool = False) -> Callable[..., None]:
    """A method pipelines call on their UNet, done to each network."""

    def method(self: RoutedUNet, *inputs, **options) -> None:
        if of_loras:
            self._refuse_loras_if_shared()
        for network in dict.fromkeys(self.networks):
            getattr(network, name)(*inputs, **options)

    method.__name__, method.__doc__ = name, f"``{name}`` of each network."
    return method


class RoutedUNet(ModelMixin, ConfigMixin):
    """Several networks, each in charge of a range of timesteps, behind the interface of a ``UNet2DConditionModel``."""

    config_name = "config.json"

    def __init__(self, networks: Sequence[UNet2DConditionModel], ranges: TimestepRanges):
        """networks: one for each range, the least noisy first; one network may be given more than once.

        ``ValueError`` for networks that cannot stand in for each other.
        """
        super().__init__()
        if len(networks) != len(ranges):
            raise ValueError(f"{len(ranges)} ranges need as many networks, got {len(networks)}")
        _check_alike(networks)
        self.ranges, self.networks = ranges, nn.ModuleList(networks)
        self.answers: tuple[Callable[..., tuple[Tensor]], ...] = tuple(networks)
        """What is called for each range."""
        self.register_to_config(**networks[-1].config)

    @classmethod
    def from_pretrained(cls, folder: Path | str, torch_dtype: torch.dtype = torch.float32) -> RoutedUNet:
        """Open a folder of students (`students.Students`); with a shared base there is one network with a LoRA a range.

        ``ValueError`` if the folder is unfinished, or holds files that do not belong together.
        """
        students = Students.read(folder)
        count = len(students.ranges)
        if students.base is None:
            networks = {path: _open(open_unet(path), torch_dtype) for path in dict.fromkeys(students.to_load)}
            return cls([networks[path] for path in students.to_load], students.ranges)
        file = students.unet(0)
        network = _open(file, torch_dtype)
        shared = SharedBase(DiffusersDenoiser(network=network, architecture=file.architecture), students.to_load)
        routed = cls([network] * count, students.ranges)
        routed.answers = tuple(shared.student(number).running for number in range(count))
        return routed

    def forward(
        self, sample: Tensor, timestep: Tensor | float, *inputs, return_dict: bool = True, **options
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """As ``UNet2DConditionModel.forward``: sample (B, C, H, W), timestep a number or (B,), the rest passed on."""
        t = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, dtype=torch.float64)

        def answer(number: int, which: Tensor | slice) -> Tensor:
            own = partial(_examples, which=which, batch=len(sample))
            when = t[which] if t.ndim else timestep
            return self.answers[number](own(sample), when, *own(inputs), **own(options), return_dict=False)[0]

        output = dispatch(self.ranges.of(t.detach().cpu().reshape(-1)), answer)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    # --- what pipelines read of their UNet, and do to it

    @property
    def add_embedding(self) -> nn.Module:
        """SDXL's pipeline reads of it how wide a label is."""
        return self.networks[-1].add_embedding

    @property
    def peft_config(self) -> dict[str, Any]:
        """LoRAs that are on all networks."""
        return self.networks[-1].peft_config

    def load_lora_adapter(self, state_dict: Mapping[str, Tensor], **options) -> None:
        """Put a LoRA on each network; ``ValueError`` if it does not fit every one of them."""
        self._refuse_loras_if_shared()
        networks = list(dict.fromkeys(self.networks))
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
            "a RoutedUNet is not written by the pipeline: keep the folder of students, save the pipeline without it "
            "(unet=None), and give it again with unet=RoutedUNet.from_pretrained(folder)"
        )

    def _refuse_loras_if_shared(self) -> None:
        if self.answers != tuple(self.networks):
            raise ValueError(
                "these students are LoRAs on one base, and a LoRA of the pipeline would switch them off; use a folder of full "
                "students, or load the LoRA in ComfyUI"
            )


def _open(file: UNetFile, dtype: torch.dtype) -> UNet2DConditionModel:
    """The network of a file, with the residuals of a teacher's ControlNet led to the blocks that stayed."""
    network = load_unet(file, dtype)
    if "distill.skips" in file.metadata:
        skips = KeptSkips.from_text(file.metadata["distill.skips"])
        network.register_forward_pre_hook(partial(_keep_residuals, skips), with_kwargs=True)
    return network


def _keep_residuals(skips: KeptSkips, network: nn.Module, inputs: tuple, options: dict[str, Any]) -> tuple[tuple, dict]:
    """Before ``UNet2DConditionModel.forward``: give each kept block the residual that was made for it."""
    residuals, of_mid = options.get("down_block_additional_residuals"), options.get("mid_block_additional_residual")
    if residuals is None or len(residuals) != skips.num_teacher:
        return inputs, options
    kept = {"down_block_additional_residuals": tuple(skips.select(residuals))}
    if of_mid is not None and not skips.mid:
        kept["mid_block_additional_residual"] = of_mid.new_zeros(1)  # diffusers wants one, and adds it whatever the shape
    return inputs, options | kept


def _examples(value: Any, which: Tensor | slice, batch: int) -> Any:
    """Some examples of everything in a structure that has as many as the batch; the rest as it is."""
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
                    f"network {number} has {name} {network.config.get(name)!r}, network 0 has {first.get(name)!r}; "
                    "networks of one pipeline must stand in for each other"
                )


def _check_lora(state_dict: Mapping[str, Tensor], network: UNet2DConditionModel, number: int) -> None:
    """``ValueError`` unless all of a LoRA's layers are in a network: those of a teacher would land on the wrong blocks."""
    of_unet = {name: tensor for name, tensor in state_dict.items() if name.startswith("unet.")}
    weights = {name.replace(".base_layer.", "."): w for name, w in network.state_dict().items() if ".lora_" not in name}
    architecture = Architecture.from_state_dict(weights)
    try:
        if of_unet:
            remap_lora(of_unet, architecture, NameMap.identity(architecture))
    except ValueError as error:
        raise ValueError(
            f"this LoRA does not fit network {number}: {error}. Make one for a pruned student with distill remap-lora; "
            "networks of different shapes take one each, by load_lora_adapter of each in .networks"
        ) from error
