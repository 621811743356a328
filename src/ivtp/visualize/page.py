"""Whole pages: one pruned prefill, or several methods side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from ivtp.errors import ConfigError
from ivtp.files.outputs import PICTURES, whole
from ivtp.images import is_sequence, load_image
from ivtp.trace import PruneTrace
from ivtp.visualize.fonts import Colour, write
from ivtp.visualize.patches import Fate, as_seen, cut_off, fates, laid_out, outline, paint
from ivtp.visualize.text import INK, MUTED, Bars, shorten, wrap

Maps = list[NDArray[np.uint8]]
"""The fates of the patches of an image, a map for each grid."""

_MARGIN = 24
_SIDE = 432
_PITCH = 22
"""Pixels from line to line of a legend."""
RIGHT, WRONG = (22, 120, 66), (190, 38, 38)
_INKS = {None: INK, True: RIGHT, False: WRONG}
_SIGNS = {None: "", True: " \N{CHECK MARK}", False: " \N{BALLOT X}"}
_NAMES = {
    Fate.KEPT: "kept",
    Fate.MERGED: "merged into a kept one",
    Fate.DROPPED_IN_DECODER: "dropped in the decoder (stage 2)",
    Fate.DROPPED_IN_ENCODER: "dropped in the vision encoder (stage 1)",
}


@dataclass(frozen=True)
class Panel:
    """One picture of a comparison: which method, what it kept, what was answered."""

    title: str
    trace: PruneTrace | None = None
    """None draws the picture untouched."""
    answer: str = ""
    note: str = ""
    right: bool | None = None
    """Whether the answer is right, which its colour and a sign say; None where that is not known."""


def draw(
    image: Any,
    trace: PruneTrace,
    file: str | Path | None = None,
    *,
    row: int = 0,
    question: str | None = None,
    answer: str | None = None,
    note: str | None = None,
    threshold: float | None = None,
    square: int = 336,
) -> Image.Image:
    """Kept patches in colour, merged and dropped ones dimmed, and the relevance of every word of the instruction.

    Patches are counted below each picture; a picture that is no square is shown as the model saw it, and the share that
    was cut off is said. One that is read in tiles is shown uncut in their patches, and below in those of the whole.

    `image`: the picture of sample `row`, in any form that `load_image` takes, or a list of all of them in the order of
    the prompt. `file`: where to write the page, too. `note`: a line below the answer, such as what it cost. `square`:
    side in pixels of the model's input, to which each picture is scaled and cropped. `threshold`: drawn as a line
    through the word bars. Raises `ImageError`, `OutputError`, and `ConfigError` when pictures and trace do not fit
    together or `file` has no picture's suffix.
    """
    path = None if file is None else Path(file)
    if path is not None and path.suffix.lower() not in PICTURES:
        raise ConfigError(f"the picture {path} has none of the suffixes {', '.join(PICTURES)}; name such a file")
    pictures = [load_image(one) for one in (image if is_sequence(image) else [image])]
    if 0 <= row < len(trace.images) and len(pictures) != trace.images[row]:
        raise ConfigError(
            f"sample {row} of the trace has {trace.images[row]} images, passed: {len(pictures)}; "
            "pass all of them, in the order of the prompt"
        )
    maps = [fates(trace, row, m) for m in range(len(pictures))]
    panels = [_painted(p, f, square) for p, f in zip(pictures, maps, strict=True)]
    bars = _bars(trace, row, threshold)
    side = max(panel.width for panel in panels)
    pictures_width = len(panels) * (side + _MARGIN) - _MARGIN
    width = _MARGIN + pictures_width + _MARGIN + (bars.width + _MARGIN if bars else 0)
    head = wrap(question, 20, width - 2 * _MARGIN, 3) if question else []
    foot = wrap(f"Answer: {answer}", 18, pictures_width, 4) if answer else []
    top = _MARGIN + 28 * len(head) + (8 if head else 0)
    crops = [_said_of(picture, own) for picture, own in zip(pictures, maps, strict=True)]
    below = top + max(panel.height for panel in panels) + 12 + (_PITCH if any(crops) else 0)
    legend = _PITCH * max(3, *(len(_counts(own)) for own in maps))
    height = below + legend + 26 * len(foot) + (_PITCH if note else 0) + _MARGIN
    page = Image.new("RGB", (width, max(height, top + bars.height + _MARGIN if bars else 0)), "white")
    pen = ImageDraw.Draw(page)
    _lines(pen, head, _MARGIN, _MARGIN, 20, 28)
    for m, (panel, crop) in enumerate(zip(panels, crops, strict=True)):
        left = _MARGIN + m * (side + _MARGIN)
        page.paste(panel, (left, top))
        write(pen, (left, below - _PITCH), shorten(crop, 14, side), MUTED, 14)
        _legend(page, maps[m], left, below)
    _lines(pen, foot, _MARGIN, below + legend + 6, 18, 26)
    if note:
        write(pen, (_MARGIN, below + legend + 8 + 26 * len(foot)), shorten(note, 14, pictures_width), MUTED, 14)
    if bars:
        bars.draw(page, _MARGIN + pictures_width + _MARGIN, top)
    if path is not None:
        with whole(path, "the picture") as partial:
            page.save(partial)
    return page


def draw_comparison(
    image: Image.Image,
    rows: Sequence[tuple[str, Sequence[Panel]]],
    *,
    threshold: float | None = None,
    square: int = 336,
    side: int = _SIDE,
    brief: bool = False,
) -> Image.Image:
    """For each question one row of panels, each with its answer, and behind them the words of its last panel.

    `rows`: pairs of question and panels, every panel about sample 0 of its trace with this one picture. `side`: pixels
    of a panel. `brief`: the questions beside each other, without legends and words.
    """
    if not rows or not all(panels for _, panels in rows):
        raise ConfigError("a comparison needs at least one question with at least one panel")
    strips = [_strip(image, question, panels, threshold, (square, side), brief) for question, panels in rows]
    return stack(strips, across=brief)


def draw_patches(image: Image.Image, trace: PruneTrace, *, square: int = 336, side: int = _SIDE) -> Image.Image:
    """The picture of sample 0 with what became of its patches, `side` pixels wide, and nothing around it."""
    return _painted(image, fates(trace), square, side)


def count_fates(trace: PruneTrace) -> dict[str, int]:
    """How many patches of sample 0's picture were kept, merged, dropped: those that legends count, by their names."""
    return {_NAMES[kind]: count for kind, count in _counts(fates(trace)).items()}


