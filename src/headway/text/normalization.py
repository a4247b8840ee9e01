"""SentencePiece's normalization of a text, exactly (github.com/google/sentencepiece, src/normalizer.cc).

The `tokenizers` library applies the same table of replacements to grapheme clusters: it leaves か + U+3099
decomposed and drops the accent of a decomposed capital, and it has no symbols that are exempt. A tree made of a
.model file therefore says, under the key `sentencepiece` of its normalizer, what SentencePiece would do. Where that
key stands this module normalizes and the library only segments; its nodes are for other programs.
"""

from __future__ import annotations

import binascii
import contextlib
import re
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import numpy as np

from headway.errors import InputError
from headway.strict import field
from headway.text.patterns import leaves

KEY = "sentencepiece"
FLAGS = ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces", "treat_whitespace_as_suffix")
MARK = "\u2581"
"""Stands for a space inside a vocabulary."""
MAX_REPLACEMENT = 256  # bytes; the longest of Unicode's compatibility mappings has 33
MAX_KEY = 32  # characters; the longest key of NFKC has 4
MAX_ROWS = 1 << 15
_RUNS = re.compile(" {2,}")


class Normalization:
    """Turns a text into what the pieces of the vocabulary are matched with.

    Args:
        flags: the four FLAGS of normalizer_spec and trainer_spec.
        symbols: user-defined pieces, which the table leaves alone.
        charsmap: `precompiled_charsmap`, or nothing.
        where: the file named in errors.

    Raises:
        InputError: a charsmap that is not a table of replacements.
    """

    def __init__(self, flags: Mapping[str, bool], symbols: Iterable[str], charsmap: bytes, where: str) -> None:
        self._prefix, self._tidy, escape, self._at_end = (flags[name] for name in FLAGS)
        self._space = MARK if escape else " "
        self._symbols = literals(symbols)
        self._map = CharacterMap(charsmap, where) if charsmap else str

    def __call__(self, text: str) -> str:
        """The normalized text; empty for an empty one."""
        parts = self._symbols.split(text) if self._symbols else [text]
        mapped = "".join(part if number % 2 else self._map(part) for number, part in enumerate(parts))
        if not text or (self._tidy and not mapped.strip(" ") and all(self._map(letter) == " " for letter in text)):
            return ""
        if self._tidy:
            mapped = _RUNS.sub(" ", mapped).lstrip(" ")
        mapped = mapped.replace(" ", self._space)
        if self._prefix and not self._at_end:
            mapped = self._space + mapped
        if self._tidy:  # takes the prefix too where nothing else is left
            mapped = mapped.rstrip(self._space)
        return mapped + self._space if self._prefix and self._at_end else mapped


