"""What the student is trained on: a weighted sum of small losses, each a per-sample vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .architecture import Architecture
from .plan import NameMap


class Outputs(NamedTuple):
    """What one network gave for a batch."""

    prediction: Tensor
    """(B, C, H, W)."""
    features: Mapping[str, Tensor]
    """Tapped outputs (B, ...) by the canonical name of the *student's* module, for both networks."""


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32: (B, ...), (B, ...) -> (B,)."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def task_loss(target: Tensor, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """Denoising loss against the true target (Kim et al. 2023, arXiv 2305.15798, Eq. 1)."""
    return {"task": squared_error(student.prediction, target)}


def output_loss(target: Tensor, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """Distance to the teacher's output (Kim et al. 2023, Eq. 2)."""
    return {"output": squared_error(student.prediction, teacher.prediction)}


def feature_loss(target: Tensor, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """Distance to the teacher's feature at every tapped point; the points are summed (Kim et al. 2023, Eq. 3)."""
    return {f"feature/{name}": squared_error(feature, teacher.features[name]) for name, feature in student.features.items()}


Loss = Callable[[Tensor, Outputs, Outputs], dict[str, Tensor]]
LOSSES: dict[str, Loss] = {"task": task_loss, "output": output_loss, "feature": feature_loss}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weighted sum of losses."""

    weights: Mapping[str, float]
    """Loss name -> weight; a loss that is not named is not computed."""

    def __post_init__(self):
        for name, weight in self.weights.items():
            if name not in LOSSES:
                raise ValueError(f"unknown loss {name!r}; choose from {sorted(LOSSES)}")
            if weight < 0:
                raise ValueError(f"the weight of the {name} loss must not be negative, got {weight}")
        if not any(self.weights.values()):
            raise ValueError("an objective needs at least one loss with a weight above 0")

    @property
    def uses_features(self) -> bool:
        return self.weights.get("feature", 0) > 0

    @property
    def uses_teacher(self) -> bool:
        return self.uses_features or self.weights.get("output", 0) > 0

    def terms(self, target: Tensor, student: Outputs, teacher: Outputs | None) -> dict[str, Tensor]:
        """Every term unweighted, (B,) each: ``task``, ``output``, ``feature/down.0.downsample``, ..."""
        return {
            name: values
            for loss, weight in self.weights.items()
            if weight > 0
            for name, values in LOSSES[loss](target, student, teacher).items()
        }

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The scalar to minimise: each term's mean over the batch times the weight of its loss, summed."""
        return sum(self.weights[name.split("/")[0]] * values.mean() for name, values in terms.items())


OBJECTIVES = {
    "bk-sdm": Objective(weights={"task": 1.0, "output": 1.0, "feature": 1.0}),
    "task": Objective(weights={"task": 1.0}),
}
"""Published objectives. ``bk-sdm``: arXiv 2305.15798, Eq. 4, all weights 1. ``task``: plain fine-tuning, no teacher."""


def objective(name: str) -> Objective:
    """Look an objective up by name; ``ValueError`` lists the choices."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose from {sorted(OBJECTIVES)}")
    return OBJECTIVES[name]


def feature_points(teacher: Architecture, student: Architecture, mapping: NameMap) -> dict[str, str]:
    """Pairs teacher's module -> student's module whose outputs the feature loss compares, as BK-SDM chose them.

    The output of every down and up stage the student has; the mid block is not a point. A stage that lost its
    downsampling puts out features of another size, so there the last attention's ``proj_out`` stands in (BK-SDM-Tiny).
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


def _last_module(architecture: Architecture, stage: str, resampling: bool = True) -> str:
    """The module whose output is the output of a stage."""
    resample = f"{stage}.{stage.split('.')[0]}sample"
    last = architecture.numbers(f"{stage}.resnet")[-1]
    candidates = [resample] * resampling + [f"{stage}.attn.{last}", f"{stage}.resnet.{last}"]
    return next(module for module in candidates if module in architecture.modules)
