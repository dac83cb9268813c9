"""What people see and touch: folders and files, text on a node, pictures, the cancel button."""

from __future__ import annotations

import os
import re
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ...distill_core.run import checkpoints_in
from ...distill_core.storage import WriteError
from ...distill_core.students import MANIFEST
from ...distill_core.train import Progress


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


def newest_step(run_name: str) -> int:
    """Steps a run has kept, of all its stages where it has several; 0 for a run that has none, or a name that is none."""
    try:
        folder = run_folder(run_name)
    except ValueError:  # execute will say what is wrong with the name
        return 0
    newest = (checkpoints_in(stage)[-1:] for stage in (folder, *folder.glob("*")))
    return sum(int(checkpoint.name) for found in newest for checkpoint in found)


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
    root = folder_paths.get_output_directory()
    if not folder_paths.is_within_directory(root, os.path.join(root, os.path.dirname(os.path.normpath(prefix)))):
        raise ValueError(f"filename_prefix {prefix!r} leads out of the output folder; keep it inside")
    try:
        folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, root)
    except OSError as error:
        raise WriteError(Path(root) / prefix, error.strerror) from error
    return Path(folder) / f"{name}_{counter:05}_{suffix}"


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


def duration(seconds: float) -> str:
    """``2 min 10 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def describe_progress(progress: Progress, last_step: int) -> str:
    """``step 120 of 500, loss 0.031, 2 min 10 s left``."""
    left = duration((last_step - progress.step) * progress.seconds_per_step)
    return f"step {progress.step} of {progress.total_steps}, loss {progress.losses['total']:.4f}, {left} left"


def to_image(picture) -> Tensor:
    """A PIL picture as an IMAGE (1, H, W, 3) in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255


def open_image(path: Path):
    from PIL import Image

    return Image.open(path).convert("RGB")
