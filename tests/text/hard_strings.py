"""Texts that part one tokenizer from another: the same 20,000 and more at every call, from nothing but a seed."""

from __future__ import annotations

import functools
import itertools
import random

# First and last code point of a stretch of letters; digits and marks of the script are inside.
SCRIPTS = {
    "latin": (0x41, 0x7A),
    "latin-1": (0xC0, 0xFF),
    "latin extended": (0x100, 0x24F),
    "phonetic": (0x250, 0x2FF),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x52F),
    "armenian": (0x531, 0x58A),
    "hebrew": (0x591, 0x5F4),
    "arabic": (0x600, 0x6FF),
    "syriac": (0x700, 0x74F),
    "devanagari": (0x900, 0x97F),
    "bengali": (0x980, 0x9FE),
    "tamil": (0xB82, 0xBFA),
    "thai": (0xE01, 0xE5B),
    "lao": (0xE81, 0xEDF),
    "tibetan": (0xF00, 0xFDA),
    "myanmar": (0x1000, 0x109F),
    "georgian": (0x10A0, 0x10FF),
    "jamo": (0x1100, 0x11FF),
    "ethiopic": (0x1200, 0x137C),
    "cherokee": (0x13A0, 0x13FD),
    "khmer": (0x1780, 0x17F9),
    "mongolian": (0x1800, 0x18AA),
    "latin additional": (0x1E00, 0x1EFF),
    "greek extended": (0x1F00, 0x1FFE),
    "glagolitic": (0x2C00, 0x2C5F),
    "hiragana": (0x3041, 0x309F),
    "katakana": (0x30A0, 0x30FF),
    "bopomofo": (0x3105, 0x312F),
    "compatibility jamo": (0x3131, 0x318E),
    "enclosed": (0x3200, 0x33FF),
    "han": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "han compatibility": (0xF900, 0xFAD9),
    "presentation forms": (0xFB00, 0xFDFB),
    "full width": (0xFF01, 0xFFEE),
    "gothic": (0x10330, 0x1034A),
    "deseret": (0x10400, 0x1044F),
    "adlam": (0x1E900, 0x1E959),
    "mathematical": (0x1D400, 0x1D7FF),
    "han extension": (0x20000, 0x2A6DF),
}
SPACES = [" ", "\t", "\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u2003", "\u2009"]
SPACES += ["\u200b", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\ufeff", "▁"]
MARKS = ["\u0300", "\u0301", "\u0302", "\u0308", "\u0323", "\u0327", "\u0338", "\u20d7", "\u3099", "\u309a", "\ufe0f"]
BIDI = ["\u061c", "\u200e", "\u200f", "\u202a", "\u202b", "\u202c", "\u202d", "\u202e", "\u2066", "\u2067", "\u2069"]
ODD = ["\x00", "\x01", "\x1b[31m", "\x7f", "\x80", "\x9f", "\xad", "\u034f", "\ufdd0", "\ufffd", "\uffff", "\U0010ffff"]
ODD += [
    "\ue000",
    "\U000e0041",
    "\U000f0000",
    "ﷺ",
    "ﬃ",
    "ß",
    "İ",
    "ı",
    "ſ",
    "K",
    "Å",
    "ǅ",
    "ŉ",
    "…",
    "㍿",
    "①",
    "²",
    "½",
    "Ⅷ",
]
EMOJI = [
    "😀",
    "👍🏽",
    "👩\u200d👩\u200d👧\u200d👦",
    "🏳️\u200d🌈",
    "🇵🇹",
    "🇺🇦🇯🇵",
    "1\ufe0f\u20e3",
    "❤️",
    "☺︎",
    "🧑🏿\u200d🚀",
    "🫠",
]
APOSTROPHES = [
    "don't",
    "DON'T",
    "I'Ll've",
    "we’re",
    "'tis",
    "rock'n'roll",
    "'s",
    "'S 'T 'RE 'VE 'M 'LL 'D",
    "l'été",
    "''",
]
NAMES = ["<s>", "</s>", "<unk>", "<pad>", "<mask>", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "[PAD]", "<|endoftext|>"]
NAMES += [
    "<|im_start|>user",
    "<|im_end|>",
    "<bos>",
    "<0x0A>",
    "<0xFF>",
    "<extra_id_0>",
    "<|startoftranscript|>",
    "<|",
    "|>",
]
CODE = [
    "for(int i=0;i<n;++i){\n\t a[i]<<=1;\n}",
    "def f(x):\n    return {k: v for k, v in x}\n",
    "SELECT * FROM t WHERE a='b';",
]
CODE += [
    '<div class="x">&nbsp;</div>',
    "$\\frac{a_{1}}{b^{2}}$",
    "a->b::c(&d)!=nullptr",
    "#!/bin/sh\n# x\n\n\nexit 0",
    '{"a":[1,2.5e-3]}',
]
URLS = [
    "https://example.org/a/b?c=d&e=%20#f",
    "user.name+tag@mail.example.co.uk",
    "C:\\Users\\x\\y.txt",
    "192.168.0.1:8080",
]
URLS += ["../../etc/passwd", "ftp://[::1]/", "data:text/plain;base64,SGVsbG8=", "@handle #hash_tag_42"]
CASES = [
    "straße STRASSE",
    "ΟΔΥΣΣΕΥΣ οδυσσευς ς",
    "İstanbul ISTANBUL istanbul ıstanbul",
    "Ǆǅǆ",
    "camelCaseHTTPServer",
    "MixedCASEword",
    "ǇUBAV",
]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "naïve",
    "café",
    "coöperate",
    "résumé",
    "hello",
]
WORDS += ["world", "transformer", "tokens"]
PUNCTUATION = [
    "...",
    "--",
    "---",
    "?!",
    "«»",
    "“”",
    "‘’",
    "，。",
    "、！？",
    "()",
    "[]{}",
    "//",
    "\\\\",
    "==",
    "###",
    "***",
    "___",
    "~~",
]


