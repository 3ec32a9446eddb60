"""Pictures from anywhere, made plain: upright 8-bit RGB or RGBA, or an error that says what was wrong.

Sizes are looked at before anything is decoded, and only a few well-tested decoders are tried.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
ORIENTATION = 0x0112  # EXIF 2.32, table 4
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ON_ITS_SIDE = (5, 6, 7, 8)
WIDE = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # 16 bits of grey
# What Pillow's decoders raise for damaged files.
DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip

Given = Path | str | bytes | Image.Image


@dataclass(frozen=True)
class Limits:
    """The most that is decoded: bytes of a file, and pixels."""

    bytes: int = 64 * 2**20
    pixels: int = 64_000_000  # 192 MB as RGB


LIMITS = Limits()


def open_picture(given: Given, limits: Limits = LIMITS) -> Image.Image:
    """A picture as RGB, or RGBA where parts of it are transparent; of an animation the first frame.

    given: a path, the bytes of a file (PNG, JPEG, WebP, GIF, BMP), or a PIL picture in its current frame. It
    is turned upright by its EXIF; 16 bits are rounded to 8; palettes, grey, CMYK become RGB; colour profiles
    are left out. `InputError` for what is missing, damaged, larger than `limits` or no picture.
    """
    with _opened(given, limits) as image:
        image.load()  # before its EXIF is asked for, which may lie behind the pixels
        place = UPRIGHT.get(_orientation(image))
        plain = _plain(image)
    return plain if place is None else plain.transpose(place)


def open_mask(given: Given, limits: Limits = LIMITS) -> Image.Image:
    """A picture as a mask, mode L: its lightness; what is transparent is black. Errors as `open_picture`."""
    image = open_picture(given, limits)
    if image.mode != "RGBA":
        return image.convert("L")
    return Image.composite(image.convert("L"), Image.new("L", image.size, 0), image.getchannel("A"))


def picture_size(given: Given, limits: Limits = LIMITS) -> tuple[int, int]:
    """Width and height of the picture when upright, from its file's head alone. Errors as `open_picture`."""
    with _opened(given, limits) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in ON_ITS_SIDE else (width, height)


def is_picture(path: Path) -> bool:
    """Whether a file's name is that of a picture that can be opened."""
    return path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}


@contextmanager
def _opened(given: Given, limits: Limits) -> Iterator[Image.Image]:
    """The picture before its pixels are decoded, its size checked; what decoding raises is told here."""
    name = str(given) if isinstance(given, str | Path) else "the picture"
    try:
        if isinstance(given, Image.Image):
            yield _checked(given, name, limits)
            return
        data = _bytes(Path(given), limits) if isinstance(given, str | Path) else given
        if len(data) > limits.bytes:
            raise InputError(f"{name} has {len(data)} bytes", f"The most is {limits.bytes}.")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        with opened as image:
            yield _checked(image, name, limits)
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(
            f"{name} cannot be read as a picture: {str(error) or type(error).__name__}",
            "Give a whole PNG, JPEG, WebP, GIF or BMP file.",
        ) from error


def _bytes(path: Path, limits: Limits) -> bytes:
    """What a file holds; `InputError` unless it is a file, and not too long."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}", "Give the file of a picture.")
    with path.open("rb") as file:
        data = file.read(limits.bytes + 1)
    if len(data) > limits.bytes:
        raise InputError(f"{path} has more than {limits.bytes} bytes", "Give a smaller file.")
    return data


def _checked(image: Image.Image, name: str, limits: Limits) -> Image.Image:
    width, height = image.size
    if width * height > limits.pixels:
        raise InputError(
            f"{name} has {width}x{height} pixels; the most is {limits.pixels / 1e6:g} million",
            "Make it smaller.",
        )
    if width < 1 or height < 1:
        raise InputError(f"{name} has no pixels: it is {width}x{height}", "Give another picture.")
    return image


def _orientation(image: Image.Image) -> int:
    """How it lies, 1 to 8 as EXIF numbers it; 1, upright, where the EXIF is absent or makes no sense."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except DAMAGED:
        return 1  # such a picture is shown as it lies everywhere
    return value if isinstance(value, int) else 1


def _plain(image: Image.Image) -> Image.Image:
    """The pixels as RGB or RGBA."""
    if image.mode == "F":
        raise InputError("the picture holds floating-point numbers", "Scale it to 8 bits first.")
    if image.mode in WIDE:
        values = np.asarray(image).astype(np.float64) / 257  # 65535 / 255
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba if rgba.getchannel("A").getextrema() != (255, 255) else rgba.convert("RGB")
    return image.convert("RGB")
