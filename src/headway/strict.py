"""Strict JSON: the only door through which JSON from outside enters Headway.

Python's own parser takes what other parsers refuse or read differently: `NaN`, `1e400` (infinity),
duplicate keys (the last one wins), lone surrogates (which fail later, far away); 100,000 brackets raise
RecursionError and a 5,000-digit integer a plain ValueError. Here each of these is an InputError that names
the place (RFC 8259, and its interoperable subset RFC 7493). Left out: streaming and comments.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Mapping

from headway.errors import BugError, InputError

MAX_DEPTH = 64
MAX_INTEGER_DIGITS = 400

# UTF-32 comes first: its little-endian mark begins with the bytes of the UTF-16 one.
_MARKS = (
    (codecs.BOM_UTF8, "a UTF-8 byte order mark"),
    (codecs.BOM_UTF32_LE, "UTF-32 text"),
    (codecs.BOM_UTF32_BE, "UTF-32 text"),
    (codecs.BOM_UTF16_LE, "UTF-16 text"),
    (codecs.BOM_UTF16_BE, "UTF-16 text"),
)
# Possessive, and the closing quote optional: every attempt matches, so the scan is linear on any input.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_BRACKETS = re.compile(r"[^\[\]{}]+")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class _RefusedError(ValueError):
    """What the parser's hooks found; carries no place, which strict_json adds."""


def strict_json(data: str | bytes, where: str) -> object:
    """Parse one JSON value.

    Args:
        data: the document; bytes must be UTF-8 without a byte order mark.
        where: the file or field named in errors.

    Returns:
        dict, list, str, int, float, bool or None. Every float is finite and every str encodes as UTF-8.

    Raises:
        InputError: on anything that is not strict JSON, naming `where` and, where known, the line or the key.
    """
    text = _decode(data, where) if isinstance(data, bytes) else data
    if text.startswith("\ufeff"):
        raise InputError(where, "starts with a byte order mark", "plain UTF-8 JSON")
    check_unicode(text, where)
    depth = _depth(text)
    if depth > MAX_DEPTH:
        raise InputError(where, f"nested {depth} levels deep", f"at most {MAX_DEPTH}")
    try:
        value: object = json.loads(
            text, object_pairs_hook=_pairs, parse_int=_integer, parse_float=_float, parse_constant=_constant
        )
    except json.JSONDecodeError as error:
        found = f"not valid JSON at line {error.lineno} column {error.colno}: {error.msg}"
        raise InputError(where, found if text.strip() else "empty", "one JSON value") from None
    except _RefusedError as error:
        raise InputError(where, str(error), "strict JSON") from None
    if _SURROGATE_ESCAPE.search(text):
        # A pair of escapes is one character by now; what is left over is a half.
        check_unicode(json.dumps(value, ensure_ascii=False), where)
    return value


def dump_json(value: object, *, sort_keys: bool = False) -> str:
    """Write one value as compact JSON text that `strict_json` reads back.

    Raises:
        BugError: for NaN, infinity, lone surrogates or a type that JSON lacks: the caller made a wrong value.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, sort_keys=sort_keys, separators=(",", ":"))
        text.encode()
    except (ValueError, TypeError) as error:
        raise BugError("json", f"cannot be written: {error}", "finite numbers and valid Unicode") from None
    return text


def check_unicode(text: str, where: str) -> None:
    """Refuse a str that holds a lone surrogate and so has no UTF-8 form.

    Raises:
        InputError: `not valid Unicode`, with the character's position.
    """
    if text.isascii():
        return
    match = _SURROGATE.search(text)
    if match:
        found = f"not valid Unicode: lone surrogate U+{ord(match.group()):04X} at character {match.start()}"
        raise InputError(where, found, "text that has a UTF-8 form")


def field(data: object, key: str, kinds: type | tuple[type, ...], where: str) -> object:
    """The value of `key` in a parsed object, its type checked exactly: True is not an integer here.

    Args:
        data: what strict_json returned; must be an object.
        key: the key wanted.
        kinds: the types allowed; include `type(None)` to allow null and a missing key.
        where: the place of `data` in errors.

    Raises:
        InputError: naming `where` and the key.
    """
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(data, Mapping):
        raise InputError(where, f"is {_name(type(data))}", "an object")
    value: object = data.get(key)
    if type(value) in allowed:
        return value
    found = f"key {key!r} is {_name(type(value))}" if key in data else f"key {key!r} is missing"
    raise InputError(where, found, " or ".join(_name(kind) for kind in allowed))


def _name(kind: type) -> str:
    names = {dict: "an object", list: "an array", str: "a string", int: "an integer", float: "a number"}
    return names.get(kind, "null" if kind is type(None) else "a boolean" if kind is bool else kind.__name__)


def _decode(data: bytes, where: str) -> str:
    for mark, name in _MARKS:
        if data.startswith(mark):
            raise InputError(where, f"starts with {name}", "UTF-8 without a byte order mark")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(where, f"invalid UTF-8 at byte {error.start}", "UTF-8") from None


def _depth(text: str) -> int:
    """Deepest nesting, found without recursion: brackets inside strings are taken out first."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0
    deepest = depth = 0
    for bracket in _NOT_BRACKETS.sub("", _STRING.sub("", text)):
        if bracket in "[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    return deepest


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RefusedError(f"key {double[:80]!r} appears twice in one object")
    return made


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise _RefusedError(f"an integer of {len(digits)} digits (at most {MAX_INTEGER_DIGITS})")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _RefusedError(f"number {digits[:40]} is beyond the range of a double")
    return number


def _constant(name: str) -> float:
    raise _RefusedError(f"{name} is not a JSON number")
