"""A model in another form is the same model: config, weights to the bit, logits, words; and nothing is half written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from fault_injection import count_primitives, failing, hooked
from test_loading import (
    CHATML,
    MODES,
    ROWS,
    TEXT,
    error_of,
    inputs,
    logits,
    published,
    sentence_transformer,
    theirs,
    tokenizer,
)
from torch import Tensor

from headway import saving
from headway.checkpoints.folder import list_checkpoints, save_checkpoint
from headway.checkpoints.tensors import read_header
from headway.config import ModelConfig
from headway.errors import ConfigError, MachineError
from headway.families import families
from headway.families._translate import differences
from headway.loading import Loaded, load
from headway.nn import Transformer
from headway.nn.packed import PackedLinear, exact
from headway.saving import plain_weights, save

# One of each kind: its class in transformers, and the tokenizer beside it.
KINDS: dict[str, str | None] = {
    "LlamaForCausalLM": "bpe",
    "LlamaForCausalLM-tied": "bpe",
    "Qwen2ForCausalLM": "bpe",
    "BertForMaskedLM": "wordpiece",
    "BertModel": "wordpiece",
    "BertForSequenceClassification": "wordpiece",
    "T5ForConditionalGeneration": "bpe",
    "WhisperForConditionalGeneration": "bpe",
    "ViTForImageClassification": None,
    "CLIPTextModelWithProjection": "bpe",
}
EVERY = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the primitive stays and can fail; the disk need not turn


def original(place: Path, name: str, **keys: Any) -> Loaded:
    return load(published(place, name, KINDS.get(name, "bpe"), **keys))


def assert_same_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype is other[name].dtype and torch.equal(one[name], other[name]), name


def assert_same_words(one: Loaded, other: Loaded) -> None:
    if other.tokenizer is None:
        assert one.tokenizer is None
        return
    for text in (TEXT, "Unknown Ünïcode, 日本 [SEP] <|user|>  two  spaces"):
        assert one.words.encode_input(text) == other.words.encode_input(text)
    assert one.words.chat_template == other.words.chat_template


def assert_same(one: Loaded, other: Loaded) -> None:
    """Config, weights, answers, words."""
    assert one.config == other.config
    assert_same_weights(one.model.state_dict(), other.model.state_dict())
    assert torch.equal(logits(one), logits(other))
    assert (one.family, one.architecture) == (other.family, other.architecture)
    assert_same_words(one, other)


# --- every kind --------------------------------------------------------------------------------------------------


@EVERY
def test_as_a_run_folder_and_back(tmp_path: Path, name: str) -> None:
    """HF -> run -> HF: the same model each time, and in the end the very files of HF -> HF."""
    first = original(tmp_path / "in", name)
    run = load(save(first, tmp_path / "run", "headway"))
    assert run.form == "run" and run.step == 0
    assert_same(run, first)
    assert (
        run.weights_sha256 == first.weights_sha256 and run.model.state_dict().keys() == first.model.state_dict().keys()
    )
    again = load(save(run, tmp_path / "again", "hf"))
    assert_same(again, first)
    save(first, tmp_path / "direct", "hf")
    for file in ("config.json", "model.safetensors", *(["tokenizer.json"] if first.tokenizer else [])):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "direct" / file).read_bytes(), file


@EVERY
def test_as_a_folder_that_transformers_loads(tmp_path: Path, name: str) -> None:
    """No key missing or unexpected there, the same answers as before to the last bit, the same token ids."""
    first = original(tmp_path / "in", name)
    target = save(first, tmp_path / "out", "hf")
    assert_same(load(target), first)
    before = theirs(name)
    again, said = type(before).from_pretrained(target, attn_implementation="eager", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    expected, found = before.state_dict(), again.state_dict()
    assert_same_weights(found, {key: expected[key] for key in found})
    with torch.no_grad():
        one, other = before(**inputs(first)), again.eval()(**inputs(first))
    assert all(torch.equal(one[key], other[key]) for key in one if isinstance(one[key], Tensor))
    if first.tokenizer is not None:
        words = transformers.AutoTokenizer.from_pretrained(target)
        assert words(TEXT)["input_ids"] == first.words.encode_input(TEXT)
        assert words.chat_template == first.words.chat_template


PACKABLE = ["LlamaForCausalLM", "LlamaForCausalLM-tied", "Qwen2ForCausalLM"]


@pytest.mark.parametrize("name", PACKABLE)
def test_as_a_gguf_file_and_back(tmp_path: Path, name: str) -> None:
    """F32 holds all; what a config says of training alone is lost."""
    first = original(tmp_path / "in", name)
    second = load(save(first, tmp_path / "model.gguf", "gguf"))
    assert_same_weights(second.model.state_dict(), first.model.state_dict())
    assert torch.equal(logits(second), logits(first))
    lost = [line.split(" ")[0] for line in differences(second.config, first.config)]
    assert all(line.startswith("tokens.") for line in lost), lost
    assert second.words.encode(TEXT) == first.words.encode(TEXT) and second.words.chat_template == CHATML
    third = load(save(second, tmp_path / "again", "hf"))
    assert_same_weights(third.model.state_dict(), first.model.state_dict())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("how", MODES)
def test_an_embedding_model_in_every_form(tmp_path: Path, how: str, normalize: bool) -> None:
    first = load(sentence_transformer(tmp_path / "in", [MODES[how]], normalize))
    for form in ("hf", "headway", "gguf"):
        again = load(save(first, tmp_path / f"out-{form}", form))
        expected = logits(first)
        if form == "gguf" and not normalize:  # llama.cpp always normalizes
            expected = torch.nn.functional.normalize(expected, dim=-1)
        assert torch.equal(logits(again), expected), form
        assert_same_words(again, first)
    modules = json.loads((tmp_path / "out-hf" / "modules.json").read_text())
    steps = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    assert [step["type"] for step in modules] == [f"sentence_transformers.models.{step}" for step in steps]
    assert [step["idx"] for step in modules] == list(range(len(steps))) and modules[1]["path"] == "1_Pooling"
    said = json.loads((tmp_path / "out-hf" / "1_Pooling" / "config.json").read_text())
    assert said == {"word_embedding_dimension": 32} | {mode: mode == MODES[how] for mode in MODES.values()}


def test_a_head_that_pools_otherwise_gets_no_files_that_say_so(tmp_path: Path) -> None:
    """BERT's own pooler and CLIP's projection are in the weights; modules.json would take them away."""
    for name in ("BertModel", "CLIPTextModelWithProjection"):
        save(original(tmp_path / f"{name}-in", name), tmp_path / name, "hf")
        assert not (tmp_path / name / "modules.json").exists() and not (tmp_path / name / "1_Pooling").exists()


# --- what cannot be said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("T5ForConditionalGeneration", "no architecture for t5"),
        ("WhisperForConditionalGeneration", "no architecture for whisper"),
        ("ViTForImageClassification", "no architecture for vit"),
        ("CLIPTextModelWithProjection", "no architecture for clip_text_model"),
        ("BertForMaskedLM", "head.type (masked-lm against pooled-embedding)"),
        ("BertForSequenceClassification", "head.type (sequence-classification against"),
        ("BertModel", "no place for head.pool.dense.weight"),
        ("LlamaForCausalLM-rope-dynamic", "positions.scaling"),
    ],
)
def test_what_gguf_has_no_words_for_names_the_field(tmp_path: Path, name: str, part: str) -> None:
    error = error_of(save, original(tmp_path / "in", name), tmp_path / "out.gguf", "gguf")
    assert error.exit_code == 2 and part in str(error), str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_model_of_ours_is_exported_where_a_family_can_express_it(tmp_path: Path) -> None:
    """By the table alone: what has Llama's parts becomes a Llama, what nobody has is refused by the field's name."""
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": ROWS, "max_len": 24}
    llama = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope", "embeddings": {"tied": True}}
    made = ours(ModelConfig(**sizes, **llama))
    assert saving.family_for(made)[0].model_type == "llama"
    again = load(save(made, tmp_path / "hf", "hf"))
    assert again.family == "llama" and not differences(again.config, made.config)
    assert torch.equal(logits(again), logits(made)) and again.words.hash == tokenizer().hash
    said = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)[1]
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert torch.equal(logits(load(save(made, tmp_path / "m.gguf", "gguf"))), logits(made))

    odd = ours(ModelConfig(**sizes, **llama | {"attention": {"softcap": 30.0}}))
    for form in ("hf", "gguf"):
        error = error_of(save, odd, tmp_path / "odd", form)
        assert error.exit_code == 2 and "attention.softcap" in str(error) and not (tmp_path / "odd").exists()
    assert_same_weights(load(save(odd, tmp_path / "odd", "headway")).model.state_dict(), odd.model.state_dict())


def ours(config: ModelConfig) -> Loaded:
    """A random model without a family, as training leaves it."""
    return Loaded(Transformer(config).eval().requires_grad_(False), tokenizer(), config, Path("nowhere"))


def test_the_family_asked_for_is_the_one_written(tmp_path: Path) -> None:
    first = original(tmp_path / "in", "LlamaForCausalLM")
    again = load(save(first, tmp_path / "out", "hf", family="mistral"))
    assert again.family == "mistral" and torch.equal(logits(again), logits(first))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["model_type"] == "mistral" and raw["architectures"] == ["MistralForCausalLM"]
    error = error_of(save, first, tmp_path / "no", "hf", family="qwen2")
    assert error.exit_code == 2 and "attention.bias" in str(error) and not (tmp_path / "no").exists()
    for family, part in (("bert", "no decoder with head causal-lm"), ("lama", "'lama'")):
        error = error_of(save, first, tmp_path / "no", "hf", family=family)
        assert error.exit_code == 2 and part in str(error) and not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertModel", "ViTForImageClassification"])
def test_every_family_either_expresses_a_model_or_says_why_not(tmp_path: Path, name: str) -> None:
    loaded = original(tmp_path / name, name)
    known = [f for f in families().values() if f.fixed["kind"] == loaded.config.kind]
    for family in (family.model_type for family in known):
        try:
            assert saving.family_for(loaded, family)[0].model_type == family
        except ConfigError as error:
            assert error.where == "--family" and family in error.found, str(error)


@pytest.mark.parametrize(
    ("form", "dtype", "part"),
    [
        ("onnx", None, "hf, gguf, headway"),
        ("hf", "q8_0", "for --to hf"),
        ("headway", "int8", "for --to headway"),
        ("gguf", "q5_k", "q4_0"),
        ("gguf", "", "q4_0"),
        ("hf", "", "float32"),
    ],
)
def test_wrong_words_are_usage(tmp_path: Path, form: str, dtype: str | None, part: str) -> None:
    error = error_of(save, original(tmp_path / "in", "LlamaForCausalLM"), tmp_path / "out", form, dtype=dtype)
    assert error.exit_code == 2 and part in str(error) and not (tmp_path / "out").exists()


def test_a_family_in_a_manifest_that_nobody_knows_is_none(tmp_path: Path) -> None:
    """The manifest's hash says that nothing changed, not that we wrote it."""
    first = original(tmp_path / "in", "LlamaForCausalLM")
    for meta in ({"family": "evil"}, {"family": "llama", "architecture": "Evil"}, {"family": [1], "raw": 3}):
        run = save(first, tmp_path / "run", "headway", overwrite=True)
        weights = {"model.safetensors": first.model.state_dict()}
        save_checkpoint(run, 1, weights, {"architecture": "LlamaForCausalLM", **meta}, moved=False)
        found = load(run)
        assert (found.step, found.family, found.architecture, found.raw) == (1, "", "", {})
        assert load(save(found, tmp_path / "out", "hf", overwrite=True)).family == "llama"


