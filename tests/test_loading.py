"""What `load` makes of a path: three forms by content, dtypes, tokenizers, pooling beside a model, one-line errors.

The published models are tiny random ones of `transformers`, with tokenizers trained here. Other test files take them
from here.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent / "families"))  # where the reference models are described
import reference
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize as gguf_dequantize

import headway
from headway import loading, saving
from headway.checkpoints.tensors import read_tensors, write_tensors
from headway.config import PooledEmbedding
from headway.errors import HeadwayError
from headway.loading import Loaded, form_of, load, pooling_beside
from headway.nn.packed import PackedEmbedding, PackedLinear, exact
from headway.text import Tokenizer, formats, train_tokenizer
from headway.text.formats import template

logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()

TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps in the sun until the evening comes. " * 20
ROWS = 320  # of the embedding; the tokenizers have fewer ids, as those of published models do
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
REFERENCES = {row.id: row for row in reference.rows()}


@functools.cache
def tokenizer(kind: str = "bpe") -> Tokenizer:
    """`bpe` with a chat template, or `wordpiece` with BERT's tokens around a text."""
    if kind == "bpe":
        made = train_tokenizer([TEXT], "bpe", 300, special_tokens=("<|endoftext|>", "<|user|>"))
        return Tokenizer(json.loads(made.to_json()), config={"chat_template": CHATML})
    tree = json.loads(train_tokenizer([TEXT], "wordpiece", 200, special_tokens=SPECIAL).to_json())
    ids = {name: number for number, name in enumerate(SPECIAL)}
    return Tokenizer(tree | {"post_processor": template(["[CLS]"], ["[SEP]"], ["[SEP]"], ids)})


def theirs(name: str, **keys: Any) -> Any:
    """The tiny random model of a row of the parity table."""
    return _built(name, json.dumps(keys))


@functools.cache
def _built(name: str, keys: str) -> Any:
    row = REFERENCES[name]
    wanted = reference.config_keys(row)
    sizes: dict[str, Any] = {"vocab_size": ROWS} if "vocab_size" in wanted else {}
    return reference.build_with(row, wanted | sizes | json.loads(keys))


def published(place: Path, name: str, words: str | None = "bpe", **keys: Any) -> Path:
    """Its Hugging Face folder as transformers writes it, with a tokenizer."""
    theirs(name, **keys).save_pretrained(place)
    if words:
        tokenizer(words).save(place)
    return place


def inputs(loaded: Loaded) -> dict[str, Tensor]:
    """Inputs that both sides take under the same names."""
    shape, config = loaded.config.embeddings, loaded.config
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 60, (2, 9), generator=generator)
    ids[:, -1] = 60  # where CLIP's text tower pools
    out = {"input_ids": ids}
    if shape.patch is not None:
        size = (2, shape.patch.channels, shape.patch.image, shape.patch.image)
        out = {"pixel_values": torch.randn(size, generator=generator)}
    elif shape.audio is not None:
        out = {"input_features": torch.randn((2, shape.audio.bins, shape.audio.frames), generator=generator)}
    return out | ({"decoder_input_ids": ids} if config.kind == "encoder-decoder" else {})


def logits(loaded: Loaded) -> Tensor:
    with torch.no_grad():
        found: Tensor = loaded.model(**inputs(loaded)).logits
    return found


def error_of(action: Any, *arguments: Any, **options: Any) -> HeadwayError:
    """The one-line error that a call ends in."""
    with pytest.raises(HeadwayError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value) and caught.value.exit_code != 70
    return caught.value


