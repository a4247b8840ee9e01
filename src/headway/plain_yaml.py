"""YAML as plain data: mappings, lists, text, numbers, true and false, null; nothing else, and back unchanged.

YAML 1.1, which PyYAML reads, makes booleans of `on` and `yes`, dates of dates, sixty-based numbers of `1:30` and text
of `1e-3`. Here scalars are read as YAML 1.2's core schema reads them, in base ten. A tag, an anchor, an alias, a key
that is no word and a key that stands twice are errors with their line: no tag runs code or includes a file, and no
file of a few lines expands to billions of values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from headway import files
from headway.errors import ConfigError, InputError

MAX_FILE = 1 << 24
_MAX_DIGITS = 400  # of an integer; beyond it Python refuses to parse, or takes long
_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9][0-9_]*$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
            r"|\.[0-9]+([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
        ),
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """Composes plain nodes only."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own protocol

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        found = next((name for name in ("anchor", "tag") if getattr(event, name, None) is not None), "")
        found = "alias" if isinstance(event, yaml.AliasEvent) else found
        if found:
            raise yaml.MarkedYAMLError(problem=f"{found} found", problem_mark=event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what any reader might take for something else than text: YAML 1.1's words and ours."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # NEL, LS and PS are line breaks to PyYAML's reader and letters to its writer, unless in double quotes.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar(_TAG + "str", text, style)


_Dumper.add_representer(str, _text)
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key that is no word", problem_mark=key_node.start_mark)
        key = str(key_node.value)
        if key in out:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
        out[key] = loader.construct_object(value_node, deep=True)
    return out


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = str(node.value).replace("_", "").lower()
    if re.fullmatch(r"[-+]?\d+", text) and len(text) <= _MAX_DIGITS:
        return int(text)
    return float(re.sub(r"\.(inf|nan)", r"\1", text))


_Loader.add_constructor(_TAG + "float", _number)
_Loader.add_constructor(_TAG + "int", _number)
_Loader.add_constructor(_TAG + "map", _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML value. Raises ConfigError naming `where` and the line."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
        raise ConfigError(f"{where}{line}", f"not plain YAML: {problem}", "key: value lines without tags") from None


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A file's mapping, and the line of each dotted key.

    Raises:
        InputError: no regular file of UTF-8 text. ConfigError: not plain YAML, or no mapping.
    """
    try:
        text = files.read_bytes(path, MAX_FILE).decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(str(path), f"invalid UTF-8 at byte {error.start}", "a YAML file in UTF-8") from None
    tree = parse_yaml(text, str(path))
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(str(path), f"a {type(tree).__name__}", "a mapping of keys to values")
    return tree or {}, _lines(text)


def _lines(text: str) -> dict[str, int]:
    out: dict[str, int] = {}

    def visit(node: yaml.Node | None, path: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = f"{path}.{key.value}" if path else str(key.value)
                out[here] = key.start_mark.line + 1
                visit(value, here)

    visit(yaml.compose(text, _Loader), "")
    return out


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """YAML in the order of the keys, as written beside every result; `parse_yaml` gives the same tree again."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
