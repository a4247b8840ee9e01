"""Every objective on examples, in one table: which models can have it, what it reads, which head it needs.

    objective                   reads       a new model is   labels
    causal-lm                   Pair, Chat  decoder          the answer's tokens, one by one
    seq2seq                     Pair        encoder-decoder  the target's tokens
    sequence-classification     Labelled    encoder          a class, several classes, or a number
    token-classification        Tagged      encoder          a class at each word's first token
    span                        Question    encoder          the first and the last token of the answer
    contrastive                 Pair        encoder          the pair's number, at both its texts
    preference                  Preference  decoder          the tokens of two completions, one row each

Objectives on running text are in objectives.py (windows), images in pictures.py; all of them end as a BatchSource.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.data.batches import IGNORE
from headway.data.encode import (
    SECOND,
    Coder,
    Encode,
    Encoded,
    answered,
    completion,
    dialogue,
    framed,
    labelled,
    preferred,
    tagged,
    translation,
)
from headway.data.examples import Examples
from headway.data.forms import Chat, Example, Labelled, Pair, Preference, Question, Tagged
from headway.data.mixture import MixedRows
from headway.errors import ConfigError, InputError
from headway.training.budget import BudgetedExamples, cuts
from headway.training.objectives import ShuffledExamples, TrainingBatch

REFERENCE = "reference"  # the column of two log-likelihoods


class Classes(NamedTuple):
    """What the labels of a data set are: their names, sorted, or a number."""

    names: tuple[str, ...]
    problem: str = "single"


@dataclass(frozen=True)
class Task:
    """An objective on examples.

    Attributes:
        kinds: of models that can have it; the first is that of a new model.
        encode: how each form of example becomes columns.
        head: the head's type; None keeps the model's own language-model head.
        sequence_labels: labels are padded with -100 like the input; else they have one size.
    """

    kinds: tuple[str, ...]
    encode: Mapping[type, Encode]
    head: str | None
    sequence_labels: bool = False


def paired(pair: Pair, coder: Coder) -> Iterator[Encoded]:
    """Two texts that belong together, each on its own."""
    first, _, cut = framed(coder.ids(pair.source), None, coder)
    second, _, more = framed(coder.ids(pair.target), None, coder)
    columns = {"input_ids": first["input_ids"], SECOND["input_ids"]: second["input_ids"]}
    yield Encoded(columns, pair.where, cut + more)


TASKS: Mapping[str, Task] = {
    "causal-lm": Task(("decoder",), {Pair: completion, Chat: dialogue}, None, True),
    "seq2seq": Task(("encoder-decoder",), {Pair: translation}, None, True),
    "sequence-classification": Task(("encoder", "decoder"), {Labelled: labelled}, "sequence-classification"),
    "token-classification": Task(("encoder", "decoder"), {Tagged: tagged}, "token-classification", True),
    "span": Task(("encoder",), {Question: answered}, "span"),
    "contrastive": Task(("encoder", "decoder"), {Pair: paired}, "pooled-embedding"),
    "preference": Task(("decoder",), {Preference: preferred}, None, True),
}
# What an example asks for where nobody names an objective; of several the first that the model's kind can have.
BY_FORM: Mapping[type, tuple[str, ...]] = {
    Pair: ("seq2seq", "causal-lm", "contrastive"),
    Chat: ("causal-lm",),
    Labelled: ("sequence-classification",),
    Tagged: ("token-classification",),
    Question: ("span",),
    Preference: ("preference",),
}


def choose(form: type, objective: str | None, kind: str | None, where: str) -> tuple[str, Task]:
    """The objective for examples of a form and a model of a kind (None: a new one, of any).

    Raises ConfigError where they do not go together.
    """
    names = [objective] if objective is not None else list(BY_FORM.get(form, ()))
    for name in names:
        task = TASKS.get(name)
        if task is not None and form in task.encode and kind in (None, *task.kinds):
            return name, task
    fitting = [name for name, task in TASKS.items() if form in task.encode and kind in (None, *task.kinds)]
    found = f"{objective or 'none named'} for rows of {form.__name__}" + (f" and kind {kind}" if kind else "")
    raise ConfigError("objective", f"{found} ({where})", " or ".join(fitting) or "other data, or another kind of model")


def classes_of(examples: Iterable[Example], known: tuple[str, ...]) -> Classes:
    """The classes that the labels of examples name; `known` fixes their order. Raises InputError for one not in it."""
    names: set[str] = set()
    problem = "single"
    for example in examples:
        if isinstance(example, Tagged):
            names.update(example.tags)
        elif isinstance(example, Labelled):
            if isinstance(example.label, float):
                return Classes((), "regression")
            some = (example.label,) if isinstance(example.label, str) else example.label
            problem = problem if isinstance(example.label, str) else "multi"
            names.update(some)
    strange = sorted(names - set(known))
    if known and strange:
        raise InputError("data.labels", f"the data has {', '.join(strange)[:200]}", f"one of {', '.join(known)[:200]}")
    return Classes(known or tuple(sorted(names, key=_natural)), problem)


def _natural(name: str) -> tuple[bool, float, str]:
    """Numbers in their order, before words."""
    return (not name.isdecimal(), float(name) if name.isdecimal() else 0.0, name)


def head_fields(task: Task, classes: Classes, old: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The head's fields; `old` is a published model's head, whose way of pooling is kept."""
    if task.head is None:
        return None
    if old is not None and old["type"] == task.head and task.head not in ("sequence-classification",):
        return dict(old) | ({"labels": len(classes.names)} if "labels" in old else {})
    out: dict[str, Any] = {"type": task.head}
    if task.head in ("sequence-classification", "pooled-embedding"):
        out["pooling"] = (old or {}).get("pooling", "mean")
    if task.head == "sequence-classification":
        out |= {"labels": len(classes.names) or 1, "problem": classes.problem}
        out |= {key: old[key] for key in ("transform",) if old and old["type"] == task.head and key in old}
    if task.head == "token-classification":
        out["labels"] = len(classes.names)
    return out


