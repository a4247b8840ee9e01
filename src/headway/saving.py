"""A loaded model in another form: a Hugging Face folder, a GGUF file, or a run folder of ours.

What is written is read back by `loading.load` with the same weights to the bit, unless a dtype that holds less was
asked for. Published folders keep what came with them: other keys of config.json, tensors that no forward reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway import files
from headway.checkpoints.folder import MODEL, WEIGHTS, save_checkpoint
from headway.checkpoints.gguf_model import FORMATS, gguf_chunks, gguf_metadata
from headway.checkpoints.hub_folder import CONFIG, choose_family, folder_files, write_folder
from headway.checkpoints.packed import PACKED, forms
from headway.config import ModelConfig, PooledEmbedding
from headway.errors import ConfigError
from headway.families import Family, families
from headway.families._gguf import dialect
from headway.families._translate import Plan, plan, write_config
from headway.loading import (
    DTYPES,
    GENERATION,
    GGUF_RECEIPT,
    MODULES,
    POOLING,
    POOLING_MODES,
    PREPROCESSOR,
    RECEIPT,
    SENTENCES,
    Loaded,
    class_names,
)
from headway.nn.packed import Packed, check_plain, unpacked, weights_of
from headway.text.gguf_vocab import TYPES, to_gguf
from headway.text.sentencepiece import UNUSED
from headway.tuning import adapters, peft_folder

FORMS = ("hf", "gguf", "headway", "peft")
MAX_KEPT = 1 << 24


def save(
    loaded: Loaded,
    target: str | Path,
    form: str,
    *,
    dtype: str | None = None,
    family: str | None = None,
    overwrite: bool = False,
    merge: bool = False,
) -> Path:
    """Write a model to `target`: `hf` (a folder), `gguf` (a file), `headway` (a run folder), or its adapters as `peft`.

    Args:
        dtype: float32, float16, bfloat16; for GGUF also q8_0, q4_0, q4_1. By default as loaded, codes too (in
            GGUF where it has a format for them, else F32).
        family: the model_type to write it as; by default its own, or for a run the first that can express it.
        overwrite: replace what stands there. merge: take the adapters in use into the weights first, in place.

    Raises:
        ConfigError: unknown form or dtype; adapters that are neither merged nor asked for, or weights in codes to merge
            them into; no family can express the model. MachineError: the target exists; the disk.
    """
    place = Path(target)
    if form not in FORMS:
        raise ConfigError("--to", repr(form), ", ".join(FORMS))
    files.check_target(place, overwrite)
    if merge and not adapters.merge(loaded.model):
        raise ConfigError("--merge", "a model without adapters", "one that was tuned, or no --merge")
    if form == "peft":
        return _save_adapter(loaded, place, overwrite=overwrite)
    check_plain(loaded.model)
    if form == "headway" and dtype is None:
        return _save_run(loaded, loaded.model.state_dict(), place, None)
    if form == "gguf":
        return _save_gguf(loaded, place, dtype, family)
    weights = plain_weights(loaded)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError("--dtype", repr(dtype), f"{', '.join(DTYPES)} for --to {form}")
    cast = None if dtype is None else DTYPES[dtype]
    if form == "headway":
        return _save_run(loaded, weights, place, cast)
    chosen, architecture = family_for(loaded, family)
    contents = folder_files(
        loaded.config,
        weights,
        family=chosen,
        architecture=architecture,
        raw=raw_of(loaded),
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
    chosen, architecture = choose_family(loaded.config, asked)
    if asked not in (None, chosen.model_type):
        raise ConfigError(
            "--family", _why_not(loaded.config, families()[str(asked)]), f"{chosen.model_type}, which can"
        )
    return chosen, architecture


def _why_not(config: ModelConfig, family: Family) -> str:
    """Why a family cannot express a model."""
    for architecture, head in family.heads.items():
        if family.fixed.get("kind") == config.kind and head.fields["head.type"] == config.head.type:
            try:
                write_config(family, architecture, config)
            except ConfigError as error:
                return error.found
    return f"{family.model_type} has no {config.kind} with head {config.head.type}"


def plan_of(loaded: Loaded) -> Plan | None:
    """Where each tensor of a published model stands in its files; None for a run of ours."""
    if not loaded.family or not loaded.architecture:
        return None
    family = families()[loaded.family]
    return plan(family, family.heads[loaded.architecture], loaded.config)


def _save_adapter(loaded: Loaded, place: Path, *, overwrite: bool) -> Path:
    """The adapter in use as peft keeps it."""
    names = adapters.names(loaded.model)
    if len(names) != 1:
        raise ConfigError("--to peft", f"{len(names)} adapters", "a model with one", "headway tune")
    if loaded.model.elsewhere and any(".added." not in name for name in loaded.model.own_state()):
        raise ConfigError("--to peft", "a head trained beside the adapters", "adapters alone", "--to headway --merge")
    model, where = loaded.model, {"base": loaded.base, "base_sha256": loaded.model.base_sha256}
    return peft_folder.write(model, place, plan_of(loaded), name=names[0], overwrite=overwrite, **where)


def plain_weights(loaded: Loaded) -> dict[str, Tensor]:
    """Every tensor of the model by name, packed ones unpacked to float32; what is tied is one tensor."""
    return unpacked(weights_of(loaded.model))


def _with_text(loaded: Loaded, contents: Iterator[tuple[str, files.Content]]) -> Iterator[tuple[str, files.Content]]:
    """The weights' files, then those of the tokenizer and of what is done with the model's inputs and outputs."""
    yield from contents
    tokenizer, config = loaded.tokenizer, loaded.config
    if tokenizer is not None:
        for name, text in tokenizer.files().items():
            yield name, text.encode()
    kept = [name for name in (GENERATION, PREPROCESSOR) if loaded.form == "hf" and (loaded.path / name).is_file()]
    for name in kept:
        yield name, files.read_bytes(loaded.path / name, MAX_KEPT)
    if config.kind in ("decoder", "encoder-decoder") and GENERATION not in kept:
        yield GENERATION, _json(generation_config(config, loaded.raw))
    head = config.head
    if (
        isinstance(head, PooledEmbedding)
        and config.kind == "encoder"
        and head.transform == "none"
        and not head.projection
    ):
        yield from _sentence_transformer(head, config)


def generation_config(config: ModelConfig, raw: Mapping[str, object] | None = None) -> dict[str, object]:
    """The ids that begin and end a text or never stand in it, as transformers' `generate` reads them."""
    t = config.tokens
    eos: object = [t.eos, *t.ends] if t.ends else t.eos
    ids = {"bos_token_id": t.bos, "eos_token_id": eos, "pad_token_id": t.pad, "decoder_start_token_id": t.decoder_start}
    ids |= {name: (raw or {}).get(name) for name in ("suppress_tokens", "begin_suppress_tokens")}
    return {name: value for name, value in ids.items() if value is not None}


