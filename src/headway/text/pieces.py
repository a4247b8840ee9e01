"""Where a long text may be cut so that its pieces encode to what the whole would.

One word of 50 MB costs the BPE merge loop gigabytes, and one request of 2 MB would hold a core for
seconds. A text is therefore encoded in pieces of bounded length. A cut is exact where every known split pattern
has a boundary there whatever stands to the left, and none looks across it:

- before a single space between two other characters: nothing but white space takes a space at its end;
- after a single newline before a letter or digit: no pattern starts a word with a newline;
- before an ideographic mark that follows a letter or digit.

`\\s+(?!\\S)` looks past a run of spaces, hence the word "single". Where no such place is within reach (a
word longer than a piece) the cut is made anyway: the encoding of that one word differs from an unbounded
encoder's, and decoding still gives the text back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from headway.text.normalization import MARK, is_marked
from headway.text.patterns import SPLIT_PATTERNS
from headway.text.spec import Spec

PIECE = 1 << 16
"""Characters per piece where exact cuts exist."""
WHOLE = 1 << 22
"""Characters per piece for tokenizers without exact cuts (no pre-tokenizer: Llama 2, Gemma)."""

# Every alternative begins with a literal, which lets the engine skip to it; looking behind first is 8 times slower.
_BEFORE_SPACE = r" (?<=\S )(?=\S)"
_AFTER_NEWLINE = r"\n(?<=\S\n)(?=[^\W_])"
_BEFORE_MARKS = [rf"{mark}(?<=[^\W_]{mark})" for mark in "，。、！？；："]
ANYWHERE = re.compile("|".join([_BEFORE_SPACE, _AFTER_NEWLINE, *_BEFORE_MARKS]))
# Metaspace and add_prefix_space put a space before every piece that does not begin with one.
SPACE = re.compile(_BEFORE_SPACE)
# Where SentencePiece's normalization has been done, a mark stands for a space.
_BEFORE_MARK = re.compile(f"{MARK}(?<=[^{MARK}]{MARK})")
_LEADING_MARKS = re.compile(f"{MARK}*[^{MARK}]*")
# A normalizer may compose across any cut, but never across one between ASCII characters.
_ASCII_SPACE = re.compile(r" (?<=[A-Za-z0-9] )(?=[A-Za-z0-9])")

_LOCAL_NORMALIZERS = frozenset(
    ["BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "StripAccents"]
)
_SPACE_RUNS = frozenset([r"\s+", r"\s", " {2,}", " +"])
_SPLITS_AT_SPACES = frozenset(["BertPreTokenizer", "Metaspace", "Whitespace", "WhitespaceSplit"])
_FULL_PATTERNS = frozenset(pattern for pattern in SPLIT_PATTERNS.values() if r"\s+(?!\S)|\s" in pattern)


def safe_cuts(spec: Spec) -> re.Pattern[str] | None:
    """The pattern for `places` that finds exact cuts of this tokenizer; None where none are known."""
    pattern = _pattern(spec)
    for token in spec.added:
        # A plain added token must not reach across a cut: neither by its own text nor by swallowing spaces.
        if pattern is None or token.special:
            continue
        inside = places(f"x{token.content}x", pattern)
        if token.spaced or any(1 < place < len(token.content) + 1 for place in inside):
            return None
    return pattern


def places(text: str, cuts: re.Pattern[str], start: int = 0, end: int | None = None) -> list[int]:
    """Where `text` may be cut within [start, end): after a newline, before anything else that `cuts` finds."""
    found = cuts.finditer(text, start, len(text) if end is None else end)
    return [match.end() if match.group() == "\n" else match.start() for match in found]


def pieces(text: str, cuts: re.Pattern[str] | None, limit: int) -> Iterator[str]:
    """`text` in pieces of 1 to `limit` characters, cut at the last match of `cuts` within reach."""
    start = 0
    while len(text) - start > limit:
        stop = _last_cut(text, cuts, start, start + limit)
        yield text[start:stop]
        start = stop
    yield text[start:]


def _last_cut(text: str, cuts: re.Pattern[str] | None, start: int, end: int) -> int:
    # Most texts have a cut in the last few words; look further back only if there is none.
    for reach in (256, end - start):
        found = places(text, cuts, max(start + 1, end - reach), end) if cuts else []
        if found:
            return found[-1]
    return end


def _pattern(spec: Spec) -> re.Pattern[str] | None:
    if is_marked(spec.tree):
        # No piece reaches across a mark that follows something else, and the mark itself is known.
        whole = MARK in spec.vocab and all(map(_LEADING_MARKS.fullmatch, spec.vocab))
        return _BEFORE_MARK if whole else None
    steps, normalizers = spec.nodes("pre_tokenizer"), spec.nodes("normalizer")
    if not any(map(_splits, steps)) or not all(map(_local, steps)):
        return None
    if any(not _local_normalizer(node) for node in normalizers):
        return None
    if normalizers:
        return _ASCII_SPACE
    prefixed = any(node["type"] == "Metaspace" or node.get("add_prefix_space") for node in steps)
    return SPACE if prefixed else ANYWHERE


def _splits(node: dict[str, object]) -> bool:
    """This pre-tokenizer puts a boundary at every cut."""
    kind = node["type"]
    if kind == "Split":
        return _regex(node) in _FULL_PATTERNS
    if kind == "ByteLevel":
        return node.get("use_regex") is not False
    return kind in _SPLITS_AT_SPACES and node.get("split") is not False


def _local(node: dict[str, object]) -> bool:
    """This pre-tokenizer never joins what stands on the two sides of a cut."""
    kind = node["type"]
    if kind == "Split" and _regex(node) is None:
        return False
    if kind in ("Split", "Punctuation"):
        return node.get("behavior", "Isolated") in ("Isolated", "Removed", "Contiguous")
    return kind in _SPLITS_AT_SPACES or kind in ("ByteLevel", "Digits")


def _local_normalizer(node: dict[str, object]) -> bool:
    kind = node["type"]
    return kind in _LOCAL_NORMALIZERS or (kind == "Replace" and _regex(node) in _SPACE_RUNS)


def _regex(node: dict[str, object]) -> str | None:
    pattern = node.get("pattern")
    return pattern.get("Regex") if isinstance(pattern, dict) else None
