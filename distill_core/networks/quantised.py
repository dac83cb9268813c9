"""Networks whose weights are stored in fewer bits than they compute in.

bitsandbytes stores linear layers in eight or four bits; other layers, convolutions too, stay the same.
int8: whole numbers and a scale per output (Dettmers et al. 2022, arXiv 2208.07339). nf4: sixteen levels spaced like a normal
distribution, with a scale per 64 weights that is itself stored in eight bits (Dettmers et al. 2023, arXiv 2305.14314, Sec. 3).
Such weights are not trained; gradients pass through them to a LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..base.precision import DTYPES

if TYPE_CHECKING:
    from ..base.storage import StoredTensor

QUANTISED = ("int8", "nf4")
"""Names of these precisions."""
COMPUTES_IN = torch.bfloat16
"""Precision in which such a network computes, its other layers included."""
_BLOCK, _BLOCK_OF_SCALES = 64, 256


def computes(dtype: str) -> str:
    """Precision in which a network computes, a key of `precision.DTYPES`: stored in 8 or 4 bits, it computes in 16."""
    return "bf16" if dtype in ("fp8", *QUANTISED) else dtype


def quantise(network: nn.Module, dtype: str) -> None:
    """Replace a network's linear layers with layers that store fewer bits; ``.to(device)`` then rounds the weights.

    dtype: one of `QUANTISED`. ``ValueError`` with the pip command if bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"dtype {dtype} needs a package: python -m pip install bitsandbytes") from error
    for path, layer in list(network.named_modules()):
        if type(layer) is nn.Linear:
            network.set_submodule(path, _quantised(bitsandbytes.nn, layer, dtype))


def hold(network: nn.Module, dtype: str, device: torch.device, *, offloaded: bool = False) -> None:
    """Store a network's weights in ``dtype`` on a device, ready to predict.

    network: in the precision it `computes` in, on the CPU. dtype: a key of `precision.DTYPES`, or one of `QUANTISED`.
    offloaded: keep the weights on the CPU, with each layer on the device only while it computes.
    """
    store_in(network, dtype)
    if offloaded:
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(
            network,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=device.type == "cuda",
        )
    else:
        nn.Module.to(network, device)


def store_in(network: nn.Module, dtype: str) -> None:
    """Make a network store its weights in ``dtype``, as for `hold`; a network without contents then says how each is stored."""
    if dtype in QUANTISED:
        quantise(network, dtype)
    if dtype == "fp8":
        from diffusers.hooks import apply_layerwise_casting
        from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

        # Some networks look at the precision of a layer's weights to choose that of its inputs.
        stays = (*DEFAULT_SKIP_MODULES_PATTERN, *(getattr(network, "_skip_layerwise_casting_patterns", None) or ()))
        apply_layerwise_casting(
            network,
            storage_dtype=torch.float8_e4m3fn,
            compute_dtype=DTYPES[computes(dtype)],
            skip_modules_pattern=stays,
        )


def fill(network: nn.Module, weights: Mapping[str, StoredTensor], dtype: str, device: torch.device) -> None:
    """Read the weights of a network without contents, one at a time, to a device, stored as `store_in` has made it store them.

    weights: by parameter name; all of them.
    """
    compute = DTYPES[computes(dtype)]
    for path, module in network.named_modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            value = weights[f"{path}.{name}" if path else name].read().to(compute)
            quantised = type(empty) is not nn.Parameter
            weight = (
                type(empty)(value, **_kept(empty)).to(device) if quantised else nn.Parameter(value.to(device, empty.dtype), False)
            )
            module.register_parameter(name, weight.requires_grad_(False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def is_narrow(weight: torch.Tensor) -> bool:
    """Whether a weight of a network is stored in fewer than 16 bits; also for one without contents."""
    return weight.dtype == torch.float8_e4m3fn or type(weight) is not nn.Parameter


def held_bytes(network: nn.Module) -> int:
    """Bytes of a network's weights once `fill` has filled them. network: without contents, after `store_in`."""
    return sum(_held(weight) for weight in network.parameters())


def _held(weight: torch.Tensor) -> int:
    if type(weight) is nn.Parameter:
        return weight.nbytes
    return _BYTES[getattr(weight, "quant_type", "int8")](tuple(weight.shape))


def _kept(empty: Any) -> dict[str, Any]:
    """What a weight of bitsandbytes is made with besides its values."""
    if hasattr(empty, "quant_type"):
        return dict(requires_grad=False, quant_type=empty.quant_type, module=empty.module)
    return dict(requires_grad=False, has_fp16_weights=empty.has_fp16_weights)


def _quantised(kinds, layer: nn.Linear, dtype: str) -> nn.Linear:
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    if dtype == "int8":
        own = kinds.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        own.weight = kinds.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        own = kinds.Linear4bit(*sizes, compute_dtype=COMPUTES_IN, quant_type=dtype, device="meta")
        own.weight = kinds.Params4bit(layer.weight.data, requires_grad=False, quant_type=dtype, module=own)
        own.support_avx512bf16_for_cpu = False  # else the first call without gradients rounds the scales again
    own.bias = layer.bias
    return own.train(layer.training)


def _int8_bytes(shape: tuple[int, ...]) -> int:
    """One byte per weight, one float32 per output."""
    return prod(shape) + 4 * shape[0]


def _nf4_bytes(shape: tuple[int, ...]) -> int:
    """Half a byte per weight, a byte per block, a float32 per block of scales; the sixteen levels and the mean scale."""
    blocks = -(-prod(shape) // _BLOCK)
    return -(-prod(shape) // 2) + blocks + 4 * -(-blocks // _BLOCK_OF_SCALES) + 4 * 16 + 4


_BYTES: dict[str, Callable[[tuple[int, ...]], int]] = {"int8": _int8_bytes, "nf4": _nf4_bytes}


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the weight of a linear layer."""
    return name.endswith(".weight") and len(shape) == 2


def kept_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """Bytes of a network's weights. shapes: by parameter name. dtype: one of `QUANTISED`, or a key of `precision.DTYPES`."""
    if dtype not in QUANTISED:
        return DTYPES[dtype].itemsize * sum(map(prod, shapes.values()))
    linear = {name for name, shape in shapes.items() if is_linear(name, shape)}
    rest = sum(prod(shape) for name, shape in shapes.items() if name not in linear)
    return sum(_BYTES[dtype](shapes[name]) for name in linear) + COMPUTES_IN.itemsize * rest
