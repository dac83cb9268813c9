"""Pieces of graphs, and what their nodes wrote."""

from __future__ import annotations

import time

import torch

from distill_core.demo.teacher import teacher_file
from distill_core.networks.layouts import LAYOUTS

PROMPT = {
    "teacher": {"class_type": "DistillLoadDemoTeacher", "inputs": {}},
    "prune": {"class_type": "DistillPruneUNetBlocks", "inputs": {"model": ["teacher", 0], "preset": "bk-sdm-base"}},
    "prompt": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat, flat", "clip": ["teacher", 1]}},
    "empty": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["teacher", 1]}},
    "noise": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
}
TRAIN = {
    "teacher": ["teacher", 0], "student": ["prune", 0], "latents": ["teacher", 3], "captions": ["teacher", 4],
    "null_caption": ["empty", 0], "total_steps": 6, "steps_per_queue": 3, "batch_size": 4, "learning_rate": 1e-3,
    "lr_schedule": "cosine", "objective": "bk-sdm", "seed": 0, "caption_dropout": 0.1, "warmup_steps": 0, "save_every_steps": 2,
    "refit_examples": 0,
}  # fmt: skip
RANK = 4


def train(run_name, **changes):
    return {"class_type": "DistillTrainStep", "inputs": TRAIN | {"run_name": run_name} | changes}


def save(model, prefix, **changes):
    inputs = {"model": model, "filename_prefix": prefix, "dtype": "fp32", "layout": "ldm"} | changes
    return {"class_type": "DistillSaveDistilledModel", "inputs": inputs}


def sampled(model, prefix, **changes):
    """KSampler and Save Latent for a model."""
    inputs = {"model": model, "positive": ["prompt", 0], "negative": ["empty", 0], "latent_image": ["noise", 0], "seed": 0,
              "steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}  # fmt: skip
    return {
        f"sample {prefix}": {"class_type": "KSampler", "inputs": inputs | changes},
        f"keep {prefix}": {"class_type": "SaveLatent", "inputs": {"samples": [f"sample {prefix}", 0], "filename_prefix": prefix}},
    }


def newest(server, pattern):
    return max(server.output.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def recipe(**changes):
    inputs = {"weighting": "none", "optimizer": "adamw", "ema_decay": 0.0, "precision": "fp32", "weight_dtype": "fp32",
              "gradient_checkpointing": False, "accumulation_steps": 1, "teacher_mode": "sequence", "teacher_shares": "",
              "validate_every_steps": 0, "sample_every_steps": 0, "tracker": "none", "task_weight": -1.0, "output_weight": -1.0,
              "feature_weight": -1.0, "snr_gamma": 5.0, "timesteps": "uniform", "noise_offset": 0.0, "input_perturbation": 0.0,
              "weight_decay": 0.01, "max_grad_norm": 1.0, "compile": False, "validation_share": 0.05, "keep_checkpoints": 2,
              "keep_best": 0}  # fmt: skip
    return {"class_type": "DistillRecipe", "inputs": inputs | changes}


def teacher_data(folder, **changes):
    inputs = {"teacher": ["teacher", 0], "clip": ["teacher", 1], "prompts": "a red bus, flat\ntwo dogs, shaded", "name": folder,
              "width": 64, "height": 64, "images_per_prompt": 1, "steps": 4, "guidance": 2.0, "seed": 0, "trajectory_states": 0,
              "batch_size": 4}  # fmt: skip
    return {"class_type": "DistillTeacherDataset", "inputs": inputs | changes}


def trained(server, run_name, nodes=(), **changes):
    """Queue a run with further nodes in the graph; returns its folder and what came of it."""
    prompt = {**PROMPT, **dict(nodes), "train": train(run_name, **changes), "image": {"class_type": "PreviewImage", "inputs": {"images": ["train", 2]}}}  # fmt: skip
    result = server.run(prompt)
    assert result.succeeded, result.error
    return server.output / "distill_runs" / run_name, result


def rows(folder):
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return [{name: float(value) for name, value in zip(lines[0], line, strict=True) if value} for line in lines[1:]]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def until(condition, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def lora(layout, separator, prefix, kind, processor=False):
    """An adapter on every attention layer of the demo teacher, in one of the formats that ComfyUI opens."""
    architecture = teacher_file().architecture
    names = LAYOUTS[layout].from_canonical(architecture.shapes)
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in architecture.shapes.items():
        if not name.endswith(".weight") or ".attn." not in name or len(shape) != 2:
            continue
        layer = prefix + names[name].removesuffix(".weight").replace(".", separator)
        out, into = shape

        def noise(*size):
            return torch.randn(size, generator=random) * 0.2

        if processor:
            if ".to_" not in name:
                continue
            layer = layer.replace(".to_", ".processor.to_").removesuffix(".0")
            tensors |= {f"{layer}_lora.up.weight": noise(out, RANK), f"{layer}_lora.down.weight": noise(RANK, into)}
        elif kind == "lora":
            tensors |= {f"{layer}.lora_up.weight": noise(out, RANK), f"{layer}.lora_down.weight": noise(RANK, into),
                        f"{layer}.alpha": torch.tensor(2.0)}  # fmt: skip
        elif kind == "peft":
            tensors |= {f"{layer}.lora_B.weight": noise(out, RANK), f"{layer}.lora_A.weight": noise(RANK, into)}
        elif kind == "loha":
            tensors |= {f"{layer}.hada_w1_a": noise(out, RANK), f"{layer}.hada_w1_b": noise(RANK, into), f"{layer}.hada_w2_a": noise(out, RANK),
                        f"{layer}.hada_w2_b": noise(RANK, into), f"{layer}.alpha": torch.tensor(4.0)}  # fmt: skip
        else:
            tensors |= {f"{layer}.lokr_w1": noise(2, 2), f"{layer}.lokr_w2": noise(out // 2, into // 2)}
    return tensors


def remapped(lora_name, **changes):
    inputs = {
        "teacher": ["teacher", 0],
        "student": ["prune", 0],
        "lora_name": lora_name,
        "strength_model": 1.0,
        "strength_clip": 1.0,
    }
    return {"class_type": "DistillRemapLoRAToStudent", "inputs": inputs | changes}
