"""What a run says of its inside, against the formulas written out."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from headway.cli.watch import MOST_LINES, inside, page, shaded
from headway.config import ModelConfig
from headway.nn import Transformer
from headway.nn.attention import observed, use_backend
from headway.training.gradients import backward
from headway.training.health import gradient_norms, measure, part_of
from headway.training.metrics import read_metrics
from headway.training.parallel import Parallel

from tiny_runs import Run, train_config  # isort: skip

IDS = torch.arange(24).view(4, 6) % 11


def built(**fields: object) -> Transformer:
    torch.manual_seed(0)
    shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 11, "max_len": 6, "dropout": 0.3}
    return Transformer(ModelConfig(**{"kind": "decoder", **shape, **fields})).train()


def test_entropy_of_attention_that_looks_everywhere_alike() -> None:
    """Queries of zeros: every key that is seen has the same weight, ln n for n of them."""
    model = built()
    with torch.no_grad():
        for block in model.decoder.blocks:  # type: ignore[union-attr]
            block.attention.qkv.weight[:16] = 0  # type: ignore[union-attr,operator,index]
    found = measure(model, {"input_ids": IDS, "labels": IDS}, nullcontext)
    wanted = sum(math.log(n) for n in range(1, 7)) / 6
    assert found.entropy == pytest.approx({"decoder.blocks.0": wanted, "decoder.blocks.1": wanted}, abs=1e-6)


def test_cross_attention_has_a_line_of_its_own_and_padding_none() -> None:
    model = built(kind="encoder-decoder", tokens={"decoder_start": 0}, positions="rope")
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]] * 2)
    found = measure(model, {"input_ids": IDS, "labels": IDS, "attention_mask": mask}, nullcontext)
    blocks = [f"{side}.blocks.{n}" for side in ("encoder", "decoder") for n in (0, 1)]
    assert list(found.activations) == blocks
    assert list(found.entropy) == [*blocks[:3], "decoder.blocks.0.cross", blocks[3], "decoder.blocks.1.cross"]
    assert 0 < found.entropy["decoder.blocks.0.cross"] <= math.log(6)


def test_activations_are_those_of_the_blocks_and_nothing_is_left_behind() -> None:
    model = built().eval()
    hidden: list[torch.Tensor] = []
    handle = model.decoder.blocks[1].register_forward_hook(lambda m, a, out: hidden.append(out))  # type: ignore[union-attr]
    model(IDS[:2])
    handle.remove()
    model.train()
    state = torch.get_rng_state()
    found = measure(model, {"input_ids": IDS, "labels": IDS}, nullcontext)
    assert found.activations["decoder.blocks.1"] == pytest.approx(float(hidden[0].square().mean().sqrt()), rel=1e-6)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_weights_that_are_shown_are_those_of_every_backend() -> None:
    q = torch.randn(1, 5, 2, 8)
    shown: list[torch.Tensor] = []
    model = built().eval()
    for backend in ("naive", "sdpa"):
        with use_backend(backend), observed(shown.append):  # type: ignore[arg-type]
            model(IDS)
    assert len(shown) == 4 and torch.allclose(shown[0], shown[2], atol=1e-6)
    assert torch.allclose(shown[0].sum(-1), torch.ones(4, 2, 6)) and q.ndim == 4


def test_parts_and_their_norms_make_up_the_whole() -> None:
    model = built()
    backward(Parallel(model), [{"input_ids": IDS, "labels": IDS}], nullcontext)
    found = gradient_norms(model, 2.0)
    assert list(found) == ["embeddings", "decoder.blocks.0", "decoder.blocks.1", "decoder.norm", "head"]
    whole = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert math.hypot(*found.values()) * 2 == pytest.approx(float(whole), rel=1e-6)
    assert part_of("decoder_embeddings.learned.weight") == "decoder_embeddings"


def test_a_run_records_it_and_the_page_draws_it(tmp_path: Path) -> None:
    run = Run(tmp_path, train_config(steps=4, eval_every=2))
    run.fit()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    found = [row for row in rows if row["event"] == "health"]
    assert [row["step"] for row in found] == [2, 4]
    assert all(row[key] for row in found for key in ("gradients", "activations", "entropy"))
    html = page(tmp_path, rows)
    for title in ("gradient norm by part", "activations by block", "attention entropy by block"):
        assert title in html


def test_many_parts_are_thinned_evenly() -> None:
    rows = [{"event": "health", "step": 1, "entropy": {f"b{n}": float(n) for n in range(30)}}]
    lines = inside(rows, "entropy")
    assert len(lines) == MOST_LINES and next(iter(lines)) == "b0" and list(lines)[-1] == "b29"
    assert len(set(shaded(8))) == 8 and inside([], "entropy") == {}