# --- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("K17")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("form", ["hf", "headway"])
def test_casts(tmp_path: Path, form: str, dtype: str) -> None:
    """Every tensor is torch's cast of the original's; the table that is tied is stored once (K17)."""
    first = original(tmp_path / "in", "LlamaForCausalLM-tied")
    again = load(save(first, tmp_path / "out", form, dtype=dtype))
    wanted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in first.model.state_dict().items()}
    assert_same_weights(again.model.state_dict(), wanted)
    assert not again.notes and again.model.head.output.weight is again.model.embeddings.tokens.weight
    (file,) = (tmp_path / "out").rglob("model.safetensors")
    tables = [entry for entry in read_header(file)[1].values() if entry.shape == (ROWS, 32)]
    assert len(tables) == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0", "q4_0", "q4_1"])
def test_gguf_dtypes(tmp_path: Path, dtype: str) -> None:
    """Each matrix holds the bytes that the `gguf` package makes of it, vectors stay F32."""
    first = original(tmp_path / "in", "Qwen2ForCausalLM")
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(dtype, dtype.upper())
    path = save(first, tmp_path / "out.gguf", "gguf", dtype=dtype)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = first.model.state_dict()
    pairs = {"token_embd": "embeddings.tokens", "blk.1.attn_output": "decoder.blocks.1.attention.output"}
    for theirs_, own in pairs.items():
        tensor = tensors[f"{theirs_}.weight"]
        assert tensor.tensor_type.name == kind
        expected = gguf.quants.quantize(weights[f"{own}.weight"].numpy(), tensor.tensor_type)
        assert tensor.data.tobytes() == expected.tobytes()
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.attn_q.bias"].tensor_type.name == "F32"
    # Rows of 48 weights are no multiple of 32: such a matrix stays F32.
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == (kind if dtype in saving.DTYPES else "F32")
    assert_same_words(load(path), first)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_by_default_a_gguf_file_keeps_the_dtype(tmp_path: Path, dtype: str) -> None:
    half = load(save(original(tmp_path / "in", "LlamaForCausalLM"), tmp_path / "half", "hf", dtype=dtype))
    again = load(save(half, tmp_path / "out.gguf", "gguf"))
    name = "embeddings.tokens.weight"
    assert torch.equal(again.model.state_dict()[name], half.model.state_dict()[name])


