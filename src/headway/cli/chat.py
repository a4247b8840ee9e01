"""`headway chat PATH`: talk with a model; its answer appears as it is written.

    > What is a mutex?
    A lock that only one thread can hold ...
    [31 tokens, 28.4 tokens/s, context 58 of 8192]

At a terminal a line that begins with / is a command (/help lists them), one that begins with // a text that begins
with /, and one that ends with a backslash goes on in the next. Ctrl-C ends an answer; at the prompt it leaves, as
Ctrl-D and /exit do. Through a pipe every line is a message as it stands, and no command. Lines typed are kept in
memory only.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from headway import files
from headway.cli.opening import opened
from headway.cli.options import Common, by_name, option
from headway.cli.output import Printer, note, size
from headway.errors import ConfigError, HeadwayError, InputError, MachineError, nearest

if TYPE_CHECKING:
    from headway.api import Loaded
    from headway.generation.conversation import Conversation, Reply
    from headway.nn import Transformer
    from headway.text.chat import ChatTemplate

    Ask = Callable[[Callable[[str], None]], Reply]


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway chat` takes; a sampling option left out has GenerationOptions' default."""

    system: Annotated[str | None, option(help="The system prompt.")] = None
    max_tokens: Annotated[int, option(help="Tokens of an answer at most.")] = 512
    min_tokens: Annotated[int | None, option(help="Tokens of an answer at least [0].")] = None
    temperature: Annotated[float, option(help="0 takes the most likely token.")] = 0.7
    top_k: Annotated[int | None, option(help="Choose among the k most likely [0: all].")] = None
    top_p: Annotated[float | None, option(help="Choose among the most likely that hold this mass [1].")] = None
    min_p: Annotated[float | None, option(help="Leave out tokens below this share of the best [0].")] = None
    typical_p: Annotated[float | None, option(help="Locally typical sampling [1].")] = None
    repetition_penalty: Annotated[float | None, option(help="Divide logits of tokens seen before [1].")] = None
    presence_penalty: Annotated[float | None, option(help="Subtract once from tokens written [0].")] = None
    frequency_penalty: Annotated[float | None, option(help="Subtract per occurrence written [0].")] = None
    lookup: Annotated[int | None, option(help="Tokens to guess from what stood here before, for speed [0].")] = None
    kv_dtype: Annotated[str | None, option(help="Keep keys and values as model, float16 or int8 [auto].")] = None
    stop: Annotated[list[str] | None, option(help="End before this text; may be repeated.", show_default=False)] = None
    seed: Annotated[int | None, option(help="The same seed, the same answers [drawn].")] = None
    template: Annotated[Path | None, option(help="A jinja chat template, in the place of the model's.")] = None
    save: Annotated[Path | None, option(help="Keep the conversation in this file, as JSON.")] = None
    load: Annotated[Path | None, option(help="Go on with a saved conversation.")] = None
    dtype: Annotated[str | None, option(help="float32, bfloat16, float16, stored [unpacked if it fits].")] = None
    threads: Annotated[int | None, option(min=1, help="Threads of the CPU [torch's choice].")] = None
    device: Annotated[str, option(help="cpu or cuda.")] = "cpu"
    raw: Annotated[bool, option("--raw", help="Do not strip terminal escapes from the text.")] = False
    force_tokenizer: Annotated[bool, option("--force-tokenizer", help="Accept another tokenizer.")] = False


def sampling_names() -> list[str]:
    """The options that describe an answer."""
    from headway.generation import GenerationOptions

    return [f.name for f in fields(Options) if f.name in GenerationOptions.model_fields]


def run(options: Options) -> None:
    """Load, talk until the input ends, and under `--json` say what was said."""
    options = by_name(options, "headway chat")
    chat = Chat(_open(options.one_path("the folder or the file of a chat model"), options), options)
    missed = chat.talk() if sys.stdin is not None and sys.stdin.isatty() else chat.answer_lines()
    counts = ("prompt_tokens", "reused_tokens", "generated_tokens", "seconds")
    sums = {name: sum(getattr(reply, name) for reply in chat.replies) for name in counts}
    replies = [reply._asdict() for reply in chat.replies]
    chat.printer.result({"messages": chat.talked.messages, "replies": replies, **sums})
    if missed:
        raise InputError("stdin", f"{missed} of its lines got no answer", "", "see the lines above")


