"""What a row says: the forms that people keep examples in, recognised by their keys, as typed values.

    rows --> the first one's form (_TABLE: the keys that tell it) --> Text, Chat, Pair, Labelled, ...

The first row decides the form of a data set; a later row that does not fit it is an error that names row and key.
Values have strict types: text is text and not white space alone. A label is a class (a name, or a whole number by its
digits), a list of them (`labels`) or a number (a float, or whatever stands under `score`); which number a class has is
not decided here. Left out: calls of tools inside a conversation, and contents that are not text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

from headway.data.corpus import place_of
from headway.data.rows import Row
from headway.data.sources import ReadReport
from headway.errors import InputError, nearest
from headway.strict import field

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"}
ROLES |= {"gpt": "assistant", "model": "assistant", "bot": "assistant", "tool": "tool", "function": "tool"}
"""What a turn's role may be called, and what it is called from then on."""
_SOURCE_END = "\0"  # between two parts of a split's key


class Message(NamedTuple):
    """One turn of a conversation: role is system, user, assistant or tool; content is not empty."""

    role: str
    content: str


class Answer(NamedTuple):
    """A stretch of the context and the number of its first character: context[start:start + len(text)] == text."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Text:
    """Running text. `where`, here and below, is `file:row`."""

    text: str
    where: str

    def texts(self) -> tuple[str, ...]:
        """What a tokenizer may learn from."""
        return (self.text,)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation in which the assistant speaks at least once; `tools` are JSON schemas of functions."""

    messages: tuple[Message, ...]
    where: str
    tools: tuple[Mapping[str, object], ...] = ()

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
    """One text or two with a class (str), several classes (tuple, perhaps empty), or a finite number (float)."""

    text: str
    second: str | None
    label: str | tuple[str, ...] | float
    where: str

    def texts(self) -> tuple[str, ...]:
        """The texts."""
        return (self.text,) if self.second is None else (self.text, self.second)


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words with a tag each; at least one."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    where: str

    def texts(self) -> tuple[str, ...]:
        """The words as one text."""
        return (" ".join(self.tokens),)


@dataclass(frozen=True, slots=True)
class Question:
    """A question and where its answers stand in a context; no answer: the context does not say (arXiv:1806.03822)."""

    question: str
    context: str
    answers: tuple[Answer, ...]
    where: str

    def texts(self) -> tuple[str, ...]:
        """The context and the question; questions on one context stay together."""
        return self.context, self.question


Said = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two different completions of a prompt, of which people chose one: three texts, or three lists of turns.

    Turns of chosen and rejected are those behind the prompt's.
    """

    prompt: Said
    chosen: Said
    rejected: Said
    where: str

    def texts(self) -> tuple[str, ...]:
        """Prompt and completions."""
        return tuple(text for said in (self.prompt, self.chosen, self.rejected) for text in _contents(said))


Example = Text | Chat | Pair | Labelled | Tagged | Question | Preference


def _contents(said: Said) -> tuple[str, ...]:
    return (said,) if isinstance(said, str) else tuple(one.content for one in said)


# --- one row ---------------------------------------------------------------------------------------------------


def _checked_text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(place, f"{value!r:.40}", "text")
    if not value.strip():
        raise InputError(place, "empty", "some text", "fill it in, or leave the row out")
    return value


def _text(row: Row, key: str) -> str:
    return _checked_text(field(row.fields, key, str, row.where), f"{row.where} {key}")


def _list(value: object, place: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise InputError(place, f"{type(value).__name__}", "a list")
    return value


def _name(value: object, place: str) -> str:
    """A class: a name, or a whole number as its digits."""
    return str(value) if type(value) is int else _checked_text(value, place)


def _turn(value: object, names: tuple[str, str], place: str) -> Message:
    role, content = (str(field(value, name, str, place)) for name in names)
    if role not in ROLES:
        raise InputError(f"{place}.{names[0]}", f"{role!r:.40}{nearest(role, ROLES)}", f"one of {', '.join(ROLES)}")
    if not content.strip():
        raise InputError(f"{place}.{names[1]}", "an empty turn", "what was said", "fill it in, or leave the row out")
    return Message(ROLES[role], content)


def _turns(row: Row, key: str) -> tuple[Message, ...]:
    """A list of {"role", "content"}, or of ShareGPT's {"from", "value"}."""
    place = f"{row.where} {key}"
    found = _list(row.fields[key], place)
    first = found[0] if found else None
    names = ("from", "value") if isinstance(first, dict) and "from" in first else ("role", "content")
    turns = tuple(_turn(value, names, f"{place}[{number}]") for number, value in enumerate(found))
    if not turns or (key != "prompt" and not any(turn.role == "assistant" for turn in turns)):
        found_none = f"no {'assistant ' if turns else ''}turn"
        raise InputError(place, found_none, "at least one: it is what is learned", "leave the row out")
    return turns


def _plain(row: Row, keys: tuple[str, ...]) -> Text:
    return Text(_text(row, keys[0]), row.where)


