"""What we write as GGUF llama.cpp loads: greedy tokens of every architecture it has, with the tokenizer, in F32."""

from __future__ import annotations

import functools
import http.client
import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from reference import Reference
from test_gguf_parity import PACKABLE, REFUSED

from headway.checkpoints.gguf_model import GgufModel, gguf_chunks
from headway.checkpoints.hub_folder import read_folder
from headway.config import PooledEmbedding, with_fields
from headway.nn import Transformer
from headway.text import Tokenizer
from headway.text.gguf_vocab import TYPES, to_gguf
from headway.text.train import train_tokenizer

xllamacpp = pytest.importorskip("xllamacpp")
VOCABULARY = 320
TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps in the sun until the evening comes. " * 20
ROWS = [row for row in PACKABLE if row.id not in REFUSED]
PROMPT = "the quick brown fox jumps over the lazy dog and then"


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    options = {"special_tokens": ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]} if kind == "wordpiece" else {}
    return train_tokenizer([TEXT], kind=kind, vocab_size=VOCABULARY, **options)


@functools.cache
def model(row: Reference) -> tuple[Any, Transformer]:
    """The tiny model with a vocabulary that a tokenizer fills."""
    import tempfile

    keys = reference.config_keys(row) | {"vocab_size": VOCABULARY, "eos_token_id": None}
    with tempfile.TemporaryDirectory() as folder:
        reference.build_with(row, keys).save_pretrained(folder)
        checkpoint = read_folder(Path(folder))
        weights = {name: tensor.clone() for name, tensor in checkpoint.weights.items()}
    return checkpoint, Transformer.of(checkpoint.config, weights)


def written(row: Reference, path: Path) -> Path:
    checkpoint, made = model(row)
    options = {"vocabulary": padded(to_gguf(tokenizer("bpe"))), "types": TYPES}
    chunks = gguf_chunks(checkpoint.config, made.state_dict(), checkpoint.family, **options)
    path.write_bytes(b"".join(map(bytes, chunks)))
    return path


def padded(vocabulary: dict[str, Any]) -> dict[str, Any]:
    """Unused tokens up to the embedding's rows, as models whose table is larger than their vocabulary have them."""
    tokens = vocabulary["tokenizer.ggml.tokens"]
    more = VOCABULARY - len(tokens)
    out = vocabulary | {"tokenizer.ggml.tokens": [*tokens, *(f"[unused{i}]" for i in range(more))]}
    out["tokenizer.ggml.token_type"] = [*vocabulary["tokenizer.ggml.token_type"], *[5] * more]
    return out


def served(path: Path, **settings: Any) -> http.client.HTTPConnection:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.n_gpu_layers = str(path), 32, False, 0
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = 1
    for name, value in settings.items():
        setattr(params, name, value)
    SERVERS.append(xllamacpp.Server(params))
    return http.client.HTTPConnection(SERVERS[-1].listening_address.split("//")[1])


SERVERS: list[Any] = []


def asked(line: http.client.HTTPConnection, place: str, body: dict[str, Any]) -> Any:
    line.request("POST", place, json.dumps(body), {"Content-Type": "application/json"})
    return json.loads(line.getresponse().read())


def greedy(made: Transformer, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """Tokens, and by how much each won."""
    out, gaps = list(ids), []
    with torch.no_grad():
        for _ in range(count):
            logits = made(torch.tensor([out])).logits[0, -1]
            logits[0] = -float("inf")  # the end token, which the server leaves out too
            best = logits.topk(2)
            out.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
    return out[len(ids) :], gaps


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_greedy_tokens_are_ours(row: Reference, tmp_path: Path) -> None:
    line = served(written(row, tmp_path / "model.gguf"), cache_type_k=xllamacpp.ggml_type.GGML_TYPE_F32,
                  cache_type_v=xllamacpp.ggml_type.GGML_TYPE_F32)  # fmt: skip
    words = tokenizer("bpe")
    ids = asked(line, "/tokenize", {"content": PROMPT})["tokens"]
    assert ids == words.encode(PROMPT)
    body = {"prompt": ids, "n_predict": 12, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    found = asked(line, "/completion", body | {"cache_prompt": False})["tokens"]
    expected, gaps = greedy(model(row)[1], ids, 12)
    for place, (one, other, gap) in enumerate(zip(found, expected, gaps, strict=True)):
        assert one == other or gap < 1e-3, (place, found, expected, gap)
        if one != other:
            break


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_bert_embeds_alike(pooling: str, tmp_path: Path) -> None:
    """[CLS] text [SEP] through BERT, pooled as the file says, and back through our own reader."""
    row = next(row for row in reference.rows() if row.id == "BertModel")
    checkpoint, _ = model(row)
    head = PooledEmbedding(pooling=pooling, normalize=True)
    config = with_fields(checkpoint.config, head=head)
    weights = {name: tensor for name, tensor in checkpoint.weights.items() if not name.startswith("head.pool")}
    made, words, path = Transformer.of(config, weights), tokenizer("wordpiece"), tmp_path / "model.gguf"
    options = {"vocabulary": padded(to_gguf(words)), "types": TYPES}
    path.write_bytes(b"".join(map(bytes, gguf_chunks(config, weights, checkpoint.family, **options))))
    line = served(path, embedding=True)
    ids = [words.special_id("[CLS]"), *words.encode(PROMPT), words.special_id("[SEP]")]
    assert asked(line, "/tokenize", {"content": PROMPT, "add_special": True})["tokens"] == ids
    found = torch.tensor(asked(line, "/embedding", {"content": PROMPT})[0]["embedding"][0])
    again = GgufModel(path)
    with torch.no_grad():
        expected = made(torch.tensor([ids])).logits[0]
        assert torch.equal(Transformer.of(again.config, again.weights)(torch.tensor([ids])).logits[0], expected)
    # llama.cpp computes BERT's exact GELU by tanh, from a table in float16.
    assert torch.dot(found, expected) > 0.999 and (found - expected).abs().max() < 0.02
