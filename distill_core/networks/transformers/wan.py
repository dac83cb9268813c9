"""Wan 2.1 and 2.2 (Alibaba Wan): text to video, image to video. Its versions with a network beside them are refused."""

from collections.abc import Mapping

from .family import BlockList, Family, Shape

_INJECTED = {
    "vace_patch_embedding.weight": "VACE",
    "control_adapter.conv.weight": "camera control",
    "casual_audio_encoder.encoder.final_linear.weight": "S2V",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Animate",
    "patch_embedding_mask.weight": "SCAIL",
    "patch_embedding_pose.weight": "SCAIL",
    "patch_embedding_global.weight": "WanDancer",
}
"""Parameter -> the version that feeds something into blocks by their numbers."""


def _plain(shapes: Mapping[str, Shape]) -> bool:
    return not _INJECTED.keys() & shapes.keys()


FAMILIES = (
    Family(
        "wan",
        "Wan",
        ("head.modulation", "blocks.0.ffn.0.weight"),
        (BlockList("block", "blocks", least=1),),
        learns=True,
        diffusers=("WanTransformer3DModel",),
        belongs=_plain,
        believes_config=True,
    ),
    Family(
        "wan-injected",
        "a Wan with control, sound or poses",
        ("head.modulation", "blocks.0.ffn.0.weight"),
        diffusers=("WanVACETransformer3DModel", "WanAnimateTransformer3DModel"),
        refusal="it feeds these into blocks by their numbers, which cutting changes; the plain text-to-video and image-to-video models "
        "can be cut",
    ),
)
