"""Lines of text and word bars."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ivtp.trace import Word
from ivtp.visualize.fonts import drawable, length, write

INK = (31, 36, 48)
MUTED = (116, 124, 138)
USED = (228, 96, 34)
UNUSED = (186, 193, 204)

_LONGEST = 400
"""Letters that any column has room for; measuring more of a text would only take time."""
_PIECE = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]|[^\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]+")
_ROW = 24
_COLUMN = 290
_SHOWN = 44
"""Words that fit beside a picture in two columns; of longer instructions the most relevant ones are shown."""


def wrap(text: str, size: int, width: int, max_lines: int = 4) -> list[str]:
    """Lines of `text` that fit `width` pixels; what exceeds `max_lines` ends in an ellipsis."""
    lines = [""]
    for glue, word in _pieces(drawable(text)):
        longer = f"{lines[-1]}{glue}{word[:_LONGEST]}".strip()
        if length(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word[:_LONGEST])
        if len(lines) > max_lines + 1:
            break
    lines = [line for line in lines if line] or [""]
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], f"{lines[max_lines - 1]} ..."]
    return [shorten(line, size, width) for line in lines]


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """What a line may break before, each with what stands before it in a line: words, and Chinese letter by letter."""
    for word in text.split():
        for number, piece in enumerate(_PIECE.findall(word)):
            yield "" if number else " ", piece


def shorten(text: str, size: int, width: int) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    text = drawable(text)
    if length(text[:_LONGEST], size) <= width and len(text) <= _LONGEST:
        return text

    def pixels(letters: int) -> int:
        return math.ceil(length(f"{text[:letters]}...", size))

    fits = max(0, bisect.bisect_right(range(_LONGEST), width, key=pixels) - 1)
    while fits and pixels(fits) > width:  # in some scripts a letter more may take fewer pixels
        fits -= 1
    return f"{text[:fits]}..."


@dataclass(frozen=True)
class Bars:
    """The relevance of every word of an instruction as a list of bars."""

    words: Sequence[Word]
    threshold: float | None = None
    fallback: bool = False

    @property
    def _shown(self) -> list[Word]:
        if len(self.words) <= _SHOWN:
            return list(self.words)
        best = sorted(range(len(self.words)), key=lambda i: -self.words[i].score)[:_SHOWN]
        return [self.words[i] for i in sorted(best)]

    @property
    def _columns(self) -> int:
        return 2 if len(self.words) > _SHOWN // 2 else 1

    @property
    def width(self) -> int:
        """Pixels that the list takes."""
        return _COLUMN * self._columns

    @property
    def height(self) -> int:
        """Pixels that the list takes, heading and notes included."""
        return 56 + _ROW * -(-len(self._shown) // self._columns) + 62

    def draw(self, page: Image.Image, left: int, top: int) -> None:
        """Put the list on `page`."""
        pen = ImageDraw.Draw(page)
        shown = self._shown
        write(pen, (left, top), "Relevance of each word to the image", INK, 15)
        per_column = -(-len(shown) // self._columns)
        for column in range(self._columns):
            part = shown[column * per_column : (column + 1) * per_column]
            self._column(pen, part, left + _COLUMN * column, top + 56)
        below = top + 62 + _ROW * per_column
        hidden = len(self.words) - len(shown)
        notes = [f"... and {hidden} less relevant words"] if hidden else []
        if self.fallback:
            notes += ["no word passed the threshold:", "the image's own CLS token was the guide"]
        elif any(w.used for w in shown):
            pen.rectangle((left, below + 3, left + 11, below + 14), USED)
            write(pen, (left + 18, below), "words that made the pseudo CLS token", MUTED, 13)
            below += 18
        for note in notes:
            write(pen, (left, below), note, MUTED, 13)
            below += 18

    def _column(self, pen: ImageDraw.ImageDraw, words: list[Word], left: int, top: int) -> None:
        scores = [w.score for w in self.words]
        low = min(0.0, *scores, self.threshold or 0.0)
        high = max(0.05, *scores, self.threshold or 0.0)
        start, span = left + 106, 132

        def x(score: float) -> int:
            return start + round(span * (score - low) / (high - low))

        for index, word in enumerate(words):
            y = top + _ROW * index
            ink, bar = (INK, USED) if word.used else (MUTED, UNUSED)
            label = shorten(word.text, 14, 96)
            write(pen, (left + 98, y + _ROW // 2), label, ink, 14, anchor="rm")
            pen.rectangle((min(x(0.0), x(word.score)), y + 5, max(x(0.0), x(word.score)), y + _ROW - 6), bar)
            write(pen, (start + span + 6, y + _ROW // 2), f"{word.score:.2f}", ink, 12, anchor="lm")
        bottom = top + _ROW * len(words)
        pen.line((x(0.0), top, x(0.0), bottom), MUTED)
        if self.threshold is not None:
            at = x(self.threshold)
            for y in range(top - 4, bottom, 6):
                pen.line((at, y, at, min(y + 3, bottom)), INK)
            anchor, label = "rs" if at > start + span - 20 else "ms", f"threshold {self.threshold:.2f}"
            write(pen, (at, top - 8), label, INK, 12, anchor=anchor)
