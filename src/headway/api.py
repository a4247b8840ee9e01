"""The library's front door: build, load, generate, embed. Each composes packages that do not know each other.

    run = headway.train({"data": {"path": "book.txt"}, "budget": "3m", "output": "runs/book"})
    loaded = headway.load("runs/book")
    print(headway.generate(loaded, "It was", max_tokens=40)[0].text)

A path is a run folder, a Hugging Face folder, a GGUF file or a packaged model's name; see loading.py. A run folder
holds config.yaml (the resolved run), model.json, tokenizer.json, checkpoints/, metrics.jsonl, loss.svg and loss.png.
`train` is launch.py's: loading a model does not import what trains one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headway.config import ModelConfig
from headway.errors import ConfigError, InputError
from headway.loading import Loaded, dtype_of
from headway.loading import load as _load
from headway.nn import Transformer
from headway.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from headway.evaluation.fill_mask import Guess
    from headway.generation import Generation
    from headway.generation.decode import OnText


__all__ = ["Loaded", "build", "embed", "fill_mask", "generate", "load", "transcribe"]


def build(config: ModelConfig | Mapping[str, Any]) -> Transformer:
    """A freshly initialised model of a config or of its fields. Raises ConfigError."""
    return Transformer(config if isinstance(config, ModelConfig) else ModelConfig(**config))


def load(path: str | Path, **options: Any) -> Loaded:
    """Load a model by path or by name.

    Args:
        path: a run folder, a Hugging Face folder, a GGUF file, the name of a packaged model (`headway fetch` lists
            them), or `hf:owner/name` from the hub.
        options: dtype, device, force_tokenizer, allow_nonfinite, tower; see loading.load.

    Raises InputError, MachineError.
    """
    from headway.checkpoints.fetch import resolve

    dtype_of(options.get("dtype"))  # before anything is fetched
    return _load(resolve(str(path)), **options)


def embed(loaded: Loaded, texts: str | Sequence[str], *, progress: Callable[[int], None] | None = None) -> Tensor:
    """Vectors of texts, (texts, size) float32, pooled and normalised as the model says; see evaluation.embed."""
    from headway.evaluation.embed import check_can_embed
    from headway.evaluation.embed import embed as vectors

    check_can_embed(loaded.config)
    return vectors(loaded.model, loaded.words, [texts] if isinstance(texts, str) else texts, progress=progress)


def fill_mask(loaded: Loaded, text: str, *, top: int = 5) -> list[list[Guess]]:
    """The likeliest tokens at each mask of a text, for encoders; see evaluation.fill_mask."""
    from headway.evaluation.fill_mask import check_can_fill
    from headway.evaluation.fill_mask import fill_mask as fill

    check_can_fill(loaded.config)
    return fill(loaded.model, loaded.words, text, top=top)


def transcribe(loaded: Loaded, audio: str | Path | Tensor, *, language: str | None = None) -> str:
    """The words in a recording.

    Args:
        loaded: a Whisper model. audio: a WAV file, or samples at 16 kHz (n,) between -1 and 1.
        language: a code such as `en`, for models of several languages.

    Longer recordings are cut into pieces of 30 seconds. Raises ConfigError, InputError.
    """
    from headway.data.audio import RATE, log_mel, read_wav
    from headway.generation.transcribe import decoder_prefix, named_ids
    from headway.generation.transcribe import transcribe as hear

    front, raw = loaded.config.embeddings.audio, loaded.raw
    if front is None:
        raise ConfigError("kind", f"{loaded.config.kind} without an audio front end hears nothing", "a Whisper model")
    samples = audio if isinstance(audio, Tensor) else read_wav(Path(audio))
    prefix = decoder_prefix(loaded.words, raw, loaded.config.tokens.decoder_start or 0, language)
    banned, banned_first = (named_ids(raw, name) for name in ("suppress_tokens", "begin_suppress_tokens"))
    ids: list[int] = []
    for piece in torch.split(samples, front.frames * RATE // 100):  # a frame is 10 ms
        features = log_mel(piece, bins=front.bins, frames=front.frames)
        ids += hear(loaded.model, loaded.words, features, prefix=prefix, banned=banned, banned_first=banned_first)
    return loaded.words.decode(ids).strip()


def generate(
    loaded: Loaded,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    on_text: OnText | None = None,
    draft: Loaded | None = None,
    **options: Any,
) -> list[Generation]:
    """Continue prompts with a loaded model.

    Args:
        loaded: from `load`, or any object with model and tokenizer.
        prompts: one text, or several texts or lists of token ids.
        on_text: called with (number of the sequence, new text) as text becomes certain.
        draft: a smaller model with the same tokens, whose guesses make a single text come sooner.
        options: fields of generation.GenerationOptions: max_tokens, temperature, top_k, top_p, seed, n, beams...

    Returns one Generation per prompt and sample. Raises ConfigError, InputError, DivergedError; see generation.decode.
    """
    from headway.generation import GenerationOptions
    from headway.generation import generate as decode
    from headway.generation.prompts import check_can_generate

    check_can_generate(loaded.model.config)
    if loaded.tokenizer is None:
        raise InputError(str(loaded.path), "no tokenizer", "tokenizer.json beside the weights")
    if draft is not None:
        _check_tokens(loaded.tokenizer, draft)
    helper = None if draft is None else draft.model
    return decode(loaded.model, loaded.tokenizer, prompts, GenerationOptions(**options), on_text, draft=helper)


def _check_tokens(words: Tokenizer, draft: Loaded) -> None:
    """Raise ConfigError where a draft model means other tokens by the same ids."""
    if words.hash == draft.words.hash:
        return
    for token_id in range(words.vocab_size):
        own, other = words.token(token_id), draft.words.token(token_id)
        if own != other:
            raise ConfigError(
                "draft", f"its token {token_id} is {other!r}, not {own!r}", "a model of the same tokenizer"
            )
