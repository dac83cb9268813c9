"""Sampling through the router in a process of ComfyUI; run by in_comfyui.py. Each function writes what it found as JSON."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

SETTINGS = {"seed": 3, "steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"}


class Bench:
    """The demo's teacher, a student of it, and what sampling needs."""

    def __init__(self):
        import comfy.sd
        import torch
        from in_comfyui import pack

        import nodes

        self.bridge, self.nodes, self.torch = pack(), nodes, torch
        from pack.distill_core.diffusion.ranges import Boundary
        from pack.distill_core.pruning.plan import preset

        self.Boundary, self.load_lora = Boundary, comfy.sd.load_lora_for_models
        self.teacher = self.bridge.demo_teacher()
        self.student = self.bridge.prune_model(self.bridge.Model(self.teacher), preset("bk-sdm-base"))
        random = torch.Generator().manual_seed(0)
        self.positive, self.negative = ([[torch.randn(1, 8, 64, generator=random), {}]] for _ in range(2))
        self.latent = {"samples": torch.zeros(2, 4, 8, 8)}
        self.picture = {"samples": torch.randn(2, 4, 8, 8, generator=random)}

    def route(self, models, *percents):
        return self.bridge.route_models(models, [self.Boundary(100 * percent, "percent") for percent in percents])

    def draw(self, model, latent=None, positive=None, **changes):
        """What KSampler, or with start_step and the like KSampler Advanced, draws."""
        latent, settings = latent or self.latent, SETTINGS | changes
        with self.torch.inference_mode():
            (drawn,) = self.nodes.common_ksampler(
                model, positive=positive or self.positive, negative=self.negative, latent=latent, **settings
            )
        return drawn

    def handed_over(self, models, step=2, **changes):
        """Two KSampler Advanced nodes, the second of which goes on at a step."""
        begun = self.draw(models[0], last_step=step, **changes)
        rest = {**changes, "latent": begun, "disable_noise": True}
        return self.draw(models[1], start_step=step, force_full_denoise=True, **rest)

    def distance(self, a, b):
        return (a["samples"] - b["samples"]).abs().max().item()

    def lora(self, model, seed):
        """A LoRA for a few weights of a model, in ComfyUI's own names."""
        random, weights = self.torch.Generator().manual_seed(seed), {}
        for name, weight in model.model.state_dict().items():
            if name.endswith(("attn1.to_q.weight", "attn2.to_v.weight")):
                key = name.removesuffix(".weight")
                weights[f"{key}.lora_up.weight"] = self.torch.randn(weight.shape[0], 2, generator=random) / 4
                weights[f"{key}.lora_down.weight"] = self.torch.randn(2, weight.shape[1], generator=random) / 4
        return weights

    def with_lora(self, model, seed):
        patched, _ = self.load_lora(model, None, self.lora(model, seed), 1.0, 0.0)
        assert len(patched.patches) > 4
        return patched


