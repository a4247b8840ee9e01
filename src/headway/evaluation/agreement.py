"""Whether two forms of one model agree: the same tokens, the same logits, the same greedy text.

    found = agree(load("model"), load("model.gguf"))
    found.agrees, found.first, [(row.name, row.difference) for row in found.rows]

Converting, merging, quantizing and serving are each meant to leave the answers alone, and each goes wrong in its own
way: a token's id moved, a template left behind, another rope theta, a layer lost. Every check is one row of the result
with what was compared, how much of it, and the largest difference. A model that writes reads its prompt at once and
A's greedy answer token by token through the cache, so that both ways of running it are covered; B hears A's tokens, so
that logits are compared on one text to the end. Everything is fixed: the texts, the pseudo-random pixels and sounds,
the order. Inputs, positions and tokens are counted from 1 in what is said. Left out: gradients, token types.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from headway.config import ModelConfig
from headway.errors import ConfigError, InputError
from headway.generation.options import GenerationOptions
from headway.generation.prompts import Prompt, end_ids, prepare
from headway.generation.session import Session, inference
from headway.nn import Transformer
from headway.nn.packed import exact
from headway.run_config import flatten
from headway.text import Tokenizer
from headway.text.chat import ChatTemplate, special_tokens

EXACT = 1e-4
"""Allowed share of the largest logit where both compute alike: float32 sums in another order."""
ROUGH = {torch.float16: 3e-2, torch.bfloat16: 0.2}
"""The same where the dtypes differ and one has 16 bits. SmolLM2-135M against float32, the worst of 964 positions:
float16 0.012, bfloat16, eight times as coarse, 0.10. Both loaded in float32 tell a wrong weight from rounding."""
SIGNALS = 4
"""Pseudo-random images, sounds, or token sequences where there is no tokenizer."""
_BATCH = 1 << 26  # logits of the prompts that are read together: 256 MB
_BLOCK = 1 << 22  # logits compared at once in float64
# Where these differ the answers have nothing to do with each other.
_ALIKE = "kind d_model head.type head.labels head.projection embeddings.patch.image embeddings.patch.channels"
_ALIKE += " embeddings.audio.bins embeddings.audio.frames"
# These act in training alone.
_TRAINING = ("init.", "dropout", "attention.dropout", "feed_forward.experts.balance", "head.temperature")
_CHOOSING = ("causal-lm", "masked-lm", "token-classification", "image-classification")

_TEXTS = (
    "Once upon a time there was a lighthouse keeper who|The capital of Portugal is| |Q: A train leaves at 9:40 and "
    "arrives at 13:05. How long is the journey?\nA:|def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n"
    "    return|SELECT name, COUNT(*) FROM orders WHERE price >= 12.50 GROUP BY|3 + 4 = 7\n12 + 30 = 42\n256 + 512 =|"
    '{"id": 7, "tags": ["red", "blue"], "size":|Der Zug nach Köln fährt heute um 17 Uhr von Gleis|Le chat dort sur le '
    "canapé pendant que la pluie|El río baja crecido después de la tormenta y los vecinos|Утром над рекой стоял "
    "густой туман, и|今日はとても天気がいいので、公園まで|人工智能正在改变我们的|ذهب الولد إلى المدرسة في|"
    "हर सुबह वह चाय पीकर|오늘 저녁에는 친구들과 함께|WARNING!!! DO NOT open the box -- it's 100% full of bees 🐝🐝|"
    "Dear Ms. O'Neill,\n\nThank you for your letter of 3 March. We regret to inform you that"
)
PROMPTS: tuple[str, ...] = (*_TEXTS.split("|"), _TEXTS)
"""What is read where no prompts are given; the last is as long as all others together."""
_ASK: dict[str, object] = {"role": "user", "content": "What is the tallest mountain in Spain?"}
_ANSWER: dict[str, object] = {"role": "assistant", "content": "Mount Teide, on Tenerife: 3,715 m."}
_ALSO: dict[str, object] = {"role": "user", "content": "  Und in Österreich? 🏔\n<|im_end|></s>[INST] <|endoftext|>"}
CONVERSATIONS: tuple[tuple[list[dict[str, object]], bool], ...] = (
    ([_ASK], True),
    ([{"role": "system", "content": "Answer briefly."}, _ASK, _ANSWER, _ALSO], True),
    ([_ASK, _ANSWER], False),
)
"""Messages, and whether the header of an answer follows. The second holds what only looks like control tokens."""
_WORDS = (
    "Hello don't WE'LL I'm naïve e\u0301 Å ﬁ Ⅷ İi ß straße CamelCaseWord x² ½ µ … – “q” ¿qué? 中文字 日本語 カタカナ "
    "한국어 العربية עברית हिन्दी ไทย Ελλάς Россия ქართული አማርኛ 😀 👩\u200d👩\u200d👧 🇩🇪 👍🏽 ❤\ufe0f \u200d ∑∫√ ═╬ ﷺ 𝔘𝔫𝔦"
)
_PIECES = (
    "0 7 12 123 1234 12345 123456789 1,234.56 3.14159 -1 1e-5 0x1F 12:34 2024-02-29 ١٢٣ 1st 50% $9.99 10^6 a1b2 x==y "
    "x!=y x->y i++ -- /* // # @f('/x') {{}} [[]] <br/> &amp; \\n \\\\ \" ' ` ``` |> ~/ u@example.org C:\\dir\\f.txt "
    "https://example.org/a?b=c&d=%20#e f(x)[0].y ... !!! ?! ---- **** ____ $x$ \\frac{1}{2} <s> </s> <unk> <pad> "
    "<mask> [CLS] [SEP] [MASK] [UNK] <|endoftext|> <|im_start|>user <|im_end|> <bos> <0x0A> ▁ ▁a Ġ Ġa ##ing @@ </w> "
    "<extra_id_0>"
)
_SPACES = "| |  |   |\t|\n|\n\n|\r\n| \n |\t |\u00a0|\u3000|\u200b|\u2028|\ufeff|\x00"


def hard_strings() -> list[str]:
    """Short texts on which tokenizers part: white space, case, marks, scripts, digits, signs, look-alikes, runs."""
    texts = [f"{space}a{space}{space}B{space}" for space in _SPACES.split("|")]
    texts += [form for word in _WORDS.split(" ") for form in (word, f" {word}{word}.")]
    texts += _PIECES.split(" ")
    return texts + [unit * n for unit in (" ", "\n", "-", "a", "1", "é", "日", "😀") for n in (2, 3, 4, 7, 33)]


class Form(Protocol):
    """What is compared: a `loading.Loaded`, or anything that has these."""

    @property
    def model(self) -> Transformer:
        """The model."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, if it reads text."""

    @property
    def config(self) -> ModelConfig:
        """Its config."""

    @property
    def path(self) -> Path:
        """Its name in errors."""


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        name: tokens, vocabulary, chat template, logits, top-1, greedy text.
        compared: what was compared. count: how many of that.
        difference: of logits the largest, as a share of A's largest in the same sequence; in the other rows how many
            differ. None where there is no such number: nothing was compared, or logits are not numbers.
        limit: the largest difference that passes. passed: None where nothing was compared.
        detail: the first difference, or why nothing was compared.
        figures: of logits max_absolute, mean_kl and max_kl (A||B, nats); of top-1 the share in which both agree, and
            near_ties, the positions where they do not but A's two tokens lie within the tolerance; of greedy text
            near_ties and, of the first token that differs, prompt, token, ids and texts (a, b, a_text, b_text) and by
            how much each side's logit of its own token exceeds that of the other's (a_gap, b_gap).
    """

    name: str
    compared: str
    count: int
    difference: float | None
    limit: float
    passed: bool | None
    detail: str = ""
    figures: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Agreement:
    """What was found.

    Attributes:
        rows: the checks. tolerance: the one of logits. notes: what the reader should know besides.
        config_differences: fields of the configs, by dotted name, that differ and act at inference. Forms may spell one
            model in two ways and agree; where they do not agree, the cause is often here.
    """

    rows: list[Row]
    tolerance: float
    notes: list[str]
    config_differences: dict[str, tuple[object, object]]

    @property
    def first(self) -> Row | None:
        """The first row that failed."""
        return next((row for row in self.rows if row.passed is False), None)

    @property
    def agrees(self) -> bool:
        """No row failed."""
        return self.first is None


class _Input(NamedTuple):
    """What both read: a prompt with room for an answer, or an image or a sound (1, ...)."""

    number: int
    prompt: Prompt
    signal: Tensor | None = None


Progress = Callable[[str, int, int], None]


def agree(
    a: Form,
    b: Form,
    prompts: Sequence[str] | None = None,
    *,
    max_tokens: int = 32,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> Agreement:
    """Compare two forms of one model, of any kind.

    Args:
        a: the form that counts as right. b: the other. Both may be on any device and in any dtype.
        prompts: texts instead of PROMPTS; those longer than the context lose their beginning.
        max_tokens: of greedy text, per prompt.
        tolerance: allowed difference of logits as a share of A's largest in the same sequence, and the lead up to which
            two tokens count as tied; 0 asks for equality to the bit. By default see `usual_tolerance`.
        progress: called with (what is being done, steps done, steps in all).

    Raises:
        ConfigError: max_tokens or tolerance out of range. InputError: models of different kinds or sizes; prompts that
            hold no token.
    """
    options = GenerationOptions(max_tokens=max_tokens, temperature=0.0, truncate="left")
    limit = usual_tolerance(a.model, b.model) if tolerance is None else tolerance
    if not 0 <= limit < math.inf:
        raise ConfigError("tolerance", str(limit), "a share of the largest logit, 0 or more", f"--tolerance {EXACT}")
    tokenizers = [form.tokenizer for form in (a, b) if form.tokenizer is not None]
    reader = tokenizers[0] if tokenizers else None
    differences, vocab = _check_alike(a, b, max((one.vocab_size for one in tokenizers), default=sys.maxsize))
    texts, tell = PROMPTS if prompts is None else prompts, progress or (lambda what, done, total: None)
    notes: list[str] = []
    inputs = _inputs(a, b, texts, options, reader, notes)
    rows, head = list(_compare_text(a, b, texts)), a.config.head.type
    sayable = min([vocab, *(one.vocab_size for one in tokenizers)])
    ends = [end_ids(form.config, form.tokenizer or reader, options) if reader else frozenset[int]() for form in (a, b)]
    with inference(a.model), inference(b.model), exact():
        if head == "causal-lm":
            parts = list(_written(a, b, inputs, vocab, sayable, ends[0], tell))
        else:
            parts = []
            for one in inputs:
                both = [_logits(form, one)[:, : vocab if head == "masked-lm" else None] for form in (a, b)]
                parts.append(_measured([one.number] * len(both[0]), 0, both, both[0].shape[1]))
                tell("logits", len(parts), len(inputs))
    table = torch.cat(parts)
    table = table[table[:, 0].argsort(stable=True)]
    is_choice = head in _CHOOSING or getattr(a.config.head, "problem", "") == "single"
    rows += _compare_logits(table, limit, is_choice=is_choice)
    rows += [_compare_greedy(a, b, table, ends, limit)] if head == "causal-lm" else []
    return Agreement(rows, limit, notes, differences)


def usual_tolerance(a: Transformer, b: Transformer) -> float:
    """ROUGH where the dtypes differ and one has 16 bits, else EXACT: packed weights compute as float32 ones do."""
    one, other = ({t.dtype for t in model.state_dict().values() if t.is_floating_point()} for model in (a, b))
    return max((ROUGH.get(dtype, EXACT) for dtype in one | other), default=EXACT) if one != other else EXACT


def _check_alike(a: Form, b: Form, tokens: int) -> tuple[dict[str, tuple[object, object]], int]:
    """The fields in which the configs differ, and how many rows both tables have; more than `tokens` only pad.

    Raises InputError.
    """
    one, other = (flatten(form.config.model_dump(mode="json")) for form in (a, b))
    vocab = min(a.config.vocab_size, b.config.vocab_size)
    for key in [*_ALIKE.split(), *(["vocab_size"] if tokens > vocab else [])]:
        if one.get(key) != other.get(key):
            expected = f"{one.get(key)} as in {a.path}"
            raise InputError(str(b.path), f"{key} {other.get(key)}", expected, "compare two forms of one model")
    keys = [key for key in {**one, **other} if not key.startswith(_TRAINING)]
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}, vocab


def _inputs(
    a: Form, b: Form, texts: Sequence[str], options: GenerationOptions, reader: Tokenizer | None, notes: list[str]
) -> list[_Input]:
    """What both models read. Raises InputError."""
    config = min(a.config, b.config, key=lambda c: c.max_len)
    patch, audio = config.embeddings.patch, config.embeddings.audio
    room, generator = min(options.max_tokens, config.max_len), torch.Generator().manual_seed(0)
    if patch is not None or audio is not None:
        sizes = [patch.channels, patch.image, patch.image] if patch else [audio.bins, audio.frames] if audio else []
        signals = (torch.randn(1, *sizes, generator=generator) for _ in range(SIGNALS))
        return [_Input(number, Prompt([0], "", room), signal) for number, signal in enumerate(signals, 1)]
    if reader is None:
        notes.append("no tokenizer on either side: pseudo-random token ids instead of prompts")
        length = max(min(config.max_len // 2, 24), 1)
        drawn = torch.randint(min(a.config.vocab_size, b.config.vocab_size), (SIGNALS, length), generator=generator)
        room = min(room, config.max_len - length)
        return [_Input(number, Prompt(ids, "", room)) for number, ids in enumerate(drawn.tolist(), 1)]
    found = [(number, ids) for number, text in enumerate(texts, 1) if (ids := _encoded(reader, text))]
    if not found:
        raise InputError("prompts", f"no token in {len(texts)} of them", "at least one text")
    out = [_Input(number, prepare(ids, f"prompt {number}", config, reader, options)) for number, ids in found]
    cut = ", ".join(str(one.number) for one in out if one.prompt.truncated)
    notes += [f"prompts cut to the context of {config.max_len}: {cut}"] if cut else []
    notes += [f"prompts without a token, which are not run: {len(texts) - len(out)}"] if len(out) < len(texts) else []
    return out


# --- tokens and templates ----------------------------------------------------------------------------------------


def _encoded(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """The ids, or None where the tokenizer refuses the text: then both must."""
    try:
        return tokenizer.encode_input(text)
    except InputError:
        return None


def _compare_text(a: Form, b: Form, prompts: Sequence[str]) -> Iterator[Row]:
    one, other = a.tokenizer, b.tokenizer
    if one is None or other is None:
        if one is not other:
            yield Row("tokens", "nothing", 0, None, 0, None, f"{'B' if one else 'A'} has no tokenizer")
        return
    texts = [*prompts, *hard_strings()]
    read = ((text, _encoded(one, text), _encoded(other, text)) for text in texts)
    found = [f"{_quoted(text)}, {_parting(one, other, ours, theirs)}" for text, ours, theirs in read if ours != theirs]
    yield _counted("tokens", f"{len(prompts)} prompts, {len(texts) - len(prompts)} hard strings", len(texts), found)
    size = min(one.vocab_size, other.vocab_size)
    both = ((i, one.token_bytes(i), other.token_bytes(i)) for i in range(size))
    # A GGUF file has no gaps: llama.cpp's converter fills them with tokens of this name, which no text becomes.
    moved = ((i, p, q) for i, p, q in both if p != q and {p, q} != {b"", f"[PAD{i}]".encode()})
    found = [f"id {i}: {_quoted(p)} against {_quoted(q)}" for i, p, q in moved]
    yield _counted("vocabulary", f"{size:,} ids", size, found)
    if one.chat_template is not None or other.chat_template is not None:
        found = []
        for number, (x, y) in enumerate(zip(_conversations(one), _conversations(other), strict=True), 1):
            if (place := _place(x[0], y[0])) is not None:
                parting = f"character {place + 1}: {_quoted(x[0][place:])} against {_quoted(y[0][place:])}"
                found.append(f"conversation {number}, {parting}")
            elif x[1] != y[1]:
                found.append(f"conversation {number}, {_parting(one, other, x[1], y[1])}")
        yield _counted("chat template", f"{len(CONVERSATIONS)} conversations", len(CONVERSATIONS), found)


def _conversations(tokenizer: Tokenizer) -> Iterator[tuple[str, list[int] | None]]:
    """Text and ids of each conversation; empty without a template, and no ids where the template refuses."""
    template = ChatTemplate(tokenizer.chat_template or "", special_tokens(tokenizer))
    for chat, prompt in CONVERSATIONS:
        text = ""
        try:
            text = template.render(chat, add_generation_prompt=prompt)
            yield text, template.encode(tokenizer, chat, add_generation_prompt=prompt)
        except InputError:
            yield text, None


def _counted(name: str, compared: str, count: int, found: list[str]) -> Row:
    """The row of a check in which nothing may differ."""
    return Row(name, compared, count, len(found), 0, not found, found[0] if found else "")


def _parting(one: Tokenizer, other: Tokenizer, x: list[int] | None, y: list[int] | None) -> str:
    """Where two lists of ids part; None is a refusal."""
    if x is None or y is None:
        return f"refused by {'A' if x is None else 'B'}"
    place = _place(x, y) or 0
    return f"token {place + 1}: {_shown(one, x, place)} against {_shown(other, y, place)}"


def _place(x: Sequence[object], y: Sequence[object]) -> int | None:
    """Where two sequences first differ, or one ends."""
    return next((place for place, (p, q) in enumerate(zip_longest(x, y)) if p != q), None)


def _shown(tokenizer: Tokenizer | None, ids: Sequence[int], place: int) -> str:
    """`17 ' the'`."""
    if place >= len(ids):
        return "the end"
    return f"{ids[place]} {_quoted(tokenizer.token_bytes(ids[place]))}" if tokenizer else str(ids[place])


def _quoted(text: str | bytes) -> str:
    shown = text.decode(errors="replace") if isinstance(text, bytes) else text
    return repr(shown if len(shown) <= 30 else f"{shown[:30]}...")


# --- logits and greedy text --------------------------------------------------------------------------------------


def _logits(form: Form, one: _Input) -> Tensor:
    """Logits of every position, or the one vector of a pooling head, of a model that does not write: (rows, width)."""
    like = next(form.model.parameters())
    if one.signal is not None:
        logits: Tensor = form.model(pixel_values=one.signal.to(like)).logits
    else:
        logits = form.model(torch.tensor([one.prompt.ids], device=like.device)).logits
    return logits.flatten(0, -2)


def _written(
    a: Form, b: Form, inputs: Sequence[_Input], vocab: int, sayable: int, ends: frozenset[int], tell: Progress
) -> Iterator[Tensor]:
    """`_measured` of both while they read the prompts and A's greedy answers."""
    waiting = sorted(inputs, key=lambda one: len(one.prompt.ids), reverse=True)
    total, done = sum(one.prompt.room for one in inputs), 0
    while waiting:
        group = [waiting.pop()]
        while waiting and len(waiting[-1].prompt.ids) * (len(group) + 1) * vocab <= _BATCH:
            group.append(waiting.pop())
        sessions = [_session(form, group, vocab) for form in (a, b)]
        read = [session.prefill(everywhere=True) for session in sessions]
        logits = [session.last(x) for session, x in zip(sessions, read, strict=True)]
        for row, one in enumerate(() if a.model.is_pair else group):
            numbers = [one.number] * (len(one.prompt.ids) - 1)  # the last place is the first of the answer
            yield _measured(numbers, 0, [x[row, : len(numbers)] for x in read], sayable)
        step = 0
        while group:
            step, done = step + 1, done + len(group)
            tell("logits and greedy text", done, total)
            yield _measured([one.number for one in group], step, logits, sayable)
            best = logits[0][:, :sayable].argmax(-1).cpu()
            places = [i for i, one in enumerate(group) if step < one.prompt.room and int(best[i]) not in ends]
            for session in sessions if 0 < len(places) < len(group) else ():
                session.reorder(torch.tensor(places, device=session.device))
            group = [group[place] for place in places]
            logits = [session.next(best[places].to(session.device)) for session in sessions] if group else []


