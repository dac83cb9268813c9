"""Comparable measurements of time and memory."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..training.memory import Ledger


def in_rounds(timed: Sequence[Callable[[], float]], num_rounds: int) -> list[float]:
    """Median seconds that each function returns, see `each_round`."""
    return [statistics.median(seconds) for seconds in each_round(timed, num_rounds)]


def each_round(timed: Sequence[Callable[[], float]], num_rounds: int) -> list[tuple[float, ...]]:
    """The seconds that each function returns in every round; a round calls all of them once, in turn."""
    rounds = [[one() for one in timed] for _ in range(num_rounds)]
    return list(zip(*rounds, strict=True))


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds until some work on a device is finished."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


class Peak:
    """Peak memory beyond what was in use before."""

    num_bytes = 0


@contextlib.contextmanager
def watched_memory(device: torch.device, weights: Sequence[Tensor] = ()) -> Iterator[Peak]:
    """Measure peak memory while open; the result is ready when it closes. On CUDA the allocator counts, elsewhere all live
    tensors made inside the block count, except ``weights`` and views of them."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.num_bytes = torch.cuda.max_memory_allocated(device) - before
    else:
        with Ledger(weights) as ledger:
            yield peak
        peak.num_bytes = ledger.most.total()


def peak_of(work: Callable[[], Any], weights: Sequence[Tensor], device: torch.device, num_warm_ups: int) -> int:
    """Peak memory of some work after warm-up, including the weights it uses."""
    for _ in range(num_warm_ups):
        work()
    with watched_memory(device, weights) as peak:
        work()
    return peak.num_bytes + sum(weight.nbytes for weight in weights)


def device_words(device: torch.device) -> str:
    """Name of a device, so that results can be told apart."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else f"CPU, threads: {torch.get_num_threads()}"