def _open(path: str, options: Options) -> Conversation:
    """The conversation that the options describe. What is wrong with them is said before the model is loaded."""
    from headway.generation import GenerationOptions

    chosen = {name: getattr(options, name) for name in sampling_names()}
    sampling = GenerationOptions(**{name: value for name, value in chosen.items() if value is not None})
    if options.save is not None:
        files.check_writable(options.save.absolute().parent)
        _check_free(options.save, {options.load})

    from headway.generation.conversation import Conversation
    from headway.generation.prompts import check_can_generate
    from headway.loading import dtype_of

    dtype_of(options.dtype)
    loaded = opened(path, options, force_tokenizer=options.force_tokenizer)
    check_can_generate(loaded.config)
    template = _template(loaded, options.template)
    model = _unpacked(loaded) if options.dtype is None else loaded.model
    conversation = Conversation(model, loaded.words, template, sampling, options.system)
    if options.load is not None:
        conversation.load(options.load)
        conversation.system = options.system or conversation.system
    return conversation


def _template(loaded: Loaded, file: Path | None) -> ChatTemplate:
    """The template in the file, else the model's. Raises ConfigError: it has none; InputError: no text."""
    from headway.text.chat import MAX_SOURCE, ChatTemplate, special_tokens

    source, where = loaded.words.chat_template, f"{loaded.path} chat template"
    if file is not None:
        source, where = files.read_bytes(file, 4 * MAX_SOURCE).decode(errors="surrogateescape"), str(file)
    if source is None:
        fix = f"--template FILE.jinja, or headway generate {loaded.path}"
        raise ConfigError(str(loaded.path), "the model has no chat template", "a model made for chat", fix)
    return ChatTemplate(source, special_tokens(loaded.words), where)


