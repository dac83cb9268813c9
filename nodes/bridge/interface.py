"""What people see and touch: folders and files, text on a node, pictures, the cancel button."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ...distill_core import live
from ...distill_core.checkpoints import checkpoints_in
from ...distill_core.run import METRICS
from ...distill_core.storage import WriteError
from ...distill_core.students import MANIFEST

log = logging.getLogger("distill")

RUNS_ROUTE = "/distill/runs/{name}"
OWN_FOLDERS = ("distill_runs", "distill_data")  # under the output folder; what is saved elsewhere stays out of them
_seen: dict[Path, int] = {}  # steps of each run when it was last looked at
_lost: dict[Path, int] = {}


def run_folder(name: str) -> Path:
    """Folder of a run under ComfyUI's output folder; ``ValueError`` for a name that is no plain folder name."""
    return _output_folder("distill_runs", name, "run_name")


def data_folder(name: str) -> Path:
    """Folder of data under ComfyUI's output folder; ``ValueError`` for a name that is no plain folder name."""
    return _output_folder("distill_data", name, "name")


def _output_folder(inside: str, name: str, setting: str) -> Path:
    root = os.path.join(folder_paths.get_output_directory(), inside)
    folder = os.path.join(root, name)
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE)  # on Windows
    if reserved or not re.fullmatch(r"\w([\w .-]{0,98}[\w-])?", name) or not folder_paths.is_within_directory(root, folder):
        raise ValueError(f"{setting} {name!r} must be a plain name of letters, digits, spaces, dots, dashes and underscores")
    return Path(folder)


def losses_of(run_name: str) -> dict[str, list[dict[str, float]]]:
    """What a run wrote down of every step, by its stages where it has several; ``ValueError`` for a run that wrote nothing."""
    found = live.metrics_by_stage(run_folder(run_name))
    if not found:
        raise ValueError(f"run_name {run_name!r}: there is no run of that name with losses; leave it empty, or name another")
    return found


def losses_written(run_name: str) -> list[int]:
    """When a run wrote its losses; nothing for a run that has none, or a name that is none."""
    try:
        folder = run_folder(run_name)
    except ValueError:  # execute will say what is wrong with the name
        return []
    return [file.stat().st_mtime_ns for stage in live.stages_in(folder) if (file := stage / METRICS).is_file()]


def newest_step(run_name: str) -> int:
    """Steps a run has kept, of all its stages where it has several; 0 for a run that has none, or a name that is none."""
    try:
        folder = run_folder(run_name)
    except ValueError:  # execute will say what is wrong with the name
        return 0
    newest = (checkpoints_in(stage)[-1:] for stage in live.stages_in(folder))
    step = sum(int(checkpoint.name) for found in newest for checkpoint in found)
    if step < _seen.get(folder, 0):
        _lost[folder] = _lost.get(folder, 0) + 1
    _seen[folder] = step
    return step


def times_lost(run_name: str) -> int:
    """How often steps of a run were gone that this server had seen, as when its folder was deleted: then it is trained again."""
    return next((count for folder, count in _lost.items() if folder.name == run_name), 0)


def students_folders() -> dict[str, Path]:
    """Folders of students by the name people choose them by: a run's own, or their place under models/diffusion_models."""
    runs = Path(folder_paths.get_output_directory()) / "distill_runs"
    found = {path.parents[1].name: path.parent for path in sorted(runs.glob(f"*/students/{MANIFEST}"))}
    files = {Path(name).parent.as_posix(): name for name in folder_paths.get_filename_list("diffusion_models")}
    for name, file in files.items():
        folder = Path(folder_paths.get_full_path_or_raise("diffusion_models", file)).parent
        if name != "." and (folder / MANIFEST).exists():
            found.setdefault(name, folder)
    return found


def students_folder(name: str) -> Path:
    """A folder of students by its name in the list; ``ValueError`` for another."""
    folders = students_folders()
    if name not in folders:
        raise ValueError(f"there is no folder of students {name!r}; press R to refresh the list")
    return folders[name]


