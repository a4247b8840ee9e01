"""A stack of blocks as one native call: the fast path of encoding and of decoding.

The blocks stay the definition (block.py). Where every part of them has a kernel (weights in codes, on a CPU), the walk
below writes down what they would do as steps over fixed buffers; a forward pass is then a single call. With a cache
that is done once for it and a number of rows. Without one, sequences lie one behind the other, so that padding costs
nothing. Where anything has no kernel, `pass_through` says so by None, and the blocks run as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from headway.kernels import steps
from headway.kernels.codes import ROWS, CodedMatrix
from headway.kernels.native import usable
from headway.kernels.steps import LAYER, PLAIN, RMS, Buffers, Coded, Linear, Matrix, Norm, Program
from headway.nn import packed
from headway.nn.attention import Attention, is_steered
from headway.nn.block import Block, Residual
from headway.nn.cache import Cache
from headway.nn.feed_forward import ACTIVATIONS, FeedForward
from headway.nn.masks import Sight
from headway.nn.norms import LayerNorm, RMSNorm
from headway.nn.packed import PackedLinear

if TYPE_CHECKING:
    from headway.nn.stack import Stack

_NAMES = {function: steps.ACTIVATIONS.index(name) for name, function in ACTIVATIONS.items()}
NO_NORM = nn.Identity()
Angles = tuple[Tensor | None, Tensor | None]


class UnfitError(Exception):
    """Some part of a stack has no kernel."""


class Encoded(NamedTuple):
    """What cross-attention reads: states (B, S, D), and which of them are not padding (B, S), None if all."""

    states: Tensor
    real: Tensor | None


class Keys:
    """Where a group of layers finds its columns: `rows` (tokens, 3) says for each token its sequence, position and
    column (-1: it is not stored), `state` how many columns are in use and whether each stands at its position."""

    def __init__(self, rows: Tensor, state: Tensor, positions: Tensor, starts: Tensor | None = None) -> None:
        self.rows, self.state, self.positions, self.starts = rows, state, positions, starts
        # The same memory: a few numbers for each token, which numpy writes in a quarter of the time that torch takes.
        self.rows_here, self.state_here = rows.numpy(), state.numpy()


class Fused:
    """A stack over `rows` tokens, one after the other.

    Args:
        stack: whose blocks are walked. keys: of each window. room: columns that a token sees at most.
        cache: whose columns are read and written; None: keys and values stay where they are projected to.
        encoded: for cross-attention.
    """

    def __init__(
        self,
        stack: Stack,
        rows: int,
        keys: Mapping[int | None, Keys],
        room: int,
        cache: Cache | None,
        encoded: Encoded | None,
    ) -> None:
        self.rows, self.keys, self._cache, self._encoded = rows, keys, cache, encoded
        self._room = room + -room % ROWS  # whole vectors
        self._buffers, self._steps = Buffers(), list[ctypes.Structure]()
        first = stack.blocks[0]
        assert isinstance(first, Block)
        D, heads = leaf_of(first.attention.output).shape[0], first.attention
        self.x = self._buffers.floats(rows, D)
        self._branch = self._buffers.floats(rows, D)
        self._qkv = self._buffers.floats(rows, (heads.N + 2 * heads.K) * heads.H)
        self._mixed = self._buffers.floats(rows, heads.N * heads.H)
        self._angles: dict[bool, Tensor] = {}
        self._scratch = self._buffers.floats(torch.get_num_threads(), steps.QUERIES * self._room)
        self._codes: dict[tuple[int, int, str], Coded] = {}
        self._rooms: dict[tuple[int, str], Tensor] = {}
        self._bias = None if stack.bias is None else stack.bias.by_distance(room)
        for layer, (block, window) in enumerate(zip(stack.blocks, stack.windows, strict=True)):
            assert isinstance(block, Block)
            turns = stack.turned[layer] and stack.rope is not None
            self._block(block, layer, self._angles_of(stack, window is not None) if turns else None)
            if block.is_parallel:  # its inputs in codes are those of all tokens
                self._stored = len(self._steps)
        self._norm(stack.norm, self.x, out=self.x)

    @functools.cached_property
    def _program(self) -> Program:
        """Made when it first runs, with all that was written down by then."""
        return Program(self._steps)

    def run(self, x: Tensor, angles: Angles, T: int = 1) -> Tensor:
        """All blocks and the last norm over rows (rows, D), of each T rows for the last: (rows / T, D).

        angles: (rows, pairs) complex.
        """
        self.x.copy_(x)
        for is_window, kept in self._angles.items():
            given = angles[is_window]
            assert given is not None
            kept.copy_(torch.view_as_real(given))
        if T == 1:
            self._program.run(self.rows)
            return self.x
        # Later tokens read the keys of all; what comes behind the last of them concerns the last tokens alone.
        self._program.run(self.rows, 0, self._stored)
        count, places = self.rows // T, [keys.rows_here for keys in self.keys.values()]
        before = [rows[:count].copy() for rows in places]
        for rows in (self.x.numpy(), self._qkv.numpy(), *places):
            rows[:count] = rows[T - 1 :: T].copy()
        self._program.run(count, self._stored)
        for rows, some in zip(places, before, strict=True):
            rows[:count] = some
        return self.x[:count]

    def place(self, cache: Cache, positions: Tensor, T: int) -> None:
        """Say where T new tokens of each row stand, (B|1, T), for which the cache has made room."""
        for window, keys in self.keys.items():
            slots, rows = cache.groups[window], keys.rows_here.reshape(-1, T, 3)
            columns = slots.columns(positions)
            assert columns is not None
            rows[..., 1], rows[..., 2] = positions.numpy(), columns.numpy()
            keys.state_here[0], keys.state_here[1] = slots.used, slots.in_order

    def _angles_of(self, stack: Stack, is_window: bool) -> Tensor:
        """Room for cosines and sines (rows, pairs, 2), of the layers with a window or of the others."""
        rope = stack.window_rope if is_window else stack.rope
        assert rope is not None
        pairs = int(rope.d_head * rope.config.fraction) // 2
        return self._angles.setdefault(is_window, torch.empty(self.rows, pairs, 2))

    def _block(self, block: Block, layer: int, angles: Tensor | None) -> None:
        first, last = block.attention_residual, block.feed_forward_residual
        if not isinstance(block.feed_forward, FeedForward):
            raise UnfitError
        beside = self._inputs(last.before, block.feed_forward.up, "beside") if block.is_parallel else None
        self._attention(block, self._inputs(first.before, block.attention.qkv), layer, angles)
        self._join(first, block.attention.output, self._mixed)
        if block.cross_attention is not None and block.cross_residual is not None:
            self._cross(block.cross_attention, block.cross_residual, layer)
            self._join(block.cross_residual, block.cross_attention.output, self._mixed)
        self._feed_forward(block.feed_forward, beside or self._inputs(last.before, block.feed_forward.up), last)

    def _attention(self, block: Block, inputs: dict[int, Coded], layer: int, angles: Tensor | None) -> None:
        part, (is_causal, window) = block.attention, block.mask
        if part.prefix is not None:
            raise UnfitError
        self._linear(part.qkv, inputs, self._qkv)
        keys = self.keys[None if self._cache is None else self._cache.layers[layer][0]]
        columns = self._beside(part, keys) if self._cache is None else self._kept(self._cache, layer, keys)
        self._heads(part, self._qkv, part.K, keys.rows, columns, angles)
        self._stored = len(self._steps)
        self._attend(part, self._qkv, keys.rows, columns, is_causal=is_causal, window=window, bias=self._bias)

    def _cross(self, part: Attention, residual: Residual, layer: int) -> None:
        """Queries over the encoder's keys and values, which are computed when they are first needed."""
        assert self._encoded is not None
        k, v = part.remembered(self._encoded.states, self._cache)
        if k.stride() != v.stride() or k.dtype != torch.float32:
            raise UnfitError
        S, real = k.shape[1], self._encoded.real
        rows = next(iter(self.keys.values())).rows
        state = torch.tensor([S, real is None])
        positions = torch.arange(S)[None] if real is None else torch.where(real, torch.arange(S), -1)
        places = [self._buffers.keep(tensor) for tensor in (k, v, positions, state)]
        sequence, column, head, _ = k.stride()
        columns = steps.Columns(*places, None, None, None, sequence, head, column, 0 if real is None else S, 0)
        query = self._room_of(part.N * part.H, "query")
        self._linear(part.q, self._inputs(residual.before, part.q), query)
        self._heads(part, query, 0, rows, steps.Columns(), None)
        self._attend(part, query, rows, columns)

    def _heads(
        self, part: Attention, source: Tensor, K: int, rows: Tensor, columns: steps.Columns, angles: Tensor | None
    ) -> None:
        """Queries (and keys, if the rows hold any) normalised and turned; keys and values stored."""
        q, k = part.q_norm, part.k_norm
        kind = _normalization(q)
        if kind != PLAIN and not part.norm_heads:
            raise UnfitError
        (q_weight, q_bias, eps), (k_weight, k_bias, _) = map(_numbers, (q, k))
        numbers = map(self._buffers.keep, (q_weight, q_bias, k_weight, k_bias, angles, rows))
        pairs = 0 if angles is None else angles.shape[1]
        shape = (part.N, K, part.H, pairs, part.layout == "interleaved", kind, eps)
        self._steps.append(steps.Heads(source.data_ptr(), *numbers, *shape, columns))

    def _attend(
        self,
        part: Attention,
        source: Tensor,
        rows: Tensor,
        columns: steps.Columns,
        *,
        is_causal: bool = False,
        window: int | None = None,
        bias: Tensor | None = None,
    ) -> None:
        places = (source.data_ptr(), rows.data_ptr(), self._mixed.data_ptr(), self._scratch.data_ptr())
        shape = (part.N, part.K, part.H, source.shape[1], window or 0, is_causal, self._room)
        reach = 0 if bias is None else bias.shape[1] // 2
        keep = self._buffers.keep
        self._steps.append(steps.Attend(*places, keep(bias), *shape, reach, part.scale, part.softcap or 0.0, columns))

    def _beside(self, part: Attention, keys: Keys) -> steps.Columns:
        """Columns that are rows of the projection itself."""
        assert keys.starts is not None
        width, first = self._qkv.shape[1], self._qkv.data_ptr() + 4 * part.N * part.H
        places = (
            first,
            first + 4 * part.K * part.H,
            *map(self._buffers.keep, (keys.positions, keys.state, keys.starts)),
        )
        return steps.Columns(*places, None, None, width, part.H, width, 1, 0)

    def _kept(self, cache: Cache, layer: int, keys: Keys) -> steps.Columns:
        """Columns of a cache."""
        window, index = cache.layers[layer]
        slots = cache.groups[window]
        k, v = slots.keys.numbers[index], slots.values.numbers[index]
        if k.dtype not in steps.KEPT or (k.dtype == torch.int8 and k.shape[-1] % ROWS):
            raise UnfitError
        scales = [some.scales if some.scales is None else some.scales[index] for some in (slots.keys, slots.values)]
        places = [k, v, keys.positions, keys.state, None, *scales]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in places]
        return steps.Columns(*pointers, *k.stride()[:3], keys.positions.stride(0), steps.KEPT.index(k.dtype))

    def _feed_forward(self, part: FeedForward, inputs: dict[int, Coded], residual: Residual) -> None:
        if part.gated and leaf_of(part.up).shape[0] % (2 * ROWS):
            raise UnfitError
        hidden = self._room_of(leaf_of(part.down).shape[1], "hidden")
        self._linear(part.up, inputs, hidden, activation=_NAMES[part.activation], gated=part.gated)
        self._join(residual, part.down, hidden)

    def _join(self, residual: Residual, leaf: nn.Module, source: Tensor) -> None:
        """The branch's last product and what joins it to the stream."""
        inputs = self._inputs(NO_NORM, leaf, source=source)
        if isinstance(residual.inside, nn.Identity) and residual.scale is None:
            self._linear(leaf, inputs, self.x, adds=True)
        else:
            self._linear(leaf, inputs, self._branch)
            self._norm(residual.inside, self._branch, out=self.x, scale=residual.scale, adds=True)
        if not isinstance(residual.after, nn.Identity):
            self._norm(residual.after, self.x, out=self.x)

    def _inputs(
        self, norm: nn.Module, leaf: nn.Module, purpose: str = "", source: Tensor | None = None
    ) -> dict[int, Coded]:
        """The stream normalised and in codes, once for each chunk that the leaf's matrices ask for."""
        source = self.x if source is None else source
        held = leaf_of(leaf).packed
        chunks = [part.chunk for _, part in held.parts]
        chunks += [matrix.chunk for matrix in thin_of(leaf)[:1]]
        out = {}
        for chunk in dict.fromkeys(chunks):
            out[chunk] = self._coded(source.shape[1], chunk, purpose, packed.planes())
            self._norm(norm, source, codes=out[chunk], scale=held.input_scale)
        return out

    def _coded(self, columns: int, chunk: int, purpose: str, planes: int) -> Coded:
        """Room for rows in codes, the same for all layers that ask alike."""
        key = (columns, chunk, purpose)
        if key not in self._codes:
            self._codes[key] = self._buffers.codes(self.rows, columns, chunk, planes)
        return self._codes[key]

    def _room_of(self, columns: int, purpose: str) -> Tensor:
        """Room for rows of floats between two steps, the same for all layers."""
        key = (columns, purpose)
        if key not in self._rooms:
            self._rooms[key] = self._buffers.floats(self.rows, columns)
        return self._rooms[key]

    def _norm(
        self,
        norm: nn.Module,
        source: Tensor,
        *,
        out: Tensor | None = None,
        scale: Tensor | None = None,
        adds: bool = False,
        codes: Coded | None = None,
    ) -> None:
        kind = _normalization(norm)
        if kind == PLAIN and out is source and codes is None:
            return
        weight, bias, eps = _numbers(norm)
        keep, stride = self._buffers.keep, source.shape[1]
        self._steps.append(
            Norm(
                source.data_ptr(), keep(weight), keep(bias), keep(None if scale is None else scale.detach()),
                None if out is None else out.data_ptr(), stride, stride, stride, kind, adds, eps, codes or Coded(),
            )
        )  # fmt: skip

    def _linear(
        self,
        leaf: nn.Module,
        inputs: dict[int, Coded],
        out: Tensor,
        *,
        adds: bool = False,
        activation: int = 0,
        gated: bool = False,
    ) -> None:
        """out = or += W x + b and what stands beside, one step for each group of rows."""
        layer, added = leaf_of(leaf), self._added(leaf, inputs)
        parts = [part for _, part in layer.packed.parts]
        if gated and len(parts) > 1:
            raise UnfitError
        begin = 0
        for part in parts:
            rows = slice(begin, begin + part.shape[0])
            bias = None if layer.bias is None else self._buffers.padded(layer.bias[rows].float())
            step = Linear(self._matrix(part, bias), inputs[part.chunk], out.data_ptr() + 4 * begin)
            step.stride, step.adds, step.activation, step.gated = out.shape[1], adds, activation, gated
            if added is not None:
                step.beside, step.beside_stride = added.data_ptr() + 4 * begin, added.shape[1]
            self._steps.append(step)
            begin = rows.stop

    def _added(self, leaf: nn.Module, inputs: dict[int, Coded]) -> Tensor | None:
        """B A x of what stands beside a layer, (rows, R and room to the end of a block)."""
        thin = thin_of(leaf)
        if not thin:
            return None
        down, up = thin
        inner, out = self._room_of(down.shape[0], "inner"), self._room_of(up.shape[0] + ROWS, "beside")
        codes = self._coded(inner.shape[1], up.chunk, "inner", 2)  # in 15 bits: adapters share a chunk
        self._steps.append(Linear(self._matrix(down), inputs[down.chunk], inner.data_ptr(), stride=inner.shape[1]))
        self._norm(NO_NORM, inner, codes=codes)
        self._steps.append(Linear(self._matrix(up), codes, out.data_ptr(), stride=out.shape[1]))
        return out

    def _matrix(self, part: CodedMatrix, bias: int | None = None) -> Matrix:
        """A matrix for a step, kept as long as this is."""
        for tensor in (part.codes, part.scales, part.minima):
            self._buffers.keep(tensor)
        return steps.described(part, bias)


