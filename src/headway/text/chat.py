"""Chat templates: a conversation to the text, the segments and the token ids that a model was trained on.

A template is a jinja2 program that came with a model's file. Text: rendered as `apply_chat_template` of
transformers 5.24 does, byte for byte (its `utils/chat_template_utils.py` defines the dialect). Two dangers:

**The program.** jinja2's immutable sandbox keeps it from Python's objects, but not from `"a" * 10**10`, `10**10**10`,
`|center(10**9)` or printing a list nested in itself thirty times. Those run inside C code, where no guard of the
same process can count or stop them, and a list of guarded operators, methods and filters is never complete. So a
template runs in a process of its own, started when it is first rendered and kept: the kernel ends it after
`seconds` of CPU time (a timer signal, which also ends C code; a busy machine does not shorten it), refuses memory
beyond `max_bytes` (RLIMIT_AS, Linux only) and lets it open nothing. That works in any thread. It costs a start of
about 0.1 s per template, and 15 MB of memory.

**The contents.** A user may type `<|im_end|>`, and a document may hold it. What the template wrote is told from what
it was given by rendering twice: once as it is, once with every control token in the *template's* literals and
special-token variables written in stand-in characters. Stand-ins are lone surrogates, which no input may hold and no
string operation makes of other text, so only tokens made of stand-ins are control: input can neither forge one nor
put one together from pieces. Literals that a template only compares with (`'</think>' in content`, `.split(...)`)
keep their text, and if the two renderings still differ, the conversation is refused. A token built around a role,
`'<|' + message['role'] + '|>'`, is control for the roles in `ROLES` and refused around anything else.

Left out: images and sound (a part that is not text is passed to the template, which writes its token).
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jinja2
import jinja2.debug
import jinja2.ext
import jinja2.parser
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headway.errors import InputError, MachineError
from headway.strict import MAX_DEPTH, check_unicode

if TYPE_CHECKING:
    from headway.text.tokenizer import Tokenizer

MAX_SOURCE = 1 << 20  # characters; published templates have up to 30,000
ROLES = ("system", "developer", "user", "human", "assistant", "model", "bot", "tool", "function", "observation")
Message = dict[str, Any]
Segment = tuple[str, bool]


def _forms(role: str) -> tuple[str, ...]:
    return role, role.upper(), role.title()


_FORMS = {form for role in ROLES for form in _forms(role)}
_NO_MEMORY = 77  # the child's exit code
_WALL = 30  # wall seconds per CPU second, for a child that waits instead of computing
_FIRST_TAG, _CONTINUE, _START, _END = 0xDC00, "\udffd ", "\udffe", "\udfff"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Where a literal selects or compares and does not reach the output.
_NEEDLES = {nodes.Compare: ("expr", "ops"), nodes.Getitem: ("arg",), nodes.Pair: ("key",)}
_ARGUMENTS = ("args", "kwargs")


class ChatTemplate:
    """A chat template from a model's file. Nothing is compiled or started before it is first rendered.

    Args:
        source: the jinja2 source.
        tokens: the special tokens that templates name, such as {"bos_token": "<s>"}; see `special_tokens`.
        where: the file or key named in errors.
        seconds: CPU time that one rendering may take.
        max_chars: characters that one rendering may write.
        max_bytes: memory that one rendering may take, over 16 bytes for each character it is given.

    Raises:
        InputError: `source` is not text of valid Unicode, or has over MAX_SOURCE characters.
    """

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str] | None = None,
        where: str = "chat template",
        *,
        seconds: float = 1.0,
        max_chars: int = 1 << 20,
        max_bytes: int = 64 << 20,
    ) -> None:
        if not isinstance(source, str) or len(source) > MAX_SOURCE:
            raise InputError(where, "not a text of this size", f"at most {MAX_SOURCE} characters of jinja2 source")
        check_unicode(source, where)
        self.source, self.tokens, self.where = source, dict(tokens or {}), where
        limits = {"seconds": seconds, "max_chars": max_chars, "max_bytes": max_bytes}
        self._child = _Child({"source": source, **limits}, where)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] | None = None,
        documents: Sequence[Message] | None = None,
        add_generation_prompt: bool = False,
        continue_final: bool = False,
        **variables: object,
    ) -> str:
        """The conversation as one text, as `apply_chat_template(tokenize=False)` gives it. For reading, not for
        tokens: in this text what a user typed and what the template wrote look alike.

        Args:
            messages: objects with `role` and `content`: text, a list of {"type": "text", "text": ...} parts, or null
                beside `tool_calls`.
            tools: JSON schemas of functions.
            documents: objects with `title` and `text`.
            add_generation_prompt: end with the header of an assistant turn.
            continue_final: end inside the last message, so that the model goes on with it.
            variables: what else the template reads, such as enable_thinking.

        Raises:
            InputError: naming the place in the messages, or the template's line; a template over its limits.
            MachineError: no process can be started.
        """
        options = {"add_generation_prompt": add_generation_prompt, "continue_final": continue_final, **variables}
        return self._texts(_normal(messages), {"tools": tools, "documents": documents, **options})[0]

    def segments(self, messages: Sequence[Message], *, control: Collection[str], **options: Any) -> list[Segment]:
        """The rendered conversation as (text, is_control) segments for `Tokenizer.encode_segments`.

        Control segments are the tokens of `control` that the template itself wrote; the same characters inside
        messages, tools, documents or variables are text. Joined, the segments are `render(messages, **options)`.

        Args:
            messages: as for `render`.
            control: the texts of all control tokens.
            options: the keyword arguments of `render`.

        Raises:
            InputError: as `render`; the template decides by a control token in the contents; it makes a control
                token of a role outside ROLES.
        """
        chat, tags = _normal(messages), _tags(tuple(control))
        plain, tagged = self._texts(chat, options, tags.names)
        if tags.restore(tagged) != plain:
            found = "the contents hold a control token by which the template decides what to write"
            raise InputError(self.where, found, "contents without it")
        built = tags.refused({form for message in chat for form in _forms(message["role"])}, tagged)
        if built:
            expected = f"only {', '.join(ROLES)} between '<|' and '|>'"
            raise InputError("messages", f"a role of which the template makes the control token {built!r}", expected)
        return tags.parts(tagged)

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of the conversation; control ids are those that the template wrote, one for one.

        Without look-alikes in the contents the ids are those of transformers. Raises InputError as `segments` does.
        """
        names = [tokenizer.token(number) or "" for number in sorted(tokenizer.special_ids)]
        parts = self.segments(messages, control=names, **options)
        alike = re.compile("|".join(map(re.escape, filter(None, names))) or "(?!)")
        guarded = tokenizer.special_ids - {tokenizer.unk_id}
        ids: list[int] = []
        # Tokens may swallow the space beside them and texts begin with a prefix: a stretch without look-alikes is
        # encoded as one text. The count of its control ids shows that no content added one, by whatever normalizer.
        for safe, group in groupby(parts, key=lambda part: part[1] or not alike.search(part[0])):
            stretch = list(group)
            written = [tokenizer.special_id(text) for text, is_control in stretch if is_control]
            found = tokenizer.encode("".join(text for text, _ in stretch), control=True) if safe else []
            if not safe or [number for number in found if number in guarded] != [n for n in written if n in guarded]:
                found = tokenizer.encode_segments(stretch)
            ids += found
        return ids

    def spans(self, messages: Sequence[Message], **options: Any) -> list[tuple[int, int]]:
        """Where the assistant wrote: (start, stop) in characters of `render(messages, **options)`.

        These are the `{% generation %}` blocks of a template that has them. Otherwise each assistant turn, from the
        end of its header to the end of its last token, found by rendering the conversation up to it.

        Raises:
            InputError: as `render`; without such blocks, a template that writes earlier turns differently later.
        """
        chat = _normal(messages)
        if _GENERATION.search(self.source):
            plain, tagged = self._texts(chat, options, [])
            pieces = re.split(f"([{_START}{_END}])", tagged)
            ends = [sum(map(len, pieces[:place:2])) for place in range(1, len(pieces), 2)]
            if "".join(pieces[::2]) != plain or pieces[1::2] != [_START, _END] * (len(ends) // 2):
                raise InputError(self.where, "its generation blocks are changed after they are written", "plain blocks")
            return list(zip(ends[::2], ends[1::2], strict=True))
        (whole,), found = self._texts(chat, options), []
        for number in (number for number, message in enumerate(chat) if message["role"] == "assistant"):
            (before,) = self._texts(chat[:number], {**options, "add_generation_prompt": True})
            (after,) = self._texts(chat[: number + 1], options)
            if not (whole.startswith(after) and after.startswith(before)):
                found_here = f"{self.where} writes it differently when more follows"
                raise InputError(f"messages[{number}]", found_here, "a template that only adds")
            found.append((len(before), max(len(before), len(after.rstrip()))))
        return found

    def _texts(
        self, chat: list[Message], options: Mapping[str, Any], control: Sequence[str] | None = None
    ) -> list[str]:
        """[the rendering], and with `control` also [..., the rendering in stand-ins]."""
        given: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": False, **options}
        continues, final = given.pop("continue_final", False), ""
        if continues:
            if given["add_generation_prompt"]:
                raise InputError("continue_final", "set together with add_generation_prompt", "one of them")
            chat, final = _continued(chat)
        for name, value in given.items():
            _check(value, name)
            rows = value if isinstance(value, list | tuple) else [value]
            if name in ("tools", "documents") and value is not None and not all(isinstance(row, dict) for row in rows):
                raise InputError(name, "holds something else", "a list of objects")
        renderings = [None] if control is None else [None, control]
        texts = self._child.ask({**given, "messages": chat}, self.tokens, renderings)
        if continues:
            texts = [_cut(text, final, self.where) for text in texts]
        check_unicode(texts[0], self.where)
        return texts


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens that templates name (bos_token, eos_token, ...), of those that the tokenizer has."""
    roles = ("bos", "eos", "pad", "unk", "mask")
    found = {f"{role}_token": getattr(tokenizer, f"{role}_id") for role in roles}
    return {name: tokenizer.token(number) or "" for name, number in found.items() if number is not None}


def _normal(messages: object) -> list[Message]:
    """Checked messages as transformers hands them to templates: without null values, reasoning under its names."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages", f"{messages!r:.40}", "a list of at least one message")
    chat = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise InputError(where, f"a {type(message).__name__}", "an object with role and content")
        _check(message, where)
        if not isinstance(message.get("role"), str):
            raise InputError(f"{where}.role", f"{message.get('role')!r:.40}", "a string")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            expected = "a string, a list of parts, or null beside tool_calls"
            raise InputError(f"{where}.content", f"{content!r:.40}" if "content" in message else "missing", expected)
        for place, part in enumerate(content if isinstance(content, list) else ()):
            given = part if isinstance(part, dict) else {}
            if not isinstance(given.get("text" if given.get("type") == "text" else "type"), str):
                raise InputError(f"{where}.content[{place}]", f"{part!r:.60}", '{"type": "text", "text": "..."}')
        kept = {key: value for key, value in message.items() if value is not None}
        reasoning = next((kept[key] for key in _REASONING if key in kept), None)
        chat.append(kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning})
    return chat


