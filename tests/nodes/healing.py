"""Transformers that learn; run by the Python of ComfyUI (see ``in_comfyui.py``)."""

import contextlib
import importlib
import json
from pathlib import Path

import torch

STEP = 1e-2
WIDE_STEP = 0.05  # of losses that are computed in float32


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


def frames(out):
    """Training data and sample images of a model that draws images as videos of one frame."""
    from types import SimpleNamespace

    from in_comfyui import pack
    from sharing import _qwen_image

    bridge = pack()
    model, told = bridge.Model(_qwen_image()), {}
    samples = torch.randn(3, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = model.patcher.model.process_latent_in(samples)[:, :, 0]
    captions = [[[torch.randn(1, 6, 3584), {}]]]
    for name, given in (("framed", samples), ("flat", samples[:, :, 0])):
        dataset = bridge.dataset([{"samples": given}], captions, captions, model)
        told[name] = torch.equal(dataset.buckets[0].latents, expected)
    told["back"] = (model.unscaled(expected) - samples).abs().max().item()
    try:
        bridge.dataset([{"samples": torch.zeros(1, 16, 4, 8, 8)}], captions, captions, model)
    except ValueError as error:
        told["video"] = str(error)
    decoded = []

    def decode(latents):
        decoded.append([*latents.shape])
        return torch.rand(len(latents), 1, 64, 64, 3)

    previews = bridge.previews(dataset, SimpleNamespace(decode=decode), model)
    told["images"], told["decoded"] = [*previews.decode(expected[:2]).shape], decoded[0]
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


def local(out):
    """For each family that learns, the loss of a block that stands for a run, and its gradient, as plain computations have them.

    Writes how far off they are, relative to them, and how many streams were compared.
    """
    from in_comfyui import pack
    from small import SMALL

    pack()
    transformers = importlib.import_module("pack.distill_core.networks.transformers.architecture")
    told = {family: _local(family) for family in SMALL if transformers.FAMILIES[family].learns}
    Path(out).write_text(json.dumps(told))


def _local(family):
    import comfy.model_management

    core = importlib.import_module("pack.distill_core.diffusion.out_of_place")
    healing = importlib.import_module("pack.distill_core.training.local")
    shell, blocks, question = _asked_in_double(family)
    names = [name for name in blocks if name.split(".")[0] == [*blocks][-1].split(".")[0]]  # of the last list
    first, stays, last = names[0], names[1], names[2]
    weights = [weight for weight in blocks[stays].parameters() if weight.ndim == 2]
    random = torch.Generator().manual_seed(5)
    directions = [torch.randn(weight.shape, generator=random, dtype=torch.float64) * 1e-2 for weight in weights]

    class Asked:
        """What is asked of a denoiser."""

        dtype, runs = torch.float64, {stays: (first, last)}

        def __call__(self, *_):
            return shell.apply_model(**question)

        def module(self, name):
            return shell.diffusion_model.get_submodule(name)

    def plain():
        """By the network as it is, from copies of what its blocks are given and return."""
        given, returned = [], []

        def enter(module, args, named):
            given.extend([_copied(args), _copied(named)])

        hooks = [
            blocks[first].register_forward_pre_hook(enter, with_kwargs=True),
            blocks[last].register_forward_hook(lambda module, args, output: returned.append(_copied(output))),
        ]
        with torch.no_grad():
            shell.apply_model(**question)
            for hook in hooks:
                hook.remove()
            answer = blocks[stays](*given[0], **given[1])
        pairs = [pair for pair in zip(_tensors(answer), _tensors(returned[0]), strict=True)]
        found = [2 - 2 * torch.cosine_similarity(*pair, dim=-1) for pair in pairs]
        return torch.stack([distance.flatten(1).mean(1) for distance in found]).mean(0), len(pairs)

    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        expected, num_streams = plain()
        with torch.enable_grad(), core.out_of_place(blocks.values()):
            for weight in weights:
                weight.requires_grad_(True)
            inputs = torch.zeros(1), None, torch.zeros(1), None
            (loss,) = healing.local_terms(Asked(), Asked(), inputs, "directions", contextlib.nullcontext()).values()
            slopes = torch.autograd.grad(loss.sum(), weights, allow_unused=True)
        along = sum((s * d).sum().item() for s, d in zip(slopes, directions, strict=True) if s is not None)
        answers = {}
        for sign in (1, -1):  # the block as a student's alone: what it is compared with must not move
            answers[sign] = _moved_in_student(
                blocks[stays], weights, directions, sign * WIDE_STEP, Asked(), healing, core, blocks
            )
        quotient = (answers[1] - answers[-1]) / (2 * WIDE_STEP)
        value = ((loss.detach() - expected).abs() / expected.abs()).max().item()
        return {"value": value, "slope": abs(along - quotient) / abs(quotient), "streams": num_streams}
    finally:
        comfy.model_management.in_training = before


def _moved_in_student(block, weights, directions, by, asked, healing, core, blocks):
    """The loss with a block's weights moved, in the student and not in the teacher."""

    class Moved(type(asked)):
        def module(self, name):
            def run(*args, **named):
                with torch.no_grad():
                    for weight, direction in zip(weights, directions, strict=True):
                        weight += by * direction
                    try:
                        return block(*args, **named)
                    finally:
                        for weight, direction in zip(weights, directions, strict=True):
                            weight -= by * direction

            return run

    inputs = torch.zeros(1), None, torch.zeros(1), None
    with core.out_of_place(blocks.values()):
        (loss,) = healing.local_terms(Moved(), asked, inputs, "directions", contextlib.nullcontext()).values()
    return loss.sum().item()


def _copied(value):
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(map(_copied, value))
    return {key: _copied(each) for key, each in value.items()} if isinstance(value, dict) else value


def _tensors(value):
    return [each for each in (value if isinstance(value, tuple) else (value,)) if each is not None]


def _asked_in_double(family):
    """A small network of a family in float64: its shell, its blocks by name, and the arguments to ask it by."""
    from small import asked, filled, model_of

    transformers = importlib.import_module("pack.distill_core.networks.transformers.architecture")
    shared_base = importlib.import_module("pack.nodes.bridge.shared_base")
    model = model_of(family, dtype=torch.float64)
    with torch.inference_mode():
        filled(model.diffusion_model)
    shell = shared_base.alias_of(model)
    shapes = {name: tuple(weight.shape) for name, weight in shell.diffusion_model.state_dict().items()}
    transformer = transformers.Transformer(transformers.FAMILIES[family], shapes)
    names = transformer.refiners + transformer.in_order
    question = {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in asked(shell).items()
    }
    return shell, {name: shell.diffusion_model.get_submodule(name) for name in names}, question


def _slopes(family, out_of_place, checkpointed):
    """How far the gradient along a random direction is from the difference quotient, relative to it; None if there is no gradient."""
    import comfy.model_management
    from torch.utils.checkpoint import checkpoint

    core = importlib.import_module("pack.distill_core.diffusion.out_of_place")
    denoisers = importlib.import_module("pack.distill_core.diffusion.denoiser")
    shell, by_name, question = _asked_in_double(family)
    blocks = [*by_name.values()]
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
