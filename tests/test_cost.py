"""The cost model against the model itself: parameters, PyTorch's FLOP counter, masks, a real cache."""

from __future__ import annotations

import pytest
import torch
from config_grid import grid
from torch.utils.flop_counter import FlopCounterMode

from headway import cost
from headway.config import ModelConfig
from headway.nn import Transformer
from headway.nn.attention import use_backend
from headway.nn.masks import Sight, build_mask

GRID = grid()
BASE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 50, "max_len": 16}


VISION = {"kind": "vision", "vocab_size": 0, "max_len": 16}


def test_parameters_are_those_of_the_model():
    for number, config in enumerate(GRID):
        with torch.device("meta"):
            model = Transformer(config)
        counted = sum(p.numel() for p in model.parameters())
        parts = cost.parameters(config)
        assert sum(parts.values()) == counted, (number, parts)
        inside = sum(p.numel() for n, p in model.named_parameters() if ".feed_forward." in n and ".blocks." in n)
        assert sum(count for part, count in parts.items() if part.endswith("feed-forward")) == inside, number


@pytest.mark.parametrize(
    "fields",
    [
        {"attention": "full", "kind": "encoder"},
        {"attention": "full", "kind": "encoder", "head": "span", "n_kv_heads": 2, "feed_forward": "swiglu"},
        {"attention": "full", "kind": "encoder", "head": {"type": "sequence-classification", "labels": 7}},
        {"kind": "vision", "vocab_size": 0, "max_len": 17, "embeddings": {"patch": {"size": 4, "image": 16}}},
        {**VISION, "embeddings": {"patch": {"size": 4, "image": 16, "first_token": False}}, "head": "masked-patches"},
    ],
    ids=str,
)
def test_flops_are_those_that_pytorch_counts(fields):
    """Full attention: the formula's products are all the products there are."""
    config = ModelConfig(**{**BASE, **fields})
    model = Transformer(config)
    patch = config.embeddings.patch
    T = patch.count if patch else 16
    row = {"pixel_values": torch.randn(1, 3, 16, 16)} if patch else {"input_ids": torch.randint(50, (1, T))}
    with FlopCounterMode(display=False) as counter, use_backend("naive"):
        model(**row)
    expected = cost.forward_flops(config, T) * T
    if patch:  # the first token is no patch and is not projected
        expected -= 2 * config.d_model * patch.channels * patch.size**2 * patch.extra
    assert counter.get_total_flops() == expected


def test_an_encoder_of_sound():
    """Its parameters, and the FLOPs of its convolutions and blocks, are PyTorch's."""
    audio = {
        "embeddings": {"audio": {"bins": 7, "frames": 32}},
        "head": {"type": "sequence-classification", "labels": 5},
    }
    config = ModelConfig(**{**BASE, **audio, "kind": "encoder", "vocab_size": 0})
    model = Transformer(config)
    assert sum(cost.parameters(config).values()) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, use_backend("naive"):
        model(input_features=torch.randn(1, 7, 32))
    assert counter.get_total_flops() == cost.forward_flops(config, 16) * 16


def test_training_takes_three_forwards():
    config = ModelConfig(**BASE, kind="encoder")
    model, ids = Transformer(config), torch.randint(50, (1, 16))
    with FlopCounterMode(display=False) as counter, use_backend("naive"):
        model(ids, labels=ids).loss.backward()
    assert counter.get_total_flops() == pytest.approx(16 * cost.training_flops(config, 16), rel=1e-3)


def test_experts_cost_what_a_token_visits():
    few = ModelConfig(**BASE, feed_forward={"activation": "relu", "experts": {"experts": 4, "top_k": 1}})
    more = ModelConfig(**BASE, feed_forward={"activation": "relu", "experts": {"experts": 4, "top_k": 3}})
    assert cost.parameters(few) == cost.parameters(more)
    # Two experts more in each of two layers, each of up and down 32 x 128.
    assert cost.forward_flops(more, 8) - cost.forward_flops(few, 8) == 2 * 2 * 2 * 2 * 32 * 128


@pytest.mark.parametrize("pattern", ["causal", "sliding", "full"])
@pytest.mark.parametrize("window", [1, 3, 40])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_keys_seen_is_the_mean_of_the_mask(pattern, window, length):
    causal = pattern == "causal"
    kind = "decoder" if causal else "encoder"
    given = {"pattern": [pattern], "window": window if pattern == "sliding" else None}
    config = ModelConfig(**BASE, kind=kind, attention=given)
    places = torch.arange(length)[None]
    mask = build_mask(Sight(places, places), is_causal=causal, window=config.window(0))
    visible = mask.tensor(length, length, places.device)
    mean = length if visible is None else visible.double().sum(-1).mean().item()
    assert cost.keys_seen(config, 0, length, causal=causal) == pytest.approx(mean, abs=1e-12)


def test_keys_seen_by_a_sliding_decoder():
    config = ModelConfig(**BASE, attention={"pattern": ["sliding"], "window": 3})
    places = torch.arange(9)[None]
    visible = build_mask(Sight(places, places), is_causal=True, window=3).dense
    assert cost.keys_seen(config, 0, 9, causal=True) == pytest.approx(visible.double().sum(-1).mean().item())


@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": 1}, {"attention": {"pattern": ["sliding"], "window": 4}}])
def test_cache_bytes_are_those_of_a_cache(fields):
    """A cache holds one column more than it stores, for what is padding."""
    config = ModelConfig(**{**BASE, **fields})
    cache = Transformer(config).new_cache(1, 12)
    columns = sum(2 * slots.keys.numbers[:, :, :, :-1].numel() * 4 for slots in cache.groups.values())
    assert columns == cost.cache_bytes(config, 12)
    assert cost.cache_bytes_per_token(config) * 12 >= columns


def test_a_decoded_token_reads_every_matrix_once():
    config = ModelConfig(**BASE)
    model = Transformer(config)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert cost.decode_bytes(config, 0) == 4 * matrices
    assert cost.decode_bytes(config, 10, size=0.5) == matrices / 2 + cost.cache_bytes(config, 10)
    tied = ModelConfig(**BASE, embeddings={"tied": True})
    assert cost.decode_bytes(tied, 0) == cost.decode_bytes(config, 0)  # the shared table is read as the head


def test_the_encoder_is_not_read_again():
    pair = ModelConfig(**BASE, kind="encoder-decoder")
    deep = ModelConfig(**{**BASE, "n_layers": 9}, kind="encoder-decoder", n_decoder_layers=2)
    assert cost.decode_bytes(pair, 5) == cost.decode_bytes(deep, 5)
    assert cost.forward_flops(pair, 5) < cost.forward_flops(deep, 5)
