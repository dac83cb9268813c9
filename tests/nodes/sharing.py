"""A MODEL's network as the base of a LoRA, in a process of ComfyUI; run by in_comfyui.py. Each function writes JSON."""

import contextlib
import json
from functools import partial
from pathlib import Path


def small(out):
    """How shared bases of small models of several families answer, and what becomes of their MODELs."""
    import torch
    from in_comfyui import pack

    bridge = pack()
    found = {
        "demo": _told(bridge.demo_teacher, 4, 64, None, out),
        "sd3": _told(_sd3, 16, 4096, 2048, out),
        "fp8": _told(partial(_sd3, torch.float8_e4m3fn), 16, 4096, 2048, out),
        "flux": _told(_flux, 16, 4096, 768, out),
        "demo as dora": _told(bridge.demo_teacher, 4, 64, None, out, dora=True, targets=["*"]),
        "sd3 as dora": _told(_sd3, 16, 4096, 2048, out, dora=True),
        "flux cut": _told(partial(_opened, "flux1"), 16, 64, 64, out, plan="keep double 0,3 single 0,2,4"),
        "flux.2 cut": _told(partial(_opened, "flux2"), 128, 64, None, out, plan="fold double 1-3 single 2-3"),
        "qwen-image cut": _told(_qwen_image, 16, 3584, None, out, plan="fold block 1-2"),
        "sd3 cut": _told(partial(_opened, "sd3"), 16, 4096, 2048, out, plan="keep joint 0,3,5"),
    }
    Path(out).write_text(json.dumps({"families": found}))


def handed_back(out):
    """Whether a network that is loaded only to train experts on it is released afterwards, each time.

    ComfyUI loads a MODEL's weights layer by layer where it has DynamicVRAM, and another network of it for training.
    """
    from types import SimpleNamespace
    from unittest.mock import MagicMock

    import folder_paths
    from in_comfyui import pack
    from server import PromptServer

    bridge, PromptServer.instance = pack(), MagicMock()
    folder_paths.set_output_directory(str(Path(out).parent))
    from pack.nodes.experts import TrainTimestepExperts

    teacher, loaded_whole = bridge.demo_teacher(), bridge.demo_teacher()
    teacher.non_dynamic_delegate_model, held = None, set()

    def delegate():
        patcher = loaded_whole.clone()
        teacher.non_dynamic_delegate_model = patcher.model
        held.add(patcher.model)
        patcher.detach = lambda unpatch_all=True: held.discard(patcher.model)
        return patcher

    teacher.is_dynamic, teacher.get_non_dynamic_delegate = (lambda: True), delegate
    latents, captions = bridge.demo_data()
    TrainTimestepExperts.hidden = SimpleNamespace(unique_id="1", prompt=None, extra_pnginfo=None)
    settings = {
        "count": 2,
        "split": "timesteps",
        "boundaries": "",
        "overlap": 0,
        "joint_steps": 0,
        "lora_rank": 2,
        "total_steps": 1,
    }
    steps = []
    for _ in range(2):
        told = TrainTimestepExperts.execute(
            [teacher], [teacher], latents, captions, ["handed back"], [1],
            null_caption=captions[:1], **{name: [value] for name, value in settings.items()}
        )  # fmt: skip
        steps.append([told.result[4], len(held), teacher.non_dynamic_delegate_model is None])
    Path(out).write_text(json.dumps(steps))


def of_file(file, width, pooled_width, out):
    """The same of a file, opened with ComfyUI's own loader; activations, and weights that were widened, are not kept for the gradient."""
    import comfy.sd
    import torch
    from in_comfyui import pack

    pack()
    options = {"dtype": torch.float16}  # as it is in the file
    load = partial(comfy.sd.load_diffusion_model, file, options)
    found = _told(load, 4, int(width), int(pooled_width) or None, out, keeps_activations=False)
    Path(out).write_text(json.dumps(found))


def _opened(family):
    """A small transformer as ComfyUI opens it."""
    import comfy.sd
    from small import filled, model_of

    return comfy.sd.load_diffusion_model_state_dict(dict(filled(model_of(family).diffusion_model).state_dict()))


