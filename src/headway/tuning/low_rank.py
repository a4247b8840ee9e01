"""Adapters of low rank on a linear layer of any sort, one or several, swapped and weighted while the model stays.

    y = W x + b + strength * s B A x        A (r, C), B (R, r), s = alpha / r, or alpha / sqrt(r) (rsLoRA)

LoRA: arXiv:2106.09685, rsLoRA: arXiv:2312.03732. With magnitudes (DoRA, arXiv:2402.09353) a row of W + s B A has the
length m, which is learned apart from its direction: y = m / |W + s B A| (W x + s B A x) + b; its length counts as a
constant for the gradient, as in the paper's section 4.3.

A fused projection holds several maps (queries, keys and values; gate and product). Each is a part with its own A and B,
as where they are layers of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from headway.kernels.training import Context, apply
from headway.nn.precision import wide
from headway.tuning.beside import OnLayer, Rows, weight_of

Spans = Sequence[tuple[Rows, int, float]]
"""Of each part: its rows, its rank, its scale."""


class LowRank(OnLayer):
    """One adapter on one layer.

    Args:
        columns, rows: C and R of the layer. parts: {name: its rows}, in order. ranks, scales: r and s of each part.
        dropout: of the inputs of A. dora: whether rows have magnitudes.
    """

    merges = True

    def __init__(
        self,
        columns: int,
        rows: int,
        parts: Mapping[str, Rows],
        ranks: Mapping[str, int],
        scales: Mapping[str, float],
        dropout: float = 0.0,
        *,
        dora: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.parts, self.scales, self.dropout = rows, dict(parts), dict(scales), dropout
        self.A = nn.ParameterDict({name: nn.Parameter(torch.empty(ranks[name], columns)) for name in parts})
        self.B = nn.ParameterDict({name: nn.Parameter(torch.zeros(p.size, ranks[name])) for name, p in parts.items()})
        lengths = {name: nn.Parameter(torch.ones(part.size)) for name, part in parts.items()} if dora else {}
        self.magnitude = nn.ParameterDict(lengths)
        for tensor in self.A.values():
            nn.init.kaiming_uniform_(tensor, a=5**0.5)  # uniform within 1 / sqrt(C), as nn.Linear begins

    @property
    def is_single(self) -> bool:
        """Magnitudes count whole, and beside no other."""
        return bool(self.magnitude)

    @torch.no_grad()
    def begin(self, weight: Tensor, *, svd: bool = False) -> None:
        """Begin with the lengths that the rows of a weight (R, C) have, and with `svd` with the r directions of inputs
        that it stretches most, as long in all as a random start is on average."""
        for name, part in self.parts.items():
            own = weight[part.start : part.start + part.size].float()
            if name in self.magnitude:
                self.magnitude[name].copy_(own.norm(dim=1))
            A = self.A[name]
            if svd and len(A) <= min(own.shape):
                A.copy_(torch.linalg.svd(own, full_matrices=False).Vh[: len(A)] / 3**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """s B A x of all parts, (..., C) -> (..., R); zero where there is no part."""
        x = F.dropout(x, self.dropout, self.training)
        # One product for all A: the parts read the same inputs. Asked for by name, since a ParameterDict sorts.
        inner = F.linear(x, torch.cat([self.A[name] for name in self.parts]).to(x.dtype))
        pieces, at = [], 0
        shares = torch.split(inner, [len(self.A[name]) for name in self.parts], -1)
        for (name, part), share in zip(self.parts.items(), shares, strict=True):
            if part.start > at:
                pieces.append(inner.new_zeros(*inner.shape[:-1], part.start - at))
            pieces.append(F.linear(share * self.scales[name], self.B[name].to(x.dtype)))
            at = part.start + part.size
        if at < self.rows:
            pieces.append(inner.new_zeros(*inner.shape[:-1], self.rows - at))
        return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]

    @torch.no_grad()
    def thin(self, strength: float) -> tuple[Tensor, Tensor] | None:
        """A of all parts, one below the other, and strength * s B at each part's rows and columns."""
        if self.magnitude:
            return None
        A, at = torch.cat([wide(self.A[name]) for name in self.parts]), 0
        B = A.new_zeros(self.rows, len(A))
        for name, part in self.parts.items():
            columns = slice(at, at + len(self.A[name]))
            B[part.start : part.start + part.size, columns] = strength * self.scales[name] * wide(self.B[name])
            at = columns.stop
        return A, B

    def matrix(self) -> Tensor:
        """s B A as a matrix, (R, C), in float32 at least."""
        (first, *_) = self.A.values()
        out = wide(first).new_zeros(self.rows, first.shape[1])
        for name, part in self.parts.items():
            delta = self.scales[name] * wide(self.B[name]) @ wide(self.A[name])
            out[part.start : part.start + part.size] = delta
        return out

    def lengths(self, weight: Tensor) -> Tensor:
        """m / |W + s B A| of each row, (R,); 1 where there is no part."""
        found = wide(weight).new_ones(self.rows)
        norms = (wide(weight) + self.matrix()).detach().norm(dim=1)
        for name, part in self.parts.items():
            rows = slice(part.start, part.start + part.size)
            found = torch.cat((found[: rows.start], self.magnitude[name] / norms[rows], found[rows.stop :]))
        return found

    def whole(self, x: Tensor, base: nn.Module, strength: float) -> Tensor | None:
        """Where gradients are wanted of a frozen layer and nothing has to be dropped, one operation (_Joined)."""
        drops = self.training and self.dropout > 0
        if drops or self.magnitude or not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return None
        weight, bias = frozen(base)
        A = torch.cat([self.A[name] for name in self.parts])
        if weight is None or A.dtype != x.dtype or not (x.requires_grad or A.requires_grad):
            return None
        spans = [(part, len(self.A[name]), strength * self.scales[name]) for name, part in self.parts.items()]
        out: Tensor = apply(_Joined, x, weight, bias, spans, A, *(self.B[name] for name in self.parts))
        return out

    def after(self, out: Tensor, x: Tensor, base: nn.Module, strength: float) -> Tensor:
        """W x + b and this; with magnitudes each row at its own length."""
        if not self.magnitude:
            delta: Tensor = self(x)
            return out + (delta if strength == 1.0 else delta * strength)
        bias = base.bias
        assert bias is None or isinstance(bias, Tensor)
        plain = out if bias is None else out - bias
        out = (plain + self(x)) * self.lengths(weight_of(base)).to(x.dtype)
        return out if bias is None else out + bias

    def merged(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        """W + s B A, with magnitudes at their lengths."""
        if self.magnitude:
            return (weight + self.matrix()) * self.lengths(weight)[:, None], bias
        return weight + strength * self.matrix(), bias


def frozen(base: nn.Module) -> tuple[Callable[[], Tensor] | None, Tensor | None]:
    """(what makes a layer's weight when it is asked, its bias), None for a weight or a bias that learns."""
    bias = base.bias if isinstance(base.bias, Tensor) else None
    if (bias is not None and bias.requires_grad) or any(p.requires_grad for p in base.parameters()):
        return None, None
    return partial(weight_of, base), bias


class _Joined(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T of all parts as one operation.

    What is added goes into the product's own memory, and the backward pass keeps x and x A^T alone: a layer in codes is
    unpacked twice, in between no weight stands in floats.
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None, spans: Spans, A: Tensor, *Bs: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, inner = F.linear(rows, weight().to(x.dtype), None if bias is None else bias.to(x.dtype)), rows @ A.T
        for (part, share, scale), B in zip(_shares(spans, inner), Bs, strict=True):
            out[:, part.start : part.start + part.size].addmm_(share, B.T, alpha=scale)
        ctx.save_for_backward(rows, inner, A, *Bs)
        ctx.weight, ctx.spans, ctx.shape = weight, spans, x.shape
        return out.view(*x.shape[:-1], out.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, A, *Bs = ctx.saved_tensors
        dy = dy.reshape(len(rows), -1)
        d_inner, d_Bs = torch.empty_like(inner), []
        shares = zip(_shares(ctx.spans, inner), _shares(ctx.spans, d_inner), Bs, strict=True)
        for (part, share, scale), (_, d_share, _), B in shares:
            own = dy[:, part.start : part.start + part.size]
            d_share.addmm_(own, B, beta=0, alpha=scale)
            d_Bs.append((share.T @ own).mul_(scale).T)  # r rows of R go faster than R of r
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ ctx.weight().to(dy.dtype)).addmm_(d_inner, A).view(ctx.shape)
        return dx, None, None, None, d_inner.T @ rows, *d_Bs


def _shares(spans: Spans, inner: Tensor) -> Iterator[tuple[Rows, Tensor, float]]:
    """Each part with its columns of x A^T and its scale."""
    shares = torch.split(inner, [rank for _, rank, _ in spans], 1)
    return ((part, share, scale) for (part, _, scale), share in zip(spans, shares, strict=True))
