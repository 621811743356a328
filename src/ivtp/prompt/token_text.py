"""What tokens spell: the text of token ids, character for character, and the characters of each token."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ivtp.core.characters import Span, lay_out

_PROBE = "a b, 字 😀™"
"""Letters, spaces, and characters that few vocabularies hold whole."""
_BROKEN = "�"
"""What decoders write for a part of a character."""
_SPACE = "▁"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_LONGEST = 8
"""Tokens that are tried together, at most, before what they spell is taken as it is."""


class TokenText:
    """Reads tokens by the bytes that they stand for, where the vocabulary shows them; else by decoding.

    Byte-level vocabularies (GPT-2's, Llama 3's, Qwen's) and those of SentencePiece (LLaMA's, with or without byte
    fallback) show their bytes. What a tokenizer loses before it cuts (capitals, say) is lost here as well.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        listed = getattr(tokenizer, "added_tokens_decoder", {}).items()
        added = {number: token for number, token in listed if not _BYTE_TOKEN.fullmatch(token.content)}
        self._added = {number: str(token.content).encode() for number, token in added.items()}
        marked = {number for number, token in added.items() if token.special}
        self.special = frozenset(marked.union(tokenizer.all_special_ids))
        """Ids of the tokens that are no text: begin, end, padding, and the marks of a chat template."""
        self._pieces: dict[int, bytes] = {}
        self._spell: Callable[[str], bytes] | None = None
        self._adds_spaces = False
        self._spell = self._find_spelling()
        self._adds_spaces = self._spell is not None and self._find_added_space()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without the tokens that open and close a prompt."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def read(self, ids: Sequence[int], gaps: frozenset[int] = frozenset()) -> tuple[str, list[Span]]:
        """The text of `ids` and the characters of each token; before the tokens `gaps` other ones were cut out."""
        if self._spell is None:
            return self._aligned(list(ids))
        pieces = [self._piece(token) for token in ids]
        if self._adds_spaces:
            for i, piece in enumerate(pieces):
                behind_mark = i in gaps or (i > 0 and ids[i - 1] in self._added)
                if behind_mark and ids[i] not in self._added and piece.startswith(b" "):
                    pieces[i] = piece[1:]
        return lay_out(pieces)

    def _piece(self, token: int) -> bytes:
        if token not in self._pieces:
            self._pieces[token] = self._spelled(token)
        return self._pieces[token]

    def _spelled(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        name = self.tokenizer.convert_ids_to_tokens(token)
        if name is None:  # models have a few more embeddings than their tokenizer has tokens
            return b""
        assert self._spell is not None
        return self._spell(name)

    def _find_spelling(self) -> Callable[[str], bytes] | None:
        """The reading of token names that spells the probe as the tokenizer decodes it."""
        if not hasattr(self.tokenizer, "convert_ids_to_tokens"):
            return None
        ids = self.encode(_PROBE)
        decoded = self._decode(ids).strip()
        for spell in (_byte_level, _sentence_piece):
            self._spell, self._pieces = spell, {}
            if self.read(ids)[0].strip() == decoded:
                return spell
        return None

    def _find_added_space(self) -> bool:
        """Whether text behind an added token begins with a space that nobody wrote."""
        for token, mark in self._added.items():
            tight, wide = (self.encode(f"a{mark.decode()}{text}") for text in ("b", " b"))
            if token in tight:
                return tight != wide and self.read(tight)[0].endswith(f"{mark.decode()} b")
        return False

    def _aligned(self, ids: list[int]) -> tuple[str, list[Span]]:
        """By the tokenizer's own offsets, where encoding the decoded text gives the same ids again."""
        text = self._decode(ids)
        if getattr(self.tokenizer, "is_fast", False) and _BROKEN not in text:
            again = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            if list(again["input_ids"]) == ids:
                return text, [(a, b) for a, b in again["offset_mapping"]]
        return self._decoded_bit_by_bit(ids)

    def _decoded_bit_by_bit(self, ids: list[int]) -> tuple[str, list[Span]]:
        """Tokens are collected until what they spell is whole; it belongs to all of them."""
        text, spans = "", []
        context: list[int] = []
        first = 0
        for stop in range(1, len(ids) + 1):
            known, decoded = self._decode(context), self._decode([*context, *ids[first:stop]])
            piece = decoded[len(known) :]
            whole = decoded.startswith(known) and not piece.endswith(_BROKEN)
            if not whole and stop < len(ids) and stop - first < _LONGEST:
                continue
            piece = piece if stop < len(ids) else piece.rstrip(_BROKEN)
            spans += [(len(text), len(text) + len(piece))] * (stop - first)
            text += piece
            context, first = ids[first:stop], stop
        return text, spans

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _letters_of_bytes() -> dict[str, bytes]:
    """The sign that byte-level vocabularies write each byte as: visible ones as themselves, the rest from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
    return {letter: bytes([byte]) for letter, byte in letters.items()}


_BYTES = _letters_of_bytes()


def _byte_level(name: str) -> bytes:
    return b"".join(_BYTES.get(sign, sign.encode()) for sign in name)


def _sentence_piece(name: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(name)
    return bytes.fromhex(byte[1]) if byte else name.replace(_SPACE, " ").encode()
