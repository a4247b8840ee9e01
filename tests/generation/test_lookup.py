"""Prompt lookup: the text is the one without guesses, in fewer passes; guessing stops where it does not pay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from generation_toys import toy

from headway.errors import ConfigError
from headway.generation import GenerationOptions, generate
from headway.generation import lookup as module
from headway.generation.lookup import Lookup
from headway.generation.session import Memory, Session


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Lookup]:
    """Every Lookup that is made, guessing whatever it costs."""
    made: list[Lookup] = []
    init = Lookup.__init__

    def noted(self: Lookup, *given: object) -> None:
        init(self, *given)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Lookup, "__init__", noted)
    monkeypatch.setattr(module._Balance, "is_on", True)
    return made
