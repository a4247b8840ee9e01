"""Row S2: SIGKILL at every file primitive and at random times; tools/kill_campaign.py runs the full campaign."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from kill_campaign import Campaign, run_campaign

from headway import files
from headway.checkpoints.folder import checkpoint_path, list_checkpoints
from headway.checkpoints.tensors import write_tensors
from headway.training import plot, resume


@pytest.fixture(autouse=True)
def _drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "draw", plot.draw)  # the campaign replaces it; this puts it back
    torch.set_num_threads(1)


@pytest.mark.fault("S2", "S11", "S6")
def test_killed_anywhere_a_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """At every third file operation and 20 random times; the tool takes every one and 200."""
    figures = run_campaign(tmp_path, stride=3, randoms=20)
    assert figures.wrong == []
    assert figures.primitives > 100 and figures.kills == -(-figures.primitives // 3) + 20
    assert figures.equal == figures.resumes >= figures.kills


def naive_save(
    run: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: object, **options: object
) -> Path:
    """Control: the old checkpoint goes first and the new one is written in its place, file by file."""
    for _, path in list_checkpoints(run):
        files.remove_tree(path)
    folder = checkpoint_path(run, step)
    files.make_dir(folder)
    for name, group in tensors.items():
        files.write(folder / name, write_tensors(group))
    return folder


@pytest.mark.fault("S2")
def test_control_a_naive_save_loses_what_had_been_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = Campaign(tmp_path, again=0)
    monkeypatch.setattr(resume, "save_checkpoint", naive_save)
    late = next(k for k, floor in enumerate(campaign.floors, 1) if floor == 4)
    campaign.at_primitive(late)
    assert any("had been saved" in line or "cannot be" in line for line in campaign.figures.wrong)


@pytest.mark.fault("S2")
def test_control_a_resume_that_forgets_the_random_state_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign = Campaign(tmp_path, again=0)
    monkeypatch.setattr(resume, "restore_random", lambda states, device: None)
    campaign.at_primitive(len(campaign.floors) // 2)
    assert campaign.figures.equal == 0 and "other final bytes" in campaign.figures.wrong[-1]
