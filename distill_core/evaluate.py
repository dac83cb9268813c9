"""What a model costs and how close its samples are to others."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dataset import Batch, Caption, Dataset, Drawing, draw
from .denoiser import Denoiser, Label
from .guidance import guided
from .objective import squared_error
from .schedule import restate

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

    from .router import Routed


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to feature rows (N, D) and (M, D) (Heusel et al. 2017, arXiv 1706.08500, Eq. 6).

    ``|mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))``, in float64.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"the Fréchet distance needs at least 2 samples on each side, got {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The eigenvalues of cov_a cov_b are real and not negative; rounding alone makes them otherwise.
    root_trace = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace
    return max(0.0, distance.item())


def feature_distances(real: Tensor, drawn: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Fréchet and kernel distance of feature rows (N, D) and (M, D), by torchmetrics.

    The Fréchet distance is that of `frechet_distance`. The kernel distance is the unbiased squared maximum mean discrepancy by
    a cubic kernel (Bińkowski et al. 2018, arXiv 1801.01401, Sec. 4), the mean over 100 subsets of at most 1,000 rows, which
    follow from the seed. ``ValueError`` for fewer than 2 rows, and without torchmetrics.
    """
    FrechetInceptionDistance, KernelInceptionDistance = distance_metrics(len(real), len(drawn))
    given = torch.nn.Identity()  # in place of Inception: what comes are features
    given.num_features = real.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        metrics = FrechetInceptionDistance(given), KernelInceptionDistance(given, subset_size=min(len(real), len(drawn), 1000))
    for metric in metrics:
        metric.update(real.cpu().float(), real=True)
        metric.update(drawn.cpu().float(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        frechet, (kernel, _) = (metric.compute() for metric in metrics)
    return frechet.item(), kernel.item()


def distance_metrics(num_real: int, num_drawn: int) -> tuple[type, type]:
    """What `feature_distances` of so many pictures is measured by; ``ValueError`` as there, before anything was computed."""
    if min(num_real, num_drawn) < 2:
        raise ValueError(f"distances need at least 2 pictures on each side, got {num_real} and {num_drawn}")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise ValueError("distances between pictures need a package: python -m pip install torchmetrics") from error
    return FrechetInceptionDistance, KernelInceptionDistance


def clip_score(pictures: Tensor, text: Tensor) -> float:
    """100 times the mean of ``max(cos, 0)`` of picture embeddings (N, D) and a text embedding (D,) (Hessel et al. 2021,
    arXiv 2104.08718, Eq. 1, which weighs it by 2.5 instead)."""
    cosines = torch.nn.functional.cosine_similarity(pictures.float(), text.float()[None], dim=1)
    return 100 * cosines.clamp(min=0).mean().item()


@torch.no_grad()
def output_error(
    student: Denoiser | Routed,
    teacher: Denoiser,
    dataset: Dataset,
    *,
    num_bins: int = 10,
    num_batches: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    guidance: float = 1.0,
    on_batch: Callable[[], Any] = lambda: None,
) -> Tensor:
    """How far a student's answers are from the teacher's, over timesteps: (num_bins,), the least noisy first, float64.

    The mean of ``(student(x_t) - teacher(x_t))^2`` over all elements, both stated in the student's prediction type: what
    the output loss is, unweighted. Bins are of as many timesteps each. In each the same ``num_batches * batch_size``
    examples of the dataset are noised by the same noise, at timesteps drawn evenly within the bin; all that follows from
    the seed, so that errors of several students by one seed are of the same inputs. guidance: scale the teacher answers by.
    ``on_batch`` is called after each batch.
    """
    size, errors = student.schedule.num_timesteps, []
    for i in range(num_bins):
        drawing = Drawing(batch_size, seed, within=(size * i // num_bins, size * (i + 1) // num_bins))
        batches = (draw(dataset, number, student.schedule, drawing) for number in range(num_batches))
        distances = []
        for batch in batches:
            distances.append(_distance(student, teacher, batch, dataset.null, guidance))
            on_batch()
        errors.append(torch.cat(distances).double().mean())
    return torch.stack(errors).cpu()


def _distance(student: Denoiser | Routed, teacher: Denoiser, batch: Batch, null: Caption | None, guidance: float) -> Tensor:
    """Squared distance of a student's answers to a batch from a guided teacher's, (B,)."""

    def answer(denoiser: Denoiser | Routed, scale: float) -> Tensor:
        x_t, context = (tensor.to(denoiser.device, denoiser.dtype) for tensor in (batch.x_t, batch.context))
        t, label = batch.t.to(denoiser.device), batch.label and batch.label.to(context)
        output = guided(denoiser, x_t, t, context, label, null, scale).cpu()
        return restate(output, batch.x_t, batch.t, student.schedule, denoiser.prediction, student.prediction)

    return squared_error(answer(student, 1.0), answer(teacher, guidance))


def count_macs(denoiser: Denoiser, latent_shape: tuple[int, int, int], num_tokens: int) -> int:
    """Multiply-accumulates of one forward pass at batch 1, attention included, counted on the running network."""
    return _count(denoiser, latent_shape, num_tokens).get_total_flops() // 2


def macs_by_module(denoiser: Denoiser, latent_shape: tuple[int, int, int], num_tokens: int) -> dict[str, int]:
    """`count_macs`, for each module and transformer block by its canonical name."""
    counted = {
        name.partition(".")[2]: sum(operations.values()) // 2
        for name, operations in _count(denoiser, latent_shape, num_tokens).get_flop_counts().items()
    }
    blocks = sorted(denoiser.architecture.blocks)
    paths = {block: denoiser.path(block) for block in blocks}
    return {block: counted.get(path, 0) for block, path in paths.items()}


@contextlib.contextmanager
def counted_macs() -> Iterator[Callable[[], int]]:
    """While open, multiply-accumulates are counted; what it gives tells how many there were, attention included."""
    with _counter() as counter:
        yield lambda: counter.get_total_flops() // 2


@contextlib.contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Plain matrix products: some versions of torch do not count the fused attention of some devices.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@torch.no_grad()
def _count(denoiser: Denoiser, latent_shape: tuple[int, int, int], num_tokens: int) -> FlopCounterMode:
    x = torch.zeros(1, *latent_shape, device=denoiser.device, dtype=denoiser.dtype)
    context = x.new_zeros(1, num_tokens, denoiser.architecture.context_width)
    width = denoiser.architecture.label_width
    label = Label.neutral(width, 1, (8 * x.shape[2], 8 * x.shape[3]), x) if width else None
    with _counter() as counter:
        denoiser(x, torch.zeros(1, dtype=torch.long, device=x.device), context, label)
    return counter
