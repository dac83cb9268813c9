"""Forecast of the device memory a run needs, part by part, before its first step, and advice if that is too much.

The forecast simulates one step with torch's fake tensors, which have a shape but no data, and counts the bytes of every
tensor from its creation until it is freed. Memory peaks at one of some moments, and the forecast reports the largest peak:

- the teacher's forward pass: its activations, which live only until the next layers have read them;
- the student's forward and backward pass: activations saved for backward, gradients as they are computed, and temporary
  memory of an operation or of a recomputed block;
- with the objective dmd, the comparison of the student's samples by both scores, while its activations wait;
- the update: all gradients, and the optimiser's temporary tensors.

Weights, the optimiser state and the EMA are present at all moments, and so are gradients if several micro-batches
accumulate. Keep a reserve for what is not counted: the driver's own memory, and the workspace of convolutions.

The forecast needs no GPU and reads no weights: diffusers builds the networks without weights, and the step is simulated on
a CPU. Two things are counted as on a GPU: under autocast norms compute in float32, and attention is always fused, so it
saves its inputs, its output and one number per row.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..base.precision import DTYPES
from ..base.sizes import gib
from ..diffusion.conditioning import Caption, Label
from ..diffusion.denoiser import Denoiser, DiffusersDenoiser, checkpointing, tap
from ..networks.architecture import Architecture
from ..networks.build import build_unet
from ..networks.name_map import NameMap
from ..networks.quantised import QUANTISED, computes, is_linear, kept_bytes
from ..pruning.plan import PruningPlan, name_map
from .exports import trained
from .losses import matching_loss, pseudo_huber_loss
from .objective import Outputs
from .optim import OPTIMIZERS
from .settings import TrainingSettings
from .step import StepInputs, student_outputs, teacher_outputs

RESERVE = 0.05
"""Share of the free memory kept for what is not counted."""
BESIDE_PASSES = (
    "total_steps", "timesteps", "timestep_range", "noise_offset", "input_perturbation", "caption_dropout", "optimizer",
    "learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "ema_decay", "seed", "save_every_steps",
    "keep_checkpoints", "keep_best", "validate_every_steps", "validation_share", "sample_every_steps", "trackers",
)  # fmt: skip
"""Settings that change nothing about the passes of teacher and student."""
LatentShape = tuple[int, int, int]
AnyDenoiser = TypeVar("AnyDenoiser", bound=Denoiser)


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that is free, or reserved by torch but unused; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and find_spec("psutil"):
        import psutil

        return psutil.virtual_memory().available
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory: on a CPU and on MPS it says so in words alone."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in words)


# --- optimisers -----------------------------------------------------------------------------------------------------


def _adafactor(shape: torch.Size) -> int:
    """Bytes of Adafactor: a factor per row and per column of the last two dimensions, for each index of the others."""
    n = shape.numel()
    return 4 * (n // shape[-1] + n // shape[-2] if len(shape) > 1 else n) + 4


def _adamw8bit(shape: torch.Size) -> int:
    """Bytes of 8-bit AdamW: two moments of one byte and a float32 scale per 256 entries; below 4096 entries float32."""
    n = shape.numel()
    return 2 * (n + 4 * -(-n // 256)) if n >= 4096 else 8 * n


STATE_BYTES: dict[str, Callable[[torch.Size], int]] = {
    "adamw": lambda shape: 8 * shape.numel() + 4,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "lion": lambda shape: 4 * shape.numel(),
    "prodigy": lambda shape: 16 * shape.numel(),
    "schedulefree": lambda shape: 8 * shape.numel(),
}
"""Bytes of optimiser state per tensor, by the optimiser's name. The state is float32 for any weight dtype."""
_COPY_ALL = {"adamw", "schedulefree"}
"""Optimisers that update all tensors together, with a temporary copy of each."""


def update_bytes(shapes: Iterable[torch.Size], training: TrainingSettings) -> int:
    """Temporary memory of the update, besides weights, gradients and optimiser state."""
    sizes = [4 * shape.numel() for shape in shapes]
    if training.rounds:  # float32 copies of a tensor and its gradient, and four of that size to round it
        return 6 * max(sizes)
    return sum(sizes) if training.optimizer in _COPY_ALL else 2 * max(sizes)