def _qwen_image():
    """A small Qwen-Image, which draws images as videos of one frame; ComfyUI counts the blocks of a file, but not its heads."""
    import comfy.model_detection
    import comfy.sd
    from small import filled, model_of

    detect = comfy.model_detection.detect_unet_config

    def of_one_head(*args, **options):
        config = detect(*args, **options)
        return config | {"num_attention_heads": 1} if config.get("image_model") == "qwen_image" else config

    comfy.model_detection.detect_unet_config = of_one_head  # in this process, which ends after this call
    model = model_of("qwen-image", joint_attention_dim=3584)  # a width by which it is told from others
    return comfy.sd.load_diffusion_model_state_dict(dict(filled(model.diffusion_model).state_dict()))


def _told(load, channels, width, pooled_width, out, *, keeps_activations=True, plan=None, **of_lora):
    """plan: of a student, which is taught on its teacher's weights."""
    from dataclasses import replace

    import pack.nodes.bridge as bridge
    import torch
    from pack.distill_core.base.storage import read_header
    from pack.distill_core.diffusion.conditioning import Label
    from pack.distill_core.diffusion.denoiser import checkpointing
    from pack.distill_core.lora.layers import Lora, WithoutLora
    from pack.distill_core.pruning.plan_text import read_plan

    torch.manual_seed(0)
    with torch.inference_mode():
        teachers = model = load()
        if plan is not None:
            whole = bridge.Model(teachers)
            model = bridge.prune_model(whole, read_plan(plan, whole.network))
    with torch.inference_mode(False):
        shared = base = bridge.shared_base(bridge.Model(teachers))
        if plan is not None:
            base = replace(shared, mapping=bridge.Model(model).mapping_from(whole))
        label = pooled_width and Label(torch.randn(2, pooled_width), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2))
        asked = torch.randn(2, channels, 8, 8), torch.tensor([300, 900]), torch.randn(2, 6, width), label
        with torch.no_grad():
            before, of_teacher = base(*asked), shared(*asked)
            stock = _stock(model, base, *asked)
        scale = before.abs().max()
        told = {
            "kind": type(model.model).__name__,
            "prediction": base.prediction,
            "cut": (of_teacher - before).abs().max() / scale,
            "stock": (stock - before).abs().max() / scale,
        }
        lora, teacher = Lora(base, rank=2, **{"targets": ["*attn*"]} | of_lora), WithoutLora(shared)
        parameters = lora.parameters()
        for parameter in parameters.values():
            parameter.data += 0.05 * torch.randn_like(parameter)
        with bridge.with_gradients(base), contextlib.nullcontext() if keeps_activations else checkpointing(base):
            base(*asked).square().mean().backward()
        told["without gradient"] = sorted(n for n, p in parameters.items() if p.grad is None or not p.grad.any())
        if keeps_activations:
            told |= _computed_again(bridge, base, asked, parameters)
        if not lora.dora:  # whose gradient takes norms for constants
            told["slope"] = _slope(lambda: base(*asked).square().mean().item(), parameters)
        own = {parameter.data_ptr() for parameter in teachers.model.diffusion_model.parameters()}
        held = {n: p for n, p in base.network.named_parameters() if not {"lora_A", "lora_B", "dora_scale"} & {*n.split(".")}}
        told["copied"] = sum(parameter.data_ptr() not in own for parameter in held.values())
        with torch.no_grad():
            changed = base(*asked)
            told["change"] = (changed - before).abs().max() / scale
            told["teacher"] = (teacher(*asked) - of_teacher).abs().max()
            told["model"] = (_stock(model, base, *asked) - stock).abs().max()
            file = Path(out).with_name("lora.safetensors")
            file.unlink(missing_ok=True)
            lora.write(file, {n: p.detach() for n, p in parameters.items()}, {})
            patched, _ = bridge.with_lora(model, None, {n: t.read() for n, t in read_header(file).tensors.items()}, 1.0, 0.0)
            told["not loaded"] = len(lora.layers) - len(patched.patches)
            told["merged"] = (_stock(patched, base, *asked) - changed).abs().max() / scale
    return {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in told.items()}


def _computed_again(bridge, base, asked, parameters):
    """How far gradients are from those of kept activations, over the largest, and how often a block's layer then computes."""
    from pack.distill_core.diffusion.denoiser import checkpointing

    try:
        path = base.path(base.inner_blocks[0])
    except ValueError as error:
        return {"checkpointing": str(error)}
    parameters = {name: parameter for name, parameter in parameters.items() if parameter.grad is not None}
    kept, calls = {name: parameter.grad.clone() for name, parameter in parameters.items()}, []
    for parameter in parameters.values():
        parameter.grad = None
    layer = next(child for child in base.network.get_submodule(path).modules() if not [*child.children()])
    counting = layer.register_forward_hook(lambda *call: calls.append(1))
    with bridge.with_gradients(base), checkpointing(base):
        base(*asked).square().mean().backward()
    counting.remove()
    worst = max((parameter.grad - kept[name]).abs().max() for name, parameter in parameters.items())
    return {"checkpointing": (worst / max(gradient.abs().max() for gradient in kept.values())).item(), "computes": len(calls)}


