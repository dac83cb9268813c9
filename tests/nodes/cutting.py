"""Transformers as ComfyUI builds them, without weights; run by the Python of ComfyUI (see ``in_comfyui.py``)."""

import importlib
import json
from pathlib import Path

TRUE = {
    "Flux.1 dev": ("Flux", dict(image_model="flux", axes_dim=[16, 56, 56], num_heads=24, mlp_ratio=4.0, theta=10000, out_channels=16,
                   qkv_bias=True, txt_ids_dims=[], in_channels=16, hidden_size=3072, context_in_dim=4096, patch_size=2, vec_in_dim=768,
                   depth=19, depth_single_blocks=38, guidance_embed=True, yak_mlp=False, txt_norm=False)),
    "Qwen-Image": ("QwenImage", dict(image_model="qwen_image", in_channels=64, num_layers=60)),
    "Z-Image": ("ZImage", dict(image_model="lumina2", patch_size=2, in_channels=16, dim=3840, cap_feat_dim=2560, n_layers=30, qk_norm=True,
                n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0, ffn_dim_multiplier=8 / 3,
                z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32)),
    "Lumina 2": ("Lumina2", dict(image_model="lumina2", patch_size=2, in_channels=16, dim=2304, cap_feat_dim=2304, n_layers=26, qk_norm=True,
                 n_heads=24, n_kv_heads=8, axes_dims=[32, 32, 32], axes_lens=[300, 512, 512], rope_theta=10000.0, ffn_dim_multiplier=4.0)),
    "AuraFlow": ("AuraFlow", dict(max_seq=4096, cond_seq_dim=2048, n_double_layers=4, n_layers=36)),
    "PixArt Sigma": ("PixArtSigma", dict(image_model="pixart_sigma", num_heads=16, patch_size=2, hidden_size=1152, in_channels=4, depth=28,
                     micro_condition=False)),
    "LTX-Video 2B": ("LTXV", dict(image_model="ltxv", num_layers=28, attention_head_dim=64, cross_attention_dim=2048)),
}  # fmt: skip
_FLUX2 = dict(image_model="flux2", axes_dim=[32, 32, 32, 32], mlp_ratio=3.0, theta=2000, out_channels=128, global_modulation=True,
              mlp_silu_act=True, qkv_bias=False, ops_bias=False, default_ref_method="index", ref_index_scale=10.0, txt_ids_dims=[3],
              patch_size=1, in_channels=128, vec_in_dim=None, yak_mlp=False, txt_norm=False)  # fmt: skip
_WAN = dict(image_model="wan2.1", patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6,
            model_type="t2v")  # fmt: skip
_COSMOS = dict(max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
               concat_padding_mask=True, crossattn_emb_channels=1024, pos_emb_cls="rope3d", pos_emb_learnable=True,
               pos_emb_interpolation="crop", min_fps=1, max_fps=30, use_adaln_lora=True, adaln_lora_dim=256,
               extra_per_block_abs_pos_emb=False, rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0,
               rope_t_extrapolation_ratio=1.0, extra_h_extrapolation_ratio=1.0, extra_w_extrapolation_ratio=1.0,
               extra_t_extrapolation_ratio=1.0, rope_enable_fps_modulation=False)  # fmt: skip
_HUNYUAN = dict(image_model="hunyuan_video", in_channels=16, patch_size=[1, 2, 2], out_channels=16, vec_in_dim=768, axes_dim=[16, 56, 56],
                meanflow=False, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, theta=256, qkv_bias=True, byt5=False,
                guidance_embed=True, use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False)  # fmt: skip
