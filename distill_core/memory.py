"""The memory a run needs on its device, part by part, before its first step; and what to change if that is too much.

One step is walked through with tensors that have a shape and no contents (torch's fake tensors), and every tensor is
counted from when it is made until it is freed. Memory peaks at one of three moments, and the forecast tells the worst:

- the teacher's forward pass: its activations, which live only until the next layers have read them;
- the student's forward and backward pass: what is kept for backward, the gradients that come as it goes, and what an
  operation, or a block computed again, needs while it runs;
- the update: all gradients, and what the optimiser works with.

Weights, the optimiser's state and the moving average are there at all three, and so are gradients where several
micro-batches add up. Leave a reserve for what is not counted: what the driver keeps for itself, and the workspace that
convolutions borrow.

No GPU is needed, and no weight is read: networks are built by diffusers without weights, and the step runs as if on a CPU.
Two things are made to count as on a GPU: under autocast norms compute in float32, and attention is always the fused one,
which keeps its inputs, its output and one number for each row.
"""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .architecture import Architecture
from .denoiser import Denoiser, DiffusersDenoiser, Label, checkpointing, tap
from .guidance import combined
from .objective import Outputs
from .optim import OPTIMIZERS
from .plan import NameMap, PruningPlan, name_map
from .quantised import QUANTISED, computes, is_linear, kept_bytes
from .recipe import DTYPES, Recipe
from .trained import trained
from .unet import build_unet

GIB = 2**30
RESERVE = 0.05
"""Share of the free memory that is left for what is not counted."""
LatentShape = tuple[int, int, int]


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that is free, or held by torch for the next tensors; None where nobody tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and find_spec("psutil"):
        import psutil

        return psutil.virtual_memory().available
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):  # not so on Windows and macOS
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def gib(num_bytes: int) -> str:
    """``1.50 GiB``."""
    return f"{num_bytes / GIB:.2f} GiB"


# --- optimisers -----------------------------------------------------------------------------------------------------


