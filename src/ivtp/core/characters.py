"""From the bytes of tokens to characters, and from characters to letters."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

Span = tuple[int, int]
"""Characters [first, behind the last)."""


def lay_out(pieces: Sequence[bytes]) -> tuple[str, list[Span]]:
    """The text that the UTF-8 bytes of tokens spell together, and the characters that each token has a byte of.

    A character that is cut into several tokens belongs whole to each of them. Bytes that are no character's (those of
    a window that begins inside one) spell nothing.
    """
    begun, ended, text = [0], [0], []  # characters that begin before a byte, and that end at or before it
    for character in b"".join(pieces).decode("utf-8", "surrogateescape"):
        count, size = begun[-1], 1
        if not "\udc80" <= character <= "\udcff":  # else a byte of no character
            count, size = count + 1, len(character.encode())
            text.append(character)
        begun += [count] * size
        ended += [ended[-1]] * (size - 1) + [count]
    spans, place = [], 0
    for piece in pieces:
        spans.append((ended[place], begun[place + len(piece)]))
        place += len(piece)
    return "".join(text), spans


def letters(text: str) -> list[Span]:
    """The characters of each letter of the composed text (NFC): a letter and the marks that it is composed with.

    Every other character is by itself.
    """
    if unicodedata.is_normalized("NFC", text):
        return [(place, place + 1) for place in range(len(text))]
    spans: list[Span] = []
    for place in range(len(text)):
        if spans and _composes(text[spans[-1][0] : place], text[place]):
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
    return spans


def widened(spans: Sequence[Span], text: str) -> list[Span]:
    """`spans` in `text`, each with the whole of every letter that it touches."""
    if unicodedata.is_normalized("NFC", text):
        return list(spans)
    first, last = [0] * len(text), [0] * len(text)
    for start, stop in letters(text):
        first[start:stop] = [start] * (stop - start)
        last[start:stop] = [stop] * (stop - start)
    return [(first[a], last[b - 1]) if a < b else (a, b) for a, b in spans]


def _composes(letter: str, character: str) -> bool:
    """Whether `character` becomes one with the letter before it, or is a mark between it and such a one."""
    if unicodedata.combining(character) and not letter.isspace():
        return True
    apart = unicodedata.normalize("NFC", letter) + unicodedata.normalize("NFC", character)
    return unicodedata.normalize("NFC", letter + character) != apart
