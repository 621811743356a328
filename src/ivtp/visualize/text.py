"""Text and word bars with Pillow's own scalable font, so that no font has to be installed."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from ivtp.trace import Word

INK = (31, 36, 48)
MUTED = (116, 124, 138)
USED = (228, 96, 34)
UNUSED = (186, 193, 204)

_LONGEST = 400
"""Letters that any column has room for; measuring more of a text would only take time."""
_ROW = 24
_COLUMN = 290
_SHOWN = 44
"""Words that fit beside a picture in two columns; of longer instructions the most relevant ones are shown."""


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's default font at `size` pixels."""
    return ImageFont.load_default(size)


def wrap(text: str, size: int, width: int, max_lines: int = 4) -> list[str]:
    """Lines of `text` that fit `width` pixels; what exceeds `max_lines` ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word[:_LONGEST]}".strip()
        if font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word[:_LONGEST])
        if len(lines) > max_lines + 1:
            break
    lines = [line for line in lines if line] or [""]
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], f"{lines[max_lines - 1]} ..."]
    return [shorten(line, size, width) for line in lines]


def shorten(text: str, size: int, width: int) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    if font(size).getlength(text[:_LONGEST]) <= width and len(text) <= _LONGEST:
        return text

    def pixels(letters: int) -> int:
        return math.ceil(font(size).getlength(f"{text[:letters]}..."))

    fits = bisect.bisect_right(range(_LONGEST), width, key=pixels) - 1
    return f"{text[: max(0, fits)]}..."


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
        pen.text((left, top), "Relevance of each word to the image", INK, font(15))
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
            pen.text((left + 18, below), "words that made the pseudo CLS token", MUTED, font(13))
            below += 18
        for note in notes:
            pen.text((left, below), note, MUTED, font(13))
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
            pen.text((left + 98, y + _ROW // 2), label, ink, font(14), anchor="rm")
            pen.rectangle((min(x(0.0), x(word.score)), y + 5, max(x(0.0), x(word.score)), y + _ROW - 6), bar)
            pen.text((start + span + 6, y + _ROW // 2), f"{word.score:.2f}", ink, font(12), anchor="lm")
        bottom = top + _ROW * len(words)
        pen.line((x(0.0), top, x(0.0), bottom), MUTED)
        if self.threshold is not None:
            at = x(self.threshold)
            for y in range(top - 4, bottom, 6):
                pen.line((at, y, at, min(y + 3, bottom)), INK)
            anchor, label = "rs" if at > start + span - 20 else "ms", f"threshold {self.threshold:.2f}"
            pen.text((at, top - 8), label, INK, font(12), anchor=anchor)
