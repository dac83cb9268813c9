"""HiDream (HiDream.ai), whose blocks each have a caption projection of their own beside them.

ComfyUI's own loaders take its number of blocks as given, so this pack's must open its students.
"""

from .family import BlockList, Family

FAMILIES = (
    Family(
        "hidream",
        "HiDream",
        ("caption_projection.0.linear.weight",),
        (
            BlockList(
                "double",
                "double_stream_blocks",
                "num_layers",
                told_by="num_layers",
                residuals="double",
                streams=("image_tokens", "text_tokens"),
            ),
            BlockList(
                "single",
                "single_stream_blocks",
                "num_single_layers",
                least=1,
                last_stays=True,  # its caption is where the text begins
                told_by="num_single_layers",
                residuals="single",
                streams=("image_tokens",),
            ),
        ),
        beside="caption_projection",
        entries_in="llama_layers",
        diffusers=("HiDreamImageTransformer2DModel",),
    ),
)
