"""What a row says: the forms that people keep examples in, recognised by their keys, as typed values.

    form        keys of a row
    Text        text
    Chat        messages | conversations
    Pair        source, target | prompt, completion | instruction, output (, input)
    Labelled    text, label | sentence, label | sentence1, sentence2, label | premise, hypothesis, label | text, labels
    Tagged      tokens, tags | tokens, ner_tags
    Question    question, context, answers
    Preference  prompt, chosen, rejected

The first row decides the form of a file; a later row that does not fit it is an error that names row and key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from headway.data.corpus import place_of
from headway.data.rows import Row
from headway.errors import InputError
from headway.strict import field

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"}
ROLES |= {"gpt": "assistant", "model": "assistant", "bot": "assistant", "tool": "tool", "function": "tool"}


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class Answer(NamedTuple):
    """A stretch of the context, by its first character."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Text:
    """Running text."""

    text: str
    where: str

    def texts(self) -> tuple[str, ...]:
        """What a tokenizer may learn from."""
        return (self.text,)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation in which the assistant speaks at least once."""

    messages: tuple[Message, ...]
    where: str

    def texts(self) -> tuple[str, ...]:
        """The turns' contents; the first user's comes first."""
        ordered = sorted(self.messages, key=lambda one: one.role != "user")
        return tuple(one.content for one in ordered)


@dataclass(frozen=True, slots=True)
class Pair:
    """A source and its target: a translation, or a prompt and its completion."""

    source: str
    target: str
    where: str

    def texts(self) -> tuple[str, ...]:
        """Source and target."""
        return self.source, self.target


@dataclass(frozen=True, slots=True)
class Labelled:
    """One text or two with a class, several classes, or a number."""

    text: str
    second: str | None
    label: str | tuple[str, ...] | float
    where: str

    def texts(self) -> tuple[str, ...]:
        """The texts."""
        return (self.text,) if self.second is None else (self.text, self.second)


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words with a tag each."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    where: str

    def texts(self) -> tuple[str, ...]:
        """The words as one text."""
        return (" ".join(self.tokens),)


@dataclass(frozen=True, slots=True)
class Question:
    """A question and where its answers stand in a context; no answer: the context does not say."""

    question: str
    context: str
    answers: tuple[Answer, ...]
    where: str

    def texts(self) -> tuple[str, ...]:
        """The context and the question; questions on one context stay together."""
        return self.context, self.question


@dataclass(frozen=True, slots=True)
class Preference:
    """Two completions of a prompt, of which people chose one."""

    prompt: str
    chosen: str
    rejected: str
    where: str

    def texts(self) -> tuple[str, ...]:
        """Prompt and completions."""
        return self.prompt, self.chosen, self.rejected


Example = Text | Chat | Pair | Labelled | Tagged | Question | Preference


def _text(row: Row, key: str) -> str:
    value = str(field(row.fields, key, str, row.where))
    if not value.strip():
        raise InputError(f"{row.where} {key}", "empty", "some text", "fill it in, or leave the row out")
    return value


def _list(row: Row, key: str, value: object = None) -> Sequence[object]:
    found = row.fields.get(key) if value is None else value
    if not isinstance(found, list | tuple):
        raise InputError(f"{row.where} {key}", f"{type(found).__name__}", "a list")
    return found


def _message(row: Row, key: str, number: int, value: object, names: tuple[str, str]) -> Message:
    place = f"{row.where} {key}[{number}]"
    role, content = (str(field(value, name, str, place)) for name in names)
    if role not in ROLES:
        raise InputError(f"{place}.{names[0]}", repr(role)[:40], f"one of {', '.join(ROLES)}")
    if not content.strip():
        raise InputError(f"{place}.{names[1]}", "an empty turn", "what was said", "fill it in, or leave the row out")
    return Message(ROLES[role], content)


def _chat(row: Row, keys: tuple[str, ...]) -> Chat:
    (key,) = keys
    turns = _list(row, key)
    first = turns[0] if turns else {}
    names = ("from", "value") if isinstance(first, dict) and "from" in first else ("role", "content")
    messages = tuple(_message(row, key, number, value, names) for number, value in enumerate(turns))
    if not any(message.role == "assistant" for message in messages):
        raise InputError(f"{row.where} {key}", "no assistant turn", "at least one: it is what is learned")
    return Chat(messages, row.where)


def _pair(row: Row, keys: tuple[str, ...]) -> Pair:
    source, target = (_text(row, key) for key in keys)
    more = row.fields.get("input") if keys[0] == "instruction" else None
    if isinstance(more, str) and more.strip():
        source = f"{source}\n\n{more}"
    return Pair(source, target, row.where)


def _labelled(row: Row, keys: tuple[str, ...]) -> Labelled:
    *texts, key = keys
    value = row.fields[key]
    label: str | tuple[str, ...] | float
    if isinstance(value, bool) or not isinstance(value, str | int | float | list):
        raise InputError(f"{row.where} {key}", f"{value!r:.40}", "a name, a number, or a list of names")
    if isinstance(value, list):
        label = tuple(str(item) for item in value if isinstance(item, str | int))
        if len(label) < len(value):
            raise InputError(f"{row.where} {key}", f"{value!r:.60}", "a list of names")
    else:
        label = value if isinstance(value, float) else str(value)
    second = _text(row, texts[1]) if len(texts) > 1 else None
    return Labelled(_text(row, texts[0]), second, label, row.where)


def _tagged(row: Row, keys: tuple[str, ...]) -> Tagged:
    tokens, tags = (tuple(str(item) for item in _list(row, key)) for key in keys)
    if len(tokens) != len(tags) or not tokens:
        raise InputError(f"{row.where} {keys[1]}", f"{len(tags)} tags for {len(tokens)} tokens", "one tag a token")
    return Tagged(tokens, tags, row.where)


def _question(row: Row, keys: tuple[str, ...]) -> Question:
    question, context = _text(row, keys[0]), _text(row, keys[1])
    value = row.fields[keys[2]]
    if isinstance(value, dict):  # SQuAD's published form: {"text": [...], "answer_start": [...]}
        pairs = zip(
            _list(row, keys[2], value.get("text")), _list(row, keys[2], value.get("answer_start")), strict=False
        )
        value = [{"text": text, "answer_start": start} for text, start in pairs]
    answers = []
    for number, item in enumerate(_list(row, keys[2], value)):
        place = f"{row.where} {keys[2]}[{number}]"
        text, start = str(field(item, "text", str, place)), cast("int", field(item, "answer_start", int, place))
        if context[start : start + len(text)] != text or not text or start < 0:
            found = f"{text[:40]!r} is not what stands at character {start}"
            raise InputError(place, found, f"{context[max(start, 0) : max(start, 0) + len(text)][:40]!r} there")
        answers.append(Answer(text, start))
    return Question(question, context, tuple(answers), row.where)


def _preference(row: Row, keys: tuple[str, ...]) -> Preference:
    prompt, chosen, rejected = (_text(row, key) for key in keys)
    return Preference(prompt, chosen, rejected, row.where)


def _plain(row: Row, keys: tuple[str, ...]) -> Text:
    return Text(_text(row, keys[0]), row.where)


class Form(NamedTuple):
    """A way to keep examples: the keys that a row must have, and what makes an example of it."""

    keys: tuple[str, ...]
    make: Callable[[Row, tuple[str, ...]], Example]


# The first whose keys are all there; longer sets of keys stand before those that they contain.
FORMS: tuple[Form, ...] = (
    Form(("prompt", "chosen", "rejected"), _preference),
    Form(("question", "context", "answers"), _question),
    Form(("sentence1", "sentence2", "label"), _labelled),
    Form(("premise", "hypothesis", "label"), _labelled),
    Form(("messages",), _chat),
    Form(("conversations",), _chat),
    Form(("source", "target"), _pair),
    Form(("prompt", "completion"), _pair),
    Form(("instruction", "output"), _pair),
    Form(("tokens", "tags"), _tagged),
    Form(("tokens", "ner_tags"), _tagged),
    Form(("text", "label"), _labelled),
    Form(("text", "labels"), _labelled),
    Form(("sentence", "label"), _labelled),
    Form(("text",), _plain),
)


def form_of(row: Row) -> Form:
    """The form of a row. Raises InputError with the keys there are and those that were looked for."""
    for form in FORMS:
        if all(key in row.fields for key in form.keys):
            return form
    known = "; ".join(", ".join(form.keys) for form in FORMS)
    there = ", ".join(map(str, row.fields))[:200]
    raise InputError(row.where, f"columns {there}", f"one of: {known}", "data.columns.text=COLUMN names one")


def examples(rows: Iterable[Row]) -> Iterator[Example]:
    """Rows as examples, all of the first one's form. Raises InputError naming row and key."""
    form: Form | None = None
    for row in rows:
        form = form or form_of(row)
        missing = [key for key in form.keys if key not in row.fields]
        if missing:
            raise InputError(row.where, f"no {', '.join(missing)}", f"the first row's {', '.join(form.keys)}")
        yield form.make(row, form.keys)


def split(found: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """(training, held-out): by the hash of what an example is about, so that equal sources stand on one side."""
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in found:
        sides[place_of(example.texts()[0]) < fraction].append(example)
    return sides
