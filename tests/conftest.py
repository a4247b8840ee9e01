"""Shared settings: one torch thread (tests run two at a time on two cores), fixed seeds, a cache of the tests' own."""

import faulthandler
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from headway import machine
from headway.strict import dump_json

torch.set_num_threads(1)

# Long ones without an xdist_group; groups of several tests are given out first anyway.
LONGEST = ("test_killed_anywhere_a_run_resumes_to_the_same_bytes", "test_fifty_random_times")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end of the alphabet they would leave the other core idle."""
    items.sort(key=lambda item: item.name not in LONGEST)


@pytest.fixture(autouse=True)
def _start() -> None:
    """Every test begins alike, whatever the one before it left behind."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a stack trace per absent device: 3 ms a test
    if torch.get_num_threads() != 1:  # with more, a forked child waits for ever for the threads of its parent
        torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    """An end that hangs says where, as a test that hangs does (`timeout` in pyproject.toml)."""
    faulthandler.dump_traceback_later(120, exit=True)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with a made-up machine: no test depends on this one's speed, or on what its user has kept."""
    folder = tmp_path_factory.mktemp("cache")
    rates = {1: 50.0, 2: 51.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWAY_CACHE", str(folder))
        key = machine._key("cpu")
        fake = machine.Probe(*key, 1e9, {"float32": rates, "bfloat16": {1: 5.0, 2: 6.0}}, rates, rates, 2.0)
        machine._file(key).write_text(dump_json(asdict(fake)))
        yield folder
