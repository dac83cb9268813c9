"""Networks whose linear layers are kept in eight or four bits, by bitsandbytes; all else, convolutions too, stays as it is.

int8: whole numbers and a scale for each output (Dettmers et al. 2022, arXiv 2208.07339). nf4: sixteen values spaced as a
normal distribution is, with a scale for each 64 weights, itself in eight bits (Dettmers et al. 2023, arXiv 2305.14314, Sec. 3).
Such weights are not trained; gradients pass through them to a LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import nn

from .recipe import DTYPES

QUANTISED = ("int8", "nf4")
"""Words for such a precision."""
COMPUTES_IN = torch.bfloat16
"""What such a network computes in, its other layers included."""
_BLOCK, _BLOCK_OF_SCALES = 64, 256


def computes(dtype: str) -> str:
    """What a network computes in, a key of `recipe.DTYPES`: kept in 8 bits or 4, it computes in 16."""
    return "bf16" if dtype in ("fp8", *QUANTISED) else dtype


def quantise(network: nn.Module, dtype: str) -> None:
    """Put layers that keep their weights in fewer bits in place of a network's linear ones; ``.to(device)`` then rounds them.

    dtype: one of `QUANTISED`. ``ValueError`` with the pip line if bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"dtype {dtype} needs a package: python -m pip install bitsandbytes") from error
    for path, layer in list(network.named_modules()):
        if type(layer) is nn.Linear:
            network.set_submodule(path, _quantised(bitsandbytes.nn, layer, dtype))


def _quantised(kinds, layer: nn.Linear, dtype: str) -> nn.Linear:
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    if dtype == "int8":
        own = kinds.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        own.weight = kinds.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        own = kinds.Linear4bit(*sizes, compute_dtype=COMPUTES_IN, quant_type=dtype, device="meta")
        own.weight = kinds.Params4bit(layer.weight.data, requires_grad=False, quant_type=dtype, module=own)
        own.support_avx512bf16_for_cpu = False  # would round the scales once more, for good, when first asked without a gradient
    own.bias = layer.bias
    return own.train(layer.training)


def _int8_bytes(shape: tuple[int, int]) -> int:
    """A byte for each weight, a float32 for each output."""
    return prod(shape) + 4 * shape[0]


def _nf4_bytes(shape: tuple[int, int]) -> int:
    """Half a byte for each weight, one for each block, a float32 for each block of those; the sixteen values, the mean scale."""
    blocks = -(-prod(shape) // _BLOCK)
    return -(-prod(shape) // 2) + blocks + 4 * -(-blocks // _BLOCK_OF_SCALES) + 4 * 16 + 4


_BYTES: dict[str, Callable[[tuple[int, int]], int]] = {"int8": _int8_bytes, "nf4": _nf4_bytes}


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the weight of a linear layer."""
    return name.endswith(".weight") and len(shape) == 2


def kept_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """What a network's weights take. shapes: of its parameters, by name. dtype: one of `QUANTISED`, or a key of `recipe.DTYPES`."""
    if dtype not in QUANTISED:
        return DTYPES[dtype].itemsize * sum(map(prod, shapes.values()))
    linear = {name for name, shape in shapes.items() if is_linear(name, shape)}
    rest = sum(prod(shape) for name, shape in shapes.items() if name not in linear)
    return sum(_BYTES[dtype](shapes[name]) for name in linear) + COMPUTES_IN.itemsize * rest
