"""Transformers as ComfyUI builds them, without weights; run by the Python of ComfyUI (see ``in_comfyui.py``)."""

import contextlib
import importlib
import json
from pathlib import Path

import torch

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
    "LTX-Video 13B": ("LTXV", dict(image_model="ltxv", num_layers=48, attention_head_dim=128, cross_attention_dim=4096)),
    "LTX-2": ("LTXAV", dict(image_model="ltxav", num_layers=48, attention_head_dim=128, cross_attention_dim=4096)),
}  # fmt: skip
TRUE["HiDream"] = ("HiDream", dict(image_model="hidream", attention_head_dim=128, axes_dims_rope=[64, 32, 32], caption_channels=[4096, 4096],
                   max_resolution=[128, 128], in_channels=16, llama_layers=[*range(32), *[31] * 16], num_attention_heads=20,
                   num_routed_experts=4, num_activated_experts=2, num_layers=16, num_single_layers=32, out_channels=16, patch_size=2,
                   text_emb_dim=2048))  # fmt: skip
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
_SD3 = dict(in_channels=16, out_channels=16, patch_size=2, input_size=None, adm_in_channels=2048, num_patches=147456, pos_embed_max_size=384,
            context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
            pos_embed_scaling_factor=None, qk_norm="rms", x_block_self_attn_layers=[])  # fmt: skip
TRUE |= {
    "SD3.5 large": ("SD3", _SD3 | dict(depth=38, num_patches=36864, pos_embed_max_size=192, context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}})),
    "SD3.5 medium": ("SD3", _SD3 | dict(depth=24, x_block_self_attn_layers=[*range(13)])),
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
    "HunyuanVideo 1.5": ("HunyuanVideo15", _HUNYUAN | dict(hidden_size=2048, num_heads=16, depth=54, depth_single_blocks=0, patch_size=[1, 1, 1],
                         in_channels=65, out_channels=32, context_in_dim=3584, vec_in_dim=None, byt5=True, guidance_embed=False,
                         meanflow_sum=True, use_cond_type_embedding=True, vision_in_dim=1152)),
    "HunyuanImage 2.1": ("HunyuanImage21", _HUNYUAN | dict(hidden_size=3584, num_heads=28, depth=20, depth_single_blocks=40, patch_size=[1, 1],
                         in_channels=64, out_channels=64, axes_dim=[64, 64], context_in_dim=3584, vec_in_dim=None, byt5=True,
                         guidance_embed=False)),
    "Wan 14B I2V": ("WAN21_I2V", _WAN | dict(model_type="i2v", dim=5120, out_dim=16, num_heads=40, ffn_dim=13824, num_layers=40, in_dim=36)),
}  # fmt: skip


def built(kind, config):
    """A network of ComfyUI's without weights."""
    import comfy.supported_models

    return getattr(comfy.supported_models, kind)(dict(config)).get_model({}, "", device="meta").diffusion_model


def opened(tensors, depths):
    """The class ComfyUI takes tensors for, and the names that are missing, unexpected, or of another shape.

    depths: what it must be told, where it does not count.
    """
    import comfy.model_detection

    config = comfy.model_detection.detect_unet_config(tensors, "")
    found = comfy.model_detection.model_config_from_unet_config(config, tensors, "")
    if found is None:
        return None, ["everything"], [], []
    own = built(type(found).__name__, found.unet_config | depths).state_dict()
    different = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    return type(found).__name__, sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys()), sorted(different)


def true_shapes(name, out):
    """Shapes of a transformer by its name in `TRUE`."""
    kind, config = TRUE[name]
    Path(out).write_text(json.dumps({key: tuple(tensor.shape) for key, tensor in built(kind, config).state_dict().items()}))


def of_true_shape(out):
    """Every family of true shape: its shapes, and what ComfyUI makes of students by some plans of every kind."""
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
            told[name]["students"][text] = [student.num_parameters, *opened(tensors, student.told_depths)]
    Path(out).write_text(json.dumps(told))


