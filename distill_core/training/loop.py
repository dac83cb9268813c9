"""The training loop: a student learns from its teachers, and training can stop after any step."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..base.interrupts import uninterrupted
from ..base.storage import ignore
from ..data.dataset import Dataset, num_examples
from ..diffusion.denoiser import Denoiser
from ..pruning.plan import PruningPlan
from .memory import MemorySettings, changes, is_out_of_memory
from .previews import Previews
from .processes import ALONE, Processes
from .run import Run
from .settings import TrainingSettings
from .teachers import Teachers
from .trackers import open_trackers
from .trainer import Trainer

log = logging.getLogger("distill")
PUBLISHED_EXAMPLES, PUBLISHED_EPOCHS = 212_776, 60  # BK-SDM: 50,000 steps of batch 256


class Progress(NamedTuple):
    """What a run reports after each step."""

    step: int
    """Steps done."""
    total_steps: int
    losses: Mapping[str, float]
    """Metrics of the step, as in `run.Run.metrics`."""
    seconds_per_step: float


class OutOfMemory(MemoryError):
    """The device is out of memory; the message says which settings to change."""


def distill(
    run: Run,
    *,
    student: Denoiser,
    teacher: Denoiser | Teachers,
    plan: PruningPlan | None,
    dataset: Dataset,
    num_steps: int | None = None,
    previews: Previews | None = None,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_refit: Callable[[int, int], None] = ignore,
    processes: Processes = ALONE,
) -> None:
    """Train the student for ``num_steps`` more steps, or until the run is complete.

    Trains the student's network in place, and leaves it alone if the run is complete; teachers are only read. ``plan`` is the plan that pruned the teacher to the
    student, None if both have the same shape. ``on_step`` is called after each step; any exception it raises (such as a
    cancel) ends the training, and the run keeps every completed step. ``on_refit(done, total)`` is called before each part of
    refitting a student, and after the last; an exception it raises ends the training before its first step. Raises `OutOfMemory`,
    ``FloatingPointError`` for a loss or gradient that is not finite, and ``ValueError`` if student, teachers or data do not match.
    """
    teachers = teacher if isinstance(teacher, Teachers) else Teachers.single(teacher, run.settings)
    processes.check(run.settings)
    if run.complete or num_steps == 0:
        return
    with run.training():
        processes.wait()  # until the main process has checked the run's folder
        try:
            _train(Trainer(run, student, teachers, plan, dataset, processes, on_refit), num_steps, previews, on_step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(_what_to_lower(run.settings, processes)) from error


def _train(trainer: Trainer, num_steps: int | None, previews: Previews | None, on_step: Callable[[Progress], None]) -> None:
    run, processes, first = trainer.run, trainer.processes, trainer.run.step
    last = min(run.settings.total_steps, first + (run.settings.total_steps if num_steps is None else num_steps))
    _warn_if_seen_too_often(num_examples(trainer.dataset), run.settings.total_steps * run.settings.batch_size)
    started = time.monotonic()
    with trainer.open(), contextlib.ExitStack() as stack:
        columns = trainer.columns(first)
        metrics = stack.enter_context(run.open_metrics(first, columns)) if processes.main else None
        trackers = open_trackers(run, stack) if processes.main else []
        written = first

        def write(measured: Mapping[str, float]) -> dict[str, float]:
            nonlocal written
            row = {"step": trainer.done, "lr": trainer.learning_rate(trainer.done - 1), **measured}
            if metrics is not None:
                metrics.write(row)
            written = trainer.done
            for track in trackers:
                track(row)
            return row

        try:
            for step in range(first, last):
                values, done = trainer.step(step), step + 1
                if run.settings.validate_every_steps and done % run.settings.validate_every_steps == 0:
                    values["validation"] = trainer.validate(step)
                row = write(values)
                if done < last and (
                    done % run.settings.save_every_steps == 0 or (run.settings.keep_best and "validation" in row)
                ):
                    trainer.save()
                if previews and _is_sampled(run.settings, done) and trainer.keeps:
                    trainer.draw(previews, step)
                on_step(Progress(done, run.settings.total_steps, row, (time.monotonic() - started) / (done - first)))
        finally:
            # A cancel or an error loses only the current step; a second Ctrl+C waits until the checkpoint is saved.
            with uninterrupted():
                trainer.save_if_sound()
                if trainer.done > written and trainer.sound:
                    write(trainer.measured)


def _is_sampled(settings: TrainingSettings, done: int) -> bool:
    """Whether sample images follow a step; those of the finished student always do."""
    every = settings.sample_every_steps
    return bool(every) and (done % every == 0 or done == settings.total_steps)


def _warn_if_seen_too_often(num_examples: int, num_seen: int) -> None:
    if num_seen > PUBLISHED_EPOCHS * num_examples:
        log.warning(
            "each of the %s examples will be seen %s times; BK-SDM's published students saw each of %s about %s times. "
            "Use more examples (the teacher can make them), or fewer steps",
            f"{num_examples:,}",
            f"{num_seen // num_examples:,}",
            f"{PUBLISHED_EXAMPLES:,}",
            PUBLISHED_EPOCHS,
        )


def _what_to_lower(settings: TrainingSettings, processes: Processes) -> str:
    """The out-of-memory message: settings that save memory, least costly first."""
    now = MemorySettings(training=settings, num_processes=processes.count, shards=processes.shards)
    what = [change.what for change in changes(now, of_teacher=False)]
    if settings.sample_every_steps:
        what.insert(0, "sample_every_steps 0")
    return (
        f"the device is out of memory; change, in this order: {', '.join(what)}; the run keeps every completed step, and "
        "gradient_checkpointing, accumulation_steps and sample_every_steps can be changed before it resumes"
    )