class ExampleBatches:
    """How examples become a model's arguments: one collation for training and evaluation."""

    def __init__(self, examples: Examples, task: Task, pad: int) -> None:
        self.examples = examples
        self._pads = {"input_ids": pad, SECOND["input_ids"]: pad, "token_types": 0}
        self._pads |= {"labels": IGNORE, SECOND["labels"]: IGNORE} if task.sequence_labels else {}
        self._reads_target, self._is_causal = task.kinds[0] == "encoder-decoder", task.kinds == ("decoder",)

    def collate(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """These examples; of two texts each is a row, one behind the other.

        Texts that only belong together have their number as label. A decoder's rows have no mask: their padding stands
        behind them, where no token looks, and has no labels.
        """
        inputs = self.examples.batch(ids, self._pads)
        if SECOND["input_ids"] in inputs:
            inputs = self._side_by_side(inputs, ids)
        if self._is_causal:
            inputs.pop("attention_mask", None)
        return inputs

    def _side_by_side(self, inputs: Mapping[str, Tensor], ids: Sequence[int]) -> dict[str, Tensor]:
        both = [name for name in SECOND if SECOND[name] in inputs]
        out = {name: _interleaved([inputs[name], inputs[SECOND[name]]], self._pads[name]) for name in both}
        columns = [self.examples.columns[name].lengths[list(ids)] for name in ("input_ids", SECOND["input_ids"])]
        sizes = torch.from_numpy(np.stack(columns, 1)).flatten()
        out["attention_mask"] = torch.arange(out["input_ids"].shape[1])[None] < sizes[:, None]
        out.setdefault("labels", torch.arange(len(ids)).repeat_interleave(2))
        return {**out, REFERENCE: inputs[REFERENCE].flatten()} if REFERENCE in inputs else out

    def shuffled(
        self, batch_size: int, seed: int, tokenizer_hash: str, mixed: MixedRows | None = None
    ) -> ShuffledExamples[int]:
        """The endless stream for training, rows of similar lengths together; `mixed` are their shares, if of several
        sources."""
        made_of = self.examples.hash if mixed is None else mixed.mixture.sign([self.examples.hash])
        identity = {"data": made_of, "tokenizer": tokenizer_hash}
        numbers = range(len(self.examples))
        lengths = self.examples.lengths
        return ShuffledExamples(numbers, lambda ids, _: self.collate(ids), batch_size, seed, identity, lengths, mixed)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N, K) positions that each example puts through the model, in each of K tables that are padded apart.

        The input; of an encoder-decoder the target too; of a pair both its rows, which are padded alike.
        """
        columns = self.examples.columns
        if SECOND["input_ids"] in columns:
            return 2 * self.examples.lengths[:, None]
        names = ["input_ids", *(["labels"] if self._reads_target else [])]
        return np.stack([columns[name].lengths for name in names], 1)

    def budgeted(self, budget: int, seed: int, tokenizer_hash: str) -> BudgetedExamples[int]:
        """The endless stream for training, in batches of at most `budget` padded tokens. Raises InputError."""
        identity = {"data": self.examples.hash, "tokenizer": tokenizer_hash}
        numbers = range(len(self.examples))
        return BudgetedExamples(numbers, lambda ids, _: self.collate(ids), self.sizes, budget, seed, identity)

    def in_order(
        self, batch_size: int, limit: int, among: range | None = None, budget: int | None = None
    ) -> Iterator[TrainingBatch]:
        """The same `limit` examples every time, spread over all of them or those of `among`, longest first.

        With a `budget` batches hold as many rows as stay within so many padded tokens, and at least one.
        """
        among = range(len(self.examples)) if among is None else among
        count = min(limit, len(among))
        chosen = [among[place * len(among) // count] for place in range(count)]
        lengths = self.examples.lengths
        chosen.sort(key=lambda number: -int(lengths[number]))
        ends = [*range(batch_size, count, batch_size), count]
        if budget is not None:
            ends = cuts(self.sizes[chosen], budget)
        for begin, end in pairwise([0, *ends]):
            ids = chosen[begin:end]
            yield TrainingBatch(self.collate(ids), ids)


def _interleaved(sides: Sequence[Tensor], pad: int) -> Tensor:
    """Rows (B, T) of each side in turn, padded to one length."""
    longest = max(side.shape[1] for side in sides)
    padded = [torch.nn.functional.pad(side, (0, longest - side.shape[1]), value=pad) for side in sides]
    return torch.stack(padded, 1).flatten(0, 1)
