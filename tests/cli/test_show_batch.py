"""`train --show-batch`: what is learned is what is marked, for every shape of labels, on the terminal and as a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from headway.cli.output import Printer
from headway.cli.show_batch import as_html, as_terminal, rows_of
from headway.text import train_tokenizer
from headway.training.objectives import TrainingBatch

WORDS = train_tokenizer(["the quick brown fox"], "byte", 257, special_tokens=["<|endoftext|>"])


def batch(**inputs: list[list[float]]) -> TrainingBatch:
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    return TrainingBatch(tensors, list(range(len(tensors["labels"]))))


def marked(
    made: TrainingBatch, classes: tuple[str, ...] = (), shifted: bool = False
) -> list[list[tuple[str, str, str]]]:
    """Per row and line: its title, the text that is learned, and the labels in place."""
    return [
        [
            (
                line.title,
                "".join(cell.text for cell in line.cells if cell.learned),
                "".join(cell.label for cell in line.cells),
            )
            for line in lines
        ]
        for _, lines in rows_of(made, WORDS, classes, shifted)
    ]


def test_a_decoders_labels_are_the_tokens_that_follow() -> None:
    ids = [*b"ask: yes"]
    made = batch(input_ids=[ids[:-1]], labels=[[*[-100] * 4, *ids[5:]]])
    assert marked(made, shifted=True) == [[("", "yes", "")]]


def test_hidden_tokens_show_what_was_there() -> None:
    made = batch(input_ids=[[*b"a?c"]], labels=[[-100, ord("b"), -100]])
    assert marked(made) == [[("", "?", "b")]]


def test_padding_is_left_out_and_targets_have_a_line() -> None:
    made = batch(input_ids=[[*b"ab", 0, 0]], attention_mask=[[1, 1, 0, 0]], labels=[[*b"xyz", 256, -100]])
    assert marked(made) == [[("", "", ""), ("target", "xyz<|endoftext|>", "")]]


@pytest.mark.parametrize(
    ("labels", "classes", "title"),
    [
        ([1], ("no", "yes"), "yes"),
        ([1, 0, 1], ("a", "b", "c"), "a, c"),
        ([0, 0], ("a", "b"), "none"),
        ([0.5], (), "0.5"),
    ],
)
def test_a_rows_own_label_is_named(labels: list[float], classes: tuple[str, ...], title: str) -> None:
    made = batch(input_ids=[[*b"text"]], labels=[labels] if len(labels) > 1 else labels)
    assert marked(made, classes)[0][-1][0] == f"label: {title}"


def test_words_show_their_tags_and_documents_their_bounds() -> None:
    made = batch(input_ids=[[*b"abc"]], labels=[[0, -100, 1]], documents=[[0, 0, 1]])
    ((_, (line,)),) = list(rows_of(made, WORDS, ("O", "X"), False))
    assert [(cell.label, cell.first) for cell in line.cells] == [("O", False), ("", False), ("X", True)]


def test_a_page_holds_no_markup_of_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    made = batch(input_ids=[[*b"<script>x</script>\x1b[2J"]], labels=[0])
    page = as_html(rows_of(made, WORDS, ("<b>",), False), "batch")
    assert "<script>" not in page and "&lt;b&gt;" in page
    as_terminal(rows_of(made, WORDS, ("<b>",), False), Printer(), True)
    assert "\x1b[2J" not in capsys.readouterr().out


@pytest.mark.parametrize("page", [False, True])
def test_the_command_shows_and_stops(command, tmp_path: Path, page: bool) -> None:
    rows = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = [tmp_path / "batch.html"] if page else []
    said = command(
        "train",
        f"data.path={path}",
        *file,
        "objective=causal-lm",
        "data.val_fraction=0.3",
        "train.batch_size=4",
        "train.steps=2",
        "--show-batch",
        "--output",
        tmp_path / "run",
    )
    assert said.code == 0 and not (tmp_path / "run").exists()
    text = file[0].read_text() if page else said.out
    text = re.sub(r"<[^>]*>", "", text) if page else text.replace("[", "").replace("]", "")
    assert text.count("question") == 4 and text.count("answer") == 4 and "nothing was trained" in said.out
