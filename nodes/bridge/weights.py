"""The weights a MODEL's network computes with, in any stored format."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Size, Tensor, nn

_SCALES_OF_INPUTS = ("input_scale", "pre_quant_scale")
_OTHER_VERSION = "load the fp16, bf16 or fp8 version of the model"


def shapes_of(network: nn.Module) -> dict[str, Size]:
    """Shapes of a network's parameters, by ComfyUI's names; a quantised parameter has the shape of its original weight."""
    return {name: weight.shape for name, weight in network.named_parameters() if not name.endswith(_SCALES_OF_INPUTS)}


def stored_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of everything a network stores, buffers and scales too; a quantised parameter has the shape of its original weight."""
    stored = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    return stored | {name: tuple(shape) for name, shape in shapes_of(network).items() if name in stored}


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Parameters of a network by ComfyUI's names, as stored; ``ValueError`` if a weight cannot be read from them."""
    parameters = network.named_parameters()
    found: dict[str, Tensor] = {name: weight for name, weight in parameters if not name.endswith(_SCALES_OF_INPUTS)}
    for name, weight in found.items():
        if type(weight) not in (Tensor, nn.Parameter, QuantizedTensor) or not weight.is_floating_point():
            raise ValueError(
                f"{name} is quantised in a way that is not supported ({type(weight).__name__}, {weight.dtype}); {_OTHER_VERSION}"
            )
    for path, layer in network.named_modules():
        if getattr(layer, "pre_quant_scale", None) is not None:
            raise ValueError(f"{path} is quantised for scaled inputs, which is not supported; {_OTHER_VERSION}")
    return found


def patched_weights(model: ModelPatcher) -> dict[str, Tensor]:
    """Weights of a loaded MODEL, with its patches (LoRA), by ComfyUI's names.

    Quantised weights come in the precision they compute in. ``ValueError`` as in `weights_of`.
    """
    network = model.model.diffusion_model
    patched = model.model_state_dict_for_saving(network, "diffusion_model.")
    return {
        name: _dequantised(model, name) if isinstance(weight, QuantizedTensor) else patched[name].detach()
        for name, weight in weights_of(network).items()
    }


def stored_weights(model: ModelPatcher) -> dict[str, Tensor]:
    """Everything a loaded MODEL's network stores, with its patches (LoRA), by ComfyUI's names.

    Quantised weights come as they are stored, their scales and what names their format beside them.
    """
    patched = model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
    return {name: tensor.detach() for name, tensor in patched.items()}


def _dequantised(model: ModelPatcher, name: str) -> Tensor:
    weight = model.model.diffusion_model.get_parameter(name)
    layer = model.model.diffusion_model.get_submodule(name.rpartition(".")[0])
    if not getattr(layer, "comfy_patched_weights", False):  # else loading has already applied the patches
        weight = model.patch_weight_to_device(f"diffusion_model.{name}", device_to=model.load_device, return_weight=True)
    return weight.dequantize().detach()
