"""The baseline of the training benchmarks: a small GPT and its loop, written by hand in plain PyTorch.

It follows the recipe that nanoGPT publishes for a CPU: learned positions, LayerNorm, GELU, tied embeddings, no biases,
no dropout, AdamW at 1e-3 with betas (0.9, 0.99) and decay 0.1 on matrices, 100 steps of warmup, cosine to 1e-4,
clipping at 1.0, random windows of one long text. The code is our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Layers, width, heads, context and batch."""

    n_layers: int
    d_model: int
    n_heads: int
    context: int
    batch: int
    vocab: int = 256


SMALL = Shape(n_layers=4, d_model=128, n_heads=4, context=64, batch=12)
MEDIUM = Shape(n_layers=6, d_model=384, n_heads=6, context=256, batch=8)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.d_model
        self.heads = shape.n_heads
        self.norm1, self.norm2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(D, dim=2)
        q, k, v = (z.view(B, T, self.heads, D // self.heads).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab, shape.d_model)
        self.places = nn.Embedding(shape.context, shape.d_model)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layers))
        self.norm = nn.LayerNorm(shape.d_model, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                is_writer = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * shape.n_layers) if is_writer else 1))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@dataclass
class Windows:
    """`batch()` draws random windows of one long text: (batch, context) ids and what follows each."""

    shape: Shape
    data: Tensor

    def batch(self) -> tuple[Tensor, Tensor]:
        T = self.shape.context
        starts = torch.randint(len(self.data) - T - 1, (self.shape.batch,)).tolist()
        rows = torch.stack([self.data[i : i + T + 1] for i in starts]).long()
        return rows[:, :-1], rows[:, 1:]


class Loop(Windows):
    """`step()` does one update and returns the loss tensor."""

    def __init__(self, shape: Shape, data: Tensor, steps: int, seed: int = 0) -> None:
        super().__init__(shape, data)
        torch.manual_seed(seed)
        self.steps, self.done = steps, 0
        self.model = Model(shape)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))

    def rate(self) -> float:
        if self.done < 100:
            return 1e-3 * (self.done + 1) / 101
        share = min((self.done - 100) / max(self.steps - 100, 1), 1.0)
        return 1e-4 + 0.5 * (1 + math.cos(math.pi * share)) * 9e-4

    def step(self) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        loss = self.model(*self.batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.detach()
