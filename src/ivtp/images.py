"""Any image file to the upright RGB picture that a processor takes, or one clear line that says why not."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ivtp.errors import ImageError, short_reason

_ACCEPTED = "PNG, JPEG, WebP, GIF, BMP or TIFF"
_MAX_BYTES = 1 << 30
"""Of a file: more than its largest image would take without any compression."""
_MAX_ASPECT = 100
"""Long over short side: processors scale the short side up to 336, a 1 x 9000 strip to a gigapixel."""


def load_image(source: object) -> Image.Image:
    """The image as RGB: upright, transparency on white, of an animation the first frame.

    `source`: a path, the bytes of a file, or a PIL image (which is left as it is). Raises `ImageError` for
    a file that is missing, empty, broken, no image, or so large that decoding it would be unsafe.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL image")
    if isinstance(source, bytes):
        return _open(source, "the image data")
    if isinstance(source, str | Path):
        return _open(_read(source), f"'{source}'")
    kind = type(source).__name__
    raise ImageError(f"cannot read an image from a {kind}; pass a path, bytes or a PIL image")


def _read(source: str | Path) -> bytes:
    if str(source).lower().startswith(("http://", "https://")):
        raise ImageError(f"'{source}' is an address; download the image and pass its path")
    path = Path(source)
    try:
        kind = "a directory" if path.is_dir() else "no regular file" if path.exists() and not path.is_file() else None
        size = 0 if kind else path.stat().st_size
        data = b"" if kind or size > _MAX_BYTES else path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"'{path}' does not exist; check the path of the image") from None
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"'{path}' cannot be read ({reason}); check the path and its permissions") from None
    except ValueError:  # a null byte inside the name
        raise ImageError(f"{str(source)!r} is no file name; check the path of the image") from None
    if kind:
        raise ImageError(f"'{path}' is {kind}; name one image file ({_ACCEPTED})")
    if size > _MAX_BYTES:
        raise ImageError(f"'{path}' has {size / 1e9:.1f} GB, too much for an image; name one image file ({_ACCEPTED})")
    return data


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ImageError(f"{name} is empty (0 bytes); save or download the image again")
    with warnings.catch_warnings():
        # Pillow only warns between one and two times its pixel limit, and chatters about harmless metadata.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data)) as image:
                return _decode(image, name)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            limit = (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
            raise ImageError(
                f"{name} would decode to more than {limit} million pixels, which is unsafe; scale it down"
            ) from None
        except UnidentifiedImageError:
            raise ImageError(f"{name} is not an image that can be read; use {_ACCEPTED}") from None
        except ImageError:
            raise
        except MemoryError:
            raise ImageError(f"{name} takes more memory than there is; scale it down") from None
        except Exception as error:  # decoders of damaged files raise anything, struct.error or IndexError
            raise _damaged(name, error) from None


def _decode(image: Image.Image, name: str) -> Image.Image:
    if image.format == "EPS":
        raise ImageError(f"{name} is an EPS file, which only a PostScript program can draw; use {_ACCEPTED}")
    width, height = image.size
    if min(width, height) < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height}); use an image of at least 1 x 1")
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name} is a strip of {width} x {height} pixels; crop it to a ratio of at most {_MAX_ASPECT} : 1"
        )
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I") or upright.mode == "F":
            upright = _to_8_bit(upright)
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        layer = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise _damaged(name, error) from None
    except ValueError as error:
        raise ImageError(f"{name} cannot become RGB ({short_reason(error)}); convert it to {_ACCEPTED}") from None


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits by their full range; 32-bit integers and floats by their own."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else (values.min(), values.max())
    scaled = (values - low) * (255.0 / (high - low)) if high > low else np.clip(values, 0, 255)
    return Image.fromarray(scaled.round().astype(np.uint8))


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name} is damaged ({short_reason(error)}); save or download the image again")