def _session(form: Form, group: Sequence[_Input], vocab: int) -> Session:
    session = Session(form.model, [one.prompt for one in group], vocab)
    if signals := [one.signal for one in group if one.signal is not None]:
        # A session reads tokens: what the encoder makes of a sound is put where the session remembers its states.
        start = torch.zeros(len(group), 1, dtype=torch.long, device=session.device)
        heard = form.model(input_features=torch.cat(signals).to(next(form.model.parameters())), decoder_input_ids=start)
        session.cache.encoder_hidden = heard.encoder_hidden
    return session


def _measured(numbers: list[int], step: int, both: Sequence[Tensor], sayable: int) -> Tensor:
    """Logits of both (rows, width) at positions of the inputs with these numbers, compared: (rows, 12) float64.

    Columns: input; which token of the answer is chosen there, 0 in the prompt; largest difference, where it is, A and B
    there; A's largest |logit|; KL(A||B); the choice of A and of B among the first `sayable`; by how much A and B prefer
    their own choice to the other's. A logit that is no number makes the difference none.
    """
    out = [torch.empty(0, 12, dtype=torch.float64)]
    rows = max(_BLOCK // both[0].shape[1], 1)
    for start in range(0, len(numbers), rows):
        x, y = (side[start : start + rows].cpu().double() for side in both)
        worst, place = (x - y).abs().max(-1)
        log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
        p, q = x[:, :sayable].argmax(-1), y[:, :sayable].argmax(-1)
        (x_at, x_p, x_q), (y_at, y_p, y_q) = (
            side.gather(1, torch.stack((place, p, q), 1)).unbind(1) for side in (x, y)
        )
        named = torch.tensor(numbers[start : start + rows]), torch.full_like(p, step)
        largest = x.abs().nan_to_num(0, 0, 0).amax(-1)
        found = (*named, worst, place, x_at, y_at, largest, divergence, p, q, x_p - x_q, y_q - y_p)
        out.append(torch.stack([column.double() for column in found], 1))
    return torch.cat(out)


def _scale(table: Tensor) -> Tensor:
    """A's largest |logit| of the input that each position belongs to."""
    number, largest = table[:, 0].long(), table[:, 6]
    return largest.new_zeros(int(number.max()) + 1).scatter_reduce(0, number, largest, "amax")[number].clamp(min=1e-12)


def _compare_logits(table: Tensor, limit: float, *, is_choice: bool) -> Iterator[Row]:
    """The rows that sum up `_measured`; `is_choice`: the logits of a position are one distribution."""
    number, _, worst, place, x, y, _, divergence, p, q, lead, _ = table.unbind(1)
    count, scale = len(table), _scale(table)
    # Negated, so that what is no number is beyond every limit.
    beyond = ~(worst <= limit * scale)
    figures: dict[str, object] = {"max_absolute": _finite(worst.max())}
    if is_choice:
        figures |= {"mean_kl": _finite(divergence.mean()), "max_kl": _finite(divergence.max())}
    detail = ""
    for row in beyond.nonzero()[:1, 0].tolist():
        detail = f"{_where(number, row)}, logit {int(place[row])}: {float(x[row]):.6g} against {float(y[row]):.6g}"
    compared, largest = f"{count:,} positions of {len(set(number.tolist()))} inputs", _finite((worst / scale).max())
    yield Row("logits", compared, count, largest, limit, not detail, detail, figures)
    if is_choice:
        tied = (p != q) & (lead <= limit * scale)
        wrong = (p != q) & ~tied
        detail = ""
        for row in wrong.nonzero()[:1, 0].tolist():
            detail = f"{_where(number, row)}: {int(p[row])} against {int(q[row])}, {float(lead[row]):.3g} behind in A"
        figures = {"agreement": float((p == q).double().mean()), "near_ties": int(tied.sum())}
        yield Row("top-1", f"{count:,} positions", count, int(wrong.sum()), 0, not detail, detail, figures)


def _where(number: Tensor, row: int) -> str:
    """`input 3, position 7`."""
    return f"input {int(number[row])}, position {row + 1 - int((number < number[row]).sum())}"


def _finite(value: float | Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None


def _compare_greedy(a: Form, b: Form, table: Tensor, ends: Sequence[frozenset[int]], limit: float) -> Row:
    """Each answer up to its first difference; after a tie two texts part with equal right."""
    parted, ties = dict[int, tuple[str, dict[str, object]]](), set[int]()
    said = table[:, 1] > 0
    for row, scale in zip(table[said].tolist(), _scale(table)[said].tolist(), strict=True):
        number, step, p, q = (int(row[column]) for column in (0, 1, 8, 9))
        stops = [p in some for some in ends]
        if number in parted or number in ties or (p == q and stops[0] == stops[1]):
            continue
        if p != q and row[10] <= limit * scale:
            ties.add(number)
            continue
        words = [f.tokenizer.decode([i], skip_special=False) if f.tokenizer else "" for f, i in ((a, p), (b, q))]
        shown = f"{p} {_quoted(words[0])} against {q} {_quoted(words[1])}, ahead by {row[10]:.3g} and {row[11]:.3g}"
        if p == q:
            shown = f"{p} {_quoted(words[0])} ends the text of {'A' if stops[0] else 'B'} alone"
        gaps: dict[str, object] = {"a_gap": _finite(row[10]), "b_gap": _finite(row[11])}
        told = {"prompt": number, "token": step, "a": p, "b": q, "a_text": words[0], "b_text": words[1], **gaps}
        parted[number] = f"prompt {number}, token {step}: {shown}", told
    detail, figures = next(iter(parted.values()), ("", {}))
    count = int(said.sum())
    compared = f"{count:,} tokens of {len(set(table[said, 0].tolist()))} texts"
    return Row("greedy text", compared, count, len(parted), 0, not parted, detail, {"near_ties": len(ties), **figures})
