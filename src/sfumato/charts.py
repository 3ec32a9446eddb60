"""Line charts as pictures, painted with PIL: a few named lines over linear or logarithmic axes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sfumato.checkpoints.files import write_atomically
from sfumato.errors import InputError

# Ten that most eyes tell apart, dark enough for thin lines; further lines begin anew with another mark.
COLOURS = ("#3f6fa8", "#e8801f", "#d94a4f", "#4a9a45", "#9467bd",
           "#12a0a8", "#8c5f4a", "#c79a00", "#e0649c", "#666666")  # fmt: skip
INK, PALE, RULE = "#1f1f1f", "#5c5c5c", "#e3e3e3"
OVERSAMPLING = 3  # painted this much larger and scaled down, which smooths the lines
GAP, SMALL, LARGE = 12, 15, 19  # pixels: between things, height of letters
PADDING = 0.03  # of an axis, beyond the outermost points
LEAST = 100  # pixels each way for the lines

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Pixel = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named line through points (x, y), drawn in the order given."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """What an axis counts, and whether in powers: a logarithmic one leaves out what is not above 0."""

    title: str
    log: bool = False

    def shows(self, value: float) -> bool:
        """Whether a value has a place on it."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def place(self, value: float) -> float:
        """Where a value lies, in the units of an even ruler."""
        return math.log10(value) if self.log else value


def chart(
    lines: Sequence[Line], x: Axis, y: Axis, *, title: str = "", size: tuple[int, int] = (960, 600)
) -> Image.Image:
    """The lines with marks at their points, axes, titles, and a legend beside them.

    size: width and height in pixels of the RGB picture. Points that an axis cannot show are left out.
    `InputError` where none is left, or the names and numbers leave no room for the lines.
    """
    shown = [Line(line.name, [(a, b) for a, b in line.points if x.shows(a) and y.shows(b)]) for line in lines]
    points = [point for line in shown for point in line.points]
    if not points:
        raise InputError("there is nothing to draw", "A chart needs finite points, above 0 on a log axis.")
    paper = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), "white")
    frame = _Frame(paper, x, y, points, [line.name for line in shown], bool(title))
    if min(frame.right - frame.left, frame.bottom - frame.top) < LEAST:
        raise InputError(
            f"{size[0]} x {size[1]} pixels leave no room beside the names", "Take more, or shorter names."
        )
    frame.draw_axes(title)
    for index, line in enumerate(shown):
        frame.draw_line(index, [frame.pixel(point) for point in line.points])
    frame.draw_legend()
    return paper.resize(size, Image.Resampling.LANCZOS)


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG file whole or not at all; `ResourceError` where it cannot be written."""
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def ticks(low: float, high: float, *, log: bool = False, most: int = 10) -> list[float]:
    """About `most` round numbers in low..high at the most: 1, 2 and 5 times powers of ten."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits, every in (((1, 2, 5), 1), ((1,), 1), ((1,), math.ceil(len(powers) / most))):
            found = [digit * 10.0**power for power in powers[::every] for digit in digits]
            found = [tick for tick in found if low <= tick <= high]
            if 2 <= len(found) <= most:
                return found
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