def texts(teacher, plan):
    """One middle block, every second of all lists, the first, the last, all but one, all of a list where none need stay, presets."""
    found, halves = [], []
    lists = [blocks for blocks in teacher.of.lists if teacher.numbers(blocks.path)]
    for blocks in lists:
        numbers = teacher.numbers(blocks.path)
        middle, always = numbers[len(numbers) // 2], numbers[-1:] if blocks.last_stays else []

        def keep(kept, word=blocks.word, always=always):
            return f"keep {word} {','.join(map(str, sorted({*kept, *always}))) or 'none'}"

        halves.append(keep(numbers[::2]).removeprefix("keep "))
        found += [keep([n for n in numbers if n != gone]) for gone in (middle, numbers[0], numbers[-1]) if gone not in always] + [
            keep([middle])
        ]
        found += [keep([])] if not blocks.least and len(lists) > 1 else []
    return [
        *found,
        "keep " + " ".join(halves),
        "fold " + " ".join(f"{blocks.word} {'-'.join(map(str, teacher.numbers(blocks.path)[1:4:2]))}" for blocks in lists),
        *(name for name in plan.preset_names(teacher.family) if plan.preset(name).depths == teacher.depths),
    ]


def of_small_networks(out):
    """Small networks of each family: how far a student is from its teacher with the same blocks skipped; nothing but zero will do."""
    from in_comfyui import pack
    from small import SMALL, asked, filled, model_of, skip

    pack()
    transformers = importlib.import_module("pack.distill_core.networks.transformers.architecture")
    plan_text, plans = (importlib.import_module(f"pack.distill_core.pruning.{name}") for name in ("plan_text", "plan"))
    denoisers = importlib.import_module("pack.distill_core.diffusion.transformers")
    told = {}
    for family in SMALL:
        teacher, texts_of = model_of(family), {}
        weights = filled(teacher.diffusion_model).state_dict()
        marked = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        network = transformers.Transformer(transformers.FAMILIES[family], marked)
        network.check_whole()
        for text in (text for text in texts(network, plans) if text.startswith(("keep ", "fold "))):
            mapping = plans.name_map(network, plan_text.read_plan(text, network))
            kept = {path: [n for n in network.numbers(path) if mapping.rename(f"{path}.{n}")] for path in network.lists}
            depths = [len(numbers) for numbers in kept.values()]
            more = changes_of(family, mapping.apply(weights))
            if family == "hidream":
                doubles, singles = kept.values()
                more["llama_layers"] = [*doubles, *(SMALL["hidream"][1]["num_layers"] + number for number in singles)]
            student, skipping = model_of(family, depths, **more), model_of(family)
            student.diffusion_model.load_state_dict(mapping.apply(weights), strict=True)
            skipping.diffusion_model.load_state_dict(weights, strict=True)
            for path, numbers in kept.items():
                skip(skipping.diffusion_model, family, path, {*network.numbers(path)} - {*numbers})
            with torch.inference_mode():
                ours, theirs, whole = (model.apply_model(**asked(teacher)) for model in (student, skipping, teacher))
                with denoisers.skipping_blocks(teacher.diffusion_model, network, mapping.removed):
                    detour = teacher.apply_model(**asked(teacher))
            far = max((ours - other).abs().max().item() for other in (theirs, detour))
            texts_of[text] = [far, (ours - whole).abs().max().item()]
        told[family] = texts_of
    Path(out).write_text(json.dumps(told))


def each_detected(rows):
    """Rows that begin with a family, each while ComfyUI detects it."""
    for row in rows:
        with detected(row[0]):
            yield row


FORMS = ("float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise")
"""Of quantised weights."""
OPENED = ("flux1", "flux2", "hunyuan", "wan", "ltxv", "sd3", "hidream")
"""Families whose width ComfyUI reads from the file, so that it opens small networks of them; HiDream's is told, see `detected`."""


def two_of(network, first):
    """Two blocks of each list: an early one and, if it must stay, the last."""
    return {blocks.path: (first, network.numbers(blocks.path)[-1] if blocks.last_stays else 3) for blocks in network.of.lists}


def keeping(network, kept):
    """A plan's text."""
    return "keep " + " ".join(f"{network.lists[path].word} {','.join(map(str, numbers))}" for path, numbers in kept.items())


@contextlib.contextmanager
def detected(family):
    """While open, ComfyUI takes every file for the small HiDream, if that is the family: it reads nothing of it from files."""
    import comfy.model_detection
    from small import SMALL

    own = comfy.model_detection.detect_unet_config
    if family == "hidream":
        comfy.model_detection.detect_unet_config = lambda *_, **__: dict(SMALL["hidream"][1])
    try:
        yield
    finally:
        comfy.model_detection.detect_unet_config = own


def changes_of(family, tensors):
    """What else of its config ComfyUI reads off a student: the blocks of SD3 that have a second attention."""
    twice = sorted(int(name.split(".")[1]) for name in tensors if name.endswith(".x_block.attn2.qkv.weight"))
    return {"x_block_self_attn_layers": twice} if family == "sd3" else {}


@torch.inference_mode()  # as ComfyUI runs nodes
def of_models(folder):
    """Small transformers as MODELs from files: cut, compared with the teacher that skips blocks, saved, opened again by each loader."""
    import comfy.sd
    from comfy.utils import save_torch_file
    from in_comfyui import pack
    from small import SMALL, asked, filled, model_of, skip

    folder, bridge = Path(folder), pack()
    plan_text = importlib.import_module("pack.distill_core.pruning.plan_text")
    told: dict = {}
    prune_file = importlib.import_module("pack.distill_core.pruning.prune").prune_file
    open_network = importlib.import_module("pack.distill_core.networks.network").open_network
    of_each = [*((family, "") for family in OPENED), *(("flux1", form) for form in FORMS), ("wan", FORMS[0])]
    for family, form in each_detected(of_each):
        name = family + (f" in {form}" if form else "")
        file, saved = folder / f"{name}.safetensors", folder / f"{name} student.safetensors"
        weights = filled(model_of(family).diffusion_model).state_dict()
        stated = {"config": json.dumps({"transformer": SMALL[family][1]})} if family == "ltxv" else None
        save_torch_file(in_fewer_bits(weights, form) if form else weights, str(file), stated)
        stored = file.read_bytes()
        teacher, skipping = (comfy.sd.load_diffusion_model(str(file)) for _ in range(2))
        model, question = bridge.Model(teacher), asked(teacher.model)
        whole, kept = applied(teacher, question), two_of(model.network, 0)
        text = keeping(model.network, kept)
        student = bridge.prune_model(model, plan_text.read_plan(text, model.network))
        for path, numbers in kept.items():
            skip(skipping.model.diffusion_model, family, path, {*model.network.numbers(path)} - {*numbers})
        note = bridge.save_model(bridge.Model(student), saved, layout="ldm", dtype=None)
        ours, facts = bridge.load_student(saved)
        by_command = folder / f"{name} by the command.safetensors"
        prune_file(open_network(file), by_command, plan_text.read_plan(text, open_network(file).architecture))
        openers = {"student": student, "ours": ours, "command": bridge.load_student(by_command)[0]}
        openers |= (
            {}
            if note
            else {
                key: comfy.sd.load_diffusion_model(str(path)) for key, path in (("stock", saved), ("stock, command", by_command))
            }
        )
        truth, answers = applied(skipping, question), {key: applied(patcher, question) for key, patcher in openers.items()}
        again = bridge.prune_model(
            bridge.Model(ours), plan_text.read_plan(keeping(model.network, dict.fromkeys(kept, (1,))), bridge.Model(ours).network)
        )
        told[name] = {
            "far": {key: (answer - truth).abs().max().item() for key, answer in answers.items()},
            "parameters": [network.num_parameters for network in (open_network(file).architecture, model.network)],
            "moved": (whole - truth).abs().max().item(),
            "note": note,
            "file unchanged": file.read_bytes() == stored,
            "teacher as before": torch.equal(applied(teacher, question), whole),
            "facts": {key: facts[key] for key in ("family", "prediction", "pruned_by", "quantised", "dtype")},
            "plan back": bridge.Model(ours).plan_from(model) == bridge.Model(student).plan,
            "cut again": {path: len(again.model.diffusion_model.get_submodule(path)) for path in model.network.lists},
            "reloaded": type(ours.cached_patcher_init[0](*ours.cached_patcher_init[1]).model).__name__,
        }
    (folder / "told.json").write_text(json.dumps(told))


@torch.inference_mode()
def across_programs(folder):
    """A Flux.1 of diffusers, cut as a folder: its answers in diffusers and in stock ComfyUI, and the same cut made in ComfyUI."""
    import comfy.sd
    import diffusers
    from in_comfyui import pack
    from small import asked, filled

    folder, bridge = Path(folder), pack()
    plan_text = importlib.import_module("pack.distill_core.pruning.plan_text")
    prune_file = importlib.import_module("pack.distill_core.pruning.prune").prune_file
    open_network = importlib.import_module("pack.distill_core.networks.network").open_network
    network = diffusers.FluxTransformer2DModel(num_layers=4, num_single_layers=5, attention_head_dim=128, num_attention_heads=1, guidance_embeds=True,
                                               joint_attention_dim=64, pooled_projection_dim=64, in_channels=64)  # fmt: skip
    filled(network).save_pretrained(folder / "teacher")
    file = open_network(folder / "teacher")
    text = "keep double 0,3 single 0,2,4"
    prune_file(file, folder / "student", plan_text.read_plan(text, file.architecture), layout="diffusers")
    told = {}
    for name in ("teacher", "student"):
        own = diffusers.FluxTransformer2DModel.from_pretrained(folder / name).eval()
        patcher = comfy.sd.load_diffusion_model(str(folder / name / "diffusion_pytorch_model.safetensors"))
        question = asked(patcher.model)
        told[name] = applied(patcher, question)
        x, t = question["x"], question["t"]
        tokens = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        rows, text_ids = torch.arange(16.0), torch.zeros(question["c_crossattn"].shape[1], 3)
        ids = torch.stack([torch.zeros(16), rows // 4, rows % 4], 1)
        found = own(hidden_states=tokens, encoder_hidden_states=question["c_crossattn"], pooled_projections=question["y"], timestep=t,
                    img_ids=ids, txt_ids=text_ids, guidance=question["guidance"], return_dict=False)[0]  # fmt: skip
        velocity = found.unflatten(1, (4, 4)).unflatten(3, (16, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        told[f"{name} in diffusers"] = x - velocity * t[:, None, None, None]
    model = bridge.Model(comfy.sd.load_diffusion_model(str(folder / "teacher" / "diffusion_pytorch_model.safetensors")))
    cut = bridge.prune_model(model, plan_text.read_plan(text, model.network))
    told["cut in ComfyUI"] = applied(cut, asked(model.patcher.model))
    pairs = (
        ("teacher", "teacher in diffusers"),
        ("student", "student in diffusers"),
        ("student", "cut in ComfyUI"),
        ("student", "teacher"),
    )
    far = {f"{a} / {b}": ((told[a] - told[b]).abs().max() / told[a].abs().max()).item() for a, b in pairs}
    (folder / "told.json").write_text(json.dumps(far))


def applied(patcher, question):
    """What a MODEL answers."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    return patcher.model.apply_model(**question)


def in_fewer_bits(weights, form):
    """The weights of blocks in one of ComfyUI's forms, as it stores them."""
    import comfy.quant_ops

    stored, marker = {}, torch.tensor([*json.dumps({"format": form}).encode()], dtype=torch.uint8)
    layout = comfy.quant_ops.QUANT_ALGOS[form]["comfy_tensor_layout"]
    for name, weight in weights.items():
        stored[name] = weight.contiguous()
        if "blocks." in name and name.endswith(".weight") and weight.ndim == 2 and "norm" not in name:
            stored |= comfy.quant_ops.QuantizedTensor.from_float(weight, layout).state_dict(name)
            stored[f"{name.removesuffix('.weight')}.comfy_quant"] = marker.clone()
    return {name: tensor.contiguous() for name, tensor in stored.items()}


SPELLINGS = ("lora_unet_", "diffusion_model.", "transformer.", "lora_transformer_", "lycoris_", "base_model.model.", "")
"""What keys of a LoRA begin with."""


@torch.inference_mode()
def of_loras(out):
    """LoRAs on every layer in every spelling that ComfyUI reads: the teacher with one, cut, against the student with it remapped."""
    import comfy.sd
    from in_comfyui import pack
    from small import SMALL, asked, filled, model_of

    bridge = pack()
    plan_text, remap = (importlib.import_module(f"pack.distill_core.{name}") for name in ("pruning.plan_text", "lora.remap"))
    told = {}
    for (family,) in each_detected([(family,) for family in OPENED]):
        weights = filled(model_of(family).diffusion_model).state_dict()
        metadata = {"config": json.dumps({"transformer": SMALL[family][1]})} if family == "ltxv" else None
        teacher = comfy.sd.load_diffusion_model_state_dict(dict(weights), metadata=metadata)
        network = bridge.Model(teacher).network
        plan = plan_text.read_plan(keeping(network, two_of(network, 0)), network)
        student = bridge.prune_model(bridge.Model(teacher), plan)
        for spelling in SPELLINGS:
            if not (lora := _lora(teacher, spelling)):
                continue
            reference = bridge.prune_model(bridge.Model(bridge.with_lora(teacher, None, lora, 1.0, 0.0)[0]), plan)
            remapped = remap.remap_lora(lora, network, bridge.Model(student).mapping_from(bridge.Model(teacher)))
            ours, stock = (bridge.with_lora(student, None, each, 1.0, 0.0)[0] for each in (remapped.read(), lora))
            truth, *answers = (applied(patcher, asked(teacher.model)) for patcher in (reference, ours, stock, student))
            far = dict(
                zip(("far", "stock far", "moved"), ((answer - truth).abs().max().item() for answer in answers), strict=True)
            )
            told[f"{family} {spelling}"] = far | {
                "kept": remapped.num_kept,
                "dropped": remapped.num_dropped,
                "layers": len(lora) // 3,
            }
    Path(out).write_text(json.dumps(told))


def _lora(model, spelling):
    """A LoRA of rank 2 on every linear layer that ComfyUI finds under keys that begin so."""
    import comfy.lora

    random, state, lora = torch.Generator().manual_seed(3), model.model.state_dict(), {}
    for key, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        begins = next(prefix for prefix in SPELLINGS if key.startswith(prefix))
        name, slice_of = (target, None) if isinstance(target, str) else target[:2]
        own = spelling in (
            "lora_unet_",
            "diffusion_model.",
        )  # ComfyUI's own names alone: others with this prefix are the same layers again
        plain = name.removeprefix("diffusion_model.").removesuffix(".weight")
        if (
            begins != spelling
            or name not in state
            or state[name].ndim != 2
            or (own and key.removeprefix(begins) not in (plain, plain.replace(".", "_")))
        ):
            continue
        rows = state[name].shape[0] if slice_of is None else slice_of[2]
        down, up = ("lora_A", "lora_B") if "." in key else ("lora_down", "lora_up")
        lora[f"{key}.{down}.weight"] = torch.randn(2, state[name].shape[1], generator=random) * 0.1
        lora[f"{key}.{up}.weight"] = torch.randn(rows, 2, generator=random) * 0.1
        lora[f"{key}.alpha"] = torch.tensor(1.0)
    return lora


@torch.inference_mode()
def of_lora_keys(out):
    """For each family, where ComfyUI puts each key of a teacher's LoRA on a student: as it is, and remapped."""
    import comfy.lora
    from in_comfyui import pack
    from small import SMALL, filled, model_of

    pack()
    transformers = importlib.import_module("pack.distill_core.networks.transformers.architecture")
    plan_text, plans, remap = (
        importlib.import_module(f"pack.distill_core.{name}") for name in ("pruning.plan_text", "pruning.plan", "lora.remap")
    )
    told = {}
    for family in SMALL:
        teacher = model_of(family)
        shapes = {name: tuple(tensor.shape) for name, tensor in filled(teacher.diffusion_model).state_dict().items()}
        network = transformers.Transformer(transformers.FAMILIES[family], shapes)
        text = keeping(network, two_of(network, 1))
        mapping = plans.name_map(network, plan_text.read_plan(text, network))
        student = model_of(family, [2 for _ in network.of.lists], **changes_of(family, mapping.apply(shapes)))
        of_teacher, of_student = (comfy.lora.model_lora_keys_unet(model, {}) for model in (teacher, student))
        counts = {"right": 0, "wrong": 0, "lost": 0, "dropped": 0}
        as_it_is = dict(counts)
        for key, target in of_teacher.items():
            name, *slice_of = [target] if isinstance(target, str) else target
            if name.removeprefix("diffusion_model.") not in shapes:
                continue
            wanted = mapping.rename(name.removeprefix("diffusion_model."))
            told_to = _told(key, network, mapping, remap)
            for found, count in ((told_to, counts), (key, as_it_is)):
                if found is None:
                    count["dropped" if wanted is None else "lost"] += 1
                    continue
                got = of_student.get(found)
                got_name, *got_slice = [got] if isinstance(got, str) or got is None else got
                same_part = (got_slice or [None])[0] == (slice_of or [None])[0]
                is_right = got is not None and wanted == got_name.removeprefix("diffusion_model.") and same_part
                count["right" if is_right else "lost" if got is None else "wrong"] += 1
        told[family] = {"remapped": counts, "as it is": as_it_is}
    Path(out).write_text(json.dumps(told))


def _told(key, network, mapping, remap):
    """What a key is called on the student; None if its block is gone."""
    path = next(iter(network.lists))
    beside = {f"diffusion_model.{path}.1.x.alpha": torch.ones(1)}  # so that something stays; block 1 becomes block 0
    remapped = remap.remap_lora({f"{key}.alpha": torch.ones(1)} | beside, network, mapping)
    return next((name.removesuffix(".alpha") for name in remapped.tensors if name != f"diffusion_model.{path}.0.x.alpha"), None)


def write_small_flux(path):
    """A small Flux.1, with text as wide as the demo's."""
    from comfy.utils import save_torch_file
    from small import filled, model_of

    save_torch_file(filled(model_of("flux1").diffusion_model).state_dict(), str(path))


def write_small(folder):
    """A small Flux.1 and the smallest Z-Image that stock ComfyUI opens, with text as wide as the demo's."""
    from small import SMALL

    write_small_flux(Path(folder) / "small_flux.safetensors")
    z_image = SMALL["z-image"][1] | dict(dim=3840, n_heads=30, n_kv_heads=30, n_layers=3)
    write_of_true_width("ZImage", z_image, Path(folder) / "small_z_image.safetensors")


def write_of_true_width(kind, config, path):
    """A network with random weights in bfloat16."""
    from comfy.utils import save_torch_file

    random, weights = torch.Generator().manual_seed(0), {}
    for name, tensor in built(kind, config).state_dict().items():
        is_norm = "norm" in name and tensor.ndim == 1
        values = torch.randn(tensor.shape, generator=random, dtype=torch.bfloat16) * (
            0.3 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
        )
        weights[name] = values + 1 if is_norm else values
    save_torch_file(weights, str(path))


@torch.inference_mode()
def of_true_width(folder):
    """Shallow networks of families that ComfyUI knows by their width: cut, saved, and opened again by the stock loader."""
    import comfy.sd
    from in_comfyui import pack
    from small import asked

    folder, bridge, told = Path(folder), pack(), {}
    plan_text = importlib.import_module("pack.distill_core.pruning.plan_text")
    for name, depth, text in (("Lumina 2", "n_layers", "keep layer 0,2"), ("Qwen-Image", "num_layers", "keep block 0,2")):
        kind, config = TRUE[name]
        teacher_file, file = folder / f"{kind}.safetensors", folder / f"{kind} student.safetensors"
        write_of_true_width(kind, config | {depth: 3}, teacher_file)
        model = bridge.Model(comfy.sd.load_diffusion_model(str(teacher_file)))
        question = asked(model.patcher.model, width=config.get("cap_feat_dim", 3584))
        whole = applied(model.patcher, question)
        student = bridge.prune_model(model, plan_text.read_plan(text, model.network))
        with importlib.import_module("pack.distill_core.diffusion.transformers").skipping_blocks(
            model.patcher.model.diffusion_model, model.network, [f"{model.network.of.lists[0].path}.1"]
        ):
            truth = applied(model.patcher, question)
        bridge.save_model(bridge.Model(student), file, layout="ldm", dtype=None)
        answers = {"student": applied(student, question)}
        del student, model
        teacher_file.unlink()
        answers["stock"] = applied(comfy.sd.load_diffusion_model(str(file)), question)
        file.unlink()
        told[name] = {key: (answer - truth).abs().max().item() for key, answer in answers.items()}
        told[name]["moved"] = (whole - truth).abs().max().item()
    (folder / "told.json").write_text(json.dumps(told))


@torch.inference_mode()
def compared(out):
    """A transformer and its student by Compare Models, and taking turns: an image model, and one whose latents have frames."""
    from comfy.model_patcher import ModelPatcher
    from in_comfyui import pack
    from small import asked, filled, model_of

    bridge = pack()
    ranges = importlib.import_module("pack.distill_core.diffusion.ranges")
    bridge.progress.show_text = lambda text, node_id: None
    told = {}
    for family, depths in (("flux1", [2, 2]), ("qwen-image", [2])):
        teacher, student = (
            ModelPatcher(model_of(family, how), torch.device("cpu"), torch.device("cpu")) for how in (None, depths)
        )
        for patcher in (teacher, student):
            filled(patcher.model.diffusion_model)
        question = asked(teacher.model)
        conditioning = [[question["c_crossattn"][:1], {"pooled_output": torch.zeros(1, 64), "guidance": 3.5}]]
        drawing = bridge.SampleSettings(positive=conditioning, negative=conditioning, latent={"samples": torch.zeros(2, 16, 8, 8)},
                                 vae=Pixels(), seed=3, num_seeds=1, steps=2, cfg=[1.0, 1.0, 1.0], sampler_name="euler", scheduler="simple")  # fmt: skip
        routed = bridge.route_models([teacher, student], [ranges.Boundary(50, "percent")])
        comparison = bridge.compare_models({"teacher": teacher, "student": student, "routed": routed}, drawing, "1")
        told[family] = {
            "parameters": [model.parameters for model in comparison.models],
            "of network": sum(weight.numel() for weight in teacher.model.diffusion_model.parameters()),
            "macs": [model.gmacs for model in comparison.models],
            "distances": [model.distances and min(model.distances) for model in comparison.models],
            "shape": list(comparison.images["teacher"].shape),
            "routed is": [torch.equal(comparison.images["routed"], comparison.images[name]) for name in ("teacher", "student")],
        }
    Path(out).write_text(json.dumps(told))


GATES = {"flux1": ("img_mod.", "txt_mod.", "modulation."), "qwen-image": ("img_mod.", "txt_mod."), "z-image": ("adaLN_modulation.",),
         "sd3": ("adaLN_modulation.",)}  # fmt: skip
"""Parameters of a block that, at zero, make it pass on what it is given."""
IDLE = (2, 3)
"""Blocks of every list of these that do nothing."""


@torch.inference_mode()
def analysed(out):
    """Transformers of every family analysed, some of which have blocks that do nothing."""
    from comfy.model_patcher import ModelPatcher
    from in_comfyui import pack
    from small import DEPTHS, SMALL, asked, filled, given, model_of

    bridge = pack()
    runs = importlib.import_module("pack.distill_core.pruning.runs")
    transformers = importlib.import_module("pack.distill_core.networks.transformers.architecture")
    told: dict = {}
    for family in SMALL:
        model = model_of(family, [6] * len(DEPTHS[family]))
        idle = [
            f"{path}.{number}."
            for path in ("double_blocks", "single_blocks", "transformer_blocks", "layers", "joint_blocks")
            for number in IDLE
        ]
        for name, weight in filled(model.diffusion_model).state_dict().items():
            if name.startswith(tuple(idle)) and any(gate in name for gate in GATES.get(family, ())):
                weight.zero_()
        patcher = ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
        shapes = {name: tuple(weight.shape) for name, weight in model.diffusion_model.state_dict().items()}
        teacher, (latents, options) = transformers.Transformer(transformers.FAMILIES[family], shapes), given(model)
        before = model.apply_model(**asked(model))
        captions = [[[options.pop("cross_attn"), options]]]  # two captions in one batch
        told[family] = {}
        for criterion in runs.CRITERIA:
            settings = runs.Settings(criterion=criterion, saving=0.05, first_stay=1, num_timesteps=2, num_tokens=256)
            parts: list = []
            examples = bridge.examples_of(
                bridge.Model(patcher), [{"samples": latents}], captions, num_examples=2, num_levels=2, seed=0
            )
            analysis = runs.analyse(
                model.diffusion_model, teacher, examples, settings, lambda *part, parts=parts: parts.append(part)
            )
            decision = runs.decide(model.diffusion_model, examples, analysis)
            told[family][criterion] = {
                "scores": {score.run.name(teacher): score.by(criterion) for score in analysis.scores},
                "plan": decision.plan.name,
                "errors": decision.errors,
                "report": decision.report(),
                "parts": [parts[0], parts[-1], len(parts)],
            }
        told[family]["unchanged"] = torch.equal(model.apply_model(**asked(model)), before)
        told[family]["hooks"] = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    Path(out).write_text(json.dumps(told))


class Pixels:
    """Stands for a VAE: the first channels of a latent as pixels, frames as ComfyUI's video VAEs give them."""

    def decode(self, latents):
        return latents[:, :3].movedim(1, -1).sigmoid()
