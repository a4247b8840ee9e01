"""One tiny Hugging Face folder for the tests of a file, and a copy of it for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hub_toys import SIZES, saved


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so only to be read."""
    place = tmp_path_factory.mktemp("llama")
    saved(place, **SIZES)
    return place


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))
