"""Stand-ins for the packages of loggers: they take the arguments that we give, and nothing else."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Board:
    """What was written through fakes of both packages: [(logger, name, value, step)]."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, Any, int]] = []
        self.began: list[dict[str, Any]] = []
        self.closed: list[str] = []
        self.breaks_at: dict[str, int] = {}

    def add(self, logger: str, name: str, value: Any, step: int) -> None:
        if step >= self.breaks_at.get(logger, step + 1):
            raise ConnectionError("no network")
        self.said.append((logger, name, value, step))

    def steps(self, logger: str, name: str) -> list[int]:
        return [step for one, key, _, step in self.said if (one, key) == (logger, name)]


def install(monkeypatch: pytest.MonkeyPatch) -> Board:
    """Have both packages stand in for the real ones; what they are told is on the board."""
    board = Board()

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
            board.began.append({"log_dir": log_dir, "purge_step": purge_step})

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            assert type(scalar_value) is float
            board.add("tensorboard", tag, scalar_value, global_step)

        def add_text(self, tag: str, text_string: str, global_step: int) -> None:
            board.add("tensorboard", tag, text_string, global_step)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            board.closed.append("tensorboard")

    class WandbRun:
        def __init__(self, id: str) -> None:
            self.id = id

        def log(self, data: dict[str, Any], step: int) -> None:
            for name, value in data.items():
                board.add("wandb", name, value, step)

        def finish(self) -> None:
            board.closed.append("wandb")

    def init(
        project: str, name: str, dir: str, config: dict[str, Any], id: str | None, resume: str, mode: str | None
    ) -> WandbRun:
        if board.breaks_at.get("wandb") == -1:
            raise ConnectionError("no network")
        board.began.append({"project": project, "dir": dir, "id": id, "resume": resume, "mode": mode, "config": config})
        return WandbRun(id or f"run{len(board.began)}")

    for name, (attribute, fake) in {"tensorboard": ("SummaryWriter", SummaryWriter), "wandb": ("init", init)}.items():
        module = ModuleType(MODULES[name])
        setattr(module, attribute, fake)
        monkeypatch.setitem(sys.modules, MODULES[name], module)
    return board
