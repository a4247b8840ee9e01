"""Examples as columns: what is learned is exactly the answer, what does not fit is counted, places are the text's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from headway.data.encode import (
    PLAIN_TEMPLATE,
    Coder,
    Losses,
    answered,
    completion,
    dialogue,
    framed,
    labelled,
    question_windows,
    tagged,
    translation,
)
from headway.data.examples import Column, Sides, encode_all, gather, prepare_examples
from headway.data.forms import Answer, Chat, Labelled, Message, Pair, Question, Tagged
from headway.errors import InputError
from headway.text import Tokenizer, train_tokenizer
from headway.training.tasks import paired

TEXTS = ["The quick brown fox jumps over the lazy dog. It was late in the year 1850, and nobody knew why." * 20]
BPE = train_tokenizer(TEXTS, "bpe", 400, special_tokens=["<|endoftext|>", "<pad>"])
PIECES = train_tokenizer(TEXTS, "wordpiece", 200, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])
words = st.text(st.sampled_from("abcdefgh THEquick"), min_size=1, max_size=30).filter(str.strip)


def bert() -> Tokenizer:
    """The word pieces with BERT's template."""
    tree = json.loads(PIECES.to_json())
    ids = {name: PIECES.special_id(name) for name in ("[CLS]", "[SEP]")}
    tree["post_processor"] = {
        "type": "BertProcessing",
        "sep": ["[SEP]", ids["[SEP]"]],
        "cls": ["[CLS]", ids["[CLS]"]],
    }
    return Tokenizer(tree)


BERT = bert()


@settings(max_examples=60, deadline=None)
@given(source=words, target=words, room=st.integers(2, 60))
def test_only_the_completion_is_learned(source: str, target: str, room: int) -> None:
    (one,) = completion(Pair(source, target, "f:1"), Coder(BPE, room))
    ids, labels = one.columns["input_ids"], one.columns["labels"]
    assert len(ids) == len(labels) <= room
    answer = [*BPE.encode(target), BPE.eos_id]
    learned = [label for label in labels if label != -100]
    assert learned == answer[: len(learned)]
    for place, label in enumerate(labels[:-1]):
        if label != -100:
            assert label == ids[place + 1], "a label is the next token"
    whole = [*BPE.encode(source), *answer]
    if len(whole) <= room + 1:
        assert [*ids, labels[-1]] == whole and (one.cut, one.cut_labels) == (0, 0) and learned == answer
    else:
        assert one.cut == len(whole) - len(ids) - 1 and one.cut_labels == max(len(answer) - room, 0)


CHAT = Chat(
    (
        Message("system", "Be brief."),
        Message("user", "The fox?"),
        Message("assistant", "It jumps."),
        Message("user", "The dog?"),
        Message("assistant", "Lazy."),
    ),
    "f:1",
)


def test_what_the_assistant_says_is_learned_and_nothing_else() -> None:
    (one,) = dialogue(CHAT, Coder(BPE, 500))
    ids, labels = one.columns["input_ids"], one.columns["labels"]
    assert BPE.decode([label for label in labels if label != -100], skip_special=False) == (
        "It jumps.<|endoftext|>Lazy.<|endoftext|>"
    )
    text = BPE.decode(ids, skip_special=False)
    assert text.startswith("System:\nBe brief.\nUser:\nThe fox?\nAssistant:\nIt jumps.<|endoftext|>\nUser")
    assert all(label in (-100, following) for label, following in zip(labels[:-1], ids[1:], strict=True))
    (cut,) = dialogue(CHAT, Coder(BPE, 12))
    assert len(cut.columns["input_ids"]) == 12 and cut.cut > 0 and cut.cut_labels > 0


def test_a_users_control_token_is_text() -> None:
    (one,) = dialogue(Chat((Message("user", "<|endoftext|>"), Message("assistant", "No.")), ""), Coder(BPE, 500))
    assert list(one.columns["input_ids"]).count(BPE.eos_id) == 1


def test_the_chat_mask_is_that_of_transformers() -> None:
    """apply_chat_template with return_assistant_tokens_mask, on the same template."""
    theirs = PreTrainedTokenizerFast(tokenizer_object=BPE._control, eos_token="<|endoftext|>")
    messages = [{"role": one.role, "content": one.content} for one in CHAT.messages]
    found = theirs.apply_chat_template(
        messages, chat_template=PLAIN_TEMPLATE, return_assistant_tokens_mask=True, return_dict=True
    )
    (one,) = dialogue(CHAT, Coder(BPE, 500))
    ids, labels = list(one.columns["input_ids"]), list(one.columns["labels"])
    assert found["input_ids"][:-1] == ids
    assert found["assistant_masks"][1:] == [int(label != -100) for label in labels]


