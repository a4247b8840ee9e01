"""Vectors of texts: those of each text alone, pooled by hand; batching, sorting and padding change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from test_loading import MODES, TEXT, error_of, pooled, published, sentence_transformer, theirs, tokenizer
from torch import Tensor

from headway import api
from headway.config import ModelConfig
from headway.errors import InputError
from headway.evaluation.embed import TOKENS, embed
from headway.loading import Loaded, load
from headway.nn import Transformer
from headway.nn.packed import exact
from headway.saving import save

WORDS = TEXT.split()
# Of many lengths, out of order, with doubles, nothing, white space, and names of special tokens.
TEXTS = [" ".join(WORDS[i : i + n]) for i, n in enumerate((3, 9, 1, 14, 2, 9, 5))]
TEXTS += ["", "the dog", " ", "the dog", "[SEP] the [MASK] dog", "Ünï日本"]
SAME = 1e-6  # vectors of length one: sums of 32 terms in another order


def by_hand(loaded: Loaded, text: str, how: str, normalize: bool) -> Tensor:
    """One text alone through transformers' model."""
    ids = loaded.words.encode_input(text)[: loaded.config.max_len]
    with torch.no_grad():
        return pooled(theirs("BertModel")(torch.tensor([ids])).last_hidden_state[0], how, normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("how", MODES)
def test_vectors_are_those_of_each_text_alone(tmp_path: Path, how: str, normalize: bool) -> None:
    loaded = load(sentence_transformer(tmp_path / "st", [MODES[how]], normalize))
    found = api.embed(loaded, TEXTS)
    assert found.shape == (len(TEXTS), 32) and found.dtype is torch.float32 and found.isfinite().all()
    for vector, text in zip(found, TEXTS, strict=True):
        expected = by_hand(loaded, text, how, normalize)
        assert (vector - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1), text
        alone = api.embed(loaded, text)[0]
        assert (vector - alone).abs().max() < SAME * alone.abs().max().clamp(min=1), text
    assert torch.equal(found[8], found[10])


@pytest.mark.parametrize("tokens", [1, 20, 64, TOKENS])
def test_the_size_of_batches_changes_nothing(tmp_path: Path, tokens: int) -> None:
    """Batches hold at most so many tokens with padding; a longer text is a batch of its own. Progress ends at all."""
    loaded = load(sentence_transformer(tmp_path / "st", [MODES["mean"]], True))
    seen: list[int] = []
    shapes: list[torch.Size] = []
    loaded.model.register_forward_pre_hook(lambda model, given: shapes.append(given[0].shape))
    found = embed(loaded.model, loaded.words, TEXTS, progress=seen.append, tokens=tokens)
    assert seen[-1] == len(TEXTS) and seen == sorted(set(seen)) and len(seen) == len(shapes)
    assert sum(shape[0] for shape in shapes) == len(TEXTS)
    assert all(shape[0] == 1 or shape.numel() <= tokens for shape in shapes)
    assert (len(shapes) == len(TEXTS)) is (tokens == 1) and (len(shapes) == 1) is (tokens == TOKENS)
    for vector, text in zip(found, TEXTS, strict=True):
        assert (vector - embed(loaded.model, loaded.words, [text])[0]).abs().max() < SAME


def test_without_the_mask_padding_would_show(tmp_path: Path) -> None:
    """The control for the tests above: the same batch without the mask gives other vectors."""
    loaded = load(sentence_transformer(tmp_path / "st", [MODES["mean"]], True))
    forward = loaded.model.forward
    short, long = TEXTS[2], TEXTS[3]
    good = api.embed(loaded, [short, long])
    loaded.model.forward = lambda ids, attention_mask: forward(ids)
    assert (api.embed(loaded, [short, long])[0] - good[0]).abs().max() > 1e-3


def test_nothing_gives_nothing(tmp_path: Path) -> None:
    calls: list[int] = []
    for name, size in (("BertModel", 32), ("CLIPTextModelWithProjection", 512), ("LlamaForCausalLM", 32)):
        loaded = load(published(tmp_path / name, name))
        assert api.embed(loaded, [], progress=calls.append).shape == (0, size) and not calls
        assert api.embed(loaded, ["the"]).shape == (1, size)


def test_a_long_text_is_cut_as_theirs_is(tmp_path: Path) -> None:
    """At the context's end, the template's [SEP] kept: the ids that transformers' tokenizer gives with truncation."""
    loaded = load(sentence_transformer(tmp_path / "st", [MODES["first"]], False))
    context = loaded.config.max_len
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "st")
    ids = words(TEXT, truncation=True, max_length=context)["input_ids"]
    assert len(ids) == context and len(loaded.words.encode(TEXT)) > context
    with torch.no_grad():
        expected = theirs("BertModel")(torch.tensor([ids])).last_hidden_state[0, 0]
    found = api.embed(loaded, [TEXT, "the", TEXT + " and more"])
    assert (found[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(found[0], found[2])


def test_other_models_give_the_mean_of_their_states(tmp_path: Path) -> None:
    """A decoder, and an encoder with another head: the last states over real tokens, of length one."""
    for name, words in (("LlamaForCausalLM", "bpe"), ("BertForMaskedLM", "wordpiece")):
        loaded = load(published(tmp_path / name, name, words))
        texts = [text for text in TEXTS if text]
        found = api.embed(loaded, texts)
        for vector, text in zip(found, texts, strict=True):
            ids = loaded.words.encode_input(text)[: loaded.config.max_len]
            with torch.no_grad():
                states = theirs(name)(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            assert (vector - pooled(states, "mean", True)).abs().max() < 1e-5, text
            assert abs(float(vector.norm()) - 1) < SAME


def test_no_token_at_all_is_the_end_token(tmp_path: Path) -> None:
    loaded = load(published(tmp_path / "hf", "LlamaForCausalLM"))
    assert loaded.words.encode_input("") == []
    end = str(loaded.words.token(loaded.words.eos_id))
    with torch.no_grad():
        states = theirs("LlamaForCausalLM")(torch.tensor([[loaded.words.special_id(end)]]), output_hidden_states=True)
    expected = pooled(states.hidden_states[-1][0], "mean", True)
    assert (api.embed(loaded, "")[0] - expected).abs().max() < 1e-5


def test_state_and_precision_are_left_as_they_were(tmp_path: Path) -> None:
    """A model in training goes on training; one of 16 bits gives float32 near its own in 32."""
    folder = sentence_transformer(tmp_path / "st", [MODES["mean"]], True)
    loaded, half = load(folder), load(folder, dtype=torch.bfloat16)
    loaded.model.train().requires_grad_(True)
    found = api.embed(loaded, TEXTS)
    assert loaded.model.training and not found.requires_grad
    other = api.embed(half, TEXTS)
    assert other.dtype is torch.float32 and (other - found).abs().max() < 0.03


def test_blocks_give_the_vectors_of_their_weights(tmp_path: Path) -> None:
    first = load(sentence_transformer(tmp_path / "st", [MODES["mean"]], True))
    path = save(first, tmp_path / "m.gguf", "gguf", dtype="q8_0")
    with exact():
        packed, plain = (api.embed(load(path, dtype=dtype), TEXTS) for dtype in (None, torch.float32))
    assert torch.equal(packed, plain)
    in_codes = api.embed(load(path), TEXTS)
    assert torch.cosine_similarity(in_codes, packed).min() > 0.999
    assert 1e-4 < (packed - api.embed(first, TEXTS)).abs().max() < 0.05


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "ViTForImageClassification"])
def test_models_without_a_vector_of_a_text_are_refused(tmp_path: Path, name: str) -> None:
    """For what they are, not for the tokenizer that a vision model never has."""
    loaded = load(published(tmp_path / "hf", name, "bpe" if "T5" in name else None))
    error = error_of(api.embed, loaded, TEXTS)
    assert error.exit_code == 2 and loaded.config.kind in str(error) and "an encoder or a decoder" in str(error)
    assert error_of(embed, loaded.model, tokenizer(), TEXTS).exit_code == 2


def test_a_model_without_words(tmp_path: Path) -> None:
    error = error_of(api.embed, load(published(tmp_path / "hf", "BertModel", None)), TEXTS)
    assert error.exit_code == 3 and "no tokenizer" in str(error)


@pytest.mark.fault("T10")
def test_text_that_is_not_unicode(tmp_path: Path) -> None:
    loaded = load(published(tmp_path / "hf", "BertModel", "wordpiece"))
    error = error_of(api.embed, loaded, ["fine", "caf\udce9"])
    assert error.exit_code == 3 and "not valid Unicode" in str(error)


def test_an_encoder_of_ours_with_a_projection() -> None:
    """Trained here: mean of the states, through the projection, of length one."""
    head = {"type": "pooled-embedding", "projection": 6}
    config = ModelConfig(kind="encoder", d_model=16, n_layers=1, n_heads=2, vocab_size=320, max_len=24, head=head)
    model = Transformer(config).eval()
    ids = tokenizer("wordpiece").encode_input("the dog")
    with torch.no_grad():
        expected = model.head.project.weight @ model(torch.tensor([ids])).hidden[0].mean(0)
        found = embed(model, tokenizer("wordpiece"), ["the dog", "the quick brown fox"])[0]
    assert (found - expected / expected.norm()).abs().max() < SAME


def test_texts_are_cut_where_the_folder_says(tmp_path: Path) -> None:
    """As sentence-transformers does: the template's tokens count; less than the model could read."""
    place = sentence_transformer(tmp_path / "st", [MODES["mean"]], True)
    whole = api.embed(load(place), TEXTS)
    (place / "sentence_bert_config.json").write_text('{"max_seq_length": 5, "do_lower_case": false}')
    loaded = load(place)
    found = api.embed(loaded, TEXTS)
    words = loaded.words
    for vector, before, text in zip(found, whole, TEXTS, strict=True):
        ids = words.encode(text)
        cut = [*words.prefix_ids, *ids[:3], *words.suffix_ids]
        expected = pooled(theirs("BertModel")(torch.tensor([cut])).last_hidden_state[0], "mean", True).detach()
        assert (vector - expected).abs().max() < 1e-5
        assert bool((vector - before).abs().max() > 1e-3) is (len(ids) > 3)
    save(loaded, tmp_path / "again", "hf")
    assert load(tmp_path / "again").config.head == loaded.config.head


@pytest.mark.parametrize("wrong", ["0", '"256"', "1.5"])
def test_a_length_that_is_none_is_refused(tmp_path: Path, wrong: str) -> None:
    place = sentence_transformer(tmp_path / "st", [MODES["mean"]], True)
    (place / "sentence_bert_config.json").write_text(f'{{"max_seq_length": {wrong}}}')
    with pytest.raises(InputError, match="max_seq_length"):
        load(place)
