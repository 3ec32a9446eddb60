"""How a picture is cut and mirrored at a place of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image, ImageOps

from sfumato.training.data.dataset import Size, View
from sfumato.training.data.positions import Position

Crop = Literal["center", "random"]


@dataclass(frozen=True)
class Framing:
    """The rules for all pictures. flip: share of them that is mirrored, left to right."""

    crop: Crop = "center"
    flip: float = 0.0


CENTERED = Framing()


@dataclass(frozen=True)
class Frame:
    """What one picture is subject to: `View`, and where the cut lies, 0 at the top or left to 1."""

    view: View
    centering: tuple[float, float] = (0.5, 0.5)  # (from the left, from the top), as Pillow has it


def framed(framing: Framing, position: Position, original: Size, size: Size) -> Frame:
    """The frame at a position: a function of it and of the sizes, so a resumed run cuts alike."""
    centering = (0.5, 0.5)
    if framing.crop == "random":
        drawn = torch.rand(2, generator=position.generator("crop"), dtype=torch.float64).tolist()
        centering = (drawn[0], drawn[1])
    return frame(original, size, mirrored(framing, position), centering)


def mirrored(framing: Framing, position: Position) -> bool:
    """Whether a picture is mirrored at a position."""
    if framing.flip == 0:
        return False
    return float(torch.rand((), generator=position.generator("flip"))) < framing.flip


def frame(
    original: Size, size: Size, flipped: bool = False, centering: tuple[float, float] = (0.5, 0.5)
) -> Frame:
    """The frame of a cut: the picture, resized to cover `size`, loses what is over."""
    scale = max(size[0] / original[0], size[1] / original[1])
    over = [round(side * scale) - kept for side, kept in zip(original, size, strict=True)]
    crop = (round(over[0] * centering[1]), round(over[1] * centering[0]))
    return Frame(View(size, original, crop, flipped), centering)


def cut(
    picture: Image.Image, chosen: Frame, method: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The picture in its frame."""
    height, width = chosen.view.size
    fitted = ImageOps.fit(picture, (width, height), method, centering=chosen.centering)
    return fitted.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chosen.view.flipped else fitted
