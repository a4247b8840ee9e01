"""A verb's options are a dataclass; this turns it into a command line and an argument list into an instance of it.

Parsing and running are two steps: Typer turns KeyboardInterrupt and a broken pipe into exit codes of its own, and the
verbs must see both themselves. A free word `name=value` is an override: of a run config's key in `train`, of the
option of that name elsewhere (`temperature=0` is `--temperature 0`).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import Annotated, TypeVar, get_type_hints

import typer

from headway.errors import ConfigError, nearest

option = typer.Option
_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every verb takes: free words and two flags."""

    words: Annotated[list[str] | None, typer.Argument(metavar="[PATH] [key=value]...", show_default=False)] = None
    json: Annotated[bool, typer.Option("--json", help="One JSON object as the only line on stdout.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False

    @property
    def paths(self) -> list[str]:
        """The free words that are no overrides."""
        return [word for word in self.words or [] if not _OVERRIDE.match(word)]

    @property
    def overrides(self) -> list[str]:
        """The free words `dotted.key=value`."""
        return [word for word in self.words or [] if _OVERRIDE.match(word)]

    def one_path(self, what: str) -> str:
        """The only free word. Raises ConfigError when there is none or a second one."""
        if len(self.paths) != 1:
            found = "no path" if not self.paths else f"{len(self.paths)} paths: {', '.join(self.paths)}"
            raise ConfigError("PATH", found, what)
        return self.paths[0]


T = TypeVar("T", bound=Common)


def parse(options: type[T], arguments: Sequence[str], program: str, summary: str) -> T | int:
    """The options in `arguments`, or the exit code where `--help` has answered already.

    Raises:
        ConfigError: an unknown option (with the nearest), a missing or wrong value.
    """
    parsed: list[T] = []
    hints = get_type_hints(options, include_extras=True)

    def keep(**values: object) -> None:
        parsed.append(options(**values))  # type: ignore[arg-type]

    # Typer reads a function's signature: give it one made of the dataclass's fields.
    keep.__annotations__ = hints
    keep.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in dataclasses.fields(options)
        ]
    )
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(help=summary)(keep)
    try:
        code = typer.main.get_command(app).main(list(arguments), program, standalone_mode=False)
    except Exception as error:
        # Typer ships its own copy of click since 0.20, so the base class has no stable import path.
        if not hasattr(error, "format_message"):
            raise
        raise usage_error(str(error.format_message()), program) from None
    return parsed[0] if parsed else int(code or 0)


def arguments(options: Common) -> list[str]:
    """The command line that parses to these options."""
    out = list(options.words or [])
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name == "words" or value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        out += [flag] if value is True else [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
    return out


def usage_error(message: str, program: str) -> ConfigError:
    """What the parser says about wrong usage, as one of our errors."""
    found = message.strip().rstrip(".")
    return ConfigError(program, found[:1].lower() + found[1:], "", f"{program} --help")


def by_name(options: T, program: str) -> T:
    """Apply the overrides `name=value` to the options of these names. Raises ConfigError."""
    known = [f.name for f in dataclasses.fields(options) if f.name not in ("words", "debug")]
    arguments = []
    for word in options.overrides:
        key, _, value = word.partition("=")
        name = key.replace("-", "_")
        if name not in known:
            hint = nearest(name, known)
            raise ConfigError(key, f"unknown key {key!r}{hint}", "" if hint else ", ".join(known))
        flag = f"--{name.replace('_', '-')}"
        is_switch = isinstance(getattr(options, name), bool)
        if is_switch and value not in ("true", "false"):
            raise ConfigError(key, repr(value), "true or false")
        if not is_switch or value == "true":
            arguments.append(flag if is_switch else f"{flag}={value}")
    if not arguments:
        return options
    changed = parse(type(options), arguments, program, "")
    assert not isinstance(changed, int)
    given = {word.partition("=")[0].replace("-", "_") for word in options.overrides}
    return dataclasses.replace(options, **{name: getattr(changed, name) for name in given})
