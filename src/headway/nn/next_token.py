"""A decoder's next token as one native call, from ids to logits.

What the whole model does for one new token per row is put in front of and behind the steps of its stack (fused.py):
the rows of the token table, positions, angles, and the product with the head. The model stays the definition. Where a
part has no kernel, or the cache is not filled yet, `next_token` says so by None. Left out: positions whose angles
depend on the length of the text, sinusoids, and tables narrower than the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headway.config import Sinusoidal
from headway.kernels.codes import check_rows
from headway.kernels.native import usable
from headway.kernels.steps import Gather, Linear, Matrix, described
from headway.nn import packed
from headway.nn.attention import is_steered
from headway.nn.cache import Cache
from headway.nn.embeddings import Embeddings
from headway.nn.fused import FEW, NO_NORM, Encoded, Fused, UnfitError, columns_of, kept, leaf_of
from headway.nn.heads import LanguageModelHead
from headway.nn.packed import PackedEmbedding
from headway.nn.stack import Stack

if TYPE_CHECKING:
    from headway.nn.model import Transformer


class NextToken(Fused):
    """The steps of a model for T tokens in each of B rows."""

    def __init__(self, model: Transformer, stack: Stack, B: int, T: int, cache: Cache) -> None:
        encoded = None
        if model.is_pair:
            assert cache.encoder_hidden is not None
            encoded = Encoded(cache.encoder_hidden, cache.encoder_real)
        super().__init__(stack, B * T, *columns_of(cache, B, T, encoded), cache, encoded)
        body, self._steps = self._steps, []
        self._shape, self._ids = (B, T), torch.empty(B * T, dtype=torch.long)
        # The same memory, as in Keys.
        self._ids_here, self._x_here = self._ids.numpy(), self.x.view(B, T, -1).numpy()
        self._embed(model.decoder_embeddings or model.embeddings)
        self._turn(stack)
        self._steps += body
        self._answer(model.head)

    def next(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One id for each row, placed -> the states (B, T, D) and the head's product (B, T, V)."""
        self._ids_here[:] = ids
        logits = torch.empty(*self._shape, self._V)
        for place, product in self._products:
            product.out = logits.data_ptr() + 4 * place
        self._program.run(self.rows)
        return torch.from_numpy(self._x_here.copy()), logits

    def _embed(self, part: Embeddings) -> None:
        is_other = part.types is not None or isinstance(part.positions, Sinusoidal)
        if part.tokens is None or is_other or not isinstance(part.project, nn.Identity):
            raise UnfitError
        self._gather(part.tokens, self._ids, self.x, scale=part.scale)
        if part.learned is not None:
            table = part.learned.weight[getattr(part.positions, "offset", 0) :]
            self._gather(table, self._positions, self.x, adds=True)
        self._norm(part.norm, self.x, out=self.x)

    def _turn(self, stack: Stack) -> None:
        for is_window, angles in self._angles.items():
            rope = stack.window_rope if is_window else stack.rope
            if rope is None or rope.by_length:
                raise UnfitError
            self._gather(torch.view_as_real(rope.table(self.x)).flatten(1), self._positions, angles)

    def _answer(self, head: nn.Module) -> None:
        if not isinstance(head, LanguageModelHead) or head.has_transform or not isinstance(head.project, nn.Identity):
            raise UnfitError
        source, leaf = self.x, leaf_of(head.output)
        if head.scale != 1.0:
            source = self._branch
            self._norm(NO_NORM, self.x, out=source, scale=torch.full(self.x.shape[1:], head.scale))
        inputs, self._V = self._inputs(NO_NORM, leaf, source=source), leaf.shape[0]
        before, logits = len(self._steps), torch.empty(self.rows, self._V)
        self._linear(leaf, inputs, logits)
        products = [step for step in self._steps[before:] if isinstance(step, Linear)]
        self._products = [((product.out - logits.data_ptr()) // 4, product) for product in products]

    @property
    def _positions(self) -> Tensor:
        return next(iter(self.keys.values())).rows[:, 1]

    def _gather(
        self, table: nn.Module | Tensor, ids: Tensor, out: Tensor, *, scale: float = 1.0, adds: bool = False
    ) -> None:
        """The rows `ids` of a table."""
        keep, plain = self._buffers.keep, table.weight if isinstance(table, nn.Embedding) else table
        what: tuple[Matrix, int | None]
        if isinstance(table, PackedEmbedding):
            ((_, matrix),) = table.packed.parts
            for tensor in (matrix.codes, matrix.scales, matrix.minima):
                keep(tensor)
            what = (described(matrix, None), None)
        elif isinstance(plain, Tensor) and usable(plain) and plain.is_contiguous():
            what = (Matrix(columns=plain.shape[1]), keep(plain.detach()))
        else:
            raise UnfitError
        self._steps.append(Gather(*what, keep(ids), out.data_ptr(), ids.stride(0), adds, scale))


def next_token(model: Transformer, ids: Tensor, cache: Cache) -> tuple[Tensor, Tensor] | None:
    """The states (B, T, D) and logits (B, T, V) of a new token, or a few (B, T), in each row of a cache.

    None where that is no single call; nothing has happened then. Raises IndexError for an id that is not in the table.
    """
    if ids.ndim != 2 or not ids.shape[1]:  # which the model itself refuses by name
        return None
    stack, (B, T) = model.decoder, ids.shape
    if stack is None or not cache.is_whole or not packed.planes() or torch.is_grad_enabled() or model.training:
        return None
    if model.prompt is not None:
        return None
    if T > 1 and (T > FEW or cache.last_only or any(s.capacity < cache.max_len for s in cache.groups.values())):
        return None
    is_cpu = usable() and cache.lengths.is_cpu
    if is_steered() or not is_cpu or (model.is_pair and cache.encoder_hidden is None):
        return None
    try:
        program = kept(cache, NextToken, B, T, lambda: NextToken(model, stack, B, T, cache))
    except UnfitError:
        cache.is_whole = False
        return None
    assert isinstance(model.head, LanguageModelHead)
    given = ids.flatten().tolist()
    check_rows(given, model.config.vocab_size)
    positions = cache.next_positions(T, None)
    cache.begin(positions, None)
    program.place(cache, positions, T)
    hidden, logits = program.next(given)
    return hidden, model.head.capped(logits)
