"""Shared settings: one torch thread (tests run two at a time on two cores) and fixed seeds."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a stack trace per absent device: 3 ms a test
