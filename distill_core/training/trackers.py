"""Metrics for TensorBoard and Weights & Biases, besides metrics.csv."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping

from .run import Run

Track = Callable[[Mapping[str, float]], None]


def _tensorboard(run: Run, stack: contextlib.ExitStack) -> Track:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tracker tensorboard needs a package: python -m pip install tensorboard") from error
    writer = SummaryWriter(run.folder / "tensorboard")
    stack.callback(writer.close)

    def track(row: Mapping[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, int(row["step"]))

    return track


def _wandb(run: Run, stack: contextlib.ExitStack) -> Track:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("tracker wandb needs a package: python -m pip install wandb") from error
    # Offline unless the user's environment says otherwise; `wandb sync` uploads the data later.
    session = wandb.init(
        project="distill",
        name=run.folder.name,
        dir=run.folder,
        config=run.settings.to_mapping(),
        mode=os.environ.get("WANDB_MODE", "offline"),
    )
    stack.callback(session.finish)
    return lambda row: session.log(dict(row), step=int(row["step"]))


TRACKERS: dict[str, Callable[[Run, contextlib.ExitStack], Track]] = {"tensorboard": _tensorboard, "wandb": _wandb}


def open_trackers(run: Run, stack: contextlib.ExitStack) -> list[Track]:
    """The trackers of a run, closed with ``stack``; ``ValueError`` with the pip command if one is not installed."""
    return [TRACKERS[name](run, stack) for name in run.settings.trackers]
