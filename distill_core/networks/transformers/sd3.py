"""SD3 and SD3.5 (Stability AI): joint blocks for images and text, the last of which needs no text.

ComfyUI takes the number of blocks from the width (hidden size / 64), not from the file: its own loaders would fill in the missing
blocks of a student with whatever is in memory, so this pack's must open it.
"""

from .family import BlockList, Family

FAMILIES = (
    Family(
        "sd3",
        "SD3",
        ("joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight"),
        (
            BlockList(
                "joint",
                "joint_blocks",
                "num_layers",
                least=1,
                diffusers="transformer_blocks",
                alike=False,
                last_stays=True,
                last_swapped=("norm1_context.linear", "context_block.adaLN_modulation.1"),
                told_by="num_blocks",
                residuals="output",
                numbered_in="dual_attention_layers",
                streams=("context", "x"),
            ),
        ),
        tables=("pos_embed",),
        learns=True,
        diffusers=("SD3Transformer2DModel",),
        diffusers_tables=("pos_embed.pos_embed",),
    ),
)