def swatches() -> dict[str, Image.Image]:
    """How each fate of a patch is drawn, by the names of `count_fates`."""
    return {name: _swatch(kind) for kind, name in _NAMES.items()}


def said_of_crop(image: Image.Image, trace: PruneTrace) -> str:
    """What the model did not see of sample 0's image; empty where it saw all of it."""
    return _said_of(image, fates(trace))


def stack(pages: Sequence[Image.Image], *, across: bool = False) -> Image.Image:
    """Pages one below the other, or beside each other."""
    widths, heights = [page.width for page in pages], [page.height for page in pages]
    size = (sum(widths), max(heights)) if across else (max(widths), sum(heights))
    whole_page = Image.new("RGB", size, "white")
    for number, page in enumerate(pages):
        whole_page.paste(page, (sum(widths[:number]), 0) if across else (0, sum(heights[:number])))
    return whole_page


def _strip(
    picture: Image.Image,
    question: str,
    panels: Sequence[Panel],
    threshold: float | None,
    sizes: tuple[int, int],
    brief: bool,
) -> Image.Image:
    maps = [[] if p.trace is None else fates(p.trace) for p in panels]
    grids = next(filter(None, maps), [])
    painted = [_painted(picture, own or [np.zeros_like(fate) for fate in grids], *sizes) for own in maps]
    crop = _said_of(picture, grids)
    side = max(p.width for p in painted)
    last = panels[-1].trace
    bars = None if last is None or brief else _bars(last, 0, threshold)
    width = _MARGIN + len(panels) * (side + _MARGIN) + (bars.width + _MARGIN if bars else 0)
    head = wrap(question, 20, width - 2 * _MARGIN, 2)
    answers = [wrap(f"{p.answer}{_SIGNS[p.right]}", 20, side, 3) for p in panels]
    top = _MARGIN + 28 * len(head) + 32
    below = top + max(p.height for p in painted) + 12 + (_PITCH if crop else 0)
    note = below + 28 * max(len(a) for a in answers)
    height = note + 26 + (0 if brief else _PITCH * max(3, *(len(_counts(own)) for own in maps)) + 8)
    page = Image.new("RGB", (width, max(height, top + bars.height if bars else 0)), "white")
    pen = ImageDraw.Draw(page)
    _lines(pen, head, _MARGIN, _MARGIN, 20, 28)
    for index, (panel, picture_of, own) in enumerate(zip(panels, painted, maps, strict=True)):
        left = _MARGIN + index * (side + _MARGIN)
        write(pen, (left, top - 26), shorten(panel.title, 17, side), MUTED, 17)
        page.paste(picture_of, (left, top))
        write(pen, (left, below - _PITCH), shorten(crop, 14, side), MUTED, 14)
        _lines(pen, answers[index], left, below, 20, 28, _INKS[panel.right])
        write(pen, (left, note), shorten(panel.note, 14, side), MUTED, 14)
        if not brief:
            _legend(page, own, left, note + 26)
    if bars:
        bars.draw(page, _MARGIN + len(panels) * (side + _MARGIN), top)
    return page


