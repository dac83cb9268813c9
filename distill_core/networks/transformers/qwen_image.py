"""Qwen-Image, its Edit and Layered versions (Alibaba Qwen)."""

from .family import BlockList, Family

_STREAMS = ("encoder_hidden_states", "hidden_states")

FAMILIES = (
    Family(
        "qwen-image",
        "Qwen-Image",
        ("txt_norm.weight", "img_in.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
        (
            BlockList(
                "block",
                "transformer_blocks",
                least=1,
                residuals="input",
                streams=_STREAMS,
                diffusers_streams=_STREAMS,
            ),
        ),
        marker=("default_ref_method", "index_timestep_zero", "__index_timestep_zero__"),  # Edit 2511
        learns=True,
        diffusers=("QwenImageTransformer2DModel",),
        belongs=lambda shapes: shapes["txt_norm.weight"] == (3584,),
    ),
)