def _chat(row: Row, keys: tuple[str, ...]) -> Chat:
    tools = row.fields.get("tools") or ()
    if not all(isinstance(tool, dict) for tool in _list(tools, f"{row.where} tools")):
        raise InputError(f"{row.where} tools", f"{tools!r:.60}", "a list of objects")
    return Chat(_turns(row, keys[0]), row.where, tuple(cast("Sequence[Mapping[str, object]]", tools)))


def _pair(row: Row, keys: tuple[str, ...]) -> Pair:
    source, target = (_text(row, key) for key in keys)
    if keys[0] == "instruction":  # Alpaca's: an input that may be empty
        more = str(field(row.fields, "input", (str, type(None)), row.where) or "")
        source = f"{source}\n\n{more}" if more.strip() else source
    return Pair(source, target, row.where)


def _labelled(row: Row, keys: tuple[str, ...]) -> Labelled:
    *texts, key = keys
    value, place = row.fields[key], f"{row.where} {key}"
    label: str | tuple[str, ...] | float
    if key == "labels":
        label = tuple(_name(item, f"{place}[{number}]") for number, item in enumerate(_list(value, place)))
    elif key == "score" or isinstance(value, float):
        label = _number(value, place)
    elif type(value) is int or isinstance(value, str):
        label = _name(value, place)
    else:
        raise InputError(place, f"{value!r:.40}", "a class as text or a whole number, or a number for a regression")
    second = _text(row, texts[1]) if len(texts) > 1 else None
    return Labelled(_text(row, texts[0]), second, label, row.where)


def _number(value: object, place: str) -> float:
    """A finite number, also in digits: all that .csv and .tsv hold is text."""
    try:
        number = math.nan if isinstance(value, bool) else float(cast("str", value))
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(place, f"{value!r:.40}", "a finite number")
    return number


def _tagged(row: Row, keys: tuple[str, ...]) -> Tagged:
    places = [f"{row.where} {key}" for key in keys]
    tokens, tags = (_list(row.fields[key], place) for key, place in zip(keys, places, strict=True))
    if len(tokens) != len(tags) or not tokens:
        raise InputError(places[1], f"{len(tags)} tags for {len(tokens)} tokens", "one tag a token, and a token")
    words = tuple(_checked_text(token, f"{places[0]}[{number}]") for number, token in enumerate(tokens))
    return Tagged(words, tuple(_name(tag, f"{places[1]}[{number}]") for number, tag in enumerate(tags)), row.where)


def _question(row: Row, keys: tuple[str, ...]) -> Question:
    question, context = _text(row, keys[0]), _text(row, keys[1])
    value, place = row.fields[keys[2]], f"{row.where} {keys[2]}"
    if isinstance(value, dict):  # SQuAD as it is published in columns: {"text": [...], "answer_start": [...]}
        texts, starts = (_list(value.get(key), f"{place}.{key}") for key in ("text", "answer_start"))
        if len(texts) != len(starts):
            raise InputError(place, f"{len(starts)} starts for {len(texts)} texts", "one start a text")
        value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    answers = (_answer(item, context, f"{place}[{number}]") for number, item in enumerate(_list(value, place)))
    return Question(question, context, tuple(answers), row.where)


def _answer(value: object, context: str, place: str) -> Answer:
    text, start = str(field(value, "text", str, place)), cast("int", field(value, "answer_start", int, place))
    if start < 0 or not text or context[start : start + len(text)] != text:
        found = f"{text[:40]!r} is not what stands at character {start}"
        there = f"{context[max(start, 0) : max(start, 0) + len(text)][:40]!r} there"
        at = context.find(text) if text else -1
        raise InputError(place, found, there, f"answer_start: {at}" if at >= 0 else "an answer out of the context")
    return Answer(text, start)


def _preference(row: Row, keys: tuple[str, ...]) -> Preference:
    prompt, chosen, rejected = (
        _text(row, key) if isinstance(row.fields[key], str) else _turns(row, key) for key in keys
    )
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        # UltraFeedback repeats the prompt, a text, as the first turn of both lists.
        prompt = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        chosen, rejected = (_behind(prompt, turns) for turns in (chosen, rejected))
    elif not all(isinstance(said, str) for said in (prompt, chosen, rejected)):
        raise InputError(row.where, "a mixture of texts and lists of turns", "all texts, or all lists of turns")
    if not chosen or not rejected or chosen == rejected:
        found = "the same as chosen" if chosen == rejected else "nothing behind the prompt"
        raise InputError(f"{row.where} rejected", found, "two different completions", "leave the row out")
    return Preference(prompt, chosen, rejected, row.where)


def _behind(prompt: tuple[Message, ...], turns: tuple[Message, ...]) -> tuple[Message, ...]:
    return turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns


# --- all rows --------------------------------------------------------------------------------------------------


Make = Callable[[Row, tuple[str, ...]], Example]


class Form(NamedTuple):
    """A way to keep examples: its name, the keys that a row must have, and what makes an example of a row with them."""

    name: str
    keys: tuple[str, ...]
    make: Make