def _painted(image: Image.Image, maps: Maps, square: int, side: int = _SIDE) -> Image.Image:
    """The model's crop at reading size; of an image in tiles, uncut, their patches and below those of the whole.

    Also uncut is an image whose grid is no square.
    """
    maps = laid_out(maps, image.size)
    if len(maps) < 2:
        if not _is_square(maps):
            return paint(_contained(image, side), maps[0])
        crop = as_seen(image, square).resize((side, side), Image.Resampling.LANCZOS)
        return paint(crop, maps[0]) if maps else crop
    once, tiles = (paint(_contained(image, own), fate) for own, fate in zip((side // 2, side), maps, strict=True))
    below = tiles.height + _PITCH // 2
    panel = Image.new("RGB", (max(side, tiles.width), below + once.height), "white")
    panel.paste(tiles, (0, 0))
    panel.paste(once, (0, below))
    note = wrap("The model reads the picture in tiles, above, and once more as a whole, here.", 14, side // 2 - 16, 4)
    _lines(ImageDraw.Draw(panel), note, once.width + 12, below, 14, 18)
    return panel


def _contained(image: Image.Image, side: int) -> Image.Image:
    return ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def _said_of(image: Image.Image, maps: Maps) -> str:
    """What the model did not see of an image; in tiles, or a grid of its own shape, it sees everything."""
    return cut_off(image) if len(maps) < 2 and _is_square(maps) else ""


def _is_square(maps: Maps) -> bool:
    """Whether the first grid, if there is one, is a square."""
    return not maps or maps[0].shape[0] == maps[0].shape[1]


def _bars(trace: PruneTrace, row: int, threshold: float | None) -> Bars | None:
    words = trace.words[row] if row < len(trace.words) else []
    fallback = trace.fallback[row] if row < len(trace.fallback) else False
    return Bars(words, threshold, fallback) if words else None


def _counts(maps: Maps) -> dict[Fate, int]:
    """The patches of every fate that occurs, in the order of a legend."""
    found = {kind: sum(int((fate == kind).sum()) for fate in maps) for kind in _NAMES}
    return {kind: count for kind, count in found.items() if count}


def _legend(page: Image.Image, maps: Maps, left: int, top: int) -> None:
    """A swatch and the count of every fate that occurs."""
    pen = ImageDraw.Draw(page)
    for kind, count in _counts(maps).items():
        page.paste(_swatch(kind), (left, top))
        write(pen, (left + 24, top + 8), f"{count} {_NAMES[kind]}", INK, 14, anchor="lm")
        top += _PITCH


def _swatch(kind: Fate) -> Image.Image:
    """A patch of that fate, as pictures show it."""
    swatch = np.array(paint(Image.new("RGB", (16, 16), (225, 225, 225)), np.full((1, 1), kind, np.uint8)))
    if kind == Fate.KEPT:
        outline(swatch, np.ones((16, 16), np.bool_))
    return Image.fromarray(swatch)


def _lines(
    pen: ImageDraw.ImageDraw, lines: Sequence[str], left: int, top: int, size: int, pitch: int, ink: Colour = INK
) -> None:
    for index, line in enumerate(lines):
        write(pen, (left, top + index * pitch), line, ink, size)