@runtime_checkable
class Beside(Protocol):
    """A layer that something stands beside (tuning/beside.py)."""

    base: nn.Module

    def thin(self) -> tuple[CodedMatrix, ...]:
        """A (r, C) and B (R, r) of W x + b + B A x, for inputs as they are in codes; none where nothing is in use.

        Raises UnfitError where it is another sum.
        """


def thin_of(module: nn.Module) -> tuple[CodedMatrix, ...]:
    """What stands beside a layer. Raises UnfitError where it has no kernel."""
    if isinstance(module, PackedLinear):  # asked first: a protocol takes long to ask for
        return ()
    return module.thin() if isinstance(module, Beside) else ()


def leaf_of(module: nn.Module) -> PackedLinear:
    """A linear layer in codes, without what stands beside it."""
    if isinstance(module, PackedLinear):
        return module
    if isinstance(module, Beside) and isinstance(module.base, PackedLinear):
        return module.base
    raise UnfitError


def _normalization(norm: nn.Module) -> int:
    if isinstance(norm, nn.Identity):
        return PLAIN
    if isinstance(norm, RMSNorm):
        return RMS
    if isinstance(norm, LayerNorm):
        return LAYER
    raise UnfitError


def _numbers(norm: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
    """Weight, bias and eps in float32."""
    if isinstance(norm, RMSNorm):
        return norm.scale.detach().float().contiguous(), None, norm.eps
    if isinstance(norm, LayerNorm):
        bias = None if norm.bias is None else norm.bias.detach().float()
        return norm.weight.detach().float(), bias, norm.eps
    return None, None, 0.0


# --- what a pass over a batch is ---------------------------------------------------------------------------------


def pass_through(
    stack: Stack, x_BTD: Tensor, sight: Sight, cache: Cache | None, encoded: Encoded | None, angles: Angles
) -> Tensor | None:
    """All blocks and the last norm, see Stack.forward; None where they have to run one by one.

    A cache has begun the new tokens. Padding has states of zero.
    """
    if not packed.planes() or is_steered() or not usable(x_BTD) or stack.training or x_BTD.requires_grad:
        return None
    with contextlib.suppress(UnfitError):
        first = stack.blocks[0]
        assert isinstance(first, Block)
        leaf_of(first.attention.output)  # before any work: most models are not in codes
        if cache is None:
            return _alone(stack, x_BTD, sight, encoded, angles)
        return _cached(stack, x_BTD, sight, cache, encoded, angles)
    return None


def _alone(stack: Stack, x_BTD: Tensor, sight: Sight, encoded: Encoded | None, angles: Angles) -> Tensor:
    """Sequences, or the documents that were packed into one, each for itself."""
    (B, T, _), real, documents = x_BTD.shape, sight.k_real, sight.q_documents
    if documents is not None and (real is not None or encoded is not None):
        raise UnfitError
    rows = torch.full((B, T, 3), -1)
    rows[..., 1] = sight.q_positions
    if documents is not None:
        is_first = torch.ones(B, T, dtype=torch.bool)
        is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        begins = is_first.flatten().nonzero()[:, 0]
        rows[..., 0] = is_first.flatten().cumsum(0).view(B, T) - 1
    else:
        rows[..., 0] = torch.arange(B)[:, None]
        lengths = torch.full((B,), T) if real is None else real.sum(1)
        begins = lengths.cumsum(0) - lengths
    chosen = slice(None) if real is None else real.flatten()
    rows = rows.flatten(0, 1)[chosen].contiguous()
    starts = torch.cat((begins, torch.tensor([len(rows)])))
    in_order = bool((torch.arange(len(rows)) - starts[rows[:, 0]] == rows[:, 1]).all())
    room = int(starts.diff().max()) if len(rows) else 0
    if encoded is not None:
        room = max(room, encoded.states.shape[1])
    if not room:
        raise UnfitError
    keys = Keys(rows, torch.tensor([0, in_order]), rows[:, 1].contiguous(), starts)
    program = Fused(stack, len(rows), {None: keys}, room, None, encoded)
    found = program.run(x_BTD.flatten(0, 1)[chosen], _by_row(angles, B, chosen))
    if real is None:
        return found.view_as(x_BTD)
    out = torch.zeros_like(x_BTD)
    out[real] = found
    return out


def _cached(stack: Stack, x_BTD: Tensor, sight: Sight, cache: Cache, encoded: Encoded | None, angles: Angles) -> Tensor:
    """New tokens, with steps that the cache keeps until it changes."""
    B, T, D = x_BTD.shape
    if any(slots.columns(sight.q_positions) is None for slots in cache.groups.values()):
        raise UnfitError
    program = kept(cache, Fused, B, T, lambda: Fused(stack, B * T, *columns_of(cache, B, T, encoded), cache, encoded))
    program.place(cache, sight.q_positions, T)
    found = program.run(x_BTD.flatten(0, 1), _by_row(angles, B), T if cache.asks_last(sight.k_real) else 1)
    return found.view(B, -1, D).clone()


def _by_row(angles: Angles, B: int, chosen: Tensor | slice = slice(None)) -> Angles:
    """Angles (B|1, T, 1, pairs) of the chosen tokens, one after the other: (rows, pairs)."""
    one, other = (None if some is None else some[:, :, 0].expand(B, -1, -1).flatten(0, 1)[chosen] for some in angles)
    return one, other


def columns_of(cache: Cache, B: int, T: int, encoded: Encoded | None) -> tuple[dict[int | None, Keys], int]:
    """Places for T new tokens of each row, `rows` still to be told; and how many columns a token sees at most."""
    keys = {}
    for window, slots in cache.groups.items():
        rows = torch.arange(B).repeat_interleave(T)[:, None].repeat(1, 3)
        keys[window] = Keys(rows, torch.zeros(2, dtype=torch.long), slots.positions)
    room = max(slots.capacity for slots in cache.groups.values()) + 1
    return keys, max(room, 0 if encoded is None else encoded.states.shape[1])


Steps = TypeVar("Steps", bound=Fused)
FEW = 64  # tokens of a pass whose buffers are small enough to stay beside those of another
_changes = 0


def adapters_changed() -> None:
    """From now on other adapters count: steps that were made before hold those of then."""
    global _changes
    _changes += 1


def kept(cache: Cache, what: type[Steps], B: int, T: int, make: Callable[[], Steps]) -> Steps:
    """The steps for T new tokens in each of B rows, made when they are first asked for or the cache has moved.

    Raises UnfitError, and again each time; that too is kept.
    """
    key = _made_for(cache, what, B, T)
    if key not in cache.programs:
        small = [(old, some) for old, some in cache.programs.items() if isinstance(some, Fused) and some.rows <= FEW]
        cache.programs = {**dict(small[-1:]), key: None}
        cache.programs = {**cache.programs, key: make()}
        cache.programs[_made_for(cache, what, B, T)] = cache.programs[key]  # cross-attention's keys are there only now
    cache.fused = cache.programs[key]
    if not isinstance(cache.fused, what):
        raise UnfitError
    return cache.fused


def _made_for(cache: Cache, what: type, B: int, T: int) -> tuple[object, ...]:
    """What steps depend on: a cache that was reordered has moved."""
    # A program holds the positions it reads, so that no others can come to lie at their address.
    tensors = [tensor for slots in cache.groups.values() for tensor in (slots.keys.numbers, slots.positions)]
    tensors += [pair[0] for pair in cache.cross if pair is not None]
    return what, B, T, _changes, packed.planes(), torch.get_num_threads(), *(tensor.data_ptr() for tensor in tensors)
