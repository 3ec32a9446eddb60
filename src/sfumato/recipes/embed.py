"""Pictures with their recipe: PNG texts, or Exif in JPEG and WebP, as AUTOMATIC1111's readers expect them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from sfumato.checkpoints.files import write_atomically
from sfumato.errors import InputError, nearest
from sfumato.recipes.containers import EXIF_IFD
from sfumato.recipes.text_form import to_text

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}  # suffix -> PIL's name
JSON_KEY, TEXT_KEY = "sfumato", "parameters"
QUALITY = 95  # of JPEG and WebP where nothing is asked for
LOSSLESS = 100  # the quality at which WebP loses nothing
JSON_PREFIX = f"{JSON_KEY}:"  # of our JSON among Exif's texts
DESCRIPTION, COMMENT = 0x010E, 0x9286  # Exif tags
MAX_EXIF = 65_533 - 256  # bytes of a JPEG's block of Exif, and some room for its frame
DIGEST = "picture_sha256"


def format_of(name: str) -> str:
    """PIL's name of the format with that name or suffix, as "jpg" or ".jpg"; `InputError` for another."""
    key = name.lower().removeprefix(".")
    if key not in FORMATS:
        raise InputError(f"pictures are not written as {name!r}", nearest(key, FORMATS))
    return FORMATS[key]


def save(image: Image.Image, path: Path, values: Mapping[str, Any], quality: int = QUALITY) -> None:
    """Write a picture with its recipe, in the format of the path's suffix, whole or not at all.

    values: of the recipe, what JSON can say. quality: 1 to 100, of JPEG and WebP; at 100 WebP loses nothing.
    Raises `InputError` for another suffix and for a recipe that JPEG has no room for, `ResourceError` for a
    full disk or a place that cannot be written.
    """
    data = encode(image, format_of(path.suffix), values, quality)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def encode(image: Image.Image, kind: str, values: Mapping[str, Any], quality: int = QUALITY) -> bytes:
    """The bytes of a "PNG", "JPEG" or "WEBP" file, the same for the same picture and values."""
    values = {**values, DIGEST: digest(image)}
    buffer = io.BytesIO()
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text(TEXT_KEY, to_text(values))
        info.add_text(JSON_KEY, _json(values))
        image.save(buffer, "PNG", pnginfo=info)
        return buffer.getvalue()
    exif = _exif(values)
    if kind == "JPEG":
        if len(exif) > MAX_EXIF:
            raise InputError("the recipe is too long for a JPEG file", "Write PNG or WebP.")
        flat = _flattened(image)
        flat.save(buffer, "JPEG", quality=min(quality, 100), subsampling=0, exif=exif)
    else:
        image.save(buffer, "WEBP", quality=quality, lossless=quality >= LOSSLESS, exact=True, exif=exif)
    return buffer.getvalue()


def check_room(values: Mapping[str, Any], kind: str) -> None:
    """`InputError` where a recipe with these values would not fit into a file of that kind."""
    if kind == "JPEG" and len(_exif(values)) > MAX_EXIF - 4096:  # what is only known after drawing
        raise InputError("the prompt is too long for a JPEG file", "Write PNG or WebP.")


def digest(image: Image.Image) -> str:
    """sha256 of a picture's kind, size and pixels, whatever file it comes from."""
    head = f"{image.mode} {image.width}x{image.height}\n".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


def _exif(values: Mapping[str, Any]) -> bytes:
    exif = Image.Exif()
    exif[DESCRIPTION] = JSON_PREFIX + _json(values)
    exif.get_ifd(EXIF_IFD)[COMMENT] = b"UNICODE\0" + to_text(values).encode("utf-16-be")
    return exif.tobytes()


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _flattened(image: Image.Image) -> Image.Image:
    """The picture without transparency, which JPEG does not have: on white."""
    if image.mode != "RGBA":
        return image
    sheet = Image.new("RGB", image.size, "white")
    sheet.paste(image, mask=image.getchannel("A"))
    return sheet
