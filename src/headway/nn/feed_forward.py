"""The position-wise network: down(act(up x)), gated or plain, one or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.config import Activation, Experts, ModelConfig
from headway.kernels.training import relu2

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),  # the sigmoid approximation of arXiv:1606.08415
    "silu": F.silu,
    "relu2": relu2,
}


class FeedForward(nn.Module):
    """down(act(up x)); gated, `up` holds the gate's F rows and then the product's: down(act(gate x) * up x).

    Gated units: arXiv:2002.05202.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.feed_forward
        self.gated = shape.gated
        self.activation = ACTIVATIONS[shape.activation]
        self.up = nn.Linear(config.d_model, config.d_ff * (2 if shape.gated else 1), bias=shape.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=shape.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        hidden_BTF = self.up(x_BTD)
        if self.gated:
            gate, product = hidden_BTF.chunk(2, -1)
            hidden_BTF = self.activation(gate) * product
        else:
            hidden_BTF = self.activation(hidden_BTF)
        out: Tensor = self.down(hidden_BTF)
        return out


class MixtureOfExperts(nn.Module):
    """Each token visits the top_k of E feed-forward networks, weighted by a softmax router (arXiv:1701.06538).

    After a forward in training, `balance_loss` holds the load-balancing term E * sum(f_e * p_e), f_e the share of
    visits and p_e the mean gate of expert e (arXiv:2101.03961, equation 4; 1 when perfectly even), times its weight.
    """

    def __init__(self, config: ModelConfig, experts: Experts) -> None:
        super().__init__()
        self.top_k, self.normalize, self.balance = experts.top_k, experts.normalize, experts.balance
        self.router = nn.Linear(config.d_model, experts.experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(experts.experts))
        self.balance_loss: Tensor | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x_BTD.flatten(0, -2)
        # Routing is a comparison: float32 keeps near-ties stable in low precision.
        gates = torch.softmax(self.router(x), -1, dtype=torch.promote_types(x.dtype, torch.float32))
        weights, chosen = gates.topk(self.top_k, -1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, slot = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, slot, None])
        share = F.one_hot(chosen, gates.shape[-1]).to(gates.dtype).mean((0, 1))
        self.balance_loss = self.balance * gates.shape[-1] * (share * gates.mean(0)).sum()
        return out.view_as(x_BTD)


def make_feed_forward(config: ModelConfig) -> nn.Module:
    """The feed-forward network of `config`."""
    experts = config.feed_forward.experts
    return MixtureOfExperts(config, experts) if experts else FeedForward(config)