def _adafactor(shape: torch.Size) -> int:
    """A factor for each row and each column of the last two dimensions, for each entry of the others."""
    n = shape.numel()
    return 4 * (n // shape[-1] + n // shape[-2] if len(shape) > 1 else n) + 4


def _adamw8bit(shape: torch.Size) -> int:
    """Two moments of one byte, with a float32 scale for each block of 256; tensors below 4096 entries keep float32."""
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
"""What an optimiser keeps of a tensor from step to step, by its name. Float32, whatever the weights are."""
_COPY_ALL = {"adamw", "schedulefree"}
"""Optimisers that work on all tensors at once, with a temporary copy of each."""


def update_bytes(shapes: Iterable[torch.Size], recipe: Recipe) -> int:
    """What the update works with besides weights, gradients and the optimiser's state."""
    sizes = [4 * shape.numel() for shape in shapes]
    if recipe.rounds:  # a tensor and its gradient in float32, and four as large to round it by chance
        return 6 * max(sizes)
    return sum(sizes) if recipe.optimizer in _COPY_ALL else 2 * max(sizes)


# --- settings, and what to change -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What decides how much memory a run needs, besides its networks and the size of its examples."""

    recipe: Recipe
    teacher_dtype: str = "fp32"
    """What teachers are kept and compute in, a key of `recipe.DTYPES` or one of `quantised.QUANTISED`; kept in 8 bits or 4, they
    compute in 16."""
    teacher_offloaded: bool = False
    """Whether a layer of a teacher is on the device only while it computes."""
    shares_base: bool = False
    """Whether the student is its teacher with a LoRA on it: weights are there once, kept and computing as the teacher's."""
    num_teachers: int = 1
    """A mixture has all of them on the device, a sequence one."""
    num_processes: int = 1
    """Processes that share each batch, each with a device of its own."""
    shards: bool = False
    """Whether each of them holds a part of the student alone."""
    device: str = "cuda"
    """Type of device: ``cpu`` counts as its autocast does, any other as CUDA's."""

    @property
    def student_dtype(self) -> str:
        """What the student's weights are kept in, as ``teacher_dtype``; a LoRA on them is float32."""
        return self.teacher_dtype if self.shares_base else self.recipe.weight_dtype

    @property
    def micro_batch(self) -> int:
        """Examples at once on the device."""
        return self.recipe.batch_size // self.recipe.accumulation_steps // self.num_processes

    def with_recipe(self, **changes) -> MemorySettings:
        """The same with other settings of the recipe."""
        return replace(self, recipe=replace(self.recipe, **changes))


class Change(NamedTuple):
    """One way to need less memory."""

    what: str
    """Setting and value."""
    price: str
    """What else it does; may be empty."""
    settings: MemorySettings
    """All settings with it."""
    smaller: bool = False
    """Whether it is the size of the pictures that changes, and no setting."""

    def __str__(self) -> str:
        return f"{self.what} ({self.price})" if self.price else self.what


def changes(now: MemorySettings, *, of_teacher: bool = True) -> Iterator[Change]:
    """What may save memory, the least harmful first, less what is in use. of_teacher: also how teachers are kept."""
    recipe, with_recipe = now.recipe, now.with_recipe
    if not recipe.gradient_checkpointing:
        yield Change("gradient_checkpointing on", "a third more time", with_recipe(gradient_checkpointing=True))
    if (whole := now.micro_batch) > 1:
        part = max(n for n in range(1, whole) if whole % n == 0)
        steps = recipe.accumulation_steps * (whole // part)
        price = f"{part} of a batch at once instead of {whole}, the same result"
        yield Change(f"accumulation_steps {steps}", price, with_recipe(accumulation_steps=steps))
    if recipe.compute_dtype == "fp32":
        yield Change("precision bf16", "", with_recipe(precision="bf16"))
    if of_teacher and recipe.aim.uses_teacher:
        for dtype, price in {"fp16": "", "fp8": "its answers are a little coarser"}.items():
            if now.teacher_dtype not in QUANTISED and DTYPES[dtype].itemsize < DTYPES[now.teacher_dtype].itemsize:
                yield Change(f"teacher in {dtype}", price, replace(now, teacher_dtype=dtype))
        may_wait = now.teacher_dtype not in QUANTISED and not now.shares_base and now.device != "cpu"
        if may_wait and not now.teacher_offloaded:
            yield Change("teacher offloaded", "each step waits for it", replace(now, teacher_offloaded=True))
    for optimizer, price in {"adamw8bit": "", "adafactor": "it has no momentum"}.items():
        if _state_of_a_layer(optimizer) < _state_of_a_layer(recipe.optimizer) and not now.shards:
            yield Change(f"optimizer {optimizer}", price, with_recipe(optimizer=optimizer))
    may_round = OPTIMIZERS[recipe.optimizer].one_by_one or recipe.lora_rank
    if recipe.weight_dtype == "fp32" and may_round and not now.shards and not now.shares_base:
        price = "" if recipe.lora_rank else "updates are coarser"
        yield Change("weight_dtype bf16", price, with_recipe(weight_dtype="bf16", precision="bf16"))
    if recipe.ema_decay:
        yield Change("ema_decay 0", "no moving average", with_recipe(ema_decay=0.0))
    yield Change("smaller pictures", "", now, smaller=True)


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
    "moving average",
    "kept activations",
    "working memory",
)
"""Names of the parts. Features: the teacher's outputs that losses compare. Half-precision weights: copies that autocast
makes. Kept: by the student, for its backward pass. Working memory: what the rest of the moment needs."""


class Part(NamedTuple):
    """One line of a forecast."""

    name: str
    """One of `PARTS`."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is on the device at the moment of a step that needs the most memory."""

    moment: str
    parts: tuple[Part, ...]
    """Every one of `PARTS`, also those of 0 bytes."""
    settings: MemorySettings
    latent_shape: LatentShape
    """(channels, height, width) of the largest examples."""
    again: Callable[..., Forecast] = field(repr=False, compare=False)
    """``again(settings, latent_shape)``: the same run with other settings, on examples of another size; ``enough=`` spares
    the look at the rest of a step where the update alone needs more."""

    @property
    def total_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def describe(self) -> str:
        """A table in GiB, one part a line, and their total."""
        lines = [part for part in self.parts if part.num_bytes] + [Part("total", self.total_bytes)]
        table = [f"  {name:<23}{gib(num_bytes):>12}" for name, num_bytes in lines]
        return "\n".join([f"The most memory is needed in {self.moment}:", *table])

    def describe_shortage(self, free_bytes: int | None, *, of_teacher: bool = True) -> str:
        """Advice where a step needs more than is free, less a reserve; empty where it fits or nobody knows what is free."""
        if free_bytes is None or not (lines := self.advice(int((1 - RESERVE) * free_bytes), of_teacher=of_teacher)):
            return ""
        title = f"A step needs about {gib(self.total_bytes)}, but {gib(free_bytes)} are free. What helps, in this order:"
        return "\n".join([title, *(f"  {line}" for line in lines)])

    def advice(self, free_bytes: int, *, of_teacher: bool = True) -> list[str]:
        """What to change until a step fits into ``free_bytes``, each with what it saves after the ones before it.

        Each is the least harmful change that still saves a hundredth. Empty if the step fits; a last line says so if no
        change can make it fit. of_teacher: as in `changes`.
        """
        lines, now = [], self
        while (missing := now.total_bytes - free_bytes) > 0:
            enough = 0.99 * now.total_bytes
            tried = ((change, now._with(change, enough)) for change in changes(now.settings, of_teacher=of_teacher))
            change, then = next((pair for pair in tried if pair[1].total_bytes <= enough), (None, now))
            if change is None:
                return [*lines, f"even so {gib(missing)} are missing: prune the student more, or take another device"]
            sides = f" ({_px(then.latent_shape)} instead of {_px(now.latent_shape)})" if change.smaller else ""
            lines.append(f"{change}{sides}: saves {gib(now.total_bytes - then.total_bytes)}")
            now = then
        return lines

    def _with(self, change: Change, enough: float) -> Forecast:
        latent_shape = _smaller(self.latent_shape) if change.smaller else self.latent_shape
        return self.again(change.settings, latent_shape, enough=enough)


def _smaller(shape: LatentShape) -> LatentShape:
    """Three quarters of each side, as far as a UNet can halve it three times; the shape itself if it is small already."""
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
    """Forecast a run's memory. plan: as for `train.distill`. num_tokens: length of a caption's embedding."""
    return _Step(teacher, student, plan, num_tokens, settings.recipe).forecast(settings, latent_shape)


class _Step:
    """A step of a run between networks. What was walked through is remembered, for other settings that walk the same."""

    def __init__(self, teacher: Architecture, student: Architecture, plan: PruningPlan | None, num_tokens: int, recipe: Recipe):
        self.teacher, self.student, self.plan, self.num_tokens = teacher, student, plan, num_tokens
        self.taught, self.points = recipe.aim.uses_teacher, {}
        if self.taught:
            mapping = name_map(teacher, plan) if plan else NameMap.identity(teacher)
            self.points = recipe.aim.feature_points(teacher, student, mapping)
        self.guided = recipe.guidance != 1
        network = self._unfilled_student(recipe, recipe.weight_dtype).network
        self.trained_shapes = [weight.shape for weight in network.parameters() if weight.requires_grad]
        self.num_trained = sum(shape.numel() for shape in self.trained_shapes)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)  # one, so that the teacher's answer goes from pass to pass
        self._teachers_pass, self._students_pass = cache(self._walk_teacher), cache(self._walk_student)

    def forecast(self, settings: MemorySettings, latent_shape: LatentShape, enough: float = math.inf) -> Forecast:
        """enough: where the update alone needs more than that, nothing else is looked at."""
        always, update = self._always(settings), "the update of the weights"
        moments = {update: always + self._in_update(settings)}
        if moments[update].total() <= enough:
            moments["the teacher's forward pass"] = always + self._in_teachers_pass(settings, latent_shape)
            moments["the student's forward and backward pass"] = always + self._in_students_pass(settings, latent_shape)
        worst = max(moments, key=lambda moment: moments[moment].total())
        parts = tuple(Part(name, moments[worst][name]) for name in PARTS)
        return Forecast(moment=worst, parts=parts, settings=settings, latent_shape=latent_shape, again=self.forecast)

    # --- what is there, in bytes

    def _always(self, settings: MemorySettings) -> Counter:
        recipe, (teachers, _) = settings.recipe, self._teacher_weights(settings)
        of_lora = 4 * self.num_trained if recipe.lora_rank else 0
        share = settings.num_processes if settings.shards else 1
        return Counter({
            "teacher weights": teachers,
            "student weights": (kept_bytes(self.student.shapes, settings.student_dtype) + of_lora) // share,
            "gradients": self._gradients(settings) if settings.num_processes > share else 0,  # on their way between processes
            "optimizer": sum(map(STATE_BYTES[recipe.optimizer], self.trained_shapes)) // share,
            "moving average": 4 * self.num_trained // share if recipe.ema_decay else 0,
        })  # fmt: skip

    def _gradients(self, settings: MemorySettings) -> int:
        itemsize = DTYPES["bf16" if settings.recipe.rounds else "fp32"].itemsize
        return itemsize * self.num_trained // (settings.num_processes if settings.shards else 1)

    def _teacher_weights(self, settings: MemorySettings) -> tuple[int, int]:
        """Those that stay, and those that come for the teacher's pass alone."""
        if not self.taught or settings.shares_base:
            return 0, 0
        if settings.teacher_offloaded:  # one layer computes, the next is on its way
            return 0, 2 * DTYPES[settings.teacher_dtype].itemsize * self._largest_layer
        copies = settings.num_teachers if settings.recipe.teacher_mode == "mixture" else 1
        return copies * kept_bytes(self.teacher.shapes, settings.teacher_dtype), 0

    @property
    def _largest_layer(self) -> int:
        return max(map(math.prod, self.teacher.shapes.values()))

    def _widened(self, dtype: str) -> int:
        """A layer's weights in 16 bits, which there are of one at a time while it computes, where they are kept in fewer."""
        if dtype in QUANTISED:
            return 2 * max(math.prod(shape) for name, shape in self.teacher.shapes.items() if is_linear(name, shape))
        return 2 * self._largest_layer if dtype == "fp8" else 0

    def _in_update(self, settings: MemorySettings) -> Counter:
        works = update_bytes(self.trained_shapes, settings.recipe) // (settings.num_processes if settings.shards else 1)
        return Counter({"gradients": self._gradients(settings), "working memory": works})

    def _in_teachers_pass(self, settings: MemorySettings, latent_shape: LatentShape) -> Counter:
        _, comes = self._teacher_weights(settings)
        adding_up = self._gradients(settings) if settings.recipe.accumulation_steps > 1 else 0
        widened = self._widened(settings.teacher_dtype)
        activations, _ = self._teachers_pass(settings.micro_batch, computes(settings.teacher_dtype), latent_shape)
        return activations + Counter({"teacher weights": comes, "gradients": adding_up, "teacher activations": widened})

    def _in_students_pass(self, settings: MemorySettings, latent_shape: LatentShape) -> Counter:
        recipe = replace(settings.recipe, optimizer="adamw", ema_decay=0.0)
        walked = MemorySettings(recipe=recipe, teacher_dtype=computes(settings.teacher_dtype), device=settings.device,
                                num_processes=settings.num_processes, shares_base=settings.shares_base)  # fmt: skip
        most = self._students_pass(walked, latent_shape).copy()
        if settings.student_dtype in QUANTISED:  # widened again for the backward pass
            most["working memory"] += self._widened(settings.student_dtype)
        if settings.student_dtype == "fp8":  # backward keeps the widened weights of every layer
            most["half-precision weights"] += DTYPES["bf16"].itemsize * self.student.num_parameters
        if settings.shards:
            most["gradients"] //= settings.num_processes
            most["working memory"] += 4 * _num_gathered(self._unfilled_student(recipe, recipe.weight_dtype))
        return most

    # --- what is walked through

    def _unfilled_student(self, recipe: Recipe, dtype: str) -> Denoiser:
        network = _unfilled(self.student, dtype)
        trained(network, recipe, self.plan)
        return network

    def _walk_teacher(self, micro_batch: int, dtype: str, latent_shape: LatentShape) -> tuple[Counter, Outputs | None]:
        if not self.taught:
            return Counter(), None
        network = _unfilled(self.teacher, dtype)
        examples = 2 * micro_batch if self.guided else micro_batch
        with without_contents(self.mode):
            inputs = inputs_of(network, latent_shape, self.num_tokens, examples)
            return teachers_pass(emptied(network), self.points, inputs, guided=self.guided)

    def _walk_student(self, settings: MemorySettings, latent_shape: LatentShape) -> Counter:
        _, answer = self._teachers_pass(settings.micro_batch, settings.teacher_dtype, latent_shape)
        network = self._unfilled_student(settings.recipe, settings.student_dtype)
        with without_contents(self.mode):
            inputs = inputs_of(network, latent_shape, self.num_tokens, settings.micro_batch)
            network = emptied(network)
            if settings.device != "cpu":
                norms_as_on_cuda(network.network)
            return students_pass(network, self.points, inputs, answer, settings.recipe)