def passes(
    training: TrainingSettings, always: Counter[str], of_teacher: Counter[str], of_student: Counter[str], between: Counter[str]
) -> dict[str, Counter[str]]:
    """Bytes at the moments of a step that run the networks.

    of_teacher, of_student: of the pass of each, beside what is there always. between: of the student, from forward to backward.
    """
    moments = {
        "the teacher's forward pass": always + of_teacher,
        "the student's forward and backward pass": always + of_student,
    }
    if training.weighted_objective.dmd:
        between = Counter(
            {kind: num_bytes for kind, num_bytes in between.items() if kind != "gradients"}
        )  # the teacher's has them
        moments["the comparison of a sample by both scores"] = always + of_teacher + between
    return moments


def beside_weights(shapes: Iterable[torch.Size], training: TrainingSettings) -> Counter[str]:
    """Bytes beside trained weights of some shapes from the first step to the last, by kind."""
    shapes = list(shapes)
    state, copy = sum(map(STATE_BYTES[training.optimizer], shapes)), 4 * sum(shape.numel() for shape in shapes)
    has_fake = bool(training.weighted_objective.dmd)
    return Counter({
        "optimizer": state,
        "EMA": training.num_averages * copy,
        "fake score": has_fake * (copy + state),
    })  # fmt: skip


# --- settings, and what to change -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """Everything that determines the memory of a run, besides its networks and the size of its examples."""

    training: TrainingSettings
    teacher_dtype: str = "fp32"
    """Dtype of the teachers: a key of `precision.DTYPES` or one of `quantised.QUANTISED`; 8-bit and 4-bit weights compute in
    16 bits."""
    teacher_offloaded: bool = False
    """Whether each layer of a teacher is on the device only while it computes."""
    shares_base: bool = False
    """Whether the student is the teacher with a LoRA: one copy of the weights, in the teacher's dtype."""
    num_teachers: int = 1
    """A mixture keeps all of them on the device, a sequence only one."""
    num_processes: int = 1
    """Processes that share each batch, each with its own device."""
    shards: bool = False
    """Whether each of them holds only a shard of the student."""
    device: str = "cuda"
    """Device type: ``cpu`` counts autocast as on a CPU, any other as on CUDA."""

    @property
    def student_dtype(self) -> str:
        """Dtype of the student's weights, as for ``teacher_dtype``; a LoRA on them is float32."""
        return self.teacher_dtype if self.shares_base else self.training.weight_dtype

    @property
    def micro_batch(self) -> int:
        """Examples on the device at once."""
        return self.training.batch_size // self.training.accumulation_steps // self.num_processes

    def with_training(self, **changes) -> MemorySettings:
        """A copy with other training settings."""
        return replace(self, training=replace(self.training, **changes))


class Change(NamedTuple):
    """One way to need less memory."""

    what: str
    """Setting and value."""
    price: str
    """Its side effect; may be empty."""
    settings: MemorySettings
    """All settings after the change."""
    smaller: bool = False
    """Whether it changes the size of the images instead of a setting."""

    def __str__(self) -> str:
        return f"{self.what} ({self.price})" if self.price else self.what


