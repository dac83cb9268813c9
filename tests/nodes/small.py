"""Small transformers of ComfyUI's with random weights, and what they are asked."""

from cutting import _COSMOS, _FLUX2, _HUNYUAN, _SD3, _WAN, TRUE

DOUBLE_AND_SINGLE = dict(depth=4, depth_single_blocks=5)
SMALL = {
    "flux1": ("Flux", TRUE["Flux.1 dev"][1] | DOUBLE_AND_SINGLE | dict(num_heads=1, hidden_size=128, context_in_dim=64, vec_in_dim=64)),
    "flux2": ("Flux2", _FLUX2 | DOUBLE_AND_SINGLE | dict(hidden_size=128, num_heads=1, context_in_dim=64, guidance_embed=False)),
    "wan": ("WAN21_T2V", _WAN | dict(dim=128, out_dim=16, num_heads=1, ffn_dim=96, num_layers=5, in_dim=16)),
    "qwen-image": ("QwenImage", dict(image_model="qwen_image", in_channels=64, num_layers=5, num_attention_heads=1, joint_attention_dim=64)),
    "z-image": ("ZImage", TRUE["Z-Image"][1] | dict(dim=256, cap_feat_dim=64, n_layers=5, n_heads=2, n_kv_heads=2)),
    "lumina2": ("Lumina2", TRUE["Lumina 2"][1] | dict(dim=96, cap_feat_dim=64, n_layers=5, n_heads=1, n_kv_heads=1)),
    "hunyuan": ("HunyuanVideo", _HUNYUAN | DOUBLE_AND_SINGLE | dict(hidden_size=128, num_heads=1, context_in_dim=64)),
    "ltxv": ("LTXV", dict(image_model="ltxv", num_layers=5, attention_head_dim=4, cross_attention_dim=128, num_attention_heads=32, caption_channels=64)),
    "hidream": ("HiDream", TRUE["HiDream"][1] | dict(num_attention_heads=1, caption_channels=[64, 64], text_emb_dim=64, num_layers=4, num_single_layers=5,
                num_routed_experts=2, num_activated_experts=1, llama_layers=[*range(9)])),
    "sd3": ("SD3", _SD3 | dict(depth=6, num_blocks=6, num_patches=1024, pos_embed_max_size=32, x_block_self_attn_layers=[0, 1, 2],
            context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 384}})),
    "cosmos2": ("CosmosT2IPredict2", _COSMOS | dict(image_model="cosmos_predict2", model_channels=128, num_heads=1, num_blocks=5)),
    "pixart": ("PixArtSigma", TRUE["PixArt Sigma"][1] | dict(num_heads=2, hidden_size=64, depth=5, caption_channels=64)),
}  # fmt: skip
"""By family: the class of config, and a config that few weights fill."""


DEPTHS = {
    "flux1": ("depth", "depth_single_blocks"),
    "flux2": ("depth", "depth_single_blocks"),
    "hunyuan": ("depth", "depth_single_blocks"),
    "wan": ("num_layers",),
    "qwen-image": ("num_layers",),
    "z-image": ("n_layers",),
    "lumina2": ("n_layers",),
    "ltxv": ("num_layers",),
    "sd3": ("num_blocks",),
    "hidream": ("num_layers", "num_single_layers"),
    "cosmos2": ("num_blocks",),
    "pixart": ("depth",),
}
"""What ComfyUI's configs call the lengths of a family's lists."""
WIDTHS = {"wan2.1": 4096, "cosmos_predict2": 1024, "sd3": 4096}
"""Of the text, where ComfyUI sets it."""
TEXT_FIRST = ("qwen-image",)
"""Families whose blocks return the text before the picture."""


def model_of(family, depths=None, dtype=None, **changes):
    """A model by its config alone, without what ComfyUI detects; depths: of its lists. dtype: float32 unless given."""
    import comfy.supported_models
    import torch

    kind, config = SMALL[family]
    changes |= dict(zip(DEPTHS[family], depths, strict=True)) if depths else {}
    if depths and family == "hidream":
        changes.setdefault("llama_layers", [*range(sum(depths))])
    config = getattr(comfy.supported_models, kind)(config | changes)
    config.set_inference_dtype(dtype or torch.float32, None)
    return config.get_model({}, "", device="cpu")


def skip(network, family, path, numbers):
    """Make blocks of a list pass on what they are given."""
    for number in numbers:
        block = getattr(network, path)[number]

        def passed(*args, **given):
            states = [*args, *given.values()][:2] if args else [given[key] for key in given if key in STATES]
            if path in ("double_blocks", "double_stream_blocks", "joint_blocks", "transformer_blocks") and family != "ltxv":
                return tuple(states[::-1]) if family in TEXT_FIRST else tuple(states)
            return states[0]

        block.forward = passed


STATES = ("img", "txt", "hidden_states", "encoder_hidden_states", "x", "image_tokens", "text_tokens")


def filled(network, seed=0):
    """A network with random weights, so small that numbers stay finite through all blocks."""
    import torch

    random = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=random) * (0.3 if tensor.ndim < 2 else tensor[0].numel() ** -0.5)
            tensor.copy_(values + ("norm" in name and name.endswith(("weight", "scale")) and tensor.ndim == 1))
    return network.eval()


def given(model, seed=7, width=None):
    """Two latents, and what conditioning holds besides the text, with the text as ``cross_attn``."""
    import torch

    random, form, config = torch.Generator().manual_seed(seed), model.latent_format, model.model_config.unet_config
    kind, frames = config.get("image_model", "sd3"), (1,) * (form.latent_dimensions - 2)
    x = torch.randn(2, form.latent_channels, *frames, *(2 * (64 if "pixart" in kind else 8,)), generator=random)
    context = torch.randn(2, 6, width or WIDTHS.get(kind, 64), generator=random)
    pooled = torch.randn(2, config.get("vec_in_dim") or config.get("adm_in_channels") or 64, generator=random)
    mask = dict(attention_mask=torch.ones(2, 6, dtype=torch.int64)) if kind == "ltxv" else {}
    mask |= dict(conditioning_llama3=torch.randn(2, 16, 6, 64, generator=random)) if kind == "hidream" else {}
    return x, dict(cross_attn=context, pooled_output=pooled, guidance=3.5, **mask)


def asked(model, seed=7, width=None):
    """What a sampler asks of a model, on two examples. width: of the text, if it is not that of the small network."""
    import torch

    x, options = given(model, seed, width)
    conds = {key: cond.process_cond(2).cond for key, cond in model.extra_conds(**options, noise=x, device="cpu").items()}
    return dict(
        x=x,
        t=torch.tensor([0.7, 0.4]) * model.model_sampling.sigma_max,
        transformer_options={},
        c_crossattn=conds.pop("c_crossattn"),
        **conds,
    )