def _unfilled(architecture: Architecture, dtype: str) -> Denoiser:
    """A network of diffusers on the meta device."""
    with torch.device("meta"):
        network = build_unet(architecture)
    nn.Module.to(network, DTYPES[dtype])  # that of diffusers warns
    return DiffusersDenoiser(network=network, architecture=architecture)


def _num_gathered(student: Denoiser) -> int:
    """Most weights of a sharded student that are whole at once: two blocks, one computing and one coming, and what is in none."""
    blocks = [sum(weight.numel() for weight in student.module(name).parameters()) for name in student.inner_blocks]
    return 2 * max(blocks) + sum(weight.numel() for weight in student.network.parameters()) - sum(blocks)


# --- one step, without contents -------------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """While open, the bytes of the tensors that are made, by what they are: those alive, and the most there were at once.

    A storage counts once. weights: they are not counted; half-precision copies of them are a part of their own.
    """

    def __init__(self, weights: Iterable[Tensor] = (), kind: str = "working memory"):
        """kind: what a tensor counts as unless it is marked as something else."""
        super().__init__()
        self.alive, self.most = Counter(), Counter()
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
        """Say what tensors are; weights, and what has been marked before, stay what they are."""
        for key in (tensor.untyped_storage()._cdata for tensor in tensors):
            if key in self._entries and self._entries[key].name == self.kind:
                self._entries[key] = Part(kind, self._leave(key))
                self.alive[kind] += self._entries[key].num_bytes

    def keeping(self) -> torch.autograd.graph.saved_tensors_hooks:
        """While it is open, what is kept for backward is marked so."""

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
    """While open, tensors are made without contents, and attention is fused whatever the process has switched off."""
    with mode, sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        yield


def emptied(denoiser: Denoiser) -> Denoiser:
    """The denoiser itself, its weights replaced by such without contents."""
    for module in denoiser.network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad))
    return denoiser


def norms_as_on_cuda(network: nn.Module) -> None:
    """Let norms compute in float32 under autocast, which CUDA does and a CPU does not."""

    def in_float32(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return forward(x)
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())

    for module in network.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.forward = partial(in_float32, module.forward)


def inputs_of(denoiser: Denoiser, latent_shape: LatentShape, num_tokens: int, micro_batch: int) -> tuple:
    """What a denoiser is called with, of no particular values."""
    _, height, width = latent_shape
    dtype, label_width = next(denoiser.network.parameters()).dtype, denoiser.architecture.label_width
    x_t = torch.zeros(micro_batch, *latent_shape, dtype=dtype)
    context = torch.zeros(micro_batch, num_tokens, denoiser.architecture.context_width, dtype=dtype)
    label = Label.neutral(label_width, micro_batch, (8 * height, 8 * width), x_t) if label_width else None
    return x_t, torch.zeros(micro_batch, dtype=torch.long), context, label


def taught(teacher: Denoiser, inputs: tuple, points: Mapping[str, str], *, guided: bool = False) -> Outputs:
    """What a teacher answers, its features by the student's names. guided: to the first half of the inputs, by the second."""
    with tap(teacher, points) as features, torch.no_grad():
        prediction = teacher(*inputs).float()
        if guided:
            prediction = combined(*prediction.chunk(2), 1.0)
    return Outputs(prediction, {points[name]: feature for name, feature in features.items()})