def changes(now: MemorySettings, *, of_teacher: bool = True) -> Iterator[Change]:
    """Unused changes that may save memory, least costly first. of_teacher: include the teacher's dtype and offload."""
    training, with_training = now.training, now.with_training
    if not training.gradient_checkpointing:
        yield Change("gradient_checkpointing on", "steps take a third longer", with_training(gradient_checkpointing=True))
    if (whole := now.micro_batch) > 1:
        part = max(n for n in range(1, whole) if whole % n == 0)
        steps = training.accumulation_steps * (whole // part)
        price = f"{part} example{'s' * (part != 1)} at once instead of {whole}, same result"
        yield Change(f"accumulation_steps {steps}", price, with_training(accumulation_steps=steps))
    if training.compute_dtype == "fp32":
        yield Change("precision bf16", "", with_training(precision="bf16"))
    if of_teacher and training.weighted_objective.uses_teacher:
        for dtype, price in {"fp16": "", "fp8": "slightly less precise predictions"}.items():
            if now.teacher_dtype not in QUANTISED and DTYPES[dtype].itemsize < DTYPES[now.teacher_dtype].itemsize:
                yield Change(f"teacher in {dtype}", price, replace(now, teacher_dtype=dtype))
        may_wait = now.teacher_dtype not in QUANTISED and not now.shares_base and now.device != "cpu"
        if may_wait and not now.teacher_offloaded:
            yield Change("teacher offloaded", "slower steps", replace(now, teacher_offloaded=True))
    for optimizer, price in {"adamw8bit": "", "adafactor": "no momentum"}.items():
        if _state_of_a_layer(optimizer) < _state_of_a_layer(training.optimizer) and not now.shards:
            yield Change(f"optimizer {optimizer}", price, with_training(optimizer=optimizer))
    may_round = OPTIMIZERS[training.optimizer].one_by_one or training.lora_rank
    if training.weight_dtype == "fp32" and may_round and not now.shards and not now.shares_base:
        price = "" if training.lora_rank else "less precise updates"
        yield Change("weight_dtype bf16", price, with_training(weight_dtype="bf16", precision="bf16"))
    if training.ema_decay:
        yield Change("ema_decay 0", "no EMA", with_training(ema_decay=0.0))
    yield Change("smaller images", "", now, smaller=True)


def _state_of_a_layer(optimizer: str) -> int:
    return STATE_BYTES[optimizer](torch.Size([1024, 1024]))


# --- forecast -------------------------------------------------------------------------------------------------------


PARTS = (
    "teacher weights",
    "teacher activations",
    "teacher features",
    "student weights",
    "half-precision weights",
    "gradients",
    "optimizer",
    "EMA",
    "fake score",
    "kept activations",
    "working memory",
)
"""Names of the parts. Features: the teacher's layer outputs that losses compare. Half-precision weights: copies made by
autocast. Fake score: of the objective dmd, with its optimizer. Kept activations: saved for the student's backward pass.
Working memory: everything else at that moment."""


class Part(NamedTuple):
    """One line of a forecast."""

    name: str
    """One of `PARTS`."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Memory on the device at the moment of a step that needs the most."""

    moment: str
    parts: tuple[Part, ...]
    """All of `PARTS`, including those of 0 bytes."""
    settings: MemorySettings
    latent_shape: LatentShape
    """(channels, height, width) of the largest examples."""
    again: Callable[..., Forecast] = field(repr=False, compare=False)
    """``again(settings, latent_shape)``: forecast of the same run with other settings or another image size; with ``enough=``,
    the other moments are skipped if the update alone needs more."""

    @property
    def total_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def describe(self) -> str:
        """A table in GiB: one line per part, and the total."""
        lines = [part for part in self.parts if part.num_bytes] + [Part("total", self.total_bytes)]
        table = [f"  {name:<23}{gib(num_bytes):>12}" for name, num_bytes in lines]
        return "\n".join([f"The most memory is needed in {self.moment}:", *table])

    def describe_shortage(self, free_bytes: int | None, *, of_teacher: bool = True) -> str:
        """Advice if a step needs more than the free memory minus a reserve; empty if it fits or free memory is unknown."""
        if free_bytes is None or not (lines := self.advice(int((1 - RESERVE) * free_bytes), of_teacher=of_teacher)):
            return ""
        title = f"A step needs about {gib(self.total_bytes)}, but only {gib(free_bytes)} is free. To save memory, in this order:"
        return "\n".join([title, *(f"  {line}" for line in lines)])

    def advice(self, free_bytes: int, *, of_teacher: bool = True) -> list[str]:
        """Changes until a step fits into ``free_bytes``, each with its saving after the previous ones.

        Each is the least costly change that still saves 1 %. Empty if the step fits; if no change makes it fit, the last line
        says so. of_teacher: as in `changes`.
        """
        lines: list[str] = []
        now = self
        while (missing := now.total_bytes - free_bytes) > 0:
            enough = 0.99 * now.total_bytes
            tried = ((change, now._with(change, enough)) for change in changes(now.settings, of_teacher=of_teacher))
            change, then = next((pair for pair in tried if pair[1].total_bytes <= enough), (None, now))
            if change is None:
                return [*lines, f"{gib(missing)} more is still needed: prune the student more, or use a device with more memory"]
            sides = f" ({_px(then.latent_shape)} instead of {_px(now.latent_shape)})" if change.smaller else ""
            lines.append(f"{change}{sides}: saves {gib(now.total_bytes - then.total_bytes)}")
            now = then
        return lines

    def _with(self, change: Change, enough: float) -> Forecast:
        latent_shape = _smaller(self.latent_shape) if change.smaller else self.latent_shape
        return self.again(change.settings, latent_shape, enough=enough)


def _smaller(shape: LatentShape) -> LatentShape:
    """A shape with three quarters of each side, rounded down to a multiple of 8; a small shape stays as it is."""
    channels, *sides = shape
    height, width = (side * 3 // 4 // 8 * 8 for side in sides)
    return (channels, height, width) if min(height, width) >= 32 else shape


def _px(shape: LatentShape) -> str:
    return f"{8 * shape[1]} x {8 * shape[2]} px"


def forecast(
    *,
    teacher: Architecture,
    student: Architecture,
    plan: PruningPlan | None,
    latent_shape: LatentShape,
    num_tokens: int,
    settings: MemorySettings,
) -> Forecast:
    """Forecast the memory of a run. plan: as for `loop.distill`. num_tokens: number of tokens in a caption.

    The last few steps are remembered, so that the same run, or one with another batch size, is forecast sooner.
    """
    training = _of_passes(settings.training)
    about = (teacher, student, plan, num_tokens, replace(training, batch_size=1, accumulation_steps=1))
    step = next((step for known, step in _recent if known == about), None)
    if step is None:
        step = _Step(teacher, student, plan, num_tokens, training)
        _recent.append((about, step))
    return step.forecast(settings, latent_shape)


_recent: deque[tuple[tuple, _Step]] = deque(maxlen=2)


def _of_passes(training: TrainingSettings) -> TrainingSettings:
    """These settings with the default of each that changes nothing about a pass of a network."""
    default = TrainingSettings()
    return replace(training, **{name: getattr(default, name) for name in BESIDE_PASSES})


class _Step:
    """One step of a run. Simulated passes are cached, for other settings with the same passes."""

    def __init__(
        self, teacher: Architecture, student: Architecture, plan: PruningPlan | None, num_tokens: int, training: TrainingSettings
    ):
        self.teacher, self.student, self.plan, self.num_tokens = teacher, student, plan, num_tokens
        self.uses_teacher, self.layers = training.weighted_objective.uses_teacher, {}
        if self.uses_teacher:
            mapping = name_map(teacher, plan) if plan else NameMap.identity(teacher)
            self.layers = training.weighted_objective.feature_layers(teacher, student, mapping)
        self.guided = training.guidance != 1
        self.trained_shapes = _trained_shapes(student, training)
        self.num_trained = sum(shape.numel() for shape in self.trained_shapes)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)  # only one, so that the teacher's outputs can go from pass to pass
        self._teacher_pass, self._student_pass = cache(self._walk_teacher), cache(self._walk_student)

    def forecast(self, settings: MemorySettings, latent_shape: LatentShape, enough: float = math.inf) -> Forecast:
        """Forecast of the step. enough: if the update alone needs more bytes, the other moments are skipped."""
        always, update = self._always(settings), "the update of the weights"
        moments = {update: always + self._in_update(settings)}
        if moments[update].total() <= enough:
            of_teacher, of_student = self._in_teacher_pass(settings, latent_shape), self._in_student_pass(settings, latent_shape)
            moments |= passes(settings.training, always, of_teacher, *of_student)
        worst = max(moments, key=lambda moment: moments[moment].total())
        parts = tuple(Part(name, moments[worst][name]) for name in PARTS)
        return Forecast(moment=worst, parts=parts, settings=settings, latent_shape=latent_shape, again=self.forecast)

    # --- memory in bytes

    def _always(self, settings: MemorySettings) -> Counter:
        training, (teachers, _) = settings.training, self._teacher_weights(settings)
        of_lora = 4 * self.num_trained if training.lora_rank else 0
        share = settings.num_processes if settings.shards else 1
        return Counter({
            "teacher weights": teachers,
            "student weights": (kept_bytes(self.student.shapes, settings.student_dtype) + of_lora) // share,
            "gradients": self._gradients(settings) if settings.num_processes > share else 0,  # sent between processes
        }) + Counter({kind: of_kind // share for kind, of_kind in beside_weights(self.trained_shapes, training).items()})  # fmt: skip

    def _gradients(self, settings: MemorySettings) -> int:
        itemsize = DTYPES["bf16" if settings.training.rounds else "fp32"].itemsize
        return itemsize * self.num_trained // (settings.num_processes if settings.shards else 1)

    def _teacher_weights(self, settings: MemorySettings) -> tuple[int, int]:
        """Bytes that stay on the device, and bytes loaded only for the teacher's pass."""
        if not self.uses_teacher or settings.shares_base:
            return 0, 0
        if settings.teacher_offloaded:  # one layer computes, the next is being loaded
            return 0, 2 * DTYPES[settings.teacher_dtype].itemsize * self._largest_layer
        copies = settings.num_teachers if settings.training.teacher_mode == "mixture" else 1
        return copies * kept_bytes(self.teacher.shapes, settings.teacher_dtype), 0

    @property
    def _largest_layer(self) -> int:
        return max(map(math.prod, self.teacher.shapes.values()))

    def _widened(self, dtype: str) -> int:
        """Bytes of the 16-bit copy of the largest layer; quantised weights are widened one layer at a time."""
        if dtype in QUANTISED:
            return 2 * max(math.prod(shape) for name, shape in self.teacher.shapes.items() if is_linear(name, shape))
        return 2 * self._largest_layer if dtype == "fp8" else 0

    def _in_update(self, settings: MemorySettings) -> Counter:
        works = update_bytes(self.trained_shapes, settings.training) // (settings.num_processes if settings.shards else 1)
        return Counter({"gradients": self._gradients(settings), "working memory": works})

    def _in_teacher_pass(self, settings: MemorySettings, latent_shape: LatentShape) -> Counter:
        _, comes = self._teacher_weights(settings)
        adding_up = self._gradients(settings) if settings.training.accumulation_steps > 1 else 0
        widened = self._widened(settings.teacher_dtype)
        activations, _ = self._teacher_pass(settings.micro_batch, computes(settings.teacher_dtype), latent_shape)
        return activations + Counter({"teacher weights": comes, "gradients": adding_up, "teacher activations": widened})

    def _in_student_pass(self, settings: MemorySettings, latent_shape: LatentShape) -> tuple[Counter, Counter]:
        """At its worst, and between forward and backward."""
        walked = MemorySettings(training=_of_passes(settings.training), teacher_dtype=computes(settings.teacher_dtype), device=settings.device,
                                num_processes=settings.num_processes, shares_base=settings.shares_base)  # fmt: skip
        most, between = map(Counter.copy, self._student_pass(walked, latent_shape))
        if settings.student_dtype in QUANTISED:  # widened again for the backward pass
            most["working memory"] += self._widened(settings.student_dtype)
        if settings.student_dtype == "fp8":  # backward keeps the widened weights of every layer
            for moment in (most, between):
                moment["half-precision weights"] += DTYPES["bf16"].itemsize * self.student.num_parameters
        if settings.shards:
            most["gradients"] //= settings.num_processes
            most["working memory"] += 4 * _num_gathered(self._unfilled_student(settings.training, settings.training.weight_dtype))
        return most, between

    # --- simulated passes

    def _unfilled_student(self, training: TrainingSettings, dtype: str) -> Denoiser:
        network = _unfilled(self.student, dtype)
        trained(network, training, self.plan)
        return network

    def _walk_teacher(self, micro_batch: int, dtype: str, latent_shape: LatentShape) -> tuple[Counter, Outputs | None]:
        if not self.uses_teacher:
            return Counter(), None
        network = _unfilled(self.teacher, dtype)
        with without_contents(self.mode):
            inputs = inputs_of(network, latent_shape, self.num_tokens, micro_batch)
            return teacher_pass(emptied(network), self.layers, inputs, guided=self.guided)

    def _walk_student(self, settings: MemorySettings, latent_shape: LatentShape) -> tuple[Counter, Counter]:
        _, from_teacher = self._teacher_pass(settings.micro_batch, settings.teacher_dtype, latent_shape)
        network = self._unfilled_student(settings.training, settings.student_dtype)
        with without_contents(self.mode):
            inputs = inputs_of(network, latent_shape, self.num_tokens, settings.micro_batch)
            network = emptied(network)
            if settings.device != "cpu":
                norms_as_on_cuda(network.network)
            return student_pass(network, self.layers, inputs, from_teacher, settings.training)


def _unfilled(architecture: Architecture, dtype: str) -> Denoiser:
    """A diffusers network on the meta device."""
    with torch.device("meta"):
        network = build_unet(architecture)
    nn.Module.to(network, DTYPES[dtype])  # diffusers' own `to` warns
    return DiffusersDenoiser(network=network, architecture=architecture)


def _trained_shapes(student: Architecture, training: TrainingSettings) -> list[torch.Size]:
    if not training.lora_rank:
        return [torch.Size(shape) for shape in student.shapes.values()]
    from ..lora.layers import trained_shapes  # needs peft

    return trained_shapes(_unfilled(student, "fp32"), training.lora_rank, training.lora_targets, training.lora_dora)


def _num_gathered(student: Denoiser) -> int:
    """Largest number of gathered weights of a sharded student: two blocks (one computes, one loads) and all outside blocks."""
    blocks = [sum(weight.numel() for weight in student.module(name).parameters()) for name in student.inner_blocks]
    return 2 * max(blocks) + sum(weight.numel() for weight in student.network.parameters()) - sum(blocks)


# --- one simulated step ---------------------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """While open, counts the bytes of new tensors by kind: ``alive`` now, and ``most`` at the peak.

    Each storage counts once. weights: not counted; their half-precision copies are a kind of their own.
    """

    def __init__(self, weights: Iterable[Tensor] = (), kind: str = "working memory"):
        """kind: kind of every tensor that is not marked otherwise."""
        super().__init__()
        self.alive: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.kind = kind
        self._entries: dict[int, Part] = {}
        self._weights = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        copies = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage(), "half-precision weights" if copies else self.kind)
        return result

    def mark(self, kind: str, *tensors: Tensor) -> None:
        """Set the kind of tensors; weights, and tensors marked before, keep theirs."""
        for key in (tensor.untyped_storage()._cdata for tensor in tensors):
            if key in self._entries and self._entries[key].name == self.kind:
                self._entries[key] = Part(kind, self._leave(key))
                self.alive[kind] += self._entries[key].num_bytes

    def keeping(self) -> torch.autograd.graph.saved_tensors_hooks:
        """While open, marks the tensors that autograd saves for backward."""

        def keep(tensor: Tensor) -> Tensor:
            self.mark("kept activations", tensor)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def _enter(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        if key in self._entries or key in self._weights:
            return
        self._entries[key] = Part(kind, storage.nbytes())
        self.alive[kind] += storage.nbytes()
        weakref.finalize(storage, self._leave, key)
        if self.alive.total() > self.most.total():
            self.most = self.alive.copy()

    def _leave(self, key: int) -> int:
        kind, num_bytes = self._entries.pop(key)
        self.alive[kind] -= num_bytes
        return num_bytes


@contextlib.contextmanager
def without_contents(mode: FakeTensorMode) -> Iterator[None]:
    """While open, new tensors are fake, and attention is fused even if the process has turned that off."""
    with mode, sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        yield


def emptied(denoiser: AnyDenoiser) -> AnyDenoiser:
    """The denoiser itself, with its weights replaced by fake tensors."""
    for module in denoiser.network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad))
    return denoiser


def norms_as_on_cuda(network: nn.Module) -> None:
    """Make norms compute in float32 under autocast, as on CUDA but not on a CPU."""

    def in_float32(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return forward(x)
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())

    norms: list[nn.Module] = [module for module in network.modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))]
    for norm in norms:
        norm.forward = partial(in_float32, norm.forward)


def inputs_of(denoiser: Denoiser, latent_shape: LatentShape, num_tokens: int, micro_batch: int) -> StepInputs:
    """Inputs for a denoiser, all zero."""
    _, height, width = latent_shape
    dtype, label_width = next(denoiser.network.parameters()).dtype, denoiser.architecture.label_width
    context_width = denoiser.architecture.context_width
    assert context_width is not None  # else it could not be built
    x_t = torch.zeros(micro_batch, *latent_shape, dtype=dtype)
    context = torch.zeros(micro_batch, num_tokens, context_width, dtype=dtype)
    label = Label.neutral(label_width, micro_batch, (8 * height, 8 * width), x_t) if label_width else None
    return x_t, torch.zeros(micro_batch, dtype=torch.long), context, label


def taught(teacher: Denoiser, layers: Mapping[str, str], inputs: StepInputs, *, guided: bool = False) -> Outputs:
    """A teacher's outputs for inputs. guided: whether it predicts a second time, for the empty caption."""
    _, _, context, label = inputs
    null = Caption(context[0], None if label is None else label.pooled[0]) if guided else None
    with tap(teacher, layers) as features:
        return teacher_outputs(teacher, features, inputs, layers, teacher, null=null, scale=2.0 if guided else 1.0)


def student_loss(
    student: Denoiser,
    layers: Mapping[str, str],
    inputs: StepInputs,
    training: TrainingSettings,
    features: dict[str, Tensor],
    from_teacher: Outputs | None,
) -> Tensor:
    """The student's forward pass and its loss. features: its tapped features. from_teacher: the teacher's outputs, if any."""
    autocast = torch.autocast("cpu", DTYPES[training.compute_dtype], enabled=training.compute_dtype != "fp32")
    outputs = student_outputs(student, features, inputs, layers, autocast)
    target = torch.zeros_like(inputs[0], dtype=torch.float32)
    terms = training.weighted_objective.terms(target, outputs, from_teacher)
    if training.weighted_objective.consistency:
        terms["consistency"] = pseudo_huber_loss(outputs.prediction, target)
    if training.weighted_objective.dmd:
        terms["dmd"] = matching_loss(outputs.prediction, target, target)
    return training.weighted_objective.total(terms).mean()


def teacher_pass(
    teacher: Denoiser, layers: Mapping[str, str], inputs: StepInputs, *, guided: bool = False
) -> tuple[Counter, Outputs]:
    """Peak bytes of a teacher's forward pass, and its outputs; guided as for `taught`."""
    with Ledger(teacher.network.parameters(), "teacher activations") as ledger:
        outputs = taught(teacher, layers, inputs, guided=guided)
        return ledger.most, outputs


def student_pass(
    student: Denoiser, layers: Mapping[str, str], inputs: StepInputs, from_teacher: Outputs | None, training: TrainingSettings
) -> tuple[Counter, Counter]:
    """Peak bytes of a student's forward and backward pass, including the teacher's outputs; and bytes between both."""
    student.network.train()
    with contextlib.ExitStack() as stack:
        if training.gradient_checkpointing:
            stack.enter_context(checkpointing(student))
        features = stack.enter_context(tap(student, layers.values()))
        ledger = stack.enter_context(Ledger(student.network.parameters()))
        if from_teacher:
            from_teacher = Outputs(*tree_map(torch.empty_like, tuple(from_teacher)))
            ledger.mark("teacher features", *tree_leaves(from_teacher))
        for weight in (weight for weight in student.network.parameters() if weight.requires_grad):
            if training.accumulation_steps > 1:
                weight.grad = torch.zeros_like(weight)
                ledger.mark("gradients", weight.grad)
            weight.register_post_accumulate_grad_hook(lambda weight: ledger.mark("gradients", weight.grad))
        with ledger.keeping():
            loss = student_loss(student, layers, inputs, training, features, from_teacher)
        del from_teacher
        between = ledger.alive.copy()
        loss.backward()
        return ledger.most, between