def test_a_dtype_that_a_gguf_file_has_not(tmp_path: Path) -> None:
    double = original(tmp_path / "in", "LlamaForCausalLM")
    double.model.double()
    error = error_of(save, double, tmp_path / "out.gguf", "gguf")
    assert error.exit_code == 2 and "float64" in str(error)


@pytest.mark.parametrize("form", ["hf", "headway", "gguf"])
def test_a_packed_model_is_written_as_its_dequantized_weights(tmp_path: Path, form: str) -> None:
    first = original(tmp_path / "in", "LlamaForCausalLM-tied")
    path = save(first, tmp_path / "packed.gguf", "gguf", dtype="q4_0")
    packed, plain = load(path), load(path, dtype=torch.float32)
    weights = plain_weights(packed)
    assert_same_weights(weights, plain.model.state_dict())
    assert weights["head.output.weight"].data_ptr() == weights["embeddings.tokens.weight"].data_ptr()
    again = load(save(packed, tmp_path / "out", form))
    assert_same_weights(plain_weights(again), plain.model.state_dict())
    # A run folder and a GGUF file keep the codes, a published folder has no form for them.
    assert any(isinstance(m, PackedLinear) for m in again.model.modules()) == (form != "hf")
    if form == "gguf":
        files = [gguf.GGUFReader(place) for place in (path, tmp_path / "out")]
        one, other = ({t.name: (t.tensor_type, t.data.tobytes()) for t in file.tensors} for file in files)
        assert one == other
    with exact():
        assert torch.equal(logits(again), logits(packed)) and not torch.equal(logits(again), logits(first))


