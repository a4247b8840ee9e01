"""Linear layers and embeddings whose weights stay in the few bits that a file holds them in.

A product puts its input in 8 bits too and multiplies integers (kernels/codes.py), which no weight has to be unpacked
for; on a GPU weights are unpacked in registers (kernels/weight_only.py). Where neither can be done (another dtype,
gradients, `exact`) the weights are unpacked for the moment of the product, and the answer is that of the dequantized
model to the last bit.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.errors import ConfigError
from headway.kernels import steps
from headway.kernels.codes import CodedMatrix, block_format, from_blocks, to_blocks
from headway.kernels.native import usable

_planes = 1  # of the inputs' codes; 0: none, the weights are unpacked


@contextlib.contextmanager
def use_planes(count: int) -> Iterator[None]:
    """Inside, packed layers keep 8 bits of their inputs (1, the default) or 15 (2, up to twice as slow).

    With 0 they unpack their weights and answer as the dequantized model does, to the last bit.
    """
    global _planes
    before, _planes = _planes, count
    try:
        yield
    finally:
        _planes = before


def exact() -> contextlib.AbstractContextManager[None]:
    """Inside, packed layers answer as the dequantized model does, to the last bit."""
    return use_planes(0)


def planes() -> int:
    """What `use_planes` says now."""
    return _planes


class Packed(NamedTuple):
    """A matrix in codes: (name of the format, codes) of each group of rows, from top to bottom, and its shape.

    Matrices that were joined here may have stood in different formats in the file, hence groups. `input_scale`
    (columns) multiplies inputs before they are put in codes; the matrix is codes times it.
    """

    parts: tuple[tuple[str, CodedMatrix], ...]
    shape: tuple[int, int]
    input_scale: Tensor | None = None

    @classmethod
    def of_blocks(cls, parts: tuple[tuple[str, Tensor], ...]) -> Packed:
        """From (ggml format, uint8 (rows, row_bytes)) of each group."""
        coded = tuple((kind, from_blocks(kind, raw)) for kind, raw in parts)
        return cls(coded, (sum(part.shape[0] for _, part in coded), coded[0][1].shape[1]))

    @property
    def format(self) -> str | None:
        """The ggml format that holds the whole matrix as it is, None where none does."""
        return block_format(self.parts[0][1]) if len(self.parts) == 1 and self.input_scale is None else None

    def blocks(self) -> Tensor:
        """Its rows in that format, uint8 (rows, row_bytes)."""
        return to_blocks(self.parts[0][1])

    def unpack(self) -> Tensor:
        """The matrix in float32, (rows, columns)."""
        parts = [steps.unpacked(part) for _, part in self.parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if self.input_scale is None else whole * self.input_scale

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows at a time in float32, all of a small matrix: which, and (some, columns)."""
        if math.prod(self.shape) <= UNPACKED:
            yield slice(None), self.unpack()
            return
        begin, step = 0, max(UNPACKED // self.shape[1], 1)
        for _, part in self.parts:
            for start in range(0, part.shape[0], step):
                rows = torch.arange(start, min(start + step, part.shape[0]), device=part.codes.device)
                piece, place = steps.rows(part, rows), slice(begin + start, begin + start + len(rows))
                yield place, piece if self.input_scale is None else piece * self.input_scale
            begin += part.shape[0]


UNPACKED = 1 << 21
"""Weights that stand in floats at once where a product is made of pieces: their sums are in another order."""


class _PackedModule(nn.Module):
    """Holds codes, scales and minima as buffers, so that they move with the model; no cast touches them."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.kinds, self.shape = [kind for kind, _ in packed.parts], packed.shape
        self._forms = [part._replace(codes=_NOTHING, scales=_NOTHING, minima=None) for _, part in packed.parts]
        self._dtypes = [part.scales.dtype for _, part in packed.parts]
        self._made: tuple[tuple[Tensor | None, ...], Packed] | None = None
        self.register_buffer("input_scale", packed.input_scale)
        for number, (_, part) in enumerate(packed.parts):
            for name in _TENSORS:
                tensor = getattr(part, name)
                if tensor is not None:
                    bits = _AS_BITS.get(tensor.dtype)
                    self.register_buffer(f"{name}{number}", tensor if bits is None else tensor.view(bits))

    @property
    def packed(self) -> Packed:
        """The matrix where it is now."""
        held = tuple(self._buffers.values())
        if self._made is None or not all(map(operator.is_, held, self._made[0])):
            self._made = held, self._put_together()
        return self._made[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._made = None  # or what has moved away would be kept
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _put_together(self) -> Packed:
        parts = []
        for number, (kind, form, dtype) in enumerate(zip(self.kinds, self._forms, self._dtypes, strict=True)):
            codes, scales, minima = (self._buffers.get(f"{name}{number}") for name in _TENSORS)
            assert codes is not None and scales is not None
            low = None if minima is None else minima.view(dtype)
            parts.append((kind, form._replace(codes=codes, scales=scales.view(dtype), minima=low)))
        return Packed(tuple(parts), self.shape, self._buffers["input_scale"])

    def extra_repr(self) -> str:
        """Shape and formats."""
        return f"{self.shape[0]}x{self.shape[1]}, {'+'.join(self.kinds)}"


_NOTHING = torch.empty(0)
_TENSORS = ("codes", "scales", "minima")
_AS_BITS = {torch.float16: torch.int16, torch.float32: torch.int32}


class PackedLinear(_PackedModule):
    """x W^T + b with W in codes. Gradients reach x, not W."""

    def __init__(self, packed: Packed, bias: nn.Parameter | None) -> None:
        super().__init__(packed)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product = _product(x)
        if product is None and torch.is_grad_enabled() and x.requires_grad:
            through: Tensor = _Through.apply(x, self, bias)  # type: ignore[no-untyped-call]
            return through
        if product is None:
            return F.linear(x, self.packed.unpack().to(x.dtype), bias)
        scale = self._buffers["input_scale"]
        x = x if scale is None else x * scale.to(x.dtype)
        parts = [part for _, part in self.packed.parts]
        biases = [None] * len(parts) if bias is None else torch.split(bias, [part.shape[0] for part in parts])
        found = [product(x, part, some) for part, some in zip(parts, biases, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, -1)


class _Through(torch.autograd.Function):
    """x W^T + b for a gradient to x, that unpacks W twice, in pieces: no more of it ever stands in floats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        out = x.new_empty(*x.shape[:-1], layer.shape[0])
        for rows, weight in layer.packed.pieces():
            out[..., rows] = F.linear(x, weight.to(x.dtype), None if bias is None else bias[rows])
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor | None]:
        dx = dy.new_zeros(*dy.shape[:-1], ctx.layer.shape[1])
        for rows, weight in ctx.layer.packed.pieces():
            dx += dy[..., rows] @ weight.to(dy.dtype)
        db = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db


