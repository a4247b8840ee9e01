"""`headway train --show-batch`: the first batch as the model will get it, with what it is to learn set off.

terminal  what is learned is green, what is only read is dim, a bar stands where another document begins
HTML      the same, and at each token its number, its id and its label (`--show-batch FILE.html`)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from headway import files
from headway.cli.output import Printer
from headway.generation.stream import strip_escapes

if TYPE_CHECKING:
    from torch import Tensor

    from headway.text import Tokenizer
    from headway.training.objectives import TrainingBatch

_GREEN, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_VISIBLE = str.maketrans({"\n": "\u21b5\n", "\t": "\u2192\t"})
_STYLE = """
body { font: 14px/1.7 ui-monospace, monospace; margin: 2rem auto; padding: 0 1rem; max-width: 70rem; color: #222;
background: #fff }
h2 { font-size: 1rem; margin: 2rem 0 .3rem } p { white-space: pre-wrap; margin: .2rem 0 } small { color: #666 }
span { border-radius: 3px; padding: 1px 0 } .learned { background: #cdebc9 } .read { color: #666 }
.first { border-left: 3px solid #c33; padding-left: 3px } ins { background: #ffe9a8; text-decoration: none }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd } .learned { background: #1f4d1b }
.read, small { color: #999 } ins { background: #5c4a00 } }
"""


class Cell(NamedTuple):
    """One token: its text, whether it is learned, what is to be said in its place, whether a document begins here."""

    text: str
    learned: bool
    label: str = ""
    first: bool = False
    note: str = ""


class Line(NamedTuple):
    """One sequence of a row, or what belongs to the whole row when there are no cells."""

    title: str
    cells: list[Cell]


def rows_of(
    batch: TrainingBatch, tokenizer: Tokenizer | None, classes: Sequence[str], shifted: bool
) -> Iterator[tuple[str, list[Line]]]:
    """Each row of a batch as (name, lines).

    Args:
        batch: what the loop is given. tokenizer: None for images and sound. classes: names of the labels' numbers.
        shifted: a decoder's labels, each the next token; else labels stand at their own token.
    """
    inputs = batch.inputs
    for number, sample in enumerate(batch.sample_ids):
        each = len(inputs["labels"]) // len(batch.sample_ids)  # two where an example has two texts
        places = range(number * each, number * each + each)
        rows = [{name: tensor[place] for name, tensor in inputs.items()} for place in places]
        lines = [line for row in rows for line in _lines(row, tokenizer, classes, shifted)]
        yield f"row {number}, example {sample}", lines


def _lines(row: Mapping[str, Tensor], tokenizer: Tokenizer | None, classes: Sequence[str], shifted: bool) -> list[Line]:
    labels = row["labels"]
    if tokenizer is None or "input_ids" not in row:
        what, signal = ("image", row["pixel_values"]) if "pixel_values" in row else ("sound", row["input_features"])
        hidden = f"{int((labels[:, 0] >= -1).sum())} of {len(labels)} patches hidden" if labels.ndim == 2 else ""
        return [Line(f"{what} {tuple(signal.shape)}: {hidden or _name(labels, classes)}", [])]
    ids, mask = row["input_ids"], row.get("attention_mask")
    count = _length(ids, labels) if mask is None else int(mask.sum())
    documents = row.get("documents")
    texts = [_text(tokenizer, int(token)) for token in ids[:count]]
    firsts = [i > 0 and documents is not None and bool(documents[i] != documents[i - 1]) for i in range(count)]
    aligned = labels.ndim == 1 and len(labels) == len(ids)
    learned = [False] * count
    said = [""] * count
    if aligned and shifted:
        learned[1:] = [bool(labels[i] >= 0) for i in range(count - 1)]
        last = int(labels[count - 1])
        tail = [Cell(_text(tokenizer, last), True, note="label of the last token")] if last >= 0 else []
    else:
        tail = []
        if aligned:
            learned = [bool(label >= 0) for label in labels[:count]]
            said = [_said(tokenizer, classes, int(label)) if label >= 0 else "" for label in labels[:count]]
    notes = [f"{i}: id {int(ids[i])}" for i in range(count)]
    lines = [Line("", [Cell(*cell) for cell in zip(texts, learned, said, firsts, notes, strict=True)] + tail)]
    if not aligned and labels.ndim == 1 and len(labels) > 2 and not labels.is_floating_point() and not classes:
        target = [int(label) for label in labels if label >= 0]
        lines.append(Line("target", [Cell(_text(tokenizer, label), True, note=f"id {label}") for label in target]))
    elif not aligned:
        lines.append(Line(f"label: {_name(labels, classes)}", []))
    return lines


def _length(ids: Tensor, labels: Tensor) -> int:
    """How many tokens a row has before what fills it up: one token again and again that nothing is to be said to."""
    filled = (ids == ids[-1]) & (labels < 0) if labels.shape == ids.shape else ids != ids
    return len(ids) - int(filled.flip(0).long().cumprod(0).sum())


def _said(tokenizer: Tokenizer, classes: Sequence[str], label: int) -> str:
    return classes[label] if classes else _text(tokenizer, label)


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")


def _name(labels: Tensor, classes: Sequence[str]) -> str:
    values = labels.flatten().tolist()
    if len(values) == 1 and classes:
        return classes[int(values[0])]
    if len(values) == len(classes):
        return ", ".join(name for name, on in zip(classes, values, strict=True) if on) or "none"
    return ", ".join(f"{value:g}" for value in values)


def as_terminal(rows: Iterator[tuple[str, list[Line]]], printer: Printer, colour: bool) -> None:
    """Print rows; without colour what is learned stands in brackets."""
    before, after, dim = (_GREEN, _PLAIN, _DIM) if colour else ("[", "]", "")
    for name, lines in rows:
        printer.say(f"-- {name}")
        for line in lines:
            text = f"{line.title} " if line.title else ""
            for cell in line.cells:
                shown = strip_escapes(cell.text).translate(_VISIBLE) + (f"<{cell.label}>" if cell.label else "")
                bar = "|" if cell.first else ""
                text += bar + (before + shown + after if cell.learned else dim + shown + (after if colour else ""))
            print(text, file=printer.words, flush=True)


def as_html(rows: Iterator[tuple[str, list[Line]]], title: str) -> str:
    """One page without scripts; every text is escaped."""
    parts = [f"<!doctype html><meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style>"]
    legend = (
        "<span class='learned'>learned</span>, <span class='read'>only read</span>, a label <ins>in its place</ins>"
    )
    parts.append(f"<h1>{escape(title)}</h1><p>{legend}; hover over a token for its place and id</p>")
    for name, lines in rows:
        parts.append(f"<h2>{escape(name)}</h2>")
        for line in lines:
            cells = "".join(_cell(cell) for cell in line.cells)
            parts.append(f"<p><small>{escape(line.title)}</small> {cells}</p>")
    return "\n".join(parts) + "\n"


def _cell(cell: Cell) -> str:
    kind = ("learned" if cell.learned else "read") + (" first" if cell.first else "")
    label = f"<ins>{escape(cell.label)}</ins>" if cell.label else ""
    return f"<span class='{kind}' title='{escape(cell.note)}'>{escape(cell.text.translate(_VISIBLE))}{label}</span>"


def show(
    batch: TrainingBatch,
    tokenizer: Tokenizer | None,
    classes: Sequence[str],
    shifted: bool,
    where: str,
    printer: Printer,
) -> None:
    """Show a batch on the terminal, or as a page if `where` names a file. Raises MachineError."""
    rows = rows_of(batch, tokenizer, classes, shifted)
    if where.endswith(".html"):
        files.atomic_write(Path(where), as_html(rows, "The first batch").encode())
        printer.say(f"first batch: {where}")
    else:
        as_terminal(rows, printer, printer.words.isatty())
