"""Flux.1, Flux.2 and Chroma (Black Forest Labs; Lodestone Rock): double blocks for images and text apart, then single ones."""

from .family import BlockList, Family

_FIRST_NORM = "double_blocks.0.img_attn.norm.key_norm.scale|double_blocks.0.img_attn.norm.key_norm.weight"
_DIFFUSERS_STREAMS = ("encoder_hidden_states", "hidden_states")
_DOUBLE = BlockList(
    "double",
    "double_blocks",
    "num_layers",
    least=1,
    diffusers="transformer_blocks",
    residuals="input",
    streams=("img", "txt"),
    diffusers_streams=_DIFFUSERS_STREAMS,
)
_SINGLE = BlockList(
    "single",
    "single_blocks",
    "num_single_layers",
    diffusers="single_transformer_blocks",
    residuals="output",
    diffusers_streams=_DIFFUSERS_STREAMS,
)

FAMILIES = (
    Family(
        "chroma",
        "Chroma",
        (_FIRST_NORM, "distilled_guidance_layer.norms.0.scale|distilled_guidance_layer.norms.0.weight"),
        diffusers=("ChromaTransformer2DModel",),
        refusal="one network makes the modulations of all its blocks, and ComfyUI finds a block's rows by the number of blocks: "
        "those left would read each other's; Flux.1 schnell, which it was made from, can be cut",
    ),
    Family(
        "flux2",
        "Flux.2",
        (_FIRST_NORM, "double_stream_modulation_img.lin.weight"),
        (_DOUBLE, _SINGLE),
        learns=True,
        diffusers=("Flux2Transformer2DModel",),
    ),
    Family(
        "flux1", "Flux.1", (_FIRST_NORM, "img_in.weight"), (_DOUBLE, _SINGLE), learns=True, diffusers=("FluxTransformer2DModel",)
    ),
)
