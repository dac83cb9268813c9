"""Control-LoRAs on the demo's teacher and its students; run by in_comfyui.py. Each function writes what it found as JSON."""

import json
from dataclasses import replace
from pathlib import Path

from in_comfyui import pack

PLANS = {
    "decoder": '{"name": "decoder", "remove": ["up.1.attn.1"]}',
    "encoder": '{"name": "encoder", "remove": ["down.1.attn.1"]}',
    "no mid": '{"name": "no mid", "remove": ["mid"]}',
    "tiny": "bk-sdm-tiny",
}


def control_lora(out):
    """``{model: how far a Control-LoRA, and the same as a full ControlNet, move the drawing; or the error}``."""
    import torch

    import nodes

    bridge = pack()
    from pack.distill_core.diffusion.ranges import Boundary
    from pack.distill_core.pruning.plan_text import read_plan
    from pack.nodes.bridge.build import load_student
    from pack.nodes.bridge.control import with_control

    teacher = bridge.demo_teacher()
    architecture = bridge.Model(teacher).architecture
    models = {"teacher": teacher}
    for name, plan in PLANS.items():
        models[name] = bridge.prune_model(bridge.Model(teacher), read_plan(plan, architecture))
    origin = bridge.Model(models["decoder"]).origin
    back = {"encoder put back": "up.1.attn.1 down.1.attn.1", "decoder put back": "up.1.attn.1"}
    for name, padding in back.items():
        models[name] = with_control(teacher.clone(), replace(origin, metadata={"distill.padding": padding}))
    file = Path(out).parent / "student.safetensors"
    _save(models["no mid"], file)
    models["from a file"] = load_student(file)[0]
    half = [Boundary(50, "percent")]
    models["teacher, then student"] = bridge.route_models([teacher, models["tiny"]], half)
    models["student, then teacher"] = bridge.route_models([models["tiny"], teacher], half)
    models["decoder, then student"] = bridge.route_models([models["decoder"], models["tiny"]], half)
    found = {}
    with torch.inference_mode():
        low, full = _controls(teacher)
        context, hint = torch.randn(1, 8, 64), torch.rand(1, 64, 64, 3)

        def drawn(model, *controls):
            conditioning = [[context, {}]]
            for control in controls:
                apply = nodes.ControlNetApplyAdvanced().apply_controlnet
                conditioning = apply(conditioning, conditioning, control, hint, 1.0, 0.0, 1.0)[0]
            latent = {"samples": torch.zeros(1, 4, 8, 8)}
            return nodes.common_ksampler(model, 0, 4, 1.0, "euler", "normal", conditioning, conditioning, latent)[0]["samples"]

        for name, model in models.items():
            try:
                plain = drawn(model)
                found[name] = [float((drawn(model, control) - plain).norm()) for control in (low, full)]
            except ValueError as error:
                found[name] = str(error)
        try:
            drawn(models["no mid"], low, full)
        except ValueError as error:
            found["before another"] = str(error)
    Path(out).write_text(json.dumps(found))


def _save(model, path):
    from pack.distill_core.networks.files import save_unet
    from pack.nodes import bridge

    origin = bridge.Model(model).origin
    save_unet(
        path, bridge.Model(model).state_dict(), bridge.Model(model).architecture, 
        metadata=dict(origin.metadata),
    )  # fmt: skip


def _controls(teacher):
    """A Control-LoRA of a MODEL, and the full ControlNet that it makes of the MODEL's weights."""
    import comfy.controlnet
    import comfy.ops
    import torch
    from comfy.cldm.cldm import ControlNet

    random = torch.Generator().manual_seed(0)
    weights = teacher.model.diffusion_model.state_dict()
    config = {name: value for name, value in teacher.model.model_config.unet_config.items() if name != "out_channels"}
    config |= dict(hint_channels=3, operations=comfy.ops.disable_weight_init, dtype=torch.float32)
    low, merged = {"lora_controlnet": torch.zeros(0)}, {}
    for name, weight in ControlNet(**config, device="meta").state_dict().items():
        if name.startswith(("input_hint_block", "zero_convs", "middle_block_out")):
            low[name] = merged[name] = torch.randn(weight.shape, generator=random) * 0.05
        elif name.endswith(".weight") and weight.ndim > 1:
            up = torch.randn(len(weight), 2, generator=random) * 0.05
            down = torch.randn(2, weight[0].numel(), generator=random) * 0.05
            low |= {f"{name[:-7]}.up": up, f"{name[:-7]}.down": down}
            merged[name] = weights[name] + (up @ down).reshape(weight.shape)
        else:
            low[name] = merged[name] = weights[name].clone()
    network = ControlNet(**config, device="cpu")
    network.load_state_dict(merged)
    return comfy.controlnet.ControlLora(low), comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
