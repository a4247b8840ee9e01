"""Training a tokenizer from a stream of texts, in memory that the stream's length does not set.

Byte-level BPE (arXiv 1508.07909, bytes as in GPT-2), WordPiece (arXiv 1609.08144) and Unigram (arXiv
1804.10959) come from the `tokenizers` library; byte and character tokenizers need only counting. Word counts grow
with the text read, so beyond `_BUDGET` characters an ever smaller share of the stream is counted: every second
piece, then every fourth. Left out: resuming an interrupted training (it is minutes at most).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Literal, cast, get_args

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from headway.errors import ConfigError, InputError, nearest
from headway.strict import check_unicode, strict_json
from headway.text.patterns import SPLIT_PATTERNS
from headway.text.pieces import ANYWHERE, SPACE, pieces
from headway.text.spec import ROLE_NAMES, added_entry, byte_characters
from headway.text.tokenizer import Tokenizer, library_errors

TrainKind = Literal["bpe", "wordpiece", "unigram", "byte", "char"]
Progress = Callable[[str, int], None]
"""Called with ("read", characters so far) while texts come in, ("merge", pieces wanted) when the search
for pieces begins and ("done", vocabulary size) at the end."""

# The smallest vocabulary of each kind before its special tokens; byte-level kinds hold all 256 bytes.
MINIMUM: dict[TrainKind, int] = {"bpe": 256, "byte": 256, "wordpiece": 64, "unigram": 64, "char": 1}
MAX_VOCAB = 1_000_000
MAX_SPECIAL = 256  # characters of a special token
_PIECE = 4096
_MAX_UNBROKEN = 64  # pieces without any place to cut: 256 KB of them say all that such text can say
_BUDGET = 1 << 27  # characters whose words are counted in full
# What the library's trainers keep beside the counts (85 bytes per character of new words for WordPiece, a suffix array
# for Unigram) would be gigabytes: an eighth of the characters for these.
_HEAVY = {"wordpiece": 8, "unigram": 8}
_ALPHABET_SAMPLE = 1 << 22


def train_tokenizer(
    texts: Iterable[str],
    kind: TrainKind,
    vocab_size: int,
    *,
    special_tokens: Iterable[str] = ("<|endoftext|>",),
    progress: Progress | None = None,
) -> Tokenizer:
    """Train a tokenizer on texts, which are read once and never kept.

    Args:
        texts: documents of any length.
        kind: bpe, wordpiece, unigram, byte or char.
        vocab_size: tokens wanted, special ones included. Where the text gives fewer, the result is smaller.
        special_tokens: control tokens. The kinds that need an unknown token add one if none is named here.
            The end-of-document role goes to the first of a usual name (`<|endoftext|>`, `</s>`...), else to the
            first without another role.
        progress: see `Progress`.

    Raises:
        ConfigError: unknown kind, too small or too large a vocabulary, unusable special tokens.
        InputError: no text at all; text that is not valid Unicode.
    """
    if kind not in MINIMUM:
        expected = f"one of {', '.join(get_args(TrainKind))}"
        raise ConfigError("tokenizer.kind", f"{kind!r}{nearest(str(kind), MINIMUM)}", expected)
    specials = check_special_tokens(special_tokens)
    unk = _unknown_token(kind, specials)
    if unk and unk not in specials:
        specials = [*specials, unk]
    _check_size(kind, vocab_size, len(specials))
    report = progress or (lambda stage, done: None)
    stream = _Stream(texts, SPACE if kind == "unigram" else ANYWHERE, report, _BUDGET // _HEAVY.get(kind, 1))
    if kind == "byte":
        tree = _byte_tree(specials)
    elif kind == "char":
        tree = _character_tree(stream, specials, str(unk), vocab_size)
    else:
        tree = _learned_tree(kind, stream, specials, unk, vocab_size)
    _assign_eos(tree)
    made = Tokenizer(tree)
    report("done", made.vocab_size)
    return made


def check_special_tokens(special_tokens: Iterable[str]) -> list[str]:
    """Refuse special tokens that could not be told from text or from each other.

    Raises:
        ConfigError: naming the entry, and the one it clashes with.
    """
    where = "tokenizer.special_tokens"
    entries = [special_tokens] if isinstance(special_tokens, str) else list(special_tokens)
    place: dict[str, int] = {}
    for number, token in enumerate(entries):
        if not isinstance(token, str):
            raise ConfigError(where, f"entry {number} is {type(token).__name__}", "a string")
        if not token.strip():
            raise ConfigError(where, f"entry {number} is {'blank' if token else 'empty'}", "a visible name")
        if len(token) > MAX_SPECIAL:
            raise ConfigError(where, f"entry {number} has {len(token)} characters", f"at most {MAX_SPECIAL}")
        if token in place:
            raise ConfigError(where, f"entries {place[token]} and {number} are both {token!r}", "each token once")
        if len(token.removeprefix("##")) <= 1:
            found = f"entry {number}, {token!r}, equals the base token {token!r} for that character"
            raise ConfigError(where, found, "a name of several characters", "write <|" + token + "|>")
        try:
            check_unicode(token, where)
        except InputError as error:
            raise ConfigError(where, f"entry {number} is {error.found}", "text that has a UTF-8 form") from None
        place[token] = number
    return entries


def _check_size(kind: TrainKind, vocab_size: int, specials: int) -> None:
    minimum = MINIMUM[kind] + specials
    if type(vocab_size) is not int or not minimum <= vocab_size <= MAX_VOCAB:
        found = f"{vocab_size!r:.40} for kind {kind} with {specials} special tokens"
        expected = f"an integer from {minimum} (the minimum) to {MAX_VOCAB}"
        raise ConfigError("tokenizer.vocab_size", found, expected, f"tokenizer.vocab_size={minimum}")


def _unknown_token(kind: TrainKind, specials: list[str]) -> str | None:
    """The unknown token of the kinds that need one: a special token of a usual name, else a new one."""
    if kind in ("bpe", "byte"):
        return None
    named = [token for token in specials if token in ROLE_NAMES["unk"]]
    return named[0] if named else "[UNK]" if kind == "wordpiece" else "<unk>"


class _Stream:
    """The texts as pieces of bounded length, thinned out as they add up; `characters` counts what was read."""

    def __init__(self, texts: Iterable[str], cuts: re.Pattern[str], report: Progress, budget: int) -> None:
        self.texts, self.cuts, self.report, self.budget = texts, cuts, report, budget
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        unbroken = number = 0
        for text in self.texts:
            check_unicode(text, "tokenizer training text")
            for piece in pieces(text, self.cuts, _PIECE):
                self.characters += len(piece)
                number += 1
                if len(piece) == _PIECE and not self.cuts.search(piece):
                    unbroken += 1
                    if unbroken > _MAX_UNBROKEN:
                        continue
                if number % (1 << (self.characters // self.budget).bit_length()) == 0:
                    yield piece
            self.report("read", self.characters)
        if not self.characters:
            raise InputError("tokenizer training text", "0 characters", "some text")


def _learned_tree(
    kind: TrainKind, stream: _Stream, specials: list[str], unk: str | None, vocab_size: int
) -> dict[str, object]:
    room = vocab_size - len(specials)
    texts: Iterable[str] = stream
    trainer: trainers.Trainer
    if kind == "bpe":
        bare, trainer = _bpe(vocab_size, specials)
    else:
        # WordPiece needs each character twice: at a word's beginning and, with ##, inside it.
        texts, alphabet = _limited_alphabet(stream, min(room // 4, 1000) if kind == "wordpiece" else room // 2)
        make = _wordpiece if kind == "wordpiece" else _unigram
        bare, trainer = make(vocab_size, specials, unk, alphabet)
    with library_errors("tokenizer training"):
        bare.train_from_iterator(_announced(texts, stream.report, vocab_size), trainer)
    tree = cast("dict[str, object]", strict_json(bare.to_str(), "trained tokenizer"))
    model = cast("dict[str, object]", tree["model"])
    if kind == "unigram":
        _settle_pieces(cast("list[tuple[str, float]]", model["vocab"]), model, specials)
        ids = {piece: number for number, (piece, _) in enumerate(cast("list[tuple[str, float]]", model["vocab"]))}
    else:
        ids = cast("dict[str, int]", model["vocab"])
    tree["added_tokens"] = [added_entry(ids[token], token) for token in specials]
    return tree


def _announced(texts: Iterable[str], report: Progress, wanted: int) -> Iterator[str]:
    yield from texts
    report("merge", wanted)


def _bpe(vocab_size: int, specials: list[str]) -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    bare = tokenizers.Tokenizer(models.BPE())
    # Llama 3's split: unlike GPT-2's it keeps digits in threes and a word's mark or capital 'S with it.
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERNS["llama-3"]), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=64,
    )
    return bare, trainer


def _wordpiece(
    vocab_size: int, specials: list[str], unk: str | None, alphabet: list[str]
) -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    bare = tokenizers.Tokenizer(models.WordPiece(unk_token=unk))
    bare.normalizer = normalizers.BertNormalizer(strip_accents=False, lowercase=False)
    bare.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bare.decoder = decoders.WordPiece()
    # The library numbers ## characters in the order of a hash map, another one in each process, and breaks ties
    # by number. Named beforehand as special they have one order; _learned_tree takes the mark off again.
    inner = [f"##{character}" for character in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*specials, *inner],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    return bare, trainer


def _unigram(
    vocab_size: int, specials: list[str], unk: str | None, alphabet: list[str]
) -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    bare = tokenizers.Tokenizer(models.Unigram())
    # Split before Metaspace: with spaces as the only boundaries, code is one long unseen word after another, and
    # training on 5 MB of it takes a minute instead of seconds.
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERNS["llama-3"]), "isolated")
    bare.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Metaspace(prepend_scheme="first")])
    bare.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        unk_token=unk,
        initial_alphabet=["▁", *alphabet],
        show_progress=False,
    )
    return bare, trainer


def _settle_pieces(vocab: list[tuple[str, float]], model: dict[str, object], specials: list[str]) -> None:
    """Make a trained Unigram vocabulary the same in every process and free of pieces that spell a special token.

    The library sums in the order of a hash map, which moves scores by 1e-11, and gives characters that no piece
    kept the scores lowest + 0, 0.0001, 0.0002... in that order. Here those share the lowest and all are rounded.
    """
    learned = [(piece, score) for piece, score in vocab if piece not in specials]
    lowest = min((score for _, score in learned), default=0.0)
    reach = lowest + 1e-4 * len(learned)
    settled: list[tuple[str, float]] = []
    for piece, score in learned:
        spare = len(piece) == 1 and score < reach and _is_whole((score - lowest) * 1e4)
        settled.append((piece, round(lowest if spare else score, 4)))
    settled.sort(key=lambda entry: (-entry[1], entry[0]))
    model["vocab"] = [[token, 0.0] for token in specials] + [list(entry) for entry in settled]
    model["unk_id"] = next(number for number, token in enumerate(specials) if token in ROLE_NAMES["unk"])


def _is_whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-6


def _limited_alphabet(stream: _Stream, size: int) -> tuple[Iterable[str], list[str]]:
    """The stream with rare characters blanked out, and the characters kept, sorted.

    Unigram must hold every character it is trained on, so a page of rare signs would fill a small vocabulary; the
    first 4 million characters decide which `size` characters count, the rest become the unknown token.
    """
    rest = iter(stream)
    counts: Counter[str] = Counter()
    sample: list[str] = []
    for piece in rest:
        counts.update(piece)
        sample.append(piece)
        if stream.characters >= _ALPHABET_SAMPLE:
            break
    kept = set(sorted(counts, key=lambda character: (-counts[character], character))[:size])
    blank = _Blank(kept)
    visible = sorted(character for character in kept if character.isprintable() and character != " ")
    return (piece.translate(blank) for piece in chain(sample, rest)), visible


class _Blank(dict[int, int]):
    """A str.translate table that keeps the characters given and turns all others into spaces."""

    def __init__(self, kept: set[str]) -> None:
        super().__init__({ord(character): ord(character) for character in kept})

    def __missing__(self, point: int) -> int:
        return ord(" ")


def _byte_tree(specials: list[str]) -> dict[str, object]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {piece: byte for byte, piece in enumerate(byte_characters())}
    return _tree(vocab, specials, 256, level, level, None)


def _character_tree(stream: _Stream, specials: list[str], unk: str, vocab_size: int) -> dict[str, object]:
    counts: Counter[str] = Counter()
    for piece in stream:
        counts.update(piece)
    commonest = sorted(counts, key=lambda character: (-counts[character], character))
    kept = sorted(commonest[: vocab_size - len(specials)])
    vocab = {piece: number for number, piece in enumerate([*specials, *kept])}
    return _tree(vocab, specials, 0, None, {"type": "Fuse"}, unk)


def _tree(
    vocab: dict[str, int],
    specials: list[str],
    first_special: int,
    split: object,
    decoder: object,
    unk: str | None,
) -> dict[str, object]:
    """A tokenizer.json of BPE without merges, every key that the format has."""
    model: dict[str, object] = {"type": "BPE", "dropout": None, "unk_token": unk}
    model |= {"continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    added = [added_entry(first_special + number, content) for number, content in enumerate(specials)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": decoder,
        "model": {**model, "vocab": vocab, "merges": []},
    }


def _assign_eos(tree: dict[str, object]) -> None:
    """Where no special token has a usual end-of-document name, the first one without another role gets it."""
    usual = {name: role for role, names in ROLE_NAMES.items() for name in names}
    entries = cast("list[dict[str, object]]", tree["added_tokens"])
    named = [(entry, usual.get(str(entry["content"]))) for entry in entries]
    if any(role == "eos" for _, role in named):
        return
    for entry, role in named:
        if role:
            entry["roles"] = [role]
    free = [entry for entry, role in named if role is None]
    if free:
        free[0]["roles"] = ["eos"]
