"""Draw the atlas of glyphs and sign texts once: ``python -m ivtp.micro.world.build_atlas --font PATH``."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ivtp.micro.world.render import ATLAS, GLYPH_CELL, GLYPH_COLUMNS, TEXT_CELL, TEXT_COLUMNS
from ivtp.micro.world.vocabulary import OBJECTS, SIGN_TEXTS

_STRIKE = 109  # the only size in which Noto Color Emoji's bitmaps can be drawn


def build(emoji_font: Path, text_font: Path) -> Image.Image:
    """The atlas (RGBA): rows of glyphs in the order of OBJECTS, below them rows of sign texts in black."""
    glyph_rows = -(-len(OBJECTS) // GLYPH_COLUMNS)
    text_rows = -(-len(SIGN_TEXTS) // TEXT_COLUMNS)
    size = (GLYPH_COLUMNS * GLYPH_CELL, glyph_rows * GLYPH_CELL + text_rows * TEXT_CELL[1])
    atlas = Image.new("RGBA", size, (0, 0, 0, 0))
    emoji = ImageFont.truetype(str(emoji_font), _STRIKE)
    for index, (_, code) in enumerate(OBJECTS.values()):
        drawn = Image.new("RGBA", (180, 180), (0, 0, 0, 0))
        ImageDraw.Draw(drawn).text((20, 20), chr(code), font=emoji, embedded_color=True)
        box = drawn.getbbox()
        if box is None:
            raise SystemExit(f"{emoji_font} has no glyph U+{code:X}; use Noto Color Emoji")
        glyph = drawn.crop(box)
        glyph.thumbnail((GLYPH_CELL - 2, GLYPH_CELL - 2), Image.Resampling.LANCZOS)
        left = index % GLYPH_COLUMNS * GLYPH_CELL + (GLYPH_CELL - glyph.width) // 2
        top = index // GLYPH_COLUMNS * GLYPH_CELL + (GLYPH_CELL - glyph.height) // 2
        atlas.paste(glyph, (left, top))
    font = ImageFont.truetype(str(text_font), 50)
    for index, text in enumerate(SIGN_TEXTS):
        x0, y0, x1, y1 = font.getbbox(text)
        drawn = Image.new("RGBA", (round(x1 - x0) + 2, round(y1 - y0) + 2), (0, 0, 0, 0))
        ImageDraw.Draw(drawn).text((1 - x0, 1 - y0), text, font=font, fill=(0, 0, 0, 255))
        drawn.thumbnail((TEXT_CELL[0] - 2, TEXT_CELL[1] - 2), Image.Resampling.LANCZOS)
        left = index % TEXT_COLUMNS * TEXT_CELL[0]
        top = glyph_rows * GLYPH_CELL + index // TEXT_COLUMNS * TEXT_CELL[1]
        atlas.paste(drawn, (left, top))
    return atlas


def main() -> None:
    """Command line: writes atlas.png beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--text-font", type=Path, required=True, help="a bold Latin font, DejaVuSans-Bold.ttf")
    parser.add_argument("--out", type=Path, default=ATLAS)
    options = parser.parse_args()
    build(options.font, options.text_font).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
