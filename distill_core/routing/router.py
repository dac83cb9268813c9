"""Experts as one denoiser: each example goes to the expert for its timestep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.conditioning import Label
from ..diffusion.denoiser import Denoiser, DiffusersDenoiser, Load
from ..diffusion.ranges import TimestepRanges
from ..diffusion.schedule import NoiseSchedule
from ..networks.architecture import Architecture
from ..networks.build import load_unet
from ..networks.files import open_unet
from .experts import Experts


def dispatch(numbers: Tensor, predict: Callable[[int, Tensor | slice], Tensor]) -> Tensor:
    """Predictions for a batch, in its order, each by the network for its range.

    numbers: range of each example, (B,). ``predict(number, which)`` returns the predictions for the examples with indices
    ``which``. If all examples are in one range, it is called once with a slice of the whole batch.
    """
    present = numbers.unique().tolist()
    if len(present) == 1:
        return predict(present[0], slice(None))
    places = [(numbers == number).nonzero(as_tuple=True)[0] for number in present]
    predictions = [predict(number, which) for number, which in zip(present, places, strict=True)]
    return torch.cat(predictions)[torch.cat(places).argsort()]


class ExpertDenoiser:
    """A `denoiser.Predictor` made of experts, each loaded when first needed.

    Loading raises ``ValueError`` if an expert has another noise schedule or prediction type than the others.
    """

    def __init__(self, ranges: TimestepRanges, load: Sequence[Load]):
        """load: functions that load the expert of each range, noisiest first."""
        if len(load) != len(ranges):
            raise ValueError(f"there are {len(ranges)} ranges but {len(load)} experts; give one expert per range")
        self.ranges, self._load = ranges, load
        self._loaded: dict[int, Denoiser] = {}

    @classmethod
    def given(cls, ranges: TimestepRanges, experts: Sequence[Denoiser]) -> ExpertDenoiser:
        """Create it from loaded experts."""
        return cls(ranges, [partial(lambda expert: expert, expert) for expert in experts])

    @classmethod
    def open(cls, experts: Experts, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ExpertDenoiser:
        """Create it from a folder; with a shared base, one network serves all ranges."""
        if experts.base is None:
            load = cache(lambda path: _network(path, device, dtype))
            return cls(experts.ranges, [partial(load, path) for path in experts.to_load])
        from ..lora.switch import AdapterSwitch

        shared = AdapterSwitch(_network(experts.base, device, dtype), experts.to_load)
        return cls(experts.ranges, [partial(shared.using, number) for number in range(len(experts.ranges))])

    def expert(self, number: int) -> Denoiser:
        """The expert of a range, ready to predict."""
        if number not in self._loaded:
            expert = self._load[number]()
            for other in self._loaded.values():
                if expert.schedule != other.schedule or expert.prediction != other.prediction:
                    raise ValueError("the experts have different noise schedules or prediction types; train them alike")
            if expert.schedule.num_timesteps != self.ranges.num_timesteps:
                raise ValueError(
                    f"the ranges cover {self.ranges.num_timesteps} timesteps, but the expert's schedule has "
                    f"{expert.schedule.num_timesteps}; give boundaries for its schedule"
                )
            self._loaded[number] = expert
        return self._loaded[number]

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        """As `Denoiser.__call__`."""

        def predict(number: int, which: Tensor | slice) -> Tensor:
            own_label = label and Label(*(entry[which] for entry in label))
            return self.expert(number)(x_t[which], t[which], context[which], own_label)

        return dispatch(self.ranges.of(t), predict)

    # --- properties that all experts share

    @property
    def _any(self) -> Denoiser:
        """Any loaded expert, or else the noisiest, which sampling needs first."""
        return next(iter(self._loaded.values()), None) or self.expert(0)

    @property
    def schedule(self) -> NoiseSchedule:
        return self._any.schedule

    @property
    def prediction(self) -> str:
        return self._any.prediction

    @property
    def architecture(self) -> Architecture:
        """Architecture of one expert; inputs and outputs of all are the same."""
        return self._any.architecture

    @property
    def device(self) -> torch.device:
        return self._any.device

    @property
    def dtype(self) -> torch.dtype:
        return self._any.dtype


def _network(path: Path, device: torch.device | str, dtype: torch.dtype) -> DiffusersDenoiser:
    file = open_unet(path)
    network = load_unet(file, dtype).to(device)
    return DiffusersDenoiser.of_file(file, network)
