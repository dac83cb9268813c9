"""What loading the pack does to ComfyUI and takes; run by in_comfyui.py. Each function writes what it found as JSON."""

import asyncio
import gc
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = str(ROOT)


def cost(out):
    """Seconds of work until ComfyUI has its own nodes, and until it has those of this pack too."""
    begun = time.process_time()
    load = _comfyui()
    ready = time.process_time()
    loaded = load()
    Path(out).write_text(json.dumps({"comfyui_s": ready - begun, "pack_s": time.process_time() - ready, "loaded": loaded}))


def traces(out):
    """What is another thing in ComfyUI, torch and Python once the pack is loaded."""
    import torch  # noqa: F401
    from aiohttp import web

    load = _comfyui()
    import server

    server.PromptServer.instance = type("Server", (), {"routes": web.RouteTableDef()})()
    gc.collect()
    known, before = set(sys.modules), _state()
    loaded = load()
    after = _state()
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    others = {name.partition(".")[0] for name in set(sys.modules) - known if not name.startswith(OURS.replace(".", "_x_"))}
    routes = [f"{route.method} {route.path}" for route in server.PromptServer.instance.routes]
    Path(out).write_text(json.dumps({"loaded": loaded, "changed": changed, "routes": routes, "imported": sorted(others)}))


def _comfyui():
    """Load ComfyUI's own nodes; returns what loads the pack as ComfyUI does."""
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    return lambda: asyncio.run(nodes.load_custom_node(OURS))


def _state():
    """Identities and values by where they are: all of ComfyUI's modules and classes, and what is global elsewhere."""
    import logging
    import os
    import signal
    import warnings

    import torch

    state = {}
    for name, module in list(sys.modules.items()):
        if not _comfyuis(name, module):
            continue
        for attribute, value in list(vars(module).items()):
            state[f"{name}.{attribute}"] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                state |= {f"{name}.{attribute}.{member}": id(it) for member, it in vars(value).items()}
            elif isinstance(value, (dict, list, set)) and not attribute.startswith("__"):
                members = value if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
                state |= {f"{name}.{attribute}[{key!r}]": id(value[key]) for key in dict(members)}
                state[f"len({name}.{attribute})"] = len(value)
    state |= {f"os.environ[{key!r}]": value for key, value in os.environ.items()}
    state |= {f"torch.{name}": str(ask()) for name, ask in {
        "default dtype": torch.get_default_dtype, "threads": torch.get_num_threads, "gradients": torch.is_grad_enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled, "precision": torch.get_float32_matmul_precision,
        "seed": torch.initial_seed, "state": lambda: hash(bytes(torch.get_rng_state().tolist())),
        "benchmark": lambda: torch.backends.cudnn.benchmark, "tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    }.items()}  # fmt: skip
    root = logging.getLogger()
    state |= {"logging level": root.level, "logging handlers": [id(handler) for handler in root.handlers]}
    state |= {"warnings": len(warnings.filters), "sys.path": list(sys.path), "excepthook": id(sys.excepthook)}
    return state | {f"signal {number}": id(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)}


def _comfyuis(name, module):
    file = getattr(module, "__file__", None) or ""
    comfyui = str(Path(sys.modules["nodes"].__file__).parent)
    if name == "folder_paths":
        module.filename_list_cache.clear()  # it fills wherever files are listed
    return file.startswith(comfyui) and not file.startswith(OURS) and "site-packages" not in file
