"""A conversation: questions in, answers as streams, what is remembered of it and what is left out when it is long.

Messages become token ids through the model's chat template, so what a user types never holds a control token. Nothing
is read twice: the cache of the last answer serves the next question (session.Memory). Only text; no tools, no images.
"""

from __future__ import annotations

import secrets
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

from headway import files
from headway.errors import InputError
from headway.generation.decode import generate
from headway.generation.options import GenerationOptions
from headway.generation.prompts import check_can_generate
from headway.generation.session import Memory, beginning
from headway.nn.model import Transformer
from headway.strict import dump_json, field, strict_json
from headway.text.chat import ChatTemplate, Message
from headway.text.tokenizer import Tokenizer

MAX_FILE = 1 << 26
# A full context is thinned out to this share, so that not every further question makes it overflow again: then the
# prompt would begin differently each time, and all of it would be read anew.
_KEPT = 0.75


class Reply(NamedTuple):
    """An answer.

    Attributes:
        text: what was written. finish_reason: stop, length (max_tokens or the context), or cut (interrupted).
        prompt_tokens: what the model was given; `reused_tokens` of them were in its cache already.
        generated_tokens: with the one that ended the text. seconds: from question to end.
        seed: gives this answer again, None where nothing was drawn.
        dropped: messages that this question has pushed out of the context.
    """

    text: str
    finish_reason: Literal["stop", "length", "cut"]
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    seconds: float
    seed: int | None
    dropped: int


