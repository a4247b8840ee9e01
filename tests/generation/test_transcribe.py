"""Speech as text: the ids are those of transformers' greedy `generate` on a tiny random Whisper, piece by piece."""

from __future__ import annotations

import functools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loading import TEXT, error_of, published, theirs
from torch import Tensor
from transformers.generation.utils import GenerationMixin

from headway import api
from headway.checkpoints.hub_folder import read_json
from headway.data.audio import log_mel
from headway.generation.transcribe import decoder_prefix, named_ids, transcribe
from headway.loading import Loaded, load
from headway.saving import save
from headway.text import Tokenizer, train_tokenizer

SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>")
END, START, EN, DE, TASK, PLAIN = range(6)
ROOM = 12
NAME = "WhisperForConditionalGeneration"
SUPPRESSED = {"suppress_tokens": [231, 49], "begin_suppress_tokens": [83, 68, END]}
FORCED = {"forced_decoder_ids": [[2, PLAIN], [1, TASK]]}


@functools.cache
def words() -> Tokenizer:
    return train_tokenizer([TEXT], "bpe", 280, special_tokens=SPECIAL)


def keys(**more: Any) -> dict[str, Any]:
    ids = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "decoder_start_token_id": START}
    return {"vocab_size": words().vocab_size, **ids, **more}


def lively(**more: Any) -> Any:
    """The random model, made to say more than one word on end: places and sound weigh more than the token before."""
    model = theirs(NAME, **keys(**more))
    if not hasattr(model, "is_lively"):
        with torch.no_grad():
            for name, parameter in model.model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                if name.endswith(("decoder.embed_positions.weight", "encoder_attn.out_proj.weight")):
                    parameter.mul_(4)
        model.is_lively = True
    return model


def whisper(place: Path, **more: Any) -> Loaded:
    lively(**more).save_pretrained(place)
    words().save(place)
    return load(place)


def greedy(features: Tensor, prefix: list[int], most: int, **more: Any) -> list[int]:
    """By transformers' own loop and its own logits processors, without Whisper's cutting of long recordings."""
    model = lively(**more)
    ids = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "decoder_start_token_id": START}
    banned = {name: more.get(name) for name in SUPPRESSED}
    config = type(model.generation_config)(**ids, **banned, max_new_tokens=most, do_sample=False)
    given = {"decoder_input_ids": torch.tensor([prefix]), "generation_config": config}
    found = GenerationMixin.generate(model, inputs=features[None], **given)[0].tolist()
    assert found[: len(prefix)] == prefix
    out = found[len(prefix) :]
    return out[: out.index(END)] if END in out else out


