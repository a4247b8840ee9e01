"""Adapters of low rank on a linear layer of any sort, one or several, swapped and weighted while the model stays.

    y = W x + b + strength * s B A x        A (r, C), B (R, r), s = alpha / r, or alpha / sqrt(r) (rsLoRA)

LoRA: arXiv:2106.09685, rsLoRA: arXiv:2312.03732. With magnitudes (DoRA, arXiv:2402.09353) a row of W + s B A has the
length m, which is learned apart from its direction: y = m / |W + s B A| (W x + s B A x) + b; its length counts as a
constant for the gradient, as in the paper's section 4.3.

A fused projection holds several maps (queries, keys and values; gate and product). Each is a part with its own A and B,
as where they are layers of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.nn.packed import PackedLinear
from headway.nn.precision import wide


class Rows(NamedTuple):
    """A part of a layer's rows: [start, start + size)."""

    start: int
    size: int


class LowRank(nn.Module):
    """One adapter on one layer.

    Args:
        columns, rows: C and R of the layer. parts: {name: its rows}, in order. ranks, scales: r and s of each part.
        dropout: of the inputs of A. dora: whether rows have magnitudes.
    """

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

    @torch.no_grad()
    def begin(self, weight: Tensor) -> None:
        """Begin with the lengths that the rows of a weight (R, C) have."""
        for name, lengths in self.magnitude.items():
            rows = self.parts[name]
            lengths.copy_(weight[rows.start : rows.start + rows.size].float().norm(dim=1))

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


class Adapted(nn.Module):
    """A linear layer, of floats or in codes, with adapters by name.

    `strengths` says which of them count and how much; those of the model change together (`adapters.use`). One with
    magnitudes can only be used alone.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.low_rank = nn.ModuleDict()
        self.strengths: dict[str, float] = {}

    def active(self) -> dict[str, tuple[LowRank, float]]:
        """The adapters in use that this layer has."""
        found = {name: (self.low_rank[name], much) for name, much in self.strengths.items() if name in self.low_rank}
        return {name: (adapter, much) for name, (adapter, much) in found.items() if isinstance(adapter, LowRank)}

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., R)."""
        out: Tensor = self.base(x)
        for adapter, strength in self.active().values():
            if not adapter.magnitude:
                delta = adapter(x)
                out = out + (delta if strength == 1.0 else delta * strength)
                continue
            bias = self.base.bias
            assert bias is None or isinstance(bias, Tensor)
            plain = out if bias is None else out - bias
            out = (plain + adapter(x)) * adapter.lengths(weight_of(self.base)).to(x.dtype)
            out = out if bias is None else out + bias
        return out

    def merged(self) -> Tensor:
        """The weight that the layer has with its adapters in use, (R, C), in float32 at least."""
        weight = wide(weight_of(self.base))
        for adapter, strength in self.active().values():
            if adapter.magnitude:
                weight = (weight + adapter.matrix()) * adapter.lengths(weight)[:, None]
            else:
                weight = weight + strength * adapter.matrix()
        return weight.detach()


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(R, C) of a linear layer of floats or in codes, with adapters or without."""
    layer = layer.base if isinstance(layer, Adapted) else layer
    if isinstance(layer, PackedLinear):
        return layer.shape
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def weight_of(layer: nn.Module) -> Tensor:
    """Its weight in floats, (R, C), without adapters."""
    layer = layer.base if isinstance(layer, Adapted) else layer
    if isinstance(layer, PackedLinear):
        return layer.packed.unpack()
    assert isinstance(layer, nn.Linear)
    return layer.weight
