"""Pictures of every kind come in right, or are refused with a clear error before they are decoded."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import InputError
from sfumato.intake import Limits, open_mask, open_picture, picture_size

CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]], [[0, 0, 0], [90, 90, 90]]])


def packed(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rgb() -> Image.Image:
    return Image.fromarray(CORNERS.astype(np.uint8))


def pixels(data: bytes | Image.Image) -> np.ndarray:
    return np.asarray(open_picture(data)).astype(int)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: a[::-1].swapaxes(0, 1)),  # its top row is the right column
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: a[:, ::-1].swapaxes(0, 1)),
    ],
)
def test_pictures_are_turned_upright(orientation: int, upright: Callable[[Any], Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = packed(rgb(), exif=exif)
    expected = upright(CORNERS)
    assert np.array_equal(pixels(data), expected)
    assert picture_size(data) == expected.shape[1::-1]


def test_an_orientation_that_is_none_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert np.array_equal(pixels(packed(rgb(), exif=exif)), CORNERS)


def test_grey_of_16_bits_is_rounded_and_not_cut() -> None:
    values = np.array([[0, 128, 257 * 100, 65535]], dtype=np.uint16)
    assert pixels(packed(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 100, 255]


def png_16_bits() -> bytes:
    """One RGB pixel of 16 bits, which PIL does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    body = zlib.compress(b"\0" + struct.pack(">3H", 65535, 257 * 7, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_colour_of_16_bits() -> None:
    assert pixels(png_16_bits())[0, 0].tolist() == [255, 7, 0]


def test_palettes_grey_cmyk_and_bits_are_colours() -> None:
    assert np.array_equal(pixels(packed(rgb().quantize(8))), CORNERS)
    assert np.array_equal(pixels(packed(rgb().quantize(8), "GIF")), CORNERS)
    assert pixels(packed(Image.new("L", (1, 1), 40)))[0, 0].tolist() == [40, 40, 40]
    assert pixels(packed(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255, 255, 255]
    red = pixels(packed(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))[4, 4]
    assert np.abs(red - [255, 0, 0]).max() < 6


def test_alpha_is_kept_where_it_says_something() -> None:
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    assert open_picture(packed(clear)).mode == "RGB"
    clear.putpixel((0, 0), (10, 20, 30, 0))
    assert open_picture(packed(clear)).mode == "RGBA"
    keyed = open_picture(packed(rgb(), transparency=(255, 0, 0)))
    assert keyed.getchannel("A").getextrema() == (0, 255)
    palette = Image.new("P", (2, 1))
    palette.putpixel((1, 0), 1)
    assert open_picture(packed(palette, transparency=0)).getchannel("A").tobytes() == b"\x00\xff"


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(format: str) -> None:
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    data = packed(first, format, save_all=True, append_images=[second], duration=50)
    assert np.abs(pixels(data)[0, 0] - [255, 0, 0]).max() < 4


def test_one_pixel() -> None:
    assert open_picture(packed(Image.new("RGB", (1, 1)))).size == (1, 1)


def test_a_given_picture_is_not_changed() -> None:
    given = rgb()
    open_picture(given).putpixel((0, 0), (1, 2, 3))
    assert given.getpixel((0, 0)) == (255, 0, 0)


def test_masks_are_grey_and_black_where_they_are_transparent() -> None:
    given = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    given.putpixel((1, 0), (255, 255, 255, 0))
    assert open_mask(given).tobytes() == b"\xff\x00"


def test_sizes_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = packed(Image.new("1", (9000, 9000)))  # 10 kB
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(InputError, match="9000x9000 pixels; the most is 64 million"):
        open_picture(bomb)
    monkeypatch.undo()
    header = bytearray(packed(rgb()))
    header[16:24] = struct.pack(">II", 60_000, 60_000)
    header[29:33] = struct.pack(">I", zlib.crc32(bytes(header[12:29])))
    with pytest.raises(InputError, match="cannot be read as a picture"):
        open_picture(bytes(header))
    path = tmp_path / "long.png"
    path.write_bytes(bytes(200))
    with pytest.raises(InputError, match="more than 100 bytes"):
        open_picture(path, Limits(bytes=100))
    with pytest.raises(InputError, match="200 bytes"):
        open_picture(bytes(200), Limits(bytes=100))


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"%!PS-Adobe", packed(rgb())[:60], packed(rgb(), "TIFF")])
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(InputError, match="cannot be read as a picture"):
        open_picture(data)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_picture(tmp_path / "no.png")
    with pytest.raises(InputError, match="is a folder"):
        open_picture(str(tmp_path))
    with pytest.raises(InputError, match="is no file"):
        open_picture("/dev/zero")
    with pytest.raises(InputError, match="floating-point"):
        open_picture(Image.new("F", (2, 2)))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damage_is_an_input_error(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    whole, chance, refused = packed(noise, format), random.Random(1), 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            assert open_picture(bytes(data[: chance.randint(1, len(data))])).mode in ("RGB", "RGBA")
        except InputError:
            refused += 1
    assert refused > 50
