"""`headway generate PATH`: continue a prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway.cli.opening import opened
from headway.cli.options import Common, by_name
from headway.cli.output import Printer
from headway.errors import ConfigError, InputError

if TYPE_CHECKING:
    from headway.generation import Generation
    from headway.loading import Loaded

_OWN = ("words", "json", "debug", "prompt", "stream", "raw", "force_tokenizer", "threads", "device", "dtype", "draft")


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway generate` takes; an option left out has GenerationOptions' default."""

    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", help="Text to continue; repeat for several. Without it: stdin.", show_default=False
        ),
    ] = None
    fill_mask: Annotated[
        int | None, typer.Option(min=1, help="For encoders: the k likeliest tokens at each mask of the prompt.")
    ] = None
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, or stored.")] = "float32"
    stream: Annotated[bool, typer.Option("--stream", help="Show the text as it is written.")] = False
    max_tokens: Annotated[int | None, typer.Option(help="New tokens at most [128].")] = None
    min_tokens: Annotated[int | None, typer.Option(help="New tokens at least [0].")] = None
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token [0.8].")] = None
    top_k: Annotated[int | None, typer.Option(help="Choose among the k most likely [0: all].")] = None
    top_p: Annotated[float | None, typer.Option(help="Choose among the most likely that hold this mass [1].")] = None
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens below this share of the best [0].")] = None
    typical_p: Annotated[float | None, typer.Option(help="Locally typical sampling [1].")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Divide logits of tokens seen before [1].")] = None
    presence_penalty: Annotated[float | None, typer.Option(help="Subtract once from tokens written [0].")] = None
    frequency_penalty: Annotated[float | None, typer.Option(help="Subtract per occurrence written [0].")] = None
    seed: Annotated[int | None, typer.Option(help="The same seed, the same text [drawn].")] = None
    n: Annotated[int | None, typer.Option(help="Continuations per prompt [1].")] = None
    lookup: Annotated[int | None, typer.Option(help="Tokens to guess from what stood here before, for speed [0].")] = (
        None
    )
    draft: Annotated[str | None, typer.Option(help="A smaller model of the same tokens that guesses, for speed.")] = (
        None
    )
    draft_tokens: Annotated[int | None, typer.Option(help="Tokens it guesses at a time [4].")] = None
    context_shift: Annotated[
        bool | None, typer.Option("--context-shift", help="Go on where the context is full, with the text's end.")
    ] = None
    sinks: Annotated[int | None, typer.Option(help="First tokens that such a text keeps [4].")] = None
    kv_dtype: Annotated[str | None, typer.Option(help="Keep keys and values as model, float16 or int8 [auto].")] = None
    beams: Annotated[int | None, typer.Option(help="Beam search with so many hypotheses [1].")] = None
    length_penalty: Annotated[float | None, typer.Option(help="Beam score = log-probability / length ** this [1].")] = (
        None
    )
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeat for several.", show_default=False)
    ] = None
    ignore_eos: Annotated[bool | None, typer.Option("--ignore-eos", help="Write on behind the end token.")] = None
    logprobs: Annotated[int | None, typer.Option(help="Log-probabilities of each token and of the k best.")] = None
    echo: Annotated[bool | None, typer.Option("--echo", help="Put the prompt in front.")] = None
    truncate: Annotated[
        str | None, typer.Option(help="left: drop the beginning of a prompt that is too long [error].")
    ] = None
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU [torch's choice].")] = None
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"
    raw: Annotated[bool, typer.Option("--raw", help="Do not strip terminal escapes from the text.")] = False
    force_tokenizer: Annotated[
        bool, typer.Option("--force-tokenizer", help="Accept another tokenizer than in training.")
    ] = False

    @property
    def chosen(self) -> dict[str, Any]:
        """The generation options that were given."""
        names = [f.name for f in fields(self) if f.name not in (*_OWN, "fill_mask")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def read_prompts(given: list[str] | None) -> list[str]:
    """The prompts, or all of stdin as one without its last line end. Raises ConfigError, InputError."""
    if given:
        return given
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("prompt", "none given", "a text to continue", "--prompt 'Once upon a time', or pipe it in")
    try:
        return [sys.stdin.buffer.read().decode().removesuffix("\n")]
    except UnicodeDecodeError as error:
        raise InputError("stdin", f"invalid UTF-8 at byte {error.start}", "UTF-8 text") from None


def run(options: Options) -> None:
    """Load, continue, print."""
    options = by_name(options, "headway generate")
    path = options.one_path("the folder of a trained model")
    prompts = read_prompts(options.prompt)
    printer = Printer(json=options.json, raw=options.raw)
    from headway.generation import EscapeFilter, GenerationOptions

    GenerationOptions(**options.chosen)  # a wrong value is reported before the model is loaded

    from headway import api

    loaded = opened(path, options, force_tokenizer=options.force_tokenizer)
    if options.fill_mask is not None:
        return _fill(printer, loaded, prompts, options.fill_mask)
    is_streamed = options.stream and len(prompts) * (options.n or 1) == 1 and (options.beams or 1) == 1
    escapes = EscapeFilter()
    is_raw = options.raw or not printer.words.isatty()

    def show(_: int, text: str) -> None:
        print(text if is_raw else escapes.feed(text), end="", file=printer.words, flush=True)

    draft = None if options.draft is None else opened(options.draft, options)
    results = api.generate(loaded, prompts, on_text=show if is_streamed else None, draft=draft, **options.chosen)
    if is_streamed:
        printer.say(escapes.finish())
    else:
        _show_all(printer, prompts, results)
    first = results[0]
    printer.result(
        {
            **choice(first),
            "seconds": sum(r.seconds for r in results if r.sample == 0),
            "choices": [choice(r) for r in results],
        }
    )


def _fill(printer: Printer, loaded: Loaded, prompts: list[str], top: int) -> None:
    """Each gap's candidates with their probabilities."""
    from headway import api

    found = [api.fill_mask(loaded, prompt, top=top) for prompt in prompts]
    for gaps in found:
        for gap in gaps:
            printer.table((f"{guess.probability:.1%}", guess.token, guess.text) for guess in gap)
    printer.result({"masks": [[[guess._asdict() for guess in gap] for gap in gaps] for gaps in found]})


def choice(result: Generation) -> dict[str, object]:
    """One continuation as JSON values."""
    out: dict[str, object] = {
        name: getattr(result, name)
        for name in (
            "text",
            "token_ids",
            "prompt_tokens",
            "generated_tokens",
            "seconds",
            "finish_reason",
            "seed",
            "score",
        )
    }
    if result.truncated:
        out["truncated"] = result.truncated
    if result.logprobs is not None:
        out["logprobs"] = [
            {"token_id": row.token_id, "logprob": row.logprob, "top": [list(pair) for pair in row.top]}
            for row in result.logprobs
        ]
    return out


def _show_all(printer: Printer, prompts: list[str], results: list[Generation]) -> None:
    for number, result in enumerate(results):
        if len(results) > 1:
            score = "" if result.score is None else f", score {result.score:.3f}"
            printer.say(
                f"{'' if not number else chr(10)}--- prompt {result.prompt + 1}, sample {result.sample + 1}{score}"
            )
        printer.say(result.text)
