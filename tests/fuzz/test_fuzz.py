"""A few seconds of what ``python -m tests.fuzz`` does for as long as one likes, and what it has found so far."""

import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .targets import TARGETS, failure, seeds_of

pytestmark = pytest.mark.slow

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
SECONDS = 5  # of computing, on a slow machine


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return seeds_of(list(TARGETS), tmp_path_factory.mktemp("seeds"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for each format, which files of earlier inputs stay in."""
    return {name: tmp_path_factory.mktemp(name) for name in TARGETS}


def check(name, data, folder):
    began = time.process_time()
    wrong = failure(TARGETS[name], data, folder)
    if wrong:
        raise wrong
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize("name", TARGETS)
def test_valid_examples_are_read(name, seeds, folder):
    for data in seeds[name]:
        TARGETS[name].read(data, folder[name])


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_was_once_read_wrongly_is_read_or_refused(path, folder):
    name = path.name.rpartition("-")[0]
    check(name, path.read_bytes(), folder[name])


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(number=st.integers(0, 2**32))
def test_whatever_is_made_wrong_is_read_or_refused_in_one_sentence(name, number, seeds, folder):
    random = Random(number)
    check(name, TARGETS[name].mutate(random.choice(seeds[name]), random), folder[name])
