"""What the student is trained on: a weighted sum of small losses, each a per-sample vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .architecture import Architecture
from .layouts import kind
from .plan import NameMap
from .schedule import NoiseSchedule, x0_gain


class Outputs(NamedTuple):
    """What one network gave for a batch."""

    prediction: Tensor
    """(B, C, H, W)."""
    features: dict[str, Tensor]
    """Tapped outputs (B, ...) by the canonical name of the *student's* module, for both networks. A feature loss uses them up."""


class _MeanSquare(torch.autograd.Function):
    """Mean square of each row, (B, N) -> (B,), without a tensor of squares beside its argument."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return torch.linalg.vector_norm(a, dim=1).square() / a.shape[1]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return a * (2 * gradient / a.shape[1])[:, None]


def mean_square(a: Tensor) -> Tensor:
    """Mean square of each sample, in float32: (B, ...) -> (B,)."""
    return _MeanSquare.apply(a.float().flatten(1))


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32: (B, ...), (B, ...) -> (B,)."""
    return mean_square(a.float() - b.float())


def task_loss(target: Tensor, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """Denoising loss against the true target (Kim et al. 2023, arXiv 2305.15798, Eq. 1)."""
    return {"task": squared_error(student.prediction, target)}


def output_loss(target: Tensor, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """Distance to the teacher's output (Kim et al. 2023, Eq. 2)."""
    return {"output": squared_error(student.prediction, teacher.prediction)}


def feature_loss(target: Tensor, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """Distance to the teacher's feature at every tapped point; the points are summed (Kim et al. 2023, Eq. 3).

    Both features are taken out as they are compared, so that no more than their difference stays for the backward pass.
    """
    names = list(student.features)
    return {f"feature/{name}": squared_error(student.features.pop(name), teacher.features.pop(name)) for name in names}


def normalised_feature_loss(target: Tensor, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """The same with both features divided by the norm of the teacher's, so that no point drowns the others.

    ``|f_S - f_T|^2 / |f_T|^2`` (Zhang et al. 2024, arXiv 2404.11098, normalised feature distillation).
    """
    scale = {f"feature/{name}": mean_square(feature).clamp(min=1e-12) for name, feature in teacher.features.items()}
    return {name: error / scale[name] for name, error in feature_loss(target, student, teacher).items()}


Loss = Callable[[Tensor, Outputs, Outputs], dict[str, Tensor]]
LOSSES: dict[str, Loss] = {
    "task": task_loss,
    "output": output_loss,
    "feature": feature_loss,
    "normalised_feature": normalised_feature_loss,
}


# --- where features are compared ------------------------------------------------------------------------------------


def stage_points(teacher: Architecture, student: Architecture, mapping: NameMap) -> dict[str, str]:
    """BK-SDM's points: the output of every down and up stage the student has; the mid block is not one.

    A stage that lost its downsampling puts out features of another size, so there the last attention's ``proj_out``
    stands in (BK-SDM-Tiny).
    """
    points = {}
    for teacher_stage, student_stage in mapping.stages.items():
        theirs, ours = _last_module(teacher, teacher_stage), _last_module(student, student_stage)
        if theirs.endswith("sample") != ours.endswith("sample"):
            theirs = _last_module(teacher, teacher_stage, resampling=False)
            ours = _last_module(student, student_stage, resampling=False)
            suffix = ".proj_out" if ".attn." in theirs and ".attn." in ours else ""
            theirs, ours = theirs + suffix, ours + suffix
        points[theirs] = ours
    return points


def stage_and_mid_points(teacher: Architecture, student: Architecture, mapping: NameMap) -> dict[str, str]:
    """Segmind's points: the output of every stage, the mid block's too.

    Where the innermost stages went, what is now the bottom learns what came out of them: the output of the last up stage
    that was removed (SD-Tiny: the student's ``down.2`` learns the teacher's ``up.0``).
    """
    points = {}
    for theirs, ours in stage_points(teacher, student, mapping).items():
        if theirs.startswith("down.") and theirs.endswith(".proj_out"):
            first_kept = next(stage for stage in mapping.stages if stage.startswith("up."))
            removed = teacher.stages("up")[teacher.stages("up").index(first_kept) - 1]
            theirs, ours = _last_module(teacher, removed), ours.removesuffix(".proj_out")
        points[theirs] = ours
    return points | _mid_point(teacher, student)


def layer_points(teacher: Architecture, student: Architecture, mapping: NameMap) -> dict[str, str]:
    """SSD-1B's points: every resnet and every attention of the down and up stages, and the output of the mid block."""
    layers = sorted(m for m in teacher.modules if m.split(".")[0] in ("down", "up") and kind(m) in ("resnet", "attn"))
    pairs = {theirs: mapping.rename(theirs) for theirs in layers}
    return {theirs: ours for theirs, ours in pairs.items() if ours is not None} | _mid_point(teacher, student)


def self_attention_points(teacher: Architecture, student: Architecture, mapping: NameMap) -> dict[str, str]:
    """KOALA's points: the output of the self-attention of every transformer block."""
    pairs = {block: mapping.rename(block) for block in sorted(teacher.blocks) if ".block." in block}
    return {f"{theirs}.attn1": f"{ours}.attn1" for theirs, ours in pairs.items() if ours is not None}


def _mid_point(teacher: Architecture, student: Architecture) -> dict[str, str]:
    """Output of the mid block, where both have one."""
    last = [[m for m in ("mid.resnet.1", "mid.resnet.0") if m in architecture.modules][:1] for architecture in (teacher, student)]
    return dict(zip(*last, strict=False))


def _last_module(architecture: Architecture, stage: str, resampling: bool = True) -> str:
    """The module whose output is the output of a stage."""
    resample = f"{stage}.{stage.split('.')[0]}sample"
    last = architecture.numbers(f"{stage}.resnet")[-1]
    candidates = [resample] * resampling + [f"{stage}.attn.{last}", f"{stage}.resnet.{last}"]
    return next(module for module in candidates if module in architecture.modules)


POINTS = {
    "stages": stage_points,
    "stages and mid": stage_and_mid_points,
    "layers": layer_points,
    "self-attention": self_attention_points,
}
"""Ways to pair teacher's modules with the student's whose outputs a feature loss compares, by canonical names."""


# --- how much each example counts -----------------------------------------------------------------------------------


WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    # Hang et al. 2023, arXiv 2303.09556, Sec. 3.4
    "min-snr": lambda snr, gamma: snr.clamp(max=gamma),
    # Yu et al. 2023, arXiv 2310.08442, Sec. 3.2: 1 / sqrt(SNR) on the error of eps
    "debiased": lambda snr, gamma: snr.sqrt(),
}
"""Weight of the error of x0 by the signal-to-noise ratio (B,) and gamma."""
UNWEIGHTED = "none"


def example_weights(weighting: str, prediction: str, schedule: NoiseSchedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """What each example's loss is multiplied with at timesteps (B,), (B,) float32, whatever the network predicts.

    weighting: a key of `WEIGHTINGS`, or ``none`` for 1 everywhere. An error of the prediction is an error of x0, times
    a factor that the schedule tells; so one weight by x0 gives each published form: for eps ``min(SNR, gamma) / SNR``,
    for v ``min(SNR, gamma) / (SNR + 1)``.
    """
    if weighting == UNWEIGHTED:
        return torch.ones(len(t), device=t.device)
    return WEIGHTINGS[weighting](schedule.snr(t), gamma) * x0_gain(prediction, schedule, t).square()


# --- objectives -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weighted sum of losses."""

    weights: Mapping[str, float]
    """Loss name -> weight; a loss that is not named is not computed."""
    points: str = "stages"
    """Where features are compared: a key of `POINTS`."""

    def __post_init__(self):
        for name, weight in self.weights.items():
            if name not in LOSSES:
                raise ValueError(f"unknown loss {name!r}; choose from {sorted(LOSSES)}")
            if not 0 <= weight < math.inf:
                raise ValueError(f"the weight of the {name} loss must be a number that is not negative, got {weight}")
        if not any(self.weights.values()):
            raise ValueError("an objective needs at least one loss with a weight above 0")

    @property
    def uses_teacher(self) -> bool:
        return any(weight for name, weight in self.weights.items() if name != "task")

    @property
    def feature_loss(self) -> str | None:
        """Which of the feature losses is in it; None for none."""
        return next((name for name, weight in self.weights.items() if name.endswith("feature") and weight), None)

    def with_weights(self, task: float | None = None, output: float | None = None, feature: float | None = None) -> Objective:
        """The same with other weights where they are given."""
        named = {"task": task, "output": output, next((n for n in self.weights if n.endswith("feature")), "feature"): feature}
        return replace(self, weights={**self.weights, **{name: weight for name, weight in named.items() if weight is not None}})

    def feature_points(self, teacher: Architecture, student: Architecture, mapping: NameMap) -> dict[str, str]:
        """Pairs teacher's module -> student's module, none if features are not compared."""
        return POINTS[self.points](teacher, student, mapping) if self.feature_loss else {}

    def terms(self, target: Tensor, student: Outputs, teacher: Outputs | None) -> dict[str, Tensor]:
        """Every term on its own, (B,) each: ``task``, ``output``, ``feature/down.0.downsample``, ..."""
        return {
            name: values
            for loss, weight in self.weights.items()
            if weight > 0
            for name, values in LOSSES[loss](target, student, teacher).items()
        }

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """What each example adds to the loss, (B,): its terms times their weights."""
        weights = {**self.weights, "feature": self.weights.get(self.feature_loss, 0)}
        return sum(weights[name.split("/")[0]] * values for name, values in terms.items())


OBJECTIVES = {
    # Kim et al. 2023, arXiv 2305.15798, Eq. 4, all weights 1
    "bk-sdm": Objective(weights={"task": 1.0, "output": 1.0, "feature": 1.0}),
    # Segmind's SD-Small and SD-Tiny, weights as their page recommends
    "segmind": Objective(weights={"task": 1.0, "output": 0.5, "feature": 0.5}, points="stages and mid"),
    # Gupta et al. 2024, arXiv 2401.02677: layer-level losses
    "ssd-1b": Objective(weights={"task": 1.0, "output": 0.5, "feature": 0.5}, points="layers"),
    # Lee et al. 2023, arXiv 2312.04005, Sec. 3.2: self-attention based
    "koala": Objective(weights={"task": 1.0, "output": 1.0, "feature": 1.0}, points="self-attention"),
    # Zhang et al. 2024, arXiv 2404.11098
    "laptop-diff": Objective(weights={"task": 1.0, "output": 1.0, "normalised_feature": 1.0}),
    # the teacher's output alone, guided or not (Golnari 2023, arXiv 2312.06899)
    "guidance": Objective(weights={"output": 1.0}),
    # plain fine-tuning, no teacher
    "task": Objective(weights={"task": 1.0}),
}
"""Published objectives by name."""


def objective(name: str) -> Objective:
    """Look an objective up by name; ``ValueError`` lists the choices."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose from {sorted(OBJECTIVES)}")
    return OBJECTIVES[name]
