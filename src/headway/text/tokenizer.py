"""Text to token ids and back: one class over the `tokenizers` library and its one file, tokenizer.json.

User text is encoded with special tokens off: `<|endoftext|>` typed by a user becomes ordinary pieces, and only
`control=True`, a control segment or the file's own template ([CLS] ... [SEP], in `encode_input`) can produce a control
id. Byte and character tokenizers are expressed in the same file but encoded by a table lookup in numpy; where a file
came from SentencePiece its text is normalized by `headway.text.normalization`. Long texts are cut as
`headway.text.pieces` explains.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import cast

import numpy as np
import tokenizers

from headway import files
from headway.errors import HeadwayError, InputError
from headway.strict import check_unicode, dump_json, strict_json
from headway.text.decoding import TokenBytes
from headway.text.formats import FILE, beside_files, chat_template, find_tokenizer
from headway.text.normalization import literals, normalization
from headway.text.pieces import PIECE, WHOLE, pieces, safe_cuts
from headway.text.sentencepiece import byte_piece
from headway.text.spec import Kind, Spec, empty_tree, merge_parts, read_spec

_BATCH = 1 << 21  # characters given to the library at once: bounds the memory of its results
Ids = np.ndarray[tuple[int], np.dtype[np.int32]]


class Tokenizer:
    """A tokenizer built from the parsed content of a tokenizer.json.

    Attributes:
        kind: bpe, wordpiece, unigram, byte, char or word (a WordLevel file).
        vocab_size: one more than the highest id: the embedding rows a model needs.
        bos_id, eos_id, pad_id, unk_id, mask_id: the tokens in these roles, or None.
        special_ids: ids of all control tokens.
        prefix_ids, suffix_ids: what the file's template puts around one text, such as [CLS] and [SEP].
        chat_template: the Jinja template that came with the tokenizer, or None; no part of `hash`.

    Raises:
        InputError: on a tree that is not a usable tokenizer, naming `where` and the key.
    """

    def __init__(self, tree: object, where: str = "tokenizer", config: object = None) -> None:
        spec = read_spec(tree, where, config)
        self._where = where
        text = dump_json(spec.tree)
        self._json = text.encode()  # as a str, characters beyond Latin-1 would make every one take two bytes
        self.kind: Kind = spec.kind
        self.vocab_size = spec.vocab_size
        roles = spec.roles
        self.bos_id, self.eos_id, self.pad_id = roles.get("bos"), roles.get("eos"), roles.get("pad")
        self.unk_id, self.mask_id = roles.get("unk"), roles.get("mask")
        self._special = {token.content: token.id for token in spec.added if token.special}
        self.special_ids = frozenset(self._special.values())
        self.chat_template = chat_template(config, where)
        self._normalization = normalization(spec.tree, where)
        plain, hidden = _unreachable(spec, self.unk_id)
        with library_errors(where):
            self._plain = self._library(text if plain is spec.tree else dump_json(plain))
            self._plain.encode_special_tokens = True
            decoder = self._plain.decoder
            self._post_processor = spec.tree.get("post_processor")
            self.prefix_ids, self.suffix_ids = self._template("a")
        fallback = self.kind == "unigram" and spec.model.get("byte_fallback") is True
        self._unknown_bytes = [spec.vocab.get(byte_piece(byte)) for byte in range(256)] if fallback else []
        # The library holds every other spelling; a second list of them would be megabytes.
        self._spelled = hidden | {token.id: token.content for token in spec.added}
        self._bytes = TokenBytes(spec, decoder, self.token)
        self._cuts = safe_cuts(spec)
        self._table = _character_table(spec) if self.kind == "char" else None
        for token in spec.added if plain is spec.tree else ():
            # The library numbers added tokens itself and only warns where the file says otherwise.
            if self._plain.token_to_id(token.content) != token.id:
                raise InputError(f"{where} added_tokens", f"{token.content[:80]!r} has a wrong id {token.id}", "no gap")

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "tokenizer") -> Tokenizer:
        """Build from the text of a tokenizer.json. Raises InputError."""
        return cls(strict_json(text, where), where)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer from its file or folder, in any form that `headway.text.formats` knows.

        Raises:
            InputError: missing, cut, of wrong types or running unknown patterns; names file and key.
        """
        return cls(*find_tokenizer(Path(path)))

    def save(self, path: str | Path) -> Path:
        """Write tokenizer.json atomically; a path without the suffix .json is a folder. Raises MachineError.

        Into a folder go also tokenizer_config.json and chat_template.jinja, which hold for transformers what
        tokenizer.json has no place for.
        """
        if Path(path).suffix == ".json":
            file, beside = Path(path), {}
        else:
            file, beside = Path(path) / FILE, beside_files(self._roles(), self.chat_template)
        files.make_dir(file.parent)
        files.atomic_write(file, self.to_json().encode())
        for name, text in beside.items():
            if text is None:
                files.remove(file.with_name(name))
            else:
                files.atomic_write(file.with_name(name), text.encode())
        return file

    def files(self) -> dict[str, str]:
        """The files of a folder with this tokenizer, by name: tokenizer.json and what transformers reads beside it."""
        beside = beside_files(self._roles(), self.chat_template)
        return {FILE: self.to_json()} | {name: text for name, text in beside.items() if text is not None}

    def to_json(self) -> str:
        """The tokenizer.json text: equal before and after save and load."""
        return self._json.decode()

    @cached_property
    def hash(self) -> str:
        """sha256 of the tokenizer.json with sorted keys; two tokenizers with one hash encode alike."""
        tree = strict_json(self._json, self._where)
        return hashlib.sha256(dump_json(tree, sort_keys=True).encode()).hexdigest()

    def special_id(self, content: str) -> int | None:
        """The id of the control token with this text, or None."""
        return self._special.get(content)

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Token ids of one text.

        Args:
            text: any valid Unicode.
            control: recognise special tokens in the text. Never for text that came from outside.

        Raises:
            InputError: `not valid Unicode` for lone surrogates; a character that a vocabulary without an
                unknown token cannot express.
        """
        if control:
            check_unicode(text, "text")
            if self._normalization:
                parts = self._names.split(text) if self._names else [text]
                text = "".join(part if odd % 2 else self._normalization(part) for odd, part in enumerate(parts))
            with library_errors(self._where):
                return list(self._control.encode(text, add_special_tokens=False).ids)
        return self.encode_batch([text])[0]

    def encode_input(self, text: str) -> list[int]:
        """Token ids of one user text inside the file's template: `prefix_ids`, the text's, `suffix_ids`."""
        return [*self.prefix_ids, *self.encode(text), *self.suffix_ids]

    def encode_spans(self, text: str) -> list[tuple[int, int, int]]:
        """(id, start, stop) of each token of one user text, in characters of the text; a token of no character, such as
        the second byte of one, has start = stop or repeats its character.

        Raises InputError as `encode` does, and for a SentencePiece tokenizer, whose normalized text has other places.
        """
        if self.kind in ("byte", "char"):
            ids = self._direct(text).tolist()
            sizes = [len(letter.encode()) if self.kind == "byte" else 1 for letter in text]
            places = [place for place, size in enumerate(sizes) for _ in range(size)]
            return [(number, place, place + 1) for number, place in zip(ids, places, strict=True)]
        if self._normalization:
            raise InputError(self._where, "normalizes text as SentencePiece does", "a tokenizer that keeps its places")
        check_unicode(text, "text")
        with library_errors(self._where):
            found = self._plain.encode(text, add_special_tokens=False)
        return [(number, *span) for number, span in zip(found.ids, found.offsets, strict=True)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many user texts, on all cores (TOKENIZERS_PARALLELISM=false for one). Raises InputError."""
        if self.kind in ("byte", "char"):
            return [self._direct(text).tolist() for text in texts]
        results: list[list[int]] = [[] for _ in texts]
        numbered = ((number, piece) for number, text in enumerate(texts) for piece in self._pieces(text))
        for group in _grouped(numbered):
            for (number, _), ids in zip(group, self._encode([piece for _, piece in group]), strict=True):
                if results[number]:
                    results[number].extend(ids)
                else:
                    results[number] = ids
        return results

    def encode_long(self, text: str) -> Iterator[Ids]:
        """The ids of one user text of any length as int32 arrays, in order, in bounded memory.

        Joined together they equal `encode(text)`. Raises InputError.
        """
        if self.kind in ("byte", "char"):
            for start in range(0, len(text), _BATCH):
                yield self._direct(text[start : start + _BATCH])
            return
        for group in _grouped((0, piece) for piece in self._pieces(text)):
            for ids in self._encode([piece for _, piece in group]):
                yield np.array(ids, dtype=np.int32)

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        """Token ids of (text, is_control) segments: control tokens are recognised in control segments only.

        Neighbours of one sort are joined first, so that a cut between two user segments leaves no trace.
        """
        ids: list[int] = []
        for control, group in groupby(segments, key=lambda segment: segment[1]):
            ids += self.encode("".join(text for text, _ in group), control=control)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids; unfinished UTF-8 becomes U+FFFD, ids without a token add nothing.

        Raises:
            InputError: for a negative id.
        """
        kept = [number for number in ids if not (skip_special and number in self.special_ids)]
        if self._bytes.by_table:
            return b"".join(map(self._bytes.middle, kept)).decode(errors="replace")
        if min(kept, default=0) < 0:
            self._bytes.middle(min(kept))
        return self._bytes.text(kept)

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """The exact bytes of token ids, unfinished characters included; a longer list only adds bytes."""
        kept = [number for number in ids if not (skip_special and number in self.special_ids)]
        return b"".join(self._bytes.middle(n) if place else self._bytes.first(n) for place, n in enumerate(kept))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds after another; a control token gives its name. Raises InputError."""
        return self._bytes.middle(token_id)

    def token(self, token_id: int) -> str | None:
        """The vocabulary entry of an id as the file spells it, or None."""
        inside = 0 <= token_id < self.vocab_size
        return (self._spelled.get(token_id) or self._plain.id_to_token(token_id)) if inside else None

    @cached_property
    def pair_ids(self) -> tuple[tuple[int, ...], ...]:
        """What the file's template puts before, between and behind two texts. Raises InputError if it has no such."""
        with library_errors(self._where):
            return self._template("a", "a")

    def _template(self, *texts: str) -> tuple[tuple[int, ...], ...]:
        """The ids that the post-processor puts around texts of one token, found by running it on them."""
        place = f"{self._where} post_processor"
        tree = empty_tree({"type": "BPE", "vocab": {"a": 0}, "merges": []}) | {"post_processor": self._post_processor}
        made = tokenizers.Tokenizer.from_str(dump_json(tree)).encode(texts[0], texts[1] if len(texts) > 1 else None)
        if made.special_tokens_mask.count(0) != len(texts):
            raise InputError(place, "a template without the text, or with it twice", "the text once")
        places = [number for number, special in enumerate(made.special_tokens_mask) if not special]
        edges = zip([-1, *places], [*places, len(made.ids)], strict=True)
        found = tuple(tuple(made.ids[left + 1 : right]) for left, right in edges)
        if max((number for ids in found for number in ids), default=0) >= self.vocab_size:
            listed = " and ".join(map(str, found))
            raise InputError(place, f"ids {listed} with {self.vocab_size} tokens", "ids of tokens")
        return found

    @cached_property
    def _control(self) -> tokenizers.Tokenizer:
        # Built when first asked for: most work encodes user text only, and a vocabulary is megabytes.
        return self._library(self.to_json())

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        return literals(self._special)

    def _library(self, text: str) -> tokenizers.Tokenizer:
        made = tokenizers.Tokenizer.from_str(text)
        if self._normalization:
            made.normalizer = None
        return made

    def _roles(self) -> dict[str, str]:
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "unk": self.unk_id, "mask": self.mask_id}
        return {role: str(self.token(number)) for role, number in ids.items() if number is not None}

    def _pieces(self, text: str) -> Iterator[str]:
        if self._normalization:
            check_unicode(text, "text")
            text = self._normalization(text)
        return pieces(text, self._cuts, PIECE if self._cuts else WHOLE)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            with library_errors(self._where):
                if self._unknown_bytes:  # only the slower call says what was unknown
                    found = self._plain.encode_batch(texts, add_special_tokens=False)
                    return [self._with_bytes(encoding) for encoding in found]
                encoded = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        except InputError:
            # PyO3 says only that a lone surrogate "must be str": look for it after the fact, not in every text.
            for text in texts:
                check_unicode(text, "text")
            raise
        return [encoding.ids for encoding in encoded]

    def _with_bytes(self, encoding: tokenizers.Encoding) -> list[int]:
        """The ids with each unknown stretch as its bytes."""
        ids: list[int] = []
        for number, piece in zip(encoding.ids, encoding.tokens, strict=True):
            parts = [self._unknown_bytes[byte] for byte in piece.encode()] if number == self.unk_id else []
            known = [part for part in parts if part is not None]
            ids += known if known and len(known) == len(parts) else [number]
        return ids

    def _direct(self, text: str) -> Ids:
        """Byte and character tokenizers: one id per byte or character by table, without the library."""
        try:
            if self._table is None:
                return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
            points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
            return cast("Ids", self._table[np.minimum(points, len(self._table) - 1)])
        except UnicodeEncodeError:
            check_unicode(text, "text")
            raise


