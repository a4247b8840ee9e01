"""How a run is inside, taken at each evaluation: gradients by part, the size of activations, how attention spreads.

gradient norm      of the embeddings, each block, the head: one part far above the others steers the clipping
activation         root mean square of what each block puts out: growth over the run foretells trouble
attention entropy  in nats, mean over heads and queries: 0 looks at one place, ln n at n places alike
                   (collapse: arXiv:2303.06296)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headway.nn import Transformer
from headway.nn.attention import observed
from headway.nn.block import Block
from headway.training.evaluate import resting, to_device, watched
from headway.training.gradients import Precision

ROWS = 2
"""Of a batch: enough for a mean over heads and positions, and the weights of attention are written out for them."""


class Health(NamedTuple):
    """By the name of a block, in order: the RMS of its output, the mean entropy of its attention in nats."""

    activations: dict[str, float]
    entropy: dict[str, float]


def part_of(name: str) -> str:
    """The part that a parameter belongs to: `decoder.blocks.3`, `embeddings`, `head`, `decoder.norm`."""
    path = name.split(".")
    return ".".join(path[:3] if "blocks" in path[1:2] else path[:2] if path[0] in ("encoder", "decoder") else path[:1])


def gradient_norms(model: nn.Module, scale: float = 1.0) -> dict[str, float]:
    """The norm of the gradient of each part that has one, of a loss that was multiplied by `scale`."""
    held = [(part_of(name), p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([grad for _, grad in held])).tolist() if held else []
    squares: dict[str, float] = {}
    for (part, _), norm in zip(held, norms, strict=True):
        squares[part] = squares.get(part, 0.0) + norm**2
    return {part: math.sqrt(square) / scale for part, square in squares.items()}


def measure(model: Transformer, inputs: Mapping[str, Tensor], precision: Precision) -> Health:
    """Run a few rows of a batch through the model, without a trace in it or in the random state."""
    device = next(model.parameters()).device
    activations: dict[str, float] = {}
    entropies: list[float] = []
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Block)}

    def sized(name: str, output: Tensor) -> None:
        activations[name] = float(output.float().square().mean().sqrt())

    def spread(weights_BNTS: Tensor) -> None:
        p = weights_BNTS.float()
        sees = p.sum(-1) > 0  # a row that sees nothing has no spread
        entropies.append(float((-torch.xlogy(p, p).sum(-1))[sees].mean()))

    with watched(blocks, sized), resting(model, device), observed(spread), precision():
        model.loss(**to_device({name: tensor[:ROWS] for name, tensor in inputs.items()}, device))
    names = [n for n, m in blocks.items() for n in [n] + [f"{n}.cross"] * (m.cross_attention is not None)]
    return Health(activations, dict(zip(names, entropies, strict=False)))
