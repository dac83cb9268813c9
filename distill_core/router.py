"""Students of ranges of timesteps as one denoiser: each example goes to the student in charge of its timestep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from .architecture import Architecture
from .denoiser import Denoiser, DiffusersDenoiser, Label
from .files import open_unet
from .ranges import TimestepRanges
from .schedule import NoiseSchedule
from .students import Students
from .unet import load_unet

Load = Callable[[], Denoiser]


def dispatch(numbers: Tensor, answer: Callable[[int, Tensor | slice], Tensor]) -> Tensor:
    """Answers of a batch, in its order, each by the network in charge of it.

    numbers: range of each example, (B,). ``answer(number, which)`` gives the answers of some examples, ``which`` being
    their places; a slice of all where one network is in charge of the whole batch, which is then called once.
    """
    present = numbers.unique().tolist()
    if len(present) == 1:
        return answer(present[0], slice(None))
    places = [(numbers == number).nonzero(as_tuple=True)[0] for number in present]
    answers = [answer(number, which) for number, which in zip(present, places, strict=True)]
    return torch.cat(answers)[torch.cat(places).argsort()]


class Routed:
    """Has what sampling and evaluation need of a `Denoiser`. Students are loaded when they are first needed.

    ``ValueError`` when a student is loaded that has another noise schedule or prediction type than the others.
    """

    def __init__(self, ranges: TimestepRanges, load: Sequence[Load]):
        """load: what gives the student of each range, the least noisy first."""
        if len(load) != len(ranges):
            raise ValueError(f"{len(ranges)} ranges need as many students, got {len(load)}")
        self.ranges, self._load, self._loaded = ranges, load, {}

    @classmethod
    def given(cls, ranges: TimestepRanges, students: Sequence[Denoiser]) -> Routed:
        """Of students that are there already."""
        return cls(ranges, [lambda student=student: student for student in students])

    @classmethod
    def open(cls, students: Students, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Routed:
        """Of a folder; with a shared base there is one network for all ranges."""
        if students.base is None:
            load = cache(lambda path: _network(path, device, dtype))
            return cls(students.ranges, [partial(load, path) for path in students.to_load])
        from .shared_base import SharedBase

        shared = SharedBase(_network(students.base, device, dtype), students.to_load)
        return cls(students.ranges, [lambda n=n: shared.student(n) for n in range(len(students.ranges))])

    def student(self, number: int) -> Denoiser:
        """The student of a range, ready to answer."""
        if number not in self._loaded:
            student = self._load[number]()
            for other in self._loaded.values():
                if student.schedule != other.schedule or student.prediction != other.prediction:
                    raise ValueError("the students are of different noise schedules or prediction types; train them alike")
            if student.schedule.num_timesteps != self.ranges.num_timesteps:
                raise ValueError(
                    f"the ranges are of {self.ranges.num_timesteps} timesteps, the student's schedule has "
                    f"{student.schedule.num_timesteps}; give boundaries for its schedule"
                )
            self._loaded[number] = student
        return self._loaded[number]

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor, label: Label | None = None) -> Tensor:
        """As `Denoiser.__call__`."""

        def answer(number: int, which: Tensor | slice) -> Tensor:
            own_label = label and Label(*(entry[which] for entry in label))
            return self.student(number)(x_t[which], t[which], context[which], own_label)

        return dispatch(self.ranges.of(t), answer)

    # --- what is the same of all students

    @property
    def _any(self) -> Denoiser:
        """Sampling begins with the noisiest."""
        return next(iter(self._loaded.values()), None) or self.student(len(self.ranges) - 1)

    @property
    def schedule(self) -> NoiseSchedule:
        return self._any.schedule

    @property
    def prediction(self) -> str:
        return self._any.prediction

    @property
    def architecture(self) -> Architecture:
        """Of one of the students: what goes in and comes out is the same of all."""
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
