"""HF -> Headway -> GGUF -> Headway, for every family that GGUF has: the same logits to the last bit in F32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from test_parity import ROWS, inputs, loaded

from headway.checkpoints.gguf_model import GgufModel, gguf_chunks
from headway.errors import ConfigError
from headway.nn import Transformer
from headway.nn.packed import PackedLinear, exact

# GGUF keeps causal language models, and encoders without a head.
PACKABLE = [
    row
    for row in ROWS
    if row.family.gguf
    and row.family.heads[row.architecture].fields["head.type"] in ("causal-lm", "pooled-embedding")
    and row.family.heads[row.architecture].fields.get("head.transform", "none") == "none"
]
# Variants whose config llama.cpp cannot say: it has no field for them.
REFUSED = {
    "MistralForCausalLM": "attention.pattern",
    "MixtralForCausalLM": "attention.pattern",
    "Qwen2ForCausalLM-windows": "attention.pattern",
    "Qwen3MoeForCausalLM": "feed_forward.experts.normalize",
    "Gemma2ForCausalLM-scaled": "attention.scale",
    "Gemma3ForCausalLM-pattern": "attention.pattern",
    "SmolLM3ForCausalLM-no-positions": "positions.layers",
    "Starcoder2ForCausalLM": "attention.pattern",
    "Starcoder2ForCausalLM-no-biases": "attention.pattern",
    "LlamaForCausalLM-rope-dynamic": "positions.scaling",
    "Phi3ForCausalLM": "attention.pattern",
    "Qwen3ForCausalLM-biases": "attention.bias",
    "FalconForCausalLM-biases": "attention.bias",
}
# RoPE's factors are stored in float32, where ours were computed in float64.
ROUNDED = ("LlamaForCausalLM-rope-llama3", "Phi3ForCausalLM-longrope")


def written(row, path: Path, kind: str = "F32") -> Path:
    checkpoint, _ = loaded(row)
    chunks = gguf_chunks(checkpoint.config, checkpoint.weights, checkpoint.family, kind=kind)
    path.write_bytes(b"".join(bytes(chunk) for chunk in chunks))
    return path


@pytest.mark.parametrize("row", PACKABLE, ids=[row.id for row in PACKABLE])
def test_through_gguf_and_back(row, tmp_path):
    path = tmp_path / "model.gguf"
    if row.id in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[row.id]):
            written(row, path)
        return
    written(row, path)
    assert len(GGUFReader(path).tensors) > 10
    model = GgufModel(path)
    row_inputs = inputs(row)
    with torch.no_grad():
        found = Transformer.of(model.config, model.weights)(**row_inputs).hidden
        expected = loaded(row)[1](**row_inputs).hidden
    assert torch.equal(found, expected) or (row.id in ROUNDED and (found - expected).abs().max() < 1e-5)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_stay_blocks_and_answer_as_their_dequantized_model(kind, tmp_path):
    """Packed leaves compute what the dequantized weights would."""
    row = next(row for row in ROWS if row.id == "LlamaForCausalLM-tied")
    path = written(row, tmp_path / "model.gguf", kind)
    packed, plain = GgufModel(path), GgufModel(path, torch.float32)
    one, other = (Transformer.of(model.config, model.weights) for model in (packed, plain))
    assert any(isinstance(module, PackedLinear) for module in one.modules())
    ids = inputs(row)["input_ids"]
    with torch.no_grad(), exact():
        assert torch.equal(one(ids).logits, other(ids).logits)
        assert not torch.equal(one(ids).logits, loaded(row)[1](ids).logits)
    assert isinstance(one.head.output, PackedLinear) and one.head.output.codes0 is one.embeddings.tokens.codes0