def _grouped(numbered: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Groups of about _BATCH characters."""
    group: list[tuple[int, str]] = []
    size = 0
    for item in numbered:
        group.append(item)
        size += len(item[1])
        if size >= _BATCH:
            yield group
            group, size = [], 0
    if group:
        yield group


def _character_table(spec: Spec) -> Ids:
    """Code point -> id, one row longer than the highest code point; unknown characters give the unk id."""
    specials = {token.content for token in spec.added}
    base = {ord(piece): number for piece, number in spec.vocab.items() if piece not in specials}
    table = np.full(max(base, default=0) + 2, spec.roles["unk"], dtype=np.int32)
    for point, number in base.items():
        table[point] = number
    return table


def _unreachable(spec: Spec, unk_id: int | None) -> tuple[dict[str, object], dict[int, str]]:
    """The tree for user text, in which no text can spell a control token, and the spellings it hides, by id.

    Switching special tokens off leaves them in the model's own vocabulary, where Unigram, WordPiece and WordLevel
    find them as ordinary entries. There they are renamed to what nobody can type. Returns `spec.tree` itself where
    no control token can be reached. Unigram would find the name of a byte too; its byte fallback is done here.
    """
    model, unigram = dict(spec.model), spec.kind == "unigram"
    hidden = [token.content for token in spec.added if token.special and (unigram or token.id != unk_id)]
    if unigram and model.get("byte_fallback"):
        model["byte_fallback"] = False
        hidden += map(byte_piece, range(256))
    names = {content: f"\ufdd0{secrets.token_hex(16)}" for content in hidden if content in spec.vocab}
    merges = model.get("merges")
    if isinstance(merges, list):
        single = any(len(name) == 1 for name in names)
        if not single and not model.get("ignore_merges") and _merges_avoid(merges, names):
            return spec.tree, {}
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in cast("list[str]", merges)]
        kept = [pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]
        if len(kept) == len(pairs) and not single and not model.get("ignore_merges"):
            return spec.tree, {}
        model["merges"] = kept
    if not names:
        return spec.tree, {}
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {names.get(piece, piece): number for piece, number in spec.vocab.items()}
    entries = cast("list[dict[str, object]]", spec.tree["added_tokens"])
    added = [{**entry, "content": names.get(str(entry["content"]), entry["content"])} for entry in entries]
    tree = {**spec.tree, "model": model, "added_tokens": added, "post_processor": None}
    return tree, {spec.vocab[content]: content for content in names}


def _merges_avoid(merges: list[object], names: Iterable[str]) -> bool:
    """Whether no merge has one of these names as a part, or makes it: seen without taking each apart."""
    parts = merge_parts(merges)
    if None in parts or not parts.isdisjoint(names):
        return False
    made = (f"{name[:at]} {name[at:]}" for name in names for at in range(1, len(name)))
    return set(merges).isdisjoint(made)


@contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Turns a failure or a panic inside the Rust library into an InputError that names the file."""
    try:
        yield
    except HeadwayError:
        raise
    except BaseException as error:
        # A Rust panic is no Exception, so that nobody swallows it by accident; its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(where, f"the tokenizers library refuses it: {str(error)[:200]}", "a tokenizer.json") from error
