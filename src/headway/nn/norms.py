"""LayerNorm and RMSNorm, and which of them a config asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.config import LayerNorm as LayerNormConfig
from headway.config import RMSNorm as RMSNormConfig
from headway.kernels.training import rms_norm


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (arXiv:1607.06450)."""

    def __init__(self, size: int, config: LayerNormConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension (arXiv:1910.07467)."""

    def __init__(self, size: int, config: RMSNormConfig) -> None:
        super().__init__()
        self.eps, self.offset = config.eps, config.offset
        # With an offset of one (Gemma) the stored weight is the difference from one, so it begins at zero.
        self.weight = nn.Parameter(torch.full((size,), 1.0 - config.offset))

    @property
    def scale(self) -> Tensor:
        """The factor per dimension, (size,)."""
        return self.weight + self.offset if self.offset else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return rms_norm(x, self.scale, self.eps)


def make_norm(size: int, config: LayerNormConfig | RMSNormConfig) -> nn.Module:
    """The norm of `config` over vectors of `size`."""
    return RMSNorm(size, config) if isinstance(config, RMSNormConfig) else LayerNorm(size, config)
