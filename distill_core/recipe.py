"""Every setting of a run, as a file people write and share."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar, Union, get_type_hints

import torch

from .dataset import TIMESTEPS, Drawing
from .documents import one_line
from .objective import OBJECTIVES, UNWEIGHTED, WEIGHTINGS, Objective
from .optim import OPTIMIZERS

LR_SCHEDULES = ("constant", "cosine", "linear")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
"""What the words for a precision mean."""
PRECISIONS = ("fp32", "bf16", "fp16")
WEIGHT_DTYPES = ("fp32", "bf16")
TEACHER_MODES = ("sequence", "mixture")
TRACKERS = ("tensorboard", "wandb")
Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a run. Defaults are BK-SDM's (arXiv 2305.15798, Sec. 4.1) where it names one."""

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
    """How much each timestep counts, in every loss: ``none``, or a key of `objective.WEIGHTINGS`."""
    snr_gamma: float = 5.0
    """Where min-SNR caps the signal-to-noise ratio."""
    timesteps: str = "uniform"
    """How timesteps are drawn: a key of `dataset.TIMESTEPS`."""
    timestep_range: tuple[int, ...] = ()
    """Train an expert for some timesteps alone: the first, and that after the last (`ranges.TimestepRanges`); empty for all."""
    noise_offset: float = 0.0
    """Deviation of a constant added to each channel of the noise, for darker darks and lighter lights."""
    input_perturbation: float = 0.0
    """Extra noise in what the networks see, as a share of the noise they are to find."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty caption, so that guidance is distilled too."""
    guidance: float = 1.0
    """Scale of the classifier-free guidance in the teacher's answers, which the student then gives in one pass; 1 for none."""
    guidance_min: float | None = None
    """Least of a range of scales up to ``guidance``: each example has one of them, and the LoRA at a strength of
    ``(scale - 1) / (guidance - 1)``, so that its strength sets the guidance while sampling. None for the one scale."""

    batch_size: int = 64
    """Examples per optimiser step, over all accumulation steps and all processes."""
    accumulation_steps: int = 1
    """Parts a batch is cut into, one after another, to need less memory. The result is the same."""
    teacher_mode: str = "sequence"
    """With several teachers: ``sequence``, one after another, or ``mixture``, one drawn for each step."""
    teacher_shares: tuple[float, ...] = ()
    """Each teacher's share of the steps; empty for equal shares."""

    lora_rank: int = 0
    """Train a LoRA of this rank on the student in place of its weights, which then stay as they are; 0 trains the weights."""
    lora_alpha: float | None = None
    """What the LoRA counts, over its rank; None for the rank itself, which counts it once."""
    lora_targets: tuple[str, ...] = ("*.attn1.to_*", "*.attn2.to_*")
    """Patterns of the layers it sits on, in block names such as ``mid.*``."""
    lora_dora: bool = False
    """Make it a DoRA, which learns the lengths of the weights' columns apart from their directions (arXiv 2402.09353)."""

    optimizer: str = "adamw"
    """A key of `optim.OPTIMIZERS`."""
    learning_rate: float = 5e-5
    """Peak learning rate. Prodigy finds its own: give it 1."""
    lr_schedule: str = "constant"
    """``constant``, ``cosine`` or ``linear`` decay to 0 over ``total_steps``, after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 1e-2
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is then what the run gives out; 0 for none."""

    precision: str = "fp32"
    """What the student computes in: ``fp32``, ``bf16`` or ``fp16``; its weights stay as ``weight_dtype`` says."""
    weight_dtype: str = "fp32"
    """What the student's weights are kept in. ``bf16`` halves weights and gradients and rounds stochastically; a LoRA stays
    float32 on weights of either."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    compile: bool = False
    """Compile the student with torch.compile."""

    seed: int = 0
    """Decides data order, noise and timesteps."""
    save_every_steps: int = 500
    """Steps between checkpoints; the end, a cancel and an error save as well."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    keep_best: int = 0
    """How many of those with the lowest validation loss stay besides."""
    validate_every_steps: int = 0
    """Steps between validations on held-out examples; 0 for none."""
    validation_share: float = 0.0
    """Share of the examples held out for validation."""
    sample_every_steps: int = 0
    """Steps between sample pictures, at fixed seeds, beside the teacher's; 0 for none."""
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
                f"batch_size {self.batch_size} cannot be cut into {self.accumulation_steps} equal parts; "
                "choose accumulation_steps that divide it"
            )
        if bool(self.validate_every_steps) != bool(self.validation_share):
            raise ValueError("validation needs both validate_every_steps and validation_share above 0")
        if self.keep_best and not self.validate_every_steps:
            raise ValueError("keep_best needs a validation loss: set validate_every_steps and validation_share")
        if any(not 0 < share < math.inf for share in self.teacher_shares):
            raise ValueError(f"teacher_shares must be numbers above 0, got {list(self.teacher_shares)}")
        if self.weight_dtype == "bf16" and self.precision == "fp16":
            raise ValueError("weight_dtype bf16 computes in bf16 as well; set precision to bf16")
        if self.timestep_range and not (len(self.timestep_range) == 2 and 0 <= self.timestep_range[0] < self.timestep_range[1]):
            raise ValueError(
                f"timestep_range must be the first timestep and that after the last, such as [0, 500], got {list(self.timestep_range)}"
            )
        if self.rounds and not OPTIMIZERS[self.optimizer].one_by_one:
            raise ValueError(f"{self.optimizer} looks at all weights at once, so it needs weight_dtype fp32; or take another")
        if self.aim.feature_loss and self.guidance != 1:  # weights that leave no loss are refused by the first
            raise ValueError(
                f"guidance combines two answers of the teacher, objective {self.objective} compares features, of which there is a "
                "pair of each; take objective guidance"
            )
        if self.guidance_min is not None and not (self.guidance_min < self.guidance and self.lora_rank):
            raise ValueError(
                "guidance_min is the lower end of a range of scales that the strength of a LoRA sets: it must be below guidance, "
                f"with lora_rank above 0; got {self.guidance_min:g} to {self.guidance:g}, rank {self.lora_rank}"
            )

        if self.lora_dora and not self.lora_rank:
            raise ValueError("lora_dora makes a DoRA of a LoRA: set lora_rank above 0, or lora_dora to false")
        if self.lora_dora and self.guidance_min is not None:
            raise ValueError(
                "guidance_min learns a LoRA at many strengths, and what a DoRA does at a strength is not in proportion to it: "
                "turn dora off (lora_dora in a recipe), or learn one scale"
            )

    @property
    def aim(self) -> Objective:
        """The objective with this recipe's weights."""
        return OBJECTIVES[self.objective].with_weights(self.task_weight, self.output_weight, self.feature_weight)

    @property
    def scales(self) -> tuple[float, float]:
        """Least and largest scale of guidance that is learnt."""
        return self.guidance if self.guidance_min is None else self.guidance_min, self.guidance

    @property
    def compute_dtype(self) -> str:
        """What the student computes in, a key of `DTYPES`."""
        return "bf16" if self.weight_dtype == "bf16" else self.precision

    @property
    def rounds(self) -> bool:
        """Whether what is trained is kept in bfloat16, and so rounded."""
        return self.weight_dtype == "bf16" and not self.lora_rank

    @property
    def drawing(self) -> Drawing:
        """How batches are drawn."""
        return Drawing(
            batch_size=self.batch_size,
            seed=self.seed,
            caption_dropout=self.caption_dropout,
            timesteps=self.timesteps,
            within=self.timestep_range or None,
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
        """Settings that may be other when a run goes on: those that decide no step, and the end where no step depends on it."""
        depends_on_end = self.lr_schedule != "constant" or (several_teachers and self.teacher_mode == "sequence")
        return _BESIDE | (set() if depends_on_end else {"total_steps"})

    def to_mapping(self) -> dict[str, Any]:
        """As a TOML table; what is None is left out, for TOML has no word for it."""
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
"""Settings that are one of several words -> the words."""
MOST_STEPS = 100_000_000
STEPS = (1, MOST_STEPS)
OR_NONE = (0, MOST_STEPS)  # steps between two of something, where 0 is none at all
BATCH = (1, 65_536)
SEEDS = (-(2**63), 2**64 - 1)  # what torch takes
SAMPLER_STEPS = (1, 1000)
GUIDANCE = (1, 100)
SIDE_PX = (8, 16_384)
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
"""Smallest and largest value of settings that are numbers."""
_MAX_REASON = 1000
"""Characters of what is wrong with a table."""
_BESIDE = {
    "save_every_steps", "keep_checkpoints", "keep_best", "sample_every_steps", "trackers", "compile", "accumulation_steps",
    "gradient_checkpointing",
}  # fmt: skip


def check_settings(settings: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """``ValueError`` naming a field of a dataclass that is of another type than it says, or out of its range.

    Whoever makes one may have its values from anywhere: a file, or a link in a graph, which no widget holds within bounds.
    """
    for name, hint in get_type_hints(type(settings)).items():
        if _is_plain(hint) and not _fits(value := getattr(settings, name), hint):
            raise ValueError(f"{name} must be {_words(hint)}, got {one_line(repr(value))}")
    for name, bounds in ranges.items():
        if (value := getattr(settings, name)) is not None:
            check_range(name, value, bounds)


def check_range(name: str, value: float, bounds: tuple[float, float]) -> None:
    """``ValueError`` for what is no number, or none between its bounds."""
    low, high = bounds
    if not (type(value) in (int, float) and low <= value <= high):
        raise ValueError(f"{name} must be between {_spelt(low)} and {_spelt(high)}, got {_spelt(value)}")


def _spelt(value: Any) -> str:
    return f"{value:,}" if type(value) is int else f"{value:g}" if type(value) is float else repr(value)


def from_mapping(kind: type[Settings], table: Mapping[str, Any], where: str) -> Settings:
    """A dataclass of settings from a table; ``ValueError`` names a field that is misspelt, missing or of another type."""
    known, hints = {field.name: field for field in fields(kind)}, get_type_hints(kind)
    for name, value in table.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {nearest[0]!r}?" if nearest else f"the settings are {', '.join(sorted(known))}"
            raise ValueError(f"{where}: there is no setting {one_line(name)!r}; {meant}")
        if not _fits(value, hints[name]):
            raise ValueError(f"{where}: {name} must be {_words(hints[name])}, got {one_line(repr(value))}")
    for name, field in known.items():
        if name not in table and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where}: {name} is missing")
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(error, _MAX_REASON)}") from error


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _is_plain(hint: Any) -> bool:
    """Whether `_fits` can tell: numbers, texts and switches, tuples of them, and what may be None besides."""
    return bool(getattr(hint, "__origin__", None) in (None, tuple, Union) and _words(hint))


def _fits(value: Any, hint: Any) -> bool:
    if (parts := getattr(hint, "__args__", None)) is None:
        return type(value) is hint or (hint is float and type(value) is int)
    if getattr(hint, "__origin__", None) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(entry, parts[0]) for entry in value)
    return any(_fits(value, part) for part in parts)


def _words(hint: Any) -> str:
    if getattr(hint, "__origin__", None) is tuple:
        return f"a list, each entry {_words(hint.__args__[0])}"
    return " or ".join(_WORDS[part] for part in getattr(hint, "__args__", (hint,)) if part in _WORDS)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def to_toml(table: Mapping[str, Any]) -> str:
    import tomli_w

    return tomli_w.dumps(table)
