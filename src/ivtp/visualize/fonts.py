"""A font for every character: Pillow's own, those in `faces`, then the system's; where none has it, words."""

from __future__ import annotations

import bisect
import io
import os
import struct
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from PIL import ImageDraw, ImageFont, features

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

_OWN = Path()
"""Stands for Pillow's own font, which is in no file."""
_SHIPPED = tuple(Path(__file__).parent / "faces" / name for name in ("DejaVuSans.ttf", "chinese.ttf"))
_MOST = 2000
"""System fonts that are looked into."""
_PREFERRED = (
    "NotoSans",
    "Noto",
    "DejaVuSans",
    "SourceHan",
    "DroidSans",
    "wqy",
    "PingFang",
    "Hiragino",
    "msyh",
    "Arial",
)
_UNUSABLE = ("lastresort", "blank", "mono")
"""In names of fonts that draw boxes for everything, or letters far too wide."""
_BIDIRECTIONAL = ("R", "AL")


def length(text: str, size: int) -> float:
    """Pixels that `text` takes as `write` draws it."""
    return sum(_load(file, size).getlength(part) for file, part in _runs(drawable(text)))


def write(
    pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, fill: Colour, size: int, anchor: str = "la"
) -> None:
    """`pen.text` in the fonts that have the characters, on one baseline; `anchor` is Pillow's."""
    runs = list(_runs(drawable(text)))
    if all(file == _OWN for file, _ in runs):
        pen.text(place, "".join(part for _, part in runs), fill, _load(_OWN, size), anchor=anchor)
        return
    x, y = place
    ascent, descent = _metrics(size)
    x -= length(text, size) * {"l": 0.0, "m": 0.5, "r": 1.0}[anchor[0]]
    y += {"a": ascent, "m": (ascent - descent) / 2, "s": 0, "d": -descent}[anchor[1]]
    for file, part in runs:
        font = _load(file, size)
        pen.text((x, y), part, fill, font, anchor="ls")
        x += font.getlength(part)


def drawable(text: str) -> str:
    """`text` with words in place of what no font here can draw: "[dog face]" of a sign, "U+6807" of a letter."""
    plain = unicodedata.normalize("NFC", text)
    characters = (" " if c.isspace() else c for c in plain if not _is_invisible(c))
    parts: list[str] = []
    for known, group in groupby(characters, lambda c: _font_with(c) is not None):
        found = list(group)
        parts.append("".join(found) if known else " ".join(map(_spelled, found)))
    return "".join(parts)


def _is_invisible(char: str) -> bool:
    """Joiners and selectors of emoji, which only say how their neighbours look; marks that turn text around."""
    return unicodedata.category(char) == "Cf" or "\ufe00" <= char <= "\ufe0f"


def _spelled(char: str) -> str:
    name = unicodedata.name(char, "")
    return f"[{name.lower()}]" if name and unicodedata.category(char)[0] == "S" else f"U+{ord(char):04X}"


def _runs(text: str) -> Iterator[tuple[Path, str]]:
    """Parts of a drawable text and the font of each; spaces and marks stay with the letters before them."""
    part, file = "", _OWN
    for char in text:
        stays = char.isspace() or unicodedata.category(char)[0] == "M"
        own = file if part and stays and _has(file, char) else _font_with(char) or _OWN
        if part and own != file:
            yield file, part
            part = ""
        part, file = part + char, own
    if part:
        yield file, part


@cache
def _font_with(char: str) -> Path | None:
    """The file of the first font that has a character; None where there is none."""
    if char.isspace():
        return _OWN
    if unicodedata.bidirectional(char) in _BIDIRECTIONAL and not features.check("raqm"):
        return None  # its letters would stand alone, and in the wrong order
    return next((file for file in (_OWN, *_SHIPPED, *_system_fonts()) if _has(file, char)), None)


@cache
def _load(file: Path, size: int) -> Font:
    return ImageFont.load_default(size) if file == _OWN else ImageFont.truetype(str(file), size)


