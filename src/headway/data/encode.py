"""From one example to the columns of numbers that a model is trained on.

    Pair       source                      target
    decoder    p p p c c c $               labels: x x c c c $   the prompt is read, only the completion is learned
    pair       input_ids p p p $           labels: c c c $       the model shifts them itself (teacher forcing)

An encoder turns an example into `Encoded`: columns of ids, and how many tokens did not fit. What labels look like is
what nn/heads.py asks for; -100 is a place that no loss counts. Nothing here knows of batches or of padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from headway.data.batches import IGNORE
from headway.data.forms import Chat, Example, Labelled, Pair, Preference, Question, Said, Tagged
from headway.errors import InputError
from headway.text.chat import ChatTemplate, special_tokens
from headway.text.tokenizer import Tokenizer

# For a tokenizer that came without a template: roles in words, every turn closed by the end token.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}Assistant:\n{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.role | capitalize }}:\n{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
SECOND = {"input_ids": "second_ids", "labels": "second_labels"}
"""Columns of the other one of two texts."""
WINDOW_STRIDE = 2  # a context too long for one window is read in windows that overlap by half


class Encoded(NamedTuple):
    """One training example.

    Attributes:
        columns: `input_ids`, `labels`, perhaps `token_types`: integers, or floats for a regression's label.
        cut: tokens of the input that did not fit. cut_labels: supervised tokens among them.
        where: file and row.
    """

    columns: Mapping[str, Sequence[int] | Sequence[float]]
    where: str
    cut: int = 0
    cut_labels: int = 0


@dataclass(frozen=True)
class Coder:
    """What encoding depends on besides the example.

    Attributes:
        max_len: most tokens of an input. max_target: most tokens of an encoder-decoder's target.
        labels: the names of the classes, in the order of their numbers.
        token_types: whether the model tells a text's two parts apart (BERT).
    """

    tokenizer: Tokenizer
    max_len: int
    max_target: int = 0
    labels: tuple[str, ...] = ()
    token_types: bool = False
    _ready: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def ahead(self, rows: Iterable[Example]) -> None:
        """Encode the texts of some rows together, on all cores; `ids` finds them until it is called again.

        Conversations, whose texts a template makes, and contexts, whose places count too, are encoded one by one.
        """
        texts = list(dict.fromkeys(text for row in rows for text in _asked(row)))
        self._ready.clear()
        self._ready.update(zip(texts, self.tokenizer.encode_batch(texts), strict=True))

    def ids(self, text: str) -> list[int]:
        """The tokenizer's `encode(text)`."""
        found = self._ready.get(text)
        return self.tokenizer.encode(text) if found is None else found

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each class."""
        return {name: number for number, name in enumerate(self.labels)}

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template, or the plain one."""
        source = self.tokenizer.chat_template or PLAIN_TEMPLATE
        return ChatTemplate(source, special_tokens(self.tokenizer))

    def number(self, label: str, where: str) -> int:
        """The class of that name. Raises InputError for one that the training data does not have."""
        if label not in self.numbers:
            raise InputError(where, f"label {label!r:.60}", f"one of {', '.join(self.labels)[:200]}")
        return self.numbers[label]


def _asked(row: Example) -> Iterable[str]:
    """The texts that the encoders below ask `Coder.ids` for."""
    if isinstance(row, Pair | Labelled):
        return row.texts()
    if isinstance(row, Preference):
        return row.texts() if isinstance(row.prompt, str) else ()
    if isinstance(row, Tagged):
        return _spaced(row.tokens)
    return (row.question,) if isinstance(row, Question) else ()


def _spaced(tokens: Sequence[str]) -> Iterator[str]:
    """Words as they stand in a sentence."""
    return (f" {text}" if number else text for number, text in enumerate(tokens))


def read_by_decoder(prompt: Sequence[int], answer: Sequence[int], coder: Coder, where: str) -> Encoded:
    """One row for next-token prediction in which only `answer` is learned. The prompt loses its beginning first."""
    room = coder.max_len + 1
    kept = list(answer[: room - bool(prompt)])  # the answer's first token needs something to follow from
    before = list(prompt[-(room - len(kept)) :])
    ids = [*before, *kept]
    labels = [IGNORE] * (len(before) - 1) + kept if before else kept[1:]
    lost = len(answer) - len(kept)
    columns = {"input_ids": ids[:-1], "labels": labels}
    return Encoded(columns, where, lost + len(prompt) - len(before), lost)


