"""Training settings, which a recipe holds as a TOML section."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..base.precision import PRECISIONS
from ..base.settings import BATCH, GUIDANCE, OR_NONE, SEEDS, SHARE, STEPS, check_settings, setting
from ..data.dataset import TIMESTEPS, Batching
from .losses import FEATURE_LOSSES
from .objective import OBJECTIVES, Objective
from .optim import OPTIMIZERS
from .weighting import UNWEIGHTED, WEIGHTINGS

LR_SCHEDULES = ("constant", "cosine", "linear")
WEIGHT_DTYPES = ("fp32", "bf16")
TEACHER_MODES = ("sequence", "mixture")
TRACKERS = ("tensorboard", "wandb")
LCM_STEPS = 4
"""Usual for latent consistency models (Luo et al. 2023, arXiv 2310.04378)."""
REFIT_EXAMPLES = 128
"""With up to 256 places of an image in each, four times as many made little difference on the demo."""
_WEIGHTS = (0, 1_000_000)
_OWN = "the objective's own"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Training settings of a run. Defaults follow BK-SDM (arXiv 2305.15798, Sec. 4.1) where it gives a value."""

    total_steps: int = setting(50_000, "Steps until the run is complete.", within=STEPS)
    objective: str = setting(
        "bk-sdm",
        "What the student learns from. bk-sdm: images, the teacher's output and the outputs of its stages. segmind: the same "
        "plus the mid block, less weight on the teacher. ssd-1b: every layer, for SDXL. koala: self-attention. laptop-diff: "
        "features of equal weight. output: only the teacher's output. For transformers choose output; blocks: the same plus the hidden states after every "
        "block; or local: each folded block by itself. guidance: the teacher's output, with guidance. consistency: to sample in a few "
        "steps. dmd: the same from its own samples, for LoRAs; slower to train. task: plain fine-tuning without a teacher.",
        choices=OBJECTIVES,
    )
    task_weight: float | None = setting(None, "Weight of the loss against the images.", unset=_OWN, within=_WEIGHTS)
    output_weight: float | None = setting(None, "Weight of the distance to the teacher's output.", unset=_OWN, within=_WEIGHTS)
    feature_weight: float | None = setting(None, "Weight of the distance to the teacher's features.", unset=_OWN, within=_WEIGHTS)
    diversity_weight: float | None = setting(
        None,
        "Weight of the objective dmd's distance of the first sampling step to the teacher's path.",
        unset=_OWN,
        within=_WEIGHTS,
    )
    refit_examples: int = setting(
        0,
        "Examples by which a pruned UNet is refitted before its first step: in closed form, the layer before each cut makes up for the "
        "removed blocks; on the demo this saves half of the steps with 128. It needs a teacher and does nothing to students that have "
        "been trained already, to LoRAs, and to transformers; 0 turns it off.",
        within=(0, 100_000),
    )
    local_steps: int = setting(
        0,
        "Steps at the beginning in which each folded block of a transformer learns by itself what its run of blocks does; the "
        "objective takes over after them.",
        within=OR_NONE,
    )
    local_loss: str = setting(
        "directions",
        "How a folded block is compared with its run. directions: each token's vector divided by its length, as in PPCL. normalised: "
        "squared distance in parts of the teacher's square. squared: as it is.",
        choices=FEATURE_LOSSES,
    )
    weighting: str = setting(
        UNWEIGHTED,
        "Weight of each timestep in all losses. min-snr balances the timesteps and helps most runs; debiased gives high noise "
        "more weight.",
        choices=(UNWEIGHTED, *WEIGHTINGS),
    )
    snr_gamma: float = setting(5.0, "Cap on the signal-to-noise ratio for min-snr.", above=0)
    timesteps: str = setting(
        "uniform", "How timesteps are sampled. logit-normal samples the middle more often.", choices=TIMESTEPS
    )
    timestep_range: tuple[int, ...] = setting(
        (), "Train an expert for the timesteps [start, end) only, for example [0, 500]; empty for all."
    )
    noise_offset: float = setting(
        0.0, "Helps a model learn very dark and very bright images; 0.05 is usual, 0 turns it off.", within=SHARE
    )
    input_perturbation: float = setting(
        0.0, "Extra noise in the input of the models; 0.1 is usual, 0 turns it off.", within=SHARE
    )
    caption_dropout: float = setting(
        0.1, "Share of captions replaced by the empty caption, so that the student supports guidance.", within=SHARE
    )
    guidance: float = setting(
        1.0,
        "Guidance scale of the teacher's predictions; the student learns them in one pass, for cfg 1. 1 = no guidance. Needs the "
        "empty caption and the objective guidance, consistency or dmd.",
        within=GUIDANCE,
    )
    guidance_min: float | None = setting(
        None,
        "A LoRA learns all scales from here to guidance, and its strength chooses one: strength 1 gives guidance, strength "
        "(cfg - 1) / (guidance - 1) gives cfg. With the objectives consistency and dmd it learns their mean.",
        unset="one scale, guidance",
        within=GUIDANCE,
    )
    phases: int = setting(
        4,
        "Steps to sample with after the objectives consistency and dmd. With 1, consistency learns to jump to the image from everywhere, "
        "for the sampler lcm with 2 to 8 steps.",
        within=(1, 1000),
    )
    solver_steps: int = setting(
        50,
        "Steps in which the teacher would sample, for the objective consistency; it learns across one of them at a time.",
        within=(1, 1000),
    )
    target_decay: float = setting(
        0.95,
        "How slowly the copy of the student that the objective consistency aims at follows it: the decay of an EMA.",
        within=(0, 0.999999),
    )
    consistency_steps: int = setting(
        0,
        "Steps at the beginning in which the student learns consistency, so that the objective dmd, which takes over after them, starts "
        "from usable images.",
        within=OR_NONE,
    )
    dmd_rate: float = setting(
        0.1,
        "Learning rate of the objective dmd, as a multiple of learning_rate: it needs a lower one than others. The fake score has twice "
        "that rate.",
        within=(1e-4, 1e4),
    )
    fake_updates: int = setting(
        4,
        "Updates of the fake score, which learns what the student's samples look like, in each step of the objective dmd.",
        within=(1, 100),
    )
    fake_warmup_steps: int = setting(12, "First steps of the objective dmd, in which only the fake score learns.", within=OR_NONE)
    anchor_steps: int = setting(
        6,
        "Steps of the teacher from noise to the middle of its path, where the objective dmd leads the student's first step so that "
        "images stay as varied as the teacher's.",
        within=(1, 500),
    )

    batch_size: int = setting(64, "Images per step. Lower it if memory runs out.", within=BATCH)
    accumulation_steps: int = setting(
        1,
        "Splits a batch into this many parts, one after another, to save memory. Must divide batch_size. The result is the same.",
        within=BATCH,
    )
    teacher_mode: str = setting(
        "sequence",
        "How several teachers take turns. sequence: one after another, as for SSD-1B. mixture: a random teacher for each step.",
        choices=TEACHER_MODES,
    )
    teacher_shares: tuple[float, ...] = setting(
        (), "Each teacher's share of the steps, such as 2, 1, 1. Empty: equal shares.", above=0
    )

    lora_rank: int = setting(0, "Train a LoRA of this rank instead of the weights; 0 trains the weights.", within=(0, 4096))
    lora_alpha: float | None = setting(None, "LoRA alpha; scale = alpha / rank.", unset="alpha equals rank", above=0)
    lora_targets: tuple[str, ...] = setting(
        ("*.attn1.to_*", "*.attn2.to_*"), "Name patterns of the layers that get a LoRA, such as `mid.*`."
    )
    lora_dora: bool = setting(
        False, "Train a DoRA: a LoRA that also learns a magnitude for each input of a layer (arXiv 2402.09353)."
    )

    optimizer: str = setting(
        "adamw",
        "adamw: the standard choice. adafactor, lion and adamw8bit need less memory. prodigy finds its own learning rate: set "
        "learning_rate to 1. All except adamw and adafactor need an extra package.",
        choices=OPTIMIZERS,
    )
    learning_rate: float = setting(5e-5, "Peak learning rate.", within=(1e-12, 1000))
    lr_schedule: str = setting(
        "constant",
        "How the learning rate decreases over total_steps. With constant, you can raise total_steps later.",
        choices=LR_SCHEDULES,
    )
    warmup_steps: int = setting(0, "Steps over which the learning rate rises from 0.", within=OR_NONE)
    weight_decay: float = setting(1e-2, "Decoupled weight decay.", within=(0, 1000))
    max_grad_norm: float = setting(1.0, "Gradients are scaled down to this norm.", within=(1e-12, 1_000_000_000))
    ema_decay: float = setting(
        0.0,
        "Decay of the EMA (exponential moving average) of the weights; the output is then the EMA. 0.9999 for long runs; 0 turns "
        "it off. Needs memory for one more student.",
        within=(0, 0.999999),
    )

    precision: str = setting(
        "fp32",
        "Precision of the student's computation; its weights stay float32. bf16 or fp16 is about twice as fast on a GPU. Prefer "
        "bf16 if the GPU supports it.",
        choices=PRECISIONS,
    )
    weight_dtype: str = setting(
        "fp32",
        "Data type of the student's weights. bf16 with stochastic rounding halves their memory, for small GPUs.",
        choices=WEIGHT_DTYPES,
    )
    gradient_checkpointing: bool = setting(
        False, "Recomputes activations instead of storing them: a third slower, far less memory, the same result."
    )
    compile: bool = setting(False, "Compile the student with torch.compile: a slow start, then faster steps.")

    seed: int = setting(0, "Decides data order, noise and timesteps. The same seed gives the same student.", within=SEEDS)
    save_every_steps: int = setting(
        500, "Steps between checkpoints. The run also saves at the end, on Cancel and on errors.", within=STEPS
    )
    keep_checkpoints: int = setting(2, "Number of newest checkpoints to keep on disk.", within=(1, 100_000))
    keep_best: int = setting(0, "Number of checkpoints with the lowest validation loss to keep as well.", within=(0, 100_000))
    validate_every_steps: int = setting(0, "Steps between validations on held-out images; 0 turns them off.", within=OR_NONE)
    validation_share: float = setting(
        0.0, "Share of the images held out for validation, if validate_every_steps is not 0.", within=(0, 0.5)
    )
    sample_every_steps: int = setting(
        0, "Steps between sample images, shown beside the teacher's; 0 turns them off.", within=OR_NONE
    )
    trackers: tuple[str, ...] = setting(
        (),
        "Where to send metrics besides metrics.csv in the run's folder. wandb stays offline unless WANDB_MODE says otherwise.",
        choices=TRACKERS,
    )

    def __post_init__(self):
        check_settings(self)
        self._check_batches()
        self._check_validation()
        self._check_weights()
        self._check_guidance()
        self._check_few_steps()

    def _check_batches(self) -> None:
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.accumulation_steps} equal parts; "
                "choose accumulation_steps that divide it"
            )
        if self.timestep_range and not (len(self.timestep_range) == 2 and 0 <= self.timestep_range[0] < self.timestep_range[1]):
            raise ValueError(f"timestep_range must be [start, end), for example [0, 500], got {list(self.timestep_range)}")
        if self.refit_examples == 1:
            raise ValueError("refit_examples must be 0, or at least 2: one half of them tests what fits the other")

    def _check_validation(self) -> None:
        if bool(self.validate_every_steps) != bool(self.validation_share):
            raise ValueError("set validate_every_steps and validation_share both above 0 for validation, or both to 0")
        if self.keep_best and not self.validate_every_steps:
            raise ValueError("keep_best needs a validation loss: set validate_every_steps and validation_share")

    def _check_weights(self) -> None:
        if self.weight_dtype == "bf16" and self.precision == "fp16":
            raise ValueError("weight_dtype bf16 cannot be combined with precision fp16; set precision to bf16")
        if self.rounds and not OPTIMIZERS[self.optimizer].one_by_one:
            raise ValueError(
                f"{self.optimizer} updates all weights together and needs weight_dtype fp32; or choose another optimizer"
            )
        if self.lora_dora and not self.lora_rank:
            raise ValueError("lora_dora needs a LoRA; set lora_rank above 0, or lora_dora to false")

    def _check_few_steps(self) -> None:
        objective = self.weighted_objective
        if self.consistency_steps and not objective.dmd:
            raise ValueError("consistency_steps are for the objective dmd; remove them, or choose that objective")
        if not objective.few_steps:
            return
        if self.weighting != UNWEIGHTED:
            raise ValueError(
                f'objective {self.objective} has a weight of its own for each timestep; set weighting to "{UNWEIGHTED}"'
            )
        if self.rounds:
            raise ValueError(f"objective {self.objective} needs weight_dtype fp32, or a LoRA: set lora_rank above 0")
        if any(each.consistency for each in self.objectives) and self.solver_steps < self.phases:
            raise ValueError(f"solver_steps must be at least phases, got {self.solver_steps} and {self.phases}")
        if objective.dmd:
            self._check_dmd()

    def _check_dmd(self) -> None:
        if 0 < self.consistency_steps <= self.local_steps:
            raise ValueError(
                f"consistency_steps count from the beginning, so they must be above local_steps, got {self.consistency_steps} and "
                f"{self.local_steps}"
            )
        if self.phases < 2:
            raise ValueError(
                "objective dmd needs phases of 2 or more: its first step keeps images varied, the others make them sharp"
            )
        if self.timestep_range:
            raise ValueError(
                "objective dmd learns from whole samplings, so it cannot train an expert for a range of timesteps; choose the "
                "objective consistency"
            )
        if self.validate_every_steps:
            raise ValueError("objective dmd has no validation loss; set validate_every_steps and validation_share to 0")
        if self.total_steps <= self.first_dmd_step:
            others = {"local steps": self.local_steps, "steps of consistency": self.consistency_steps}
            before = [f"{steps} {kind}" for kind, steps in others.items() if steps == self._dmd_begins and steps][-1:]
            before += [f"{self.fake_warmup_steps} in which only the fake score learns"]
            raise ValueError(
                f"total_steps must be above {self.first_dmd_step} for the objective dmd: {' and '.join(before)} come first; got "
                f"{self.total_steps}"
            )

    def _check_guidance(self) -> None:
        objective = self.weighted_objective  # raises first if all weights are 0
        if self.guidance != 1 and not (objective.output or objective.few_steps):
            raise ValueError(
                f"objective {self.objective} does not compare outputs with the teacher, from which guidance is learnt; set guidance to 1, "
                'or use objective "guidance"'
            )
        if objective.feature and self.guidance != 1:
            raise ValueError(
                f'objective {self.objective} has a feature loss, which cannot be combined with guidance; use objective "guidance"'
            )
        if self.guidance_min is not None and not (self.guidance_min < self.guidance and self.lora_rank):
            raise ValueError(
                "guidance_min must be below guidance and needs a LoRA, whose strength sets the scale: set lora_rank above 0; "
                f"got scales {self.guidance_min:g} to {self.guidance:g}, rank {self.lora_rank}"
            )
        if self.lora_dora and self.strength_is_scale:
            raise ValueError(
                "DoRA does not scale linearly with strength, so it cannot be combined with guidance_min; "
                "turn dora off (lora_dora in a recipe), or remove guidance_min to learn one scale"
            )

    @property
    def weighted_objective(self) -> Objective:
        """The objective with the weights of these settings, after the local steps."""
        objective = OBJECTIVES[self.objective]
        if objective.local:
            objective = replace(objective, feature_loss=self.local_loss)
        return objective.with_weights(
            task=self.task_weight, output=self.output_weight, feature=self.feature_weight, diversity=self.diversity_weight
        )

    def objective_at(self, step: int) -> Objective:
        """What a step, counted from 0, learns from."""
        if step < self.local_steps:
            return replace(OBJECTIVES["local"], feature_loss=self.local_loss)
        if step < self.consistency_steps and self.weighted_objective.dmd:
            return OBJECTIVES["consistency"]
        return self.weighted_objective

    @property
    def objectives(self) -> list[Objective]:
        """Everything a run learns from, one after another."""
        return [self.objective_at(step) for step in sorted({0, self.local_steps, self.consistency_steps})]

    @property
    def refits(self) -> bool:
        """Whether the student is refitted before its first step."""
        return bool(self.refit_examples) and self.uses_teacher and self.uses_images and not self.lora_rank

    @property
    def uses_images(self) -> bool:
        """Whether it learns at images with noise; otherwise only from captions, and what it draws of them."""
        return not all(objective.dmd and not objective.compares for objective in self.objectives)

    def jumps_from(self, step: int) -> bool:
        """Whether a step from this one on learns consistency, which needs a lagged copy of the student."""
        changes = {step, self.local_steps, self.consistency_steps}
        return any(self.objective_at(later).consistency for later in changes if step <= later < self.total_steps)

    @property
    def _dmd_begins(self) -> int:
        return max(self.local_steps, self.consistency_steps)

    @property
    def first_dmd_step(self) -> int:
        """The first step in which the student learns by the objective dmd."""
        return self._dmd_begins + self.fake_warmup_steps

    @property
    def learns_locally(self) -> bool:
        """Whether there are steps in which single blocks learn by themselves."""
        return bool(self.local_steps or self.weighted_objective.local)

    @property
    def of_blocks(self) -> bool:
        """Whether it compares what blocks of a transformer make."""
        return self.learns_locally or self.weighted_objective.layers == "blocks"

    @property
    def uses_teacher(self) -> bool:
        return self.weighted_objective.uses_teacher or self.learns_locally

    @property
    def scales(self) -> tuple[float, float]:
        """Smallest and largest guidance scale the student learns."""
        return self.guidance if self.guidance_min is None else self.guidance_min, self.guidance

    @property
    def sampling(self) -> Mapping[str, str]:
        """What a sampler must be set to for the result, as ComfyUI's KSampler names it; empty if that is free."""
        chosen = {}
        if self.few_steps:
            chosen = {"steps": str(self.few_steps), "sampler": "lcm" if self.phases == 1 else "euler", "scheduler": "simple"}
        return chosen | ({"cfg": "1"} if self.guidance != 1 else {})

    @property
    def few_steps(self) -> int | None:
        """Steps to sample with after the objectives consistency and dmd, None after others: one for each phase, a few for a single one."""
        if not self.weighted_objective.few_steps:
            return None
        return LCM_STEPS if self.phases == 1 else self.phases

    @property
    def num_averages(self) -> int:
        """Averages of the trained weights that are kept beside them."""
        return bool(self.ema_decay) + any(objective.consistency for objective in self.objectives)

    @property
    def strength_is_scale(self) -> bool:
        """Whether the strength of a LoRA chooses the guidance scale: it is then trained at that of each example."""
        return self.guidance_min is not None and not self.weighted_objective.few_steps

    @property
    def compute_dtype(self) -> str:
        """Precision the student computes in, a key of `DTYPES`."""
        return "bf16" if self.weight_dtype == "bf16" else self.precision

    @property
    def rounds(self) -> bool:
        """Whether the trained weights are bfloat16, with stochastic rounding."""
        return self.weight_dtype == "bf16" and not self.lora_rank

    @property
    def batching(self) -> Batching:
        """How batches are drawn."""
        return Batching(
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
        """Learning rate of a step, counted from 0, in parts of the peak."""
        rate = self.dmd_rate if self.objective_at(step).dmd else 1.0
        return rate * self._lr_share(step)

    def _lr_share(self, step: int) -> float:
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


_BESIDE = {
    "save_every_steps", "keep_checkpoints", "keep_best", "sample_every_steps", "trackers", "compile", "accumulation_steps",
    "gradient_checkpointing", "refit_examples",
}  # fmt: skip


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
