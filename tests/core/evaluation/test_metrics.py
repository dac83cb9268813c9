import copy

import pytest
import torch

from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.guidance import guided
from distill_core.diffusion.macs import count_macs
from distill_core.diffusion.ranges import TimestepRanges
from distill_core.diffusion.schedule import prediction
from distill_core.evaluation.metrics import frechet_distance, output_error
from distill_core.networks.model_sampling import ModelSampling
from distill_core.pruning.plan import preset
from distill_core.routing.router import ExpertDenoiser

from ...students import student_of


def test_frechet_distance_of_gaussians_is_the_closed_form():
    random = torch.Generator().manual_seed(0)
    unit = torch.randn(200_000, 3, generator=random, dtype=torch.float64)
    scale, shift = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 0.0, -2.0])
    expected = (shift**2).sum() + ((scale - 1) ** 2).sum()
    assert frechet_distance(unit, unit * scale + shift) == pytest.approx(expected.item(), rel=0.02)


def test_frechet_distance_laws():
    a, b = torch.randn(50, 4), torch.randn(60, 4) + 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(a[:1], b)


def test_macs_grow_with_the_picture(small_teacher):
    small, large = (count_macs(small_teacher, (4, side, side), 5) for side in (8, 16))
    assert 3.5 < large / small < 5  # convolutions times 4, self-attention times 16, time embedding times 1


def test_macs_are_the_same_on_the_meta_device(small_teacher):
    """Which kernel a device uses for attention makes no difference."""
    meta = type(small_teacher)(network=copy.deepcopy(small_teacher.network).to("meta"), architecture=small_teacher.architecture)
    assert count_macs(meta, (4, 16, 16), 5) == count_macs(small_teacher, (4, 16, 16), 5)


# --- distance to the teacher


@pytest.fixture(scope="module")
def data():
    random = torch.Generator().manual_seed(0)
    latents, contexts = torch.randn(6, 4, 8, 8, generator=random), torch.randn(6, 5, 16, generator=random)
    return LatentDataset.of(latents, contexts, torch.zeros(5, 16))


class Shifted:
    """Answers as a teacher, and so much more where t is at least 500."""

    def __init__(self, teacher, shift):
        self.teacher, self.shift, self.seen = teacher, shift, []

    def __getattr__(self, name):
        return getattr(self.teacher, name)

    def __call__(self, x_t, t, context, label=None):
        self.seen.append(t.tolist())
        return self.teacher(x_t, t, context, label) + self.shift * (t >= 500)[:, None, None, None]


def test_output_error_is_the_mean_squared_distance_in_each_bin(small_teacher, data):
    student = Shifted(small_teacher, 0.5)
    errors = output_error(student, small_teacher, data, num_bins=4, num_batches=2, batch_size=3)
    assert errors.tolist() == pytest.approx([0, 0, 0.25, 0.25], abs=1e-6)
    bins = [set(t // 250 for t in batch) for batch in student.seen]
    assert bins == [{0}, {0}, {1}, {1}, {2}, {2}, {3}, {3}] and all(len(batch) == 3 for batch in student.seen)


def test_output_error_is_the_same_for_the_same_seed_and_another_for_another(small_teacher, data):
    student = student_of(small_teacher, preset("bk-sdm-tiny"))
    first, again, other = (output_error(student, small_teacher, data, num_bins=2, batch_size=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and (first > 0).all()


def test_output_error_is_in_the_students_terms(small_teacher, data):
    """A student that says the same in other words errs by nothing."""

    class InV(type(small_teacher)):
        def __call__(self, x_t, t, context, label=None):
            eps, at = super().__call__(x_t, t, context, label), self.schedule.at(t, x_t)
            return prediction("v").target(prediction("eps").to_x0(eps, x_t, at), eps, at)

    student = InV(network=small_teacher.network, architecture=small_teacher.architecture, sampling=ModelSampling(prediction="v"))
    assert output_error(student, small_teacher, data, batch_size=2).max() < 1e-5
    mistaken = type(small_teacher)(
        network=small_teacher.network, architecture=small_teacher.architecture, sampling=ModelSampling(prediction="v")
    )
    assert output_error(mistaken, small_teacher, data, batch_size=2).max() > 1e-2


def test_output_error_is_from_what_a_guided_teacher_answers(small_teacher, data):
    class Guided(type(small_teacher)):
        """Answers with what a guided teacher answers."""

        def __call__(self, x_t, t, context, label=None):
            return guided(small_teacher, x_t, t, context, label, data.null, 3.0)

    student = Guided(network=small_teacher.network, architecture=small_teacher.architecture)
    assert output_error(student, small_teacher, data, batch_size=2, guidance=3.0).max() < 1e-10
    assert output_error(student, small_teacher, data, batch_size=2).min() > 1e-7


def test_output_error_of_students_is_that_of_each_in_its_range(small_teacher, data):
    students = [student_of(small_teacher, preset(name)) for name in ("bk-sdm-tiny", "bk-sdm-base")]
    options = {"num_bins": 4, "batch_size": 2}
    high, low = (output_error(student, small_teacher, data, **options) for student in students)
    routed = output_error(ExpertDenoiser.given(TimestepRanges((499.0,)), students), small_teacher, data, **options)
    assert torch.equal(routed, torch.cat([low[:2], high[2:]]))
