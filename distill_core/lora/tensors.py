"""Roles of a LoRA's tensors, and checks that those of a layer change its weight, by shapes and precisions alone."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING

from ..base.storage import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
_ROLES = {
    **dict.fromkeys(("lora_A", "lora.down", "lora_linear_layer.down"), "lora_down"),
    **dict.fromkeys(("lora_B", "lora.up", "lora_linear_layer.up"), "lora_up"),
}
"""Other names of the two matrices of a LoRA -> kohya's."""
KOHYA = {"lora_down": ".lora_down.weight", "lora_up": ".lora_up.weight", "alpha": ".alpha", "dora_scale": ".dora_scale"}
PEFT = {"lora_down": ".lora_A.weight", "lora_up": ".lora_B.weight"}
"""What follows a layer's name in the LoRAs that are trained here, by role: in kohya's form, and in peft's, which has no alpha."""
_CHANGES = re.compile(r"lora|hada_|lokr_|oft_|\.(diff|diff_b|set_weight|reshape_weight|w_norm|b_norm|alpha|[ab][12](\.weight)?)$")
"""In the names of tensors that change a weight, of any kind of adapter."""
_PRODUCTS = (
    ("lora_up", "lora_down", "lora_mid"),
    ("hada_w1_a", "hada_w1_b", "hada_t1"),
    ("hada_w2_a", "hada_w2_b", "hada_t2"),
    ("lokr_w1_a", "lokr_w1_b", ""),
    ("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
"""Matrices that are multiplied, and the Tucker core between them if there is one."""
_TOGETHER = ({"hada_w1_b", "hada_w2_b"}, {"hada_t1", "hada_t2"}, {"a1", "a2", "b1", "b2"})
"""Tensors that loaders use only together (LoHa, its cores, GLoRA)."""
WIDENS = "reshape_weight"
"""Tensor that says which shape a loader brings the weight to, before it adds the change; what is new is zero."""
_INTEGERS = ("alpha", WIDENS)
"""Tensors that may be stored as integers."""


def role(rest: str) -> str:
    """Role of a tensor, from the part of its key after the layer: ``.lora_A.default.weight`` -> ``lora_down``."""
    name = rest.lstrip("._").removesuffix(".weight").removesuffix(".default")
    return _ROLES.get(name, name)


def check_adapter(keys: Iterable[str]) -> None:
    """``ValueError`` for the weights of a model, none of which changes another's."""
    if not any(map(_CHANGES.search, keys)):
        raise ValueError("this is not a LoRA: none of its tensors changes a weight; it may be a whole model")


def rank(shapes: Mapping[str, Shape]) -> int | None:
    """Rank by which loaders divide alpha, from the shapes of a layer's tensors by role; None if they ignore it (full LoKr)."""
    inner = next((name for name in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in shapes), None)
    return None if inner is None else shapes[inner][0]


def parts_of(keys: Container[str], layer: str) -> dict[str, str]:
    """Keys of a layer's tensors in a LoRA that was trained here, by role. layer: its name in the file."""
    return {part: layer + rest for form in (PEFT, KOHYA) for part, rest in form.items() if layer + rest in keys}


def check_tensor(key: str, name: str, tensor: Tensor | StoredTensor) -> None:
    """``ValueError`` for a tensor that is empty or stored as integers, or for an alpha that is not a single number.

    name: the tensor's role, as from `role`.
    """
    if name == "alpha" and prod(tensor.shape) != 1:
        raise ValueError(f"{key} has shape {tuple(tensor.shape)}, but must be one number; correct the LoRA or download it again")
    if not prod(tensor.shape):
        raise ValueError(f"{key} is empty (shape {tuple(tensor.shape)}), so it has no rank; download the LoRA again")
    if not _is_float(tensor) and name not in _INTEGERS:
        raise ValueError(f"{key} is stored as integers, like quantised weights; give the LoRA in fp32, fp16 or bf16")


def _is_float(tensor: Tensor | StoredTensor) -> bool:
    return tensor.code[0] in "FB" and tensor.code != "BOOL" if isinstance(tensor, StoredTensor) else tensor.is_floating_point()


def in_memory(tensor: Tensor | StoredTensor) -> Tensor:
    """A tensor, read if it is stored."""
    return tensor.read() if isinstance(tensor, StoredTensor) else tensor


def check_finite(key: str, tensor: Tensor | StoredTensor) -> None:
    """``ValueError`` if a tensor holds NaN or Inf; a stored tensor is read for this, but not kept."""
    values = in_memory(tensor)
    if values.is_floating_point() and not values.float().isfinite().all():
        raise ValueError(f"{key} holds NaN or Inf; the LoRA is damaged; download it again or train it again")


def check_products(keys: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of the products of a layer's matrices, by the role of the first.

    keys, shapes: by role. ``ValueError`` for a matrix without its partner, with one dimension, or with another rank.
    """
    for names in _TOGETHER:
        if (there := names & keys.keys()) and (missing := names - there):
            raise ValueError(f"{keys[min(there)]} has no {min(missing)} beside it; download the LoRA again")
    found = ((left, _product(left, right, core, keys, shapes)) for left, right, core in _PRODUCTS)
    return {left: shape for left, shape in found if shape is not None}


def _product(left: str, right: str, core: str, keys: Mapping[str, str], shapes: Mapping[str, Shape]) -> Shape | None:
    """Shape of ``left @ right``, or of a Tucker product with a core between them (LyCORIS, arXiv 2309.14859, Sec. 3)."""
    if not (there := {left, right} & keys.keys()):
        return None
    if missing := {left, right} - there:
        raise ValueError(
            f"{keys[min(there)]} has no {min(missing)} beside it: one of the two matrices of this LoRA is missing; "
            "download the LoRA again"
        )
    for name in (left, right):
        if len(shapes[name]) < 2:
            raise ValueError(f"{keys[name]} is not a matrix (shape {shapes[name]}); download the LoRA again")
    # In LoHa and LoKr the first matrix of a Tucker product is transposed.
    (rows, inner), (outer, columns, *kernel) = shapes[left][:2], shapes[right]
    if core in keys:
        if len(shapes[core]) < 3:
            raise ValueError(f"{keys[core]} is not a Tucker core (shape {shapes[core]}); download the LoRA again")
        rows, inner = (rows, inner) if left == "lora_up" else (inner, rows)
        ranks, kernel = shapes[core][:2], [*shapes[core][2:]]
    else:
        ranks = (inner, inner)
    if ranks != (inner, outer) or (left == "lora_up" and prod(shapes[left][2:]) != 1):
        raise ValueError(
            f"{keys[left]} and {keys[right]} do not match (shapes {shapes[left]} and {shapes[right]}): "
            "their ranks differ; download the LoRA again"
        )
    return (rows, columns, *kernel)


def widened(weight: Shape, keys: Mapping[str, str], tensors: Mapping[str, Tensor | StoredTensor]) -> Shape:
    """The shape of a weight as a layer's tensors change it: larger for those that widen it, such as control LoRAs of Flux.

    keys: by role. ``ValueError`` if it would shrink.
    """
    if WIDENS not in keys:
        return weight
    sizes = in_memory(tensors[keys[WIDENS]]).flatten().tolist()
    if len(sizes) != len(weight) or any(new < old for new, old in zip(sizes, weight, strict=True)):
        raise ValueError(_misfit(keys[WIDENS], tuple(sizes[: len(weight) + 1]), weight))
    return tuple(map(int, sizes))


def check_fit(keys: Mapping[str, str], shapes: Mapping[str, Shape], weight: Shape, bias: Shape | None) -> None:
    """``ValueError`` unless the tensors of a layer, by role, fit a weight and a bias of these shapes."""
    products = check_products(keys, shapes)
    changes = {name: shape for name, shape in products.items() if not name.startswith("lokr")}
    changes |= {name: shapes[name] for name in ("diff", "set_weight", "w_norm") if name in shapes}
    changes |= _kronecker(keys, shapes, products)
    for name, shape in changes.items():
        if not _same(shape, weight):
            raise ValueError(_misfit(keys[name], shape, weight))
    for name in ("diff_b", "b_norm"):
        if name in shapes and bias is not None and not _same(shapes[name], bias):
            raise ValueError(_misfit(keys[name], shapes[name], bias))
    for name, sizes in (("dora_scale", weight[:2]), ("lora_magnitude_vector", weight[:1])):
        if name in shapes and prod(shapes[name]) not in sizes:
            raise ValueError(_misfit(keys[name], shapes[name], weight))
    if (blocks := shapes.get("oft_blocks")) and (
        len(blocks) < 3 or blocks[-1] != blocks[-2] or blocks[-3] * blocks[-1] != weight[0]
    ):
        raise ValueError(_misfit(keys["oft_blocks"], blocks, weight))


def _kronecker(keys: Mapping[str, str], shapes: Mapping[str, Shape], products: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shape of a LoKr, by the role of its first tensor."""
    sides = [shapes.get(f"lokr_w{n}", products.get(f"lokr_w{n}_a", ())) for n in (1, 2)]
    names = [name for name in keys if name.startswith("lokr_w")]
    if not names:
        return {}
    if min(map(len, sides)) < 2:
        raise ValueError(f"{keys[names[0]]}: one of the two factors of this LoKr is missing or not a matrix; download it again")
    (rows, columns, *_), (more_rows, more_columns, *kernel) = sides
    return {names[0]: (rows * more_rows, columns * more_columns, *kernel)}


def _same(shape: Shape, weight: Shape) -> bool:
    """Whether a change fits a weight, whose kernel may be unfolded into its columns."""
    return len(shape) > 0 and shape[0] == weight[0] and _bare(shape[1:]) in (_bare(weight[1:]), _bare((prod(weight[1:]),)))


def _bare(shape: Shape) -> Shape:
    """A shape without the ones at its end."""
    return _bare(shape[:-1]) if shape and shape[-1] == 1 else tuple(shape)


def _misfit(key: str, shape: Shape, weight: Shape) -> str:
    return (
        f"{key} makes a change of shape {tuple(shape)}, but the model's layer has {tuple(weight)}; "
        "give the full model the LoRA was made for"
    )


def column_lengths(weight: Tensor) -> Tensor:
    """Magnitude of each column of a weight, never 0, in float32: (1, inputs), for a convolution (1, inputs, 1, 1)."""
    import torch

    norms = torch.linalg.vector_norm(weight.detach().float(), dim=[0, *range(2, weight.ndim)], keepdim=True)
    return norms + torch.finfo(torch.float32).eps  # as ComfyUI's loader in float32; in float16 it adds 0.001
