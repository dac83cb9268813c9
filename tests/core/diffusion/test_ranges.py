"""Every timestep is in exactly one range, and a boundary in the less noisy one."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_core.diffusion.ranges import SPLITS, TimestepRanges, balanced, even, even_log_snr, read_ranges, sigma_at, timestep_at
from distill_core.diffusion.schedule import flow, scaled_linear

from .strategies import any_boundaries

SCHEDULES = {"diffusion": scaled_linear(), "flow": flow(shift=3.0)}


@given(any_boundaries)
@settings(max_examples=300, deadline=None)
def test_each_timestep_is_in_exactly_one_range(boundaries):
    ranges = TimestepRanges(boundaries)
    held = [list(ranges.timesteps(number)) for number in range(len(ranges))]
    assert list(itertools.chain(*reversed(held))) == list(range(1000))
    of = ranges.of(torch.arange(1000)).tolist()
    assert all(of[t] == number for number, timesteps in enumerate(held) for t in timesteps)


@given(any_boundaries, st.sampled_from(sorted(SCHEDULES)))
@settings(max_examples=200, deadline=None)
def test_a_boundary_is_in_the_less_noisy_range_and_anything_above_is_not(boundaries, name):
    ranges, schedule = TimestepRanges(boundaries), SCHEDULES[name]
    for number, boundary in enumerate(boundaries):
        t = torch.tensor([boundary, math.nextafter(boundary, math.inf)], dtype=torch.float64)
        assert ranges.of(t).tolist() == [number + 1, number]
        sigma = ranges.sigmas(schedule)[number]
        below, above = (
            ranges.of(torch.tensor(timestep_at(schedule, sigma * factor), dtype=torch.float64)) for factor in (0.9999, 1.0001)
        )
        assert below >= number + 1 and above <= number + (boundary >= 999)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_levels_and_timesteps_are_inverse(name):
    schedule = SCHEDULES[name]
    for t in (0, 0.25, 1, 499.5, 998.75, 999):
        assert timestep_at(schedule, sigma_at(schedule, t)) == pytest.approx(t, abs=1e-6)
    assert timestep_at(schedule, 0) == 0 and timestep_at(schedule, 1e9) == 999
    assert sigma_at(schedule, 7) == pytest.approx(schedule.noise_ratio[7].item())


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_splits_have_as_many_ranges_as_asked_for(split, count):
    assert len(SPLITS[split](SCHEDULES["diffusion"], count)) == count


def test_even_ranges_by_hand():
    assert [even(scaled_linear(10), 2).timesteps(n) for n in (0, 1)] == [range(5, 10), range(0, 5)]
    sizes = [len(even(scaled_linear(), 3).timesteps(n)) for n in range(3)]
    assert max(sizes) - min(sizes) <= 1


def test_even_log_snr_is_even_in_log_snr():
    schedule = SCHEDULES["diffusion"]
    levels = [schedule.noise_ratio[-1].item(), *even_log_snr(schedule, 4).sigmas(schedule), schedule.noise_ratio[0].item()]
    steps = [math.log(b / a) for a, b in itertools.pairwise(levels)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)


@given(st.lists(st.floats(0.01, 10), min_size=4, max_size=9), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_balanced_ranges_are_the_best_of_all(errors, count):
    bins = len(errors)

    def worst(cuts):
        return max(sum(errors[a:b]) for a, b in itertools.pairwise([0, *cuts, bins]))

    ranges = balanced(errors, bins, count)
    cuts = [math.floor(boundary) + 1 for boundary in reversed(ranges.boundaries)]
    assert worst(cuts) == pytest.approx(min(worst(cuts) for cuts in itertools.combinations(range(1, bins), count - 1)))


def test_overlap_reaches_into_the_neighbours_and_not_beyond_the_schedule():
    ranges = TimestepRanges((499.0, 99.0))
    assert ranges.timesteps(1, 10) == range(90, 510) and ranges.timesteps(2, 10) == range(0, 110)


@pytest.mark.parametrize("text,boundaries", [
    ("250, 500", (500, 250)), ("50% 75%", (0.5 * 999, 0.25 * 999)), ("", ()), ("250.5", (250.5,)),
])  # fmt: skip
def test_boundaries_are_read_as_people_write_them(text, boundaries):
    assert read_ranges(text, SCHEDULES["diffusion"]).boundaries == pytest.approx(boundaries)


@pytest.mark.parametrize("text", ["1 " * 100_000, "9" * 9000, "x" * 9000, "1 " * 4000, "-1e308%", "1e999", "nan"])
def test_boundaries_that_are_none_are_refused_in_few_words(text):
    with pytest.raises(ValueError) as caught:
        read_ranges(text, SCHEDULES["diffusion"])
    assert len(str(caught.value)) < 400


def test_boundaries_are_told_in_all_units_and_read_back():
    schedule = SCHEDULES["diffusion"]
    ranges = TimestepRanges((500.0, 250.0))
    sigmas = read_ranges("sigma " + ", ".join(map(repr, ranges.sigmas(schedule))), schedule)
    percents = read_ranges(", ".join(f"{100 * p}%" for p in ranges.percents), schedule)
    assert sigmas.boundaries == pytest.approx(ranges.boundaries) and percents.boundaries == pytest.approx(ranges.boundaries)
    top, *_, bottom = ranges.describe(schedule).splitlines()
    assert "0: timesteps 999 to 501" in top and "0% to 50%" in top and "sigma inf to" in top
    assert "2: timesteps 250 to 0" in bottom and bottom.endswith("to 0")


@pytest.mark.parametrize("wrong", ["abc", "500, 500", "-1", "999", "0.2, 0.7", "120%"])
def test_boundaries_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="boundaries"):
        read_ranges(wrong, SCHEDULES["diffusion"])


def test_more_ranges_than_can_be_used_are_refused_at_once():
    """Before any of them is read or looked at."""
    many = " ".join(["1"] * 4_000)
    with pytest.raises(ValueError, match="boundaries may have at most 10,000 characters"):
        read_ranges(" ".join([many] * 250), scaled_linear())
    for make in (
        lambda: read_ranges(many, scaled_linear()),
        lambda: TimestepRanges((0.5,) * 1_000_000),
        lambda: even(scaled_linear(), 101),
    ):
        with pytest.raises(ValueError, match="boundaries, but at most 99 can be used") as refused:
            make()
        assert len(str(refused.value)) < 100
    assert len(even(scaled_linear(), 100)) == 100
