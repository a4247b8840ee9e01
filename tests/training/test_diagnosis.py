"""The layer of the first number that is not finite, wherever it is planted."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from headway.config import ModelConfig
from headway.nn import Transformer
from headway.training.diagnosis import first_nonfinite
from headway.training.gradients import backward
from headway.training.parallel import Parallel

IDS = torch.arange(12).view(2, 6)


def built() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(kind="decoder", d_model=16, n_layers=3, n_heads=2, vocab_size=12, max_len=6, dropout=0.2)
    return Transformer(config).train()


@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("decoder.blocks.1.attention.qkv.weight", "decoder.blocks.1.attention.qkv"),
        ("decoder.blocks.2.feed_forward.down.weight", "decoder.blocks.2.feed_forward.down"),
        ("embeddings.tokens.weight", "embeddings.tokens"),
    ],
)
def test_the_innermost_layer_of_the_forward_pass_is_named(weight: str, layer: str) -> None:
    model = built()
    with torch.no_grad():
        model.get_parameter(weight)[0] = math.inf
    state = torch.get_rng_state()
    said = first_nonfinite(Parallel(model), [{"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]}], nullcontext)
    assert said == f", first in {layer}"
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_sound_forward_pass_leaves_the_gradients() -> None:
    model, inputs = built(), {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]}
    backward(Parallel(model), [inputs], nullcontext)
    assert first_nonfinite(Parallel(model), [inputs], nullcontext) == ""
    for name in ("decoder.blocks.0.feed_forward.up.weight", "decoder.blocks.1.attention.output.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradient[0, 0] = math.nan
    found = first_nonfinite(Parallel(model), [inputs], nullcontext)
    assert found == ", first in the gradient of decoder.blocks.1.attention.output.weight"
