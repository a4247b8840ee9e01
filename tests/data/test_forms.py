"""Rows as examples: each form by its keys, each mistake by its row, each example on one side for ever."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data.corpus import place
from headway.data.forms import (
    FORMS,
    Answer,
    Chat,
    Form,
    Labelled,
    Message,
    Pair,
    Preference,
    Question,
    Tagged,
    Text,
    examples,
    form_of,
    split,
    split_key,
)
from headway.data.rows import Row
from headway.data.sources import Piece, ReadReport
from headway.errors import InputError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SAID = (Message("user", "hi"), Message("assistant", "hello"))
OTHER = [TURNS[0], {"role": "assistant", "content": "what?"}]
PREFERENCE = Preference(SAID[:1], SAID[1:], (Message("assistant", "what?"),), "f:1")
GOOD = [
    ({"text": "a"}, Text("a", "f:1")),
    ({"messages": TURNS}, Chat((Message("user", "hi"), Message("assistant", "hello")), "f:1")),
    (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        Chat((Message("user", "hi"), Message("assistant", "hello")), "f:1"),
    ),
    ({"source": "a", "target": "b"}, Pair("a", "b", "f:1")),
    ({"prompt": "a", "completion": "b"}, Pair("a", "b", "f:1")),
    ({"instruction": "a", "input": "", "output": "b"}, Pair("a", "b", "f:1")),
    ({"instruction": "a", "input": "c", "output": "b"}, Pair("a\n\nc", "b", "f:1")),
    ({"text": "a", "label": "x"}, Labelled("a", None, "x", "f:1")),
    ({"text": "a", "label": 3}, Labelled("a", None, "3", "f:1")),
    ({"text": "a", "label": 0.5}, Labelled("a", None, 0.5, "f:1")),
    ({"text": "a", "labels": ["x", "y"]}, Labelled("a", None, ("x", "y"), "f:1")),
    ({"premise": "a", "hypothesis": "b", "label": "x"}, Labelled("a", "b", "x", "f:1")),
    ({"tokens": ["a", "b"], "tags": ["O", "B-X"]}, Tagged(("a", "b"), ("O", "B-X"), "f:1")),
    (
        {"question": "q", "context": "a bc", "answers": {"text": ["bc"], "answer_start": [2]}},
        Question("q", "a bc", (Answer("bc", 2),), "f:1"),
    ),
    ({"question": "q", "context": "a bc", "answers": []}, Question("q", "a bc", (), "f:1")),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, Preference("a", "b", "c", "f:1")),
    ({"messages": TURNS, "tools": [{"name": "f"}]}, Chat(SAID, "f:1", ({"name": "f"},))),
    ({"messages": TURNS, "tools": None}, Chat(SAID, "f:1")),
    (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "hello"}]},
        Chat((Message("system", "s"), Message("assistant", "hello")), "f:1"),
    ),
    ({"instruction": "a", "output": "b", "text": "a b"}, Pair("a", "b", "f:1")),  # Alpaca has a text beside
    ({"instruction": "a", "input": None, "output": "b"}, Pair("a", "b", "f:1")),
    ({"sentence": "a", "label": -1}, Labelled("a", None, "-1", "f:1")),
    ({"text": "a", "labels": []}, Labelled("a", None, (), "f:1")),
    ({"text": "a", "labels": [2, "y"]}, Labelled("a", None, ("2", "y"), "f:1")),
    ({"text": "a", "score": "2.5"}, Labelled("a", None, 2.5, "f:1")),
    ({"text": "a", "score": 3}, Labelled("a", None, 3.0, "f:1")),
    ({"sentence1": "a", "sentence2": "b", "score": 1e-3}, Labelled("a", "b", 0.001, "f:1")),
    ({"question": "a", "sentence": "b", "label": 0}, Labelled("a", "b", "0", "f:1")),  # not sentence and label alone
    ({"question1": "a", "question2": "b", "label": 0}, Labelled("a", "b", "0", "f:1")),
    ({"tokens": ["a"], "ner_tags": [7], "text": "a"}, Tagged(("a",), ("7",), "f:1")),
    (
        {"question": "q", "context": "é🙂bc", "answers": [{"text": "bc", "answer_start": 2}] * 2},
        Question("q", "é🙂bc", (Answer("bc", 2), Answer("bc", 2)), "f:1"),
    ),
    (
        {"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}},
        Question("q", "c", (), "f:1"),
    ),
    ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": OTHER[1:]}, PREFERENCE),
    ({"prompt": "hi", "chosen": TURNS, "rejected": OTHER}, PREFERENCE),  # UltraFeedback's
]


@pytest.mark.parametrize(("fields", "wanted"), GOOD)
def test_a_row_is_known_by_its_keys(fields: dict[str, object], wanted: object) -> None:
    assert list(examples([Row({**fields, "id": 7}, "f:1")])) == [wanted]
    assert wanted.texts()[0]  # type: ignore[attr-defined]


BAD = [
    ({"a": 1}, "columns a; expected one of: text; messages; .*; prompt, chosen, rejected. Fix"),
    ({"text": 1}, "text"),
    ({"text": " "}, "empty"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant turn"),
    (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]},
        r"\[1\].content.*empty turn",
    ),
    ({"messages": [{"role": "nobody", "content": "hi"}]}, r"messages\[0\].role.*'nobody'"),
    ({"messages": "hi"}, "str; expected a list"),
    ({"text": "a", "label": True}, "label"),
    ({"text": "a", "labels": [["x"]]}, r"labels\[0\]: \['x'\]; expected text"),
    ({"tokens": ["a"], "tags": []}, "0 tags for 1 tokens"),
    (
        {"question": "q", "context": "a bc", "answers": [{"text": "bc", "answer_start": 1}]},
        "'bc' is not what stands at",
    ),
    ({"question": "q", "context": "a bc", "answers": [{"text": "c", "answer_start": -1}]}, "is not what stands"),
    ({}, "columns ; expected one of"),
    ({"text": None}, "'text' is null; expected a string"),
    ({"text": ""}, "text: empty"),
    ({"messages": []}, "messages: no turn"),
    ({"messages": [*TURNS, "bye"]}, r"messages\[2\]: is a string; expected an object"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]: key 'content' is missing"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: key 'content' is null"),
    ({"messages": [{"role": "asistant", "content": "x"}]}, "did you mean 'assistant'"),
    ({"messages": [*TURNS, {"from": "gpt", "value": "x"}]}, r"messages\[2\]: key 'role' is missing"),
    ({"conversations": [{"from": "human", "value": "\n"}]}, r"conversations\[0\].value: an empty turn"),
    ({"messages": TURNS, "tools": ["f"]}, "tools: .*a list of objects"),
    ({"source": "a", "target": ["b"]}, "'target' is an array"),
    ({"source": "a", "target": "\u3000"}, "target: empty"),
    ({"instruction": "a", "input": 3, "output": "b"}, "'input' is an integer"),
    ({"text": "a", "label": None}, "label: None; expected a class"),
    ({"text": "a", "label": ["x"]}, "label: .*expected a class"),
    ({"text": "a", "label": ""}, "label: empty"),
    ({"text": "a", "label": float("nan")}, "label: nan; expected a finite number"),
    ({"text": "a", "labels": "x"}, "labels: str; expected a list"),
    ({"text": "a", "labels": [0.5]}, r"labels\[0\]: 0.5"),
    ({"text": "a", "labels": [True]}, r"labels\[0\]: True"),
    ({"text": "a", "score": "high"}, "score: 'high'; expected a finite number"),
    ({"text": "a", "score": "1e999"}, "score: '1e999'; expected a finite number"),
    ({"text": "a", "score": True}, "score: True; expected a finite number"),
    ({"text": "a", "score": None}, "score: None; expected a finite number"),
    ({"premise": "a", "hypothesis": " ", "label": 0}, "hypothesis: empty"),
    ({"tokens": "a b", "tags": ["O"]}, "tokens: str; expected a list"),
    ({"tokens": [], "tags": []}, "0 tags for 0 tokens"),
    ({"tokens": ["a", ""], "tags": ["O", "O"]}, r"tokens\[1\]: empty"),
    ({"tokens": ["a", 3], "tags": ["O", "O"]}, r"tokens\[1\]: 3; expected text"),
    ({"tokens": ["a"], "tags": [0.5]}, r"tags\[0\]: 0.5"),
    ({"question": "q", "context": "abc", "answers": "a"}, "answers: str; expected a list"),
    (
        {"question": "q", "context": "abc", "answers": {"text": ["a"]}},
        "answers.answer_start: NoneType; expected a list",
    ),
    (
        {"question": "q", "context": "abc", "answers": {"text": ["a"], "answer_start": [0, 1]}},
        "2 starts for 1 texts",
    ),
    (
        {"question": "q", "context": "abc", "answers": [{"text": "a", "answer_start": "0"}]},
        "'answer_start' is a string",
    ),
    ({"question": "q", "context": "abc", "answers": [{"text": "", "answer_start": 0}]}, "is not what stands"),
    ({"question": "q", "context": "abc", "answers": [{"text": "cd", "answer_start": 2}]}, "out of the context"),
    ({"question": "q", "context": "abc", "answers": [{"text": "c", "answer_start": 10**30}]}, "Fix: answer_start: 2"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected: the same as chosen"),
    ({"prompt": "a", "chosen": "b", "rejected": 3}, "rejected: int; expected a list"),
    ({"prompt": "a", "chosen": "b", "rejected": TURNS}, "a mixture of texts and lists"),
    ({"prompt": TURNS, "chosen": "b", "rejected": "c"}, "a mixture of texts and lists"),
    ({"prompt": TURNS, "chosen": TURNS, "rejected": OTHER}, "nothing behind the prompt"),
    ({"prompt": [], "chosen": TURNS, "rejected": OTHER}, "prompt: no turn"),
    ({"prompt": "a", "chosen": TURNS, "rejected": TURNS[:1]}, "rejected: no assistant turn"),
    ({"source": "a", "target": "b", "messages": TURNS}, r"both chat \(messages\) and pair \(source, target\)"),
]


@pytest.mark.fault("R19")
@pytest.mark.parametrize(("fields", "message"), BAD)
def test_a_mistake_is_named_by_its_row(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        list(examples([Row(fields, "rows.jsonl:4")]))
    assert "rows.jsonl:4" in str(caught.value)


def test_later_rows_have_the_first_ones_form() -> None:
    rows = [Row({"text": "a", "label": "x"}, "f:1"), Row({"text": "b"}, "f:2"), Row({"text": "c", "label": 0}, "f:3")]
    with pytest.raises(InputError, match="f:2: no label; expected the first row's text, label"):
        list(examples(rows))
    report = ReadReport()
    assert [one.where for one in examples(rows, skipped=report)] == ["f:1", "f:3"]
    assert report.lines() == ["1 bad rows skipped: f:2: no label"]
    with pytest.raises(InputError, match="f:9: columns x"):  # no row says what the form is
        list(examples([Row({"x": 1}, "f:9")], skipped=report))


def test_a_form_may_be_named() -> None:
    both = {"source": "a", "target": "b", "messages": TURNS}
    assert form_of(both, name="pair").keys == ("source", "target")
    assert list(examples([Row(both, "f:1")], "chat")) == [Chat(SAID, "f:1")]
    assert list(examples([Row(both, "f:1")], form_of(both, name="pair"))) == [Pair("a", "b", "f:1")]
    assert list(examples([Row({"text": "a", "label": "x"}, "f:1")], "text")) == [Text("a", "f:1")]
    with pytest.raises(InputError, match="f:1: columns text; expected one of: source, target; prompt, completion"):
        list(examples([Row({"text": "a"}, "f:1")], "pair"))
    with pytest.raises(InputError, match="form: 'pairs'; did you mean 'pair'"):
        list(examples([Row(both, "f:1")], "pairs"))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.keys))
def test_every_set_of_keys_is_found_among_others(form: Form) -> None:
    fields = dict.fromkeys(form.keys, "x")
    assert form_of(fields) == form_of({"id": 1, **fields}) == form
    assert form_of({"text": "x", **fields}).name == form.name


def labels(*values: object) -> list[object]:
    rows = [Row({"text": "a", "label": value}, f"f:{place}") for place, value in enumerate(values, 1)]
    return [one.label for one in examples(rows)]  # type: ignore[union-attr]


@pytest.mark.fault("R19")
def test_labels_are_all_classes_or_all_numbers() -> None:
    assert labels(0, 1, 10) == ["0", "1", "10"]
    assert labels("pos", 1) == ["pos", "1"]
    assert labels(0.5, 1, -2.0) == [0.5, 1.0, -2.0]
    for wrong, found in (((1, 0.5), "0.5; expected a class"), ((0.5, "1"), "'1'; expected a number")):
        with pytest.raises(InputError, match=f"f:2 label: {found}, as in the rows before. Fix: data.columns.score"):
            labels(*wrong)


def test_the_key_is_the_source() -> None:
    keys = {
        Text("a", ""): b"a",
        Pair("é", "t", ""): "é".encode(),
        Labelled("a", None, "x", ""): b"a",
        Labelled("a", "b", "x", ""): b"a\0b",
        Tagged(("a", "b"), ("O", "O"), ""): b"a b",
        Question("q", "c", (), ""): b"c",
        Chat((Message("system", "s"), *SAID), ""): b"hi",
        Chat((Message("system", "s"), SAID[1]), ""): b"s",
        Preference("a", "b", "c", ""): b"a",
        PREFERENCE: b"hi",
    }
    for example, key in keys.items():
        assert split_key(example) == key
        (side,) = (number for number, some in enumerate(split([example], 0.5)) if some)
        rank = int.from_bytes(hashlib.blake2b(key, digest_size=6).digest()) / 2**48
        assert side == (rank < 0.5)
        assert rank == place(Piece(key.decode(), "", True, True)), "the rule of documents"


def test_nobody_else_decides_a_side() -> None:
    texts = [f"text {number}" for number in range(300)]
    for other in ({"label": "x", "where": "f:1"}, {"label": "y", "where": "g:9"}):
        _, valid = split([Labelled(text, None, other["label"], other["where"]) for text in texts], 0.2)
        assert [one.text for one in valid] == [text for text in texts if split([Text(text, "")], 0.2)[1]]
    assert split([Text("a", "")], 0.0)[1] == [] and split([Text("a", "")], 1.0)[0] == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=60), st.text(min_size=1, max_size=6))
def test_an_example_keeps_its_side_whatever_is_added(sources: list[str], new: str) -> None:
    found = [Pair(source, str(number), "") for number, source in enumerate(sources)]
    train, valid = split(found, 0.3)
    assert {pair.source for pair in train}.isdisjoint(pair.source for pair in valid)
    more = split([Pair(new, "x", ""), *found], 0.3)
    assert [p for p in more[0] if p.target != "x"] == train and [p for p in more[1] if p.target != "x"] == valid


def test_the_share_held_out_is_what_was_asked() -> None:
    _, valid = split([Text(f"text {number}", "") for number in range(5000)], 0.1)
    assert len(valid) == pytest.approx(500, abs=4 * (5000 * 0.1 * 0.9) ** 0.5)
