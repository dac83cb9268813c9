"""Pipelines of diffusers for transformers, small and with random weights, as folders."""

import json
from pathlib import Path

import torch

from .data.test_encoders import text_encoder, write_tokenizer

WIDTH = 16
FAMILIES = ("flux1", "z-image", "qwen-image")
DEPTH = {"flux1": "fold double 1-2 single 1-3", "z-image": "fold layer 1-2,4-5", "qwen-image": "fold block 1-2"}
"""Plans that fold runs of each."""


def write_pipeline(folder: Path, family: str) -> Path:
    """A pipeline of a family: transformer, autoencoder, text encoders, tokenizers and scheduler."""
    torch.manual_seed(0)
    transformer = TRANSFORMERS[family]()
    for weight in transformer.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    transformer.save_pretrained(folder / "transformer")
    autoencoder(family).save_pretrained(folder / "vae")
    _write_texts(folder, family)
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def _flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=4, num_single_layers=5, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _z_image():
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=6, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )  # fmt: skip


def _qwen_image():
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=64, num_layers=4, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


TRANSFORMERS = {"flux1": _flux, "z-image": _z_image, "qwen-image": _qwen_image}


def autoencoder(family: str):
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage

    torch.manual_seed(1)
    if family == "qwen-image":
        return AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    return AutoencoderKL(
        block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=16, scaling_factor=0.36,
        shift_factor=0.12, **blocks,
    ).eval()  # fmt: skip


def _write_texts(folder: Path, family: str) -> None:
    import transformers

    torch.manual_seed(2)
    sizes = dict(
        vocab_size=300, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2
    )
    if family == "flux1":
        text_encoder("CLIPTextModel", 2).save_pretrained(folder / "text_encoder")
        write_tokenizer(folder / "tokenizer")
        t5 = transformers.T5Config(vocab_size=300, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        transformers.T5EncoderModel(t5).save_pretrained(folder / "text_encoder_2")
        _write_bytes_tokenizer(folder / "tokenizer_2")
        return
    if family == "z-image":
        model = transformers.Qwen3Model(transformers.Qwen3Config(**sizes, head_dim=8))
    else:
        text = sizes | dict(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
        vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=WIDTH)
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, vocab_size=300)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    _write_bytes_tokenizer(folder / "tokenizer")


def _write_bytes_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are the bytes of a text."""
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {
        "<pad>": 256,
        "<|im_start|>": 257,
        "<|im_end|>": 258,
    }
    bytes_alone = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bytes_alone.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.add_special_tokens(["<pad>", "<|im_start|>", "<|im_end|>"])
    chat = "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_alone, pad_token="<pad>", chat_template=chat)
    tokenizer.save_pretrained(folder)
