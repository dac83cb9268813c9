"""Distill: make a diffusion checkpoint smaller and faster, and understand what came out.

Packages, each of which imports from those above it alone:

base        files, locks, settings, precisions, seeds
networks    what a checkpoint holds, how it is named and sampled; building a network of it
diffusion   noise schedules, what a network is asked, sampling, guidance
pruning     which blocks go: plans, presets, automatic plans
lora        LoRAs made for the teacher, LoRAs that are trained
data        images and captions, encoded once; data that the teacher draws
training    losses, the training loop, runs on disk, the memory they need
evaluation  what models cost, how close they are, charts and reports
routing     experts, each for a range of timesteps

`recipe` reads a whole training from a file, `preparation` opens its models and data, `cli` is the command ``distill``, `quickstart` tells the whole story on `demo`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

if TYPE_CHECKING:
    from .data.dataset import LatentDataset
    from .diffusion.denoiser import DiffusersDenoiser
    from .lora.remap import remap_lora_file
    from .networks.architecture import Architecture
    from .networks.build import load_unet
    from .networks.files import open_unet, save_unet
    from .networks.network import open_network
    from .preparation.prepared import prepare
    from .pruning.plan import PruningPlan, preset, preset_names
    from .pruning.plan_text import read_plan
    from .pruning.prune import prune, prune_file
    from .recipe import Recipe
    from .routing.expert_unet import ExpertUNet
    from .routing.experts import Experts
    from .training.loop import distill
    from .training.run import Run
    from .training.settings import TrainingSettings

_HOME = {
    "Architecture": "networks.architecture",
    "DiffusersDenoiser": "diffusion.denoiser",
    "ExpertUNet": "routing.expert_unet",
    "Experts": "routing.experts",
    "LatentDataset": "data.dataset",
    "PruningPlan": "pruning.plan",
    "Recipe": "recipe",
    "Run": "training.run",
    "TrainingSettings": "training.settings",
    "distill": "training.loop",
    "load_unet": "networks.build",
    "open_network": "networks.network",
    "open_unet": "networks.files",
    "prepare": "preparation.prepared",
    "preset": "pruning.plan",
    "preset_names": "pruning.plan",
    "prune": "pruning.prune",
    "prune_file": "pruning.prune",
    "read_plan": "pruning.plan_text",
    "remap_lora_file": "lora.remap",
    "save_unet": "networks.files",
}
"""What is imported when it is first asked for: torch and diffusers take seconds."""

__all__ = [
    "Architecture",
    "DiffusersDenoiser",
    "ExpertUNet",
    "Experts",
    "LatentDataset",
    "PruningPlan",
    "Recipe",
    "Run",
    "TrainingSettings",
    "distill",
    "load_unet",
    "open_network",
    "open_unet",
    "prepare",
    "preset",
    "preset_names",
    "prune",
    "prune_file",
    "read_plan",
    "remap_lora_file",
    "save_unet",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