# --- what goes along ---------------------------------------------------------------------------------------------


def test_generation_config(tmp_path: Path) -> None:
    """Of a run it says the ids; of a published folder it is the one that came with it, as is the preprocessor's."""
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": ROWS, "max_len": 24}
    llama = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope"}
    for ends, said in (((), 4), ((5, 6), [4, 5, 6])):
        made = ours(ModelConfig(**sizes, **llama, tokens={"bos": 3, "eos": 4, "ends": ends}))
        target = save(made, tmp_path / str(len(ends)), "hf")
        assert json.loads((target / "generation_config.json").read_text()) == {"bos_token_id": 3, "eos_token_id": said}
        theirs_ = transformers.GenerationConfig.from_pretrained(target)
        assert theirs_.eos_token_id == said and theirs_.bos_token_id == 3
    folder = published(tmp_path / "in", "LlamaForCausalLM")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6, "do_sample": true}')
    (folder / "preprocessor_config.json").write_text('{"size": 3}')
    target = save(load(folder), tmp_path / "out", "hf")
    for name in ("generation_config.json", "preprocessor_config.json"):
        assert (target / name).read_bytes() == (folder / name).read_bytes()
    vision = save(original(tmp_path / "vit", "ViTForImageClassification"), tmp_path / "vit-out", "hf")
    assert not (vision / "generation_config.json").exists()


