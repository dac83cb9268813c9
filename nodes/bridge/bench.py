"""Benchmarks of random networks on ComfyUI's device."""

from __future__ import annotations

import comfy.model_management
import torch

from ...distill_core.evaluation import bench
from .progress import Progress


def run_bench(settings: bench.Settings, node_id: str) -> bench.Bench:
    """Measure with all of the device's memory free; ComfyUI loads its models again when it needs them."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    progress = Progress(node_id, total=bench.work(settings))

    def on_step(what: str, count: int) -> None:
        progress.tell(f"measuring {what}")
        progress.add(count)

    with torch.inference_mode(False), torch.enable_grad():
        return bench.bench(settings, on_step, comfy.model_management.get_torch_device())
