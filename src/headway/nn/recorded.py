"""A decoder's next token as one recorded graph: what next_token.py is on a CPU, on a GPU.

There a token's operations take less time than Python needs to ask for them. So one token per row is run with nothing
looked at on the way: positions, columns and masks are tensors over a fixed number of columns (`Cache.shown`), and the
model's own modules compute it. The operations of such a step are recorded once, as a CUDA graph, and replayed for every
further token. The columns that attention reads grow in steps of SHOWN, each with a graph of its own.

`next_token` says by None where that cannot be: experts are chosen by looking, and so are RoPE scalings that depend on
the length.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headway.nn.attention import is_steered
from headway.nn.cache import Cache

if TYPE_CHECKING:
    from headway.nn.model import Transformer

SHOWN = 256
"""Attention over columns that nobody has written to costs their memory's reading: at most so many of them."""

Outputs = tuple[Tensor, Tensor]
Step = Callable[[], Outputs]
Recorder = Callable[[Step], Step]


def cuda_graph(step: Step) -> Step:
    """Record a step without running it; what it returns lies in the same memory each time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


RECORDERS: dict[str, Recorder] = {"cuda": cuda_graph}
"""How each kind of device records a step."""


class Recorded:
    """The next token of each row of a cache over its first `shown` columns: (B, 1) ids -> states and logits.

    The first token is run as it is, which warms up whatever the device prepares; the second is recorded. Where a device
    refuses to record an operation, a warning says which, and every token is run as the first was.
    """

    def __init__(self, model: Transformer, cache: Cache, shown: int) -> None:
        self._model, self._cache, self._shown = model, cache, shown
        self._ids = torch.zeros(len(cache.lengths), 1, dtype=torch.long, device=cache.lengths.device)
        self._replay: Step | None = None
        self._is_warm = False

    def next(self, ids: Tensor) -> Outputs:
        """Append a token to each row."""
        self._ids.copy_(ids)
        if self._is_warm and self._replay is None:
            try:
                self._replay = RECORDERS[self._ids.device.type](self._step)
            except RuntimeError as error:
                warnings.warn(f"a token cannot be recorded: {error}", RuntimeWarning, stacklevel=2)
                self._replay = self._step
        hidden, logits = (self._replay or self._step)()
        self._is_warm = True
        self._cache.advance()
        return hidden.clone(), logits.clone()

    def _step(self) -> Outputs:
        cache, model = self._cache, self._model
        cache.shown = self._shown
        try:
            given = {"decoder_input_ids": self._ids} if model.is_pair else {"input_ids": self._ids}
            states = model._states(**given, cache=cache)
            return states.hidden, model.head(states.hidden, None)
        finally:
            cache.shown = None


def next_token(model: Transformer, ids: Tensor, cache: Cache) -> Outputs | None:
    """The states (B, 1, D) and logits (B, 1, V) of a new token in each row; None where it cannot be recorded."""
    if (
        RECORDERS.get(ids.device.type) is None
        or ids.ndim != 2
        or ids.shape[1] != 1
        or ids.shape[0] != len(cache.lengths)
    ):
        return None
    if torch.is_grad_enabled() or model.training or is_steered() or not _is_fixed(model):
        return None
    is_begun = all(slots.used for slots in cache.groups.values())
    if not is_begun or not cache.has_room(1) or (model.is_pair and cache.encoder_hidden is None):
        return None
    longest = max(slots.used for slots in cache.groups.values())
    shown = longest + SHOWN - longest % SHOWN
    key = (Recorded, shown, *(tensor.data_ptr() for tensor in cache.tensors))
    program = cache.programs.get(key)
    if not isinstance(program, Recorded):
        # A graph holds memory of its own: one is kept, that of the columns in use.
        program = Recorded(model, cache, shown)
        cache.programs = {key: program}
    return program.next(ids)


def _is_fixed(model: Transformer) -> bool:
    """Whether a step of one token does the same operations whatever its numbers are."""
    rope = None if model.decoder is None else model.decoder.rope
    is_plain = model.config.feed_forward.experts is None and model.prompt is None
    return is_plain and not (rope is not None and rope.by_length)