def loss_of(student: Denoiser, inputs: tuple, recipe: Recipe, features: Mapping[str, Tensor], answer: Outputs | None) -> Tensor:
    """The student's forward pass and its loss. features: the student's, tapped. answer: the teacher's, if there is one."""
    with torch.autocast("cpu", DTYPES[recipe.compute_dtype], enabled=recipe.compute_dtype != "fp32"):
        prediction = student(*inputs)
    terms = recipe.aim.terms(torch.zeros_like(inputs[0], dtype=torch.float32), Outputs(prediction, features), answer)
    return recipe.aim.total(terms).mean()


def teachers_pass(
    teacher: Denoiser, points: Mapping[str, str], inputs: tuple, *, guided: bool = False
) -> tuple[Counter, Outputs]:
    """The most bytes at once of what a teacher makes, and what it answers; guided as for `taught`."""
    with Ledger(teacher.network.parameters(), "teacher activations") as ledger:
        answer = taught(teacher, inputs, points, guided=guided)
        return ledger.most, answer


def students_pass(student: Denoiser, points: Mapping[str, str], inputs: tuple, answer: Outputs | None, recipe: Recipe) -> Counter:
    """The most bytes at once of what a student's forward and backward pass makes, the teacher's answer included."""
    student.network.train()
    with contextlib.ExitStack() as stack:
        if recipe.gradient_checkpointing:
            stack.enter_context(checkpointing(student))
        features = stack.enter_context(tap(student, points.values()))
        ledger = stack.enter_context(Ledger(student.network.parameters()))
        if answer:
            answer = Outputs(*tree_map(torch.empty_like, tuple(answer)))
            ledger.mark("teacher features", *tree_leaves(answer))
        for weight in (weight for weight in student.network.parameters() if weight.requires_grad):
            if recipe.accumulation_steps > 1:
                weight.grad = torch.zeros_like(weight)
                ledger.mark("gradients", weight.grad)
            weight.register_post_accumulate_grad_hook(lambda weight: ledger.mark("gradients", weight.grad))
        with ledger.keeping():
            loss = loss_of(student, inputs, recipe, features, answer)
        features.clear()
        del answer
        loss.backward()
        return ledger.most