# --- forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LlamaForCausalLM-tied"])
def test_three_forms_of_one_model(tmp_path: Path, name: str) -> None:
    """Known by what they hold, whatever they are called; the same hash, logits and tokens in each."""
    folder = published(tmp_path / "weights.gguf", name)
    hf = load(folder)
    run = load(saving.save(hf, tmp_path / "config.json", "headway"))
    packed = load(saving.save(hf, tmp_path / "run", "gguf"))
    forms = [hf, run, packed]
    assert [one.form for one in forms] == [form_of(one) for one in (folder, tmp_path / "config.json", tmp_path / "run")]
    assert [one.form for one in forms] == ["hf", "run", "gguf"]
    with torch.no_grad():
        expected = theirs(name)(**inputs(hf)).logits
    assert (logits(hf) - expected).abs().max() < 1e-5 * expected.abs().max()
    for one in forms[1:]:
        assert torch.equal(logits(one), logits(hf))
        assert one.words.encode(TEXT) == tokenizer().encode(TEXT)
        assert one.words.chat_template == CHATML
        assert (one.family, one.architecture) == ("llama", "LlamaForCausalLM")
    assert len({one.weights_sha256 for one in forms}) == 1
    weights = {key: value.clone() for key, value in hf.model.state_dict().items()}
    weights["decoder.norm.weight"][0] += 1
    hf.model.load_state_dict(weights)
    assert Loaded(hf.model, None, hf.config, folder).weights_sha256 != run.weights_sha256
    assert not hf.model.training and not any(p.requires_grad for p in hf.model.parameters())


def test_the_hash_of_a_run_is_that_of_what_was_loaded(tmp_path: Path) -> None:
    hf = load(published(tmp_path / "hf", "LlamaForCausalLM"))
    saving.save(hf, tmp_path / "run", "headway")
    cast = load(tmp_path / "run", dtype=torch.bfloat16)
    assert cast.weights_sha256 == load(tmp_path / "hf", dtype=torch.bfloat16).weights_sha256 != hf.weights_sha256
    assert load(tmp_path / "run", dtype=torch.float32).weights_sha256 == hf.weights_sha256


def test_a_run_folder_with_the_config_of_something_else_is_a_run(tmp_path: Path) -> None:
    """A checkpoint's own manifest, or config.yaml, goes before a config.json."""
    hf = load(published(tmp_path / "hf", "LlamaForCausalLM"))
    run = saving.save(hf, tmp_path / "run", "headway")
    (run / "config.json").write_text("{}")
    assert form_of(run) == "hf"
    (run / "config.yaml").write_text("")
    assert form_of(run) == "run"
    checkpoint = next((run / "checkpoints").glob("step-*"))
    (checkpoint / "config.json").write_text("{}")
    assert form_of(checkpoint) == "run" and torch.equal(logits(load(checkpoint)), logits(hf))


def test_a_family_that_no_table_names_survives_a_run_folder(tmp_path: Path) -> None:
    """Keys of config.json that our config has no field for, such as Whisper's suppressed tokens, go along."""
    keys = {"suppress_tokens": [5, 6], "begin_suppress_tokens": [7]}
    hf = load(published(tmp_path / "hf", "WhisperForConditionalGeneration", **keys))
    run = load(saving.save(hf, tmp_path / "run", "headway"))
    assert run.raw["suppress_tokens"] == [5, 6] and run.raw == hf.raw


# --- what is no model --------------------------------------------------------------------------------------------


@pytest.mark.fault("C1", "K15")
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("modle", ["no such file", "did you mean 'model'"]),
        ("empty", ["not the folder of a run or of a model", "config.json and model.safetensors"]),
        ("run", ["no checkpoint in it"]),
        ("text", ["a file that is no GGUF", "headway convert"]),
        ("nothing.gguf", ["a file that is no GGUF"]),
        ("cut.gguf", ["cut.gguf", "at least 24 bytes"]),
        ("fifo", ["a fifo", "a regular file"]),
        ("only-config", ["model.safetensors", "no such file"]),
        ("broken-config", ["config.json"]),
        ("../" * 30 + "dev/zero", ["a device"]),
        ("loop", ["cannot be read"]),
        ("x" * 300, ["cannot be read"]),
        ("nul\0", ["null"]),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_what_is_no_model_is_one_line(tmp_path: Path, name: str, parts: list[str]) -> None:
    for folder in ("empty", "model", "run", "only-config", "broken-config"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "only-config" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "broken-config" / "config.json").write_text("[1]")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "nothing.gguf").write_bytes(b"")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    error = error_of(load, tmp_path / name)
    assert error.exit_code == 3 and all(part in str(error) for part in parts), str(error)


