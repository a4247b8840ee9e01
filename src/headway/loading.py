"""From a path to a model with what belongs to it: run folders, Hugging Face folders, GGUF files, packaged names.

What a path is follows from what lies there, never from its name: a manifest or checkpoints/ make a run, config.json a
Hugging Face folder, the magic GGUF a GGUF file. Saving in another form is `saving.py`.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway import files
from headway.checkpoints import hub_folder
from headway.checkpoints.fetch import resolve
from headway.checkpoints.folder import (
    CONFIG,
    MANIFEST,
    MODEL,
    TOKENIZER,
    WEIGHTS,
    Manifest,
    list_checkpoints,
    newest_good,
    verify,
)
from headway.checkpoints.gguf import MAGIC, read_gguf
from headway.checkpoints.gguf_model import GgufModel
from headway.checkpoints.packed import PACKED, joined
from headway.checkpoints.shards import SHARED_HASH, read_group
from headway.checkpoints.tensors import check_finite, tensor_hash
from headway.checkpoints.towers import TOWERS, open_tower
from headway.config import ModelConfig, PooledEmbedding, with_fields
from headway.errors import ConfigError, InputError, MachineError
from headway.families import families
from headway.families._preset import architecture_for
from headway.machine import return_memory
from headway.nn import Transformer
from headway.nn.packed import Packed, is_packed, unpacked
from headway.run_config import RunConfig, load_run
from headway.strict import strict_json
from headway.text import Tokenizer
from headway.text.gguf_vocab import from_gguf
from headway.tuning.tuned import tuned


@dataclass(frozen=True)
class Loaded:
    """A model with what belongs to it.

    Attributes:
        model: in evaluation mode, frozen. config: its config.
        tokenizer: None where the folder has none, as for vision models.
        path: where it lies. form: `run`, `hf` or `gguf`. family: its model_type, empty for a run of ours.
        architecture: its class in transformers. raw: the published config. unread: tensors nobody reads here.
        step: updates done, None for published models. receipt: what a quantized model measured before and after.
        notes: what the reader should know, such as a damaged newer checkpoint that was passed over.
        base: the model that adapters stand on, as the run names it.
    """

    model: Transformer
    tokenizer: Tokenizer | None
    config: ModelConfig
    path: Path
    form: str = "run"
    family: str = ""
    architecture: str = ""
    step: int | None = None
    receipt: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    unread: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    known_hash: str = ""
    base: str = ""

    @cached_property
    def weights_sha256(self) -> str:
        """Of all tensors by name; for a run the one in its manifest."""
        return self.known_hash or tensor_hash(self.model.state_dict())

    @property
    def words(self) -> Tokenizer:
        """The tokenizer of a model that must have one. Raises InputError."""
        if self.tokenizer is None:
            raise InputError(str(self.path), "no tokenizer", TOKENIZER, "put the model's tokenizer.json beside it")
        return self.tokenizer


class FoundRun(NamedTuple):
    """A run folder, the checkpoint in it that counts, its manifest, and what the reader should know."""

    run: Path
    folder: Path
    manifest: Manifest
    notes: list[str]


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    force_tokenizer: bool = False,
    allow_nonfinite: bool = False,
    tower: str | None = None,
) -> Loaded:
    """Load a model: a run folder or one of its checkpoints, a Hugging Face folder, or a GGUF file.

    Args:
        path: where it lies.
        dtype: cast the weights, a dtype of torch or its name; by default (`stored`) they stay as they are, quantized
            blocks of a GGUF file included.
        device: where the model goes.
        force_tokenizer: for a run, accept a tokenizer.json other than the one in training.
        allow_nonfinite: accept NaN and infinity among published weights.
        tower: `text` or `vision`, for a folder that holds two models (CLIP, SigLIP).

    Raises:
        InputError: nothing usable there; config, weights and tokenizer do not belong together.
        ConfigError, MachineError: no such dtype or device, or none on this machine.
    """
    place, dtype = Path(path), dtype_of(dtype)
    _check_device(device)
    form = form_of(place)
    with _undisturbed():
        if form == "run":
            loaded = _load_run(place, dtype, force_tokenizer=force_tokenizer)
        elif form == "hf":
            loaded = _load_folder(place, dtype, tower, allow_nonfinite=allow_nonfinite)
        else:
            loaded = _load_gguf(place, dtype, allow_nonfinite=allow_nonfinite)
    loaded.model.to(device)
    return_memory()
    return loaded


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A quarter of the threads: loading is thousands of small steps, after each of which threads wait for one another,
    and beside a busy process two of them take ten times as long as one. And no search for cycles among a vocabulary's
    hundred thousand objects, where there are none: a seventh of the time."""
    threads, collects = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(max(threads // 4, 1))
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

STORED, RECEIPT, GGUF_RECEIPT = "stored", "receipt", "headway.receipt"


def dtype_of(name: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of this name, None for `stored`; a dtype is itself. Raises ConfigError."""
    if not isinstance(name, str):
        return name
    if name not in (STORED, *DTYPES):
        raise ConfigError("dtype", repr(name)[:80], ", ".join((STORED, *DTYPES)))
    return DTYPES.get(name)


def _check_device(device: str | torch.device) -> None:
    try:
        torch.device(device)
    except RuntimeError:
        raise ConfigError("device", repr(device)[:80], "cpu or cuda") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise MachineError("device", f"{device}, which this torch cannot use here", "cpu", "--device cpu") from None


_CONVERT = "headway convert PATH DST reads other containers"


def form_of(place: Path) -> str:
    """`run`, `hf` or `gguf`. Raises InputError: nothing there (with the nearest name), or nothing that is a model."""
    if os.path.isdir(place):  # not Path.is_dir, which raises on a name that is too long
        if is_container(place):
            raise InputError(
                str(place), "model.bin, as CTranslate2 writes it", "the folder of a run or of a model", _CONVERT
            )
        if (place / hub_folder.CONFIG).exists() and not (place / CONFIG).exists() and not (place / MANIFEST).exists():
            return "hf"
        return "run"
    with files.open_regular(place) as file:
        if file.read(4) == MAGIC:
            return "gguf"
    raise InputError(
        str(place), "a file that is no GGUF", "a GGUF file, or the folder of a run or of a model", _CONVERT
    )


# --- runs --------------------------------------------------------------------------------------------------------


def find_checkpoint(path: str | Path) -> FoundRun:
    """The newest checkpoint of a run folder that verifies, or the checkpoint at `path` itself.

    Raises InputError: nothing there (with the nearest name), no run folder, no checkpoint that verifies.
    """
    place = Path(path)
    if not os.path.isdir(place):
        files.open_regular(place).close()
        raise InputError(str(place), "a file", "the folder of a run", "headway train data.path=FILE --output RUN")
    if (place / MANIFEST).is_file():
        return FoundRun(place.absolute().parent.parent, place, verify(place), [])
    if not list_checkpoints(place):
        found = "no checkpoint in it" if (place / CONFIG).is_file() else "not the folder of a run or of a model"
        expected = f"{CONFIG}, {TOKENIZER} and checkpoints/, or {hub_folder.CONFIG} and {hub_folder.WEIGHTS}"
        raise InputError(str(place), found, expected, "the --output of headway train")
    found_one = newest_good(place)
    notes = [f"passed over: {reason}" for reason in found_one.rejected]
    return FoundRun(place, found_one.path, found_one.manifest, notes)


def read_model_config(run: Path) -> ModelConfig:
    """The model.json of a run folder. Raises InputError when it is not one."""
    path = run / MODEL
    tree = strict_json(files.read_bytes(path, 1 << 24), str(path))
    if not isinstance(tree, dict):
        raise InputError(str(path), f"a {type(tree).__name__}", "the fields of a model config")
    try:
        return ModelConfig(**tree)
    except ConfigError as error:
        raise InputError(f"{path}, {error.where}", error.found, error.expected) from None


def _load_run(place: Path, dtype: torch.dtype | None, *, force_tokenizer: bool) -> Loaded:
    run, folder, manifest, notes = find_checkpoint(place)
    config = read_model_config(run)
    tokenizer = None
    if config.vocab_size:
        tokenizer = Tokenizer.load(run / TOKENIZER)
        check_tokenizer(run, config, tokenizer, manifest, force=force_tokenizer)
    identity = manifest.meta.get("identity")
    if isinstance(identity, dict) and "base" in identity:
        found = FoundRun(run, folder, manifest, notes)
        return _load_tuned(found, load_run([run / CONFIG], (), {}).run, tokenizer, dtype)
    # On the meta device first: a config that asks for more than the file holds must not take memory.
    blank = Transformer.blank(config)
    said = manifest.meta.get(PACKED, {})
    weights = joined(said, read_group(folder, WEIGHTS, ties=blank.ties), str(folder / MANIFEST))
    check_weights(blank, weights, folder / WEIGHTS, run / MODEL)
    if dtype is not None:
        weights = dict(unpacked(weights, dtype))
    family, architecture, raw = _origin(manifest, config)
    return Loaded(
        Transformer.of(config, weights),
        tokenizer,
        config,
        folder,
        family=family,
        architecture=architecture,
        step=manifest.step,
        notes=notes,
        raw=raw,
        receipt=manifest.meta.get(RECEIPT, {}),  # type: ignore[arg-type]  # shown as it is
        known_hash="" if dtype is not None or manifest.weights.startswith(SHARED_HASH) else manifest.weights,
    )


def load_base(name: str, dtype: str) -> Loaded:
    """A model to train further; `stored`, codes stay codes, and floats become float32, which steps compute with."""
    loaded = load(resolve(name), dtype=dtype)
    loaded.model.float()
    return loaded


def _load_tuned(found: FoundRun, run: RunConfig, tokenizer: Tokenizer | None, dtype: torch.dtype | None) -> Loaded:
    """A run that holds adapters: its base, which the config names, with them on it.

    Raises InputError: the base is not there, or another one than in training.
    """
    tuning = run.frugal
    assert tuning is not None and run.base is not None
    base = load_base(run.base, tuning.base_dtype)
    config, identity = read_model_config(found.run), found.manifest.meta.get("identity")
    trained = identity.get("base") if isinstance(identity, dict) else None
    if trained != base.weights_sha256:
        where = f"{found.run / CONFIG} base"
        raise InputError(where, f"{run.base} with weights {base.weights_sha256}", f"{trained}, those in training")
    if dtype is not None and is_packed(base.model):
        base = load_base(run.base, "float32")
    model = tuned(base.model, config, tuning, trained)
    wanted, weights = model.own_state(), read_group(found.folder, WEIGHTS)
    check_names(wanted, weights, found.folder / WEIGHTS, found.run / MODEL)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(weights[name])
    model = model.eval().requires_grad_(False)
    is_same = config.head.type == base.config.head.type
    return replace(
        base,
        model=model if dtype is None else model.to(dtype),
        tokenizer=tokenizer,
        config=config,
        path=found.folder,
        form="run",
        architecture=base.architecture if is_same or not base.family else _class_of(base.family, config),
        step=found.manifest.step,
        notes=[*base.notes, *found.notes],
        receipt={},
        unread={},
        known_hash="",
        base=run.base,
    )


def _class_of(family: str, config: ModelConfig) -> str:
    """The architecture of a family that has this head; empty where there is none."""
    heads = families()[family].heads
    return next((name for name, head in heads.items() if head.fields["head.type"] == config.head.type), "")


def _origin(manifest: Manifest, config: ModelConfig) -> tuple[str, str, dict[str, Any]]:
    """Family, architecture and config.json of the published model that a run folder was converted from, if it was; of a
    run with a preset its family."""
    preset = manifest.meta.get("preset")
    if isinstance(preset, str) and preset in families():
        return preset, architecture_for(families()[preset], config.head.type), {}
    family, architecture, raw = (manifest.meta.get(name) for name in ("family", "architecture", "raw"))
    raw = raw if isinstance(raw, dict) else {}
    known = families().get(family) if isinstance(family, str) else None
    if known is None or not isinstance(architecture, str) or architecture not in known.heads:
        return "", "", {name: raw[name] for name in ("id2label",) if name in raw}
    return known.model_type, architecture, raw


def check_tokenizer(run: Path, config: ModelConfig, tokenizer: Tokenizer, manifest: Manifest, *, force: bool) -> None:
    """Refuse a tokenizer with more ids than the embedding has rows, or another one than in training.

    Raises InputError naming both files, or both hashes (unless `force`).
    """
    where = str(run / TOKENIZER)
    check_rows(tokenizer, config, where, str(run / MODEL), "the tokenizer of the training run")
    identity = manifest.meta.get("identity")
    trained = identity.get("tokenizer") if isinstance(identity, dict) else None
    if trained and trained != tokenizer.hash and not force:
        fix = "put the right tokenizer.json back, or --force-tokenizer"
        raise InputError(where, f"tokenizer {tokenizer.hash}", f"{trained}, the one in training", fix)


def check_rows(tokenizer: Tokenizer, config: ModelConfig, where: str, model: str, fix: str) -> None:
    """Refuse a tokenizer with more ids than the embedding has rows (T6)."""
    if tokenizer.vocab_size > config.vocab_size:
        expected = f"at most the {config.vocab_size} embedding rows of {model}"
        raise InputError(where, f"{tokenizer.vocab_size} token ids", expected, fix)


def check_weights(model: Transformer, weights: Mapping[str, Tensor | Packed], file: Path, config: Path) -> None:
    """Compare names and shapes with what the config asks for.

    Raises InputError with the first misshaped tensor and both shapes, or counts and names of missing and surplus ones.
    """
    check_names(model.state_dict(), weights, file, config)


def check_names(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor | Packed], file: Path, config: Path) -> None:
    """As `check_weights`, for the tensors that are wanted."""
    for name in sorted(set(wanted) & set(weights)):
        if wanted[name].shape != weights[name].shape:
            found = f"tensor {name} has shape {tuple(weights[name].shape)}"
            raise InputError(str(file), found, f"{tuple(wanted[name].shape)} by {config}")
    missing, surplus = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    if missing or surplus:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:5])})"
            for what, names in (("missing", missing), ("surplus", surplus))
            if names
        ]
        raise InputError(str(file), f"tensors {' and '.join(parts)}", f"the {len(wanted)} tensors of {config}")


# --- published models --------------------------------------------------------------------------------------------

_TOKENIZERS = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def _load_folder(place: Path, dtype: torch.dtype | None, tower: str | None, *, allow_nonfinite: bool) -> Loaded:
    where = str(place / hub_folder.CONFIG)
    raw, pooling = hub_folder.read_json(place / hub_folder.CONFIG), pooling_beside(place)
    if raw.get("model_type") in TOWERS:
        raw, tensors = open_tower(place, raw, tower)
        where = f"{where} ({tower}_config)"
    else:
        tensors = hub_folder.open_tensors(place)
    how: dict[str, Any] = {"dtype": dtype, "allow_nonfinite": allow_nonfinite, "pooling": pooling}
    found = hub_folder.translate(raw, tensors, where, **how)
    notes = []
    if pooling is not None and found.config.head != pooling:
        head = found.config.head.type
        notes.append(f"{place / POOLING}: {pooling.pooling} pooling is not used, the head of this model is {head}")
    return _published(found, place, notes)


SENTENCES = "sentence_bert_config.json"
POOLING, MODULES, GENERATION = "1_Pooling/config.json", "modules.json", "generation_config.json"
PREPROCESSOR = "preprocessor_config.json"
POOLING_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}


def pooling_beside(place: Path) -> PooledEmbedding | None:
    """What sentence-transformers' files say, None without its pooling's. Raises InputError for another pooling."""
    path = place / POOLING
    if not path.is_file():
        return None
    said = hub_folder.read_json(path)
    on = [name for name, value in said.items() if name.startswith("pooling_mode_") and value is True]
    if len(on) != 1 or on[0] not in POOLING_MODES:
        raise InputError(str(path), f"{', '.join(on) or 'no pooling'}", f"one of {', '.join(POOLING_MODES)}")
    modules = place / MODULES
    steps = strict_json(files.read_bytes(modules, 1 << 20), str(modules)) if modules.is_file() else []
    types = [str(step.get("type")) for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    normalizes = any(name.endswith(".Normalize") for name in types)
    longest = hub_folder.read_json(place / SENTENCES).get("max_seq_length") if (place / SENTENCES).is_file() else None
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise InputError(f"{place / SENTENCES}: max_seq_length", repr(longest), "a positive integer")
    mode: Any = POOLING_MODES[on[0]]
    return PooledEmbedding(pooling=mode, normalize=normalizes, max_len=longest)


def ends_beside(config: ModelConfig, place: Path) -> ModelConfig:
    """The config with the end tokens that generation_config.json adds (Llama 3 names `<|eot_id|>` there alone)."""
    path = place / GENERATION
    if config.kind not in ("decoder", "encoder-decoder") or not path.is_file():
        return config
    said = hub_folder.read_json(path).get("eos_token_id")
    ids = [said] if isinstance(said, int) else said if isinstance(said, list) else []
    known = (config.tokens.eos, *config.tokens.ends)
    more = [one for one in ids if type(one) is int and 0 <= one < config.vocab_size and one not in known]
    if not more:
        return config
    first, *rest = more if config.tokens.eos is None else (config.tokens.eos, *config.tokens.ends, *more)
    return with_fields(config, tokens=config.tokens.model_copy(update={"eos": first, "ends": tuple(rest)}))


def _published(found: hub_folder.Checkpoint, place: Path, notes: list[str]) -> Loaded:
    """A checkpoint with the tokenizer that lies in the folder `place`."""
    config = ends_beside(found.config, place)
    tokenizer = None
    if config.vocab_size and any((place / name).exists() for name in _TOKENIZERS):
        tokenizer = Tokenizer.load(place)
        check_rows(tokenizer, config, str(place), str(place / hub_folder.CONFIG), "the tokenizer of this model")
    return Loaded(
        Transformer.of(config, found.weights),
        tokenizer,
        config,
        place,
        form="hf",
        family=found.family.model_type,
        architecture=found.architecture,
        notes=[*notes, *found.notes],
        raw=found.raw,
        unread=found.unread,
    )


def check_pixels(loaded: Loaded, key: str) -> None:
    """Whether a published vision model sees pixels from -1 to 1, as images are given here. Raises ConfigError."""
    path = loaded.path / PREPROCESSOR
    if loaded.form != "hf" or loaded.config.embeddings.patch is None or not path.is_file():
        return
    said = hub_folder.read_json(path)
    for name in ("image_mean", "image_std"):
        values = said.get(name)
        if isinstance(values, list) and any(value != 0.5 for value in values):
            raise ConfigError(key, f"{path}: {name} {values}"[:200], "0.5 each: pixels from -1 to 1", "another model")


def _load_gguf(place: Path, dtype: torch.dtype | None, *, allow_nonfinite: bool) -> Loaded:
    with read_gguf(place) as file:
        tokenizer, table = None, file.tensors.get("token_embd.weight")
        if "tokenizer.ggml.tokens" in file.metadata:
            # Before the weights: what making it leaves behind is free again by then.
            tokenizer = from_gguf(file.metadata, str(place), table.shape[0] if table is not None else None)
            for key in [key for key, value in file.metadata.items() if isinstance(value, list)]:
                if key.startswith("tokenizer."):
                    del file.metadata[key]
            return_memory()
        found = GgufModel(file, dtype)
        said = file.metadata.get(GGUF_RECEIPT)
    receipt = strict_json(said, f"{place} {GGUF_RECEIPT}") if isinstance(said, str) else {}
    for name, weight in found.weights.items():
        # Those in blocks are not looked into: that would mean to unpack them.
        if not allow_nonfinite and isinstance(weight, Tensor):
            check_finite(weight, name, str(place))
    return Loaded(
        Transformer.of(found.config, found.weights),
        tokenizer,
        found.config,
        place,
        form="gguf",
        family=found.family.model_type,
        architecture=found.architecture,
        notes=found.notes,
        receipt=receipt if isinstance(receipt, dict) else {},
    )


def class_names(loaded: Loaded) -> tuple[str, ...]:
    """The classes of a model: a run's `data.labels`, or a published model's id2label."""
    places = [folder / CONFIG for folder in (loaded.path, loaded.path.parent.parent)]  # a run, or a checkpoint of one
    for place in filter(Path.is_file, places if loaded.form == "run" else ()):
        return load_run([place], (), {}).run.data.labels
    names = loaded.raw.get("id2label")
    return tuple(str(names[key]) for key in sorted(names, key=int)) if isinstance(names, dict) else ()


# --- other containers, for `convert` -----------------------------------------------------------------------------


def load_container(path: str | Path, *, unsafe_pickle: bool = False, allow_nonfinite: bool = False) -> Loaded:
    """A model from an ONNX file or a CTranslate2 folder, or with `unsafe_pickle` from pytorch_model.bin or its folder.

    A pickle is read by a confined child process. Raises InputError: no such container, or no model known in it.
    """
    from headway.checkpoints.foreign import read_foreign
    from headway.checkpoints.unpickle import read_pickle

    place = Path(path)
    notes: list[str] = []
    if unsafe_pickle:
        file = place / hub_folder.PICKLES[0] if os.path.isdir(place) else place
        raw = hub_folder.read_json(file.parent / hub_folder.CONFIG)
        tensors, beside = read_pickle(file), file.parent
    else:
        raw, tensors, found = read_foreign(place, say=notes.append)
        beside = next(iter(found.values())).parent if found else place
    where = hub_folder.Tensors(str(place), tensors)
    checkpoint = hub_folder.translate(raw, where, f"{place} (config)", allow_nonfinite=allow_nonfinite)
    return _published(checkpoint, beside, notes)


def is_container(place: Path) -> bool:
    """Whether `load_container` is meant: a file that is no GGUF, or a folder with model.bin and no safetensors."""
    if os.path.isdir(place):
        ours = any((place / name).exists() for name in (hub_folder.WEIGHTS, hub_folder.INDEX))
        return (place / "model.bin").is_file() and not ours
    with files.open_regular(place) as file:
        return file.read(4) != MAGIC
