"""Every kind of image file either becomes an upright RGB picture or is refused with one clear line."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivtp.errors import ImageError
from ivtp.images import load_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB", size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def near(found: Any, wanted: tuple[int, int, int], tolerance: int = 12) -> bool:
    """Equal up to what JPEG and colour conversions change."""
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= tolerance


# ---- what just works ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_common_formats_by_path_bytes_and_image(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"picture.{kind.lower()}"
    file.write_bytes(encoded(halves(), kind))
    with Image.open(file) as opened:
        for source in (file, str(file), file.read_bytes(), opened):
            image = load_image(source)
            assert (image.mode, image.size) == ("RGB", (40, 20))
            assert near(image.getpixel((5, 10)), RED, 40)
            assert near(image.getpixel((35, 10)), BLUE, 40)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("P", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("RGBA", "PNG"), ("YCbCr", "JPEG")],
)
def test_colour_modes_keep_their_colours(mode: str, kind: str) -> None:
    image = load_image(encoded(halves(mode), kind))
    assert near(image.getpixel((5, 10)), RED, 40)
    assert near(image.getpixel((35, 10)), BLUE, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "I", "F"])
def test_grey_modes_span_black_to_white(mode: str) -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(4, axis=0)
    image = Image.fromarray(ramp)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray((ramp * 1000.0 - 5000).astype(np.int32 if mode == "I" else np.float32))
    else:
        image = image.convert(mode)
    found = np.asarray(load_image(encoded(image, "TIFF")))
    assert found.shape == (4, 64, 3)
    assert found[:, 0].max() == 0
    assert found[:, -1].min() == 255
    if mode != "1":
        assert np.abs(found[..., 0].astype(int) - ramp).max() <= 1


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (4, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (255, 0, 0, 128))
    found = load_image(encoded(image))
    assert found.getpixel((0, 0)) == WHITE
    assert found.getpixel((1, 0)) == RED
    assert near(found.getpixel((2, 0)), (255, 127, 127), 2)
    palette = halves("P")
    transparent = palette.getpixel((0, 0))
    assert load_image(encoded(palette, "PNG", transparency=transparent)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(("orientation", "red_at"), [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")])
def test_exif_orientation_is_applied(orientation: int, red_at: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(encoded(halves(), "JPEG", exif=exif, quality=95))
    assert image.size == ((40, 20) if red_at in ("left", "right") else (20, 40))
    width, height = image.size
    spots = {
        "left": (2, height // 2),
        "right": (width - 3, height // 2),
        "top": (width // 2, 2),
        "bottom": (width // 2, height - 3),
    }
    assert near(image.getpixel(spots[red_at]), RED, 40)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    image = load_image(encoded(first, kind, save_all=True, append_images=[second]))
    assert near(image.getpixel((4, 4)), RED, 40)


def test_one_pixel() -> None:
    assert load_image(encoded(Image.new("RGB", (1, 1), RED))).getpixel((0, 0)) == RED


def test_wrong_suffix_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "really-a-png.jpg"
    file.write_bytes(encoded(halves()))
    assert load_image(file).size == (40, 20)


def test_the_given_pil_image_is_left_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    given = Image.open(io.BytesIO(encoded(halves(), "JPEG", exif=exif)))
    load_image(given).putpixel((0, 0), (1, 2, 3))
    assert given.size == (40, 20)
    assert given.getexif()[0x0112] == 6
    plain = halves()
    before = plain.tobytes()
    load_image(plain).putpixel((0, 0), (1, 2, 3))
    assert plain.tobytes() == before


# ---- what is refused ------------------------------------------------------------------------------------------


def refused(source: object) -> str:
    """The one line."""
    with pytest.raises(ImageError) as caught:
        load_image(source)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_missing_file_directory_and_address(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "no.png")
    assert "is a directory" in refused(tmp_path)
    assert "is no regular file" in refused(os.devnull)
    assert "cannot be read" in refused("a" * 5000)
    assert "download" in refused("https://example.org/cat.png")
    assert "no file name" in refused("a\0b.png")
    assert "int" in refused(3)


def test_empty_text_and_truncated_files(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(b"")
    assert "empty" in refused(file)
    file.write_text("these are words, not pixels")
    assert "not an image" in refused(file)
    whole = encoded(Image.effect_noise((64, 64), 80))
    file.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refused(file)
    assert str(file) in refused(file)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 30_000], ids=["where Pillow only warns", "where Pillow refuses"])
def test_decompression_bomb(side: int) -> None:
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    assert "million pixels" in refused(bomb(side, side))
    assert limit == Image.MAX_IMAGE_PIXELS
    assert filters == list(warnings.filters)


def test_strips_that_a_processor_would_blow_up() -> None:
    assert "9000 x 1" in refused(encoded(Image.new("RGB", (9000, 1))))
    assert load_image(encoded(Image.new("RGB", (100, 1)))).size == (100, 1)


def test_postscript_is_not_run() -> None:
    assert "EPS" in refused(encoded(halves(), "EPS"))


@settings(max_examples=300)
@given(data=st.data(), kind=st.sampled_from(FORMATS))
def test_damaged_files_never_crash(data: st.DataObject, kind: str) -> None:
    content = bytearray(encoded(Image.linear_gradient("L").resize((24, 16)).convert("RGB"), kind))
    for _ in range(data.draw(st.integers(1, 12))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    try:
        assert load_image(bytes(content)).mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most damage is refused, some is harmless