def output_path(prefix: str, suffix: str) -> Path:
    """The next free numbered path under ComfyUI's output folder, as its own Save nodes count."""
    root, said = folder_paths.get_output_directory(), f"filename_prefix {prefix!r}"
    prefix = prefix.replace("\\", "/")  # a graph made on Windows
    name, target = prefix.rpartition("/")[2], os.path.join(root, os.path.dirname(os.path.normpath(prefix)))
    if any(_is_within(target, os.path.join(root, folder)) for folder in OWN_FOLDERS):
        raise ValueError(f"{said} leads into a folder of runs or data, which holds nothing else; choose another")
    if not name.strip(". "):
        raise ValueError(f"{said} has no name for the file; write one, such as diffusion_models/student")
    if name.startswith("."):
        raise ValueError(f"{said} would make a hidden file, which no loader lists; begin the name with a letter")
    if not folder_paths.is_within_directory(root, target):
        raise ValueError(f"{said} leads out of the output folder; keep it inside")
    try:
        folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, root)
    except OSError as error:
        raise WriteError(Path(root) / prefix, error.strerror) from error
    return Path(folder) / f"{name}_{counter:05}_{suffix}"


def _is_within(path: str, folder: str) -> bool:
    """Whether a path lies in a folder, links followed, and on disks that tell no case apart too."""
    return folder_paths.is_within_directory(os.path.realpath(folder).casefold(), os.path.realpath(path).casefold())


def file_in(folder: str, name: str) -> Path:
    """Path of a file in one of ComfyUI's model folders; ``ValueError`` for a name that leads out of it, or to nothing."""
    for root in folder_paths.get_folder_paths(folder):
        path = os.path.join(root, name)
        if folder_paths.is_within_directory(root, path) and os.path.isfile(path):
            return Path(path)
    raise ValueError(f"there is no file {name!r} under models/{folder}; press R to refresh the list")


def throw_if_cancelled() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def show_text(text: str, node_id: str) -> None:
    """A line of text on the node itself, replaced by the next."""
    from server import PromptServer

    PromptServer.instance.send_progress_text(text, node_id)


def tell_chart(message: dict[str, Any], sample: Path | None, node_id: str) -> None:
    """How far a training is, for the charts of every page that is open; sample: the picture it has drawn last."""
    from server import PromptServer

    message = message | {"node": node_id, "sample": _picture(sample)}
    PromptServer.instance.send_sync("distill.progress", message)


def serve_runs() -> None:
    """Answer ``GET /distill/runs/NAME`` with what a chart shows of a run: 204 where there is none yet, 404 for what is no name."""
    from aiohttp import web
    from server import PromptServer

    routes = getattr(PromptServer, "instance", None) and PromptServer.instance.routes
    if routes is None or any(getattr(route, "path", None) == RUNS_ROUTE for route in routes):
        return

    @routes.get(RUNS_ROUTE)
    async def answer(request: web.Request) -> web.Response:
        try:
            folder = run_folder(request.match_info["name"])
        except ValueError:
            raise web.HTTPNotFound from None
        try:
            history = await asyncio.to_thread(live.history, folder)
            message = history and history | {"sample": _picture(live.newest_sample(folder))}
        except (OSError, ValueError) as error:  # a folder that vanishes, or is not for us to read
            log.warning("run %s cannot be shown: %s", folder.name, error)
            message = None
        if message is None:
            return web.Response(status=204)
        return web.json_response(message, headers={"Cache-Control": "no-store"})


def _picture(path: Path | None) -> dict[str, Any] | None:
    """What ComfyUI's ``/view`` has to be asked for a picture in the output folder; ``version`` changes with what is in it."""
    if path is None:
        return None
    place = path.relative_to(folder_paths.get_output_directory())
    picture = {"filename": place.name, "subfolder": place.parent.as_posix(), "type": "output"}
    return picture | {"version": path.stat().st_mtime_ns // 1_000_000}


def duration(seconds: float) -> str:
    """``2 min 10 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def to_image(picture) -> Tensor:
    """A PIL picture as an IMAGE (1, H, W, 3) in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255


def to_images(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as an IMAGE."""
    return (pictures.float().movedim(1, -1) + 1).clamp(0, 2) / 2


def pictures_of(image: Tensor) -> Tensor:
    """An IMAGE as pictures (B, 3, H, W) in [-1, 1]."""
    return image[..., :3].movedim(-1, 1) * 2 - 1
