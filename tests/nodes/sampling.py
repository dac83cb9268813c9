"""How MODELs sample, and what their weights are kept in, in a process of ComfyUI; run by in_comfyui.py. Each function writes JSON."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

EMPTY = torch.zeros(0)
KINDS = {
    "sdxl, eps": ("sdxl", {}),
    "sdxl, v": ("sdxl", {"v_pred": EMPTY}),
    "sdxl, v, zero snr": ("sdxl", {"v_pred": EMPTY, "ztsnr": EMPTY}),
    "sdxl, cosxl": ("sdxl", {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}),
    "sdxl, playground": ("sdxl", {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}),
    "sd2, eps": ("sd2", {}),
    "sd2, v": ("sd2", {"sign": torch.linspace(-1, 1, 320)}),
    "sd1, eps": ("sd1", {}),
}
CONFIGS = {
    "sdxl": dict(
        block_out_channels=(320,) * 3, attention_head_dim=[5] * 3, cross_attention_dim=2048, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=[1, 2, 5],
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816),
    "sd2": dict(
        block_out_channels=(320,) * 4, attention_head_dim=[5] * 4, cross_attention_dim=1024, use_linear_projection=True),
    "sd1": dict(
        block_out_channels=(320, 320), layers_per_block=1, cross_attention_dim=768, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
}  # fmt: skip
"""Narrow networks that ComfyUI knows for their families."""


def _network(family):
    """Architecture, and random weights by canonical name."""
    from diffusers import UNet2DConditionModel
    from pack.distill_core.networks.architecture import Architecture

    with torch.device("meta"):
        shapes = UNet2DConditionModel(**CONFIGS[family]).state_dict()
    shape, random = Architecture.from_state_dict(shapes, None if family == "sd1" else 64), torch.Generator().manual_seed(0)
    return shape, {name: 0.05 * torch.randn(size, generator=random) for name, size in shape.shapes.items()}


def _write(path, shape, weights, beside):
    """A teacher's file as the world writes it: LDM names, fp16, no metadata."""
    from pack.distill_core.networks.layouts import LAYOUTS

    weights = dict(weights)
    if "sign" in beside:
        weights["up.3.attn.2.block.0.norm1.bias"] = beside["sign"]
    names = LAYOUTS["ldm"].from_canonical(shape.shapes)
    marked = {name: marker for name, marker in beside.items() if name != "sign"}
    save_file({names[name]: weight.half() for name, weight in weights.items()} | marked, path)


def _words(model):
    sampling = model.get_model_object("model_sampling")
    kinds = "+".join(base.__name__ for base in type(sampling).__bases__)
    ends = f"{float(sampling.sigma_min):.4g} to {float(sampling.sigma_max):.4g}"
    return f"{kinds}, sigma {ends}, {type(model.get_model_object('latent_format')).__name__}, {model.model.model_type.name}"


def travels(out):
    """Words for how each kind of teacher samples, and for its student, on every path a student takes."""
    import comfy.sd
    import comfy.utils
    import folder_paths
    from comfy_extras.nodes_model_merging import save_checkpoint
    from in_comfyui import pack

    bridge, folder, found = pack(), Path(out).parent, {}
    from pack.distill_core.networks.files import open_unet, save_unet
    from pack.distill_core.pruning.plan import PruningPlan
    from pack.distill_core.pruning.prune import prune_file

    plan = PruningPlan(name="no mid", remove=("mid",))
    folder_paths.set_output_directory(str(folder))
    for kind, (family, beside) in KINDS.items():
        teacher, student, saved = (folder / f"{name}.safetensors" for name in ("teacher", "student", "saved"))
        _write(teacher, *_network(family), beside)
        prune_file(open_unet(teacher), student, plan, overwrite=True)
        with torch.inference_mode():
            model = comfy.sd.load_diffusion_model(str(teacher))
            pruned, loaded = bridge.prune_model(bridge.Model(model), plan), bridge.load_student(student)[0]
            save_unet(saved, bridge.Model(pruned).state_dict(), bridge.Model(pruned).architecture, sampling=bridge.Model(pruned).sampling,
                      overwrite=True)  # fmt: skip
            save_checkpoint(pruned, filename_prefix=f"stock/{family}", output_dir=str(folder))
            (by_stock,) = (folder / "stock").glob("*.safetensors")
            stock = comfy.utils.load_torch_file(str(by_stock))
            found[kind] = {
                "teacher": _words(model),
                "train": _error(lambda model=model: bridge.check_trainable(bridge.Model(model))),
                "stock loader": _words(comfy.sd.load_diffusion_model(str(student))),
                "Load Distilled Model": _words(loaded),
                "Prune UNet Blocks": _words(pruned),
                "Save Distilled Model": _words(comfy.sd.load_diffusion_model(str(saved))),
                "stock Save Checkpoint": _words(
                    comfy.sd.load_state_dict_guess_config(stock, output_vae=False, output_clip=False)[0]
                ),
                "reloaded": _words(pruned.cached_patcher_init[0](disable_dynamic=True)),
            }
            by_stock.unlink()
    Path(out).write_text(json.dumps(found))