class CharacterMap:
    """Replaces the longest key of a table at each place of a text.

    The table comes as a double-array trie (github.com/s-yata/darts-clone, darts.h) behind its size in bytes, and
    behind it the replacements, each ended by a zero byte. The child of a node for a byte stands at the node's base,
    combined with the byte by exclusive or, and has the byte as its label; a node that ends a key has its value at
    its base. The table of NFKC has 225,000 keys, so they are looked up when met, and what is listed here is only
    with which characters a key may begin and go on.
    """

    def __init__(self, charsmap: bytes, where: str) -> None:
        size = int.from_bytes(charsmap[:4], "little")
        if not 4 <= size < len(charsmap) - 4 or size % 4:
            raise InputError(where, f"a charsmap of {len(charsmap)} bytes with a trie of {size}", "a whole charsmap")
        self._where = f"{where}: charsmap"
        self._units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.uint32)
        self._node = self._units.data
        self._replacements = charsmap[4 + size :]
        self._root = _base(self._node[0])
        firsts = list(self._characters([self._root]))
        self._seconds = {character for character, _, _ in self._characters(base for _, base, _ in firsts)}
        # A key is one character, or has its second among these: both are met where this pattern finds something.
        self._places = _any_of(self._seconds.union(character for character, _, ends in firsts if ends))
        self._alone: dict[str, tuple[int, str] | None] = {}

    def __call__(self, text: str) -> str:
        """The text with every key replaced. Raises InputError where the table points outside itself."""
        done, made = 0, []
        for match in self._places.finditer(text):
            place = match.start()
            for start in (place - 1, place):
                found = self._at(text, start) if start >= done else None
                if found:
                    made += [text[done:start], found[1]]
                    done = start + found[0]
        return "".join([*made, text[done:]]) if done else text

    def _at(self, text: str, start: int) -> tuple[int, str] | None:
        """The longest key at a place, by its length, and what replaces it."""
        if text[start + 1 : start + 2] in self._seconds:
            return self._longest(text[start : start + MAX_KEY])
        if text[start] not in self._alone:
            self._alone[text[start]] = self._longest(text[start])
        return self._alone[text[start]]

    def _longest(self, text: str) -> tuple[int, str] | None:
        """The number of characters of the longest key that the text begins with, and what replaces it."""
        base, best = self._root, (0, 0)
        for count, character in enumerate(text, 1):
            for byte in character.encode():
                place = base ^ byte
                if place >= len(self._node) or self._node[place] & 0x800000FF != byte:
                    return (best[0], self._replacement(best[1])) if best[0] else None
                unit = self._node[place]
                base = place ^ _base(unit)
            if unit & 0x100:
                best = (count, base)
        return (best[0], self._replacement(best[1])) if best[0] else None

    def _replacement(self, base: int) -> str:
        start = self._node[base] & 0x7FFFFFFF if base < len(self._node) else len(self._replacements)
        end = self._replacements.find(b"\0", start, start + MAX_REPLACEMENT)
        if end >= 0:
            with contextlib.suppress(UnicodeDecodeError):
                return self._replacements[start:end].decode()
        raise InputError(self._where, "a replacement that is no text", f"up to {MAX_REPLACEMENT} bytes of UTF-8")

    def _characters(self, bases: Iterable[int]) -> Iterator[tuple[str, int, bool]]:
        """What may come behind nodes: a character, the base behind it, and whether a key ends with it."""
        labels = np.arange(1, 256, dtype=np.uint32)
        level = {(b"", base) for base in bases}
        for _ in range(4):  # bytes of one character
            if len(level) > MAX_ROWS:
                raise InputError(self._where, f"a trie of more than {MAX_ROWS} first characters", "fewer")
            rows = sorted(level)
            places = np.array([base for _, base in rows], dtype=np.uint32)[:, None] ^ labels
            held = self._units[np.minimum(places, len(self._units) - 1)]
            hits = np.nonzero((held & 0x800000FF == labels) & (places < len(self._units)))
            level = set()
            for row, place, unit in zip(hits[0].tolist(), places[hits].tolist(), held[hits].tolist(), strict=True):
                name, base = rows[row][0] + bytes([unit & 0xFF]), place ^ _base(unit)
                try:
                    yield name.decode(), base, bool(unit & 0x100)
                except UnicodeDecodeError:
                    level.add((name, base))


def is_marked(tree: Mapping[str, object]) -> bool:
    """The tree's texts are normalized here and not by the library."""
    node = tree.get("normalizer")
    return isinstance(node, dict) and KEY in node


def normalization(tree: Mapping[str, object], where: str) -> Normalization | None:
    """What the tree's normalizer says under KEY; None where it says nothing. Raises InputError."""
    node = tree.get("normalizer")
    if not isinstance(node, dict) or not is_marked(tree):
        return None
    place = f"{where} normalizer.{KEY}"
    flags = {name: cast("bool", field(node[KEY], name, bool, place)) for name in FLAGS}
    symbols = cast("list[object]", field(node[KEY], "symbols", list, place))
    if not all(isinstance(symbol, str) and symbol for symbol in symbols):
        raise InputError(f"{place}.symbols", "an entry that is no symbol", "strings")
    maps = [inner for inner in leaves(node, "normalizer", where) if inner["type"] == "Precompiled"]
    coded = [str(field(inner, "precompiled_charsmap", str, place)) for inner in maps]
    try:
        charsmap = b64decode("".join(coded[:1]), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{place}: precompiled_charsmap", "no base64", "a table of replacements") from None
    return Normalization(flags, cast("list[str]", symbols), charsmap, place)


def literals(words: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern with one group that finds the longest of the words at a place; None without words."""
    ordered = sorted(words, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, ordered))})") if ordered else None


def _base(unit: int) -> int:
    return unit >> 10 << ((unit & 0x200) >> 6)


def _any_of(characters: set[str]) -> re.Pattern[str]:
    """A pattern that finds each of the characters, and others beyond U+FFFF, which Python would search one by one."""
    inside = "".join(map(re.escape, sorted(character for character in characters if character < "\U00010000")))
    return re.compile(f"[{inside}\U00010000-\U0010ffff]")
