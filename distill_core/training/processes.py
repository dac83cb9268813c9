"""Training in one process, or in several that share each batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from .objective import OBJECTIVES

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.fsdp import FSDPModule

    from .settings import TrainingSettings


LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """The processes of a run; each computes its part of every batch, and the main one writes."""

    accelerator: Accelerator | None = None
    """None for one process."""
    shards: bool = False
    """Whether each process holds only a shard of every weight (fully sharded data parallel) instead of all weights."""

    @classmethod
    def launched(cls) -> Processes:
        """Processes that ``accelerate launch`` or ``torchrun`` started, sharded with ``--use_fsdp``; otherwise this one alone."""
        import os

        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return ALONE
        from accelerate import Accelerator, InitProcessGroupKwargs

        # The recipe sets the precision. Processes wait for the main one while it encodes or draws the data.
        patient = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
        alike = Accelerator(mixed_precision="no", dynamo_backend="no", kwargs_handlers=[patient])
        return cls(alike, os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"))

    def check(self, settings: TrainingSettings) -> None:
        """Raise ``ValueError`` for settings that these processes cannot share."""
        self.part_size(settings.batch_size, settings.accumulation_steps)
        if self.count > 1 and settings.weighted_objective.dmd:
            raise ValueError(
                f"objective {settings.objective} trains in one process; launch one, or choose the objective consistency"
            )
        if self.shards:
            unswapped = tuple(
                name for name, objective in OBJECTIVES.items() if not objective.few_steps
            )  # whose weights stay in place
            possible = {
                "objective": unswapped,
                "optimizer": ("adamw",),
                "precision": ("fp32", "bf16"),
                "weight_dtype": ("fp32",),
                "lora_rank": (0,),
            }
            for name, values in possible.items():
                if (value := getattr(settings, name)) not in values:
                    raise ValueError(
                        f"{name} {value} cannot be used with a student that is sharded over processes (--use_fsdp); "
                        f"choose {' or '.join(map(str, values))}, or launch without it"
                    )

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
        """Examples that a process computes at once; ``ValueError`` if the batch cannot be shared evenly."""
        size, left = divmod(batch_size, accumulation_steps * self.count)
        if left:
            raise ValueError(
                f"batch_size {batch_size} cannot be divided among {self.count} processes with {accumulation_steps} accumulation "
                "steps each; choose a multiple of their product"
            )
        return size

    def share(self, student: Denoiser) -> None:
        """From now on, average the student's gradients over all processes. Each process keeps its own teachers."""
        if self.shards:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.count,))
            for name in student.inner_blocks:
                fully_shard(student.module(name), mesh=mesh)
            fully_shard(student.network, mesh=mesh)
        elif self.accelerator:
            student.forward = self.accelerator.prepare_model(student.running)

    @contextlib.contextmanager
    def accumulating(self, student: Denoiser, more: bool) -> Iterator[None]:
        """Context of one part of a batch: processes exchange gradients only at the last part."""
        if self.shards:
            cast("FSDPModule", student.network).set_requires_gradient_sync(not more)
        wrapping = None if self.shards else self.accelerator
        with wrapping.no_sync(student.running) if wrapping and more else contextlib.nullcontext():
            yield

    def gathered(self, table: Tensor, parts: int) -> Tensor:
        """Measurements (terms, examples) of this process -> those of all processes, examples in batch order."""
        if not self.accelerator:
            return table
        everyones = self.accelerator.gather(table[None]).unflatten(2, (parts, -1))  # (process, term, part, example)
        return everyones.permute(1, 2, 0, 3).flatten(1)

    def wait(self) -> None:
        """Wait until every process reaches this point."""
        if self.accelerator:
            self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block first, so that work that is done once is ready for the others."""
        with self.accelerator.main_process_first() if self.accelerator else contextlib.nullcontext():
            yield

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        if self.accelerator:
            return self.accelerator.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


ALONE = Processes()
