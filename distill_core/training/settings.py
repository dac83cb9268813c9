"""Training settings, which a recipe holds as a TOML section."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from ..base.precision import PRECISIONS
from ..base.settings import BATCH, GUIDANCE, OR_NONE, SEEDS, STEPS, check_settings
from ..data.dataset import TIMESTEPS, Drawing
from .objective import OBJECTIVES, Objective
from .optim import OPTIMIZERS
from .weighting import UNWEIGHTED, WEIGHTINGS

LR_SCHEDULES = ("constant", "cosine", "linear")


WEIGHT_DTYPES = ("fp32", "bf16")
TEACHER_MODES = ("sequence", "mixture")
TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Training settings of a run. Defaults follow BK-SDM (arXiv 2305.15798, Sec. 4.1) where it gives a value."""

    total_steps: int = 50_000
    """Optimiser steps until the run is complete."""
    objective: str = "bk-sdm"
    """Losses, their weights and where features are compared: a key of `objective.OBJECTIVES`."""
    task_weight: float | None = None
    """Weight of the loss against the data; None for the objective's own."""
    output_weight: float | None = None
    """Weight of the distance to the teacher's output; None for the objective's own."""
    feature_weight: float | None = None
    """Weight of the distance to the teacher's features; None for the objective's own."""
    weighting: str = UNWEIGHTED
    """Weight of each timestep in every loss: ``none``, or a key of `weighting.WEIGHTINGS`."""
    snr_gamma: float = 5.0
    """Maximum signal-to-noise ratio for min-SNR."""
    timesteps: str = "uniform"
    """How timesteps are drawn: a key of `dataset.TIMESTEPS`."""
    timestep_range: tuple[int, ...] = ()
    """Train an expert for the timesteps [start, end) only, for example [0, 500] (`ranges.TimestepRanges`); empty for all."""
    noise_offset: float = 0.0
    """Standard deviation of a constant added to each noise channel, for darker and brighter images."""
    input_perturbation: float = 0.0
    """Extra noise in the inputs of the networks, as a share of the noise they predict."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty caption, so that the student supports guidance."""
    guidance: float = 1.0
    """Classifier-free guidance scale of the teacher's predictions, which the student learns to predict in one pass; 1 for no
    guidance."""
    guidance_min: float | None = None
    """Smallest scale of a range up to ``guidance``: each example uses one scale of the range, with the LoRA at strength
    ``(scale - 1) / (guidance - 1)``, so that the strength sets the guidance while sampling. None for a single scale."""

    batch_size: int = 64
    """Examples per optimiser step, summed over accumulation steps and processes."""
    accumulation_steps: int = 1
    """Number of parts a batch is split into, computed one after another to save memory. The result is the same."""
    teacher_mode: str = "sequence"
    """With several teachers: ``sequence``, one after another, or ``mixture``, a random one for each step."""
    teacher_shares: tuple[float, ...] = ()
    """Each teacher's share of the steps; empty for equal shares."""

    lora_rank: int = 0
    """Train a LoRA of this rank and freeze the student's weights; 0 trains the weights."""
    lora_alpha: float | None = None
    """LoRA alpha; scale = alpha / rank. None: alpha equals rank."""
    lora_targets: tuple[str, ...] = ("*.attn1.to_*", "*.attn2.to_*")
    """Patterns of the layers that get a LoRA, in block names such as ``mid.*``."""
    lora_dora: bool = False
    """Train a DoRA, which learns magnitude and direction of the weights' columns separately (arXiv 2402.09353)."""

    optimizer: str = "adamw"
    """The optimizer: a key of `optim.OPTIMIZERS`."""
    learning_rate: float = 5e-5
    """Peak learning rate. Prodigy finds its own: give it 1."""
    lr_schedule: str = "constant"
    """``constant``, ``cosine`` or ``linear`` decay to 0 over ``total_steps``, after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 1e-2
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.0
    """Decay of the EMA of the weights, which the run then exports; 0 for no EMA."""

    precision: str = "fp32"
    """Precision the student computes in: ``fp32``, ``bf16`` or ``fp16``; its weights stay in ``weight_dtype``."""
    weight_dtype: str = "fp32"
    """Dtype of the student's weights. ``bf16`` halves weights and gradients and rounds stochastically; a LoRA is float32 with
    either."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""
    compile: bool = False
    """Compile the student with torch.compile."""

    seed: int = 0
    """Seed of data order, noise and timesteps."""
    save_every_steps: int = 500
    """Steps between checkpoints; the run also saves at its end, on a cancel and on an error."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 0
    """Number of checkpoints with the lowest validation loss to keep as well."""
    validate_every_steps: int = 0
    """Steps between validations on held-out examples; 0 for no validation."""
    validation_share: float = 0.0
    """Share of the examples held out for validation."""
    sample_every_steps: int = 0
    """Steps between sample images by student and teacher, from a fixed seed; 0 for no samples."""
    trackers: tuple[str, ...] = ()
    """Where metrics go besides metrics.csv: ``tensorboard``, ``wandb``."""

    def __post_init__(self):
        check_settings(self, RANGES)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: unknown {getattr(self, name)!r}; choose from {sorted(choices)}")
        if unknown := set(self.trackers) - set(TRACKERS):
            raise ValueError(f"trackers: unknown {min(unknown)!r}; choose from {list(TRACKERS)}")
        for name in ("learning_rate", "max_grad_norm", "snr_gamma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)}")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.accumulation_steps} equal parts; "
                "choose accumulation_steps that divide it"
            )
        if bool(self.validate_every_steps) != bool(self.validation_share):
            raise ValueError("set validate_every_steps and validation_share both above 0 for validation, or both to 0")
        if self.keep_best and not self.validate_every_steps:
            raise ValueError("keep_best needs a validation loss: set validate_every_steps and validation_share")
        if any(not 0 < share < math.inf for share in self.teacher_shares):
            raise ValueError(f"teacher_shares must be numbers above 0, got {list(self.teacher_shares)}")
        if self.weight_dtype == "bf16" and self.precision == "fp16":
            raise ValueError("weight_dtype bf16 cannot be combined with precision fp16; set precision to bf16")
        if self.timestep_range and not (len(self.timestep_range) == 2 and 0 <= self.timestep_range[0] < self.timestep_range[1]):
            raise ValueError(f"timestep_range must be [start, end), for example [0, 500], got {list(self.timestep_range)}")
        if self.rounds and not OPTIMIZERS[self.optimizer].one_by_one:
            raise ValueError(
                f"{self.optimizer} updates all weights together and needs weight_dtype fp32; or choose another optimizer"
            )
        if self.weighted_objective.feature and self.guidance != 1:  # raises first if all weights are 0
            raise ValueError(
                f'objective {self.objective} has a feature loss, which cannot be combined with guidance; use objective "guidance"'
            )
        if self.guidance_min is not None and not (self.guidance_min < self.guidance and self.lora_rank):
            raise ValueError(
                "guidance_min must be below guidance and needs a LoRA, whose strength sets the scale: set lora_rank above 0; "
                f"got scales {self.guidance_min:g} to {self.guidance:g}, rank {self.lora_rank}"
            )

        if self.lora_dora and not self.lora_rank:
            raise ValueError("lora_dora needs a LoRA; set lora_rank above 0, or lora_dora to false")
        if self.lora_dora and self.guidance_min is not None:
            raise ValueError(
                "DoRA does not scale linearly with strength, so it cannot be combined with guidance_min; "
                "turn dora off (lora_dora in a recipe), or remove guidance_min to learn one scale"
            )

    @property
    def weighted_objective(self) -> Objective:
        """The objective with the weights of these settings."""
        return OBJECTIVES[self.objective].with_weights(
            task=self.task_weight, output=self.output_weight, feature=self.feature_weight
        )

    @property
    def scales(self) -> tuple[float, float]:
        """Smallest and largest guidance scale the student learns."""
        return self.guidance if self.guidance_min is None else self.guidance_min, self.guidance

    @property
    def compute_dtype(self) -> str:
        """Precision the student computes in, a key of `DTYPES`."""
        return "bf16" if self.weight_dtype == "bf16" else self.precision

    @property
    def rounds(self) -> bool:
        """Whether the trained weights are bfloat16, with stochastic rounding."""
        return self.weight_dtype == "bf16" and not self.lora_rank

    @property
    def drawing(self) -> Drawing:
        """How batches are drawn."""
        return Drawing(
            batch_size=self.batch_size,
            seed=self.seed,
            caption_dropout=self.caption_dropout,
            timesteps=self.timesteps,
            within=(self.timestep_range[0], self.timestep_range[1]) if self.timestep_range else None,
            noise_offset=self.noise_offset,
            input_perturbation=self.input_perturbation,
            held_out=self.validation_share,
            scales=None if self.guidance_min is None else self.scales,
        )

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[self.lr_schedule]

    def may_change(self, several_teachers: bool) -> set[str]:
        """Settings that may change when a run resumes, as they do not affect any step already done."""
        depends_on_end = self.lr_schedule != "constant" or (several_teachers and self.teacher_mode == "sequence")
        return _BESIDE | (set() if depends_on_end else {"total_steps"})

    def to_mapping(self) -> dict[str, Any]:
        """As a TOML table; settings of None are left out, as TOML has no null."""
        return {name: _plain(value) for name, value in asdict(self).items() if value is not None}


CHOICES: dict[str, Collection[str]] = {
    "objective": OBJECTIVES,
    "weighting": (UNWEIGHTED, *WEIGHTINGS),
    "timesteps": TIMESTEPS,
    "teacher_mode": TEACHER_MODES,
    "optimizer": OPTIMIZERS,
    "lr_schedule": LR_SCHEDULES,
    "precision": PRECISIONS,
    "weight_dtype": WEIGHT_DTYPES,
}
"""Settings with a fixed set of words -> these words."""


RANGES: dict[str, tuple[float, float]] = {
    "total_steps": STEPS,
    "task_weight": (0, 1_000_000),
    "output_weight": (0, 1_000_000),
    "feature_weight": (0, 1_000_000),
    "noise_offset": (0, 1),
    "input_perturbation": (0, 1),
    "caption_dropout": (0, 1),
    "guidance": GUIDANCE,
    "guidance_min": GUIDANCE,
    "batch_size": BATCH,
    "accumulation_steps": BATCH,
    "warmup_steps": OR_NONE,
    "lora_rank": (0, 4096),
    "lora_alpha": (0, 1_000_000),
    "weight_decay": (0, 1000),
    "ema_decay": (0, 0.999999),
    "seed": SEEDS,
    "save_every_steps": STEPS,
    "keep_checkpoints": (1, 100_000),
    "keep_best": (0, 100_000),
    "validate_every_steps": OR_NONE,
    "validation_share": (0, 0.5),
    "sample_every_steps": OR_NONE,
}
"""Smallest and largest value of numeric settings."""


_BESIDE = {
    "save_every_steps", "keep_checkpoints", "keep_best", "sample_every_steps", "trackers", "compile", "accumulation_steps",
    "gradient_checkpointing",
}  # fmt: skip


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
