"""What a model's own likelihoods say about which of two completions it prefers, and the loss that moves it.

    r(y) = beta (log p(y) - log p_ref(y))           DPO: arXiv:2305.18290, equation 7
    r(y) = beta (log p(y) - log p_ref(y)) / |y|     by length: arXiv:2411.15124, section 5
    r(y) = beta log p(y) / |y|                      no reference, with a margin: SimPO, arXiv:2405.14734, equation 6
    loss = -log sigmoid(r(chosen) - r(rejected) - margin), of labels that are wrong with probability s
           the same turned round counts s: arXiv:2403.00409

|y| counts the tokens of a completion. The rows of a batch stand in pairs: chosen, rejected, chosen, rejected, ...
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from headway.nn.precision import wide


class Preferences(NamedTuple):
    """How likelihoods become rewards, and rewards a loss."""

    beta: float = 0.1
    by_length: bool = False
    margin: float = 0.0
    smoothing: float = 0.0

    def rewards(self, log_p: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """(2P,) log-likelihoods, those of the reference, and tokens of each row -> (P, 2) of chosen and rejected."""
        gained = wide(log_p) - reference
        gained = gained / lengths.clamp(min=1) if self.by_length else gained
        return self.beta * gained.view(-1, 2)

    def loss(self, rewards: Tensor) -> Tensor:
        """(P, 2) -> the mean over pairs."""
        ahead = rewards[:, 0] - rewards[:, 1] - self.margin
        right = -F.logsigmoid(ahead)
        return right.mean() if not self.smoothing else right.lerp(-F.logsigmoid(-ahead), self.smoothing).mean()
