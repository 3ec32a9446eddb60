"""Pictures: tensor <-> PIL, sheets, file names, and samples that are no pictures."""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sfumato.checkpoints.files import write_atomically
from sfumato.errors import InputError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> PIL mode
STEM_BYTES = 120  # of a prompt, in UTF-8, that go into a file's name; disks take names of 255 in all


def to_pil(samples: Tensor) -> list[Image.Image]:
    """Pictures of samples (b, c, h, w) in -1..1 (values outside are clipped): c = 1 grey, 3 RGB, 4 RGBA.

    Raises `ValueError` where a value is not finite, `InputError` for another number of channels.
    """
    if samples.shape[1] not in MODES:
        raise InputError(f"{samples.shape[1]} channels are no picture", "Pictures have 1, 3 or 4 channels.")
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("samples hold values that are not finite")
    values = (samples.detach().float().cpu() + 1) * 127.5
    rows = values.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()
    return [Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row) for row in rows]


def to_tensor(images: Sequence[Image.Image], mode: str = "RGB") -> Tensor:
    """Pictures of equal size as (b, c, h, w) float32 in -1..1, converted to a PIL `mode` first."""
    rows = [torch.from_numpy(np.array(image.convert(mode))) for image in images]  # (h, w[, c]) uint8
    return torch.stack([row.reshape(*row.shape[:2], -1) for row in rows]).movedim(-1, 1).float() / 127.5 - 1


def preview(sample: Tensor) -> Image.Image:
    """A picture to look at of one sample (c, ...): of a 1-D one its curves, of a 3-D one all slices.

    Where c is 1, 3 or 4 a 2-D sample is the picture itself; of another number of channels the first is shown.
    """
    if sample.ndim > 2:
        shown = sample if sample.shape[0] in MODES else sample[:1]
        return to_pil(shown[None])[0] if sample.ndim == 3 else grid(to_pil(shown.movedim(1, 0)))
    length = sample.shape[-1]
    height = 64
    picture = np.full((height, length), 255, dtype=np.uint8)
    for channel in sample.float().clamp(-1, 1).cpu():  # (l,)
        row = ((1 - channel) / 2 * (height - 1)).round().long().numpy()
        picture[row, np.arange(length)] = 0
    return Image.fromarray(picture)


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """One sheet of pictures of equal size, as square as it gets unless `columns` are given."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new(images[0].mode, (columns * width, math.ceil(len(images) / columns) * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


def captioned(image: Image.Image, caption: str) -> Image.Image:
    """The picture under one line of text."""
    font = ImageFont.load_default(14)
    sheet = Image.new("RGB", (image.width, image.height + 22), "white")
    ImageDraw.Draw(sheet).text((4, 2), caption, "black", font)
    sheet.paste(image, (0, 22))
    return sheet


def file_stem(prompt: str | None, seed: int) -> str:
    """A file name without suffix: the letters and digits of the prompt, of any script, and the seed."""
    text = unicodedata.normalize("NFC", prompt or "")
    kept = "".join(letter if unicodedata.category(letter)[0] in "LNM" else "-" for letter in text)
    words = re.sub("-+", "-", kept).strip("-").lower()
    short = words.encode()[:STEM_BYTES].decode(errors="ignore").rstrip("-")
    return f"{short or 'picture'}-{seed}"


def free_path(folder: Path, stem: str, suffix: str) -> Path:
    """`folder/stem.suffix`, or with -1, -2, ... at its end: the first that does not exist."""
    path, count = folder / f"{stem}{suffix}", 0
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}{suffix}"
    return path


def save_array(sample: Tensor, path: Path) -> None:
    """Write one sample (c, ...) as a float32 .npy file, whole or not at all, or raise `ResourceError`."""
    buffer = io.BytesIO()
    np.save(buffer, sample.detach().float().cpu().numpy(), allow_pickle=False)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))