def _check(value: object, where: str, depth: int = 0) -> None:
    """Refuse what JSON cannot hold, lone surrogates and deep nesting, naming the place."""
    if depth > MAX_DEPTH:
        raise InputError(where[:80], f"nested more than {MAX_DEPTH} levels deep", f"at most {MAX_DEPTH}")
    if isinstance(value, str):
        check_unicode(value, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError(where, f"key {key!r:.40}", "a string")
            check_unicode(key, f"a key of {where}")
            _check(item, f"{where}.{key[:40]}", depth + 1)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check(item, f"{where}[{number}]", depth + 1)
    elif not isinstance(value, int | float | None) or (isinstance(value, int) and value.bit_length() > 512):
        raise InputError(where, f"a {type(value).__name__} that JSON cannot carry", "text, numbers, lists and objects")


def _continued(chat: list[Message]) -> tuple[list[Message], str]:
    """The chat with a mark at the end of its last text, and that text."""
    *earlier, last = chat
    content = last.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    place = max((n for n, part in enumerate(parts) if isinstance(part.get("text"), str)), default=None)
    if place is None:
        raise InputError(f"messages[{len(earlier)}].content", "no text to continue", "text")
    text: str = parts[place]["text"] or ""
    marked = [{**part, "text": text + _CONTINUE} if n == place else part for n, part in enumerate(parts)]
    return [*earlier, {**last, "content": marked if content is parts else marked[0]["text"]}], text


def _cut(text: str, final: str, where: str) -> str:
    """The text up to the mark; without the space before it if the template trimmed the space behind it."""
    mark = _CONTINUE.strip()
    if mark not in text or final.strip() not in text:
        raise InputError("continue_final", f"{where} does not write the last message whole", "a text it leaves alone")
    at = text.rindex(mark)
    return text[:at] if text.startswith(_CONTINUE, at) else text[:at].rstrip()


class _Tags:
    """Stand-ins for control tokens: one low surrogate for each of their characters but white space.

    White space stays, because templates trim it; a token of nothing else is never control. Both processes build
    the same table from the same names.
    """

    def __init__(self, control: Collection[str]) -> None:
        self.names = sorted({name for name in control if name.strip()})
        alphabet = sorted({character for name in self.names for character in name if not character.isspace()})
        if len(alphabet) > ord(_CONTINUE[0]) - _FIRST_TAG:
            raise InputError("control tokens", f"{len(alphabet)} different characters", "at most 1021")
        self._to = {ord(character): _FIRST_TAG + place for place, character in enumerate(alphabet)}
        self._back = {tag: point for point, tag in self._to.items()} | {ord(_START): None, ord(_END): None}
        around = {parts for name in self.names for role in _FORMS if all(parts := name.partition(role))}
        self._ends = {(head, tail) for head, _, tail in around}
        heads, tails = (_either(texts) for texts in zip(*self._ends, strict=True)) if around else ("(?!)", "(?!)")
        hole = r"\{\w*\}|%s"  # where '<|{}|>'.format(role) puts it
        self._names = re.compile(_either(self.names))
        self._edges = re.compile(rf"(?:{heads})(?=\Z|{hole})|(?:\A|(?<=\}})|(?<=%s))(?:{tails})")
        built = {f"{self._tag(head)}{role}{self._tag(tail)}" for head, role, tail in around if _clear(head, role, tail)}
        self._written = re.compile(f"({_either({*map(self._tag, self.names)} | built)})")

    def _tag(self, text: str) -> str:
        return text.translate(self._to)

    def write(self, literal: str) -> str:
        """A literal of the template with its control tokens, and their ends where a role goes between, tagged."""
        whole = self._names.sub(lambda match: self._tag(match[0]), literal)
        return self._edges.sub(lambda match: self._tag(match[0]), whole)

    def restore(self, tagged: str) -> str:
        """What the stand-ins stand for."""
        return tagged.translate(self._back)

    def parts(self, tagged: str) -> list[Segment]:
        """The (text, is_control) segments of a rendering in stand-ins."""
        pieces = map(self.restore, self._written.split(tagged))
        return [(piece, place % 2 == 1) for place, piece in enumerate(pieces) if piece]

    def refused(self, roles: set[str], tagged: str) -> str | None:
        """A control token that the template built around something else than a known role, or None."""
        for head, tail in self._ends:
            for match in re.finditer(f"{self._tag(head)}([^\udc00-\udfff]+){self._tag(tail)}", tagged):
                name, is_long = f"{head}{match[1]}{tail}", len(head) > 1 < len(tail)
                if name in self.names and not _clear(head, match[1], tail) and (is_long or match[1] in roles):
                    return name
        return None


_tags = lru_cache(8)(_Tags)


def _clear(head: str, role: str, tail: str) -> bool:
    """Whether a token may be built around this. One bracket may also be XML around a name of the user's."""
    return role in _FORMS and len(head) > 1 < len(tail)


def _either(texts: Iterable[str]) -> str:
    """A pattern for any of the texts, the longest first, or one that never matches."""
    return "|".join(map(re.escape, sorted({*texts}, key=lambda text: (-len(text), text)))) or "(?!)"


class _Child:
    """The process that renders one template: started when first asked, and again after it ended."""

    def __init__(self, setup: dict[str, Any], where: str) -> None:
        self._setup, self._where = setup, where
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._stop: Callable[[], object]

    def ask(self, variables: Message, tokens: dict[str, str], renderings: Sequence[Sequence[str] | None]) -> list[str]:
        """One text for each set of control tokens to tag, None being none. Raises InputError and MachineError."""
        line = json.dumps([variables, tokens, renderings]).encode() + b"\n"
        with self._lock:
            process = self._started()
            assert process.stdin and process.stdout
            try:
                with suppress(BrokenPipeError):  # then there is no answer either
                    process.stdin.write(line)
                    process.stdin.flush()
                answer = process.stdout.readline()
                if not answer.endswith(b"\n"):
                    raise InputError(self._where, self._ending(process.wait()), "a template within its limits")
            except BaseException:
                self._stop()  # half a request or an answer that nobody took would shift all later ones
                raise
        reply = json.loads(answer)
        if "error" in reply:
            where = f"{self._where} line {reply['line']}" if reply["line"] else self._where
            found = "".join(character if character.isprintable() else " " for character in reply["error"])
            raise InputError(where, found, reply["expected"])
        return cast("list[str]", reply["texts"])

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process:
            # A process forked off this one (a data worker) shares the pipes and must not use them.
            if self._owner == os.getpid() and self._process.poll() is None:
                return self._process
            self._stop()  # ends nothing that is not a child of this process
        paths = [*filter(None, sys.path), str(Path(__file__).parents[2])]
        kept = {name: os.environ[name] for name in ("TZ", "PYTHONHOME", "LD_LIBRARY_PATH") if name in os.environ}
        env = {**kept, "PYTHONPATH": os.pathsep.join(paths)}
        command, pipe, null = [sys.executable, "-S", "-P", __file__], subprocess.PIPE, subprocess.DEVNULL
        try:
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, env=env, start_new_session=True)
        except OSError as error:
            raise MachineError(self._where, f"its process cannot be started: {error}") from error
        self._process, self._owner = process, os.getpid()
        self._stop = weakref.finalize(self, _stop, process)
        assert process.stdin
        process.stdin.write(json.dumps(self._setup).encode() + b"\n")
        return process

    def _ending(self, code: int) -> str:
        if code in (-signal.SIGPROF, -signal.SIGALRM):
            return f"takes more than {self._setup['seconds']:g} s of CPU time"
        if code == _NO_MEMORY:
            return f"takes more than {self._setup['max_bytes'] >> 20} MB of memory"
        return f"ended its process (exit code {code})"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # what was not sent is lost with the process
            pipe.close()  # type: ignore[union-attr]


