"""Training objectives: weighted sums of losses, with the published ones by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from ..networks.architecture import Architecture
from ..networks.name_map import NameMap
from .feature_layers import FEATURE_LAYERS
from .losses import FEATURE_LOSSES, output_loss, task_loss

LOSSES = ("task", "output", "feature", "local", "consistency", "dmd", "diversity")
"""Names of the losses: fields of `Objective`, which are their weights, and names in the metrics of a run."""
MEASURED_WITH_DMD = ("fake", "cosine_distance")
"""What a run by dmd measures beside its losses: the fake score's own loss, and its distance to the real score in direction."""


class Outputs(NamedTuple):
    """Outputs of one network for a batch."""

    prediction: Tensor
    """(B, C, H, W)."""
    features: dict[str, Tensor]
    """Outputs of its layers (B, ...); both networks use the canonical name of the *student's* layer."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the losses; a loss of weight 0 is not computed. ``ValueError`` for an invalid weight, or if all are 0."""

    task: float = 0.0
    """Weight of the loss against the data."""
    output: float = 0.0
    """Weight of the distance to the teacher's prediction."""
    feature: float = 0.0
    """Weight of the distance to the teacher's features, summed over layers."""
    local: float = 0.0
    """Weight of the distance of blocks to what the teacher makes, in the run of blocks they stand for, of the same hidden states; see
    `local`."""
    consistency: float = 0.0
    """Weight of the distance of the student's jumps to those of its lagged copy one step further along the teacher's path; see
    `consistency`."""
    dmd: float = 0.0
    """Weight of the distance of the student's samples to where the real score would move them; see `dmd`."""
    diversity: float = 0.0
    """Weight of the distance of the student's first sampling step to the teacher's path, beside ``dmd``; 0 trains it by ``dmd``."""
    feature_loss: str = "squared"
    """How features and hidden states are compared: a key of `losses.FEATURE_LOSSES`."""
    layers: str = "stages"
    """Where features are compared: a key of `feature_layers.FEATURE_LAYERS`, or ``blocks`` for those of a transformer that stay."""

    def __post_init__(self):
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"the weight of the {name} loss must be a finite number of at least 0, got {weight}")
        if not any(self.weights.values()):
            raise ValueError("an objective needs at least one loss with a weight above 0")
        if self.diversity and not self.dmd:
            raise ValueError("diversity_weight is for the objective dmd; remove it, or choose that objective")
        if self.dmd and self.compares:
            raise ValueError(
                "the objective dmd learns from samples alone; set task_weight, output_weight and feature_weight to 0, or remove them"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss by its name."""
        return {name: getattr(self, name) for name in LOSSES}

    @property
    def uses_teacher(self) -> bool:
        return bool(self.output or self.feature or self.local or self.few_steps)

    @property
    def compares(self) -> bool:
        """Whether the student predicts for noised examples, so that its outputs are compared."""
        return bool(self.task or self.output or self.feature or self.consistency)

    @property
    def only_local(self) -> bool:
        """Whether nothing is compared but single blocks, so that a student as a whole does not run."""
        return not (self.compares or self.dmd)

    @property
    def few_steps(self) -> bool:
        """Whether the student learns to sample in a few steps."""
        return bool(self.consistency or self.dmd)

    def with_weights(self, **weights: float | None) -> Objective:
        """A copy with other weights, by the names of the losses, where they are not None."""
        given: dict[str, Any] = {name: weight for name, weight in weights.items() if weight is not None}
        return replace(self, **given)

    def feature_layers(self, teacher: Architecture, student: Architecture, mapping: NameMap) -> dict[str, str]:
        """Teacher layer -> student layer whose outputs are compared; empty if features are not compared."""
        return FEATURE_LAYERS[self.layers](teacher, student, mapping) if self.feature else {}

    def terms(self, target: Tensor, student: Outputs, teacher: Outputs | None) -> dict[str, Tensor]:
        """Terms of the loss that compare outputs, (B,) each: ``task``, ``output``, ``feature/down.0.downsample``, ...

        Removes features from both outputs once they are compared, so that only their difference stays in memory for the
        backward pass.
        """
        terms: dict[str, Tensor] = {}
        if self.task:
            terms["task"] = task_loss(student.prediction, target)
        if teacher is None:
            return terms
        if self.output:
            terms["output"] = output_loss(student.prediction, teacher.prediction)
        if self.feature:
            compare = FEATURE_LOSSES[self.feature_loss]
            for name in list(student.features):
                terms[f"feature/{name}"] = compare(student.features.pop(name), teacher.features.pop(name))
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Loss of each example, (B,): the weighted sum of its terms."""
        total = sum(self.weights[name.split("/")[0]] * values for name, values in terms.items())
        assert isinstance(total, Tensor)  # an objective has at least one loss
        return total


OBJECTIVES = {
    # Kim et al. 2023, arXiv 2305.15798, Eq. 4, all weights 1
    "bk-sdm": Objective(task=1.0, output=1.0, feature=1.0),
    # Segmind's SD-Small and SD-Tiny, weights as their page recommends
    "segmind": Objective(task=1.0, output=0.5, feature=0.5, layers="stages and mid"),
    # Gupta et al. 2024, arXiv 2401.02677: layer-level losses
    "ssd-1b": Objective(task=1.0, output=0.5, feature=0.5, layers="layers"),
    # Lee et al. 2023, arXiv 2312.04005, Sec. 3.2: self-attention based
    "koala": Objective(task=1.0, output=1.0, feature=1.0, layers="self-attention"),
    # Zhang et al. 2024, arXiv 2404.11098
    "laptop-diff": Objective(task=1.0, output=1.0, feature=1.0, feature_loss="normalised"),
    # blocks that stand for runs of blocks, each by itself (PPCL, arXiv 2511.16156)
    "local": Objective(local=1.0, feature_loss="directions"),
    # the teacher's output, and the hidden states after every block of a transformer that stays
    "blocks": Objective(output=1.0, feature=0.1, feature_loss="normalised", layers="blocks"),
    # only the teacher's output
    "output": Objective(output=1.0),
    # the same, guided (Golnari 2023, arXiv 2312.06899)
    "guidance": Objective(output=1.0),
    # jumps along the teacher's guided path (Luo et al. 2023, arXiv 2310.04378; Wang et al. 2024, arXiv 2405.18407)
    "consistency": Objective(consistency=1.0),
    # its own few-step samples as the teacher would draw them (Yin et al. 2024, arXiv 2405.14867)
    # the weight of diversity is that of Wu et al. 2026, arXiv 2602.03139
    "dmd": Objective(dmd=1.0, diversity=0.05),
    # plain fine-tuning, no teacher
    "task": Objective(task=1.0),
}
"""Published objectives by name."""
