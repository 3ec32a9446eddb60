"""Recipes in PNG, JPEG and WebP files, as other tools look for them, and texts that no file may hide in."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sfumato.errors import InputError, ResourceError
from sfumato.recipes import embed, read
from sfumato.recipes.containers import MAX_TEXT, read_container

VALUES: dict[str, Any] = {"prompt": "a fox 🦊, red", "steps": 20, "seed": 3, "version": "0.1.0"}
TEXT = "a fox 🦊, red\nSteps: 20, Seed: 3, Version: sfumato 0.1.0"


def picture(size: tuple[int, int] = (9, 7), mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if mode == "L" else values, mode=None)


@pytest.mark.parametrize(
    ("suffix", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")]
)
def test_where_other_tools_look(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"fox.{suffix.upper()}"
    embed.save(picture(), path, VALUES)
    with Image.open(path, formats=[kind]) as image:
        if kind == "PNG":
            assert image.info["parameters"] == TEXT
        else:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == TEXT
    found = read_container(path)
    assert (found.format, found.width, found.height) == (kind, 9, 7)
    values = read(path).values
    assert {name: values[name] for name in VALUES} == VALUES
    assert values["picture_sha256"] == embed.digest(picture())
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_equal_pictures_give_equal_bytes_in_every_mode(kind: str, mode: str) -> None:
    one, two = (embed.encode(picture(mode=mode), kind, VALUES) for _ in range(2))
    assert one == two and embed.encode(picture(mode=mode), kind, {**VALUES, "seed": 4}) != one


def test_quality(tmp_path: Path) -> None:
    noisy = picture((64, 64))
    for kind in ("JPEG", "WEBP"):
        low, high = (len(embed.encode(noisy, kind, {}, quality)) for quality in (30, 95))
        assert low < high / 2
    embed.save(noisy, tmp_path / "a.webp", {}, 100)
    with Image.open(tmp_path / "a.webp", formats=["WEBP"]) as image:
        assert np.array_equal(np.array(image), np.array(noisy)), "nothing is lost at 100"


def test_a_jpeg_of_a_transparent_picture_is_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    with Image.open(io.BytesIO(embed.encode(clear, "JPEG", {})), formats=["JPEG"]) as image:
        assert image.convert("RGB").getpixel((4, 4)) == (255, 255, 255)


def test_recipes_that_a_jpeg_has_no_room_for() -> None:
    long = {"prompt": "word " * 8000}
    for kind in ("PNG", "WEBP"):
        embed.check_room(long, kind)
        assert len(embed.encode(picture(), kind, long)) > 40_000
    for refuse in (lambda: embed.check_room(long, "JPEG"), lambda: embed.encode(picture(), "JPEG", long)):
        with pytest.raises(InputError, match="too long for a JPEG"):
            refuse()
    embed.check_room({"prompt": "word " * 1000}, "JPEG")
    with pytest.raises(InputError, match=r"not written as '\.gif'"):
        embed.format_of(".gif")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    path = tmp_path / "fox.png"
    embed.save(picture(), path, {"prompt": "old"})

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail) if call == "fsync" else patch.setattr(Path, "replace", fail)
        with pytest.raises(ResourceError, match=os.strerror(number)):
            embed.save(picture(), path, {"prompt": "new"})
    assert read(path).values["prompt"] == "old"
    assert os.listdir(tmp_path) == ["fox.png"], "nothing half written stays"


# Files of others


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of one pixel with these chunks before its end."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0\0"))]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in [*parts, *chunks, (b"IEND", b"")]:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def texts_of(path: Path, data: bytes) -> dict[str, str]:
    path.write_bytes(data)
    return read_container(path).texts


def test_every_kind_of_text_in_a_png(tmp_path: Path) -> None:
    data = png(
        (b"tEXt", "plain\0caf\xe9".encode("latin-1")),
        (b"zTXt", b"packed\0\0" + zlib.compress(b"inside")),
        (b"iTXt", b"wide\0\0\0\0\0" + "日本".encode()),
        (b"iTXt", b"both\0\1\0de\0\0" + zlib.compress("🦊".encode())),
        (b"tEXt", b"plain\0the second does not count"),
    )
    expected = {"plain": "café", "packed": "inside", "wide": "日本", "both": "🦊"}
    assert texts_of(tmp_path / "a.png", data) == expected


def test_texts_that_unpack_to_more_than_there_is_room_for(tmp_path: Path) -> None:
    bomb = zlib.compress(b"a" * (MAX_TEXT + 1000))
    assert len(bomb) < 20_000
    whole = zlib.compress(b"a" * 100)
    bad = [(b"zTXt", b"x\0\0" + bomb), (b"zTXt", b"x\0\0" + whole[:-5]), (b"zTXt", b"x\0\0junk")]
    for chunk in bad:
        with pytest.raises(InputError, match="cannot be read as a picture"):
            texts_of(tmp_path / "a.png", png(chunk))
    many = [(b"tEXt", b"%d\0" % i + b"a" * (MAX_TEXT // 8)) for i in range(9)]
    with pytest.raises(InputError, match="longer than 8 MiB"):
        texts_of(tmp_path / "a.png", png(*many))


def exif(order: str, comment: bytes) -> bytes:
    """Exif with a user comment in its inner directory and a description in its outer one, by hand."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    outer = struct.pack(order + "HHHIIHHII", 2, 0x010E, 2, 4, 0, 0x8769, 4, 1, 38)
    outer = outer[:10] + b"fox\0" + outer[14:] + struct.pack(order + "I", 0)
    inner = struct.pack(order + "HHHIII", 1, 0x9286, 7, len(comment), 56, 0)
    return head + outer + inner + comment


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("comment", "text"),
    [
        (b"UNICODE\0" + "cat é".encode("utf-16-be"), "cat é"),
        (b"UNICODE\0" + "cat é".encode("utf-16-le"), "cat é"),
        (b"UNICODE\0" + "cat".encode("utf-16"), "cat"),  # with a mark of its order
        (b"ASCII\0\0\0" + b"plain cat", "plain cat"),
        (bytes(8) + b"no code", "no code"),
        (b"nothing before it", "nothing before it"),
    ],
)
def test_user_comments_of_other_writers(tmp_path: Path, order: str, comment: bytes, text: str) -> None:
    body = b"Exif\0\0" + exif(order, comment)
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 11, 8, 4, 5, 1) + b"\1\x11\0"
    jpeg = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(body) + 2) + body + frame
    expected = {"UserComment": text, "ImageDescription": "fox"}
    assert texts_of(tmp_path / "a.jpg", jpeg) == expected
    inside = b"VP8L" + struct.pack("<I", 5) + b"\x2f" + struct.pack("<I", 4 | 3 << 14) + b"\0"
    inside += b"EXIF" + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    webp = b"RIFF" + struct.pack("<I", 4 + len(inside)) + b"WEBP" + inside
    assert texts_of(tmp_path / "a.webp", webp) == expected
    found = read_container(tmp_path / "a.webp")
    assert (found.width, found.height) == (5, 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: Any
) -> None:
    whole = bytearray(embed.encode(picture(), kind, VALUES))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(whole[: data.draw(st.integers(1, len(whole)))])
    try:
        read(path)
    except InputError as error:
        assert "cannot be read as a picture" in error.message


def test_the_size_that_a_file_claims_costs_nothing(tmp_path: Path) -> None:
    huge = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0)
    data = png((b"tEXt", b"parameters\0cat"))
    data = data[:16] + huge + struct.pack(">I", zlib.crc32(b"IHDR" + huge)) + data[33:]
    assert texts_of(tmp_path / "a.png", data) == {"parameters": "cat"}


def test_our_png_texts_are_what_pillow_reads(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "cat\nSteps: 5", zip=True)
    info.add_itxt("sfumato", json.dumps({"prompt": "fox"}), zip=True)
    picture().save(tmp_path / "a.png", pnginfo=info)
    assert read(tmp_path / "a.png").values == {"prompt": "fox"}
