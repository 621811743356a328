"""Any image file to the upright RGB picture that a processor takes, or one clear line that says why not."""

from __future__ import annotations

import base64
import binascii
import io
import urllib.parse
import warnings
from pathlib import Path
from typing import Any

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

    `source`: a path, a `data:` URL, the bytes of a file, an open file, a PIL image (which is left as it is), a numpy
    array (H, W), (H, W, 3) or (H, W, 4), or a torch tensor with the channels in front; numbers are 0..255 as integers
    or 0..1 as floats. Raises `ImageError` for a file that is missing, empty, broken, no image, or so large that
    decoding it would be unsafe, and for arrays of other shapes or values.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _open(bytes(source), "the image data")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _open(_decoded(source), "the image in the data URL")
    if isinstance(source, str | Path):
        return _open(_read(source), f"'{source}'")
    reader: Any = source
    if callable(getattr(source, "read", None)):
        return _from_file(reader)
    if callable(getattr(source, "detach", None)):  # a tensor, of a library that is not imported for this
        return _decode(_from_array(_channels_last(reader)), "the image tensor")
    if isinstance(source, np.ndarray):
        return _decode(_from_array(source), "the image array")
    kind = type(source).__name__
    raise ImageError(
        f"cannot read an image from a {kind}; pass a path, bytes, an open file, a PIL image, an array or a tensor"
    )


def is_sequence(image: object) -> bool:
    """Whether `image` is several images, in the order of a prompt, and not one in whatever form."""
    return isinstance(image, list | tuple)


def _from_file(file: Any) -> Image.Image:
    name = f"the image file {getattr(file, 'name', '')!r}" if getattr(file, "name", "") else "the image file"
    try:
        data = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # the latter from a file that is closed
        raise ImageError(f"{name} cannot be read ({short_reason(error)}); open it for reading") from None
    if not isinstance(data, bytes):
        raise ImageError(f"{name} is open as text; open it in binary mode, 'rb'")
    if len(data) > _MAX_BYTES:
        raise ImageError(f"{name} has more than {_MAX_BYTES / 1e9:.1f} GB, too much for an image")
    return _open(data, name)


def _decoded(address: str) -> bytes:
    """The bytes in a `data:` URL."""
    head, comma, body = address.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        if head.lower().endswith(";base64"):
            return base64.b64decode("".join(urllib.parse.unquote(body).split()), validate=True)
        return urllib.parse.unquote_to_bytes(body)
    except (ValueError, binascii.Error) as error:
        raise ImageError(
            f"the data URL cannot be read ({short_reason(error)}); use data:image/png;base64,... with the whole file"
        ) from None


def _channels_last(tensor: Any) -> np.ndarray[Any, Any]:
    """A tensor (H, W) or (C, H, W) as an array (H, W) or (H, W, C)."""
    plain = tensor.detach().cpu()
    array = np.asarray(plain.float() if plain.is_floating_point() else plain)
    return np.moveaxis(array, 0, -1) if array.ndim == 3 else array


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    """A picture of (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) numbers."""
    shape = tuple(array.shape)
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)) or 0 in shape:
        raise ImageError(
            f"an array of shape {shape} is no image; pass (H, W), (H, W, 3) or (H, W, 4), as a tensor (3, H, W)"
        )
    if array.dtype.kind not in "uifb":
        raise ImageError(f"an array of {array.dtype} is no image; pass integers 0..255 or floats 0..1")
    most = 1 if array.dtype.kind in "fb" else 255
    values = array.astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > most:
        low, high = values.min(), values.max()
        raise ImageError(
            f"an array of {array.dtype} from {low:g} to {high:g} is no image; pass integers 0..255 or floats 0..1"
        )
    pixels = (values * (255 / most)).round().astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if array.ndim == 3 and shape[2] == 1 else pixels)


def _read(source: str | Path) -> bytes:
    if str(source) in ("", "."):  # an empty `Path` is the latter
        raise ImageError("the name of the image is empty; name one image file")
    if str(source).lower().startswith(("http:/", "https:/", "ftp:/", "file:/")):
        fix = "pass its path" if str(source).lower().startswith("file:") else "download the image and pass its path"
        raise ImageError(f"'{source}' is an address; {fix}")
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
