"""Published weights of three more kinds against transformers with the same numbers: MiniLM, DINOv2, Whisper."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from real_data import dinov2, minilm, spoken, whisper, wikitext
from torch import Tensor
from transformers import AutoTokenizer, BertModel, Dinov2Model, WhisperForConditionalGeneration

import headway
from headway import loading, saving
from headway.data.audio import log_mel, read_wav
from headway.errors import edits

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("published")]


# --- all-MiniLM-L6-v2 --------------------------------------------------------------------------------------------


def reference_embeddings(texts: list[str]) -> Tensor:
    """sentence-transformers' recipe by hand: the mean of the last states over real tokens, of length one."""
    words, model = AutoTokenizer.from_pretrained(minilm()), BertModel.from_pretrained(minilm()).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), 32):
        some = order[start : start + 32]
        # 256 as its sentence_bert_config.json says.
        batch = words([texts[i] for i in some], padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        real = batch["attention_mask"][..., None]
        vectors = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
        for i, vector in zip(some, vectors, strict=True):
            out[i] = vector
    return torch.stack(out)


def test_minilm_embeds_1000_lines_alike() -> None:
    """Within 1e-5 of unit vectors: float32, six layers."""
    lines = [line for line in wikitext("test").splitlines() if line.strip()][:1000]
    loaded = headway.load(minilm())
    assert loaded.config.head.pooling == "mean" and loaded.config.head.normalize
    found = headway.embed(loaded, lines)
    difference = (found - reference_embeddings(lines)).abs().max().item()
    print(f"{len(lines)} lines: largest difference {difference:.1e}")
    assert difference < 1e-5


def test_minilm_goes_back_as_it_came(tmp_path: Path) -> None:
    """Every tensor, those that no pooling reads included; sentence-transformers' files beside them."""
    loaded = headway.load(minilm())
    saving.save(loaded, tmp_path / "out", "hf")
    again = headway.load(tmp_path / "out")
    assert again.config == loaded.config and again.weights_sha256 == loaded.weights_sha256
    _, loading_info = BertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading_info["missing_keys"]
    assert again.config.head.max_len == 256
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()


# --- DINOv2-small from ONNX --------------------------------------------------------------------------------------


def test_dinov2_sees_alike(tmp_path: Path) -> None:
    """Features of transformers' model with the same weights, within 1e-4 of values up to about 8."""
    loaded = loading.load_container(dinov2())
    saving.save(loaded, tmp_path / "dino", "hf")
    theirs = Dinov2Model.from_pretrained(tmp_path / "dino").eval()
    pixels = torch.randn(2, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = loaded.model(pixel_values=pixels), theirs(pixel_values=pixels)
    difference = (found.hidden - expected.last_hidden_state).abs().max().item()
    print(f"features of 2 images: largest difference {difference:.1e}")
    assert difference < 1e-4
    assert torch.equal(found.logits, found.hidden[:, 0])


# --- Whisper tiny.en from CTranslate2 ----------------------------------------------------------------------------

SENTENCES = (
    "Good morning. The train to London leaves at nine o'clock.",
    "The weather will be sunny in the morning and cloudy in the afternoon.",
    "She has two brothers and a sister.",
)


@functools.cache
def listener() -> loading.Loaded:
    loaded = loading.load_container(whisper())
    loaded.model.float()
    return loaded


@functools.cache
def their_listener(folder: Path) -> WhisperForConditionalGeneration:
    saving.save(listener(), folder, "hf")
    return WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def words_of(text: str) -> list[str]:
    return re.sub(r"[^a-z' ]", "", text.lower().replace("9", "nine")).split()


def test_whisper_hears_a_synthesiser(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """espeak-ng is hard to follow: at most a third of the words may differ, as transformers' own model has it too."""
    theirs = their_listener(tmp_path_factory.getbasetemp() / "whisper")
    wrong = total = 0
    for number, sentence in enumerate(SENTENCES):
        path = spoken(sentence, tmp_path / f"{number}.wav")
        heard = headway.transcribe(listener(), path)
        features = log_mel(read_wav(path))[None]
        ids = theirs.generate(input_features=features, max_new_tokens=100, num_beams=1, do_sample=False)[0].tolist()
        assert heard == listener().words.decode(ids).strip()
        expected, found = words_of(sentence), words_of(heard)
        wrong += edits("".join(map(chr, map(hash_word, expected))), "".join(map(chr, map(hash_word, found))))
        total += len(expected)
        print(f"said {sentence!r}, heard {heard!r}")
    print(f"{wrong} of {total} words wrong")
    assert wrong <= total / 3


def hash_word(word: str) -> int:
    """One character per word, so that the distance of texts counts words."""
    return 0x4E00 + sum(ord(letter) * 31**i for i, letter in enumerate(word)) % 20000


def test_whisper_logits(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Encoder states and decoder logits, within 1e-5 of the largest."""
    theirs = their_listener(tmp_path_factory.getbasetemp() / "whisper")
    features = log_mel(read_wav(spoken(SENTENCES[0], tmp_path / "a.wav")))[None]
    ids = torch.tensor([[50257, 50362, *listener().words.encode(" Good morning. The train to London")]])
    with torch.no_grad():
        found = listener().model(input_features=features, decoder_input_ids=ids)
        expected = theirs(input_features=features, decoder_input_ids=ids)
    for one, other in ((found.encoder_hidden, expected.encoder_last_hidden_state), (found.logits, expected.logits)):
        difference = ((one - other).abs().max() / other.abs().max()).item()
        print(f"relative difference {difference:.1e}")
        assert difference < 1e-5
