"""Hugging Face folders of several files, and tables under several names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from hub_toys import (
    DROP,
    EMBEDDING,
    IDS,
    OUTPUT,
    SIZES,
    T5,
    Tensors,
    contents,
    edit,
    halves,
    logits,
    refused,
    same,
    saved,
    store,
    store_shards,
    stored,
)

from headway.checkpoints.hub_folder import CONFIG, INDEX, Checkpoint, read_folder, write_folder
from headway.config import with_fields
from headway.nn import Transformer

# --- K12, K13: shards --------------------------------------------------------------------------------------------


@pytest.mark.fault("K12")
def test_links_of_a_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    """Hugging Face's cache holds links to blobs beside the folder; the names in the index are bare all the same."""
    expected = read_folder(folder).weights
    store_shards(folder, halves(stored(folder)))
    (tmp_path / "blobs").mkdir()
    for i, name in enumerate(["part-0.safetensors", "part-1.safetensors", CONFIG, INDEX]):
        (folder / name).rename(tmp_path / "blobs" / str(i))
        (folder / name).symlink_to(f"../blobs/{i}")
    assert same(read_folder(folder).weights, expected)


def _drop_shard(folder: Path, shards: dict[str, Tensors]) -> None:
    store_shards(folder, shards)
    (folder / "part-1.safetensors").unlink()


def _unnamed(folder: Path, shards: dict[str, Tensors]) -> None:
    store_shards(folder, shards)
    store(folder, shards["part-1.safetensors"] | {"secret": torch.zeros(2)}, "part-1.safetensors")


def _twice(folder: Path, shards: dict[str, Tensors]) -> None:
    store_shards(folder, shards)
    first = next(iter(shards["part-0.safetensors"].items()))
    store(folder, shards["part-1.safetensors"] | dict([first]), "part-1.safetensors")


def _elsewhere(folder: Path, shards: dict[str, Tensors]) -> None:
    """The index places a tensor in the shard that does not hold it."""
    store_shards(folder, shards)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][EMBEDDING] = "part-1.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def _not_there(folder: Path, shards: dict[str, Tensors]) -> None:
    store_shards(folder, shards)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["nowhere"] = "part-1.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def _index(**keys: Any) -> Callable[[Path, dict[str, Tensors]], None]:
    return lambda folder, shards: store_shards(folder, shards, **keys)


def _text(text: str) -> Callable[[Path, dict[str, Tensors]], None]:
    def write(folder: Path, shards: dict[str, Tensors]) -> None:
        store_shards(folder, shards)
        (folder / INDEX).write_text(text)

    return write


WRONG_SHARDS: dict[str, tuple[Callable[[Path, dict[str, Tensors]], None], tuple[str, ...]]] = {
    "missing shard": (_drop_shard, ("part-1.safetensors", "no such file")),
    "a tensor that the index lacks": (_unnamed, ("part-1.safetensors", "'secret'", "no shard by the index")),
    "a tensor in two shards": (_twice, ("part-1.safetensors", "it in part-0.safetensors by the index")),
    "a tensor in another shard": (_elsewhere, ("part-0.safetensors", EMBEDDING, "part-1.safetensors by the index")),
    "a tensor in no shard": (_not_there, ("part-1.safetensors", "'nowhere' is not in it", INDEX)),
    "total too large": (_index(metadata={"total_size": 10**9}), (INDEX, "total_size", "1000000000", "part-0.safe")),
    "total no number": (_index(metadata={"total_size": "big"}), (INDEX, "total_size", "'big'")),
    "no weight_map": (_index(weight_map=DROP), (INDEX, "weight_map", "missing or malformed")),
    "empty weight_map": (_index(weight_map={}), (INDEX, "weight_map", "missing or malformed")),
    "weight_map a list": (_index(weight_map=[1]), (INDEX, "weight_map", "missing or malformed")),
    "shards no names": (_index(weight_map={"a": 3}), (INDEX, "weight_map", "missing or malformed")),
    "not JSON": (_text('{"weight_map": '), (INDEX, "not valid JSON")),
    "NaN": (_text('{"weight_map": NaN}'), (INDEX, "NaN is not a JSON number")),
    "a list": (_text("[]"), (INDEX, "an object")),
    "a key twice": (_text('{"weight_map": {"a": "b", "a": "c"}}'), (INDEX, "appears twice")),
}  # fmt: skip


@pytest.mark.fault("K13")
@pytest.mark.parametrize("what", WRONG_SHARDS)
def test_an_index_that_does_not_fit(folder: Path, what: str) -> None:
    damage, parts = WRONG_SHARDS[what]
    damage(folder, halves(stored(folder)))
    refused(folder, *parts)


