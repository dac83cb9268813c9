"""The runs on the disk: their losses, whether they are complete, and what the charts are told of them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import folder_paths

from ...distill_core.training import live
from ...distill_core.training.run import METRICS
from ...distill_core.training.run_folders import delete_run, runs_in, stages_in, steps_kept
from .fingerprints import fingerprint_of
from .folders import RUNS, is_plain, run_folder
from .images import image_view

log = logging.getLogger("distill")
RUNS_ROUTE, RUN_ROUTE = "/distill/runs", "/distill/runs/{name}"


class SeenRuns:
    """Steps of each run at the last look, by which a run whose folder was deleted is known to train again."""

    def __init__(self) -> None:
        self._steps: dict[Path, int] = {}
        self._times_lost: dict[Path, int] = {}

    def look(self, run_name: str) -> None:
        """Remember the steps that a run has kept, so that the next look notices if they are gone."""
        self._look(run_folder(run_name))

    def fingerprint(self, run_name: str | None, total_steps: int | None, steps_per_queue: int | None) -> str | float:
        """The step an execution ends at: an unfinished run is executed again, a complete one is not, unless it was deleted."""
        return fingerprint_of(self._end, run_name, total_steps, steps_per_queue)

    def _end(self, run_name: str, total_steps: int, steps_per_queue: int) -> str:
        folder = run_folder(run_name)
        end = min(total_steps, self._look(folder) + steps_per_queue)
        return f"{end}, lost {self._times_lost.get(folder, 0)}"

    def _look(self, folder: Path) -> int:
        step = steps_kept(folder)
        if step < self._steps.get(folder, 0):
            self._times_lost[folder] = self._times_lost.get(folder, 0) + 1
        self._steps[folder] = step
        return step


SEEN_RUNS = SeenRuns()
"""Those of this server."""


def losses_of(run_name: str) -> dict[str, list[dict[str, float]]]:
    """The metrics of every step of a run, by stage if it has several; ``ValueError`` for a run without metrics."""
    found = live.metrics_by_stage(run_folder(run_name))
    if not found:
        raise ValueError(f"run_name {run_name!r}: no run of that name has losses; choose another, or leave it empty")
    return found


def losses_written(run_name: str) -> list[int]:
    """When a run wrote its losses; empty for a run without losses."""
    return [file.stat().st_mtime_ns for stage in stages_in(run_folder(run_name)) if (file := stage / METRICS).is_file()]


def tell_chart(message: dict[str, Any], sample: Path | None, node_id: str) -> None:
    """Send the progress of a training, and of which prompt it is part, to the charts of all open pages.

    sample: its newest sample image.
    """
    from server import PromptServer

    server = PromptServer.instance
    message = message | {"node": node_id, "sample": image_view(sample), "prompt": getattr(server, "last_prompt_id", None)}
    server.send_sync("distill.progress", message)


def routes_without(path: str) -> Any | None:
    """The server's table of routes; None without a server, or if it has this path already."""
    from server import PromptServer

    routes = getattr(PromptServer, "instance", None) and PromptServer.instance.routes
    return None if routes is None or any(getattr(route, "path", None) == path for route in routes) else routes


def serve_runs() -> None:
    """Serve the runs to the charts.

    ``GET /distill/runs``: what is on the disk, newest first, and whose name can be given to a node. ``GET /distill/runs/NAME``: the
    data of a run's chart; 204 if there is no run yet. ``DELETE /distill/runs/NAME``: delete it; 409 with the reason if that cannot be
    done. 404 for an invalid name.
    """
    from aiohttp import web

    if (routes := routes_without(RUN_ROUTE)) is None:
        return
    fresh = {"Cache-Control": "no-store"}

    def folder_of(request: web.Request) -> Path:
        try:
            return run_folder(request.match_info["name"])
        except ValueError:
            raise web.HTTPNotFound from None

    @routes.get(RUNS_ROUTE)
    async def list_runs(request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(_runs), headers=fresh)

    @routes.get(RUN_ROUTE)
    async def show_run(request: web.Request) -> web.Response:
        folder = folder_of(request)
        try:
            history = await asyncio.to_thread(live.history, folder)
            message = history and history | {"sample": image_view(live.newest_sample(folder))}
        except (OSError, ValueError) as error:  # the folder vanished, or is not readable
            log.warning("run %s cannot be shown: %s", folder.name, error)
            message = None
        if message is None:
            return web.Response(status=204)
        return web.json_response(message, headers=fresh)

    @routes.delete(RUN_ROUTE)
    async def remove_run(request: web.Request) -> web.Response:
        folder = folder_of(request)
        try:
            await asyncio.to_thread(delete_run, folder)
        except (OSError, ValueError) as error:
            return web.json_response({"error": str(error)}, status=409)
        return web.Response(status=204)


def _runs() -> list[dict[str, Any]]:
    """The runs on the disk, as JSON."""
    return [
        {
            "run": run.name,
            "kind": run.kind,
            "step": run.step,
            "total_steps": run.total_steps,
            "bytes": run.num_bytes,
            "path": str(run.result or ""),
        }
        for run in runs_in(Path(folder_paths.get_output_directory()) / RUNS)
        if is_plain(run.name)
    ]
