"""Run by the Python of ComfyUI, in a process of its own: ``in_comfyui.py COMFYUI FUNCTION ARGUMENTS...``.

FUNCTION is one of this file, or ``module.function`` of a file beside it. ``in_comfyui.py COMFYUI`` alone loads ComfyUI once,
and then runs each function that it is asked for in a fork of itself; see `serve`.
"""

import importlib
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]


def start(comfyui, cpu=True):
    """Make ComfyUI's own modules importable, to run on the CPU or where ComfyUI would."""
    sys.argv = [sys.argv[0], *["--cpu"] * cpu]
    sys.path.insert(0, comfyui)
    import comfy.options

    comfy.options.enable_args_parsing()


def pack():
    """This pack, imported as ComfyUI imports it."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return importlib.import_module("pack.nodes.bridge")


def read_inputs(path):
    """x, t and context, for SDXL also pooled and sizes; and the last two as ComfyUI's conditioning has them."""
    from safetensors.torch import load_file

    data = load_file(path)
    options = {}
    if "pooled" in data:
        height, width, crop_h, crop_w, target_height, target_width = map(int, data["sizes"][0])
        options = dict(pooled_output=data["pooled"], height=height, width=width, crop_h=crop_h, crop_w=crop_w,
                       target_height=target_height, target_width=target_width)  # fmt: skip
    return data, options


def forward_and_sample(unet, inputs, out):
    """Open a student with the stock node, put inputs through it, and draw with the stock KSampler."""
    import folder_paths
    import torch
    from safetensors.torch import save_file

    import nodes

    folder_paths.add_model_folder_path("diffusion_models", str(Path(unet).parent))
    (model,) = nodes.UNETLoader().load_unet(Path(unet).name, "default")
    data, options = read_inputs(inputs)
    network = model.model.diffusion_model
    with torch.inference_mode():
        assert next(network.parameters()).dtype == torch.float32
        y = model.model.encode_adm(**options) if options else None
        output = network(data["x"], timesteps=data["t"].float(), context=data["context"], y=y)
        conditioning = [[data["context"], options]]
        (latent,) = nodes.KSampler().sample(
            model, 0, 2, 2.0, "euler", "normal", conditioning, conditioning, {"samples": data["x"] * 0}
        )
    facts = {
        "parameters": str(sum(p.numel() for p in network.parameters())),
        "class": type(model.model.model_config).__name__,
        "prediction": type(model.get_model_object("model_sampling")).__bases__[-1].__name__,
    }
    save_file({"output": output.clone().contiguous(), "latent": latent["samples"].clone().contiguous()}, out, facts)


def detect(shapes_file, out):
    """What ComfyUI takes networks for that are given as names and shapes, and which of its weights would find none.

    Reads a list of ``{name: shape}`` and writes a list of ``[class or null, weights without a tensor, tensors without use]``.
    """
    import comfy.model_detection
    import comfy.utils
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    logging.disable(logging.CRITICAL)
    found = []
    for shapes in json.loads(Path(shapes_file).read_text()):
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        config = comfy.model_detection.model_config_from_unet(tensors, "")
        if config is None and (config := comfy.model_detection.model_config_from_diffusers_unet(tensors)) is not None:
            names = comfy.utils.unet_to_diffusers(config.unet_config)
            tensors = {names[name]: tensor for name, tensor in tensors.items() if name in names}
        if config is None:
            found.append([None, 0, 0])
            continue
        with torch.device("meta"):
            wanted = UNetModel(**{**config.unet_config, "dtype": torch.float32, "device": "meta"}).state_dict()
        wrong = [name for name in wanted if name not in tensors or tensors[name].shape != wanted[name].shape]
        found.append([type(config).__name__, len(wrong), len(tensors.keys() - wanted.keys())])
    Path(out).write_text(json.dumps(found))


def receive_control(plans, out):
    """Sample with a ControlNet and a T2I-Adapter on the demo's teacher and student; tell which residuals were received.

    plans: JSON list of texts. Writes ``{"teacher" or plan: [[list, number of the residual or null], ...]}`` in the order
    they are taken, the residuals numbered by ComfyUI's lists for the teacher.
    """
    import comfy.controlnet
    import comfy.ldm.modules.diffusionmodules.openaimodel as openai
    import torch

    import nodes

    bridge = pack()
    from pack.distill_core.pruning.plan_text import read_plan

    teacher = bridge.demo_teacher()
    architecture = bridge.Model(teacher).architecture
    models = {"teacher": teacher} | {
        plan: bridge.prune_model(bridge.Model(teacher), read_plan(plan, architecture)) for plan in json.loads(plans)
    }
    taken = []
    apply_control = openai.apply_control

    def record(h, control, name):
        before = len(control[name]) if control and name in control else 0
        residual = control[name][-1] if before else None
        if residual is not None:
            assert residual.shape == h.shape, (name, residual.shape, h.shape)
        taken.append([name, None if residual is None else round(residual.flatten()[0].item())])
        return apply_control(h, control, name)

    openai.apply_control = record
    shapes = {"output": [], "middle": []}

    def measure(h, control, name):
        if name in shapes:
            shapes[name].append(h.shape)
        return h

    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 64)
    with torch.inference_mode():
        openai.apply_control = measure
        teacher.model.diffusion_model(x, timesteps=torch.tensor([500.0]), context=context)
        openai.apply_control = record
        # Residual number i is a tensor full of i; those of the T2I-Adapter go beside the outputs of the input blocks.
        outputs = [torch.full(shape, float(i)) for i, shape in enumerate(reversed(shapes["output"]))]
        inputs = [torch.full(shape, float(i)) for i, shape in enumerate(shapes["output"])]
        control = {"output": outputs, "middle": [torch.full(shapes["middle"][0], 99.0)], "input": inputs}

        class Control(comfy.controlnet.ControlBase):
            """Stands where a ControlNet stands in the conditioning."""

            def get_control(self, *_):
                return {name: [tensor.clone() for tensor in tensors] for name, tensors in control.items()}

            def copy(self):
                return Control()

        found = {}
        for who, model in models.items():
            taken.clear()
            conditioning = [[context, {"control": Control(), "control_apply_to_uncond": False}]]
            nodes.common_ksampler(model, 0, 1, 1.0, "euler", "normal", conditioning, conditioning, {"samples": x * 0})
            found[who] = [*taken]
    Path(out).write_text(json.dumps(found))


