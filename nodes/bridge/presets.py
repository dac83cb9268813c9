"""Which published plans fit a model that a loader names, for the lists on the nodes."""

from __future__ import annotations

import asyncio
from functools import cache, lru_cache
from pathlib import Path

import folder_paths

from ...distill_core.demo.teacher import teacher_file
from ...distill_core.networks.network import open_network, short_title
from ...distill_core.pruning.plan import all_preset_names, fitting_presets, preset
from .runs import routes_without

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
            of_demo = await asyncio.to_thread(_fitting_demo) if asked["demo"] == "unet" else []
            return web.json_response({"fit": of_demo})
        if "file" not in asked:
            return web.json_response({"presets": await asyncio.to_thread(_about)})
        try:
            fit = await asyncio.to_thread(_fitting_file, asked.get("folder", ""), asked["file"])
        except FileNotFoundError:
            raise web.HTTPNotFound from None
        return web.json_response({"fit": fit})


@cache
def _about() -> dict[str, dict[str, str]]:
    families = {name: preset(name).teacher for name in all_preset_names()}
    return {name: {"family": family, "title": short_title(family)} for name, family in families.items() if family}


@cache
def _fitting_demo() -> list[str]:
    return fitting_presets(teacher_file().architecture)


def _fitting_file(folder: str, name: str) -> list[str] | None:
    """Presets that fit a file, None if it cannot be read; ``FileNotFoundError`` unless ComfyUI lists it in one of its folders."""
    listed = folder in FOLDERS and name in folder_paths.get_filename_list(folder)
    if not listed or (path := folder_paths.get_full_path(folder, name)) is None:
        raise FileNotFoundError(name)
    try:
        return _fitting(Path(path), Path(path).stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=64)
def _fitting(path: Path, modified_ns: int) -> list[str] | None:
    """The same for a path; a file that is written anew is read anew."""
    try:
        return fitting_presets(open_network(path).architecture)
    except ValueError:
        return None
