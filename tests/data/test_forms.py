"""Rows as examples: each form by its keys, each mistake by its row, each example on one side for ever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.data.forms import (
    Answer,
    Chat,
    Labelled,
    Message,
    Pair,
    Preference,
    Question,
    Tagged,
    Text,
    examples,
    split,
)
from headway.data.rows import Row
from headway.errors import InputError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
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
]


@pytest.mark.parametrize(("fields", "wanted"), GOOD)
def test_a_row_is_known_by_its_keys(fields: dict[str, object], wanted: object) -> None:
    assert list(examples([Row({**fields, "id": 7}, "f:1")])) == [wanted]
    assert wanted.texts()[0]  # type: ignore[attr-defined]


BAD = [
    ({"a": 1}, "columns a; expected one of: prompt, chosen"),
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
    ({"text": "a", "labels": [["x"]]}, "a list of names"),
    ({"tokens": ["a"], "tags": []}, "0 tags for 1 tokens"),
    (
        {"question": "q", "context": "a bc", "answers": [{"text": "bc", "answer_start": 1}]},
        "'bc' is not what stands at",
    ),
    ({"question": "q", "context": "a bc", "answers": [{"text": "c", "answer_start": -1}]}, "is not what stands"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_a_mistake_is_named_by_its_row(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        list(examples([Row(fields, "rows.jsonl:4")]))
    assert "rows.jsonl:4" in str(caught.value)


def test_later_rows_have_the_first_ones_form() -> None:
    rows = [Row({"text": "a", "label": "x"}, "f:1"), Row({"text": "b"}, "f:2")]
    with pytest.raises(InputError, match="f:2: no label; expected the first row's text, label"):
        list(examples(rows))


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