def _slope(loss, parameters, step=1e-2):
    """How a loss changes along its gradient, measured by steps that way and back, over what the gradient says."""
    import torch

    parameters = {name: parameter for name, parameter in parameters.items() if parameter.grad is not None}
    norm = sum(parameter.grad.square().sum() for parameter in parameters.values()).sqrt()
    found = []
    with torch.no_grad():
        for way in (step, -2 * step, step):
            for parameter in parameters.values():
                parameter += way * parameter.grad / norm
            found.append(loss())
    return ((found[0] - found[1]) / (2 * step) / norm).item()


def _stock(model, base, x_t, t, context, label):
    """The MODEL's own answer, through ComfyUI: from the picture it stands for."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    shell, now = model.model, base.schedule.at(t, x_t)
    flows = base.prediction == "flow"
    sigma, shown = (now.sigma, x_t) if flows else (now.sigma / now.alpha, x_t / now.alpha)
    framed = shell.latent_format.latent_dimensions == 3
    x_t, shown, sigma = (tensor.unsqueeze(2) if framed else tensor for tensor in (x_t, shown, sigma))
    told = {"cross_attn": context, "noise": x_t, "device": x_t.device}
    if label is not None:
        told |= {"pooled_output": label.pooled, "height": 64, "width": 64}
    asked = {name: cond.process_cond(batch_size=2).cond for name, cond in shell.extra_conds(**told).items()}
    x0 = shell.apply_model(shown, sigma.flatten(), **asked)
    answer = (shown - x0) / sigma
    return answer.squeeze(2) if framed else answer


def _filled(network):
    import torch

    def fill(weight):
        return torch.randn(weight.shape) / max(1, weight[0].numel()) ** 0.5 if weight.ndim else weight

    return {name: fill(weight) for name, weight in network.state_dict().items()}


def _sd3(dtype=None):
    import comfy.ops
    import comfy.sd
    import torch
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    network = OpenAISignatureMMDITWrapper(
        input_size=None, depth=2, num_patches=36864, pos_embed_max_size=192, adm_in_channels=2048, context_embedder_config=context,
        in_channels=16, patch_size=2, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)  # fmt: skip
    options = {} if dtype is None else {"dtype": dtype}
    return comfy.sd.load_diffusion_model_state_dict(_filled(network), model_options=options)


def _flux():
    import comfy.ops
    import comfy.sd
    import torch
    from comfy.ldm.flux.model import Flux

    network = Flux(image_model="flux", in_channels=16, patch_size=2, out_channels=16, vec_in_dim=768, context_in_dim=4096,
                   hidden_size=256, mlp_ratio=4.0, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000,
                   qkv_bias=True, guidance_embed=True, txt_ids_dims=[], device="cpu", dtype=torch.float32,
                   operations=comfy.ops.disable_weight_init)  # fmt: skip
    return comfy.sd.load_diffusion_model_state_dict(_filled(network))


def decoding(out):
    """What is loaded before, while and after a sample image of a run is decoded by a VAE for which ComfyUI makes room."""
    import comfy.model_management as management
    import torch
    from in_comfyui import pack

    bridge = pack()
    model, (latents, captions) = bridge.Model(bridge.demo_teacher()), bridge.demo_data()
    seen = []

    class Vae:
        def decode(self, latents):
            management.free_memory(1e20, torch.device("cpu"))
            seen.append(base.patcher.loaded_size())
            management.load_models_gpu([bridge.demo_teacher()])
            return torch.zeros(len(latents), 64, 64, 3)

    with torch.inference_mode(), bridge.opened_base(model) as base:
        data = bridge.dataset(latents[:4], captions[:4], captions[:1], model)
        seen.append(base.patcher.loaded_size())
        before = list(management.current_loaded_models)
        for stays in (True, False):
            bridge.previews(data, Vae(), model, stays=stays).decode(torch.zeros(1, 4, 8, 8))
            if stays:
                seen.append(base.patcher.loaded_size())
                kept = management.current_loaded_models == before
    Path(out).write_text(json.dumps({"loaded": seen, "kept": kept}))
