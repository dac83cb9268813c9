"""Cosmos-Predict2 (NVIDIA) and Anima, which is one with a text adapter in front."""

from .family import BlockList, Family

_BLOCKS = (BlockList("block", "blocks", least=1, diffusers="transformer_blocks"),)

FAMILIES = (
    Family("anima", "Anima", ("blocks.0.mlp.layer1.weight", "llm_adapter.blocks.0.cross_attn.q_proj.weight"), _BLOCKS),
    Family("cosmos2", "Cosmos-Predict2", ("blocks.0.mlp.layer1.weight",), _BLOCKS, diffusers=("CosmosTransformer3DModel",)),
)
