"""What people see of a training while it runs, and after it: progress, chart, memory, losses."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from ...distill_core.base.sizes import gib
from ...distill_core.evaluation import plots
from ...distill_core.training.live import Live
from ...distill_core.training.loop import Progress as Step
from ...distill_core.training.memory import Forecast
from ...distill_core.training.previews import Previews
from ...distill_core.training.run import Run
from .images import to_image
from .interface import show_text
from .progress import Progress
from .runs import SEEN_RUNS, tell_chart
from .training import memory_in_use

log = logging.getLogger("distill")


class Watch:
    """Called after each step: updates the progress bar and the chart on the node, and stops on Cancel."""

    def __init__(self, run_name: str, first: int, last: int, node_id: str, previews: Previews | None = None):
        self.stage = ""  # what is being trained, when there are several experts
        self._live, self._first, self._node_id, self._previews = Live(run_name, last), first, node_id, previews
        self._progress = Progress(node_id, total=last - first)
        self._run_name = run_name

    def end(self) -> None:
        """Tell all open pages that the training has ended, whichever way."""
        tell_chart({"run": self._run_name, "ended": True}, None, self._node_id)

    def __call__(self, progress: Step) -> None:
        if message := self._live.tell(progress, time.monotonic()):
            sample = None if self._previews is None else self._previews.latest
            memory = memory_in_use()
            tell_chart(message | {"stage": self.stage, "memory": memory}, sample, self._node_id)
        self._progress.at(progress.step - self._first)


def tell_needs(forecast: Forecast, free_bytes: int, node_id: str, on_disk_bytes: int = 0) -> str:
    """Show on the node, and return, what a step and the run's checkpoints need, with advice if it is too much.

    Writes the parts to the log.
    """
    log.info("%s", forecast.describe())
    shortage = forecast.describe_shortage(free_bytes, of_teacher=False)
    if shortage:
        log.warning("%s", shortage)
    told = [shortage or f"a step needs about {gib(forecast.total_bytes)} of memory"]
    if on_disk_bytes:
        told.append(f"the run's checkpoints take up to {gib(on_disk_bytes)} on the disk")
    needs = "\n".join(told)
    show_text(needs, node_id)
    return needs


def refit_progress(node_id: str, needs: str) -> Callable[[int, int], None]:
    """Shows the progress of a refit on the node, and after it again what the training needs."""
    progress = Progress(node_id, "parts of the refit")

    def at(done: int, total: int) -> None:
        progress.at(done, total)
        if done == total:
            show_text(needs, node_id)

    return at


def show_run(run: Run, node_id: str) -> tuple[dict, torch.Tensor]:
    """Show the progress of a run on the node; returns its losses for Plot Loss Graph, and their curve as an image."""
    metrics = run.metrics()
    curve = to_image(plots.loss_curve(metrics, title(run)))
    SEEN_RUNS.look(run.folder.name)
    state = "complete" if run.complete else "queue again to go on"
    sampling = ", ".join(f"{name} {value}" for name, value in run.settings.sampling.items())
    hint = f"\nSample with {sampling}" if sampling else ""
    show_text(f"step {run.step} of {run.settings.total_steps}: {state}{hint}", node_id)
    return {"loss": [row["total"] for row in metrics]}, curve


def title(run: Run) -> str:
    return f"{run.folder.name}, {run.settings.objective}"