def tell_memory(out):
    """What Distill Train Step shows and logs for the demo, with memory enough and with too little.

    Writes ``[[free bytes, text on the node, log], ...]``, the first for what is free on this computer.
    """
    bridge = pack()
    from pack.distill_core.pruning.plan import preset
    from pack.distill_core.training.settings import TrainingSettings
    from pack.nodes.bridge import watch

    teacher, plan = bridge.demo_teacher(), preset("bk-sdm-base")
    read = bridge.Model(teacher)
    student, data = bridge.Model(bridge.prune_model(read, plan)), bridge.dataset(*bridge.demo_data(), None, read)
    found, shown, logged = [], [], []
    watch.show_text = lambda text, node_id: shown.append(text)
    watch.log.setLevel(logging.INFO)
    watch.log.addHandler(handler := logging.Handler())
    handler.emit = lambda record: logged.append(record.getMessage())
    for free in (bridge.free_bytes(student), 30 << 20):
        told = bridge.forecast_memory([read], student, plan, data, TrainingSettings(batch_size=4))
        watch.tell_needs(told, free, "1")
        found.append([free, shown.pop(), "\n".join(logged)])
    Path(out).write_text(json.dumps(found))


def progress(out):
    """What the node of a long task shows, and how far its bar is; whether a cancel ends the task.

    Writes ``[[text, ...], [[done, total], ...], whether it was cancelled]``. Each unit takes two seconds.
    """
    import comfy.model_management

    bridge, shown, bars = pack(), [], []
    from pack.nodes.bridge import progress

    clock = iter(range(100, 1000, 2))
    progress.time = SimpleNamespace(monotonic=lambda: next(clock))
    progress.show_text = lambda text, node_id: shown.append(text)
    reporter = bridge.Progress("1", "images", 40)
    reporter._bar.update_absolute = lambda done, total, preview: bars.append([done, total])
    for done in (30, 31, 33, 40):  # 30 were there before
        reporter.at(done)
    reporter.tell("measuring")
    comfy.model_management.interrupt_current_processing()
    try:
        reporter.add()
        cancelled = False
    except comfy.model_management.InterruptProcessingException:
        cancelled = True
    in_parts = bridge.Progress("1", "images", 80, each=20)
    in_parts.at(0)
    in_parts.at(50)
    Path(out).write_text(json.dumps([shown, bars, cancelled]))


def fingerprints(out):
    """What nodes whose files change are known by, asked twice for each name: of a linked input, which is None, and of none there is.

    Writes ``{node: [whether the linked one differs from itself, whether the other does]}``.
    """
    pack()
    from pack.nodes import compare, experts, lora, router, save

    asks = {
        "DistillReport": lambda name: compare.DistillationReport.fingerprint_inputs(run_name=name),
        "DistillLoadExperts": lambda name: experts.LoadTimestepExperts.fingerprint_inputs(name=name),
        "DistillTimestepRouterSampler": lambda name: router.TimestepRouterSampler.fingerprint_inputs(split={"experts": name}),
        "DistillLoadDistilledModel": lambda name: save.LoadDistilledModel.fingerprint_inputs(name=name),
        "DistillRemapLoRAToStudent": lambda name: lora.RemapLoRAToStudent.fingerprint_inputs(lora_name=name),
    }
    Path(out).write_text(json.dumps({node: [ask(name) != ask(name) for name in (None, "none")] for node, ask in asks.items()}))


def call(function, arguments):
    module, _, name = function.rpartition(".")
    found = importlib.import_module(module) if module else sys.modules[__name__]
    getattr(found, name)(*arguments)


def serve():
    """Read lines of JSON, ``[function, arguments, file for what it says]``, and answer each with the exit code, when it is done."""
    import nodes  # noqa: F401  # most of the time that a start takes

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ComfyUI prints is no answer
    for line in sys.stdin:
        function, arguments, says = json.loads(line)
        if not (child := os.fork()):
            os.dup2(os.open(says, os.O_WRONLY | os.O_CREAT), 2)
            code = 1
            try:
                call(function, arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    comfyui, *asked = sys.argv[1:]
    start(comfyui)
    if asked:
        call(asked[0], asked[1:])
    else:
        serve()