@pytest.mark.fault("K13")
@pytest.mark.parametrize("metadata", [DROP, {}, {"total_size": None}, {"total_parameters": 9}, [1]])
def test_an_index_without_a_total(folder: Path, metadata: object) -> None:
    expected = read_folder(folder).weights
    store_shards(folder, halves(stored(folder)), metadata=metadata)
    assert same(read_folder(folder).weights, expected)


def test_one_file_goes_before_shards_as_in_transformers(folder: Path) -> None:
    tensors = stored(folder)
    store_shards(folder, halves({name: tensor + 1 for name, tensor in tensors.items()}))
    store(folder, tensors)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.get_parameter(EMBEDDING), tensors[EMBEDDING])
    assert torch.equal(read_folder(folder).weights["embeddings.tokens.weight"], tensors[EMBEDDING])


# --- K17: tied weights -------------------------------------------------------------------------------------------


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    saved(tmp_path / "tied", **SIZES, tie_word_embeddings=True)
    return tmp_path / "tied"


def assert_tied(checkpoint: Checkpoint) -> None:
    embedding, output = (checkpoint.weights[name] for name in ("embeddings.tokens.weight", "head.output.weight"))
    assert checkpoint.config.embeddings.tied and embedding.data_ptr() == output.data_ptr()
    model = Transformer.of(checkpoint.config, checkpoint.weights)
    assert model.head.output.weight is model.embeddings.tokens.weight


@pytest.mark.fault("K17")
def test_tied_weights_are_stored_once_and_tied_after_reading(tied: Path, tmp_path: Path) -> None:
    theirs = transformers.LlamaForCausalLM.from_pretrained(tied).eval()
    checkpoint = read_folder(tied)
    assert_tied(checkpoint)
    write_folder(tmp_path / "out", contents(checkpoint))
    assert OUTPUT not in stored(tmp_path / "out") and EMBEDDING in stored(tmp_path / "out")
    again = read_folder(tmp_path / "out")
    assert_tied(again)
    assert torch.equal(logits(again), logits(checkpoint))
    with torch.no_grad():
        assert (logits(again) - theirs(IDS).logits).abs().max() < 1e-4


@pytest.mark.fault("K17")
def test_a_file_that_holds_a_tied_table_twice_or_under_its_other_name(tied: Path) -> None:
    expected, tensors = logits(read_folder(tied)), stored(tied)
    store(tied, tensors | {OUTPUT: tensors[EMBEDDING].clone()})
    checkpoint = read_folder(tied)
    assert_tied(checkpoint)
    assert not checkpoint.notes and torch.equal(logits(checkpoint), expected)
    table = tensors.pop(EMBEDDING)
    store(tied, tensors | {OUTPUT: table})
    checkpoint = read_folder(tied)
    assert_tied(checkpoint)
    assert torch.equal(logits(checkpoint), expected)
    store(tied, tensors)
    refused(tied, "1 missing", EMBEDDING)


@pytest.mark.fault("K17")
def test_tables_that_differ_stay_apart_and_are_said(tied: Path) -> None:
    tensors = stored(tied)
    store(tied, tensors | {OUTPUT: tensors[EMBEDDING] + 1})
    checkpoint = read_folder(tied)
    (note,) = checkpoint.notes
    assert "output and embedding differ" in note and not checkpoint.config.embeddings.tied
    edit(tied, tie_word_embeddings=False)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tied).eval()
    with torch.no_grad():
        assert (logits(checkpoint) - theirs(IDS).logits).abs().max() < 1e-4
    assert not read_folder(tied).notes
    edit(tied, tie_word_embeddings=True)
    store(tied, tensors | {OUTPUT: torch.zeros(60, 32)})
    refused(tied, f"tensor {OUTPUT} has shape (60, 32)", f"that of {EMBEDDING}")


@pytest.mark.fault("K17")
def test_two_sides_that_must_share_a_table(tmp_path: Path) -> None:
    """T5's decoder reads the encoder's table: another one under its name is no model of this family."""
    saved(tmp_path, "T5", "ForConditionalGeneration", **T5)
    tensors = stored(tmp_path)
    table, name = tensors["shared.weight"], "decoder.embed_tokens.weight"
    store(tmp_path, tensors | {name: table.clone(), OUTPUT: table.clone()})
    assert read_folder(tmp_path).config.embeddings.tied
    store(tmp_path, tensors | {name: table + 1, OUTPUT: table.clone()})
    refused(tmp_path, f"tensor {name} differs from shared.weight")
    store(tmp_path, {key: tensor for key, tensor in tensors.items() if key != "shared.weight"} | {name: table})
    checkpoint = read_folder(tmp_path)
    assert torch.equal(checkpoint.weights["embeddings.tokens.weight"], table) and not checkpoint.notes


