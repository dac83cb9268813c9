"""The user interface: folders and files, text on a node, images, the cancel button."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy.cli_args import args
from torch import Tensor

from ...distill_core.base.storage import WriteError
from ...distill_core.routing.experts import MANIFEST
from ...distill_core.training import live
from ...distill_core.training.run import METRICS
from ...distill_core.training.run_folders import delete_run, runs_in, stages_in, steps_kept

log = logging.getLogger("distill")

RUNS_ROUTE, RUN_ROUTE = "/distill/runs", "/distill/runs/{name}"
OWN_FOLDERS = ("distill_runs", "distill_data")  # under the output folder; saved models and reports stay out of them
MOST_NAME_BYTES = 180  # of the 255 that file systems allow; temporary folders have longer names
THUMBNAIL_PX = 256
_seen: dict[Path, int] = {}  # steps of each run at the last look
_lost: dict[Path, int] = {}


def run_folder(name: str) -> Path:
    """Folder of a run under ComfyUI's output folder; ``ValueError`` for a name that is not a plain folder name."""
    return _output_folder("distill_runs", name, "run_name")


def data_folder(name: str) -> Path:
    """Folder of data under ComfyUI's output folder; ``ValueError`` for a name that is not a plain folder name."""
    return _output_folder("distill_data", name, "name")


def _output_folder(inside: str, name: str, setting: str) -> Path:
    root = os.path.join(folder_paths.get_output_directory(), inside)
    folder = os.path.join(root, name)
    if not _is_plain(name) or not folder_paths.is_within_directory(root, folder):
        raise ValueError(f"{setting} {name!r} must be a plain name of letters, digits, spaces, dots, dashes and underscores")
    if len(name.encode()) > MOST_NAME_BYTES:
        raise ValueError(f"{setting} {name!r} is too long for the name of a folder; choose a shorter one")
    return Path(folder)


def _is_plain(name: str) -> bool:
    """Whether a name is one of a folder everywhere, and of none that Windows reserves."""
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE)
    return not reserved and bool(re.fullmatch(r"\w([\w .-]{0,98}[\w-])?", name))


def losses_of(run_name: str) -> dict[str, list[dict[str, float]]]:
    """The metrics of every step of a run, by stage if it has several; ``ValueError`` for a run without metrics."""
    found = live.metrics_by_stage(run_folder(run_name))
    if not found:
        raise ValueError(f"run_name {run_name!r}: no run of that name has losses; choose another, or leave it empty")
    return found


def losses_written(run_name: str) -> list[int]:
    """When a run wrote its losses; empty for a run without losses, or an invalid name."""
    try:
        folder = run_folder(run_name)
    except ValueError:  # execute raises the error about the name
        return []
    return [file.stat().st_mtime_ns for stage in stages_in(folder) if (file := stage / METRICS).is_file()]


def newest_step(run_name: str) -> int:
    """Steps a run has kept, summed over its stages; 0 for a run without checkpoints, or an invalid name."""
    try:
        folder = run_folder(run_name)
    except ValueError:  # execute raises the error about the name
        return 0
    step = steps_kept(folder)
    if step < _seen.get(folder, 0):
        _lost[folder] = _lost.get(folder, 0) + 1
    _seen[folder] = step
    return step


def times_lost(run_name: str) -> int:
    """How often steps that this server had seen disappeared, as when a run's folder was deleted; then the run trains again."""
    return next((count for folder, count in _lost.items() if folder.name == run_name), 0)


def experts_folders() -> dict[str, Path]:
    """Folders of experts by their name in the list: the run's name, or the path under models/diffusion_models."""
    runs = Path(folder_paths.get_output_directory()) / "distill_runs"
    found = {path.parents[1].name: path.parent for path in sorted(runs.glob(f"*/experts/{MANIFEST}"))}
    for file in folder_paths.get_filename_list("diffusion_models"):
        name = Path(file).parent.as_posix()
        if name == "." or name in found or (path := folder_paths.get_full_path("diffusion_models", file)) is None:
            continue  # None: a link that leads nowhere
        if (Path(path).parent / MANIFEST).exists():
            found[name] = Path(path).parent
    return found


def experts_folder(name: str) -> Path:
    """A folder of experts by its name in the list; ``ValueError`` for an unknown name."""
    folders = experts_folders()
    if name not in folders:
        raise ValueError(f"there is no folder of experts {name!r}; press R to refresh the list")
    return folders[name]