def patched(out):
    """What becomes of sampling that was patched on a MODEL: pruned, saved, trained."""
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete, ModelSamplingSD3
    from in_comfyui import pack

    bridge, folder, found = pack(), Path(out).parent, {}
    from pack.distill_core.networks.files import open_unet, save_unet
    from pack.distill_core.pruning.plan import PruningPlan

    shape, weights = _network("sd1")
    _write(folder / "teacher.safetensors", shape, weights, {})
    plan = PruningPlan(name="no mid", remove=("mid",))
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(folder / "teacher.safetensors"))
        kinds = {
            "v": ModelSamplingDiscrete().patch(model, "v_prediction", False)[0],
            "v, zero snr": ModelSamplingDiscrete().patch(model, "v_prediction", True)[0],
            "x0": ModelSamplingDiscrete().patch(model, "x0", False)[0],
            "lcm": ModelSamplingDiscrete().patch(model, "lcm", False)[0],
            "eps, edm": ModelSamplingContinuousEDM().patch(model, "eps", 120.0, 0.002)[0],
            "v, edm": ModelSamplingContinuousEDM().patch(model, "v_prediction", 80.0, 0.002)[0],
            "flow": ModelSamplingSD3().patch(model, 1.0)[0],
            "shifted flow": ModelSamplingSD3().patch(model, 3.0)[0],
        }
        for kind, patched in kinds.items():
            told = found[kind] = {"teacher": _words(patched), "pruned": _words(bridge.prune_model(bridge.Model(patched), plan))}
            file = folder / "saved.safetensors"
            told["train"] = _error(lambda model=patched: bridge.check_trainable(bridge.Model(model)))
            told["save"] = _error(lambda model=patched, file=file: save_unet(
                file, bridge.Model(model).state_dict(), shape, sampling=bridge.Model(model).sampling, overwrite=True))  # fmt: skip
            if told["save"] is None:
                assert open_unet(file).sampling.describe() == bridge.Model(patched).sampling.describe()
                told["loaded"] = _words(bridge.load_student(file)[0])
    Path(out).write_text(json.dumps(found))


def _error(work):
    try:
        work()
    except ValueError as error:
        return str(error)


FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "nvfp4")


def quantised(out):
    """How far weights of quantised MODELs are from what they were made of, read, pruned, saved, and with a LoRA on them."""
    import comfy.quant_ops
    import comfy.sd
    from in_comfyui import pack

    bridge, folder, found = pack(), Path(out).parent, {}
    from pack.distill_core.networks.files import open_unet, save_unet
    from pack.distill_core.networks.layouts import LAYOUTS
    from pack.distill_core.pruning.plan import PruningPlan

    shape, weights = _network("sd1")
    names, plan = LAYOUTS["ldm"].from_canonical(shape.shapes), PruningPlan(name="no mid", remove=("mid",))
    layer = "down.0.attn.0.block.0.attn1.to_q"
    size, random = shape.shapes[f"{layer}.weight"], torch.Generator().manual_seed(1)
    up, down = torch.randn(size[0], 4, generator=random) * 0.2, torch.randn(4, size[1], generator=random) * 0.2
    key = f"diffusion_model.{names[f'{layer}.weight'].removesuffix('.weight')}"
    lora = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    for form in FORMATS:
        kept = {}
        for name, weight in weights.items():
            if (".ff." if form == "nvfp4" else ".block.") in name and weight.ndim == 2:  # ComfyUI knows a UNet by its attn2
                own = comfy.quant_ops.QuantizedTensor.from_float(weight, comfy.quant_ops.QUANT_ALGOS[form]["comfy_tensor_layout"])
                about = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
                kept |= own.state_dict(names[name]) | {f"{names[name].removesuffix('.weight')}.comfy_quant": about}
            else:
                kept[names[name]] = weight.half()
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, folder / "quantised.safetensors")
        with torch.inference_mode():
            model = comfy.sd.load_diffusion_model(str(folder / "quantised.safetensors"))
            told = found[form] = {"shapes": bridge.Model(model).architecture.shapes == shape.shapes}
            read, pruned = bridge.Model(model).state_dict(), bridge.prune_model(bridge.Model(model), plan)
            save_unet(folder / "saved.safetensors", read, shape, dtype="fp16", overwrite=True)
            patched = bridge.Model(bridge.with_lora(model, None, lora, 1.0, 0.0)[0]).state_dict()
        told["read"] = _furthest(read, weights)
        told["saved"] = _furthest(open_unet(folder / "saved.safetensors").state_dict, weights)
        told["pruned"] = _furthest(bridge.Model(pruned).state_dict(), weights)
        told["opens"] = comfy.sd.load_diffusion_model(str(folder / "saved.safetensors")) is not None
        changed = patched[f"{layer}.weight"].float() - read[f"{layer}.weight"].float()
        told["lora"] = float((changed - up @ down).abs().max() / (up @ down).abs().max())
        told["file"] = _error(lambda: _furthest(open_unet(folder / "quantised.safetensors").state_dict, weights))
    found["unknown"] = _error(lambda: bridge.Model(_with_odd_weight(model)).architecture)
    Path(out).write_text(json.dumps(found))


def _furthest(read, weights):
    """The largest error of any weight, as a share of the largest in its tensor."""
    return max(float((read[name].float() - weights[name]).abs().max() / weights[name].abs().max()) for name in read)


def _with_odd_weight(model):
    """A MODEL one of whose layers keeps its weight as nobody here knows it, as loaders of other packs do."""

    class Packed(torch.Tensor):
        pass

    layer = model.model.diffusion_model.input_blocks[1][0].out_layers[3]
    layer.weight = torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.uint8).as_subclass(Packed), requires_grad=False)
    return model