def equalities(out):
    """Largest difference between what is drawn through the router and by stock nodes, by what was tried."""
    bench = Bench()
    teacher, student, draw = bench.teacher, bench.student, bench.draw
    both, half = [teacher, student], bench.route([teacher, student], 0.5)
    found = {}

    def same(name, routed, reference):
        found[name] = bench.distance(routed, reference)

    same("half", draw(half), bench.handed_over(both))
    same("half, the other way round", draw(bench.route([student, teacher], 0.5)), bench.handed_over([student, teacher]))
    same("none", draw(bench.route(both, 0.0)), draw(student))
    same("all", draw(bench.route(both, 1.0)), draw(teacher))
    for sampler in ("dpmpp_2m", "uni_pc", "ddim"):  # those that keep a history lose it between two nodes
        same(f"none, {sampler}", draw(bench.route(both, 0.0), sampler_name=sampler), draw(student, sampler_name=sampler))
    quarters = bench.route([teacher, student, teacher, student], 0.25, 0.5, 0.75)
    begun = draw(teacher, last_step=1)
    for step, model in ((1, student), (2, teacher)):
        begun = draw(model, latent=begun, start_step=step, last_step=step + 1, disable_noise=True)
    same("quarters", draw(quarters), draw(student, latent=begun, start_step=3, disable_noise=True, force_full_denoise=True))
    unit = {"sigma": float(teacher.get_model_object("model_sampling").percent_to_sigma(0.5)), "timestep": 499.5}
    for name, value in unit.items():
        same(f"boundary as {name}", draw(bench.bridge.route_models(both, [bench.Boundary(value, name)])), draw(half))

    same("image to image", draw(half, latent=bench.picture, denoise=0.9, steps=4),
         _handed_over_at(bench, both, latent=bench.picture, denoise=0.9))  # fmt: skip
    same("denoise below the boundary", draw(half, latent=bench.picture, denoise=0.4),
         draw(student, latent=bench.picture, denoise=0.4))  # fmt: skip
    mask = {
        **bench.picture,
        "noise_mask": bench.torch.tensor([[0.0, 1.0]]).repeat_interleave(4, 1)[None, None].expand(2, 1, 8, 8),
    }
    same("inpainting, one model", draw(bench.route([teacher, teacher], 0.5), latent=mask), draw(teacher, latent=mask))
    same("inpainting, none", draw(bench.route(both, 0.0), latent=mask), draw(student, latent=mask))
    assert bench.distance(draw(half, latent=mask), draw(half, latent=bench.picture)) > 1e-3

    import comfy_extras.nodes_model_advanced as advanced
    import comfy_extras.nodes_pag as pag

    for name, patched in {
        "PAG": lambda model: pag.PerturbedAttentionGuidance.execute(model, 2.0)[0],
        "RescaleCFG": lambda model: advanced.RescaleCFG().patch(model, 0.7)[0],
    }.items():
        reference = bench.handed_over([patched(model) for model in both])
        same(f"{name} behind the router", draw(patched(half)), reference)
        assert bench.distance(reference, bench.handed_over(both)) > 1e-3, name
    perturbed = pag.PerturbedAttentionGuidance.execute(half, 2.0)[0]
    assert bench.distance(draw(perturbed), draw(half)) > 1e-3

    loras = [bench.with_lora(model, seed) for seed, model in enumerate(both)]
    same("a LoRA on each", draw(bench.route(loras, 0.5)), bench.handed_over(loras))
    one = [student, bench.with_lora(student, 5)]
    for name, models in {"one network, LoRA on the second": one, "one network, LoRA on the first": one[::-1]}.items():
        same(name, draw(bench.route(models, 0.5)), bench.handed_over(models))
    other = bench.bridge.prune_model(bench.bridge.Model(teacher), bench.bridge.Model(student).plan)
    behind = bench.with_lora(bench.route([student, other], 0.5), 7)
    same("a LoRA behind the router", draw(behind), bench.handed_over([bench.with_lora(m, 7) for m in (student, other)]))
    same("a LoRA behind the router, again", draw(behind), bench.handed_over([bench.with_lora(m, 7) for m in (student, other)]))
    same("after all that, half", draw(half), bench.handed_over(both))

    same("a hook LoRA", *_hooked(bench))
    same("attention patches", draw(bench.route([_patched(m, i) for i, m in enumerate(both)], 0.5)),
         bench.handed_over([_patched(m, i) for i, m in enumerate(both)]))  # fmt: skip
    same("an attention patch behind the router", draw(_patched(half, 3)), bench.handed_over([_patched(m, 3) for m in both]))
    (v_student,) = advanced.ModelSamplingDiscrete().patch(student, "v_prediction", False)
    same("eps and v together", draw(bench.route([teacher, v_student], 0.5)), bench.handed_over([teacher, v_student]))
    controlled = [[bench.positive[0][0], {"control": _control(bench), "control_apply_to_uncond": False}]]
    same("ControlNet", draw(half, positive=controlled), bench.handed_over(both, positive=controlled))
    assert bench.distance(draw(half, positive=controlled), draw(half)) > 1e-3
    Path(out).write_text(json.dumps(found))


