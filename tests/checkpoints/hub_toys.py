"""Tiny Hugging Face folders saved by transformers, and the tools to damage them: shared by the tests of hub folders."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from headway import files
from headway.checkpoints.hub_folder import CONFIG, INDEX, WEIGHTS, Checkpoint, folder_files, read_folder
from headway.errors import InputError
from headway.nn import Transformer

transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)

Tensors = dict[str, Tensor]
DROP = object()
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "max_position_embeddings": 32}  # fmt: skip
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ, NORM = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.input_layernorm.weight"
IDS = torch.arange(3, 20)[None]
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61,
      "decoder_start_token_id": 0}  # fmt: skip


def saved(folder: Path, kind: str = "Llama", head: str = "ForCausalLM", **keys: Any) -> torch.nn.Module:
    """A tiny model of transformers with every parameter drawn, saved by it."""
    config = getattr(transformers, f"{kind}Config")(**keys)
    torch.manual_seed(0)
    model = getattr(transformers, kind + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.2)
    model.save_pretrained(folder)
    return model


def edit(folder: Path, **keys: Any) -> None:
    tree = json.loads((folder / CONFIG).read_text()) | keys
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in tree.items() if value is not DROP}))


def stored(folder: Path) -> Tensors:
    return safetensors.torch.load_file(folder / WEIGHTS)


def store(folder: Path, tensors: Mapping[str, Tensor], name: str = WEIGHTS) -> None:
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)


def store_shards(folder: Path, shards: Mapping[str, Mapping[str, Tensor]], **index: Any) -> None:
    """Shards in place of the one file, with an index that fits unless `index` says otherwise."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    for name, tensors in shards.items():
        store(folder, tensors, name)
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    tree = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors},
    } | index
    (folder / INDEX).write_text(json.dumps({key: value for key, value in tree.items() if value is not DROP}))


def halves(tensors: Tensors) -> dict[str, Tensors]:
    names = sorted(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    return {f"part-{i}.safetensors": {name: tensors[name] for name in part} for i, part in enumerate(parts)}


def refused(folder: Path, *parts: object, **options: Any) -> str:
    """Reading is refused with exit code 3 in one line that names the folder and each of `parts`."""
    with pytest.raises(InputError) as caught:
        read_folder(folder, **options)
    text = str(caught.value)
    assert caught.value.exit_code == 3 and "\n" not in text and text.startswith(str(folder)) and len(text) < 1500, text
    for part in parts:
        assert str(part) in text, (part, text)
    return text


def logits(checkpoint: Checkpoint) -> Tensor:
    with torch.no_grad():
        return Transformer.of(checkpoint.config, checkpoint.weights)(IDS).logits


def contents(checkpoint: Checkpoint, **options: Any) -> Iterator[tuple[str, files.Content]]:
    return folder_files(
        checkpoint.config,
        checkpoint.weights,
        family=checkpoint.family,
        architecture=checkpoint.architecture,
        raw=checkpoint.raw,
        unread=checkpoint.unread,
        **options,
    )


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype is other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
