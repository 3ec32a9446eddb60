"""Pictures of strangers, read safely: limits first, then few decoders, and an error that names the file."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

from sfumato.errors import DataError, InputError
from sfumato.intake import FORMATS, LIMITS, ON_ITS_SIDE, ORIENTATION, open_mask, open_picture
from sfumato.training.data.dataset import Size
from sfumato.training.data.records import Given, Place

T = TypeVar("T")
PNG = b"\x89PNG\r\n\x1a\n"
MOST_CHUNKS = 100_000  # of a PNG that are looked through for its orientation
FAULTS = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
STRANGERS = (  # (how it begins, in small letters; what that is)
    (b"<!doctype html", "it is a web page: its download failed"),
    (b"<html", "it is a web page: its download failed"),
    (b"version https://git-lfs", "it is a pointer of git-lfs: the picture itself was not fetched"),
    (b"%pdf", "it is a PDF file"),
    (b"pk\3\4", "it is a zip archive"),
)


def flat_picture(name: str, place: Place, mode: str) -> Image.Image:
    """The upright picture in mode RGB or L, what is transparent in it white.

    Raises `DataError` naming it and the cause.
    """
    picture = _decoded(name, place, open_picture)
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert(mode)


def mask_picture(name: str, place: Place) -> Image.Image:
    """The upright picture as a mask, mode L; errors as `flat_picture`."""
    return _decoded(name, place, open_mask)


class Head(NamedTuple):
    """What a whole picture turned out to be; size is (height, width), upright."""

    size: Size
    format: str
    frames: int


def examined(name: str, place: Place) -> Head:
    """Decode a picture and say what it is; errors as `flat_picture`."""

    def look(image: Image.Image) -> Head:
        format_, frames = image.format or "", getattr(image, "n_frames", 1)
        width, height = open_picture(image).size
        return Head((height, width), format_, frames)

    return _decoded(name, place, look)


def _decoded(name: str, place: Place, plain: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(io.BytesIO(_bytes(place)), formats=FORMATS) as image:
            width, height = image.size
            if width * height > LIMITS.pixels:
                raise ValueError(
                    f"it has {width}x{height} pixels; the most is {LIMITS.pixels / 1e6:g} million"
                )
            # Before its EXIF is asked for: that decodes a PNG too, and what failed then would not fail again.
            image.load()
            return plain(image)
    except FAULTS as error:
        raise unreadable(name, place, error) from error


def _bytes(place: Place) -> bytes:
    given = place.given()
    if isinstance(given, Path):
        with given.open("rb") as file:
            given = file.read(LIMITS.bytes + 1)
    if len(given) > LIMITS.bytes:
        raise ValueError(f"it has more than {LIMITS.bytes} bytes")
    return given


def head_size(name: str, place: Place) -> Size:
    """(height, width) of the upright picture by its file's head; errors as `flat_picture`."""
    try:
        given = place.given()
        with io.BytesIO(given) if isinstance(given, bytes) else given.open("rb") as file:
            width, height, orientation = _head(file)
    except FAULTS as error:
        raise unreadable(name, place, error) from error
    return (width, height) if orientation in ON_ITS_SIDE else (height, width)


def unreadable(name: str, place: Place, error: Exception) -> DataError:
    """The error of a picture that cannot be read, in the plainest words there are for the cause."""
    cause = error.message if isinstance(error, InputError) else str(error) or type(error).__name__
    try:
        first = _first_bytes(place.given())
    except FAULTS:
        first = b"?"  # then there is nothing better to say than `error` does
    if not first:
        cause = "it is empty"
    for sign, what in STRANGERS:
        if first.lower().startswith(sign):
            cause = what
    return DataError(f"cannot read {name}: {cause}", "Remove or replace this file.")


def _first_bytes(given: Given) -> bytes:
    if isinstance(given, bytes):
        return given[:64]
    with given.open("rb") as file:
        return file.read(64)


def _head(file: io.BufferedReader | io.BytesIO) -> tuple[int, int, int]:
    """(width, height, EXIF orientation) as the file lies."""
    if file.read(8) == PNG:
        return _png_head(file)
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if not width or not height:
            raise ValueError("it has no pixels")
        return width, height, _orientation(image.getexif())


def _png_head(file: io.BufferedReader | io.BytesIO) -> tuple[int, int, int]:
    """The same of a PNG behind its signature.

    Pillow would decode all of it to find the orientation, for an eXIf chunk may stand at the end.
    """
    width, height, orientation = 0, 0, 1
    for _ in range(MOST_CHUNKS):
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind == b"IHDR":
            width, height = struct.unpack(">II", file.read(8))
            file.seek(length - 8 + 4, io.SEEK_CUR)  # 4 bytes of checksum
        elif kind == b"eXIf" and length < 1 << 16:
            exif = Image.Exif()
            exif.load(file.read(length))
            orientation = _orientation(exif)
            file.seek(4, io.SEEK_CUR)
        elif kind == b"IEND":
            break
        else:
            file.seek(length + 4, io.SEEK_CUR)
    if not width or not height:
        raise ValueError("it has no pixels")
    return width, height, orientation


def _orientation(exif: Image.Exif) -> int:
    value = exif.get(ORIENTATION, 1)
    return value if isinstance(value, int) else 1
