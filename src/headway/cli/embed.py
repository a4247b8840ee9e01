"""`headway embed PATH`: texts as vectors, one JSON array or one line of a .npy file each."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from headway.cli.opening import opened
from headway.cli.options import Common, by_name, option
from headway.cli.output import Printer, duration
from headway.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway embed` takes."""

    text: Annotated[list[str] | None, option("--text", "-t", help="A text; repeat for several.")] = None
    input: Annotated[str | None, option(help="A file with one text per line. Without it and --text: stdin.")] = None
    output: Annotated[str | None, option(help="A .npy file, float32 (texts, size). Without it: JSON lines.")] = None
    tower: Annotated[str | None, option(help="text or vision, of a folder that holds both (CLIP, SigLIP).")] = None
    dtype: Annotated[str, option(help="float32, float16, bfloat16 or stored.")] = "float32"
    threads: Annotated[int | None, option(min=1, help="Threads of the CPU [torch's choice].")] = None
    device: Annotated[str, option(help="cpu or cuda.")] = "cpu"


def read_texts(options: Options) -> list[str]:
    """The texts, in order. Raises InputError, ConfigError."""
    if options.text:
        return options.text
    if options.input is not None:
        from headway.files import read_bytes

        where, data = options.input, read_bytes(Path(options.input))
    elif sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("text", "none given", "texts", "--text 'a sentence', --input FILE, or pipe lines in")
    else:
        where, data = "stdin", sys.stdin.buffer.read()
    return lines_of(where, data)


def lines_of(where: str, data: bytes) -> list[str]:
    """Lines of UTF-8, without their ends. Raises InputError."""
    try:
        return [line.removesuffix("\n") for line in io.StringIO(data.decode().removeprefix("\ufeff"), newline=None)]
    except UnicodeDecodeError as error:
        raise InputError(where, f"invalid UTF-8 at byte {error.start}", "UTF-8 text") from None


def run(options: Options) -> None:
    """Load, embed, print or write."""
    options = by_name(options, "headway embed")
    path = options.one_path("a model")
    texts = read_texts(options)
    import time

    from headway import api
    from headway.cli.display import Display
    from headway.launch import Phase

    loaded = opened(path, options, tower=options.tower)
    began = time.perf_counter()
    with Display() as display:
        vectors = api.embed(loaded, texts, progress=lambda done: display(Phase("embed", done, len(texts))))
    seconds = time.perf_counter() - began
    printer = Printer(json=options.json)
    if options.output is not None:
        import numpy as np

        from headway.files import atomic_write

        buffer = io.BytesIO()
        np.save(buffer, vectors.numpy())
        atomic_write(Path(options.output), buffer.getvalue())
        printer.say(f"{options.output}: {vectors.shape[0]} x {vectors.shape[1]} in {duration(seconds)}")
    elif not options.json:
        from headway.strict import dump_json

        for vector in vectors.tolist():
            print(dump_json(vector), flush=True)
    result: dict[str, object] = {"texts": len(texts), "size": vectors.shape[1], "seconds": seconds}
    printer.result(result | ({} if options.output else {"embeddings": vectors.tolist()}))
