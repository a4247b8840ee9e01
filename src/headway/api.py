"""The library's front door: build, load, train, generate. Each composes packages that do not know each other.

    run = headway.train({"data": {"path": "book.txt"}, "budget": "3m", "output": "runs/book"})
    loaded = headway.load("runs/book")
    print(headway.generate(loaded, "It was", max_tokens=40)[0].text)

A run folder holds config.yaml (the resolved run), model.json, tokenizer.json, checkpoints/, metrics.jsonl, loss.svg and
loss.png. Hugging Face folders and GGUF files come with the families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from headway import files
from headway.checkpoints.folder import MANIFEST, WEIGHTS, Manifest, list_checkpoints, newest_good, verify
from headway.checkpoints.tensors import read_tensors
from headway.config import ModelConfig
from headway.errors import ConfigError, InputError
from headway.launch import CONFIG, MODEL, TOKENIZER, Launch, OnEvent, RunResult, train
from headway.nn import Transformer
from headway.strict import strict_json
from headway.text import Tokenizer

if TYPE_CHECKING:
    from headway.generation import Generation
    from headway.generation.decode import OnText


__all__ = ["Launch", "Loaded", "OnEvent", "RunResult", "build", "generate", "load", "train"]


@dataclass(frozen=True)
class Loaded:
    """A model with what belongs to it.

    Attributes:
        model: in evaluation mode. tokenizer, config: what it was trained with.
        path: the checkpoint folder. step: updates done. weights_sha256: of all tensors, by name.
        notes: what the reader should know, such as a damaged newer checkpoint that was passed over.
    """

    model: Transformer
    tokenizer: Tokenizer
    config: ModelConfig
    path: Path
    step: int
    weights_sha256: str
    notes: list[str] = field(default_factory=list)


def build(config: ModelConfig | Mapping[str, Any]) -> Transformer:
    """A freshly initialised model of a config or of its fields. Raises ConfigError."""
    return Transformer(config if isinstance(config, ModelConfig) else ModelConfig(**config))


class FoundRun(NamedTuple):
    """A run folder, the checkpoint in it that counts, its manifest, and what the reader should know."""

    run: Path
    folder: Path
    manifest: Manifest
    notes: list[str]


def find_checkpoint(path: str | Path) -> FoundRun:
    """The newest checkpoint of a run folder that verifies, or the checkpoint at `path` itself.

    Raises InputError: nothing there (with the nearest name), no run folder, no checkpoint that verifies.
    """
    place = Path(path)
    if not place.is_dir():
        files.open_regular(place).close()
        raise InputError(str(place), "a file", "the folder of a run", "headway train data.path=FILE --output RUN")
    if (place / MANIFEST).is_file():
        return FoundRun(place.absolute().parent.parent, place, verify(place), [])
    if not list_checkpoints(place):
        found = "no checkpoint in it" if (place / CONFIG).is_file() else "not the folder of a run"
        raise InputError(str(place), found, f"{CONFIG}, {TOKENIZER} and checkpoints/", "the --output of headway train")
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


def load(path: str | Path, *, force_tokenizer: bool = False, device: str | torch.device = "cpu") -> Loaded:
    """Load a trained model: the newest checkpoint of a run folder that verifies, or one checkpoint's folder.

    Args:
        path: where it lies.
        force_tokenizer: accept a tokenizer.json other than the one in training.
        device: where the model goes.

    Raises:
        InputError: nothing usable there; config and weights, or tokenizer and model, do not belong together.
    """
    run, folder, manifest, notes = find_checkpoint(path)
    config = read_model_config(run)
    tokenizer = Tokenizer.load(run / TOKENIZER)
    check_tokenizer(run, config, tokenizer, manifest, force=force_tokenizer)
    weights = read_tensors(folder / WEIGHTS)
    # On the meta device first: a config that asks for more than the file holds must not take memory.
    with torch.device("meta"):
        check_weights(Transformer(config), weights, folder / WEIGHTS, run / MODEL)
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config)
    model.load_state_dict(weights)
    model.eval().requires_grad_(False).to(device)
    return Loaded(model, tokenizer, config, folder, manifest.step, manifest.weights, notes)


def check_tokenizer(run: Path, config: ModelConfig, tokenizer: Tokenizer, manifest: Manifest, *, force: bool) -> None:
    """Refuse a tokenizer with more ids than the embedding has rows, or another one than in training.

    Raises InputError naming both files, or both hashes (unless `force`).
    """
    where = str(run / TOKENIZER)
    if tokenizer.vocab_size > config.vocab_size:
        expected = f"at most the {config.vocab_size} embedding rows of {run / MODEL}"
        raise InputError(where, f"{tokenizer.vocab_size} token ids", expected, "the tokenizer of the training run")
    identity = manifest.meta.get("identity")
    trained = identity.get("tokenizer") if isinstance(identity, dict) else None
    if trained and trained != tokenizer.hash and not force:
        fix = "put the right tokenizer.json back, or --force-tokenizer"
        raise InputError(where, f"tokenizer {tokenizer.hash}", f"{trained}, the one in training", fix)


def check_weights(model: Transformer, weights: Mapping[str, Tensor], file: Path, config: Path) -> None:
    """Compare names and shapes with what the config asks for.

    Raises InputError with the first misshaped tensor and both shapes, or counts and names of missing and surplus ones.
    """
    wanted = model.state_dict()
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


def generate(
    loaded: Loaded,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    on_text: OnText | None = None,
    **options: Any,
) -> list[Generation]:
    """Continue prompts with a loaded model.

    Args:
        loaded: from `load`, or any object with model and tokenizer.
        prompts: one text, or several texts or lists of token ids.
        on_text: called with (number of the sequence, new text) as text becomes certain.
        options: fields of generation.GenerationOptions: max_tokens, temperature, top_k, top_p, seed, n, beams...

    Returns one Generation per prompt and sample. Raises ConfigError, InputError, DivergedError; see generation.decode.
    """
    from headway.generation import GenerationOptions
    from headway.generation import generate as decode

    return decode(loaded.model, loaded.tokenizer, prompts, GenerationOptions(**options), on_text)
