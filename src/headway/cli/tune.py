"""`headway tune BASE data.path=ROWS [key=value ...]`: adapters for a model that exists; it takes what train takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headway.cli import train as train_verb
from headway.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options(train_verb.Options):
    """What `headway tune` takes: a model, and what `headway train` takes."""


def run(options: Options) -> int:
    """Train adapters on a base, or go on with a run that does."""
    words = list(options.words or [])
    named = [word for word in options.paths if not word.endswith((".yaml", ".yml", ".json", ".html"))]
    given = {key.partition("=")[0] for key in options.overrides}
    if not options.resume:
        if len(named) + ("base" in given) != 1:
            found = f"{len(named)} models" if named else "no model"
            raise ConfigError("PATH", found, "the model to adapt", "headway tune MODEL data.path=ROWS")
        words = [word for word in words if word not in named] + [f"base={train_verb.quoted(name)}" for name in named]
        if not any(key.startswith("tuning") for key in given):
            words.append("tuning.method=lora")
    return train_verb.run(replace(options, words=words))