# What follows runs in the child.


class _Environment(ImmutableSandboxedEnvironment):
    """The dialect of `apply_chat_template`."""

    marks = False  # whether generation blocks show
    now = datetime.min

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _raise, "namespace": _namespace}
        self.globals["strftime_now"] = lambda format: self.now.strftime(format)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which holds what the assistant wrote: the block as it is, or between marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        """A call of `_mark` around the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_START}{caller()}{_END}" if cast("_Environment", self.environment).marks else caller()


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that Python or jinja2 would act upon."""

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} cannot be set on a namespace")
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    made = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        made[name] = value
    return made


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    x: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _tag(node: nodes.Node, tags: _Tags) -> None:
    """Tag the control tokens in those literals below a node that can reach the output."""
    if isinstance(node, nodes.TemplateData):
        node.data = tags.write(node.data)
    elif isinstance(node, nodes.Const) and isinstance(node.value, str):
        node.value = tags.write(node.value)
    is_method = isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr)  # .split, .startswith
    is_filter = isinstance(node, nodes.Filter) and node.name not in ("default", "d", "join")
    needles = _ARGUMENTS if is_method or is_filter or isinstance(node, nodes.Test) else _NEEDLES.get(type(node), ())
    for child in node.iter_child_nodes(exclude=needles):
        _tag(child, tags)


