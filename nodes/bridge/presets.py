"""Which published plans fit a model that a loader names, for the lists on the nodes."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from pathlib import Path

import folder_paths

from ...distill_core.demo.teacher import teacher_file
from ...distill_core.networks.network import open_network, short_title
from ...distill_core.pruning.plan import all_preset_names, fitting_presets, preset
from .interface import routes_without

PRESETS_ROUTE = "/distill/presets"
FOLDERS = ("checkpoints", "diffusion_models")


def serve_presets() -> None:
    """Serve what the presets are for.

    ``GET /distill/presets``: the family each is for, and its title. ``?folder=checkpoints&file=NAME``, or ``?demo=unet``: those that
    fit this model, as ``fit``, which is null if it cannot be read; 404 if ComfyUI does not list it.
    """
    from aiohttp import web

    if (routes := routes_without(PRESETS_ROUTE)) is None:
        return

    @routes.get(PRESETS_ROUTE)
    async def tell(request: web.Request) -> web.Response:
        asked = request.query
        if "demo" in asked:
            return web.json_response({"fit": fitting_presets(teacher_file().architecture) if asked["demo"] == "unet" else []})
        if "file" not in asked:
            return web.json_response({"presets": await asyncio.to_thread(_about)})
        path = _path(asked.get("folder", ""), asked["file"])
        if path is None:
            raise web.HTTPNotFound
        return web.json_response({"fit": await asyncio.to_thread(_fitting, path, path.stat().st_mtime_ns)})


def _about() -> dict[str, dict[str, str]]:
    families = {name: preset(name).teacher for name in all_preset_names()}
    return {name: {"family": family, "title": short_title(family)} for name, family in families.items() if family}


def _path(folder: str, name: str) -> Path | None:
    """Of a file that ComfyUI lists in one of its folders."""
    listed = folder in FOLDERS and name in folder_paths.get_filename_list(folder)
    found = folder_paths.get_full_path(folder, name) if listed else None
    return None if found is None else Path(found)


@lru_cache(maxsize=64)
def _fitting(path: Path, modified_ns: int) -> list[str] | None:
    """Of a file as it was at a time."""
    try:
        return fitting_presets(open_network(path).architecture)
    except (OSError, ValueError):
        return None
