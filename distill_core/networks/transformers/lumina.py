"""Z-Image (Alibaba Tongyi) and Lumina 2 (Shanghai AI Laboratory): one network in two widths. Refiners stay whole."""

from collections.abc import Mapping
from dataclasses import replace

from .family import BlockList, Family, Shape

_MARKS = ("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight")
_REFINERS = "noise_refiner", "context_refiner"
_LAYERS = BlockList("layer", "layers", "n_layers", least=1)


def _width(shapes: Mapping[str, Shape]) -> int:
    return shapes["cap_embedder.1.weight"][0]


FAMILIES = (
    Family(
        "z-image",
        "Z-Image",
        _MARKS,
        (_LAYERS,),
        spread=("ffn_norm1.weight", 0.42),
        learns=True,
        refiners=_REFINERS,
        diffusers=("ZImageTransformer2DModel",),
        belongs=lambda shapes: _width(shapes) == 3840 and "dec_net.cond_embed.weight" not in shapes,
    ),
    Family(
        "lumina2",
        "Lumina 2",
        _MARKS,
        (replace(_LAYERS, depth_key="num_layers"),),
        belongs=lambda shapes: _width(shapes) == 2304,
        learns=True,
        refiners=_REFINERS,
        diffusers=("Lumina2Transformer2DModel",),
    ),
)
