"""Linear layers and embeddings whose weights stay in the blocks that a file holds them in.

Weights are unpacked to the input's precision on every forward and forgotten after it: memory is the file's, the answer
is that of the dequantized model to the last bit. Kernels that multiply the blocks directly replace these leaves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.kernels.ggml import dequantize


class Packed(NamedTuple):
    """A matrix in blocks: (format, uint8 (rows, row_bytes)) of each group of rows, from top to bottom, and its shape.

    Matrices that were joined here may have stood in different formats in the file, hence groups.
    """

    parts: tuple[tuple[str, Tensor], ...]
    shape: tuple[int, int]

    def unpack(self, out: Tensor | None = None) -> Tensor:
        """The matrix in float32, (rows, columns)."""
        out = torch.empty(self.shape, device=self.parts[0][1].device) if out is None else out
        begin = 0
        for kind, raw in self.parts:
            dequantize(kind, raw, out[begin : begin + len(raw)])
            begin += len(raw)
        return out


class _PackedModule(nn.Module):
    """Holds the blocks as buffers, so that they move with the model."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.kinds, self.shape = [kind for kind, _ in packed.parts], packed.shape
        for number, (_, raw) in enumerate(packed.parts):
            self.register_buffer(f"blocks{number}", raw)

    @property
    def packed(self) -> Packed:
        """The blocks where they are now."""
        buffers = [self.get_buffer(f"blocks{number}") for number in range(len(self.kinds))]
        return Packed(tuple(zip(self.kinds, buffers, strict=True)), self.shape)

    def extra_repr(self) -> str:
        """Shape and formats."""
        return f"{self.shape[0]}x{self.shape[1]}, {'+'.join(self.kinds)}"


class PackedLinear(_PackedModule):
    """x W^T + b with W in blocks. Gradients reach x, not W."""

    def __init__(self, packed: Packed, bias: nn.Parameter | None) -> None:
        super().__init__(packed)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.packed.unpack().to(x.dtype), bias)


class PackedEmbedding(_PackedModule):
    """A table in blocks of which only the rows asked for are unpacked."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., columns) float32."""
        ((kind, raw),) = self.packed.parts
        return dequantize(kind, raw[ids])


def pack_leaf(model: nn.Module, name: str, packed: Packed) -> None:
    """Put a packed leaf in the place of the linear layer or embedding whose weight is called `name`."""
    path, _, leaf = name.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(path)
    old = parent.get_submodule(leaf)
    new = PackedLinear(packed, old.bias) if isinstance(old, nn.Linear) else PackedEmbedding(packed)
    setattr(parent, leaf, new)
