"""What a tokenizer.json may run: the known node types and the known regular expressions, nothing else.

The `tokenizers` library compiles any regex that a file brings into a backtracking engine, so `(a+)+$` in a file
someone sent hangs the process. Published tokenizers use a short list of patterns; only those run here.
"""

from __future__ import annotations

from collections.abc import Iterator

from headway.errors import InputError
from headway.strict import field

# The parts that the split patterns are built of. Each was published with a model; the name is that model's.
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASELESS_SHORT = r"'(?i:[sdmt]|ll|ve|re)"
_SPACE_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PREFIX = r"[^\r\n\p{L}\p{N}]?"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(digits: str, ending: str) -> str:
    """The o200k shape: a word is capitals then small letters (tiktoken, openai_public.py)."""
    words = rf"{_PREFIX}{_UPPER}*{_LOWER}+{ending}|{_PREFIX}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE_END}"


SPLIT_PATTERNS: dict[str, str] = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt-2-short": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-3": rf"{_CASELESS}|{_PREFIX}\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACE_END}",
    "qwen-2": rf"{_CASELESS}|{_PREFIX}\p{{L}}+|\p{{N}}|{_PUNCTUATION}|{_SPACE_END}",
    "qwen-3.5": rf"{_CASELESS}|{_PREFIX}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE_END}",
    "cl100k": rf"{_CASELESS_SHORT}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "cl100k-possessive": rf"{_CASELESS_SHORT}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}++|\p{{N}}{{1,3}}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "nanochat": rf"{_CASELESS_SHORT}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{{1,2}}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "o200k": _cased(r"\p{N}{1,3}", _CASELESS + "?"),
    "tekken": _cased(r"\p{N}", ""),
    "deepseek-3-words": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek-3-cjk": "[一-龥\u3040-ゟ゠-ヿ]+",
    "deepseek-coder-words": r"\s?\p{L}+",
    "deepseek-coder-punctuation": r"\s?\p{P}+",
    "deepseek-coder-cjk": "[一-龥ࠀ-一가-\ud7ff]+",
    "digits-run": r"\p{N}+",
    "digits-3": r"\p{N}{1,3}",
    "digits": r"\p{N}",
    "falcon": "[0-9][0-9][0-9]",
    "falcon-punctuation": r"[\p{P}\$\+<=>\^~\|`]+",
    "default-punctuation": r"[\p{P}\$\+<=>\^~\|]+",  # what llama.cpp does where a file names no pattern
    "newline": r"[\r\n]",
    "clip": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "clip-specials": r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
}
REPLACE_PATTERNS = (r"\s+", r"\s", " {2,}", r"\n", r" +", r"\r\n", r"^ ", r" $", r"\A | \z", r"\z")
_KNOWN = frozenset(SPLIT_PATTERNS.values()) | frozenset(REPLACE_PATTERNS)


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


# part of the file -> (key under which a Sequence keeps its nodes, the types that may stand there)
_NODES: dict[str, tuple[str, frozenset[str]]] = {
    "normalizer": (
        "normalizers",
        _types("BertNormalizer ByteLevel Lowercase NFC NFD NFKC NFKD Nmt Precompiled Prepend Replace Strip")
        | _types("StripAccents"),
    ),
    "pre_tokenizer": (
        "pretokenizers",
        _types("BertPreTokenizer ByteLevel CharDelimiterSplit Digits Metaspace Punctuation Split")
        | _types("UnicodeScripts Whitespace WhitespaceSplit"),
    ),
    "post_processor": (
        "processors",
        _types("BertProcessing ByteLevel RobertaProcessing TemplateProcessing"),
    ),
    "decoder": (
        "decoders",
        _types("BPEDecoder ByteFallback ByteLevel CTC Fuse Metaspace Replace Strip WordPiece"),
    ),
}
MAX_STRING = 256  # characters of a plain pattern or its replacement
MAX_GROWTH = 16.0  # a chain of replacements that doubles the text 40 times is a bomb


def leaves(node: object, part: str, where: str) -> Iterator[dict[str, object]]:
    """The nodes of one part of a tokenizer.json with its Sequences flattened, in the order they run.

    Raises:
        InputError: a node of an unknown type or of the wrong shape, named by file and key.
    """
    if node is None:
        return
    inner, known = _NODES[part]
    kind = str(field(node, "type", str, f"{where} {part}"))
    if kind == "Sequence":
        children = field(node, inner, list, f"{where} {part}")
        assert isinstance(children, list)
        for child in children:
            if child is None:
                raise InputError(f"{where} {part}", "a null in a Sequence", "a node")
            yield from leaves(child, part, where)
        return
    if kind not in known:
        raise InputError(f"{where} {part}", f"type {kind[:80]!r}", f"one of {', '.join(sorted(known))}")
    assert isinstance(node, dict)
    yield node


def check_nodes(tree: dict[str, object], where: str) -> None:
    """Refuse a tokenizer.json that would run an unknown pattern or blow its text up.

    Raises:
        InputError: naming the file, the part and the pattern.
    """
    for part in _NODES:
        growth = 1.0
        for node in leaves(tree.get(part), part, where):
            growth *= _check_strings(node, f"{where} {part}.{node['type']}")
        if growth > MAX_GROWTH:
            found = f"replacements that grow the text up to {growth:.3g} times"
            raise InputError(f"{where} {part}", found, f"at most {MAX_GROWTH:g}")


def _check_strings(node: dict[str, object], where: str) -> float:
    """Checks one node's pattern and replacement; returns by how much it can lengthen a text."""
    length = 1
    if "pattern" in node:
        pattern = field(node, "pattern", dict, where)
        assert isinstance(pattern, dict)
        if set(pattern) == {"String"}:
            text = str(field(pattern, "String", str, where))
            if not 0 < len(text) <= MAX_STRING:
                raise InputError(where, f"a pattern of {len(text)} characters", f"1 to {MAX_STRING}")
            length = len(text)
        elif set(pattern) == {"Regex"}:
            text = str(field(pattern, "Regex", str, where))
            if text not in _KNOWN:
                expected = "one of the patterns published with known models (headway/text/patterns.py)"
                raise InputError(where, f"unknown regular expression {text[:120]!r}", expected)
        else:
            raise InputError(where, "key 'pattern' is neither String nor Regex", "one of the two")
    contents = [node[key] for key in ("content", "prepend", "prefix") if isinstance(node.get(key), str)]
    longest = max((len(str(content)) for content in contents), default=0)
    if longest > MAX_STRING:
        raise InputError(where, f"a string of {longest} characters", f"at most {MAX_STRING}")
    return max(1.0, longest / length) if node["type"] == "Replace" else 1.0
