"""One routed MODEL of several models, each in charge of a range of noise levels, for any sampler.

The sampler guides and steps with the routed MODEL. For each evaluation of the network, the model in charge of that noise level
predicts. So put patches of guidance on the routed MODEL, and patches of a network (LoRA, attention) on each model, or on the
routed MODEL to patch all of them.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import comfy.hooks
import comfy.model_management
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP, merge_nested_dicts
from torch import Tensor

from ...distill_core.base.settings import SEEDS, check_range
from ...distill_core.diffusion.ranges import Boundary, in_charge
from ...distill_core.evaluation.plots import Evaluation
from .weights import shapes_of

ROUTE = "distill_route"  # attachment of a routed MODEL: its Route; also the key of everything a router adds
CONTROL = "distill_control"  # key of a student's check of its ControlNets; the first model's check holds for all
TRACE = "distill_trace"  # attachment of a MODEL that records its evaluations: a list
EVALUATION_OPTIONS = ("transformer_options", "model_function_wrapper")
EVALUATION_WRAPPERS = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
SHAPE_SETTINGS = ("in_channels", "in_dim", "out_channels", "out_dim", "context_dim", "context_in_dim", "text_dim",
                  "adm_in_channels", "vec_in_dim")  # fmt: skip
SIGMA_TOLERANCE = 1e-6  # a step that begins at a boundary may miss it by a rounding error


@dataclass(frozen=True)
class Route:
    """The first model and the boundaries of a routed MODEL; it carries the other models itself."""

    first: ModelPatcher
    """The first model as it was given; the routed MODEL shares its weights."""
    boundaries: tuple[Boundary, ...]
    """Descending in noise; one fewer than there are models."""


def route_models(models: Sequence[ModelPatcher], boundaries: Sequence[Boundary]) -> ModelPatcher:
    """One MODEL of several: the first samples from pure noise to the first boundary, the second to the next, and so on.

    A boundary belongs to the model on its less noisy side. The given models do not change. ``ValueError`` for models that
    cannot share one sampling, or boundaries that do not descend.
    """
    if len(models) != len(boundaries) + 1:
        raise ValueError(f"boundaries: {len(models)} models need one fewer boundary ({len(models) - 1}), got {len(boundaries)}")
    for number, model in enumerate(models[1:], 2):
        _check_together(model, models[0], number)
    _check_not_routed(models[0], 1)
    sigmas = _sigmas(boundaries, models[0].get_model_object("model_sampling"))
    if sigmas != sorted(sigmas, reverse=True):
        raise ValueError(f"boundaries must go from noisy to clean, got noise levels {', '.join(f'{s:.4g}' for s in sigmas)}")
    routed = models[0].clone()
    # Options of the first model's evaluations apply only to it: the other models have their own.
    routed.model_options = {name: value for name, value in routed.model_options.items() if name not in EVALUATION_OPTIONS}
    routed.model_options["transformer_options"] = {}
    for kind in EVALUATION_WRAPPERS:
        routed.wrappers.pop(kind, None)
    routed.set_attachments(ROUTE, Route(models[0].clone(), tuple(boundaries)))
    routed.set_additional_models(ROUTE, [model.clone() for model in models[1:]])
    routed.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, ROUTE, _prepare)
    routed.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, ROUTE, _sample)
    routed.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, ROUTE, _evaluate)
    return routed


def share_boundaries(num_models: int, first_share: float) -> list[Boundary]:
    """Boundaries that give ``first_share`` (0 to 1) of the sampling to the first model and divide the rest evenly."""
    check_range("share", first_share, (0, 1))
    rest = (1 - first_share) / (num_models - 1)
    return [Boundary(100 * (first_share + rest * i), "percent") for i in range(num_models - 1)]


def sorted_boundaries(model: ModelPatcher, boundaries: Sequence[Boundary]) -> list[Boundary]:
    """Boundaries from noisy to clean, in any units."""
    sampling = model.get_model_object("model_sampling")
    return sorted(boundaries, key=lambda boundary: _sigma(boundary, sampling), reverse=True)


def boundary_sigmas(model: ModelPatcher) -> list[float]:
    """Noise levels at which a routed MODEL changes from one model to the next while it samples."""
    sampling = model.get_model_object("model_sampling")
    sigmas = _sigmas(model.get_attachment(ROUTE).boundaries, sampling)
    return [sigma for sigma in sigmas if float(sampling.sigma_min) <= sigma < float(sampling.sigma_max)]


def describe_route(model: ModelPatcher, names: Sequence[str]) -> str:
    """One line per model, the noisiest first: its share of the sampling, noise levels, timesteps."""
    sampling = model.get_model_object("model_sampling")
    highest, lowest = float(sampling.sigma_max), float(sampling.sigma_min)
    inner = [min(max(sigma, 0.0), highest) for sigma in _sigmas(model.get_attachment(ROUTE).boundaries, sampling)]
    ends = [highest, *inner, min([lowest, *inner])]
    lines = []
    for name, first, last in zip(names, ends[:-1], ends[1:], strict=True):
        if first == last:
            lines.append(f"{name}: never")
            continue
        percents = f"{_percent(first, sampling):.0%} to {_percent(last, sampling):.0%} of the sampling"
        timesteps = (sampling.timestep(torch.tensor(max(sigma, lowest))).item() for sigma in (first, last))
        lines.append(
            f"{name}: {percents}, sigma {first:.4g} to {last:.4g}, timesteps {' to '.join(f'{t:.4g}' for t in timesteps)}"
        )
    return "\n".join(lines)


def sample_routed(model: ModelPatcher, latent: Mapping[str, Any], **settings) -> tuple[Mapping[str, Any], list[Evaluation]]:
    """Sample as KSampler does; returns the latent, and which model ran at which noise level. settings: those of KSampler."""
    import nodes

    bounds = {"steps": (1, 10_000), "cfg": (0, 100), "denoise": (0, 1), "seed": (0, SEEDS[1])}
    for name in bounds.keys() & settings.keys():
        check_range(name, settings[name], bounds[name])
    evaluations: list[Evaluation] = []
    traced = model.clone()
    traced.set_attachments(TRACE, evaluations)
    (drawn,) = nodes.common_ksampler(traced, latent=latent, **settings)
    return drawn, evaluations


# --- which models go together ---------------------------------------------------------------------------------------


def _check_together(model: ModelPatcher, first: ModelPatcher, number: int) -> None:
    """``ValueError`` with the reason if one sampling cannot pass from the first model to this one."""
    _check_not_routed(model, number)
    theirs, others = _facts(model), _facts(first)
    differing = [name for name in {**theirs, **others} if theirs.get(name) != others.get(name)]
    if differing:
        words = (", ".join(f"{name} {facts.get(name)}" for name in differing) for facts in (theirs, others))
        raise ValueError(f"model_{number} does not go with model_1: {' versus '.join(words)}")
    sampling, others = (m.get_model_object("model_sampling") for m in (model, first))
    is_flow, others_is_flow = (isinstance(s, comfy.model_sampling.CONST) for s in (sampling, others))
    if is_flow != others_is_flow:
        names = ("a flow model" if flow else "a diffusion model" for flow in (is_flow, others_is_flow))
        raise ValueError(f"model_{number} does not go with model_1: {' and '.join(names)} use incompatible noise schedules")
    spans = [(float(s.sigma_min), float(s.sigma_max)) for s in (sampling, others)]
    if not is_flow and not torch.allclose(torch.tensor(spans[0]), torch.tensor(spans[1]), rtol=1e-3):
        words = (f"{low:.4g} to {high:.4g}" for low, high in spans)
        raise ValueError(f"model_{number} does not go with model_1: noise levels differ, {' and '.join(words)}")
    own = {name: value for name, value in model.model_options.items() if name not in EVALUATION_OPTIONS}
    patched = [name for name, value in own.items() if value != first.model_options.get(name)]
    for kind, keyed in model.wrappers.items():
        if kind not in EVALUATION_WRAPPERS and any(found for key, found in keyed.items() if key != CONTROL):
            patched.append(kind)
    if patched:
        raise ValueError(
            f"model_{number} carries a patch that acts on the whole sampling ({', '.join(patched)}), which the router would "
            "skip; put it after the router"
        )


def _check_not_routed(model: ModelPatcher, number: int) -> None:
    if model.get_attachment(ROUTE) is not None:
        raise ValueError(f"model_{number} is routed itself; connect the models it holds")


def _facts(model: ModelPatcher) -> dict[str, Any]:
    """The properties two models must share to run on the same inputs."""
    settings = model.model.model_config.unet_config
    shape = {name: settings[name] for name in SHAPE_SETTINGS if settings.get(name) is not None}
    return {"kind of model": type(model.model).__name__, "latents": type(model.model.latent_format).__name__, **shape}


# --- noise levels ---------------------------------------------------------------------------------------------------


class _Sampling(Protocol):
    """What is read of a model_sampling of ComfyUI."""

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise level of a timestep."""
        ...

    def percent_to_sigma(self, percent: float) -> float:
        """Noise level after a share of the sampling."""
        ...