class Conversation:
    """Questions and answers with one model.

    Attributes:
        system: the system prompt, or None. turns: question, answer, question, answer... as messages; an interrupted
            answer has `cut`. first: the turns before it are no longer in the context.
        options: may be replaced at any time.

    Args:
        template: the model's chat template. It is tried at once.

    Raises:
        ConfigError: the model writes no text. InputError: a template that does not render, or takes no system prompt.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        options: GenerationOptions | None = None,
        system: str | None = None,
    ) -> None:
        check_can_generate(model.config)
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.options = options or GenerationOptions()
        self._memory = Memory()
        self.restart(system)

    def restart(self, system: str | None) -> None:
        """Forget all turns and go on with this system prompt. Raises InputError and keeps them if it cannot be."""
        self._ends = self._turn_ends(system)
        self.system, self.turns = system, list[Message]()
        self.first = self._tries = 0

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, what the context no longer holds included."""
        return [*_system(self.system), *self.turns]

    @property
    def limit(self) -> int:
        """Tokens that a prompt may have: the answer's max_tokens stay free, up to half of the context."""
        context = self.model.config.max_len
        return context if self.model.is_pair else max(context - self.options.max_tokens, context // 2)

    def tokens(self) -> int:
        """Tokens of what the context holds."""
        return len(self._encode(self.turns[self.first :])) if self.turns else 0

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> Reply:
        """Ask a question.

        Args:
            on_text: receives whole characters as they become certain.

        A KeyboardInterrupt while the model writes ends the answer: it is `cut` and stays in the conversation. After an
        error the conversation is as before.

        Raises:
            InputError: the question alone is too long; not valid Unicode; the template refuses it. DivergedError.
        """
        return self._answer(self.turns, text, 0, on_text)

    def retry(self, on_text: Callable[[str], None] | None = None) -> Reply:
        """Another answer to the last question, with the next seed. Raises as `ask`, and InputError without one."""
        if not self.turns:
            raise InputError("retry", "nothing was asked yet", "a question")
        return self._answer(self.turns[:-2], self.turns[-2]["content"], self._tries + 1, on_text)

    def undo(self) -> None:
        """Drop the last question and its answer. Raises InputError when there is none."""
        if not self.turns:
            raise InputError("undo", "nothing was asked yet", "a question")
        del self.turns[-2:]
        self.first, self._tries = min(self.first, max(len(self.turns) - 2, 0)), 0

    def save(self, path: Path) -> None:
        """Write {"messages": [{"role", "content"}...]}. Raises MachineError."""
        files.atomic_write(path, dump_json({"messages": self.messages}).encode() + b"\n")

    def load(self, path: Path) -> None:
        """Go on with a saved conversation in the place of this one. Raises InputError and keeps this one if it fails.

        A file holds system (or not), user, assistant, user, assistant...; other keys of the file are ignored.
        """
        found = _read(path)
        begin = 1 if found and found[0]["role"] == "system" else 0
        self.restart(found[0]["content"] if begin else None)
        self.turns = found[begin:]

    def _answer(self, before: Sequence[Message], text: str, tries: int, on_text: Callable[[str], None] | None) -> Reply:
        turns = [*before, {"role": "user", "content": text}]
        first, ids = self._fit(turns)
        seed = secrets.randbits(63) if self.options.seed is None else (self.options.seed + tries) % 2**63
        given = self.options.model_dump(exclude_unset=True)
        options = GenerationOptions(**{**given, "seed": seed, "stop_ids": (*self.options.stop_ids, *self._ends)})
        parts: list[str] = []

        def show(_: int, piece: str) -> None:
            parts.append(piece)
            if on_text is not None:
                on_text(piece)

        began = time.perf_counter()
        reason: Literal["stop", "length", "cut"] = "cut"
        try:
            made = generate(self.model, self.tokenizer, [ids], options, show, memory=self._memory)[0]
            reason, count = "stop" if made.finish_reason == "stop" else "length", made.generated_tokens
        except KeyboardInterrupt:
            # The last token was shown and is not in the memory: its forward pass is what was interrupted.
            count = max(len(self._memory.ids) + 1 - len(ids), 0)
        answer: Message = {"role": "assistant", "content": "".join(parts)}
        self.turns = [*turns, {**answer, "cut": True} if reason == "cut" else answer]
        dropped, self.first, self._tries = first - self.first, first, tries
        return Reply(
            text=answer["content"],
            finish_reason=reason,
            prompt_tokens=len(ids),
            reused_tokens=self._memory.reused,
            generated_tokens=count,
            seconds=time.perf_counter() - began,
            seed=None if options.is_greedy else seed,
            dropped=dropped,
        )

    def _fit(self, turns: list[Message]) -> tuple[int, list[int]]:
        """Which turn the prompt begins with, and its ids. Whole exchanges are left out, the system prompt never."""

        def read(begin: int) -> list[int]:
            return self._encode(turns[begin:], add_generation_prompt=True)

        first, later = self.first, range(self.first + 2, len(turns), 2)
        ids = read(first)
        if len(ids) > self.limit and later:
            place = bisect_left(later, True, key=lambda begin: len(read(begin)) <= self.limit * _KEPT)
            first = later[min(place, len(later) - 1)]
            ids = read(first)
        if len(ids) > self.limit:
            found = f"{len(ids)} tokens{' with the system prompt' if self.system else ''}"
            context, room = self.model.config.max_len, self.model.config.max_len - self.limit
            expected = f"at most {self.limit}: the context holds {context}, {room} of them are the answer's"
            raise InputError("message", found, expected, "a shorter message, or fewer max_tokens")
        return first, ids

    def _encode(self, turns: Sequence[Message], **options: bool) -> list[int]:
        plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        return self.template.encode(self.tokenizer, [*_system(self.system), *plain], **options)

    def _turn_ends(self, system: str | None) -> tuple[int, ...]:
        """The control token that the template puts behind an answer.

        A model's own end token may be another one (Llama 3's config.json named <|end_of_text|>, its turns end with
        <|eot_id|>), and then it would go on and write the user's part.
        """
        question = [*_system(system), {"role": "user", "content": "a"}]
        one, other = (
            self.template.encode(self.tokenizer, [*question, {"role": "assistant", "content": text}]) for text in "ab"
        )
        same = beginning(reversed(one), reversed(other))
        behind = one[len(one) - same :] if same < len(one) else []
        end = next((token for token in behind if token in self.tokenizer.special_ids), None)
        self.template.encode(self.tokenizer, question, add_generation_prompt=True)
        return () if end is None or end >= self.model.config.vocab_size else (end,)


def _system(text: str | None) -> list[Message]:
    return [] if text is None else [{"role": "system", "content": text}]


def _read(path: Path) -> list[Message]:
    """The messages of a file, checked."""
    tree = strict_json(files.read_bytes(path, MAX_FILE), str(path))
    rows = cast("list[Message]", field(tree, "messages", list, str(path)))
    begin = 1 if rows and isinstance(rows[0], dict) and rows[0].get("role") == "system" else 0
    for number, row in enumerate(rows):
        where = f"{path} messages[{number}]"
        role, _ = field(row, "role", str, where), field(row, "content", str, where)
        field(row, "cut", (bool, type(None)), where)
        wanted = "system" if number < begin else ("user", "assistant")[(number - begin) % 2]
        if role != wanted or row.keys() - {"role", "content", "cut"}:
            found = f"role {role!r:.40}" if role != wanted else f"keys {', '.join(map(repr, row))[:80]}"
            raise InputError(where, found, f"role {wanted}" if role != wanted else "role and content alone")
    if (len(rows) - begin) % 2:
        raise InputError(str(path), "ends with a question", "an answer as the last message")
    return rows