# Names of columns as GLUE's tasks, SNLI, MultiNLI, Alpaca, ShareGPT, CoNLL 2003 and SQuAD have them.
_TABLE: Mapping[str, tuple[Make, str]] = {
    "text": (_plain, "text"),
    "chat": (_chat, "messages | conversations"),
    "pair": (_pair, "source target | prompt completion | instruction output"),
    "labelled": (
        _labelled,
        "text label | sentence label | sentence1 sentence2 label | premise hypothesis label | question1 question2 label"
        " | question sentence label | text labels | text score | sentence1 sentence2 score",
    ),
    "tagged": (_tagged, "tokens tags | tokens ner_tags"),
    "question": (_question, "question context answers"),
    "preference": (_preference, "prompt chosen rejected"),
}
FORMS = tuple(
    Form(name, tuple(keys.split()), make) for name, (make, sets) in _TABLE.items() for keys in sets.split(" | ")
)
"""Every form with every set of keys that it is kept under; of one name the first set that is there counts."""


def form_of(fields: Mapping[str, object], where: str = "row", name: str | None = None) -> Form:
    """The form whose keys are all there.

    Keys that are part of another form's do not count, nor does a text beside anything else that is a form: Alpaca's
    rows have one.

    Args:
        fields: of a row. where: of it. name: of the form, if that is known.

    Raises:
        InputError: no form, with the keys there are and the forms that were looked for; or several.
    """
    if name is not None and name not in _TABLE:
        raise InputError("form", f"{name!r:.40}{nearest(name, _TABLE)}", f"one of {', '.join(_TABLE)}")
    wanted = [form for form in FORMS if name in (None, form.name)]
    fitting = [form for form in wanted if all(key in fields for key in form.keys)]
    largest = [one for one in fitting if not any(set(one.keys) < set(other.keys) for other in fitting)]
    found = [form for form in largest if form.name != "text"] or largest
    there = ", ".join(map(str, fields))[:200]
    if not found:
        known = "; ".join(", ".join(form.keys) for form in wanted)
        raise InputError(where, f"columns {there}", f"one of: {known}", "data.columns.text=COLUMN names one")
    if len({form.name for form in found}) > 1:
        several = " and ".join(f"{form.name} ({', '.join(form.keys)})" for form in found)
        raise InputError(where, f"columns {there}: both {several}", "one form", "leave the other's columns out")
    return found[0]


def examples(
    rows: Iterable[Row], form: str | Form | None = None, skipped: ReadReport | None = None
) -> Iterator[Example]:
    """Rows as examples, all of the first one's form, with labels all of the first one's kind.

    Args:
        rows: what `read_rows` gives.
        form: its name, or the form itself, if it is known.
        skipped: counts rows that do not fit, which are then left out; without it they are errors.

    Raises InputError naming row and key.
    """
    chosen = form if isinstance(form, Form) else None
    kind: type | None = None
    for row in rows:
        chosen = chosen or form_of(row.fields, row.where, cast("str | None", form))
        try:
            example = _fitted(row, chosen, kind)
        except InputError as error:
            if skipped is None:
                raise
            skipped.bad_row(f"{error.where}: {error.found}")
            continue
        if isinstance(example, Labelled):
            kind = type(example.label)
        yield example


def _fitted(row: Row, form: Form, kind: type | None) -> Example:
    missing = [key for key in form.keys if key not in row.fields]
    if missing:
        raise InputError(row.where, f"no {', '.join(missing)}", f"the first row's {', '.join(form.keys)}")
    example = form.make(row, form.keys)
    if not isinstance(example, Labelled) or kind in (None, type(example.label)):
        return example
    value = row.fields[form.keys[-1]]
    if kind is float and type(value) is int:  # 3 among 2.5 and 4.5
        return replace(example, label=float(value))
    expected = f"a {'number' if kind is float else 'class'}, as in the rows before"
    fix = "data.columns.score=label if all labels are numbers"
    raise InputError(f"{row.where} {form.keys[-1]}", f"{value!r:.40}", expected, fix)


# --- the two sides ---------------------------------------------------------------------------------------------


def split_key(example: Example) -> bytes:
    """What decides the side of an example, in UTF-8: equal keys never stand on both sides.

    The source of a Pair, the text or texts of a Labelled, the context of a Question, the first user's turn of a Chat
    (without one the first turn), the prompt of a Preference, the words of a Tagged, the text of a Text.
    """
    return _source(example).encode()


def _source(example: Example) -> str:
    if isinstance(example, Labelled):
        return _SOURCE_END.join(example.texts())
    if isinstance(example, Preference):
        return _SOURCE_END.join(_contents(example.prompt))
    return example.texts()[0]


def split(found: Iterable[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """(training, held-out), each in order: by the hash of `split_key`, as corpus.place has it for documents.

    About `fraction` (0 to 1) of the different keys is held out. Adding or removing examples moves no other.
    """
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in found:
        sides[place_of(_source(example)) < fraction].append(example)
    return sides