def _metrics(size: int) -> tuple[int, int]:
    """Ascent and descent of Pillow's font, which sets the lines."""
    font = _load(_OWN, size)
    return font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (size, 0)


def _has(file: Path, char: str) -> bool:
    known = _characters(file)
    place = bisect.bisect_right(known.starts, ord(char)) - 1
    return place >= 0 and ord(char) <= known.ends[place]


@dataclass(frozen=True)
class Characters:
    """Ranges of code points, in order: from each start to its end."""

    starts: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


@cache
def _characters(file: Path) -> Characters:
    """Those of a font; none of a file that cannot be read or used."""
    try:
        if file != _OWN:
            with file.open("rb") as opened:
                found = read_characters(opened)
            _load(file, 16)
            return found
        own = _load(_OWN, 16)
        source = own.path if isinstance(own, ImageFont.FreeTypeFont) else None
        if isinstance(source, io.BytesIO):
            return read_characters(io.BytesIO(source.getvalue()))
        return Characters((32,), (126,))  # a Pillow without FreeType has a bitmap font
    except (OSError, struct.error, IndexError):
        return Characters()


def read_characters(file: BinaryIO) -> Characters:
    """Which code points the (first) font of a TrueType or OpenType file maps; none where it has no outlines.

    Raises `struct.error` for a file that ends too early. Source: OpenType, table cmap, formats 4 and 12.
    """

    def numbers(kind: str, place: int) -> tuple[int, ...]:
        file.seek(place)
        return struct.unpack(f">{kind}", file.read(struct.calcsize(f">{kind}")))

    file.seek(0)
    start = numbers("I", 12)[0] if file.read(4) == b"ttcf" else 0
    tables: dict[bytes, int] = {}
    for number in range(numbers("H", start + 4)[0]):
        file.seek(start + 12 + 16 * number)
        name = file.read(4)
        tables[name] = numbers("I", start + 12 + 16 * number + 8)[0]
    if b"cmap" not in tables or not tables.keys() & {b"glyf", b"CFF ", b"CFF2"}:
        return Characters()
    cmap, best = tables[b"cmap"], (0, 0)  # format, place
    for number in range(numbers("H", cmap + 2)[0]):
        platform, encoding, offset = numbers("HHI", cmap + 4 + 8 * number)
        if platform == 0 or (platform == 3 and encoding in (1, 10)):
            (kind,) = numbers("H", cmap + offset)
            best = max(best, (kind, cmap + offset)) if kind in (4, 12) else best
    kind, place = best
    if kind == 12:
        groups = numbers("I", place + 12)[0]
        flat = numbers(f"{3 * groups}I", place + 16)
        return Characters(flat[::3], flat[1::3])
    if kind == 4:
        segments = numbers("H", place + 6)[0] // 2
        ends = numbers(f"{segments}H", place + 14)
        starts = numbers(f"{segments}H", place + 16 + 2 * segments)
        return Characters(starts, ends)
    return Characters()


@cache
def _system_fonts() -> tuple[Path, ...]:
    """Font files of the usual folders, those of many scripts first."""
    found: list[Path] = []
    for folder in _folders():
        for path, _, names in os.walk(folder):
            found += [Path(path, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]
    usable = [file for file in found if not any(word in file.name.lower() for word in _UNUSABLE)]

    def order(file: Path) -> tuple[int, int, str]:
        rank = next((i for i, word in enumerate(_PREFERRED) if word in file.name), len(_PREFERRED))
        return rank, len(file.stem.removesuffix("-Regular")), str(file)  # the plain style has the shortest name

    return tuple(sorted(usable, key=order)[:_MOST])


def _folders() -> list[Path]:
    home = Path.home() if os.environ.get("HOME") or os.environ.get("USERPROFILE") else Path("/")
    if sys.platform == "win32":
        return [Path(os.environ.get("WINDIR", r"C:\Windows"), "Fonts"), home / "AppData/Local/Microsoft/Windows/Fonts"]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    shared = [Path("/usr/share/fonts"), Path("/usr/local/share/fonts")]
    return [*shared, home / ".local/share/fonts", home / ".fonts"]
