"""What pruning gains on one's own machine: time, memory and training speed of networks of true shape with random weights.

Nothing is loaded or downloaded: the cost of a network does not depend on its weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from ..base.image_grid import stacked
from ..base.precision import DTYPES, PRECISIONS
from ..base.settings import SIDE_PX, check_settings, setting
from ..base.sizes import GIB, gib
from ..data.dataset import LatentDataset
from ..diffusion.denoiser import DiffusersDenoiser
from ..networks.architecture import Architecture
from ..pruning.plan import PruningPlan, name_map, preset, preset_names, pruned
from ..training.memory import RESERVE, Forecast, MemorySettings, forecast, free_bytes
from ..training.settings import TrainingSettings
from ..training.teachers import Teachers
from . import plots
from .catalog import LATENT_SHAPES, NUM_TOKENS, TEACHER_CONFIGS, macs_of, published_teacher
from .measuring import device_words, in_rounds, peak_of, seconds_of
from .trial import WARM_UPS, random_data, random_denoiser, training_cost

if TYPE_CHECKING:
    from PIL.Image import Image

TEACHER = "full model"
LONG_RUN = 10_000  # steps of the run whose duration is told


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and how."""

    family: str = setting("sd1", "Family of the models.", choices=TEACHER_CONFIGS)
    presets: tuple[str, ...] = setting((), "Presets to measure; empty for all of the family.")
    size_px: int | None = setting(
        None, "Side of the images, in pixels.", unset="512 for sd1 and sd2, 1024 for sdxl", within=(64, SIDE_PX[1])
    )
    batch_size: int = setting(1, "Images at once, in sampling and in training.", within=(1, 4096))
    num_rounds: int = setting(5, "Timed rounds; the full model and the pruned one take turns.", within=(1, 10_000))
    sampler_steps: int = setting(25, "Sampling steps of an image, each with guidance.", within=(1, 1000))
    dtype: str | None = setting(None, "Precision.", unset="fp16 on a GPU, fp32 on a CPU", choices=PRECISIONS)
    train: bool = setting(True, "Measure training, too.")

    def __post_init__(self):
        check_settings(self)
        if self.size_px is not None and self.size_px % 64:
            raise ValueError(f"size_px must be a multiple of 64, got {self.size_px}")
        for name in self.presets:
            if preset(name).teacher != self.family:
                raise ValueError(f"{name} is a preset for {preset(name).teacher}, not for {self.family}")

    @property
    def chosen(self) -> tuple[str, ...]:
        return self.presets or tuple(preset_names(self.family))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        channels, height, width = LATENT_SHAPES[self.family]
        return (channels, height, width) if self.size_px is None else (channels, self.size_px // 8, self.size_px // 8)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network. Ratios are over the full model, measured in the same rounds."""

    name: str
    parameters: int
    gmacs: float
    ms_per_step: float
    """A sampling step with guidance."""
    time_of_full: float
    """Its time per step over the full model's."""
    seconds_per_image: float
    sampling_bytes: int
    """Peak memory of a sampling step, including the weights."""
    training: TrainingRow | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """Distilling the network from the full model."""

    forecast_bytes: int
    peak_bytes: int | None = None
    """Measured peak; None where it was not measured."""
    steps_per_second: float | None = None
    left_out: str = ""
    """Why it was not measured."""

    @property
    def hours(self) -> float | None:
        """Duration of a run of `LONG_RUN` steps."""
        return None if not self.steps_per_second else LONG_RUN / self.steps_per_second / 3600


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All rows, the full model first, and how they were measured."""

    rows: tuple[Row, ...]
    settings: dict[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the table; those of training only where it was measured."""
        return (*SAMPLING_COLUMNS, *(TRAINING_COLUMNS if any(row.training for row in self.rows) else ()))

    @property
    def meanings(self) -> dict[str, str]:
        """What the columns say that need a word."""
        return {name: words for name, words in MEANINGS.items() if name in self.columns}

    def cells(self) -> list[list[str]]:
        """Cell texts of the table for `columns`."""
        return [_cells(row)[: len(self.columns)] for row in self.rows]

    def facts(self) -> dict[str, Any]:
        """All figures, for scripts."""
        rows = [
            asdict(row) | ({"training": asdict(row.training) | {"hours": row.training.hours}} if row.training else {})
            for row in self.rows
        ]
        return {"rows": rows, "settings": self.settings}


SAMPLING_COLUMNS = ("network", "parameters", "GMACs", "ms per step", "s per image", "sampling")
TRAINING_COLUMNS = ("training", "steps per s", "10,000 steps")
MEANINGS = {
    "ms per step": "median time of a sampling step with guidance (two predictions); in brackets, of the full model's, timed in turn.",
    "sampling": "peak memory of such a step, including the weights. On a CPU: of all tensors.",
    "training": "peak memory of a training step, and in brackets the forecast that nodes and distill train show; no room: the "
    "forecast exceeds the free memory, so it was not measured.",
    "10,000 steps": "how long a run of 10,000 such training steps takes.",
}


def _cells(row: Row) -> list[str]:
    trained = row.training
    if trained is None:
        training = ["", "", ""]
    elif trained.peak_bytes is None:
        training = [f"({gib(trained.forecast_bytes)})", "no room", ""]
    else:
        assert trained.steps_per_second and trained.hours
        training = [
            f"{gib(trained.peak_bytes)} ({gib(trained.forecast_bytes)})",
            f"{trained.steps_per_second:.3g}",
            f"{trained.hours:.1f} h",
        ]
    share = "" if row.name == TEACHER else f" ({row.time_of_full:.0%})"
    return [
        row.name, f"{row.parameters / 1e6:,.0f} M", f"{row.gmacs:,.0f}", f"{row.ms_per_step:,.0f}{share}", f"{row.seconds_per_image:.2f}",
        gib(row.sampling_bytes), *training,
    ]  # fmt: skip


def device_of_choice() -> torch.device:
    """CUDA (or ROCm) if there is one, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class _Networks:
    """Random networks of a family, one device, one precision."""

    def __init__(self, settings: Settings, device: torch.device):
        self.settings, self.device = settings, device
        self.dtype = settings.dtype or ("fp32" if device.type == "cpu" else "fp16")
        self.teacher = published_teacher(settings.family)

    def architecture(self, plan: PruningPlan | None) -> Architecture:
        return self.teacher if plan is None else pruned(self.teacher, name_map(self.teacher, plan))

    def build(self, plan: PruningPlan | None, dtype: str) -> DiffusersDenoiser:
        return random_denoiser(self.architecture(plan), self.device, dtype)

    @cached_property
    def data(self) -> LatentDataset:
        """Random examples of the size asked for."""
        _, height, width = self.settings.latent_shape
        return random_data(self.teacher, self.settings.batch_size, (8 * height, 8 * width), NUM_TOKENS, seed=0)

    def step(self, network: DiffusersDenoiser) -> Callable[[], Any]:
        """A sampling step with guidance: conditional and unconditional predictions in one batch."""
        examples = self.data.read(0, torch.arange(self.settings.batch_size).repeat(2))
        x, context = (tensor.to(self.device, DTYPES[self.dtype]) for tensor in (examples.latents, examples.contexts))
        label = examples.label and examples.label.to(context)
        t = torch.full((len(x),), 500, device=self.device)
        return torch.no_grad()(partial(network, x, t, context, label))


def chart(measured: Bench) -> Image:
    """Bars of each network: time of a sampling step, peak memory of sampling and of training."""
    drawing = plots.figure(plots.CHART_WIDTH_IN, 1.6 + 0.4 * len(measured.rows))
    times, memory = drawing.subplots(1, 2, sharey=True)
    names = [plots.plain(row.name) for row in measured.rows]
    places = range(len(names))
    bars = times.barh(places, [row.ms_per_step for row in measured.rows], color=plots.KEPT_COLOR)
    times.bar_label(bars, [f"{row.ms_per_step:,.0f} ({row.time_of_full:.0%})" for row in measured.rows], padding=3, fontsize=9)
    times.set(yticks=list(places), yticklabels=names, xlabel="ms per sampling step")
    times.margins(x=0.4)
    times.invert_yaxis()
    sampled = [row.sampling_bytes / GIB for row in measured.rows]
    trained = [(row.training.peak_bytes or row.training.forecast_bytes) / GIB if row.training else 0.0 for row in measured.rows]
    memory.barh([place - 0.2 for place in places], sampled, 0.38, color=plots.KEPT_COLOR, label="sampling")
    if any(trained):
        memory.barh([place + 0.2 for place in places], trained, 0.38, color=plots.REMOVED_COLOR, label="training")
        memory.legend(loc="best", framealpha=0.9)
    memory.set(xlabel="peak memory (GiB)")
    drawing.suptitle(
        plots.plain(f"{measured.settings['family']} on {measured.settings['device']}, {measured.settings['precision']}"),
        fontsize=11,
    )
    return plots.to_image(drawing)


def summary_image(measured: Bench) -> Image:
    """The table, and the chart below it."""
    return stacked([plots.table_image(measured.columns, measured.cells()), chart(measured)])


def quick(settings: Settings) -> Settings:
    """Settings that take about a minute: the preset of fewest parameters, two rounds, and small images on a CPU."""
    size_px = 128 if settings.size_px is None and device_of_choice().type == "cpu" else settings.size_px
    teacher = published_teacher(settings.family)
    smallest = min(settings.chosen, key=lambda name: pruned(teacher, name_map(teacher, preset(name))).num_parameters)
    return replace(settings, presets=(smallest,), num_rounds=min(2, settings.num_rounds), size_px=size_px)


def work(settings: Settings) -> int:
    """Number of steps of a bench, for a progress bar: building networks counts as one."""
    return len(settings.chosen) * (1 + settings.num_rounds) * (1 + settings.train)


OnStep = Callable[[str, int], None]


def bench(settings: Settings, on_step: OnStep = lambda what, count: None, device: torch.device | None = None) -> Bench:
    """Measure the full model of a family and its presets.

    on_step: called with what is measured and the number of steps just done, `work` in all. device: `device_of_choice` if None.

    The full model and one preset are on the device at a time. A training step is measured only if its forecast fits into
    the free memory.
    """
    networks = _Networks(settings, device or device_of_choice())
    teacher = networks.build(None, networks.dtype)
    rows: list[Row] = []
    full: list[Row] = []
    for name in settings.chosen:
        pair = {TEACHER: teacher, name: networks.build(preset(name), networks.dtype)}
        of_teacher, of_student = _sampling(networks, pair, partial(on_step, f"{name}, sampling"))
        if settings.train:
            of_student = _with_training(networks, pair, of_student, partial(on_step, f"{name}, training"))
        full.append(of_teacher)
        rows.append(of_student)
    return Bench(rows=(_of_all(full), *rows), settings=_words(networks))


def _of_all(rows: Sequence[Row]) -> Row:
    """The full model, which was measured beside every preset."""
    ms = statistics.median(row.ms_per_step for row in rows)
    return replace(rows[0], ms_per_step=ms, seconds_per_image=ms * rows[0].seconds_per_image / rows[0].ms_per_step)


def _words(networks: _Networks) -> dict[str, str]:
    settings = networks.settings
    _, height, width = settings.latent_shape
    return {
        "device": device_words(networks.device),
        "torch": torch.__version__,
        "family": settings.family,
        "precision": networks.dtype,
        "images": f"{8 * width} x {8 * height} px, {settings.batch_size} at once; an image is {settings.sampler_steps} steps with guidance, "
        "without text encoders and VAE",
        "time": f"median of {settings.num_rounds} rounds",
        "weights": "random",
    }


def _sampling(networks: _Networks, pair: Mapping[str, DiffusersDenoiser], on_steps: Callable[[int], None]) -> tuple[Row, Row]:
    """The full model and a preset, sampled in turn."""
    steps = {called: networks.step(network) for called, network in pair.items()}
    peaks = {
        called: peak_of(step, list(pair[called].network.parameters()), networks.device, WARM_UPS)
        for called, step in steps.items()
    }
    on_steps(1)
    settings = networks.settings

    def timed(called: str) -> float:
        seconds = seconds_of(steps[called], networks.device)
        on_steps(called != TEACHER)  # a round ends with the pruned network
        return seconds

    seconds = in_rounds([partial(timed, called) for called in pair], settings.num_rounds)
    rows = []
    for (called, denoiser), of_a_step in zip(pair.items(), seconds, strict=True):
        rows.append(
            Row(
                name=called,
                parameters=denoiser.architecture.num_parameters,
                gmacs=macs_of(denoiser.architecture, settings.latent_shape) / 1e9,
                ms_per_step=1000 * of_a_step,
                time_of_full=of_a_step / seconds[0],
                seconds_per_image=of_a_step * settings.sampler_steps / settings.batch_size,
                sampling_bytes=peaks[called],
            )
        )
    return rows[0], rows[1]


def training_settings(settings: Settings, device: torch.device) -> TrainingSettings:
    """What is trained: the published losses, as the workflows for one's own checkpoint train them."""
    on_gpu = device.type != "cpu"
    return TrainingSettings(
        total_steps=1 + WARM_UPS + settings.num_rounds,
        objective="ssd-1b" if settings.family == "sdxl" else "bk-sdm",
        batch_size=settings.batch_size,
        caption_dropout=0.0,
        precision="bf16" if on_gpu else "fp32",
        gradient_checkpointing=on_gpu,
    )


def _forecast(networks: _Networks, plan: PruningPlan, training: TrainingSettings) -> Forecast:
    return forecast(
        teacher=networks.teacher,
        student=networks.architecture(plan),
        plan=plan,
        latent_shape=networks.settings.latent_shape,
        num_tokens=NUM_TOKENS,
        settings=MemorySettings(training=training, teacher_dtype=networks.dtype, device=networks.device.type),
    )


def _with_training(networks: _Networks, pair: dict[str, DiffusersDenoiser], row: Row, on_steps: Callable[[int], None]) -> Row:
    """A row with its training measured, if the device has room for it. The student is taken out of ``pair``."""
    plan, training = preset(row.name), training_settings(networks.settings, networks.device)
    needed, free = _forecast(networks, plan, training).total_bytes, free_bytes(networks.device)
    if free is not None:
        free += sum(weight.nbytes for denoiser in pair.values() for weight in denoiser.network.parameters())  # trained, too
        if needed > (1 - RESERVE) * free:
            on_steps(1 + networks.settings.num_rounds)
            return replace(row, training=TrainingRow(forecast_bytes=needed, left_out=f"only {gib(free)} free"))
    student = pair.pop(row.name)
    if training.weight_dtype != networks.dtype:
        del student
        student = networks.build(plan, training.weight_dtype)
    cost = training_cost(
        training,
        student=student,
        teachers=Teachers.single(pair[TEACHER], training),
        plan=plan,
        data=networks.data,
        on_step=partial(on_steps, 1),
    )
    measured = TrainingRow(
        forecast_bytes=needed, peak_bytes=cost.peak_bytes, steps_per_second=1 / statistics.median(cost.seconds)
    )
    return replace(row, training=measured)