def _sigmas(boundaries: Sequence[Boundary], sampling: _Sampling) -> list[float]:
    return [_sigma(boundary, sampling) for boundary in boundaries]


def _sigma(boundary: Boundary, sampling: _Sampling) -> float:
    """Noise level of a boundary in ComfyUI's terms; -1, below all levels, if the whole sampling lies before it."""
    if boundary.unit == "sigma":
        return boundary.value
    if boundary.unit == "timestep":
        return float(sampling.sigma(torch.tensor(boundary.value)))
    return float(sampling.percent_to_sigma(boundary.value / 100)) if boundary.value < 100 else -1.0


def _percent(sigma: float, sampling: _Sampling) -> float:
    """Share of the sampling above a noise level: the inverse of ``percent_to_sigma``, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float(sampling.percent_to_sigma(middle)) > sigma else (low, middle)
    return high


# --- while it samples -----------------------------------------------------------------------------------------------


@dataclass
class Routing:
    """One sampling with a routed MODEL."""

    models: list[ModelPatcher]
    """The model the sampler holds, then the others, with the patches put on the routed MODEL after the router."""
    options: list[dict[str, Any]]
    """Options of each model for evaluations of its own network."""
    sigmas: list[float]
    """Boundaries."""
    beside: list[ModelPatcher]
    """Models that every evaluation needs, such as ControlNets."""
    memory_bytes: Sequence[float]
    """Preferred and minimum free memory for one evaluation."""
    trace: list[Evaluation] | None
    current: int | None = field(default=None, init=False)

    @classmethod
    def open(cls, guider, noise: Tensor) -> Routing:
        routed, conds = guider.model_patcher, guider.conds
        route = routed.get_attachment(ROUTE)
        others = [_with_late_patches(model, routed, route.first) for model in routed.get_additional_models_with_key(ROUTE)]
        hooks = comfy.hooks.HookGroup()
        for conditioning in conds.values():
            comfy.sampler_helpers.get_hooks_from_cond(conditioning, hooks)
        options = [_own_options(model) for model in (route.first.clone(), *others)]
        for model, own in zip(others, options[1:], strict=True):
            target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
            model.register_all_hook_patches(hooks, target, own)
            model.model.latent_shapes = getattr(guider.inner_model, "latent_shapes", None)
            model.pre_run()
        return cls(
            models=[routed, *others],
            options=options,
            sigmas=[sigma * (1 + SIGMA_TOLERANCE) for sigma in _sigmas(route.boundaries, guider.inner_model.model_sampling)],
            beside=[model for model in guider.loaded_models if isinstance(model, ModelPatcher)],
            memory_bytes=comfy.sampler_helpers.estimate_memory(routed, noise.shape, conds),
            trace=routed.get_attachment(TRACE),
        )

    def evaluate(self, executor, conds, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]):
        sigma = float(timestep.max())
        number = int(in_charge(timestep.max(), self.sigmas))
        if number != self.current:
            self._hand_over(number)
        if self.trace is not None:
            self.trace.append(Evaluation(sigma, number))
        own = self.options[number]
        options = {**own, **model_options}
        options.pop("multigpu_clones", None)  # of the first model only
        options["transformer_options"] = merge_nested_dicts(own["transformer_options"], model_options["transformer_options"])
        return executor(self.models[number].model, conds, x_in, timestep, options)

    def _hand_over(self, number: int) -> None:
        model, (room, least) = self.models[number], self.memory_bytes
        # Two models may share one network: loading applies the patches of this one.
        comfy.model_management.load_models_gpu([model, *self.beside], memory_required=room, minimum_memory_required=least)
        model.model.current_patcher = model
        self.current = number

    def cast(self, to: torch.device | str) -> None:
        """Move the tensors in the models' patches to their devices, or back."""
        for model, own in zip(self.models, self.options, strict=True):
            device, dtype = (model.load_device, model.model_dtype()) if to == "load" else (model.offload_device, None)
            comfy.samplers.cast_to_load_options(own, device=device, dtype=dtype)

    def close(self) -> None:
        first, *others = self.models
        for model in others:
            model.cleanup()
        first.model.current_patcher = first