def _written(template: jinja2.Template, variables: dict[str, Any], max_chars: int) -> str:
    pieces, size = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > max_chars:
            raise jinja2.TemplateError(f"writes more than {max_chars} characters")
    return "".join(pieces)


def _failure(error: Exception) -> dict[str, object]:
    line = getattr(error, "lineno", None)  # a syntax error's; jinja2 gives other errors frames of the template
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == "<template>":
            line = number
    own = type(error) is jinja2.TemplateError  # what the template says itself, by raise_exception
    found = f"{'' if own else type(error).__name__ + ': '}{str(error)[:200].rstrip('.')}"
    return {
        "error": found,
        "line": line,
        "expected": "a conversation that the template takes" if own else "a template that renders",
    }


def _serve() -> None:
    """Answer requests, one JSON line each, until the other side closes."""
    lines, answers = sys.stdin.buffer, sys.stdout.buffer
    setup, environment = json.loads(lines.readline()), _Environment()
    # Everything that is imported or read late is, now: afterwards nothing can be opened.
    environment.from_string("{{ ''|wordwrap ~ ''|pprint ~ ''|striptags ~ strftime_now('%c') ~ lipsum(1) }}").render()
    on_linux = sys.platform == "linux"
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if on_linux else 0
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))

    def allow(seconds: float, memory: int) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # both signals end the process, also inside C code
        signal.setitimer(signal.ITIMER_REAL, seconds * _WALL)
        if on_linux:
            resource.setrlimit(resource.RLIMIT_AS, (memory, resource.RLIM_INFINITY))

    @lru_cache(4)
    def program(names: tuple[str, ...] | None) -> tuple[_Tags, jinja2.Template]:
        tags, tree = _Tags(names or ()), environment.parse(setup["source"])
        _tag(tree, tags)
        return tags, environment.from_string(tree)

    def answer(variables: Message, tokens: dict[str, str], renderings: list[list[str] | None]) -> Iterator[str]:
        environment.now = datetime.now()
        for names in renderings:
            environment.marks = names is not None
            tags, template = program(None if names is None else tuple(names))
            special = {name: tags.write(token) for name, token in tokens.items()}
            yield _written(template, special | variables, setup["max_chars"])

    for line in lines:
        allow(setup["seconds"], size + setup["max_bytes"] + 16 * len(line))
        reply: dict[str, object]
        try:
            reply = {"texts": list(answer(*json.loads(line)))}
        except MemoryError:
            os._exit(_NO_MEMORY)
        except Exception as error:
            reply = _failure(error)
        allow(0, resource.RLIM_INFINITY)
        answers.write(json.dumps(reply).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