def test_a_translation_ends_and_is_cut_on_both_sides() -> None:
    pair = Pair("the quick brown fox", "over the lazy dog", "f:1")
    (one,) = translation(pair, Coder(BPE, 50, 50))
    assert one.columns["input_ids"] == [*BPE.encode(pair.source), BPE.eos_id]
    assert one.columns["labels"] == [*BPE.encode(pair.target), BPE.eos_id]
    (cut,) = translation(pair, Coder(BPE, 4, 3))
    assert len(cut.columns["input_ids"]) == 4 and cut.columns["input_ids"][-1] == BPE.eos_id
    assert cut.columns["labels"] == BPE.encode(pair.target)[:3] and cut.cut > 0 and cut.cut_labels > 0


@settings(max_examples=80, deadline=None)
@given(a=words, b=words, room=st.integers(6, 60))
def test_two_texts_are_framed_and_cut_as_transformers_does(a: str, b: str, room: int) -> None:
    names = ["input_ids", "token_type_ids"]
    theirs = PreTrainedTokenizerFast(tokenizer_object=BERT._control, model_input_names=names)
    wanted = theirs(a, b, truncation="longest_first", max_length=room)
    columns, offset, cut = framed(BERT.encode(a), BERT.encode(b), Coder(BERT, room, token_types=True))
    assert len(columns["input_ids"]) == len(wanted["input_ids"]) <= room
    if not cut:
        assert columns["input_ids"] == wanted["input_ids"] and columns["token_types"] == wanted["token_type_ids"]
    assert columns["token_types"][offset:] == [1] * (len(columns["token_types"]) - offset)


def test_labels_are_numbers_lists_and_classes() -> None:
    coder = Coder(BERT, 20, labels=("a", "b", "c"))
    for label, wanted in (("b", [1]), (("a", "c"), [1, 0, 1]), (0.25, [0.25])):
        (one,) = labelled(Labelled("the dog", None, label, "f:1"), coder)
        assert list(one.columns["labels"]) == wanted
        assert one.columns["input_ids"][0] == BERT.special_id("[CLS]")
    with pytest.raises(InputError, match="f:9: label 'z'; expected one of a, b, c"):
        list(labelled(Labelled("the dog", None, "z", "f:9"), coder))


def test_a_words_first_token_has_its_tag() -> None:
    coder = Coder(BERT, 50, labels=("O", "X"))
    row = Tagged(("The", "quickest", "fox"), ("O", "X", "O"), "f:1")
    (one,) = tagged(row, coder)
    ids, labels = one.columns["input_ids"], one.columns["labels"]
    assert len(ids) == len(labels) and [label for label in labels if label != -100] == [0, 1, 0]
    at = [place for place, label in enumerate(labels) if label != -100]
    assert [BERT.token(ids[place])[0] for place in at] == ["T", "q", "f"]
    (cut,) = tagged(row, Coder(BERT, 4, labels=("O", "X")))
    assert len(cut.columns["input_ids"]) <= 4 and cut.cut_labels >= 1


CONTEXT = (
    "The quick brown fox jumps over the lazy dog. " * 6 + "It was late in the year 1850. " + "Nobody knew why. " * 9
)


@pytest.mark.parametrize("room", [24, 40, 400])
@pytest.mark.parametrize("tokenizer", [BERT, BPE], ids=["wordpiece", "bpe"])
def test_an_answers_tokens_are_its_characters(tokenizer: Tokenizer, room: int) -> None:
    start = CONTEXT.index("1850")
    question = Question("which year", CONTEXT, (Answer("1850", start),), "f:1")
    coder = Coder(tokenizer, room, token_types=tokenizer is BERT)
    found = 0
    for window, one in zip(question_windows(question, coder), answered(question, coder), strict=True):
        assert len(one.columns["input_ids"]) <= room and one.columns["input_ids"] == window.columns["input_ids"]
        first, last = one.columns["labels"]
        if (first, last) == (0, 0):
            continue
        found += 1
        spans = window.spans[first - window.offset : last - window.offset + 1]
        assert CONTEXT[spans[0][0] : spans[-1][1]].strip() == "1850"
    assert found >= 1
    covered = {place for window in question_windows(question, coder) for span in window.spans for place in range(*span)}
    assert covered >= {place for place, letter in enumerate(CONTEXT) if not letter.isspace()}


def test_without_an_answer_the_first_token_is_it() -> None:
    question = Question("which year", CONTEXT, (), "f:1")
    assert all(list(one.columns["labels"]) == [0, 0] for one in answered(question, Coder(BERT, 40)))


