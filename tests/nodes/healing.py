"""Transformers that learn; run by the Python of ComfyUI (see ``in_comfyui.py``)."""

import contextlib
import importlib
import json
from pathlib import Path

import torch

STEP = 1e-2


def data(out):
    """Training data of a transformer whose captions have several lengths."""
    import comfy.sd
    from in_comfyui import pack
    from small import filled, model_of

    bridge = pack()
    weights = filled(model_of("flux1").diffusion_model).state_dict()
    model = bridge.Model(comfy.sd.load_diffusion_model_state_dict(dict(weights)))
    random = torch.Generator().manual_seed(0)
    latents = [{"samples": torch.randn(1, 16, 8, 8, generator=random)} for _ in range(5)]
    captions = [
        [[torch.randn(1, length, 64, generator=random), {"pooled_output": torch.randn(1, 64, generator=random)}]]
        for length in (5, 7, 5, 7, 7)
    ]
    dataset, told = bridge.dataset(latents, captions, None, model), {}
    told["buckets"] = sorted((len(bucket.latents), bucket.contexts.shape[1]) for bucket in dataset.buckets)
    told["kept apart"] = [
        torch.equal(bucket.contexts[0], one[0][0][0]) for bucket, one in zip(dataset.buckets, captions, strict=False)
    ]
    for name, null in (
        ("of one length", captions[:1]),
        ("of another", [[[torch.zeros(1, 9, 64), {"pooled_output": torch.zeros(1, 64)}]]]),
    ):
        for kind, given in (("one", captions[:1]), ("both", captions)):
            try:
                found = bridge.dataset(latents, given, null, model)
                told[f"{kind}, null {name}"] = len(found.buckets)
            except ValueError as error:
                told[f"{kind}, null {name}"] = str(error)
    Path(out).write_text(json.dumps(told))


def gradients(out):
    """For each family, gradients through its blocks, plain and checkpointed, as differences of the loss would have them."""
    from in_comfyui import pack
    from small import SMALL

    pack()
    told = {}
    for family in SMALL:
        told[family] = {
            how: _slopes(family, *given)
            for how, given in {"right": (True, False), "checkpointed": (True, True), "as it is": (False, True)}.items()
        }
    Path(out).write_text(json.dumps(told))


def _slopes(family, out_of_place, checkpointed):
    """How far the gradient along a random direction is from the difference quotient, relative to it; None if there is no gradient."""
    import comfy.model_management
    from small import asked, filled, model_of
    from torch.utils.checkpoint import checkpoint

    core = importlib.import_module("pack.distill_core.diffusion.out_of_place")
    denoisers = importlib.import_module("pack.distill_core.diffusion.denoiser")
    transformers = importlib.import_module("pack.distill_core.networks.transformers.architecture")
    shared_base = importlib.import_module("pack.nodes.bridge.shared_base")
    model = model_of(family, dtype=torch.float64)
    with torch.inference_mode():
        filled(model.diffusion_model)
    shell = shared_base.twin(model)
    shapes = {name: tuple(weight.shape) for name, weight in shell.diffusion_model.state_dict().items()}
    blocks = [
        shell.diffusion_model.get_submodule(name)
        for name in transformers.Transformer(transformers.FAMILIES[family], shapes).in_order
    ]
    question = {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in asked(shell).items()
    }
    random = torch.Generator().manual_seed(5)
    weights = [weight for block in blocks for name, weight in block.named_parameters() if weight.ndim == 2 and "norm" not in name]
    directions = [torch.randn(weight.shape, generator=random, dtype=torch.float64) * 1e-2 for weight in weights]
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if out_of_place:
                stack.enter_context(core.out_of_place(blocks))
            if checkpointed:
                for block in blocks:

                    def again(*args, forward=block.forward, **given):
                        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **given)

                    stack.enter_context(denoisers.instead(block, again))
            if checkpointed and not out_of_place:
                stack.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
            for weight in weights:
                weight.requires_grad_(True)
            answer = shell.apply_model(**question)
            target = torch.randn(answer.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
            found = torch.autograd.grad((answer * target).sum(), weights, allow_unused=True)
        along = sum(
            (slope * direction).sum().item() for slope, direction in zip(found, directions, strict=True) if slope is not None
        )
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                for weight, direction in zip(weights, directions, strict=True):
                    weight += sign * STEP * direction
                losses.append((shell.apply_model(**question) * target).sum().item())
                for weight, direction in zip(weights, directions, strict=True):
                    weight -= sign * STEP * direction
        quotient = (losses[0] - losses[1]) / (2 * STEP)
        return abs(along - quotient) / abs(quotient)
    except (RuntimeError, NotImplementedError) as error:
        return str(error)[:200]
    finally:
        comfy.model_management.in_training = before
