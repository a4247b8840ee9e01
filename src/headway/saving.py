"""A loaded model in another form: a Hugging Face folder, a GGUF file, or a run folder of ours.

What is written is read back by `loading.load` with the same weights to the bit, unless a dtype that holds less was
asked for. Published folders keep what came with them: other keys of config.json, tensors that no forward reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from headway import files
from headway.checkpoints.folder import WEIGHTS, save_checkpoint
from headway.checkpoints.gguf_model import FORMATS, gguf_chunks
from headway.checkpoints.hub_folder import choose_family, folder_files, write_folder
from headway.config import ModelConfig, PooledEmbedding
from headway.errors import ConfigError, MachineError
from headway.families import Family, families
from headway.launch import MODEL
from headway.loading import Loaded
from headway.nn.packed import PackedEmbedding, PackedLinear
from headway.text.gguf_vocab import TYPES, to_gguf

FORMS = ("hf", "gguf", "headway")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save(
    loaded: Loaded,
    target: str | Path,
    form: str,
    *,
    dtype: str | None = None,
    family: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model to `target` as `hf` (a folder), `gguf` (a file) or `headway` (a run folder).

    Args:
        dtype: float32, float16, bfloat16; for GGUF also q8_0, q4_0, q4_1. By default as loaded (GGUF: F32 for float32).
        family: the model_type to write it as; by default its own, or for a run the first that can express it.
        overwrite: replace what stands there.

    Raises:
        ConfigError: unknown form or dtype; no family can express the model. MachineError: the target exists; the disk.
    """
    place = Path(target)
    if form not in FORMS:
        raise ConfigError("--to", repr(form), ", ".join(FORMS))
    weights = plain_weights(loaded)
    if form == "gguf":
        return _save_gguf(loaded, weights, place, dtype, family, overwrite)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError("--dtype", repr(dtype), f"{', '.join(DTYPES)} for --to {form}")
    cast = None if dtype is None else DTYPES[dtype]
    if form == "headway":
        return _save_run(loaded, weights, place, cast, overwrite=overwrite)
    chosen, architecture = family_for(loaded, family)
    contents = folder_files(
        loaded.config,
        weights,
        family=chosen,
        architecture=architecture,
        raw=loaded.raw,
        unread=loaded.unread,
        dtype=cast,
    )
    write_folder(place, _with_text(loaded, contents), overwrite=overwrite)
    return place


def family_for(loaded: Loaded, asked: str | None = None) -> tuple[Family, str]:
    """The family and architecture to write a model as. Raises ConfigError when none can express it."""
    if asked is not None and asked not in families():
        raise ConfigError("--family", repr(asked), f"one of {', '.join(families())}")
    if loaded.family and loaded.architecture and asked in (None, loaded.family):
        return families()[loaded.family], loaded.architecture
    return choose_family(loaded.config, asked)


def plain_weights(loaded: Loaded) -> dict[str, Tensor]:
    """Every tensor of the model by name, packed ones unpacked to float32."""
    state = dict(loaded.model.state_dict())
    for name, module in loaded.model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.blocks")}
            state[f"{name}.weight"] = module.packed.unpack()
    return state


def _with_text(loaded: Loaded, contents: Iterator[tuple[str, files.Content]]) -> Iterator[tuple[str, files.Content]]:
    """The weights' files, then those of the tokenizer and of what is done with the model's output."""
    yield from contents
    tokenizer, config = loaded.tokenizer, loaded.config
    if tokenizer is not None:
        for name, text in tokenizer.files().items():
            yield name, text.encode()
    if config.kind in ("decoder", "encoder-decoder"):
        yield "generation_config.json", _json(generation_config(config))
    if isinstance(config.head, PooledEmbedding) and config.kind == "encoder" and config.head.transform == "none":
        yield from _sentence_transformer(config.head, config)


def generation_config(config: ModelConfig) -> dict[str, object]:
    """The ids that begin and end a text, as transformers' `generate` reads them."""
    t = config.tokens
    eos: object = [t.eos, *t.ends] if t.ends else t.eos
    ids = {"bos_token_id": t.bos, "eos_token_id": eos, "pad_token_id": t.pad, "decoder_start_token_id": t.decoder_start}
    return {name: value for name, value in ids.items() if value is not None}


def _sentence_transformer(head: PooledEmbedding, config: ModelConfig) -> Iterator[tuple[str, files.Content]]:
    """What sentence-transformers needs to pool and normalise as this head does."""
    steps = ["Transformer", "Pooling", *(["Normalize"] if head.normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    yield "modules.json", _json([
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{step}"}
        for i, step in enumerate(steps)
    ])  # fmt: skip
    modes = {"mean": "mean_tokens", "first": "cls_token", "last": "lasttoken"}
    pooling: dict[str, object] = {f"pooling_mode_{mode}": how == head.pooling for how, mode in modes.items()}
    yield "1_Pooling/config.json", _json({"word_embedding_dimension": config.d_model, **pooling})


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _save_gguf(
    loaded: Loaded,
    weights: Mapping[str, Tensor],
    place: Path,
    dtype: str | None,
    model_type: str | None,
    overwrite: bool,
) -> Path:
    asked = dtype or _stored(weights)
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(asked, asked.upper())
    if kind not in FORMATS:
        raise ConfigError("--dtype", repr(dtype), f"one of {', '.join(name.lower() for name in FORMATS)}")
    if place.exists() and not overwrite:
        raise MachineError(str(place), "exists", "a new file", "--overwrite, or another name")
    chosen, _ = family_for(loaded, model_type)
    vocabulary = to_gguf(loaded.words)
    chunks = gguf_chunks(loaded.config, weights, chosen, kind=kind, name=place.stem, vocabulary=vocabulary, types=TYPES)
    files.make_dir(place.absolute().parent)
    files.atomic_write(place, chunks)
    return place


def _stored(weights: Mapping[str, Tensor]) -> str:
    """The dtype of the weights."""
    first = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), torch.float32)
    return str(first).removeprefix("torch.")


def _save_run(
    loaded: Loaded, weights: Mapping[str, Tensor], place: Path, dtype: torch.dtype | None, *, overwrite: bool
) -> Path:
    if place.exists() and any(place.iterdir()) and not overwrite:
        raise MachineError(str(place), "exists and is not empty", "a new folder", "--overwrite, or another name")
    cast = {name: t if dtype is None or not t.is_floating_point() else t.to(dtype) for name, t in weights.items()}
    tokenizer = loaded.tokenizer
    files.make_dir(place)
    if tokenizer is not None:
        tokenizer.save(place)
    files.atomic_write(place / MODEL, loaded.config.to_json().encode() + b"\n")
    meta = {
        "family": loaded.family,
        "architecture": loaded.architecture,
        "identity": {"tokenizer": tokenizer.hash if tokenizer is not None else None},
    }
    save_checkpoint(place, loaded.step or 0, {WEIGHTS: cast}, meta, moved=False, overwrite=overwrite)
    return place
