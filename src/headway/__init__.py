"""Headway: one stack for the whole life of a Transformer.

`build` a model from a config, `train` it, `load` it back, `generate` from it, `embed` texts with it. Everything is
imported on first use, so that `import headway` and the command's help stay instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headway.api import build, embed, fill_mask, generate, load, transcribe
    from headway.config import ModelConfig
    from headway.launch import train
    from headway.run_config import RunConfig

__version__ = "0.1.0"
__all__ = ["ModelConfig", "RunConfig", "__version__"]
__all__ += ["build", "embed", "fill_mask", "generate", "load", "train", "transcribe"]

_HOMES = {
    "ModelConfig": "headway.config",
    "RunConfig": "headway.run_config",
    "build": "headway.api",
    "embed": "headway.api",
    "fill_mask": "headway.api",
    "generate": "headway.api",
    "load": "headway.api",
    "train": "headway.launch",
    "transcribe": "headway.api",
}


def __getattr__(name: str) -> object:
    """Import a public name from its home when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'headway' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
