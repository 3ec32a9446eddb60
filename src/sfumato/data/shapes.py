"""A picture set that needs no download: coloured shapes in places, as a folder of PNG files with captions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import cos, pi, sin
from pathlib import Path

from PIL import Image, ImageDraw

from sfumato.data.split import unit
from sfumato.data.words import with_article
from sfumato.errors import InputError

COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (250, 208, 60),
    "green": (60, 160, 80),
    "blue": (50, 100, 210),
    "purple": (130, 70, 180),
}
PLACES = {
    "on the left": (0.28, 0.5),
    "on the right": (0.72, 0.5),
    "at the top": (0.5, 0.28),
    "at the bottom": (0.5, 0.72),
    "in the middle": (0.5, 0.5),
}
GROUND = (246, 244, 238)
RADIUS, JITTER = 0.2, 0.04  # of the side; size and place vary by up to the jitter
SUPERSAMPLING = 4

Points = list[tuple[float, float]]


def polygon(corners: int, inner: float = 1.0) -> Points:
    """Corners on the unit circle, the first at the top; every second one at radius `inner`, as stars have."""
    turns = [2 * pi * number / corners - pi / 2 for number in range(corners)]
    radii = [inner if number % 2 else 1.0 for number in range(corners)]
    return [(radius * cos(turn), radius * sin(turn)) for turn, radius in zip(turns, radii, strict=True)]


SHAPES: dict[str, Points] = {
    "circle": polygon(64),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": polygon(3),
    "star": polygon(10, inner=0.45),
}


def shapes(size: int, copies: int = 1, seed: int = 0) -> Iterator[tuple[str, str, Image.Image]]:
    """(file name without suffix, caption, RGB picture of side `size`): every colour, shape and place.

    Each of the 120 combinations comes `copies` times, size and place varied by the hash of name and seed.
    """
    for copy, colour, shape, place in product(range(copies), COLOURS, SHAPES, PLACES):
        name = f"{colour}-{shape}-{place.split()[-1]}-{copy:03d}"
        x, y, radius = (
            value + JITTER * (2 * unit(seed, name, axis) - 1)
            for axis, value in zip("xyr", (*PLACES[place], RADIUS), strict=True)
        )
        side = size * SUPERSAMPLING
        canvas = Image.new("RGB", (side, side), GROUND)
        points = [((x + radius * dx) * side, (y + radius * dy) * side) for dx, dy in SHAPES[shape]]
        ImageDraw.Draw(canvas).polygon(points, fill=COLOURS[colour])
        picture = canvas.resize((size, size), Image.Resampling.BOX)
        yield name, f"{with_article(colour)} {shape} {place}", picture


def write_shapes(folder: Path | str, *, size: int = 64, copies: int = 1, seed: int = 0) -> int:
    """Writes 120 x `copies` PNG files, each with its caption in a .txt beside it; how many there are.

    `size` is the side in pixels, at least 8. Equal arguments give equal pictures.
    """
    if size < 8 or copies < 1:
        raise InputError(f"size {size} and copies {copies}", "size is at least 8, copies at least 1.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, caption, picture in shapes(size, copies, seed):
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    return copies * len(COLOURS) * len(SHAPES) * len(PLACES)
