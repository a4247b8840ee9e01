"""Several processes give the gradient of one: DDP, FSDP2 and tensor parallelism, every objective, real gloo.

In float64 to 1e-10: what is left is the order of sums.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headway.config import ModelConfig
from headway.nn import Transformer
from headway.training.gradients import backward
from headway.training.objectives import TrainingBatch
from headway.training.parallel import Parallel

from objective_cases import CASES  # isort: skip
from test_gradients import made  # isort: skip

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.xdist_group("processes")]
WIDE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 40, "max_len": 16}
INIT = {"init": {"std": 0.1, "residual": "plain"}}
# What tensor parallelism splits in its own way each: grouped keys, norms of queries, fused gates, biases, experts,
# score biases by head, cross-attention, a block whose branches stand side by side.
SHAPES: dict[str, dict[str, object]] = {
    "grouped and gated": {
        "n_kv_heads": 2,
        "attention": {"qk_norm": "rmsnorm", "bias": True, "output_bias": True},
        "feed_forward": {"activation": "silu", "gated": True, "bias": True},
    },
    "alibi": {"positions": "alibi"},
    "relative, encoder-decoder": {"kind": "encoder-decoder", "positions": "relative", "tokens": {"decoder_start": 1}},
    "experts": {"feed_forward": {"experts": {"experts": 4, "top_k": 2, "balance": 0.0}}},
    "side by side": {"residual": "parallel", "positions": "rope", "norm": "layernorm"},
    "tied": {"embeddings": {"tied": True}},
    "one key head": {"n_kv_heads": 1},
    "relative, three heads": {"kind": "encoder", "d_model": 24, "n_heads": 3, "positions": "relative"},
}
SQUARE = ("grouped and gated", "relative, encoder-decoder", "tied")


def shaped(fields: Mapping[str, object]) -> tuple[Transformer, TrainingBatch]:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{"kind": "decoder", **WIDE, **INIT, **fields})).double().train()
    ids = torch.randint(2, 40, (7, 12))  # an uneven number of rows
    labels = ids.roll(-1, 1).masked_fill(torch.rand(7, 12) < 0.3, -100)
    return model, TrainingBatch({"input_ids": ids, "labels": labels}, range(7))


def write(folder: Path, name: str, model: Transformer, batch: TrainingBatch) -> dict[str, Tensor]:
    """The case for the processes; what one process finds."""
    path = folder / f"{name.replace(' ', '-').replace(',', '')}.json"
    path.write_text(model.config.to_json())
    save_file({k: v.clone() for k, v in model.state_dict().items()}, str(path.with_suffix(".weights")))
    save_file({k: v.contiguous() for k, v in batch.inputs.items()}, str(path.with_suffix(".batch")))
    torch.manual_seed(1)
    parallel = Parallel(model)
    _, loss = backward(parallel, batch.split(1), nullcontext)
    assert loss is not None
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.double(), "norm": parallel.square().sqrt()}


def processes(folder: Path, size: int, *layouts: str) -> None:
    worker = Path(__file__).with_name("parallel_worker.py")
    words = [sys.executable, str(worker), str(folder), str(size), *layouts]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def compare(folder: Path, name: str, wanted: Mapping[str, Tensor], suffix: str) -> None:
    found = load_file(str(folder / f"{name.replace(' ', '-').replace(',', '')}.{suffix}"))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (found[key] - tensor).abs().max() <= 1e-10, (name, suffix, key)


def test_every_objective_in_every_layout(tmp_path: Path) -> None:
    folder = tmp_path / "cases"
    folder.mkdir()
    wanted = {}
    for name in CASES:
        place = tmp_path / name.replace(" ", "-")
        place.mkdir()
        wanted[name] = write(folder, name, *made(place, name))
    processes(folder, 2, "ddp", "fsdp", "2")
    for name, gradients in wanted.items():
        assert float(gradients["norm"]) > 1e-6
        for layout in ("ddp", "fsdp", "2"):
            compare(folder, name, gradients, f"2-{layout}")


def test_every_shape_split_by_heads_and_by_rows(tmp_path: Path) -> None:
    wanted = {name: write(tmp_path, name, *shaped(fields)) for name, fields in SHAPES.items()}
    processes(tmp_path, 2, "ddp", "fsdp", "2")
    for path in tmp_path.glob("*.json"):  # two by two takes long on two cores: three shapes
        if path.stem not in {name.replace(" ", "-").replace(",", "") for name in SQUARE}:
            path.unlink()
    processes(tmp_path, 4, "2")
    for name, gradients in wanted.items():
        for suffix in ("2-ddp", "2-fsdp", "2-2", *(["4-2"] * (name in SQUARE))):
            compare(tmp_path, name, gradients, suffix)