def _own_options(model: ModelPatcher) -> dict[str, Any]:
    """A model's patches of its evaluations, as the options ``calc_cond_batch`` takes."""
    options = create_model_options_clone(model.model_options)
    options = {name: value for name, value in options.items() if name in EVALUATION_OPTIONS}
    comfy.sampler_helpers.prepare_model_patcher(model, {}, options)
    return options


def _with_late_patches(model: ModelPatcher, routed: ModelPatcher, first: ModelPatcher) -> ModelPatcher:
    """A copy of a model with the patches put on the routed MODEL after the router; ``ValueError`` if they do not fit it."""
    model = model.clone()
    weights = {name: late for name, all_ in routed.patches.items() if (late := all_[len(first.patches.get(name, ())) :])}
    objects = {name: value for name, value in routed.object_patches.items() if first.object_patches.get(name) is not value}
    parts = weights or routed.injections.keys() - first.injections.keys() or any("diffusion_model" in name for name in objects)
    if parts and shapes_of(model.model.diffusion_model) != shapes_of(first.model.diffusion_model):
        raise ValueError(
            "a patch of the network (such as a LoRA) was put on the routed MODEL, but its models have different shapes; put one "
            "on each model before the router, and for a student use Remap LoRA to Student"
        )
    for name, late in weights.items():
        model.patches[name] = [*model.patches.get(name, ()), *late]
    if weights:
        model.patches_uuid = uuid.uuid5(model.patches_uuid, str(routed.patches_uuid))
    for name, value in objects.items():
        model.add_object_patch(name, value)
    model.injections |= {name: value for name, value in routed.injections.items() if name not in first.injections}
    return model


def _prepare(executor, model: ModelPatcher, *args, **kwargs):
    """A wrapper around ``prepare_sampling``: each other model loads when its turn comes, not all at once."""
    others = model.additional_models.pop(ROUTE)
    try:
        return executor(model, *args, **kwargs)
    finally:
        model.additional_models[ROUTE] = others


def _sample(executor, guider, sigmas: Tensor, extra_args: dict[str, Any], callback, noise: Tensor, *args, **kwargs):
    """A wrapper around a sampler that opens and closes the routing."""
    routing = Routing.open(guider, noise)
    extra_args["model_options"]["transformer_options"][ROUTE] = routing
    routing.cast("load")
    try:
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
    finally:
        routing.cast("offload")
        routing.close()


def _evaluate(executor, model, conds, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]):
    """A wrapper around ``calc_cond_batch``, below all guidance."""
    routing = model_options["transformer_options"].get(ROUTE)
    if routing is None:
        raise RuntimeError("a routed MODEL was evaluated outside a sampler; connect one of its models instead")
    return routing.evaluate(executor, conds, x_in, timestep, model_options)