def _sentence_transformer(head: PooledEmbedding, config: ModelConfig) -> Iterator[tuple[str, files.Content]]:
    """What sentence-transformers needs to pool and normalise as this head does."""
    steps = ["Transformer", "Pooling", *(["Normalize"] if head.normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    yield MODULES, _json([
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{step}"}
        for i, step in enumerate(steps)
    ])  # fmt: skip
    pooling: dict[str, object] = {mode: how == head.pooling for mode, how in POOLING_MODES.items()}
    yield POOLING, _json({"word_embedding_dimension": config.d_model, **pooling})
    if head.max_len is not None:
        yield SENTENCES, _json({"max_seq_length": head.max_len, "do_lower_case": False})


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _save_gguf(loaded: Loaded, place: Path, dtype: str | None, model_type: str | None) -> Path:
    """Matrices in codes stay as they are where GGUF has a format for them and no dtype is asked for."""
    weights = weights_of(loaded.model) if dtype is None else plain_weights(loaded)
    asked = _stored(weights) if dtype is None else dtype
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(asked, asked.upper())
    if kind not in FORMATS:
        raise ConfigError("--dtype", repr(asked), f"one of {', '.join(name.lower() for name in FORMATS)}")
    chosen, _ = family_for(loaded, model_type)
    vocabulary = gguf_vocabulary(loaded, chosen)
    if loaded.receipt and dtype is None:
        vocabulary[GGUF_RECEIPT] = json.dumps(loaded.receipt)
    chunks = gguf_chunks(loaded.config, weights, chosen, kind=kind, name=place.stem, vocabulary=vocabulary, types=TYPES)
    files.make_dir(place.absolute().parent)
    files.atomic_write(place, chunks)
    return place


def check_gguf(loaded: Loaded) -> None:
    """Whether a model can become a GGUF file, before any work. Raises ConfigError, InputError."""
    gguf_vocabulary(loaded, family_for(loaded)[0])


def gguf_vocabulary(loaded: Loaded, family: Family) -> dict[str, object]:
    """The tokenizer's metadata in a GGUF file, with unused tokens up to the embedding's rows, by which llama.cpp goes.

    Raises ConfigError, InputError: what llama.cpp cannot express, of the model first and then of its tokenizer.
    """
    gguf_metadata(loaded.config, family)
    names = dialect(family)
    plan(names, names.heads[names.model_type], loaded.config)
    out = to_gguf(loaded.words)
    tokens = out["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    more = range(len(tokens), loaded.config.vocab_size)
    idle: dict[str, list[object]] = {"tokens": [f"[PAD{number}]" for number in more]}
    idle |= {"token_type": [UNUSED for _ in more], "scores": [0.0 for _ in more]}
    for name, values in idle.items():
        if isinstance(known := out.get(f"tokenizer.ggml.{name}"), list):
            out[f"tokenizer.ggml.{name}"] = [*known, *values]
    return out


def _stored(weights: Mapping[str, Tensor | Packed]) -> str:
    """The dtype of the weights that are in no codes."""
    plain = (tensor.dtype for tensor in weights.values() if isinstance(tensor, Tensor) and tensor.is_floating_point())
    first = next(plain, torch.float32)
    return str(first).removeprefix("torch.")


def raw_of(loaded: Loaded) -> dict[str, Any]:
    """The published config, with the names of the classes that a run keeps in its own."""
    names = class_names(loaded)
    return {**loaded.raw, **({"id2label": {str(place): name for place, name in enumerate(names)}} if names else {})}


def _save_run(loaded: Loaded, weights: Mapping[str, Tensor], place: Path, dtype: torch.dtype | None) -> Path:
    """Weights as they are, in codes or cast."""
    cast: dict[tuple[int, torch.Size], Tensor] = {}  # by their place: what is tied is stored once
    for tensor in weights.values():
        is_kept = dtype is None or not tensor.is_floating_point()
        cast.setdefault((tensor.data_ptr(), tensor.shape), tensor if is_kept else tensor.to(dtype))
    tokenizer = loaded.tokenizer
    meta = {
        "family": loaded.family,
        "architecture": loaded.architecture,
        "raw": raw_of(loaded),
        "identity": {"tokenizer": tokenizer.hash if tokenizer is not None else None},
    }
    if dtype is None:
        meta |= {PACKED: forms(loaded.model), RECEIPT: dict(loaded.receipt)}
    with files.replacing_folder(place, (MODEL, CONFIG)) as folder:
        if tokenizer is not None:
            tokenizer.save(folder)
        files.atomic_write(folder / MODEL, loaded.config.to_json().encode() + b"\n")
        held = {name: cast[tensor.data_ptr(), tensor.shape] for name, tensor in weights.items()}
        save_checkpoint(folder, loaded.step or 0, {WEIGHTS: held}, meta, moved=False)
    return place
