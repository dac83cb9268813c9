"""Forecasts of the memory that teaching a transformer needs; run by the Python of ComfyUI (see ``in_comfyui.py``)."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import torch

AT_TRUE_SHAPE = {
    "Flux.1 dev": ("fold double 3-5,6-8,9-11,12-14,15-17", (16, 128, 128), (512, 4096), 768),
    "Z-Image": ("fold layer 3-4,5-6,7-9,10-12,13-15,16-17,18-19", (16, 128, 128), (256, 2560), None),
}
"""Plan, latents of a picture of 1024 px, tokens of a caption and their width, width of the pooled embedding."""
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
WAYS = ("output", "blocks", "local")
RANK = 64


def of_true_shape(out, dtypes="fp8", ways="output local"):
    """``{model: {dtype: {way: told}}}`` for batch 1, LoRAs of rank 64, 8-bit AdamW and checkpointing; told: see `_forecast`."""
    from cutting import TRUE
    from in_comfyui import pack

    pack()
    told = {
        name: {
            dtype: {way: _forecast(*TRUE[name], DTYPES[dtype], *case, way) for way in ways.split()} for dtype in dtypes.split()
        }
        for name, case in AT_TRUE_SHAPE.items()
    }
    Path(out).write_text(json.dumps(told))


def _forecast(kind, config, dtype, plan, latents, context, pooled, way):
    """``[moment, {part: bytes}, {part: bytes by plain counting}]``."""
    import comfy.supported_models

    core = {
        name: importlib.import_module(f"pack.distill_core.{name}")
        for name in (
            "pruning.plan",
            "networks.transformers.architecture",
            "training.base_memory",
            "training.memory",
            "training.settings",
        )
    }
    shared_base = importlib.import_module("pack.nodes.bridge.shared_base")
    schedules = importlib.import_module("pack.distill_core.diffusion.schedule")
    sampling = importlib.import_module("pack.distill_core.networks.model_sampling")
    with torch.inference_mode(False):
        of_kind = getattr(comfy.supported_models, kind)(dict(config))
        of_kind.set_inference_dtype(dtype, torch.bfloat16)
        model = of_kind.get_model({}, "", device="meta")
        model.diffusion_model.to(dtype)
        shapes = {name: tuple(weight.shape) for name, weight in model.diffusion_model.state_dict().items()}
        transformer, _ = core["networks.transformers.architecture"].Transformer.find(shapes)

        def empty():
            shell = shared_base.alias_of(model, parameter=core["training.base_memory"].on_meta)
            shell.model_sampling.calculate_denoised = lambda sigma, output, x: output
            flow = sampling.ModelSampling(prediction="flow", noise=sampling.FLOW)
            return shared_base.ModelDenoiser(
                network=shell.diffusion_model, architecture=None, sampling=flow, noise_levels=schedules.of_sampling(flow),
                transformer=transformer, shell=shell, patcher=SimpleNamespace(load_device=torch.device("cpu")),
            )  # fmt: skip

        read = importlib.import_module("pack.distill_core.pruning.plan_text").read_plan(plan, transformer)
        mapping = core["pruning.plan"].name_map(transformer, read)
        held = sum(weight.nbytes for weight in model.diffusion_model.parameters())
        base = core["training.base_memory"].Base(empty, mapping, held, context, pooled, shared_base.with_gradients)
        targets = tuple(f"{block}.*" for block in mapping.folded) if way == "local" else ("*",)
        training = core["training.settings"].TrainingSettings(
            objective=way, lora_rank=RANK, lora_targets=targets, batch_size=1, optimizer="adamw8bit", gradient_checkpointing=True
        )
        asked = core["training.memory"].MemorySettings(training=training, shares_base=True, device="cuda")
        forecast = base.forecast(asked, latents)
        trains = [
            (module.in_features + module.out_features) * RANK
            for path, module in model.diffusion_model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and (_in(path, mapping.folded) if way == "local" else not _in(path, mapping.removed))
        ]
        counted = {"student weights": held + 4 * sum(trains)}
    return [forecast.moment, {part.name: part.num_bytes for part in forecast.parts if part.num_bytes}, counted]


def _in(path, blocks):
    return any(path.startswith(f"{block}.") for block in blocks)
