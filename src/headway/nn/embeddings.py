"""The front ends: ids or image patches become vectors, with the additive position schemes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.config import Learned, ModelConfig, Patch, Sinusoidal
from headway.nn.norms import make_norm
from headway.nn.positions import sinusoidal


class Embeddings(nn.Module):
    """token + position + token type, scaled, normalised, dropped: (B, T) -> (B, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.embeddings
        self.positions, self.d_model, self.scale = config.positions, config.d_model, shape.scale
        self.tokens = nn.Embedding(config.vocab_size, config.d_model) if config.vocab_size else None
        self.patches = Patches(config.d_model, shape.patch) if shape.patch else None
        self.types = nn.Embedding(shape.token_types, config.d_model) if shape.token_types else None
        rows = config.max_len + config.positions.offset if isinstance(config.positions, Learned) else 0
        self.learned = nn.Embedding(rows, config.d_model) if rows else None
        self.norm = make_norm(config.d_model, config.norm) if shape.norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, positions: Tensor, inputs: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Embed `inputs`, ids (B, T) or pixels (B, C, height, width), standing at `positions` (B|1, T)."""
        if self.patches is not None and inputs.ndim == 4:
            x_BTD = self.patches(inputs)
        else:
            assert self.tokens is not None
            x_BTD = self.tokens(inputs)
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        if isinstance(self.positions, Sinusoidal):
            x_BTD = x_BTD + sinusoidal(positions, self.d_model, self.positions).to(x_BTD.dtype)
        elif isinstance(self.positions, Learned) and self.learned is not None:
            x_BTD = x_BTD + self.learned(positions + self.positions.offset)
        if self.types is not None:
            x_BTD = x_BTD + self.types(torch.zeros_like(inputs) if token_types is None else token_types)
        out: Tensor = self.dropout(self.norm(x_BTD))
        return out


class Patches(nn.Module):
    """An image as a sequence: each size x size patch is one linear projection (arXiv:2010.11929, equation 1)."""

    def __init__(self, d_model: int, config: Patch) -> None:
        super().__init__()
        self.size = config.size
        self.project = nn.Linear(config.channels * config.size**2, d_model)
        self.first = nn.Parameter(torch.zeros(d_model)) if config.first_token else None

    def forward(self, pixels_BCYX: Tensor) -> Tensor:
        """(B, C, image, image) -> (B, patches (+ 1), D), patches in reading order, the first token in front."""
        patches = F.unfold(pixels_BCYX, self.size, stride=self.size).transpose(1, 2)
        x_BTD: Tensor = self.project(patches)
        if self.first is not None:
            x_BTD = torch.cat((self.first.expand(len(x_BTD), 1, -1), x_BTD), 1)
        return x_BTD
