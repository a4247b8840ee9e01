"""One Transformer block: attention, then (in a decoder with an encoder) cross-attention, then feed-forward.

Each part sits on a residual branch, and the placement of the norm is all that pre-, post- and sandwich-norm differ in:

    pre        x + f(norm(x))              GPT-2, Llama, ViT
    post       norm(x + f(x))              the original Transformer, BERT
    sandwich   x + norm(f(norm(x)))        Gemma 2
    inside     x + norm(f(x))              OLMo 2

    sequential           parallel (arXiv:2204.06745)
    x -> attention -+    x -> attention ----+
         v               |                  + -> out
    x -> feed-forward    x -> feed-forward -+
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from headway.config import ModelConfig
from headway.nn.attention import Attention
from headway.nn.cache import Cache
from headway.nn.feed_forward import make_feed_forward
from headway.nn.masks import Mask
from headway.nn.norms import make_norm


class Surroundings(NamedTuple):
    """What a block needs besides its input, computed once per forward for all layers of a stack."""

    masks: dict[tuple[bool, int | None], Mask]
    angles: Tensor | None = None
    bias: Tensor | None = None
    cache: Cache | None = None
    encoder_BSD: Tensor | None = None
    cross_mask: Mask = Mask()


PLACES = {"pre": (1, 0, 0), "post": (0, 0, 1), "sandwich": (1, 1, 0), "inside": (0, 1, 0)}


class Residual(nn.Module):
    """The norms, the scale and the dropout around one part of a block. `led`: the norm before it is not its own."""

    def __init__(self, config: ModelConfig, *, led: bool = False) -> None:
        super().__init__()
        before, inside, after = PLACES[config.placement]
        places = (before and not led, inside, after)
        norms = (make_norm(config.d_model, config.norm) if used else nn.Identity() for used in places)
        self.before, self.inside, self.after = norms
        start = config.layer_scale
        self.scale = None if start is None else nn.Parameter(torch.full((config.d_model,), start))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def add(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        """Join the branch's output to the stream."""
        branch_BTD = self.inside(branch_BTD)
        if self.scale is not None:
            branch_BTD = branch_BTD * self.scale
        out: Tensor = self.after(x_BTD + self.dropout(branch_BTD))
        return out


class Block(nn.Module):
    """Attention and feed-forward on residual branches. `layer` numbers it, `mask` is (causal, window)."""

    def __init__(self, config: ModelConfig, layer: int, mask: tuple[bool, int | None], *, cross: bool) -> None:
        super().__init__()
        self.mask, self.is_parallel = mask, config.residual == "parallel"
        self.attention = Attention(config, layer)
        self.attention_residual = Residual(config, led=config.embeddings.leads and layer == 0)
        self.cross_attention = Attention(config, layer, cross=True) if cross else None
        self.cross_residual = Residual(config) if cross else None
        self.feed_forward = make_feed_forward(config)
        self.feed_forward_residual = Residual(config)

    def forward(self, x_BTD: Tensor, around: Surroundings) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        first, last = self.attention_residual, self.feed_forward_residual
        mixed = self.attention(first.before(x_BTD), around.masks[self.mask], around.angles, around.bias, around.cache)
        if self.is_parallel:
            return last.add(first.add(x_BTD, mixed), self.feed_forward(last.before(x_BTD)))
        x_BTD = first.add(x_BTD, mixed)
        if self.cross_attention is not None and self.cross_residual is not None:
            assert around.encoder_BSD is not None
            query = self.cross_residual.before(x_BTD)
            read = self.cross_attention.cross(query, around.encoder_BSD, around.cross_mask, around.cache)
            x_BTD = self.cross_residual.add(x_BTD, read)
        return last.add(x_BTD, self.feed_forward(last.before(x_BTD)))
