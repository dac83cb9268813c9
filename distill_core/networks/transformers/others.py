"""Families that need little more than a line."""

from .family import BlockList, Family

FAMILIES = (
    Family(
        "auraflow",
        "AuraFlow",
        ("double_layers.0.attn.w1q.weight",),
        (
            BlockList(
                "double",
                "double_layers",
                "num_mmdit_layers",
                least=1,
                diffusers="joint_transformer_blocks",
                streams=("c", "x"),
            ),
            BlockList("single", "single_layers", "num_single_dit_layers", least=1, diffusers="single_transformer_blocks"),
        ),
        diffusers=("AuraFlowTransformer2DModel",),
    ),
    Family(
        "pixart",
        "PixArt",
        ("t_block.1.weight", "blocks.0.scale_shift_table"),
        (BlockList("block", "blocks", least=1, diffusers="transformer_blocks"),),
        learns=True,
        diffusers=("PixArtTransformer2DModel",),
        diffusers_tables=("pos_embed.pos_embed",),
    ),
    Family(
        "krea2",
        "Krea 2",
        ("txtfusion.projector.weight",),
        (BlockList("block", "blocks", least=1, diffusers="transformer_blocks"),),
        diffusers=("Krea2Transformer2DModel",),
    ),
    Family(
        "kandinsky5",
        "Kandinsky 5",
        ("visual_transformer_blocks.0.cross_attention.key_norm.weight",),
        (BlockList("block", "visual_transformer_blocks", "num_visual_blocks", least=1),),
        diffusers=("Kandinsky5Transformer3DModel",),
    ),
)