def _end(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


def beginning(words: Tokenizer) -> list[int]:
    """What a decoder's prompt begins with: the token that begins a text, where the template has one."""
    return [] if words.bos_id is None or words.bos_id not in words.prefix_ids else [words.bos_id]


def filler(words: Tokenizer) -> int:
    """The id that fills rows up to one length."""
    return words.pad_id if words.pad_id is not None else words.eos_id or 0


def completion(pair: Pair, coder: Coder) -> Iterator[Encoded]:
    """A prompt and its completion for a decoder."""
    words = coder.tokenizer
    answer = [*coder.ids(pair.target), *_end(words)]
    yield read_by_decoder([*beginning(words), *coder.ids(pair.source)], answer, coder, pair.where)


def dialogue(chat: Chat, coder: Coder) -> Iterator[Encoded]:
    """A conversation for a decoder: what the assistant wrote is learned, all else is read."""
    yield _spoken(chat, coder)


def preferred(pair: Preference, coder: Coder) -> Iterator[Encoded]:
    """A prompt with each of two completions, which alone are learned."""
    first, second = (_completed(pair, said, coder) for said in (pair.chosen, pair.rejected))
    columns = {**first.columns, **{SECOND[name]: column for name, column in second.columns.items()}}
    yield Encoded(columns, pair.where, first.cut + second.cut, first.cut_labels + second.cut_labels)


def _completed(pair: Preference, said: Said, coder: Coder) -> Encoded:
    if isinstance(pair.prompt, str) or isinstance(said, str):
        return next(completion(Pair(str(pair.prompt), str(said), pair.where), coder))
    before = sum(one.role == "assistant" for one in pair.prompt)
    return _spoken(Chat((*pair.prompt, *said), pair.where), coder, before)


def _spoken(chat: Chat, coder: Coder, before: int = 0) -> Encoded:
    """A conversation, of whose assistant's turns the first `before` are only read."""
    words, template = coder.tokenizer, coder.template
    messages = [{"role": one.role, "content": one.content} for one in chat.messages]
    names = [words.token(number) or "" for number in sorted(words.special_ids)]
    segments = template.segments(messages, control=names)
    edges = [edge for span in template.spans(messages)[before:] for edge in span]
    ids: list[int] = []
    labels: list[int] = []
    for number, part in enumerate(_cut_at(segments, edges)):
        some = words.encode_segments(part)
        ids += some
        labels += some if number % 2 else [IGNORE] * len(some)
    kept, learned = ids[: coder.max_len + 1], labels[: coder.max_len + 1]
    lost = sum(label != IGNORE for label in labels[len(kept) :])
    columns = {"input_ids": kept[:-1], "labels": learned[1:]}
    return Encoded(columns, chat.where, len(ids) - len(kept), lost)


def _cut_at(segments: Sequence[tuple[str, bool]], edges: Sequence[int]) -> list[list[tuple[str, bool]]]:
    """Segments parted at character places: outside, inside, outside, ..."""
    parts: list[list[tuple[str, bool]]] = [[]]
    at, waiting = 0, list(edges)
    for text, control in segments:
        rest = text
        while waiting and waiting[0] <= at + len(rest):
            take = waiting.pop(0) - at
            if rest[:take]:
                parts[-1].append((rest[:take], control))
            parts.append([])
            at, rest = at + take, rest[take:]
        if rest:
            parts[-1].append((rest, control))
            at += len(rest)
    return parts


def translation(pair: Pair, coder: Coder) -> Iterator[Encoded]:
    """Source and target for an encoder-decoder; the target ends with the end token."""
    words = coder.tokenizer
    source = coder.ids(pair.source)
    room = coder.max_len - len(words.prefix_ids) - len(words.suffix_ids or _end(words))
    ids = [*words.prefix_ids, *source[:room], *(words.suffix_ids or _end(words))]
    target = [*coder.ids(pair.target), *_end(words)]
    labels = target[: coder.max_target]
    lost = len(target) - len(labels)
    yield Encoded({"input_ids": ids, "labels": labels}, pair.where, max(len(source) - room, 0) + lost, lost)


def frame(words: Tokenizer, is_pair: bool) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The ids before one text or two, between them, and behind; without a template two are parted by the end token."""
    if not is_pair:
        return words.prefix_ids, (), words.suffix_ids
    before, between, after = words.pair_ids
    return before, between or tuple(_end(words)), after


def framed(first: Sequence[int], second: Sequence[int] | None, coder: Coder) -> tuple[dict[str, list[int]], int, int]:
    """One or two texts inside the tokenizer's template: columns, where the second begins, and tokens cut.

    Two texts that do not fit lose from the longer one, as BERT's did (arXiv:1810.04805).
    """
    words = coder.tokenizer
    before, between, after = frame(words, second is not None)
    a, b = list(first), list(second or ())
    room = max(coder.max_len - len(before) - len(between) - len(after), 1)
    over = max(len(a) + len(b) - room, 0)
    keep = min(len(a), max(room // 2, room - len(b)))
    a, b = a[:keep], b[: room - keep]
    half = (len(between) + 1) // 2  # RoBERTa has two marks between, the first of which closes the first text
    head = [*before, *a, *between[:half]]
    tail = [*between[half:], *b, *after]
    columns = {"input_ids": [*head, *tail] or _end(words)}
    if coder.token_types:
        columns["token_types"] = [0] * len(head) + [int(second is not None)] * len(tail)
    return columns, len(head) + len(between) - half, over


def labelled(row: Labelled, coder: Coder) -> Iterator[Encoded]:
    """One text or two, and a class, several classes, or a number."""
    second = None if row.second is None else coder.ids(row.second)
    columns, _, cut = framed(coder.ids(row.text), second, coder)
    yield Encoded({**columns, "labels": _label(row, coder)}, row.where, cut)


def _label(row: Labelled, coder: Coder) -> Sequence[int] | Sequence[float]:
    if isinstance(row.label, str):
        return [coder.number(row.label, row.where)]
    if isinstance(row.label, tuple):
        chosen = {coder.number(name, row.where) for name in row.label}
        return [int(number in chosen) for number in range(len(coder.labels))]
    return [float(row.label)]


def tagged(row: Tagged, coder: Coder) -> Iterator[Encoded]:
    """One label per word, at its first token; the word's other tokens and the template's are not counted."""
    words = coder.tokenizer
    ids, labels = list(words.prefix_ids), [IGNORE] * len(words.prefix_ids)
    end, room = list(words.suffix_ids), coder.max_len - len(words.suffix_ids)
    cut = lost = 0
    for text, spaced, tag in zip(row.tokens, _spaced(row.tokens), row.tags, strict=True):
        label = coder.number(tag, row.where)
        some = coder.ids(spaced) or coder.ids(text)
        if len(ids) + len(some) > room:
            cut, lost, room = cut + len(some), lost + 1, len(ids)  # nothing more comes behind the first that is cut
            continue
        ids += some
        labels += [label] + [IGNORE] * (len(some) - 1) if some else []
    columns = {"input_ids": ids + end, "labels": labels + [IGNORE] * len(end)}
    yield Encoded(columns, row.where, cut, lost)


class Window(NamedTuple):
    """A question in front of a part of its context.

    Attributes:
        columns: the model's input. offset: where the part begins in it. first: its first token's number in the context.
        spans: (start, stop) in characters of the context, of each token of the part.
    """

    columns: dict[str, list[int]]
    offset: int
    first: int
    spans: list[tuple[int, int]]


def question_windows(row: Question, coder: Coder) -> Iterator[Window]:
    """The context in windows that overlap by half where one does not hold it; the question is cut to half a window."""
    words = coder.tokenizer
    question = coder.ids(row.question)[: coder.max_len // 2]
    spans = words.encode_spans(row.context)
    room = max(coder.max_len - len(question) - sum(map(len, frame(words, True))), 1)
    step = max(room // WINDOW_STRIDE, 1)
    for first in range(0, max(len(spans) - room, 0) + step, step):
        part = spans[first : first + room]
        columns, offset, _ = framed(question, [number for number, _, _ in part], coder)
        yield Window(columns, offset, first, [(start, stop) for _, start, stop in part])
        if first + room >= len(spans):
            return


def answered(row: Question, coder: Coder) -> Iterator[Encoded]:
    """Windows of a context: start and end of the answer in each, or the first token where it is not.

    A question without an answer has the first token too (SQuAD 2.0, arXiv:1806.03822).
    """
    for window in question_windows(row, coder):
        inside = []
        if row.answers:
            start, stop = row.answers[0].start, row.answers[0].start + len(row.answers[0].text)
            inside = [place for place, (left, right) in enumerate(window.spans) if right > start and left < stop]
            whole = bool(inside) and window.spans[inside[0]][0] <= start and window.spans[inside[-1]][1] >= stop
            inside = inside if whole else []
        labels = [window.offset + inside[0], window.offset + inside[-1]] if inside else [0, 0]
        yield Encoded({**window.columns, "labels": labels}, row.where)


@dataclass
class Losses:
    """What encoding cut away, in counts and the first places."""

    examples: int = 0
    cut: int = 0
    cut_labels: int = 0
    empty: int = 0
    places: list[str] = field(default_factory=list)

    def see(self, one: Encoded) -> None:
        """Count one example."""
        self.examples += 1
        self.cut += one.cut > 0
        self.cut_labels += one.cut_labels > 0
        if one.cut and len(self.places) < 5:
            self.places.append(one.where)

    def lines(self, max_len: int) -> list[str]:
        """Sentences for the user."""
        if not self.cut:
            return []
        lost = f", {self.cut_labels} of them lose labels" if self.cut_labels else ""
        return [
            f"{self.cut} of {self.examples} examples are longer than {max_len} tokens{lost}: {', '.join(self.places)}"
        ]


Encode = Callable[[Any, Coder], Iterator[Encoded]]
