"""Contact sheets and lists written during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from sfumato.checkpoints.files import write_atomically


def save_sheet(path: Path, pictures: Tensor, columns: int) -> None:
    """Write (b, c, h, w) pictures in -1..1, c 1 or 3, row by row as one PNG with a 2-pixel gap."""
    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    pixels = np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels
    _, height, width, _ = pixels.shape
    rows = -(-len(pixels) // columns)
    sheet = np.full((rows * (height + 2), columns * (width + 2), 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pixels):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        sheet[top : top + height, left : left + width] = picture
    write_atomically(path, lambda temporary: Image.fromarray(sheet).save(temporary, "PNG"))


def save_classes(path: Path, names: Sequence[str]) -> None:
    """Write the classes' numbers and names, a line each."""
    text = "".join(f"{number}\t{name}\n" for number, name in enumerate(names))
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
