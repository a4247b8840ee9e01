"""Candidates for the gaps of a text: transformers' probabilities for the ids of transformers' own tokenizers."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from test_loading import TEXT, error_of, published, theirs, tokenizer

from headway import api
from headway.cli.main import main
from headway.evaluation.fill_mask import Guess, fill_mask
from headway.loading import Loaded, load
from headway.text import Tokenizer, train_tokenizer
from headway.text.formats import template

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@functools.cache
def roberta_words() -> Tokenizer:
    """Byte-level BPE with RoBERTa's tokens; its mask swallows the space in front of it."""
    tree = json.loads(train_tokenizer([TEXT], "bpe", 300, special_tokens=SPECIAL).to_json())
    for entry in tree["added_tokens"]:
        entry["lstrip"] = entry["content"] == "<mask>"
    ids = {name: number for number, name in enumerate(SPECIAL)}
    return Tokenizer(tree | {"post_processor": template(["<s>"], ["</s>"], ["</s>"], ids)})


def model(place: Path, name: str) -> Loaded:
    if name == "BertForMaskedLM":
        return load(published(place, name, "wordpiece"))
    published(place, name, None, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    roberta_words().save(place)
    return load(place)


def reference(name: str) -> torch.nn.Module:
    keys = {} if name == "BertForMaskedLM" else {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    found: torch.nn.Module = theirs(name, **keys)
    return found


GAPS = ["the {} brown fox", "{}", "the dog sleeps {}", "{} dog {} in the {}.", "the{}{}fox", "  the   {}  dog "]


@pytest.mark.parametrize("gaps", GAPS)
@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_probabilities_are_theirs(tmp_path: Path, name: str, gaps: str) -> None:
    """Text -> ids -> softmax at each mask: the same candidates in the same order."""
    loaded = model(tmp_path, name)
    mask = str(loaded.words.token(loaded.words.mask_id))
    text = gaps.replace("{}", mask)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    with torch.no_grad():
        logits = reference(name)(torch.tensor([ids])).logits[0, :, : loaded.words.vocab_size]
    places = [place for place, one in enumerate(ids) if one == loaded.words.mask_id]
    found = api.fill_mask(loaded, text, top=7)
    assert len(found) == len(places) == gaps.count("{}")
    for guesses, place in zip(found, places, strict=True):
        values, best = logits[place].softmax(-1).topk(7)
        assert [guess.token_id for guess in guesses] == best.tolist()
        assert torch.tensor([guess.probability for guess in guesses]).allclose(values, atol=1e-5)
        assert [guess.token for guess in guesses] == [loaded.words.token(one) for one in best.tolist()]


def test_the_text_with_a_guess_in_place(tmp_path: Path) -> None:
    """Without the template's tokens; the other gaps stay open, as pipelines show them."""
    loaded = model(tmp_path, "BertForMaskedLM")
    words = loaded.words
    for number, guesses in enumerate(api.fill_mask(loaded, "the [MASK] fox [MASK] over", top=400)):
        assert len(guesses) == words.vocab_size and abs(sum(guess.probability for guess in guesses) - 1) < 1e-5
        dog = next(guess for guess in guesses if guess.token == "dog")
        assert dog.text == ("the dog fox [MASK] over", "the [MASK] fox dog over")[number]
        cls = next(guess for guess in guesses if guess.token == "[CLS]")
        assert cls.text == ("the [CLS] fox [MASK] over", "the [MASK] fox [CLS] over")[number]


def test_top(tmp_path: Path) -> None:
    loaded = model(tmp_path, "BertForMaskedLM")
    whole = api.fill_mask(loaded, "the [MASK]", top=10**6)[0]
    for top in (1, 5):
        found = api.fill_mask(loaded, "the [MASK]", top=top)[0]
        assert found == whole[:top] and isinstance(found[0], Guess)
    assert len(api.fill_mask(loaded, "the [MASK]")[0]) == 5
    for top in (0, -1):
        assert error_of(api.fill_mask, loaded, "the [MASK]", top=top).exit_code == 2


@pytest.mark.fault("C12")
def test_names_of_other_special_tokens_are_plain_text(tmp_path: Path) -> None:
    """Only the mask's own name is a mask; [SEP] in the text is five characters and no end of it."""
    loaded = model(tmp_path, "BertForMaskedLM")
    words, seen = loaded.words, []
    loaded.model.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].tolist()))
    assert len(api.fill_mask(loaded, "[SEP] the [MASK] <mask> [CLS][PAD]")) == 1
    (ids,) = seen
    first, last = words.special_id("[CLS]"), words.special_id("[SEP]")
    assert ids[0] == first and ids[-1] == last and not {first, last, words.pad_id} & set(ids[1:-1])
    assert ids.count(words.mask_id) == 1
    plain = [*words.encode("[SEP] the "), words.mask_id, *words.encode(" <mask> [CLS][PAD]")]
    assert ids[1:-1] == plain