def pairs(count: int) -> list[Pair]:
    return [
        Pair("the fox " * (number % 5 + 1), "the dog " * (number % 3 + 1), f"f:{number}") for number in range(count)
    ]


FORMS = [
    ([Pair(f"brown {n}", f"fox {n % 7}", "f") for n in range(3000)], translation),
    ([Pair(f"brown {n}", f"fox {n % 7}", "f") for n in range(3000)], completion),
    ([Pair(f"brown {n}", f"fox {n % 7}", "f") for n in range(3000)], paired),
    ([Labelled(f"late {n}", f"year {n}" if n % 2 else None, "a", "f") for n in range(3000)], labelled),
    ([Tagged(("the", f"fox{n}", "the"), ("O", "B", "O"), "f") for n in range(3000)], tagged),
    ([Question(f"who {n}", "the fox did", (Answer("fox", 4),), "f") for n in range(3000)], answered),
]


@pytest.mark.parametrize(("rows", "encode"), FORMS, ids=[encode.__name__ for _, encode in FORMS])
def test_texts_of_many_rows_are_encoded_together(rows, encode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns are those of one row at a time; the tokenizer is called once for a thousand rows."""
    names = ("a", "O", "B")
    apart = [one for row in rows for one in encode(row, Coder(BPE, 100, 100, names))]
    calls: list[int] = []
    real = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: calls.append(len(texts)) or real(self, texts))
    together = list(encode_all(rows, encode, Coder(BPE, 100, 100, names), Losses()))
    assert together == apart
    assert len(calls) == 3 and sum(calls) >= 3000


def test_columns_are_padded_to_the_longest_of_the_batch() -> None:
    found = gather(encode_all(pairs(20), translation, Coder(BPE, 100, 100), Losses()))
    batch = found.batch([4, 0, 13], {"input_ids": 7, "labels": -100})
    for row, number in enumerate([4, 0, 13]):
        ids = found.columns["input_ids"][number]
        assert batch["input_ids"][row, : len(ids)].tolist() == ids.tolist()
        assert (batch["input_ids"][row, len(ids) :] == 7).all()
        assert batch["attention_mask"][row].sum() == len(ids)
        labels = found.columns["labels"][number]
        assert (batch["labels"][row] != -100).sum() == len(labels)
    assert "attention_mask" not in found.batch([4, 4], {"input_ids": 7, "labels": -100})
    assert found.lengths.tolist() == found.columns["input_ids"].lengths.tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), max_size=5), min_size=1))
def test_a_column_gives_back_its_rows(rows: list[list[int]]) -> None:
    column = Column.of(rows)
    assert [column[number].tolist() for number in range(len(column))] == rows
    assert column.lengths.tolist() == [len(row) for row in rows]


def test_examples_are_encoded_once_and_built_again_when_damaged(tmp_path) -> None:
    calls: list[int] = []

    def build() -> Sides:
        calls.append(1)
        losses, coder = Losses(), Coder(BPE, 6, 100)
        train, valid = (gather(encode_all(pairs(n), translation, coder, losses)) for n in (20, 5))
        return Sides(train, valid, losses.lines(6))

    first = prepare_examples({"a": 1}, tmp_path, build)
    again = prepare_examples({"a": 1}, tmp_path, build)
    assert len(calls) == 1 and again.lines == first.lines and "longer than 6 tokens" in first.lines[0]
    for side in ("train", "valid"):
        ours, theirs = getattr(first, side), getattr(again, side)
        assert ours.hash == theirs.hash and sorted(ours.columns) == sorted(theirs.columns)
        for name, column in ours.columns.items():
            assert np.array_equal(column.values, theirs.columns[name].values)
    (folder,) = tmp_path.iterdir()
    other = prepare_examples({"a": 2}, tmp_path, build)
    assert len(calls) == 2 and other.train.hash == first.train.hash  # made otherwise, but the same
    assert first.train.hash != first.valid.hash
    data = (folder / "examples.safetensors").read_bytes()
    (folder / "examples.safetensors").write_bytes(data[: len(data) // 2])
    assert len(prepare_examples({"a": 1}, tmp_path, build).train) == 20 and len(calls) == 3


def test_floats_stay_floats() -> None:
    found = gather(
        encode_all(
            [Labelled("the fox", None, 0.5, ""), Labelled("a dog", None, 2.0, "")], labelled, Coder(BERT, 9), Losses()
        )
    )
    labels = found.batch([0, 1], {"input_ids": 0})["labels"]
    assert labels.dtype is torch.float32 and labels.tolist() == [0.5, 2.0]