def test_what_whisper_never_writes_goes_along(tmp_path: Path) -> None:
    keys = {"suppress_tokens": [5, 6], "begin_suppress_tokens": [7]}
    first = original(tmp_path / "in", "WhisperForConditionalGeneration", **keys)
    run = load(save(first, tmp_path / "run", "headway"))
    target = save(run, tmp_path / "out", "hf")
    model = transformers.WhisperForConditionalGeneration.from_pretrained(target)
    for name, ids in keys.items():
        assert getattr(model.generation_config, name) == ids and load(target).raw[name] == ids
    assert model.generation_config.decoder_start_token_id == first.config.tokens.decoder_start


def test_labels_keep_their_names(tmp_path: Path) -> None:
    names = {"0": "bad", "1": "fair", "2": "good"}
    keys = {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    first = original(tmp_path / "in", "BertForSequenceClassification", **keys)
    run = load(save(first, tmp_path / "run", "headway"))
    for loaded, place in ((first, "out"), (run, "run-out")):
        raw = json.loads((save(loaded, tmp_path / place, "hf") / "config.json").read_text())
        assert raw["id2label"] == names and raw["label2id"] == keys["label2id"]


def test_the_chat_template_goes_along(tmp_path: Path) -> None:
    first = original(tmp_path / "in", "LlamaForCausalLM")
    talk = [{"role": "user", "content": "hi"}]
    target = save(first, tmp_path / "out", "hf")
    words = transformers.AutoTokenizer.from_pretrained(target)
    assert words.apply_chat_template(talk, tokenize=False) == "<|user|>hi"
    run = save(first, tmp_path / "run", "headway")
    assert load(run).words.chat_template == load(save(first, tmp_path / "m", "gguf")).words.chat_template == CHATML


# --- where it goes -----------------------------------------------------------------------------------------------

FORMS = pytest.mark.parametrize("form", ["hf", "headway", "gguf"])


def marked(loaded: Loaded, value: float) -> Loaded:
    """The same model with another first weight."""
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    weights["decoder.norm.weight"][0] = value
    model = Transformer.of(loaded.config, weights)
    return Loaded(model, loaded.tokenizer, loaded.config, loaded.path, family="llama", architecture="LlamaForCausalLM")


def mark(path: Path) -> float:
    return float(load(path).model.decoder.norm.weight[0])


@pytest.mark.fault("S13")
@FORMS
def test_a_target_that_is_there(tmp_path: Path, form: str) -> None:
    first = original(tmp_path / "in", "LlamaForCausalLM")
    target = save(marked(first, 1.0), tmp_path / "out", form)
    error = error_of(save, marked(first, 2.0), target, form)
    assert error.exit_code == 4 and "exists" in str(error) and "--overwrite" in str(error) and mark(target) == 1.0
    save(marked(first, 2.0), target, form, overwrite=True)
    assert mark(target) == 2.0 and sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.fault("S13")
@FORMS
@pytest.mark.parametrize("name", ["with space", "ünï 日本", "x" * 250, "deep/down/there"])
def test_names_just_work(tmp_path: Path, form: str, name: str) -> None:
    first = original(tmp_path / "in", "LlamaForCausalLM")
    assert_same_weights(load(save(first, tmp_path / name, form)).model.state_dict(), first.model.state_dict())


@pytest.mark.fault("S13")
@FORMS
@pytest.mark.parametrize("overwrite", [True, False])
def test_targets_of_another_sort(tmp_path: Path, form: str, overwrite: bool) -> None:
    """A file where a folder should go and the reverse, a folder of other things, a name that is too long."""
    first = original(tmp_path / "in", "LlamaForCausalLM")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("precious")
    for name in ("folder", "file/below", "y" * 300) + (() if overwrite else ("file",)):
        error = error_of(save, first, tmp_path / name, form, overwrite=overwrite)
        assert error.exit_code == 4 and name[:4] in str(error)
        assert (tmp_path / "folder" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    if form != "gguf":
        assert_same_weights(load(save(first, tmp_path / "empty", form)).model.state_dict(), first.model.state_dict())
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.fault("S4")
@FORMS
def test_a_target_that_cannot_be_written(tmp_path: Path, form: str) -> None:
    error = error_of(save, original(tmp_path / "in", "LlamaForCausalLM"), Path("/proc/headway/out"), form)
    assert error.exit_code == 4 and "/proc" in str(error)


def test_what_stood_there_does_not_shine_through(tmp_path: Path) -> None:
    """A run of many steps under a model of none; a Hugging Face folder under a run folder."""
    first = original(tmp_path / "in", "LlamaForCausalLM")
    run = save(marked(first, 1.0), tmp_path / "run", "headway")
    weights = {"model.safetensors": marked(first, 3.0).model.state_dict()}
    save_checkpoint(run, 40, weights, {}, moved=False)
    (run / "config.yaml").write_text("train: {steps: 40}")
    save(marked(first, 2.0), run, "headway", overwrite=True)
    assert mark(run) == 2.0 and [step for step, _ in list_checkpoints(run)] == [0]
    assert not (run / "config.yaml").exists()
    folder = save(marked(first, 4.0), tmp_path / "folder", "hf")
    save(marked(first, 5.0), folder, "headway", overwrite=True)
    assert mark(folder) == 5.0 and load(folder).form == "run"


@pytest.mark.fault("S12")
@FORMS
def test_over_what_the_model_was_loaded_from(tmp_path: Path, form: str) -> None:
    """The weights are mapped from the very files that are replaced."""
    place = save(original(tmp_path / "in", "LlamaForCausalLM-tied"), tmp_path / "m", form)
    loaded = load(place)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    answers = logits(loaded)
    save(loaded, place, form, overwrite=True)
    assert_same_weights(loaded.model.state_dict(), before)
    assert_same_weights(load(place).model.state_dict(), before)
    save(loaded, place, form, dtype="float16", overwrite=True)
    assert_same_weights(loaded.model.state_dict(), before)
    assert torch.equal(logits(loaded), answers)
    assert load(place).model.embeddings.tokens.weight.dtype is torch.float16


@pytest.mark.fault("S12")
def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    first = original(tmp_path / "in", "LlamaForCausalLM")
    for form in ("hf", "headway", "gguf"):
        target = save(marked(first, 1.0), tmp_path / f"{form}-target", form)
        (tmp_path / form).symlink_to(target)
        save(marked(first, 2.0), tmp_path / form, form, overwrite=True)
        assert (tmp_path / form).is_symlink() and mark(target) == 2.0


@pytest.mark.fault("S1")
@FORMS
@pytest.mark.parametrize("is_there", [False, True])
def test_every_primitive_may_fail(tmp_path: Path, form: str, is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one or the new one, or nothing where there was nothing: never a half, and no litter."""
    first = original(tmp_path / "in", "LlamaForCausalLM", num_hidden_layers=1)
    new, target = marked(first, 2.0), tmp_path / "out" / "model"
    save(marked(first, 1.0), tmp_path / "old" / "model", form)

    def fresh() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if is_there:
            shutil.copytree(tmp_path / "old", tmp_path / "out")

    fresh()
    total = count_primitives(lambda: save(new, target, form, overwrite=is_there))
    before, after = contents(tmp_path / "old" / "model") if is_there else {}, contents(target)
    assert total > 8 and mark(target) == 2.0 and before != after
    for k in range(1, total + 1):
        fresh()
        with hooked(failing(k, errno.ENOSPC)), pytest.raises(MachineError, match="No space left"):
            save(new, target, form, overwrite=is_there)
        found = contents(target)
        assert found in (before, after), k
        # Past the point where the new one stands, what is left of the old one may stay.
        assert found == after or not list((tmp_path / "out").glob(".tmp-*")), k


def contents(place: Path) -> dict[str, bytes]:
    """Every file below a path."""
    if place.is_file():
        return {"": place.read_bytes()}
    return {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}
