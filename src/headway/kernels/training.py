"""Operations of the training step that are fused on CPU, each beside the PyTorch formula it equals.

`rms_norm`, `split_heads` and `relu2` choose by what their inputs allow; the twins (`*_twin`) are the definition.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from headway.kernels.native import address, library, usable

Context = Any  # torch's FunctionCtx has no public type for saved state


def apply(function: type[torch.autograd.Function], *inputs: object) -> Any:
    """`function.apply`, which torch leaves untyped."""
    return function.apply(*inputs)  # type: ignore[no-untyped-call]


class HeadShape(NamedTuple):
    """N query heads, K key and K value heads in a fused projection, and how positions pair dimensions."""

    N: int
    K: int
    layout: str
    eps: float


class _Heads(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("B", "T", "N", "K", "H", "pairs", "angle_rows", "inter", "normed")]
    _fields_ += [("eps", ctypes.c_float)]


# --- RMSNorm -----------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""
    if not usable(x, weight):
        # Under autocast x may be narrower than the weight, for which PyTorch has no fused kernel.
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    out: Tensor = apply(_RMSNorm, x, weight, eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, rows, size = torch.empty_like(x), x.numel() // x.shape[-1], x.shape[-1]
        rstd = x.new_empty(rows)
        lib = library()
        assert lib is not None
        lib.hw_rms_norm_forward(
            address(x), address(weight), address(y), address(rstd), _i64(rows), _i64(size), ctypes.c_float(eps)
        )
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        lib = library()
        assert lib is not None
        lib.hw_rms_norm_backward(*map(address, (dy, x, weight, rstd, dx, dw)), _i64(len(rstd)), _i64(x.shape[-1]))
        return dx, dw, None


# --- heads: split, QK-norm, RoPE ---------------------------------------------------------------------------------


def rotate(x_BTNH: Tensor, angles: Tensor, layout: str) -> Tensor:
    """Turn each pair of the first R dimensions of a head by its angle; the rest passes through.

    Args:
        x_BTNH: queries or keys.
        angles: (B|1, T, 1, R/2) complex.
        layout: "interleaved" pairs (2i, 2i + 1), "half" pairs (i, i + R/2).
    """
    rotary = 2 * angles.shape[-1]
    if rotary < x_BTNH.shape[-1]:
        turned = rotate(x_BTNH[..., :rotary], angles, layout)
        return torch.cat((turned, x_BTNH[..., rotary:]), -1)
    wide = x_BTNH if x_BTNH.dtype in (torch.float32, torch.float64) else x_BTNH.float()
    if layout == "interleaved":
        pairs = torch.view_as_complex(wide.reshape(*wide.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * angles).flatten(-2).to(x_BTNH.dtype)
    cos, sin = angles.real, angles.imag
    first, second = wide.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BTNH.dtype)


def split_heads_twin(
    qkv: Tensor, angles: Tensor | None, weights: tuple[Tensor, Tensor] | None, shape: HeadShape
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, (N + 2K) H) -> q (B, T, N, H), k and v (B, T, K, H), with RMS-normalised and rotated queries and keys."""
    heads = qkv.view(*qkv.shape[:-1], shape.N + 2 * shape.K, -1)
    q, k, v = torch.split(heads, [shape.N, shape.K, shape.K], dim=2)
    if weights is not None:
        size = weights[0].shape
        q, k = (F.rms_norm(x, size, w.to(x.dtype), shape.eps) for x, w in zip((q, k), weights, strict=True))
    if angles is not None:
        q, k = rotate(q, angles, shape.layout), rotate(k, angles, shape.layout)
    return q, k, v


