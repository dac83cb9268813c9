"""LTX-Video and LTX-2 (Lightricks)."""

from .family import BlockList, Family

FAMILIES = (
    Family(
        "ltxv",
        "LTX-Video",
        ("adaln_single.emb.timestep_embedder.linear_1.bias", "transformer_blocks.0.attn2.to_k.weight"),
        (BlockList("block", "transformer_blocks", least=1),),
        diffusers=("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"),
        believes_config=True,
        belongs=lambda shapes: "pos_embed.proj.bias" not in shapes,  # PixArt in diffusers' names
    ),
)
