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

    from .recipe import Recipe


@dataclass(frozen=True)
class Processes:
    """The processes of a run; each takes its part of every batch, the main one writes."""

    accelerator: Accelerator | None = None
    """None for one process."""
    shards: bool = False
    """Whether each process holds a part of every weight alone (fully sharded data parallel); otherwise each holds all."""

    @classmethod
    def launched(cls) -> Processes:
        """Those ``accelerate launch`` or ``torchrun`` started, with ``--use_fsdp`` sharded; this one alone if neither did."""
        import os

        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return ALONE
        from accelerate import Accelerator

        return cls(Accelerator(), os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"))

    def check(self, recipe: Recipe) -> None:
        """``ValueError`` for a recipe that these processes cannot share."""
        self.part_size(recipe.batch_size, recipe.accumulation_steps)
        if self.shards:
            possible = {"optimizer": ("adamw",), "precision": ("fp32", "bf16"), "weight_dtype": ("fp32",), "lora_rank": (0,)}
            for name, values in possible.items():
                if (value := getattr(recipe, name)) not in values:
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
        """Examples of a batch that a process sees at once; ``ValueError`` if it cannot be shared evenly."""
        size, left = divmod(batch_size, accumulation_steps * self.count)
        if left:
            raise ValueError(
                f"batch_size {batch_size} cannot be shared by {self.count} processes in {accumulation_steps} accumulation steps "
                "each; choose a multiple of their product"
            )
        return size

    def share(self, student: Denoiser) -> None:
        """From here on gradients of the student are means over all processes. Teachers stay each process's own."""
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
        """Around one part of a batch: processes exchange gradients at the last part only."""
        if self.shards:
            student.network.set_requires_gradient_sync(not more)
        wraps = self.accelerator and not self.shards
        with self.accelerator.no_sync(student.running) if wraps and more else contextlib.nullcontext():
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


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, whole. Every process must come here."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shared_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, where and as the parameter of its shape is."""
    if not hasattr(parameter, "full_tensor"):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


ALONE = Processes()
