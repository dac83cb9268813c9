"""Files and folders under ComfyUI's own: a workflow comes from anywhere, so no name in it leads outside."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ...distill_core.base.storage import WriteError
from ...distill_core.routing.experts import MANIFEST

RUNS, DATA = "distill_runs", "distill_data"
"""Folders under the output folder; saved models and reports stay out of them."""
MOST_NAME_BYTES = 180  # of the 255 that file systems allow; temporary folders have longer names


def run_folder(name: str) -> Path:
    """Folder of a run under ComfyUI's output folder; ``ValueError`` for a name that is not a plain folder name."""
    return _output_folder(RUNS, name, "run_name")


def data_folder(name: str) -> Path:
    """Folder of data under ComfyUI's output folder; ``ValueError`` for a name that is not a plain folder name."""
    return _output_folder(DATA, name, "name")


def _output_folder(inside: str, name: str, setting: str) -> Path:
    root = os.path.join(folder_paths.get_output_directory(), inside)
    folder = os.path.join(root, name)
    if not is_plain(name) or not folder_paths.is_within_directory(root, folder):
        raise ValueError(f"{setting} {name!r} must be a plain name of letters, digits, spaces, dots, dashes and underscores")
    if len(name.encode()) > MOST_NAME_BYTES:
        raise ValueError(f"{setting} {name!r} is too long for the name of a folder; choose a shorter one")
    return Path(folder)


def is_plain(name: str) -> bool:
    """Whether a name is one of a folder everywhere, and of none that Windows reserves."""
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE)
    return not reserved and bool(re.fullmatch(r"\w([\w .-]{0,98}[\w-])?", name))


def experts_folders() -> dict[str, Path]:
    """Folders of experts by their name in the list: the run's name, or the path under models/diffusion_models.

    If a run has the name of such a path, the path begins with diffusion_models/ in the list.
    """
    runs = Path(folder_paths.get_output_directory()) / RUNS
    found = {path.parents[1].name: path.parent for path in sorted(runs.glob(f"*/experts/{MANIFEST}"))}
    for name, folder in _experts_among_models().items():
        while name in found:
            name = f"diffusion_models/{name}"
        found[name] = folder
    return found


def _experts_among_models() -> dict[str, Path]:
    """Folders of experts by their path under models/diffusion_models."""
    found: dict[str, Path] = {}
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
    if any(_is_within(target, os.path.join(root, folder)) for folder in (RUNS, DATA)):
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
