"""The texts in PNG, JPEG and WebP files, read without decoding a pixel (PNG 1.2, JFIF, RIFF and Exif 2.3)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sfumato.errors import InputError

MAX_FILE = 512 << 20  # bytes; a PNG of 16,384 x 8,192 pixels that no compression helps has 400 MB
MAX_TEXT = 8 << 20  # bytes of all texts of a file, unpacked
PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
EXIF_HEADER = b"Exif\0\0"
# Exif tags: the texts that pictures of diffusion models carry, and the way to them.
EXIF_IFD = 0x8769
TAGS = {
    0x010E: "ImageDescription",
    0x010F: "Make",
    0x0110: "Model",
    0x0131: "Software",
    0x9286: "UserComment",
}
TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 7: 1}  # byte, ASCII, short, long, undefined
MAX_ENTRIES = 512  # of an Exif directory
# JPEG's start-of-frame markers, which hold the size; C4, C8 and CC mean other things.
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True)
class Container:
    """A picture file's format ("PNG", "JPEG" or "WEBP"), its size in pixels, and its texts by name."""

    format: str
    width: int
    height: int
    texts: dict[str, str]


def read_container(path: Path) -> Container:
    """The texts of a picture file; `InputError` where it is none of the three formats, cut off or too large.

    Nothing is unpacked beyond 8 MiB of text, whatever the file claims.
    """
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if path.stat().st_size > MAX_FILE:
            raise ValueError(f"it is larger than {MAX_FILE >> 20} MiB")
        data = path.read_bytes()
        if data.startswith(PNG):
            return _png(data)
        if data.startswith(JPEG):
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
        raise ValueError("it is neither PNG, JPEG nor WebP")
    except (OSError, ValueError, struct.error, zlib.error) as error:
        cause = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} cannot be read as a picture: {cause}", "Give a whole PNG, JPEG or WebP file."
        ) from error


class _Texts:
    """Texts as they are collected, against a limit of all together; of one name the first counts."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._room = MAX_TEXT

    def unpack(self, packed: bytes) -> bytes:
        machine = zlib.decompressobj()
        data = machine.decompress(packed, self._room + 1)
        if not machine.eof:
            raise ValueError("a compressed text is damaged or too long")
        return data

    def add(self, name: str, text: str) -> None:
        self._room -= len(text)
        if self._room < 0:
            raise ValueError(f"its texts are longer than {MAX_TEXT >> 20} MiB")
        self.found.setdefault(name, text)


def _png(data: bytes) -> Container:
    texts, size = _Texts(), None
    for kind, body in _png_chunks(data):
        if kind == b"IHDR":
            size = struct.unpack_from(">II", body)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            _png_text(kind, body, texts)
        elif kind == b"eXIf":
            _exif(body, texts)
    if size is None:
        raise ValueError("it has no header")
    return Container("PNG", *size, texts.found)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(PNG)
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 12 + length
        if end > len(data):
            break
        kind, body = data[place + 4 : place + 8], data[place + 8 : end - 4]
        if kind != b"IDAT" and zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise ValueError(f"its part {kind!r} is damaged")
        yield kind, body
        if kind == b"IEND":
            return
        place = end
    raise ValueError("it is cut off")


def _png_text(kind: bytes, body: bytes, texts: _Texts) -> None:
    name, _, rest = body.partition(b"\0")
    if kind == b"tEXt":
        text = rest.decode("latin-1")
    elif kind == b"zTXt":
        text = texts.unpack(rest[1:]).decode("latin-1")
    else:
        packed, rest = rest[:1] == b"\1", rest[2:]
        _language, _, rest = rest.partition(b"\0")
        _translated, _, rest = rest.partition(b"\0")
        text = (texts.unpack(rest) if packed else rest).decode("utf-8", "replace")
    texts.add(name.decode("latin-1"), text)


def _jpeg(data: bytes) -> Container:
    texts, place = _Texts(), 2
    while True:
        mark, kind, length = struct.unpack_from(">BBH", data, place)
        if mark != 0xFF or length < 2 or place + 2 + length > len(data):
            raise ValueError("it is cut off or damaged")
        body = data[place + 4 : place + 2 + length]
        if kind == 0xE1 and body.startswith(EXIF_HEADER):
            _exif(body, texts)
        elif kind == 0xFE:
            texts.add("comment", body.decode("utf-8", "replace"))
        elif kind in FRAMES:  # texts stand before the pixels
            height, width = struct.unpack_from(">HH", body, 1)
            return Container("JPEG", width, height, texts.found)
        place += 2 + length


def _webp(data: bytes) -> Container:
    texts, size, place = _Texts(), None, 12
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while place + 8 <= end:
        kind, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        body = data[place + 8 : place + 8 + length]
        if len(body) < length:
            raise ValueError("it is cut off")
        if kind == b"EXIF":
            _exif(body, texts)
        elif size is None:
            size = _webp_size(kind, body)
        place += 8 + length + length % 2
    if size is None:
        raise ValueError("it has no header")
    return Container("WEBP", *size, texts.found)


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int] | None:
    """Width and height by the first part of the file: extended, lossy or lossless."""
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def _exif(data: bytes, texts: _Texts) -> None:
    """Add the texts of an Exif block; one that is damaged has none, for the picture is whole without it."""
    data = data.removeprefix(EXIF_HEADER)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return
    try:
        (first,) = struct.unpack_from(order + "I", data, 4)
        for tag, value in _directory(data, first, order):
            if tag == EXIF_IFD and len(value) == 4:
                inner = struct.unpack(order + "I", value)[0]
                _add_tags(_directory(data, inner, order), order, texts)
        _add_tags(_directory(data, first, order), order, texts)
    except struct.error:
        return


def _add_tags(entries: Iterator[tuple[int, bytes]], order: str, texts: _Texts) -> None:
    for tag, value in entries:
        if tag in TAGS:
            texts.add(TAGS[tag], _comment(value, order) if tag == 0x9286 else _plain(value))


def _directory(data: bytes, place: int, order: str) -> Iterator[tuple[int, bytes]]:
    """The (tag, raw value) of a directory's entries."""
    (count,) = struct.unpack_from(order + "H", data, place)
    for index in range(min(count, MAX_ENTRIES)):
        at = place + 2 + 12 * index
        tag, kind, number = struct.unpack_from(order + "HHI", data, at)
        length = TYPE_SIZES.get(kind, 0) * number
        if length <= 4:
            yield tag, data[at + 8 : at + 8 + length]
            continue
        (start,) = struct.unpack_from(order + "I", data, at + 8)
        yield tag, data[start : start + length]


def _plain(value: bytes) -> str:
    return value.rstrip(b"\0").decode("utf-8", "replace")


def _comment(value: bytes, order: str) -> str:
    """A user comment: eight bytes name its encoding; UTF-16 is in either order, whatever the file's."""
    code, text = value[:8], value[8:]
    if code != b"UNICODE\0":
        return _plain(text if code in (b"ASCII\0\0\0", bytes(8)) else value)
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return text.decode("utf-16", "replace").rstrip("\0")
    # Latin letters leave a zero in the first byte of a pair written high byte first.
    zeros = [text[start::2].count(0) for start in (0, 1)]
    high_first = zeros[0] > zeros[1] if zeros[0] != zeros[1] else order == ">"
    return text.decode("utf-16-be" if high_first else "utf-16-le", "replace").rstrip("\0")