def output_path(prefix: str, suffix: str) -> Path:
    """The next free numbered path under ComfyUI's output folder, numbered like those of its own Save nodes."""
    root, said = folder_paths.get_output_directory(), f"filename_prefix {prefix!r}"
    prefix = prefix.replace("\\", "/")  # a graph made on Windows
    name, target = prefix.rpartition("/")[2], os.path.join(root, os.path.dirname(os.path.normpath(prefix)))
    if any(_is_within(target, os.path.join(root, folder)) for folder in OWN_FOLDERS):
        raise ValueError(f"{said} leads into a folder reserved for runs or data; choose another")
    if not name.strip(". "):
        raise ValueError(f"{said} has no file name; add one, such as diffusion_models/student")
    if name.startswith("."):
        raise ValueError(f"{said} would make a hidden file, which no loader lists; begin the name with a letter")
    if not folder_paths.is_within_directory(root, target):
        raise ValueError(f"{said} leads out of the output folder; keep it inside")
    try:
        folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, root)
    except OSError as error:
        raise WriteError(Path(root) / prefix, error.strerror or str(error)) from error
    return Path(folder) / f"{name}_{counter:05}_{suffix}"


def _is_within(path: str, folder: str) -> bool:
    """Whether a path lies in a folder; follows links, and ignores case, as some disks do."""
    return folder_paths.is_within_directory(os.path.realpath(folder).casefold(), os.path.realpath(path).casefold())


def file_in(folder: str, name: str) -> Path:
    """Path of a file that ComfyUI lists in one of its model folders, be it a link; ``ValueError`` for any other name."""
    if name in folder_paths.get_filename_list(folder) and (path := folder_paths.get_full_path(folder, name)) is not None:
        return Path(path)
    raise ValueError(f"there is no file {name!r} under models/{folder}; press R to refresh the list")


def about_graph(prompt: dict | None, extra: dict | None) -> dict[str, str]:
    """The graph as entries of a file's header, by which dropping the file onto the canvas opens it; none with --disable-metadata."""
    if args.disable_metadata:
        return {}
    parts = {name: value for name, value in {"prompt": prompt, **(extra or {})}.items() if value is not None}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in parts.items()}


def thumbnail(image: Tensor) -> str:
    """The first of an IMAGE as ModelSpec has it: a small JPEG in a data URL."""
    from PIL import Image

    if image.shape[0] == 0 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"the thumbnail has the shape {tuple(image.shape)}; connect an image in color")
    pixels = image[0, ..., :3].expand(-1, -1, 3).nan_to_num().clamp(0, 1)
    small = Image.fromarray((pixels * 255).round().byte().cpu().numpy())
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    written = BytesIO()
    small.save(written, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(written.getvalue()).decode()}"


def throw_if_cancelled() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def show_text(text: str, node_id: str) -> None:
    """Show a line of text on the node; the next one replaces it."""
    from server import PromptServer

    PromptServer.instance.send_progress_text(text, node_id)


def tell_chart(message: dict[str, Any], sample: Path | None, node_id: str) -> None:
    """Send the progress of a training, and of which prompt it is part, to the charts of all open pages.

    sample: its newest sample image.
    """
    from server import PromptServer

    server = PromptServer.instance
    message = message | {"node": node_id, "sample": _image_view(sample), "prompt": getattr(server, "last_prompt_id", None)}
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
            message = history and history | {"sample": _image_view(live.newest_sample(folder))}
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
        for run in runs_in(Path(folder_paths.get_output_directory()) / OWN_FOLDERS[0])
        if _is_plain(run.name)
    ]


def _image_view(path: Path | None) -> dict[str, Any] | None:
    """The parameters of ComfyUI's ``/view`` for an image in the output folder; ``version`` changes with its content."""
    if path is None:
        return None
    place = path.relative_to(folder_paths.get_output_directory())
    image = {"filename": place.name, "subfolder": place.parent.as_posix(), "type": "output"}
    return image | {"version": path.stat().st_mtime_ns // 1_000_000}


def to_image(image) -> Tensor:
    """A PIL image as an IMAGE (1, H, W, 3) in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.asarray(image).copy()).float()[None] / 255


def to_images(images: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] as an IMAGE."""
    return (images.float().movedim(1, -1) + 1).clamp(0, 2) / 2


def pixels_of(image: Tensor) -> Tensor:
    """An IMAGE as pixels (B, 3, H, W) in [-1, 1]."""
    return image[..., :3].movedim(-1, 1) * 2 - 1