class _Frame:
    """The box that lines are drawn in, and the pen; all lengths are pixels of the finished chart."""

    def __init__(
        self, paper: Image.Image, x: Axis, y: Axis, points: Sequence[tuple[float, float]],
        names: Sequence[str], has_title: bool,
    ) -> None:  # fmt: skip
        self.paper, self.pen, self.axes, self.names = paper, ImageDraw.Draw(paper), (x, y), names
        self.ends = [_padded(axis, [point[i] for point in points]) for i, axis in enumerate(self.axes)]
        self.ticks = [
            ticks(*(10**end if axis.log else end for end in ends), log=axis.log, most=12)
            for axis, ends in zip(self.axes, self.ends, strict=True)
        ]
        wide, high = paper.width / OVERSAMPLING, paper.height / OVERSAMPLING
        self.left = 2.5 * GAP + SMALL + max(self.width(f"{tick:g}") for tick in self.ticks[1])
        self.right = wide - 6.5 * GAP - max(self.width(name) for name in names)
        self.top, self.bottom = GAP * (4.5 if has_title else 2), high - 3 * GAP - 2 * SMALL

    def pixel(self, point: tuple[float, float]) -> Pixel:
        """Where a point lies."""
        across, up = (
            (axis.place(value) - low) / (high - low)
            for axis, value, (low, high) in zip(self.axes, point, self.ends, strict=True)
        )
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def draw_axes(self, title: str) -> None:
        """Grid, ticks with their numbers, and titles."""
        x, y = self.axes
        for tick in self.ticks[0]:
            across = self.pixel((tick, self.ticks[1][0]))[0]
            self.stroke([(across, self.top), (across, self.bottom)], RULE, 1)
            self.write((across, self.bottom + GAP / 2), f"{tick:g}", anchor="ma")
        for tick in self.ticks[1]:
            up = self.pixel((self.ticks[0][0], tick))[1]
            self.stroke([(self.left, up), (self.right, up)], RULE, 1)
            self.write((self.left - GAP / 2, up), f"{tick:g}", anchor="rm")
        corner = [(self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)]
        self.stroke(corner, PALE, 1.4)
        below = self.bottom + 1.5 * GAP + SMALL
        self.write(((self.left + self.right) / 2, below), x.title, anchor="ma", fill=INK)
        self.write_upwards((self.top + self.bottom) / 2, y.title)
        self.write((self.left, 1.5 * GAP), title, anchor="la", fill=INK, height=LARGE)

    def draw_line(self, index: int, pixels: Sequence[Pixel]) -> None:
        """A line and its marks, in the colour and shape of its place among the others."""
        colour = COLOURS[index % len(COLOURS)]
        self.stroke(pixels, colour, 2.2)
        if len(pixels) <= 60:  # more would be one thick line
            for pixel in pixels:
                self.mark(pixel, index)

    def draw_legend(self) -> None:
        """Samples of the lines with their names, right of the box."""
        left, row = self.right + 1.5 * GAP, SMALL + 8
        for index, name in enumerate(self.names):
            middle = self.top + row * (index + 0.5)
            self.stroke([(left, middle), (left + 3 * GAP, middle)], COLOURS[index % len(COLOURS)], 2.2)
            self.mark((left + 1.5 * GAP, middle), index)
            self.write((left + 3.75 * GAP, middle), name, anchor="lm", fill=INK)

    def stroke(self, pixels: Sequence[Pixel], colour: str, width: float) -> None:
        """A line through pixels."""
        scaled = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in pixels]
        self.pen.line(scaled, colour, round(width * OVERSAMPLING), joint="curve")

    def mark(self, pixel: Pixel, index: int) -> None:
        """A disc, a square or a diamond, by the round of colours that the line is in."""
        x, y = (value * OVERSAMPLING for value in pixel)
        colour, half = COLOURS[index % len(COLOURS)], 3.6 * OVERSAMPLING
        shape = index // len(COLOURS) % 3
        if shape == 0:
            self.pen.ellipse([x - half, y - half, x + half, y + half], colour, "white", OVERSAMPLING)
        elif shape == 1:
            self.pen.rectangle([x - half, y - half, x + half, y + half], colour, "white", OVERSAMPLING)
        else:
            far = half * 1.4
            self.pen.polygon([(x - far, y), (x, y - far), (x + far, y), (x, y + far)], colour, "white")

    def write(self, pixel: Pixel, text: str, *, anchor: str, fill: str = PALE, height: int = SMALL) -> None:
        """Words at a pixel, which `anchor` places as PIL does."""
        x, y = (value * OVERSAMPLING for value in pixel)
        self.pen.text((x, y), text, fill, _font(height), anchor=anchor)

    def write_upwards(self, middle: float, text: str) -> None:
        """Words along the left edge, from below upwards."""
        length, height = round(self.width(text) + GAP), 2 * SMALL
        strip = Image.new("RGB", (length * OVERSAMPLING, height * OVERSAMPLING), "white")
        place = (strip.width / 2, strip.height / 2)
        ImageDraw.Draw(strip).text(place, text, INK, _font(SMALL), anchor="mm")
        corner = round(GAP / 4 * OVERSAMPLING), round((middle - length / 2) * OVERSAMPLING)
        self.paper.paste(strip.transpose(Image.Transpose.ROTATE_90), corner)

    def width(self, text: str) -> float:
        """Of small words."""
        return self.pen.textlength(text, _font(SMALL)) / OVERSAMPLING


def _padded(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis, as places: a little beyond the values on both sides."""
    places = [axis.place(value) for value in values]
    low, high = min(places), max(places)
    more = PADDING * (high - low) or max(abs(low), 1.0) / 2
    return low - more, high + more


def _font(height: int) -> Font:
    return ImageFont.load_default(height * OVERSAMPLING)
