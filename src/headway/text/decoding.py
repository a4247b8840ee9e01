"""Token ids back to bytes, exactly: a streaming reader needs the bytes of half a character.

The `tokenizers` library decodes to str and turns an unfinished UTF-8 sequence into U+FFFD, which a stream
cannot take back. Byte-level vocabularies are decoded here by table; for the others a token's text is found by
asking the library's decoder what the token adds between two neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from tokenizers.decoders import Decoder

from headway.errors import InputError
from headway.text.spec import Spec, byte_characters

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NEIGHBOUR = "a"


class TokenBytes:
    """The bytes that each token of one tokenizer stands for.

    Args:
        spec: the checked tokenizer.json.
        decoder: the library's decoder built from it; None joins tokens with spaces, as the library does.
        spelling: what the vocabulary calls an id; None for an id without a token.
    """

    def __init__(self, spec: Spec, decoder: Decoder | None, spelling: Callable[[int], str | None]) -> None:
        self._decoder, self._spelling = decoder, spelling
        kinds = [node["type"] for node in spec.nodes("decoder")]
        self.by_table = kinds == ["ByteLevel"] or spec.kind == "char"
        self._bytes_apart = "ByteFallback" in kinds
        self._byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        self._raw = spec.kind == "char"
        self._middle: list[bytes | None] = [None] * spec.vocab_size
        after = self._decode([_NEIGHBOUR, _NEIGHBOUR])
        self._gap = after.removeprefix(_NEIGHBOUR)

    def middle(self, token_id: int) -> bytes:
        """The bytes that the token adds after another one; empty for an id that has no token.

        Raises:
            InputError: for a negative id.
        """
        if token_id < 0:
            raise InputError("token ids", f"{token_id}", "0 or more")
        if token_id >= len(self._middle):
            return b""
        known = self._middle[token_id]
        if known is None:
            known = self._middle[token_id] = self._find(token_id, [_NEIGHBOUR])
        return known

    def first(self, token_id: int) -> bytes:
        """The bytes of the token at the beginning of a text, where some decoders drop a space."""
        return self.middle(token_id) if self.by_table or token_id < 0 else self._find(token_id, [])

    def text(self, token_ids: Iterable[int]) -> str:
        """The library's own decoding of the tokens, for decoders that are not byte tables."""
        known = map(self._spelling, token_ids)
        return self._decode([piece for piece in known if piece is not None])

    def _find(self, token_id: int, before: list[str]) -> bytes:
        piece = self._spelling(token_id)
        if piece is None:
            return b""
        if self._raw:
            return piece.encode()
        if self.by_table:
            # As the library does: a token that is not wholly of byte characters (an added one) is itself.
            known = [self._byte_of.get(character) for character in piece]
            return piece.encode() if None in known else bytes(byte for byte in known if byte is not None)
        match = _BYTE_TOKEN.fullmatch(piece) if self._bytes_apart else None
        if match:
            return bytes.fromhex(match.group(1))
        whole = self._decode([*before, piece, _NEIGHBOUR])
        return whole.removeprefix("".join(before)).removesuffix(self._gap).encode()

    def _decode(self, tokens: list[str]) -> str:
        return " ".join(tokens) if self._decoder is None else str(self._decoder.decode(tokens))