def experts(out):
    """The same for a high- and a low-noise expert of Wan's shape: flow models, of which the second is the wider."""
    import comfy.ops
    import comfy.sd
    import comfy_extras.nodes_model_advanced as advanced
    from comfy.ldm.wan.model import WanModel

    bench, models = Bench(), []
    torch = bench.torch
    for seed, dim in enumerate((128, 256)):
        torch.manual_seed(seed)
        network = WanModel(dim=dim, ffn_dim=64, num_heads=dim // 128, num_layers=1, device="cpu", dtype=torch.float32,
                           operations=comfy.ops.disable_weight_init)  # fmt: skip
        weights = {name: torch.randn_like(weight) / weight[0].numel() ** 0.5 for name, weight in network.state_dict().items()}
        models.append(comfy.sd.load_diffusion_model_state_dict(weights))
    bench.latent = {"samples": torch.zeros(1, 16, 1, 8, 8)}
    random = torch.Generator().manual_seed(0)
    bench.positive, bench.negative = ([[torch.randn(1, 6, 4096, generator=random), {}]] for _ in range(2))
    settings = {"scheduler": "simple"}
    sampler = models[0].get_model_object("model_sampling")
    routed = bench.bridge.route_models(models, [bench.Boundary(float(sampler.percent_to_sigma(0.5)), "sigma")])
    found = {
        "kinds": sorted({type(model.model).__name__ for model in models}),
        "half": bench.distance(bench.draw(routed, **settings), bench.handed_over(models, **settings)),
        "not one alone": min(bench.distance(bench.draw(routed, **settings), bench.draw(model, **settings)) for model in models),
    }
    (shifted,) = advanced.ModelSamplingSD3().patch(bench.route(models, 0.5), 8.0)
    reference = bench.handed_over([advanced.ModelSamplingSD3().patch(model, 8.0)[0] for model in models], **settings)
    found["shift behind the router"] = bench.distance(bench.draw(shifted, **settings), reference)
    found["ranges"] = bench.bridge.describe_route(shifted, ["high", "low"])
    Path(out).write_text(json.dumps(found))


def _handed_over_at(bench, models, latent, denoise):
    """By two samplings of one noise whose steps meet at the router's boundary, as KSampler Advanced makes them."""
    import comfy.sample
    import comfy.samplers

    model, settings = models[0], SETTINGS
    noise = comfy.sample.prepare_noise(latent["samples"], settings["seed"])
    sampler = comfy.samplers.KSampler(model, settings["steps"], model.load_device, settings["sampler_name"],
                                      settings["scheduler"], denoise, model.model_options)  # fmt: skip
    sigmas, boundary = sampler.sigmas, model.get_model_object("model_sampling").percent_to_sigma(0.5)
    first = int((sigmas[:-1] > boundary).sum())
    samples = latent["samples"]
    with bench.torch.inference_mode():
        for part, (m, span) in enumerate(zip(models, (sigmas[: first + 1], sigmas[first:]), strict=True)):
            noise = noise if part == 0 else noise * 0
            sampler = comfy.samplers.KSampler(m, settings["steps"], m.load_device, settings["sampler_name"],
                                              settings["scheduler"], denoise, m.model_options)  # fmt: skip
            samples = sampler.sample(noise, bench.positive, bench.negative, cfg=settings["cfg"], latent_image=samples,
                                     sigmas=span, disable_pbar=True, seed=settings["seed"])  # fmt: skip
    return {"samples": samples}


def _patched(model, number):
    """A MODEL whose cross-attention is scaled, by how much depends on the number."""
    patched = model.clone()
    patched.set_model_attn2_output_patch(lambda x, options: x * (1 + 0.1 * number))
    return patched


def _control(bench):
    import comfy.controlnet

    torch = bench.torch

    class Control(comfy.controlnet.ControlBase):
        """Stands where a ControlNet stands in the conditioning."""

        def get_control(self, x_noisy, *_):
            middle = torch.full((len(x_noisy), 1, 1, 1), 0.5)
            return {"output": [], "input": [], "middle": [middle]}

        def copy(self):
            return Control()

    return Control()