TRUE |= {
    "Flux.2 dev": ("Flux2", _FLUX2 | dict(hidden_size=6144, num_heads=48, context_in_dim=15360, depth=8, depth_single_blocks=48, guidance_embed=True)),
    "Flux.2 klein 9B": ("Flux2", _FLUX2 | dict(hidden_size=4096, num_heads=32, context_in_dim=12288, depth=8, depth_single_blocks=24, guidance_embed=False)),
    "Flux.2 klein 4B": ("Flux2", _FLUX2 | dict(hidden_size=3072, num_heads=24, context_in_dim=7680, depth=5, depth_single_blocks=20, guidance_embed=False)),
    "Wan 1.3B": ("WAN21_T2V", _WAN | dict(dim=1536, out_dim=16, num_heads=12, ffn_dim=8960, num_layers=30, in_dim=16)),
    "Wan 14B": ("WAN21_T2V", _WAN | dict(dim=5120, out_dim=16, num_heads=40, ffn_dim=13824, num_layers=40, in_dim=16)),
    "Wan 2.2 5B": ("WAN22_T2V", _WAN | dict(dim=3072, out_dim=48, num_heads=24, ffn_dim=14336, num_layers=30, in_dim=48)),
    "Cosmos-Predict2 2B": ("CosmosT2IPredict2", _COSMOS | dict(image_model="cosmos_predict2", model_channels=2048, num_heads=16, num_blocks=28)),
    "Anima": ("Anima", _COSMOS | dict(image_model="anima", model_channels=2048, num_heads=16, num_blocks=28)),
    "Krea 2": ("Krea2", dict(image_model="krea2", features=6144, channels=16, patch=2, layers=28, heads=48, kvheads=12, txtlayers=12, txtdim=2560)),
    "Kandinsky 5 Lite": ("Kandinsky5", dict(image_model="kandinsky5", model_dim=1792, axes_dims=(16, 24, 24), time_dim=512, ff_dim=7168,
                         visual_embed_dim=132, num_text_blocks=2, num_visual_blocks=32)),
    "HunyuanVideo": ("HunyuanVideo", _HUNYUAN | dict(depth=20, depth_single_blocks=40)),
}  # fmt: skip


def built(kind, config):
    """A network of ComfyUI's without weights."""
    import comfy.supported_models

    return getattr(comfy.supported_models, kind)(dict(config)).get_model({}, "", device="meta").diffusion_model


def opened(tensors, metadata=None):
    """The class ComfyUI takes tensors for, and the names that are missing, unexpected, or of another shape."""
    import comfy.model_detection

    config = comfy.model_detection.detect_unet_config(tensors, "", metadata=metadata)
    found = comfy.model_detection.model_config_from_unet_config(config, tensors, "")
    if found is None:
        return None, ["everything"], [], []
    own = built(type(found).__name__, found.unet_config).state_dict()
    different = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    return type(found).__name__, sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys()), sorted(different)


def of_true_shape(out):
    """Every family of true shape: its shapes, and what ComfyUI makes of students by some plans of every kind."""
    import torch
    from in_comfyui import pack

    pack()
    transformers = importlib.import_module("pack.distill_core.networks.transformers.architecture")
    plan_text, plan = (importlib.import_module(f"pack.distill_core.pruning.{name}") for name in ("plan_text", "plan"))
    told = {}
    for name, (kind, config) in TRUE.items():
        shapes = {key: tuple(tensor.shape) for key, tensor in built(kind, config).state_dict().items()}
        found = transformers.Transformer.find(shapes)
        if found is None:
            told[name] = {"error": "not recognised"}
            continue
        teacher, _ = found
        teacher.check_whole()
        told[name] = {
            "family": teacher.family,
            "class": kind,
            "parameters": teacher.num_parameters,
            "lists": teacher.describe_lists(),
            "students": {},
        }
        for text in texts(teacher, plan):
            student = plan.pruned(teacher, plan.name_map(teacher, plan_text.read_plan(text, teacher)))
            tensors = {key: torch.empty(shape, device="meta") for key, shape in student.shapes.items()}
            told[name]["students"][text] = [student.num_parameters, *opened(tensors)]
    Path(out).write_text(json.dumps(told))


def texts(teacher, plan):
    """One middle block, every second of all lists, the first, the last, all but one, all of a list where none need stay, presets."""
    found, halves = [], []
    for blocks in teacher.of.lists:
        numbers = teacher.numbers(blocks.path)
        middle = numbers[len(numbers) // 2]

        def keep(kept, word=blocks.word):
            return f"keep {word} {','.join(map(str, kept)) or 'none'}"

        halves.append(keep(numbers[::2]).removeprefix("keep "))
        found += [keep([n for n in numbers if n != gone]) for gone in (middle, numbers[0], numbers[-1])] + [keep([middle])]
        found += [keep([])] if not blocks.least and len(teacher.of.lists) > 1 else []
    return [*found, "keep " + " ".join(halves), *plan.preset_names(teacher.family)]
