"""A stack of blocks as one native call: the fast path of decoding.

The blocks stay the definition (block.py). Where every part of them has a kernel (weights in codes, on a CPU), the walk
below writes down what they would do as steps over fixed buffers, once for a cache and a number of rows; a forward pass
is then a single call. Where anything has none, `Fused.build` says so by None, and the blocks run as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headway.kernels import steps
from headway.kernels.codes import ROWS
from headway.kernels.native import usable
from headway.kernels.steps import LAYER, PLAIN, RMS, Buffers, Coded, Linear, Norm, Program
from headway.nn import packed
from headway.nn.attention import is_steered
from headway.nn.block import Block, Residual
from headway.nn.cache import Cache, Slots
from headway.nn.feed_forward import ACTIVATIONS, FeedForward
from headway.nn.norms import LayerNorm, RMSNorm
from headway.nn.packed import PackedLinear

if TYPE_CHECKING:
    from headway.nn.stack import Stack

_NAMES = {function: steps.ACTIVATIONS.index(name) for name, function in ACTIVATIONS.items()}


class UnfitError(Exception):
    """Some part of a stack has no kernel."""


class Fused:
    """A stack over `rows` tokens (B x T, row by row) with their cache.

    Args:
        stack: whose blocks are walked. cache: whose columns are read and written. rows: tokens a call.
    """

    def __init__(self, stack: Stack, cache: Cache, rows: int) -> None:
        self.rows, self._buffers, self._steps = rows, Buffers(), list[ctypes.Structure]()
        first = stack.blocks[0]
        assert isinstance(first, Block)
        D, heads = _leaf(first.attention.output).shape[0], first.attention
        self.x = self._buffers.floats(rows, D)
        self._branch = self._buffers.floats(rows, D)
        self._qkv = self._buffers.floats(rows, (heads.N + 2 * heads.K) * heads.H)
        self._mixed = self._buffers.floats(rows, heads.N * heads.H)
        self._where = {window: torch.empty(rows, 3, dtype=torch.long) for window in cache.groups}
        for where in self._where.values():
            where[:, 0] = torch.arange(rows) // (rows // len(cache.lengths))
        self._used = {window: ctypes.c_int64() for window in cache.groups}
        self._angles: dict[bool, Tensor] = {}
        self._room = max(slots.capacity for slots in cache.groups.values()) + 1
        self._scratch = self._buffers.floats(torch.get_num_threads(), steps.QUERIES * self._room)
        self._codes: dict[tuple[int, int, str], Coded] = {}
        for layer, block in enumerate(stack.blocks):
            assert isinstance(block, Block)
            turns = stack.turned[layer] and stack.rope is not None
            self._block(
                block, cache, layer, self._angles_of(stack, stack.windows[layer] is not None) if turns else None
            )
        self._norm(stack.norm, self.x, out=self.x)
        self._program = Program(self._steps)

    @classmethod
    def build(cls, stack: Stack, cache: Cache, x_BTD: Tensor) -> Fused | None:
        """The steps of a stack, kept with the cache until it changes; None where they cannot be taken."""
        if not packed.planes() or is_steered() or not usable(x_BTD) or stack.training or stack.bias is not None:
            return None
        B, T, _ = x_BTD.shape
        if x_BTD.requires_grad or any(slots.columns(T) is None for slots in cache.groups.values()):
            return None
        wanted = _made_for(cache, B * T)
        if cache.fused_for != wanted:
            cache.fused, cache.fused_for = None, wanted  # that a stack is unfit is kept as well
            with contextlib.suppress(UnfitError):
                cache.fused = cls(stack, cache, B * T)
        return cache.fused if isinstance(cache.fused, cls) else None

    def run(
        self, x_BTD: Tensor, positions: Tensor, cache: Cache, angles: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        """(B, T, D) -> (B, T, D): all blocks and the last norm. `cache` has begun the new tokens."""
        B, T, _ = x_BTD.shape
        self.x.copy_(x_BTD.reshape(self.rows, -1))
        for window, slots in cache.groups.items():
            where = self._where[window].view(B, T, 3)
            columns = slots.columns(T)
            assert columns is not None
            where[..., 1], where[..., 2] = positions, columns
            self._used[window].value = slots.used
        for is_window, kept in self._angles.items():
            given = angles[is_window]
            assert given is not None
            kept.view(B, T, -1, 2).copy_(torch.view_as_real(given)[:, :, 0])
        self._program.run(self.rows)
        return self.x.view(B, T, -1).clone()

    def _angles_of(self, stack: Stack, is_window: bool) -> Tensor:
        """Room for cosines and sines (rows, pairs, 2), of the layers with a window or of the others."""
        rope = stack.window_rope if is_window else stack.rope
        assert rope is not None
        pairs = int(rope.d_head * rope.config.fraction) // 2
        return self._angles.setdefault(is_window, torch.empty(self.rows, pairs, 2))

    def _block(self, block: Block, cache: Cache, layer: int, angles: Tensor | None) -> None:
        first, last = block.attention_residual, block.feed_forward_residual
        if block.cross_attention is not None or not isinstance(block.feed_forward, FeedForward):
            raise UnfitError
        beside = self._inputs(last.before, block.feed_forward.up, "beside") if block.is_parallel else None
        self._attention(block, self._inputs(first.before, block.attention.qkv), cache, layer, angles)
        self._join(first, block.attention.output, self._mixed)
        self._feed_forward(block.feed_forward, beside or self._inputs(last.before, block.feed_forward.up), last)

    def _attention(
        self, block: Block, inputs: dict[int, Coded], cache: Cache, layer: int, angles: Tensor | None
    ) -> None:
        part, (is_causal, seen) = block.attention, block.mask
        window, index = cache.layers[layer]
        slots = cache.groups[window]
        self._linear(part.qkv, inputs, self._qkv)
        columns = self._columns(slots, index, window)
        q, k = part.q_norm, part.k_norm
        kind = _normalization(q)
        if kind != PLAIN and not part.norm_heads:
            raise UnfitError
        (q_weight, q_bias, eps), (k_weight, k_bias, _) = map(_numbers, (q, k))
        keep = self._buffers.keep
        pairs = 0 if angles is None else angles.shape[1]
        where = self._where[window].data_ptr()
        self._steps.append(
            steps.Heads(
                self._qkv.data_ptr(), *map(keep, (q_weight, q_bias, k_weight, k_bias, angles)), where,
                part.N, part.K, part.H, pairs, part.layout == "interleaved", kind, eps, columns,
            )
        )  # fmt: skip
        self._steps.append(
            steps.Attend(
                self._qkv.data_ptr(), where, self._mixed.data_ptr(), self._scratch.data_ptr(), part.N, part.K, part.H,
                self._qkv.shape[1], seen or 0, is_causal, self._room, part.scale, part.softcap or 0.0, columns,
            )
        )  # fmt: skip

    def _columns(self, slots: Slots, index: int, window: int | None) -> steps.Columns:
        keys, values = slots.keys[index], slots.values[index]
        if keys.dtype not in (torch.float32, torch.float16):
            raise UnfitError
        used = ctypes.addressof(self._used[window])
        places = (keys.data_ptr(), values.data_ptr(), slots.positions.data_ptr(), used)
        strides = (*keys.stride()[:3], slots.positions.stride(0))
        return steps.Columns(*places, *strides, keys.dtype == torch.float16)

    def _feed_forward(self, part: FeedForward, inputs: dict[int, Coded], residual: Residual) -> None:
        if part.gated and _leaf(part.up).shape[0] % (2 * ROWS):
            raise UnfitError
        hidden = self._buffers.floats(self.rows, _leaf(part.down).shape[1])
        self._linear(part.up, inputs, hidden, activation=_NAMES[part.activation], gated=part.gated)
        self._join(residual, part.down, hidden)

    def _join(self, residual: Residual, leaf: nn.Module, source: Tensor) -> None:
        """The branch's last product and what joins it to the stream."""
        inputs = self._inputs(nn.Identity(), leaf, source=source)
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
        out = {}
        for chunk in dict.fromkeys(part.chunk for _, part in _leaf(leaf).packed.parts):
            key = (source.shape[1], chunk, purpose)
            if key not in self._codes:
                self._codes[key] = self._buffers.codes(self.rows, source.shape[1], chunk, packed.planes())
            out[chunk] = self._codes[key]
            self._norm(norm, source, codes=out[chunk], scale=_leaf(leaf).packed.input_scale)
        return out

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
        """out = or += W x + b, one step for each group of rows."""
        leaf = _leaf(leaf)
        parts = [part for _, part in leaf.packed.parts]
        if gated and len(parts) > 1:
            raise UnfitError
        begin = 0
        for part in parts:
            bias = None if leaf.bias is None else self._buffers.padded(leaf.bias[begin : begin + part.shape[0]].float())
            for tensor in (part.codes, part.scales, part.minima):
                self._buffers.keep(tensor)
            place = out.data_ptr() + 4 * begin
            weight = steps.described(part, bias)
            self._steps.append(Linear(weight, inputs[part.chunk], place, out.shape[1], adds, activation, gated))
            begin += part.shape[0]


def _leaf(module: nn.Module) -> PackedLinear:
    if isinstance(module, PackedLinear):
        return module
    raise UnfitError


def _made_for(cache: Cache, rows: int) -> tuple[int, ...]:
    """What steps depend on: a cache that was reordered has moved."""
    return rows, packed.planes(), torch.get_num_threads(), *(slots.keys.data_ptr() for slots in cache.groups.values())


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
