"""Run by the Python of ComfyUI (see ``in_comfyui.py``): MODELs compared, and their pictures judged."""

import json
from pathlib import Path

import torch
from in_comfyui import pack

SETTINGS = {"seed": 3, "num_seeds": 2, "steps": 3, "sampler_name": "euler", "scheduler": "normal"}


def start():
    bridge = pack()
    from pack.nodes import compare
    from pack.nodes.bridge import compare as comparing

    bridge.progress.show_text = bridge.show_text = lambda text, node_id: None
    return bridge, comparing, compare


def drawing_of(bridge, cfgs, **changes):
    """What the models are to draw: a cat, twice for each seed."""
    clip = bridge.demo_clip()
    positive, negative = ([[*clip.encode_from_tokens_scheduled(clip.tokenize(text))][0]] for text in ("a cat, flat", ""))
    settings = SETTINGS | {"latent": {"samples": torch.zeros(2, 4, 8, 8)}} | changes
    return bridge.SampleSettings(positive=positive, negative=negative, vae=bridge.DemoVAE(), cfg=cfgs, **settings)


def shifted(model, shift):
    """A MODEL whose every answer has so much more noise in it."""
    copy = model.clone()
    copy.set_model_sampler_post_cfg_function(lambda told: told["denoised"] - shift * told["sigma"].view(-1, 1, 1, 1))
    return copy


def state(model):
    """What a MODEL is, as far as others may change it."""
    import comfy.utils

    wrappers = {kind: {key: [*them] for key, them in by_key.items()} for kind, by_key in model.wrappers.items()}
    options = comfy.utils.deepcopy_list_dict(model.model_options)
    return model.patches_uuid, options, wrappers, dict(model.attachments), dict(model.object_patches)


@torch.inference_mode()
def demo(out):
    """The demo's teacher, itself, a student, the teacher shifted by 0.1, and both in turn."""
    import nodes

    bridge, comparing, _ = start()
    from pack.distill_core.diffusion.ranges import Boundary
    from pack.distill_core.pruning.plan import preset

    teacher = bridge.demo_teacher()
    student = bridge.prune_model(bridge.Model(teacher), preset("bk-sdm-base"))
    routed = bridge.route_models([student, teacher], [Boundary(50, "percent")])
    models = {"teacher": teacher, "again": teacher, "student": student, "shifted": shifted(teacher, 0.1), "routed": routed}
    before = {name: state(model) for name, model in models.items()}
    drawing = drawing_of(bridge, [2.0, 2.0, 2.0, 2.0, 1.0])
    comparison = bridge.compare_models(models, drawing, "1")
    after = {name: state(model) for name, model in models.items()}
    sampling = {"positive": drawing.positive, "negative": drawing.negative, "latent": drawing.latent}
    (drawn,) = nodes.common_ksampler(student, 4, 3, 2.0, "euler", "normal", **sampling)
    told = comparison.facts() | {
        "untouched": before == after,
        "of KSampler": (bridge.pixels_of(drawing.vae.decode(drawn["samples"])) - comparison.images["student"][2:].float())
        .abs()
        .max()
        .item(),
        "itself": torch.equal(comparison.images["teacher"], comparison.images["again"]),
        "seeds": list(comparison.seeds),
        "shape": list(comparison.images["teacher"].shape),
    }
    Path(out).write_text(json.dumps(told))


@torch.inference_mode()
def refusals(out):
    """What is said of models that do not go together."""
    import comfy.latent_formats

    bridge, _, _ = start()
    teacher, video = bridge.demo_teacher(), bridge.demo_teacher()
    video.model.latent_format = comfy.latent_formats.Wan21()
    sound = bridge.demo_teacher()
    sound.model.latent_format = comfy.latent_formats.ACEAudio15()
    told, frames = [], {"samples": torch.zeros(1, 16, 5, 8, 8)}
    for models, changes in (
        ({"teacher": teacher, "other": video}, {}),
        ({"sound": sound, "teacher": teacher}, {}),
        ({"video": video, "other": video}, {"latent": frames}),
    ):
        try:
            bridge.compare_models(models, drawing_of(bridge, [1.0, 1.0], **changes), "1")
        except ValueError as error:
            told.append(str(error))
    Path(out).write_text(json.dumps(told))


class Projecting(torch.nn.Module):
    """Stands for a text encoder of ComfyUI, as far as it matters for its space."""

    def __init__(self, weight, projects=True, kind="SDXLClipG"):
        import comfy.sdxl_clip

        super().__init__()
        kind = getattr(comfy.sdxl_clip, kind, comfy.sdxl_clip.sd1_clip.SDClipModel)
        self.inner = kind.__new__(kind)
        torch.nn.Module.__init__(self.inner)
        self.inner.return_projected_pooled, self.inner.transformer = projects, torch.nn.Module()
        self.inner.transformer.text_projection = torch.nn.Linear(*weight.shape, bias=False)
        self.inner.transformer.text_projection.weight = torch.nn.Parameter(weight)


@torch.inference_mode()
def judging(out):
    """Pictures judged by a small CLIP Vision model of random weights, and which text encoders go with it."""
    import types

    import comfy.clip_vision

    bridge, comparing, compare = start()
    torch.manual_seed(0)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 32,
              "patch_size": 8, "num_channels": 3, "projection_dim": 24, "hidden_act": "gelu", "model_type": "clip_vision_model"}  # fmt: skip
    vision = comfy.clip_vision.ClipVisionModel(config)
    for weight in vision.model.parameters():
        weight.copy_(0.2 * torch.randn(weight.shape))
    random = torch.Generator().manual_seed(0)
    pictures = torch.rand(40, 3, 48, 48, generator=random) * 2 - 1
    comparison = types.SimpleNamespace(images={"teacher": pictures, "same": pictures, "dark": pictures * 0.2 - 0.8})
    told, told_by = {}, compare._judged(comparison, vision, None, None, "", "1")
    told["teacher's"] = [one.__dict__ for one in told_by[0]]
    real = comparing.to_images(pictures.flip(0))
    told["real"] = [one.__dict__ for one in compare._judged(comparison, vision, real, None, "", "1")[0]]
    matrix = 0.1 * torch.randn(24, 24)
    encoders = {
        "fits": Projecting(matrix), "empty": Projecting(torch.zeros(24, 24)), "one": Projecting(torch.eye(24)),
        "unprojected": Projecting(matrix, False), "of SD1.x": Projecting(matrix, kind="SDClipModel"), "wide": Projecting(0.1 * torch.randn(32, 32)),
    }  # fmt: skip
    for name, encoder in encoders.items():
        width = len(encoder.inner.transformer.text_projection.weight)
        clip = types.SimpleNamespace(
            cond_stage_model=encoder,
            tokenize=lambda text: text,
            encode_from_tokens=lambda tokens, return_pooled, width=width: (None, torch.ones(1, width)),
        )
        try:
            told[name] = [one.clip_score for one in compare._judged(comparison, vision, None, clip, "a cat", "1")[0]]
        except ValueError as error:
            told[name] = str(error)
    try:
        bridge.text_features(bridge.demo_clip(), "a cat, flat", 24)
    except ValueError as error:
        told["demo"] = str(error)
    Path(out).write_text(json.dumps(told))
