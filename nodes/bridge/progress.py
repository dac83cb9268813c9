"""The progress of a long task, shown on its node."""

from __future__ import annotations

import time

import comfy.utils

from .interface import show_text, throw_if_cancelled

SECONDS_BETWEEN_TEXTS = 0.5


class Progress:
    """A bar and a line of text on a node: what is done, and the time left. `add` and `at` stop the task if it was cancelled."""

    def __init__(self, node_id: str, what: str = "", total: int = 1, each: int = 1):
        """what: what is counted, in the plural, such as ``images``; without it there is no text until `tell`.

        each: how much of what is done makes one of them, such as the steps of an image.
        """
        self.done, self.total = 0, total
        self._node_id, self._what, self._each, self._text, self._shown_at = node_id, what, each, "", 0.0
        self._bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self._began: tuple[int, float] | None = None

    def tell(self, text: str) -> None:
        """Show what is being done, in place of the count."""
        self._text = text
        self._show(time.monotonic())

    def add(self, count: int = 1, preview=None) -> None:
        """Count more as done. preview: an image for the node, as ComfyUI's progress bar takes it."""
        self.at(self.done + count, preview=preview)

    def at(self, done: int, total: int | None = None, preview=None) -> None:
        """Set how much is done. The first call counts as the start: what was done before it took no time."""
        now = time.monotonic()
        self.done, self.total = done, self.total if total is None else total
        self._began = self._began or (done, now)
        self._bar.update_absolute(done, self.total, preview)
        if now - self._shown_at >= SECONDS_BETWEEN_TEXTS or done == self.total:
            self._show(now)
        throw_if_cancelled()

    def _show(self, now: float) -> None:
        counted = f"{self.done // self._each} of {self.total // self._each} {self._what}" if self._what else ""
        text = self._text or counted
        if text:
            self._shown_at = now
            show_text(text + self._left(now), self._node_id)

    def _left(self, now: float) -> str:
        first, began = self._began or (0, now)
        if not first < self.done < self.total:
            return ""
        return f", {duration((self.total - self.done) * (now - began) / (self.done - first))} left"


def duration(seconds: float) -> str:
    """A duration as text: ``2 min 10 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