def _unpacked(loaded: Loaded) -> Transformer:
    """The model, its quantized weights as float32 where memory allows and no kernel multiplies by them as they are."""
    import torch

    from headway.kernels.native import library
    from headway.machine import memory
    from headway.nn import Transformer
    from headway.nn.packed import PackedEmbedding, PackedLinear
    from headway.saving import plain_weights

    device = next(loaded.model.parameters()).device
    if library() is not None and device.type == "cpu":
        return loaded.model
    packed = [module for module in loaded.model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    need = 4 * sum(module.shape[0] * module.shape[1] for module in packed)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory()[1]
    if 0 < free < 1.25 * need:  # zero: nobody knows
        note(f"note: the weights stay quantized, which is slow: as float32 they take {size(need)} of {size(free)} free")
        return loaded.model
    return Transformer.of(loaded.config, plain_weights(loaded)) if packed else loaded.model


def _check_free(path: Path, own: Container[Path | None]) -> None:
    """Refuse to write over a file that this chat has neither read nor written. Raises MachineError."""
    if path.exists() and path not in own:
        raise MachineError(
            str(path), "exists already", "a new file", f"another name, or --load {path} to go on with it"
        )


class Chat:
    """One conversation at a terminal or through a pipe. Commands are the methods `do_NAME`; they return what to say."""

    def __init__(self, talked: Conversation, options: Options) -> None:
        self.talked, self.kept = talked, options.save
        self.printer = Printer(json=options.json, raw=options.raw)
        self.replies: list[Reply] = []
        self._own = {options.save, options.load}
        self._is_watched = False

    def talk(self) -> int:
        """Read from the terminal until /exit or Ctrl-D; a KeyboardInterrupt at the prompt goes on to the caller."""
        with contextlib.suppress(ImportError):  # it gives input() editing and a history
            importlib.import_module("readline")
        self._is_watched = sys.stderr.isatty()
        note("/help lists the commands, Ctrl-D leaves")
        try:
            while True:
                text = self._read()
                try:
                    self.handle(text)
                except KeyboardInterrupt:
                    note("interrupted")
                except HeadwayError as error:
                    note(f"error: {error}")
        except EOFError:
            note("")
            return 0

    def answer_lines(self) -> int:
        """Answer every line of a pipe; returns how many got no answer."""
        missed = 0
        for number, line in enumerate(sys.stdin.buffer if sys.stdin is not None else (), 1):
            try:
                self.ask(line.decode(errors="surrogateescape").rstrip("\r\n"))
            except HeadwayError as error:
                missed += 1
                note(f"line {number}: {error}")
        return missed

    def handle(self, text: str) -> None:
        """A message or a command. Raises EOFError when that is /exit, HeadwayError."""
        if text.startswith("//") or not text.startswith("/"):
            return self.ask(text[text.startswith("//") :])
        name, _, argument = text[1:].partition(" ")
        if name not in COMMANDS:
            fix = "/help lists them; // begins a message that begins with /"
            raise ConfigError(f"/{name}", f"unknown command{nearest(name, COMMANDS)}", "", fix)
        for line in getattr(self, f"do_{name}")(argument.strip()).splitlines():
            note(line)
        self._keep()

    def ask(self, text: str) -> None:
        """Put a question, unless it is blank. Raises HeadwayError."""
        if text.strip():
            self.show(partial(self.talked.ask, text))
            self._keep()

    def show(self, ask: Ask) -> None:
        """Show the answer as it comes, and on a terminal what it took. Raises HeadwayError."""
        from headway.generation import EscapeFilter

        escapes, pieces = EscapeFilter(), list[str]()
        is_plain = self.printer.raw or not self.printer.words.isatty()

        def write(text: str) -> None:
            pieces.append(text)
            print(text if is_plain else escapes.feed(text), end="", file=self.printer.words, flush=True)

        try:
            reply = ask(write)
        except BaseException:
            self.printer.say(end="\n" if pieces else "")
            raise
        self.printer.say(escapes.finish())
        self.replies.append(reply)
        context, count = self.talked.model.config.max_len, reply.generated_tokens
        if reply.dropped:
            note(f"note: the context of {context} tokens is full, the {reply.dropped} oldest messages are left out")
        if self._is_watched:
            end = {"cut": ", interrupted", "length": ", cut at its longest", "stop": ""}[reply.finish_reason]
            speed, used = count / reply.seconds, reply.prompt_tokens + count
            line = f"[{count} tokens, {speed:.1f} tokens/s, context {used} of {context}{end}]"
            print(f"\x1b[2m{line}\x1b[0m", file=sys.stderr, flush=True)

    def _read(self) -> str:
        """A line, with those that its trailing backslashes join to it. Raises EOFError."""
        # A prompt must not go into a file, nor between the answers and the object of --json.
        with contextlib.redirect_stdout(self.printer.words if self.printer.words.isatty() else sys.stderr):
            text = input("> ")
            while text.endswith("\\"):
                text = f"{text[:-1]}\n{input('. ')}"
        return text

    def _keep(self) -> None:
        if self.kept is not None:
            self.talked.save(self.kept)

    def do_help(self, _: str) -> str:
        """List the commands"""
        lines = [f"/{name}: {text}" for name, text in COMMANDS.items()]
        return "\n".join([*lines, "//TEXT: a message that begins with /", "TEXT\\: it goes on in the next line"])

    def do_system(self, text: str) -> str:
        """Show the system prompt, or set it and start over: /system Be brief."""
        if text:
            self.talked.restart(text)
        return "started over with the new system prompt" if text else self.talked.system or "no system prompt"

    def do_clear(self, _: str) -> str:
        """Start over with the same system prompt"""
        self.talked.restart(self.talked.system)
        return "started over"

    def do_undo(self, _: str) -> str:
        """Forget the last question and its answer"""
        self.talked.undo()
        return f"forgotten; {len(self.talked.messages)} messages are left"

    def do_retry(self, _: str) -> str:
        """Another answer to the last question"""
        self.show(self.talked.retry)
        return "note: at temperature 0 the answer is the same each time" if self.talked.options.is_greedy else ""

    def do_save(self, name: str) -> str:
        """Write the conversation as JSON: /save FILE [chat.json]"""
        path = Path(name or "chat.json").expanduser()
        _check_free(path, self._own)
        self.talked.save(path)
        self._own.add(path)
        return f"saved {len(self.talked.messages)} messages in {path}"

    def do_load(self, name: str) -> str:
        """Go on with a saved conversation: /load FILE [chat.json]"""
        path = Path(name or "chat.json").expanduser()
        self.talked.load(path)
        self._own.add(path)
        return f"loaded {len(self.talked.messages)} messages from {path}"

    def do_tokens(self, _: str) -> str:
        """How much of the context is used"""
        left = f"; the {self.talked.first} oldest messages are left out" if self.talked.first else ""
        return f"{self.talked.tokens()} of {self.talked.model.config.max_len} tokens{left}"

    def do_set(self, argument: str) -> str:
        """Show the options of the answers, or change one: /set temperature=0.2"""
        from headway.generation import GenerationOptions
        from headway.plain_yaml import parse_yaml

        known, (name, _, value) = sampling_names(), argument.partition("=")
        name = name.strip().replace("-", "_")
        if argument:
            if name not in known:
                raise ConfigError(f"/set {name}", f"unknown name{nearest(name, known)}", ", ".join(known))
            chosen = {**self.talked.options.model_dump(exclude_unset=True), name: parse_yaml(value, name)}
            self.talked.options = GenerationOptions(**{key: item for key, item in chosen.items() if item is not None})
        return "  ".join(f"{key}={getattr(self.talked.options, key)}" for key in ([name] if argument else known))

    def do_exit(self, _: str) -> str:
        """Leave"""
        raise EOFError


COMMANDS = {name[3:]: str(method.__doc__) for name, method in vars(Chat).items() if name.startswith("do_")}
