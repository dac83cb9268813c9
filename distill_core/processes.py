"""Training in one process, or in several that share each batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .denoiser import Denoiser

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Processes:
    """The processes of a run; each takes its part of every batch, the main one writes."""

    accelerator: Accelerator | None = None
    """None for one process."""

    @classmethod
    def launched(cls) -> Processes:
        """Those ``accelerate launch`` or ``torchrun`` started; this one alone if neither did."""
        import os

        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return ALONE
        from accelerate import Accelerator

        return cls(Accelerator())

    @property
    def rank(self) -> int:
        return self.accelerator.process_index if self.accelerator else 0

    @property
    def count(self) -> int:
        return self.accelerator.num_processes if self.accelerator else 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def part_size(self, batch_size: int, accumulation_steps: int) -> int:
        """Examples of a batch that a process sees at once; ``ValueError`` if it cannot be shared evenly."""
        size, left = divmod(batch_size, accumulation_steps * self.count)
        if left:
            raise ValueError(
                f"batch_size {batch_size} cannot be shared by {self.count} processes in {accumulation_steps} accumulation steps "
                "each; choose a multiple of their product"
            )
        return size

    @contextlib.contextmanager
    def sharing(self, student: Denoiser) -> Iterator[None]:
        """While open, gradients of the student are means over all processes. Teachers stay each process's own."""
        if self.accelerator:
            student.forward = self.accelerator.prepare_model(student.running)
        yield

    @contextlib.contextmanager
    def accumulating(self, student: Denoiser, more: bool) -> Iterator[None]:
        """Around one part of a batch: processes exchange gradients at the last part only."""
        with self.accelerator.no_sync(student.running) if self.accelerator and more else contextlib.nullcontext():
            yield

    def gathered(self, table: Tensor, parts: int) -> Tensor:
        """Measurements (terms, examples) of this process -> of all, the examples in the order of the batch."""
        if not self.accelerator:
            return table
        everyones = self.accelerator.gather(table[None]).unflatten(2, (parts, -1))  # (process, term, part, example)
        return everyones.permute(1, 2, 0, 3).flatten(1)

    def wait(self) -> None:
        """Until every process has come here."""
        if self.accelerator:
            self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through first, so that the others find done what is done once."""
        with self.accelerator.main_process_first() if self.accelerator else contextlib.nullcontext():
            yield

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        if self.accelerator:
            return self.accelerator.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


ALONE = Processes()