@pytest.mark.parametrize(("name", "code"), [("nowhere", 2), ("", 2), ("cuda:99", 4), ("meta", 4)])
def test_a_device_that_is_not_there(tmp_path: Path, name: str, code: int) -> None:
    folder = published(tmp_path / "hf", "LlamaForCausalLM")
    error = error_of(load, folder, device=name)
    assert error.exit_code == code and name in str(error) and "cpu" in str(error)


def test_names_of_dtypes() -> None:
    assert loading.dtype_of("stored") is None and loading.dtype_of("float16") is torch.float16
    assert loading.dtype_of(torch.bfloat16) is torch.bfloat16 and loading.dtype_of(None) is None
    assert error_of(loading.dtype_of, "int8").exit_code == 2
    assert error_of(load, "anywhere", dtype="int8").exit_code == 2


# --- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("K7")
@pytest.mark.parametrize("form", ["hf", "headway", "gguf"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_weights_stay_as_stored_unless_a_dtype_is_asked_for(tmp_path: Path, form: str, stored: str) -> None:
    original = load(published(tmp_path / "in", "LlamaForCausalLM-tied"))
    path = saving.save(original, tmp_path / "out", form, dtype=stored)
    dtype = loading.dtype_of(stored)
    matrix, norm = "decoder.blocks.1.attention.qkv.weight", "decoder.norm.weight"
    kept, cast = load(path).model.state_dict(), load(path, dtype="bfloat16").model.state_dict()
    wanted = original.model.state_dict()
    assert torch.equal(kept[matrix], wanted[matrix].to(dtype)) and kept[matrix].dtype is dtype
    assert kept[norm].dtype is (torch.float32 if form == "gguf" else dtype)  # in GGUF files vectors are F32
    assert {tensor.dtype for tensor in cast.values()} == {torch.bfloat16}
    assert torch.equal(cast[matrix], wanted[matrix].to(dtype).bfloat16())


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_blocks_stay_blocks_unless_a_dtype_is_asked_for(tmp_path: Path, kind: str) -> None:
    """Against what the `gguf` package reads out of the same file."""
    original = load(published(tmp_path / "in", "LlamaForCausalLM-tied"))
    path = saving.save(original, tmp_path / "out.gguf", "gguf", dtype=kind)
    packed, plain = load(path), load(path, dtype=torch.float32)
    leaves = {
        name: one for name, one in packed.model.named_modules() if isinstance(one, PackedLinear | PackedEmbedding)
    }
    assert {"embeddings.tokens", "head.output", "decoder.blocks.0.attention.qkv"} <= set(leaves)
    assert not any(isinstance(one, PackedLinear | PackedEmbedding) for one in plain.model.modules())
    assert plain.model.head.output.weight is plain.model.embeddings.tokens.weight
    with exact():
        assert torch.equal(logits(packed), logits(plain))
    (table,) = (tensor for tensor in GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    expected = torch.from_numpy(gguf_dequantize(table.data, table.tensor_type))
    assert torch.equal(plain.model.embeddings.tokens.weight, expected)
    assert torch.equal(leaves["head.output"].packed.unpack(), expected)


@pytest.mark.fault("K11")
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_nonfinite_weights(tmp_path: Path, form: str) -> None:
    folder = published(tmp_path / "in", "LlamaForCausalLM")
    weights = read_tensors(folder / "model.safetensors", copy=True)
    weights["model.norm.weight"][3:5] = float("nan")
    (folder / "model.safetensors").write_bytes(b"".join(map(bytes, write_tensors(weights, {"format": "pt"}))))
    path = folder
    if form == "gguf":  # written by hand: no writer of ours puts NaN into one
        path = saving.save(load(published(tmp_path / "good", "LlamaForCausalLM")), tmp_path / "out.gguf", "gguf")
        (norm,) = (tensor for tensor in GGUFReader(path).tensors if tensor.name == "output_norm.weight")
        data = bytearray(path.read_bytes())
        data[norm.data_offset + 12 : norm.data_offset + 20] = b"\xff" * 8
        path.write_bytes(data)
    error = error_of(load, path)
    assert error.exit_code == 3 and "norm.weight" in str(error) and "2 values" in str(error)
    assert "--allow-nonfinite" in str(error)
    assert load(path, allow_nonfinite=True).model.decoder.norm.weight.isnan().sum() == 2


# --- tokenizers --------------------------------------------------------------------------------------------------


@pytest.mark.fault("T6")
def test_more_token_ids_than_rows_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = tokenizer().vocab_size
    folder = published(tmp_path / "hf", "LlamaForCausalLM", vocab_size=size - 1)
    text = str(error_of(load, folder))
    assert f"{size} token ids" in text and f"at most the {size - 1} embedding rows" in text and "config.json" in text
    monkeypatch.setattr(loading, "check_rows", lambda *_: None)  # without the guard such an id reaches the embedding
    with pytest.raises(IndexError):
        load(folder).model(torch.tensor([[size - 1]]))


@pytest.mark.fault("Q7")
def test_tokens_and_rows_of_a_gguf_file_agree(tmp_path: Path) -> None:
    path = saving.save(load(published(tmp_path / "in", "LlamaForCausalLM")), tmp_path / "m.gguf", "gguf")
    assert load(path).words.vocab_size == ROWS  # the file has a token for each row
    data = path.read_bytes()
    key = b"tokenizer.ggml.eos_token_id"
    place = data.index(key) + len(key) + 4
    path.write_bytes(data[:place] + (ROWS).to_bytes(4, "little") + data[place + 4 :])
    error = error_of(load, path)
    assert error.exit_code == 3 and str(error).count(str(ROWS)) >= 3


def test_models_without_words(tmp_path: Path) -> None:
    """A vision model has no tokenizer, and takes none that lies beside it; other models may lack theirs."""
    vision = load(published(tmp_path / "vit", "ViTForImageClassification", words="bpe"))
    silent = load(published(tmp_path / "llama", "LlamaForCausalLM", words=None))
    for one in (vision, silent):
        assert one.tokenizer is None
        assert "no tokenizer" in str(error_of(lambda one=one: one.words))
    assert logits(vision).shape == (2, vision.config.head.labels)
    error = error_of(saving.save, silent, tmp_path / "m.gguf", "gguf")
    assert error.exit_code == 3 and "no tokenizer" in str(error) and not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("name", loading._TOKENIZERS)
def test_every_form_of_tokenizer_is_looked_for(tmp_path: Path, name: str) -> None:
    """A damaged one is an error of the folder, not a model without words. The list is that of `text.formats`."""
    folder = published(tmp_path / "hf", "LlamaForCausalLM", words=None)
    (folder / name).write_bytes(b"\xff")
    error = error_of(load, folder)
    assert error.exit_code == 3 and str(folder) in str(error)
    assert set(loading._TOKENIZERS) == set(formats._FORMS)


# --- sentence-transformers ---------------------------------------------------------------------------------------

MODES = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


def sentence_transformer(place: Path, on: list[str], normalize: bool, name: str = "BertModel") -> Path:
    """A folder as sentence-transformers writes it."""
    published(place, name, "wordpiece")
    (place / "1_Pooling").mkdir()
    known = [*MODES.values(), "pooling_mode_max_tokens", "pooling_mode_weightedmean_tokens"]
    said = {"word_embedding_dimension": 32, "include_prompt": True} | {mode: mode in on for mode in known}
    (place / "1_Pooling" / "config.json").write_text(json.dumps(said))
    steps = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": "", "type": f"sentence_transformers.models.{step}"}
        for i, step in enumerate(steps)
    ]
    (place / "modules.json").write_text(json.dumps(modules))
    return place


def pooled(states_TD: Tensor, how: str, normalize: bool) -> Tensor:
    """One text's vector by hand."""
    vector = {"mean": states_TD.mean(0), "first": states_TD[0], "last": states_TD[-1]}[how]
    return vector / vector.norm() if normalize else vector


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("how", MODES)
def test_pooling_beside_a_bare_encoder(tmp_path: Path, how: str, normalize: bool) -> None:
    """Against transformers' states pooled by hand, in a padded batch; BERT's own pooler is kept and written back."""
    folder = sentence_transformer(tmp_path / "st", [MODES[how]], normalize)
    loaded = load(folder)
    assert loaded.config.head == PooledEmbedding(pooling=how, normalize=normalize)
    assert sorted(loaded.unread) == ["pooler.dense.bias", "pooler.dense.weight"]
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(2))
    real = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        found = loaded.model(ids, attention_mask=real).logits
        states = [theirs("BertModel")(ids[b : b + 1, : int(real[b].sum())]).last_hidden_state[0] for b in range(2)]
    for one, other in zip(found, states, strict=True):
        assert (one - pooled(other, how, normalize)).abs().max() < 2e-5
    again = load(saving.save(loaded, tmp_path / "out", "hf"))
    assert again.config == loaded.config and torch.equal(logits(again), logits(loaded))
    before, after = (read_tensors(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_without_pooling_beside_it_a_bert_has_its_own_pooler(tmp_path: Path) -> None:
    loaded = load(published(tmp_path / "hf", "BertModel", "wordpiece"))
    assert loaded.config.head.transform == "tanh" and not loaded.unread
    with torch.no_grad():
        expected = theirs("BertModel")(**inputs(loaded)).pooler_output
    assert (logits(loaded) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "on",
    [[], list(MODES.values())[:2], ["pooling_mode_max_tokens"], ["pooling_mode_weightedmean_tokens"]],
    ids=["none", "two", "max", "weighted"],
)
def test_pooling_that_is_not_known_is_refused(tmp_path: Path, on: list[str]) -> None:
    folder = sentence_transformer(tmp_path / "st", on, True)
    error = error_of(load, folder)
    assert error.exit_code == 3 and "1_Pooling" in str(error) and "pooling_mode_lasttoken" in str(error)
    assert all(mode in str(error) for mode in on)


@pytest.mark.parametrize("text", ["", "[1]", '{"pooling_mode_mean_tokens": 1}', '{"pooling_mode_mean_tokens": NaN}'])
def test_a_broken_pooling_config(tmp_path: Path, text: str) -> None:
    folder = sentence_transformer(tmp_path / "st", [], True)
    (folder / "1_Pooling" / "config.json").write_text(text)
    assert error_of(load, folder).exit_code == 3


@pytest.mark.parametrize("text", ["{}", "[1, null]", '[{"type": 3}, {}]'])
def test_odd_modules_normalize_nothing(tmp_path: Path, text: str) -> None:
    folder = sentence_transformer(tmp_path / "st", [MODES["mean"]], True)
    (folder / "modules.json").write_text(text)
    assert pooling_beside(folder) == PooledEmbedding(pooling="mean", normalize=False)
    (folder / "modules.json").write_text("{")
    assert "modules.json" in str(error_of(load, folder))


def test_pooling_beside_another_head_changes_nothing_and_is_said(tmp_path: Path) -> None:
    """A decoder pooled by files beside it (Qwen3-Embedding) stays a decoder; a silent mean would be a wrong answer."""
    folder = sentence_transformer(tmp_path / "st", [MODES["last"]], True, "LlamaForCausalLM")
    loaded = load(folder)
    assert loaded.config.head.type == "causal-lm"
    assert any("1_Pooling" in line and "last" in line for line in loaded.notes)


def test_api_load_takes_the_same_options(tmp_path: Path) -> None:
    folder = published(tmp_path / "hf", "LlamaForCausalLM")
    assert headway.load(str(folder), dtype=torch.float16).model.decoder.norm.weight.dtype is torch.float16
    with pytest.raises(TypeError):
        headway.load(folder, dtpye=torch.float16)
