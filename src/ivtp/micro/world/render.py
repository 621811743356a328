"""Draw a scene: background, backings, glyphs and signs from the shipped atlas. No font is needed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ivtp.micro.world.scene import NEW_BACKGROUNDS, SIZE, Background, Scene, SceneObject
from ivtp.micro.world.vocabulary import COLOURS, GLYPHS, SIGN_TEXTS

ATLAS = Path(__file__).with_name("atlas.png")
GLYPH_CELL, GLYPH_COLUMNS = 96, 8
TEXT_CELL, TEXT_COLUMNS = (192, 56), 4

_FRAME = 0.09  # thickness of a frame, as a part of the box's side
_GLYPH_SHARE = {"none": 1.0, "disc": 0.7, "frame": 0.74}  # side of the glyph, as a part of the box's side


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of 336x336 pixels; the same scene gives the same pixels."""
    image = _background(scene.background)
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        if item.text is not None:
            _draw_sign(image, draw, item)
        else:
            _draw_object(image, draw, item)
    return image


def _background(background: Background) -> Image.Image:
    first, second = (np.array(colour, dtype=np.float32) for colour in background.colours)
    rng = np.random.RandomState(background.seed)  # its streams are frozen across numpy versions
    if background.kind == "plain":
        return Image.new("RGB", (SIZE, SIZE), background.colours[0])
    if background.kind == "noise":
        grain = np.frombuffer(rng.bytes(SIZE * SIZE), dtype=np.uint8).reshape(SIZE, SIZE, 1) >> 2
        low = np.minimum(first, 190).astype(np.uint8)
        return Image.fromarray(low + grain)
    if background.kind == "stripes":
        period, across = int(rng.randint(8, 40)), bool(rng.randint(2))
        mask = (np.arange(SIZE) // period % 2).astype(bool)
        line = np.where(mask[:, None], first, second).astype(np.uint8)  # (SIZE, 3)
        shape = (SIZE, SIZE, 3)
        return Image.fromarray(np.broadcast_to(line[None] if across else line[:, None], shape).copy())
    if background.kind in NEW_BACKGROUNDS:
        return Image.fromarray(np.where(_pattern(background.kind, rng)[..., None], first, second).astype(np.uint8))
    if background.kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        axis = np.linspace(-0.5, 0.5, 24, dtype=np.float32)
        share = (axis[None] * np.cos(angle) + axis[:, None] * np.sin(angle))[..., None] / 1.42 + 0.5
    else:
        share = np.frombuffer(rng.bytes(24 * 24), dtype=np.uint8).reshape(24, 24, 1) / np.float32(255)
    small = (first * share + second * (1 - share)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def _pattern(kind: str, rng: np.random.RandomState) -> NDArray[np.bool_]:
    """(SIZE, SIZE) bool: checks, dots or rings, with a random period."""
    period = int(rng.randint(14, 48))
    y, x = np.mgrid[:SIZE, :SIZE]
    shown: NDArray[np.bool_]
    if kind == "checks":
        shown = (x // period + y // period) % 2 == 0
    elif kind == "dots":
        shown = (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (period / 3.5) ** 2
    else:
        centre = rng.randint(0, SIZE, size=2)
        shown = np.hypot(x - centre[0], y - centre[1]) // period % 2 == 0
    return shown


def _draw_object(image: Image.Image, draw: ImageDraw.ImageDraw, item: SceneObject) -> None:
    x0, y0, x1, y1 = item.box
    side = x1 - x0
    if item.backing == "disc" and item.colour is not None:
        draw.ellipse((x0, y0, x1 - 1, y1 - 1), fill=COLOURS[item.colour])
    elif item.backing == "frame" and item.colour is not None:
        width = max(4, round(side * _FRAME))
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=COLOURS[item.colour], width=width)
    glyph = _glyph(item.name, round(side * _GLYPH_SHARE[item.backing]))
    corner = (x0 + (side - glyph.width) // 2, y0 + (side - glyph.height) // 2)
    image.paste(glyph, corner, glyph)


def _draw_sign(image: Image.Image, draw: ImageDraw.ImageDraw, item: SceneObject) -> None:
    x0, y0, x1, y1 = item.box
    draw.rounded_rectangle((x0, y0, x1 - 1, y1 - 1), radius=5, fill=(244, 244, 236), outline=(60, 60, 60), width=2)
    text = _text(item.text or "", x1 - x0 - 10, y1 - y0 - 12)
    image.paste(text, (x0 + (x1 - x0 - text.width) // 2, y0 + (y1 - y0 - text.height) // 2), text)


@lru_cache(maxsize=1)
def _atlas() -> Image.Image:
    with Image.open(ATLAS) as atlas:
        return atlas.convert("RGBA")


def _cell(left: int, top: int, width: int, height: int) -> Image.Image:
    cell = _atlas().crop((left, top, left + width, top + height))
    return cell.crop(cell.getbbox())


@lru_cache(maxsize=2048)
def _glyph(name: str, side: int) -> Image.Image:
    index = GLYPHS.index(name)
    left, top = index % GLYPH_COLUMNS * GLYPH_CELL, index // GLYPH_COLUMNS * GLYPH_CELL
    return _fit(_cell(left, top, GLYPH_CELL, GLYPH_CELL), side, side)


@lru_cache(maxsize=1024)
def _text(text: str, width: int, height: int) -> Image.Image:
    index = SIGN_TEXTS.index(text)
    first_row = -(-len(GLYPHS) // GLYPH_COLUMNS) * GLYPH_CELL
    left = index % TEXT_COLUMNS * TEXT_CELL[0]
    top = first_row + index // TEXT_COLUMNS * TEXT_CELL[1]
    return _fit(_cell(left, top, *TEXT_CELL), width, height)


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image scaled, aspect kept, to the largest size inside width x height."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR)