def sound(seed: int, samples: int) -> Tensor:
    """Tones that rise and fall, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.arange(samples) / 16_000
    pitch = 300 * 2 ** (seed + torch.sin(40 * times))
    return torch.sin(2 * torch.pi * pitch * times) * 0.3 + torch.randn(samples, generator=generator) * 0.003


def spectrum(loaded: Loaded, samples: Tensor) -> Tensor:
    front = loaded.config.embeddings.audio
    assert front is not None
    return log_mel(samples, bins=front.bins, frames=front.frames)


@pytest.mark.parametrize("most", [1, 5, ROOM])
@pytest.mark.parametrize("more", [{}, SUPPRESSED, {"suppress_tokens": [END]}], ids=["free", "suppressed", "endless"])
def test_tokens_are_theirs(tmp_path: Path, more: dict[str, Any], most: int) -> None:
    loaded = whisper(tmp_path, **more)
    banned, banned_first = (named_ids(loaded.raw, name) for name in SUPPRESSED)
    assert banned == more.get("suppress_tokens", []) and banned_first == more.get("begin_suppress_tokens", [])
    answers = set()
    for seed in range(4):
        features = spectrum(loaded, sound(seed, 3000))
        given = {"prefix": [START, PLAIN], "banned": banned, "banned_first": banned_first, "max_tokens": most}
        found = transcribe(loaded.model, loaded.words, features, **given)
        assert found == greedy(features, [START, PLAIN], most, **more)
        assert not {*found} & {*banned, END} and not {*found[:1]} & {*banned_first}
        answers.add(tuple(found))
    assert len(answers) > 1 or most == 1  # the sound is heard


def test_suppression_is_needed(tmp_path: Path) -> None:
    """The control: left alone, the model writes some of what is suppressed above."""
    loaded = whisper(tmp_path)
    free = [
        transcribe(loaded.model, loaded.words, spectrum(loaded, sound(seed, 3000)), prefix=[START]) for seed in range(4)
    ]
    first = {ids[0] for ids in free if ids}
    banned = whisper(tmp_path / "banned", suppress_tokens=sorted(first))
    for seed in range(4):
        found = transcribe(
            banned.model, banned.words, spectrum(banned, sound(seed, 3000)), prefix=[START], banned=sorted(first)
        )
        assert found == greedy(spectrum(banned, sound(seed, 3000)), [START], 31, suppress_tokens=sorted(first))
        assert not first & {*found}


def test_the_context_bounds_an_answer(tmp_path: Path) -> None:
    """Never more ids than the decoder has positions, the prefix included."""
    loaded = whisper(tmp_path)
    features = spectrum(loaded, sound(0, 3000))
    context = loaded.config.max_len
    found = transcribe(loaded.model, loaded.words, features, prefix=[START, PLAIN], banned=[END])
    assert len(found) == context - 2 and found == greedy(features, [START, PLAIN], context - 2, suppress_tokens=[END])


def test_prefix() -> None:
    """What the config forces, in the order of places; a language asked for goes before it."""
    forced = {"forced_decoder_ids": [[3, PLAIN], [1, None], [2, TASK]]}
    assert decoder_prefix(words(), {}, START) == [START, PLAIN]
    assert decoder_prefix(words(), forced, START) == [START, TASK, PLAIN]
    for raw in ({}, forced):
        assert decoder_prefix(words(), raw, START, "de") == [START, DE, TASK, PLAIN]
        error = error_of(decoder_prefix, words(), raw, START, "tlh")
        assert error.exit_code == 2 and "'tlh'" in str(error)
    bare = train_tokenizer([TEXT], "bpe", 280)
    assert decoder_prefix(bare, {"forced_decoder_ids": None}, START) == [START]


@pytest.mark.parametrize(
    "forced",
    [7, "ab", [7], [[1]], [[1, 2, 3]], [["1", 2]], [[1, "2"]], [[1, -2]], [[1, 10**6]], [[[1], 2]], [[1, True]]],
)
def test_forced_ids_of_a_config_are_checked(forced: object) -> None:
    error = error_of(decoder_prefix, words(), {"forced_decoder_ids": forced}, START)
    assert error.exit_code == 3 and "forced_decoder_ids" in str(error)


@pytest.mark.parametrize("value", ["abc", 7, {"a": 1}, [1.5], ["1"], [True], [[1]]])
def test_suppressed_ids_of_a_config_are_checked(value: object) -> None:
    error = error_of(named_ids, {"suppress_tokens": value}, "suppress_tokens")
    assert error.exit_code == 3 and "suppress_tokens" in str(error)


def test_ids_that_nobody_writes_are_no_matter(tmp_path: Path) -> None:
    """Published lists name ids beyond some vocabularies, and -1."""
    loaded = whisper(tmp_path)
    features = spectrum(loaded, sound(0, 3000))
    plain = transcribe(loaded.model, loaded.words, features, prefix=[START], max_tokens=4)
    odd = {"banned": [-1, 10**6, loaded.words.vocab_size], "banned_first": [-7, 51_863]}
    assert transcribe(loaded.model, loaded.words, features, prefix=[START], max_tokens=4, **odd) == plain


# --- a recording -------------------------------------------------------------------------------------------------


def pieces(loaded: Loaded, samples: Tensor, **more: Any) -> str:
    """The whole way by hand: cut, padded, each piece through transformers, the ids decoded together."""
    front = loaded.config.embeddings.audio
    assert front is not None
    length, ids = front.frames * 160, []
    for start in range(0, max(len(samples), 1), length):
        part = torch.nn.functional.pad(samples[start : start + length], (0, max(0, start + length - len(samples))))
        ids += greedy(spectrum(loaded, part), [START, TASK, PLAIN], loaded.config.max_len - 3, **more)
    return loaded.words.decode(ids).strip()


@pytest.mark.parametrize("samples", [0, 1, 3839, 3840, 3841, 9000])
def test_a_recording_is_cut_into_pieces(tmp_path: Path, samples: int) -> None:
    """24 frames here where Whisper has 3,000: 3,840 samples a piece; the last one is filled with silence."""
    loaded = whisper(tmp_path, **SUPPRESSED, **FORCED)
    assert loaded.config.embeddings.audio.frames == 24
    heard = sound(3, samples)
    found = api.transcribe(loaded, heard)
    assert found == pieces(loaded, heard, **SUPPRESSED, **FORCED) and found == found.strip()
    if samples == 9000:
        parts = [api.transcribe(loaded, part) for part in heard.split(3840)]
        assert len(parts) == 3 and all(part in found for part in parts) and len(set(parts)) > 1


def test_a_wav_file_and_its_samples_say_the_same(tmp_path: Path) -> None:
    loaded = whisper(tmp_path / "m", **SUPPRESSED, **FORCED)
    data = (sound(1, 5000) * 2**15).round().clamp(-(2**15), 2**15 - 1).short()
    head = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    body = b"data" + struct.pack("<I", 2 * len(data)) + data.numpy().tobytes()
    path = tmp_path / "speech.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(head) + len(body)) + b"WAVE" + head + body)
    found = api.transcribe(loaded, path)
    assert found and found == api.transcribe(loaded, str(path)) == api.transcribe(loaded, data.float() / 2**15)


def test_every_form_of_the_model_hears_the_same(tmp_path: Path) -> None:
    """What is suppressed and forced goes through a run folder and back."""
    loaded = whisper(tmp_path / "m", **SUPPRESSED, **FORCED)
    run = load(save(loaded, tmp_path / "run", "headway"))
    again = load(save(run, tmp_path / "again", "hf"))
    heard = sound(2, 9000)
    expected = api.transcribe(loaded, heard)
    assert expected and api.transcribe(run, heard) == api.transcribe(again, heard) == expected
    raw = read_json(tmp_path / "again" / "config.json")
    assert {name: raw[name] for name in (*SUPPRESSED, *FORCED)} == SUPPRESSED | FORCED
    assert api.transcribe(run, heard, language="de") == api.transcribe(loaded, heard, language="de")


def test_a_config_with_odd_lists_is_the_files_fault(tmp_path: Path) -> None:
    folder = whisper(tmp_path).path
    raw = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(raw | {"suppress_tokens": "all"}))
    error = error_of(api.transcribe, load(folder), sound(0, 100))
    assert error.exit_code == 3 and "suppress_tokens" in str(error)


def test_half_precision_and_training_mode(tmp_path: Path) -> None:
    loaded = whisper(tmp_path)
    loaded.model.train()
    assert isinstance(api.transcribe(load(tmp_path, dtype=torch.bfloat16), sound(0, 4000)), str)
    api.transcribe(loaded, sound(0, 100))
    assert loaded.model.training


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration", "ViTForImageClassification"])
def test_models_without_ears_are_refused(tmp_path: Path, name: str) -> None:
    loaded = load(published(tmp_path, name, None))
    for error in (
        error_of(api.transcribe, loaded, sound(0, 100)),
        error_of(api.transcribe, loaded, tmp_path / "missing.wav"),
        error_of(transcribe, loaded.model, words(), torch.zeros(10, 24), prefix=[START]),
    ):
        assert error.exit_code == 2 and "hears nothing" in str(error) and loaded.config.kind in str(error)


def test_what_is_no_recording(tmp_path: Path) -> None:
    loaded = whisper(tmp_path)
    (tmp_path / "text.wav").write_text("hello")
    for audio, code, part in (
        (tmp_path / "missing.wav", 3, "no such file"),
        (tmp_path / "text.wav", 3, "WAV"),
        (torch.zeros(2, 100), 2, "one row of samples"),
    ):
        error = error_of(api.transcribe, loaded, audio)
        assert error.exit_code == code and part in str(error)
    error = error_of(api.transcribe, loaded, sound(0, 100), language="tlh")
    assert error.exit_code == 2 and "language" in str(error)
