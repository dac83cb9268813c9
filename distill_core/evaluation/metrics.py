"""Distances between images, features and predictions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Batch, Batching, Dataset, draw
from ..diffusion.conditioning import Caption
from ..diffusion.denoiser import Predictor
from ..diffusion.distance import squared_error
from ..diffusion.guidance import guided
from ..diffusion.schedule import convert


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to feature rows (N, D) and (M, D) (Heusel et al. 2017, arXiv 1706.08500, Eq. 6).

    ``|mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))``, in float64.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"the Fréchet distance needs at least 2 samples on each side, got {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The eigenvalues of cov_a cov_b are real and not negative, except for rounding errors.
    root_trace = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace
    return max(0.0, distance.item())


class _Features(torch.nn.Identity):
    """Stands in for Inception where the inputs are features already."""

    num_features: int


def feature_distances(real: Tensor, drawn: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Fréchet and kernel distance of feature rows (N, D) and (M, D), computed by torchmetrics.

    The Fréchet distance is that of `frechet_distance`. The kernel distance is the unbiased squared maximum mean discrepancy
    with a cubic kernel (Bińkowski et al. 2018, arXiv 1801.01401, Sec. 4), averaged over 100 subsets of at most 1,000 rows,
    which are drawn by the seed. ``ValueError`` for fewer than 2 rows, and without torchmetrics.
    """
    FrechetInceptionDistance, KernelInceptionDistance = distance_metrics(len(real), len(drawn))
    given = _Features()
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
    """Metric classes for `feature_distances`; the same ``ValueError``, before any image is computed."""
    if min(num_real, num_drawn) < 2:
        raise ValueError(f"distances need at least 2 images on each side, got {num_real} and {num_drawn}")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise ValueError("distances between images need a package: python -m pip install torchmetrics") from error
    return FrechetInceptionDistance, KernelInceptionDistance


def clip_score(images: Tensor, text: Tensor) -> float:
    """100 times the mean of ``max(cos, 0)`` of image embeddings (N, D) and a text embedding (D,) (Hessel et al. 2021,
    arXiv 2104.08718, Eq. 1, which uses the factor 2.5 instead)."""
    cosines = torch.nn.functional.cosine_similarity(images.float(), text.float()[None], dim=1)
    return 100 * cosines.clamp(min=0).mean().item()


def mean_cosine_distance(features: Tensor) -> float:
    """Mean of ``1 - cos`` over all pairs of different rows of features (N, D), 0 to 2. ``ValueError`` for a single row."""
    count = len(features)
    if count < 2:
        raise ValueError("diversity needs at least 2 images, got 1")
    units = torch.nn.functional.normalize(features.double(), dim=1)
    among_pairs = units.sum(0).square().sum() - units.square().sum()
    return max(0.0, 1 - among_pairs.item() / (count * (count - 1)))


@torch.no_grad()
def output_error(
    student: Predictor,
    teacher: Predictor,
    dataset: Dataset,
    *,
    num_bins: int = 10,
    num_batches: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    guidance: float = 1.0,
    on_batch: Callable[[], Any] = lambda: None,
) -> Tensor:
    """Mean squared error of a student against its teacher per timestep bin: (num_bins,), least noisy first, float64.

    The mean of ``(student(x_t) - teacher(x_t))^2`` over all elements, both in the student's prediction type: the unweighted
    output loss. All bins have the same number of timesteps. Each uses the same ``num_batches * batch_size`` examples of the
    dataset with the same noise, at timesteps drawn uniformly within the bin. The seed determines all of this, so that errors
    of several students with one seed use the same inputs. guidance: guidance scale of the teacher. ``on_batch`` is called
    after each batch.
    """
    size, errors = student.schedule.num_timesteps, []
    for i in range(num_bins):
        batching = Batching(batch_size, seed, within=(size * i // num_bins, size * (i + 1) // num_bins))
        batches = (draw(dataset, number, student.schedule, batching) for number in range(num_batches))
        distances = []
        for batch in batches:
            distances.append(_distance(student, teacher, batch, dataset.null, guidance))
            on_batch()
        errors.append(torch.cat(distances).double().mean())
    return torch.stack(errors).cpu()


def _distance(student: Predictor, teacher: Predictor, batch: Batch, null: Caption | None, guidance: float) -> Tensor:
    """Squared distance between the predictions of a student and of a guided teacher, (B,)."""

    def prediction(denoiser: Predictor, scale: float) -> Tensor:
        x_t, context = (tensor.to(denoiser.device, denoiser.dtype) for tensor in (batch.x_t, batch.context))
        t, label = batch.t.to(denoiser.device), batch.label and batch.label.to(context)
        output = guided(denoiser, x_t, t, context, label, null, scale).cpu()
        return convert(output, batch.x_t, batch.t, student.schedule, denoiser.prediction, student.prediction)

    return squared_error(prediction(student, 1.0), prediction(teacher, guidance))
