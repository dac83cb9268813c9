"""HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage 2.1 (Tencent)."""

from .family import BlockList, Family

FAMILIES = (
    Family(
        "hunyuan",
        "HunyuanVideo or HunyuanImage",
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight",),
        (
            BlockList(
                "double",
                "double_blocks",
                "num_layers",
                diffusers="transformer_blocks",
                residuals="input",
                streams=("img", "txt"),
            ),
            BlockList("single", "single_blocks", "num_single_layers", diffusers="single_transformer_blocks", residuals="output"),
        ),
        learns=True,
        diffusers=("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel", "HunyuanImageTransformer2DModel"),
    ),
)
