"""What can stand beside a model's weights: by name, switched and weighted while the model stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.errors import BugError
from headway.kernels.codes import CodedMatrix, from_blocks
from headway.kernels.ggml import BLOCKS, quantize
from headway.nn.fused import UnfitError
from headway.nn.packed import PackedLinear
from headway.nn.precision import wide

THIN = "Q8_0"
"""The format of adapters where the layer beside them computes in codes."""


class Rows(NamedTuple):
    """A part of a layer's rows: [start, start + size)."""

    start: int
    size: int


class Addition(nn.Module):
    """One adapter in one place.

    `is_single`: it counts whole, and beside no other. `merges`: a weight and a bias can take it in.
    """

    merges = False

    @property
    def is_single(self) -> bool:
        """Whether it can only be used alone, at strength 1."""
        return True


Kind = TypeVar("Kind", bound=Addition)


class Site(nn.Module):
    """Where additions stand, by name; `strengths` says which of them count and how much."""

    def __init__(self) -> None:
        super().__init__()
        self.added = nn.ModuleDict()
        self.strengths: dict[str, float] = {}

    def active(self, kind: type[Kind]) -> list[tuple[Kind, float]]:
        """Those in use that stand here, with their strengths."""
        found = ((self.added[name], much) for name, much in self.strengths.items() if name in self.added)
        return [(one, much) for one, much in found if isinstance(one, kind)]


class OnLayer(Addition):
    """An addition to a linear layer y = W x + b, (..., C) -> (..., R)."""

    def whole(self, x: Tensor, base: nn.Module, strength: float) -> Tensor | None:
        """What layer and addition put out together, where that is one operation."""
        return None

    def before(self, x: Tensor, strength: float) -> Tensor:
        """What the layer reads instead of x."""
        return x

    def after(self, out: Tensor, x: Tensor, base: nn.Module, strength: float) -> Tensor:
        """What is put out instead of `out` = W x + b, x as it came in."""
        return out

    def thin(self, strength: float) -> tuple[Tensor, Tensor] | None:
        """A (r, C) and B (R, r) where the layer puts out W x + b + B A x, None for another sum."""
        return None

    def merged(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        """(R, C) and (R,) of the layer that does the same alone, where `merges` says that there is one."""
        raise BugError("adapter", type(self).__name__, "one that a weight can hold")


class Adapted(Site):
    """A linear layer, of floats or in codes, with additions."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self._thin: tuple[object, tuple[CodedMatrix, ...]] = (None, ())

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., R)."""
        active, read = self.active(OnLayer), x
        if len(active) == 1:
            one, strength = active[0]
            together = one.whole(x, self.base, strength)
            if together is not None:
                return together
        for one, strength in active:
            read = one.before(read, strength)
        out: Tensor = self.base(read)
        for one, strength in active:
            out = one.after(out, x, self.base, strength)
        return out

    def thin(self) -> tuple[CodedMatrix, ...]:
        """A (r, C) and B (R, r) of all that is in use, in 8 bits, for the native path (nn/fused.py); none where nothing
        is. Rows and columns of zeros fill up r. Raises UnfitError where W x + b + B A x is not what is put out."""
        active = self.active(OnLayer)
        made_of = [(much, p.data_ptr(), p._version) for one, much in active for p in one.parameters()]
        if self._thin[0] != made_of:
            pairs = [pair for one, much in active if (pair := one.thin(much)) is not None]
            if len(pairs) < len(active):
                raise UnfitError
            self._thin = made_of, _coded(pairs, self.base)
        return self._thin[1]

    def train(self, mode: bool = True) -> Adapted:
        """As any module's. What learns is put in codes anew: torch's fused AdamW leaves versions as they were."""
        if mode:
            self._thin = None, ()
        return super().train(mode)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight (R, C) and bias (R,) with what is in use, in float32 at least."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        found: tuple[Tensor, Tensor | None] = wide(weight_of(self.base)), None if bias is None else wide(bias)
        for one, strength in self.active(OnLayer):
            found = one.merged(*found, strength)
        return found[0].detach(), None if found[1] is None else found[1].detach()


def _coded(pairs: Sequence[tuple[Tensor, Tensor]], base: nn.Module) -> tuple[CodedMatrix, ...]:
    if not pairs or not isinstance(base, PackedLinear):
        return ()
    A, B = torch.cat([A for A, _ in pairs]).float(), torch.cat([B for _, B in pairs], 1).float()
    if base.packed.input_scale is not None:
        A = A / base.packed.input_scale
    size = BLOCKS[THIN].size
    if A.shape[1] % size:
        raise UnfitError
    more = -len(A) % size
    both = (F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more)))
    return tuple(from_blocks(THIN, quantize(THIN, one)) for one in both)


def plain(layer: nn.Module) -> nn.Module:
    """The layer itself, without what stands beside it."""
    return layer.base if isinstance(layer, Adapted) else layer


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(R, C) of a linear layer of floats or in codes, with adapters or without."""
    layer = plain(layer)
    if isinstance(layer, PackedLinear):
        return layer.shape
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def weight_of(layer: nn.Module) -> Tensor:
    """Its weight in floats, (R, C), without adapters."""
    layer = plain(layer)
    if isinstance(layer, PackedLinear):
        return layer.packed.unpack()
    assert isinstance(layer, nn.Linear)
    return layer.weight
