"""How weights begin: N(0, std^2), zeros for biases, and the residual writers as the scheme says."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from headway.config import ModelConfig
from headway.nn.attention import Attention
from headway.nn.embeddings import Patches
from headway.nn.feed_forward import FeedForward
from headway.nn.heads import AttentionPool
from headway.nn.positions import ScoreBias


class Unfilled(TorchFunctionMode):
    """Modules without first values: on the meta device torch would load its compiler to draw none (1.2 s, 80 MB)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every function of `torch.nn.init` returns its tensor as it is."""
        given = kwargs or {}
        is_filling = getattr(func, "__module__", "") == "torch.nn.init"
        return given["tensor"] if is_filling else func(*args, **given)


def initialize(model: nn.Module, config: ModelConfig) -> None:
    """Initialise every parameter of a Transformer in place, from torch's global generator.

    Norms keep their ones and zeros. `residual` scaled divides the std of the projections that write to the residual
    stream by sqrt(2 n_layers) (GPT-2); zero makes every pre-norm block the identity at the start.
    """
    scheme = config.init
    depth = max(config.n_layers, config.n_decoder_layers)
    writers = {id(m.output) for m in model.modules() if isinstance(m, Attention)}
    writers |= {id(m.down) for m in model.modules() if isinstance(m, FeedForward)}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                std = scheme.std if scheme.std is not None else 1 / math.sqrt(module.weight[0].numel())
                if id(module) in writers:
                    std *= {"plain": 1.0, "scaled": 1 / math.sqrt(2 * depth), "zero": 0.0}[scheme.residual]
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=scheme.std if scheme.std is not None else 1.0)
            elif isinstance(module, Patches | AttentionPool):
                for parameter in module.parameters(recurse=False):
                    nn.init.normal_(parameter, std=scheme.std or 0.02)
            elif isinstance(module, ScoreBias) and hasattr(module, "table"):
                nn.init.normal_(module.table, std=scheme.std or 0.02)