UNTIED = [
    ("Bart", "ForConditionalGeneration", {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
     "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}),
    ("Bert", "ForMaskedLM", SIZES),
    ("Roberta", "ForMaskedLM", SIZES),
]  # fmt: skip


@pytest.mark.fault("K17")
@pytest.mark.parametrize(("kind", "head", "sizes"), UNTIED, ids=[kind for kind, *_ in UNTIED])
def test_untied_models_have_a_tensor_more_there(tmp_path: Path, kind: str, head: str, sizes: dict[str, int]) -> None:
    """BART's two sides part their tables, BERT's output its bias: what we write leaves nothing there to be drawn."""
    ids = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    saved(tmp_path / "in", kind, head, **(sizes | ids))
    checkpoint = read_folder(tmp_path / "in")
    torch.manual_seed(1)
    config = with_fields(checkpoint.config, embeddings=checkpoint.config.embeddings.model_copy(update={"tied": False}))
    weights = {name: torch.randn(tensor.shape) / 5 for name, tensor in Transformer(config).state_dict().items()}
    if "decoder_embeddings.tokens.weight" in weights:
        weights["decoder_embeddings.tokens.weight"] = weights["embeddings.tokens.weight"]
    write_folder(tmp_path / "out", contents(replace(checkpoint, config=config, weights=weights)))
    theirs, loading = getattr(transformers, kind + head).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    again = read_folder(tmp_path / "out")
    assert again.config == config and not again.notes
    ours = Transformer.of(again.config, again.weights)
    given = {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :4]} if ours.is_pair else {})
    with torch.no_grad():
        expected = theirs.eval()(**given).logits
        assert (ours(**given).logits - expected).abs().max() < 1e-4 * expected.abs().max()


# --- sharded -----------------------------------------------------------------------------------------------------


def test_shards_that_are_written_load_there_and_here(whole: Path, tmp_path: Path) -> None:
    checkpoint = read_folder(whole)
    write_folder(tmp_path / "out", contents(checkpoint, shard_bytes=20_000))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(whole).values())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*shards, CONFIG, INDEX])
    for shard in shards:
        tensors = safetensors.torch.load_file(tmp_path / "out" / shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
    again = read_folder(tmp_path / "out")
    assert again.config == checkpoint.config and same(again.weights, checkpoint.weights)
    models = [transformers.LlamaForCausalLM.from_pretrained(place).eval() for place in (whole, tmp_path / "out")]
    with torch.no_grad():
        one, other = (model(IDS).logits for model in models)
    assert torch.equal(one, other)


def test_shards_of_transformers_equal_the_single_file(whole: Path, tmp_path: Path) -> None:
    transformers.LlamaForCausalLM.from_pretrained(whole).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).exists()
    one, other = read_folder(whole), read_folder(tmp_path)
    assert one.config == other.config and same(one.weights, other.weights)


def test_what_is_kept_of_the_original(tmp_path: Path) -> None:
    """Names of labels, keys of no use here and tensors that no forward reads come back; the dtype is the weights'."""
    names = {0: "no", 1: "yes", 2: "perhaps"}
    saved(tmp_path / "in", head="ForSequenceClassification", **SIZES, id2label=names, pad_token_id=0)
    edit(tmp_path / "in", task_specific_params={"a": 1})
    tensors = {name: tensor.bfloat16() for name, tensor in stored(tmp_path / "in").items()}
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    store(tmp_path / "in", tensors | frequencies)
    edit(tmp_path / "in", dtype="bfloat16")
    checkpoint = read_folder(tmp_path / "in")
    (note,) = checkpoint.notes
    assert "1 tensors are not read" in note
    write_folder(tmp_path / "out", contents(checkpoint))
    tree = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert tree["id2label"] == {"0": "no", "1": "yes", "2": "perhaps"} and tree["label2id"]["perhaps"] == 2
    assert tree["task_specific_params"] == {"a": 1} and tree["dtype"] == tree["torch_dtype"] == "bfloat16"
    assert same(stored(tmp_path / "out"), stored(tmp_path / "in"))
    write_folder(tmp_path / "cast", contents(checkpoint, dtype=torch.float16))
    assert json.loads((tmp_path / "cast" / CONFIG).read_text())["dtype"] == "float16"
    assert stored(tmp_path / "cast")["score.weight"].dtype is torch.float16
