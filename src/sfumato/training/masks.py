"""Masks for learning to inpaint: pictures' own, or random rectangles and strokes; or the whole picture."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sfumato.errors import InputError
from sfumato.training.settings_data import DataConfig

RECTANGLES, STROKES, BENDS = 3, 4, 5  # at most, of a mask, a mask, a stroke
LEAST, MOST = 0.15, 0.7  # sides of a rectangle, of the picture's
THIN, THICK = 0.06, 0.25  # of a brush, of the picture's shorter side


def random_mask(height: int, width: int, generator: torch.Generator, whole: float = 0.25) -> Tensor:
    """(1, height, width) float32, 1 where is drawn: everything for the share `whole`, else half and half."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    if between(0, 1) < whole:
        return torch.ones(1, height, width)
    mask = Image.new("L", (width, height))
    brush = ImageDraw.Draw(mask)
    if between(0, 1) < 0.5:
        for _ in range(1 + int(between(0, RECTANGLES))):
            wide, high = between(LEAST, MOST) * width, between(LEAST, MOST) * height
            left, top = between(0, width - wide), between(0, height - high)
            brush.rectangle((round(left), round(top), round(left + wide), round(top + high)), fill=1)
    else:
        for _ in range(1 + int(between(0, STROKES))):
            points = [
                (round(between(0, width)), round(between(0, height)))
                for _ in range(2 + int(between(0, BENDS)))
            ]
            thick = max(1, round(between(THIN, THICK) * min(height, width)))
            brush.line(points, fill=1, width=thick, joint="curve")
            for x, y in points:
                brush.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=1)
    return torch.from_numpy(np.array(mask, dtype=np.float32))[None]


def own_mask(given: Tensor, generator: torch.Generator, whole: float = 0.25) -> Tensor:
    """A picture's own mask (1, h, w) in -1..1 as `random_mask` has them: its lighter half is 1."""
    if float(torch.rand((), generator=generator)) < whole:
        return torch.ones_like(given)
    return (given >= 0).to(given)


def refuse_masks(config: DataConfig) -> None:
    """`InputError` for folders of masks in a recipe that shows its network none."""
    numbered = [(f"data.folders[{number}].masks", each.masks) for number, each in enumerate(config.folders)]
    for name, folder in [("data.masks", config.masks), *numbered]:
        if folder is not None:
            raise InputError(
                f"{name} is {folder}, and only a denoiser that inpaints is shown masks",
                'Leave it out, or set task = "diffusion" and diffusion.concat = "inpainting".',
            )