def _hooked(bench):
    """The conditioning carries a LoRA of its own."""
    import comfy.hooks

    models = [bench.student, bench.bridge.prune_model(bench.bridge.Model(bench.teacher), bench.bridge.Model(bench.student).plan)]
    hooks = comfy.hooks.create_hook_lora(lora=bench.lora(bench.student, 9), strength_model=1.0, strength_clip=0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(copy.copy(bench.positive), hooks)
    reference = bench.handed_over(models, positive=positive)
    assert bench.distance(reference, bench.handed_over(models)) > 1e-3
    return bench.draw(bench.route(models, 0.5), positive=positive), reference


def choices(out):
    """Which model was asked at which noise level, for samplers that evaluate twice a step: [sampler, evaluations, boundary]."""
    bench = Bench()
    found = []
    for sampler in ("euler", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "seeds_3"):
        routed = bench.route([bench.teacher, bench.student], 0.4)
        with bench.torch.inference_mode():
            _, evaluations = bench.bridge.sample_routed(
                routed, bench.latent, positive=bench.positive, negative=bench.negative, **SETTINGS | {"sampler_name": sampler}
            )
        found.append([sampler, evaluations, bench.bridge.boundary_sigmas(routed)])
    Path(out).write_text(json.dumps(found))


def every_sampler(out):
    """All pairs of sampler and scheduler, and those that fail with one model alone, and through the router.

    The networks answer at once, by a multiple of what they are given.
    """
    import comfy.samplers

    bench, models = Bench(), []
    for model, factor in ((bench.teacher, 0.2), (bench.student, 0.1)):
        models.append(model.clone())
        models[-1].add_wrapper("diffusion_model", lambda executor, x, *args, factor=factor, **kwargs: x * factor)
    routed, small = bench.route(models, 0.5), {"samples": bench.latent["samples"][:1]}
    names = [(s, k) for s in comfy.samplers.KSampler.SAMPLERS for k in comfy.samplers.KSampler.SCHEDULERS]
    failed = {"plain": {}, "routed": {}}
    for sampler, scheduler in names:
        for who, model in {"plain": models[0], "routed": routed}.items():
            try:
                drawn = bench.draw(model, latent=small, cfg=1.0, steps=3, sampler_name=sampler, scheduler=scheduler)
                if not bench.torch.isfinite(drawn["samples"]).all():
                    raise ValueError("not finite")
            except Exception as error:
                failed[who][f"{sampler}, {scheduler}"] = str(error)
    Path(out).write_text(json.dumps({"tried": len(names), **failed}))


def refusals(out):
    """What the router says of models that do not go together."""
    import comfy.model_sampling
    import comfy_extras.nodes_model_advanced as advanced

    bench = Bench()
    teacher, student = bench.teacher, bench.student

    def sampling(*bases, **options):
        kind = type("Sampling", bases, {})
        changed = student.clone()
        changed.add_object_patch("model_sampling", kind(student.model.model_config, **options))
        return changed

    wider = copy.copy(student)
    wider.model = copy.copy(student.model)
    wider.model.model_config = SimpleNamespace(unet_config={**student.model.model_config.unet_config, "context_dim": 1024})
    cached = student.clone()
    cached.add_wrapper("outer_sample", lambda executor, *args: executor(*args))
    discrete, flow = comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.ModelSamplingDiscreteFlow
    cases = {
        "routed": bench.route([teacher, student], 0.5),
        "flow": sampling(flow, comfy.model_sampling.CONST),
        "zsnr": sampling(discrete, comfy.model_sampling.V_PREDICTION, zsnr=True),
        "wider": wider,
        "guidance": advanced.RescaleCFG().patch(student, 0.7)[0],
        "whole sampling": cached,
    }
    found = {}

    def said(name, function):
        try:
            function()
            found[name] = None
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]

    for name, model in cases.items():
        said(name, lambda model=model: bench.route([teacher, model], 0.5))
    said("order", lambda: bench.route([teacher, student, teacher], 0.7, 0.3))
    said("count", lambda: bench.route([teacher, student], 0.3, 0.7))
    said("LoRA behind the router", lambda: bench.draw(bench.with_lora(bench.route([teacher, student], 0.5), 1)))
    said("prune", lambda: bench.bridge.Model(bench.route([teacher, student], 0.5)).architecture)
    Path(out).write_text(json.dumps(found))


def untouched(out):
    """Facts of two models before and after: sampling through the router, an error in the midst of it."""
    import comfy.model_management

    bench = Bench()
    models = [_patched(bench.with_lora(m, i), i) for i, m in enumerate((bench.teacher, bench.student))]

    def facts():
        comfy.model_management.load_models_gpu([])
        told = []
        for m in models:
            options = {k: sorted(map(str, v)) for k, v in m.model_options["transformer_options"].get("patches", {}).items()}
            told.append([len(m.patches), options, sorted(m.wrappers), sorted(m.additional_models), sorted(m.attachments),
                         str(m.patches_uuid), [round(float(w.double().sum()), 6) for w in bench.bridge.Model(m).state_dict().values()]])  # fmt: skip
        return told

    before, drawn = facts(), [bench.draw(m)["samples"] for m in models]
    routed = bench.route(models, 0.5)
    first = bench.draw(routed)["samples"]
    asked = []

    def stop(args):
        asked.append(args["sigma"])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return args["denoised"]

    stopping = routed.clone()
    stopping.set_model_sampler_post_cfg_function(stop)
    try:
        bench.draw(stopping)
        stopped = False
    except KeyboardInterrupt:
        stopped = True
    again = [bench.draw(m)["samples"] for m in models]
    Path(out).write_text(json.dumps({
        "before": before, "after": facts(), "stopped": stopped,
        "same": all(bool((a == b).all()) for a, b in zip([*drawn, first], [*again, bench.draw(routed)["samples"]], strict=True)),
        "finite": math.isfinite(float(first.sum())),
    }))  # fmt: skip