def split_heads(
    qkv: Tensor, angles: Tensor | None, weights: tuple[Tensor, Tensor] | None, shape: HeadShape
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_heads_twin` in one pass over memory where the native library can take it.

    Args:
        qkv: (B, T, (N + 2K) H), the output of the fused projection.
        angles: (B|1, T, 1, R/2) complex, None without RoPE.
        weights: (H,) of the query and the key norm, None without QK-norm.
    """
    if angles is None or angles.dtype != torch.complex64 or not usable(qkv, *(weights or ())):
        return split_heads_twin(qkv, angles, weights, shape)
    wq, wk = weights if weights is not None else (qkv.new_empty(0), qkv.new_empty(0))
    q, k, v = apply(_SplitHeads, qkv, angles, wq, wk, shape)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, qkv: Tensor, angles: Tensor, wq: Tensor, wk: Tensor, shape: HeadShape
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv, angles = qkv.contiguous(), angles.contiguous()
        B, T, width = qkv.shape
        N, K = shape.N, shape.K
        H = width // (N + 2 * K)
        heads = _Heads(
            B, T, N, K, H, angles.shape[-1], T if len(angles) > 1 else 0, shape.layout == "interleaved", len(wq) > 0
        )
        heads.eps = shape.eps
        q, k, v = qkv.new_empty(B, N, T, H), qkv.new_empty(B, K, T, H), qkv.new_empty(B, K, T, H)
        rstd = qkv.new_empty(B, T, N + K) if len(wq) else qkv.new_empty(0)
        lib = library()
        assert lib is not None
        lib.hw_heads_forward(*map(address, (qkv, angles, wq, wk, q, k, v, rstd)), ctypes.byref(heads))
        ctx.save_for_backward(qkv, angles, wq, wk, rstd)
        ctx.heads = heads
        return q, k, v

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, angles, wq, wk, rstd = ctx.saved_tensors
        d = [g if g.stride(-1) == 1 else g.contiguous() for g in gradients]
        strides = (ctypes.c_int64 * 9)(*(g.stride(i) for g in d for i in range(3)))
        dqkv, dwq, dwk = torch.empty_like(qkv), torch.empty_like(wq), torch.empty_like(wk)
        lib = library()
        assert lib is not None
        lib.hw_heads_backward(
            *map(address, (qkv, angles, wq, wk, rstd, *d)),
            strides,
            *map(address, (dqkv, dwq, dwk)),
            ctypes.byref(ctx.heads),
        )
        return dqkv, None, dwq, dwk, None


# --- causal attention over short sequences -----------------------------------------------------------------------

# Above this many positions the weights kept for the backward pass (T^2 per head) cost more than recomputing them.
LONGEST = 512
BLOCK = 128


class _Block(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("B", "N", "C", "S", "T", "first")), ("scale", ctypes.c_float)]


def causal_attention(
    q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, scale: float, starts_BT: Tensor | None = None
) -> Tensor | None:
    """softmax(scale q k^T) v under the causal triangle, for training on sequences of at most LONGEST tokens.

    Matrix products over blocks of queries, each with the keys up to its end, and one fused pass for mask, scale and
    softmax. The queries of a group stand as more rows beside their shared keys. None where this path cannot or should
    not take the inputs; then the caller's own backend does. The twin is `headway.nn.attention`'s formula.

    Args:
        starts_BT: (B, T) int64, the first position each query may see (packed documents); None: position 0.
    """
    T = q_BNTH.shape[2]
    fits = k_BKTH.shape[2] == T <= LONGEST and q_BNTH.requires_grad and scale > 0
    if not fits or not usable(q_BNTH, k_BKTH, v_BKTH):
        return None
    out: Tensor = apply(_CausalAttention, q_BNTH, k_BKTH, v_BKTH, scale, starts_BT)
    return out


class _CausalAttention(torch.autograd.Function):
    """Inside, M = B K matrices of keys; a block of C queries is G C rows, G = N / K, row r at position r mod C."""

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None) -> Tensor:
        lib = library()
        assert lib is not None
        _B, N, T, H = q.shape
        G = N // k.shape[1]
        starts = None if starts is None else starts.contiguous()
        q_MGTH, k_MTH, v_MTH = q.reshape(-1, G, T, H), k.reshape(-1, T, H), v.reshape(-1, T, H)
        weights, outs = [], []
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            P = torch.bmm(_rows(q_MGTH, start, end), k_MTH[:, :end].mT)
            block = _Block(len(q), q.shape[1], end - start, end, T, start, scale)
            lib.hw_causal_softmax(address(P), _optional(starts), ctypes.byref(block))
            outs.append(torch.bmm(P, v_MTH[:, :end]).view(-1, G, end - start, H))
            weights.append(P)
        ctx.save_for_backward(q_MGTH, k_MTH, v_MTH, *weights)
        ctx.scale, ctx.starts = scale, starts
        return _joined(outs).view(q.shape)

    @staticmethod
    def backward(ctx: Context, d_out: Tensor) -> tuple[Tensor | None, ...]:
        lib = library()
        assert lib is not None
        q_MGTH, k_MTH, v_MTH, *weights = ctx.saved_tensors
        _, G, T, H = q_MGTH.shape
        d_MGTH, B = d_out.reshape(q_MGTH.shape), len(d_out)
        dqs: list[Tensor] = []
        dk = dv = k_MTH
        # The last block comes first: it sees every key, so its products begin the sums of dk and dv.
        for start, P in reversed([*zip(range(0, T, BLOCK), weights, strict=True)]):
            end = P.shape[2]
            d = _rows(d_MGTH, start, end)
            dS = torch.bmm(d, v_MTH[:, :end].mT)
            block = _Block(B, d_out.shape[1], end - start, end, T, start, ctx.scale)
            lib.hw_causal_softmax_backward(address(P), address(dS), _optional(ctx.starts), ctypes.byref(block))
            dqs.insert(0, torch.bmm(dS, k_MTH[:, :end]).view(-1, G, end - start, H))
            q = _rows(q_MGTH, start, end)
            if end == T:
                dk, dv = torch.bmm(dS.mT, q), torch.bmm(P.mT, d)
            else:
                dk[:, :end].baddbmm_(dS.mT, q)
                dv[:, :end].baddbmm_(P.mT, d)
        return (*(x.view(B, -1, T, H) for x in (_joined(dqs), dk, dv)), None, None)


def _optional(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else address(tensor)


def _joined(blocks_MGCH: list[Tensor]) -> Tensor:
    """Blocks of positions side by side; a single one is not copied."""
    return torch.cat(blocks_MGCH, 2) if len(blocks_MGCH) > 1 else blocks_MGCH[0]


def _rows(x_MGTH: Tensor, start: int, end: int) -> Tensor:
    """Positions start to end of every query head of a group, as the rows of one matrix."""
    return x_MGTH[:, :, start:end].reshape(len(x_MGTH), -1, x_MGTH.shape[3])


# --- squared ReLU ------------------------------------------------------------------------------------------------


def relu2_twin(x: Tensor) -> Tensor:
    """max(x, 0)^2 (arXiv:2109.08668)."""
    return F.relu(x).square()


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (arXiv:2109.08668), one pass forward and one backward."""
    if not usable(x):
        return relu2_twin(x)
    out: Tensor = apply(_ReLU2, x)
    return out


class _ReLU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        lib = library()
        assert lib is not None
        lib.hw_relu2_forward(address(x), address(y), _i64(x.numel()))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        lib = library()
        assert lib is not None
        lib.hw_relu2_backward(address(dy), address(x), address(dx), _i64(x.numel()))
        return dx


def _i64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)