def _product(x: Tensor) -> Callable[[Tensor, CodedMatrix, Tensor | None], Tensor] | None:
    """x W^T + b with W in codes, by what there is where x is; None: unpack W."""
    if not _planes or (torch.is_grad_enabled() and x.requires_grad):
        return None
    if usable(x):
        return functools.partial(steps.linear, planes=_planes)
    gpu = _weight_only() if x.is_cuda else None
    return None if gpu is None else gpu.linear


@functools.cache
def _weight_only() -> ModuleType | None:
    """The kernels for a GPU; None without Triton, which torch has where it was built for CUDA."""
    try:
        from headway.kernels import weight_only
    except ImportError:
        return None
    return weight_only


class PackedEmbedding(_PackedModule):
    """A table in codes of which only the rows asked for are unpacked."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., columns) float32."""
        ((_, table),) = self.packed.parts
        return steps.rows(table, ids.reshape(-1)).view(*ids.shape, self.shape[1])


def is_packed(model: nn.Module) -> bool:
    """Whether any of its products is with weights in codes."""
    return any(isinstance(part, PackedLinear) for part in model.modules())


def pack_leaf(model: nn.Module, name: str, packed: Packed) -> None:
    """Put a packed leaf in the place of the linear layer or embedding whose weight is called `name`."""
    path, _, leaf = name.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(path)
    old = parent.get_submodule(leaf)
    new = PackedLinear(packed, old.bias) if isinstance(old, nn.Linear) else PackedEmbedding(packed)
    setattr(parent, leaf, new)


def check_plain(model: nn.Module) -> None:
    """Raise ConfigError for a model with adapters beside its weights: the weights alone would be another model."""
    if any(hasattr(module, "added") for module in model.modules()):
        fix = "headway convert RUN DST --to headway --merge"
        raise ConfigError("model", "adapters beside its weights", "plain weights", fix)


def weights_of(model: nn.Module) -> dict[str, Tensor | Packed]:
    """The state dict with one `L.weight` for each layer in codes; what is tied is one object.

    Raises ConfigError for a model with adapters beside its weights.
    """
    check_plain(model)
    state: dict[str, Tensor | Packed] = dict(model.state_dict())
    known: dict[int, Packed] = {}
    for name, module in model.named_modules():
        if isinstance(module, _PackedModule):
            for buffer, _ in module.named_buffers():
                state.pop(f"{name}.{buffer}", None)
            state[f"{name}.weight"] = known.setdefault(module.get_buffer("codes0").data_ptr(), module.packed)
    return state


def unpacked(weights: Mapping[str, Tensor | Packed], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every weight in floats, of this dtype if one is given; what is tied still tied; integers as they are."""
    done: dict[int, Tensor] = {}
    for weight in weights.values():
        if id(weight) not in done:
            plain = weight.unpack() if isinstance(weight, Packed) else weight
            done[id(weight)] = plain.to(dtype) if dtype is not None and plain.is_floating_point() else plain
    return {name: done[id(weight)] for name, weight in weights.items()}
