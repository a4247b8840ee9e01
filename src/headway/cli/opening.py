"""A model as a verb opens it: threads set, weights loaded, notes told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from headway.cli.output import note

if TYPE_CHECKING:
    from headway.api import Loaded


class HowToOpen(Protocol):
    """What such a verb's options have in common."""

    @property
    def dtype(self) -> str | None:
        """A name of `loading.dtype_of`."""

    @property
    def threads(self) -> int | None:
        """Threads of the CPU, None for torch's choice."""

    @property
    def device(self) -> str:
        """cpu or cuda."""


def opened(path: str, options: HowToOpen, **more: Any) -> Loaded:
    """The model at `path`; `more` goes to `api.load`. Raises what that raises."""
    import torch

    from headway import api

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = api.load(path, dtype=options.dtype, device=options.device, **more)
    for line in loaded.notes:
        note(f"note: {line}")
    return loaded
