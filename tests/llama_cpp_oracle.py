"""llama.cpp's own tokenizer, asked over its local HTTP server (package xllamacpp), for a vocabulary in a tiny model."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest


class LlamaCpp:
    """The tokenizer of a GGUF file."""

    def __init__(self, path: Path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.warmup, params.n_gpu_layers = str(path), 64, False, 0
        self._server = xllamacpp.Server(params)
        self._line = http.client.HTTPConnection(self._server.listening_address.split("//")[1])

    def __call__(self, text: str, add_special: bool = False) -> list[int]:
        body = json.dumps({"content": text, "add_special": add_special, "parse_special": False})
        self._line.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
        found: list[int] = json.loads(self._line.getresponse().read())["tokens"]
        return found


def tiny_model(path: Path, metadata: Mapping[str, Any]) -> Path:
    """A Llama of one layer and 32 numbers a token, all zero, with this tokenizer."""
    gguf = pytest.importorskip("gguf")
    writer, size, rows = gguf.GGUFWriter(str(path), "llama"), 32, len(metadata["tokenizer.ggml.tokens"])
    for name in ("context_length", "embedding_length", "feed_forward_length", "rope_dimension_count"):
        getattr(writer, f"add_{name}")(size)
    for name in ("block_count", "head_count", "head_count_kv"):
        getattr(writer, f"add_{name}")(1)
    writer.add_vocab_size(rows)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, list):
            is_map, is_float = key.endswith("charsmap"), key.endswith("scores")
            writer.add_array(key, bytes(value) if is_map else [float(x) for x in value] if is_float else value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
            add(key, value)
    shapes = {"token_embd": (rows, size), "output_norm": (size,), "blk.0.attn_norm": (size,), "blk.0.ffn_norm": (size,)}
    shapes |= {f"blk.0.attn_{part}": (size, size) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}": (size, size) for part in ("gate", "up", "down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