@pytest.mark.parametrize("text", ["", "the dog", "[mask] [ MASK ] <mask>"])
def test_no_mask(tmp_path: Path, text: str) -> None:
    error = error_of(api.fill_mask, model(tmp_path, "BertForMaskedLM"), text)
    assert error.exit_code == 3 and "no mask in it" in str(error) and "[MASK]" in str(error)


def test_what_cannot_fill_gaps(tmp_path: Path) -> None:
    """Another head (a vision model's too), a tokenizer without a mask, a text beyond the context, no tokenizer."""
    for name in ("LlamaForCausalLM", "ViTForImageClassification", "BertModel"):
        error = error_of(api.fill_mask, load(published(tmp_path / name, name, None)), "the [MASK]")
        assert error.exit_code == 2 and "fills no gaps" in str(error)
    loaded = model(tmp_path / "bert", "BertForMaskedLM")
    error = error_of(fill_mask, loaded.model, tokenizer("bpe"), "the [MASK]")
    assert error.exit_code == 2 and "no mask token" in str(error)
    assert error_of(fill_mask, theirs_as_ours(tmp_path), tokenizer("bpe"), "x").exit_code == 2
    context = loaded.config.max_len
    fits = "[MASK]" * (context - 2)
    assert len(api.fill_mask(loaded, fits)) == context - 2
    error = error_of(api.fill_mask, loaded, fits + "[MASK]")
    assert error.exit_code == 3 and f"{context + 1} tokens" in str(error) and f"at most {context}" in str(error)
    silent = load(published(tmp_path / "silent", "BertForMaskedLM", None))
    assert "no tokenizer" in str(error_of(api.fill_mask, silent, "the [MASK]"))


def theirs_as_ours(place: Path) -> torch.nn.Module:
    return load(published(place / "llama", "LlamaForCausalLM", None)).model


@pytest.mark.fault("T10")
def test_text_that_is_not_unicode(tmp_path: Path) -> None:
    error = error_of(api.fill_mask, model(tmp_path, "BertForMaskedLM"), "caf\udce9 [MASK]")
    assert error.exit_code == 3 and "not valid Unicode" in str(error)


def test_sixteen_bits_and_training_mode(tmp_path: Path) -> None:
    """Probabilities are summed in float32 whatever the model's precision, and a model in training stays there."""
    loaded = model(tmp_path, "BertForMaskedLM")
    loaded.model.train()
    whole = api.fill_mask(loaded, "the [MASK] dog", top=400)[0]
    assert loaded.model.training
    half = api.fill_mask(load(tmp_path, dtype=torch.bfloat16), "the [MASK] dog", top=400)[0]
    assert abs(sum(guess.probability for guess in half) - 1) < 1e-5
    other = {guess.token_id: guess.probability for guess in half}
    assert max(abs(guess.probability - other[guess.token_id]) for guess in whole) < 0.02


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`generate --fill-mask K`: a table for people, all of each guess under --json, one line for a mistake."""
    loaded = model(tmp_path / "m", "BertForMaskedLM")
    text = "the [MASK] fox [MASK]"
    words = ["generate", str(tmp_path / "m"), "-p", text, "--fill-mask", "3"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["masks"]
    expected = [[guess._asdict() for guess in gap] for gap in api.fill_mask(loaded, text, top=3)]
    assert found == [expected]
    assert main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    for more, code in ((["--fill-mask", "0"], 2), (["-p", "no gap", "--fill-mask", "1"], 3)):
        assert main([*words[:2], *more]) == code
        assert capsys.readouterr().err.count("error: ") == 1