def _digits(rng: random.Random) -> str:
    digits = "".join(rng.choices("0123456789", k=rng.randrange(1, 12)))
    alphabet = rng.choice(["0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "０１２３４５６７８９"])
    return rng.choice(["", "-", "+", "$"]) + digits.translate(str.maketrans("0123456789", alphabet))


def _script(rng: random.Random) -> str:
    first, last = rng.choice(list(SCRIPTS.values()))
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randrange(1, 9)))


def _marked(rng: random.Random) -> str:
    letters = rng.choices("aeiouAEIOUnNcCkか ハ>", k=rng.randrange(1, 6))
    return "".join(letter + "".join(rng.choices(MARKS, k=rng.randrange(0, 4))) for letter in letters)


def _jamo(rng: random.Random) -> str:
    def syllable() -> str:
        tail = chr(rng.randint(0x11A8, 0x11C2)) if rng.random() < 0.5 else ""
        return chr(rng.randint(0x1100, 0x1112)) + chr(rng.randint(0x1161, 0x1175)) + tail

    return "".join(syllable() for _ in range(rng.randrange(1, 4)))


def _anything(rng: random.Random) -> str:
    points = (
        rng.randrange(0x110000) if rng.random() < 0.5 else rng.randrange(0x3000) for _ in range(rng.randrange(1, 6))
    )
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def _piece(rng: random.Random) -> str:
    made = rng.choice((_digits, _script, _marked, _jamo, _anything, None, None, None, None))
    if made:
        return made(rng)
    word = rng.choice(rng.choice((WORDS, APOSTROPHES, EMOJI, NAMES, CODE, URLS, CASES, PUNCTUATION, ODD, BIDI)))
    return rng.choice((word, word, word.upper(), word.title(), word * rng.randrange(1, 4)))


def _space(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice((" ", " ", ""))
    return "".join(rng.choices(SPACES, k=rng.randrange(1, 4)))


@functools.cache
def hard_strings() -> list[str]:
    """About 22,000 texts: every short run of white space, every run of one character, long words, and mixtures."""
    texts = ["", *SPACES]
    texts += [a + b + c for a, b, c in itertools.product(SPACES[:9], repeat=3)]
    texts += ["a" + "".join(run) + "b" for k in (1, 2, 3, 4) for run in itertools.product(" \t\n\r", repeat=k)]
    texts += [
        unit * k
        for unit in (" ", "\n", "\t", "a", "-", "=", ".", "日", "😀", "▁", "ab", "é", "\r\n")
        for k in range(1, 130)
    ]
    texts += ["1" * k + end for k in range(1, 40) for end in ("", "a", ".", " ")]
    texts += [
        "x" * 5000,
        "日本" * 2000,
        "aB" * 3000,
        "e\u0301" * 1500,
        "<|endoftext|>" * 50,
        "supercali" * 400,
        "🏳️\u200d🌈" * 300,
    ]
    for first, last in SCRIPTS.values():
        points = range(first, last + 1, max(1, (last - first) // 60))
        texts += ["".join(map(chr, points)), " ".join(map(chr, points))]
        texts += [f"a{chr(point)}b {chr(point)}" for point in points]
    rng = random.Random(2024)
    while len(texts) < 22_000:
        pieces = [_piece(rng) + _space(rng) for _ in range(rng.randrange(1, 9))]
        texts.append(_space(rng) * (rng.random() < 0.3) + "".join(pieces))
    return texts
