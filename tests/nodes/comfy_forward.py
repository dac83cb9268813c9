"""Run by the Python of ComfyUI: load a UNet with ComfyUI's own loader and put inputs through it.

Arguments: folder of ComfyUI, UNet file, safetensors with x, t and context, file to write the output to.
"""

import sys

comfyui, unet, inputs, out = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, comfyui)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

data = load_file(inputs)
model = comfy.sd.load_diffusion_model(unet, model_options={"dtype": torch.float32})
with torch.inference_mode():
    output = model.model.diffusion_model(data["x"], timesteps=data["t"].float(), context=data["context"])
num_parameters = sum(p.numel() for p in model.model.diffusion_model.parameters())
save_file({"output": output.clone().contiguous()}, out, {"parameters": str(num_parameters)})
