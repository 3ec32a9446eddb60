"""Sheets of pictures with labelled axes, painted with PIL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from sfumato.errors import InputError

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, PALE, HAIRLINE, PAPER = "#1f1f1f", "#6b6b6b", "#d9d9d9", "#ffffff"
MARGIN, GAP, PANEL_GAP = 24, 8, 28  # pixels: around all, between pictures, between panels
TITLE, LABEL, AXIS = 20, 16, 13  # heights of letters
SMALLEST = 128  # pixels: smaller pictures are shown at a whole multiple, so that labels fit
MAX_LINES = 3  # of a label
MAX_SIDE, MAX_PIXELS = 60_000, 300_000_000
WIDEST_TITLE = 480  # pixels that a title may ask for
ROW_WIDTH = 180  # pixels at most for the labels at the left


@dataclass(frozen=True)
class Labels:
    """One axis on a sheet: its title and a label for each of its places; no labels, no axis."""

    title: str = ""
    labels: tuple[str, ...] = ("",)


def labelled(
    images: Sequence[Image.Image],
    columns: Labels,
    rows: Labels,
    panels: Labels | None = None,
    title: str = "",
) -> Image.Image:
    """One RGB picture of pictures of equal size: panels below each other, in each rows and columns, labelled.

    images: panel by panel, row by row. Small ones are shown at a whole multiple of their size.
    """
    return _Layout(images[0].size, columns, rows, panels or Labels(), title).paint(images)


def check_size(
    size: tuple[int, int], columns: Labels, rows: Labels, panels: Labels | None = None, title: str = ""
) -> tuple[int, int]:
    """Width and height of a sheet of pictures of that size; `InputError` where it would be too large."""
    layout = _Layout(size, columns, rows, panels or Labels(), title)
    width, height = layout.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise InputError(
            f"the sheet would have {width}x{height} pixels", "Give fewer values, or smaller pictures."
        )
    return width, height


class _Layout:
    """Where everything lies."""

    def __init__(
        self, size: tuple[int, int], columns: Labels, rows: Labels, panels: Labels, title: str
    ) -> None:
        self.columns, self.rows, self.panels = columns, rows, panels
        self.scale = max(1, -(-SMALLEST // max(size)))
        self.cell = (size[0] * self.scale, size[1] * self.scale)
        self.heads = [wrapped(label, LABEL, self.cell[0]) for label in columns.labels]
        self.sides = [wrapped(label, LABEL, ROW_WIDTH) for label in rows.labels]
        widest = max((_length(line, LABEL) for lines in self.sides for line in lines), default=0)
        widest = max(widest, min(_length(rows.title, AXIS), ROW_WIDTH))
        self.left = MARGIN + (widest + 2 * GAP if widest else 0)
        across = len(columns.labels) * (self.cell[0] + GAP) - GAP
        self.width = max(self.left + across, MARGIN + min(_length(title, TITLE), WIDEST_TITLE)) + MARGIN
        self.title = wrapped(title, TITLE, self.width - 2 * MARGIN)
        self.top = MARGIN + len(self.title) * _height(TITLE) + (GAP * 2 if self.title else 0)
        lines = max(map(len, self.heads))
        self.head = (_height(AXIS) if columns.title or rows.title else 0) + lines * _height(LABEL)
        self.head += GAP if self.head else 0
        self.name = _height(LABEL) + GAP if panels.title else 0
        body = len(rows.labels) * (self.cell[1] + GAP) - GAP
        self.panel = self.name + self.head + body
        count = len(panels.labels)
        self.size = (self.width, self.top + count * self.panel + (count - 1) * PANEL_GAP + MARGIN)

    def paint(self, images: Sequence[Image.Image]) -> Image.Image:
        sheet = Image.new("RGB", self.size, PAPER)
        draw = ImageDraw.Draw(sheet)
        for i, line in enumerate(self.title):
            draw.text((MARGIN, MARGIN + i * _height(TITLE)), line, INK, _font(TITLE))
        each = len(self.rows.labels) * len(self.columns.labels)
        for number, label in enumerate(self.panels.labels):
            top = self.top + number * (self.panel + PANEL_GAP)
            if self.panels.title:
                draw.text((MARGIN, top + LABEL), self.panels.title, PALE, _font(AXIS), anchor="ls")
                beside = MARGIN + _length(self.panels.title, AXIS) + GAP
                draw.text((beside, top + LABEL), label, INK, _font(LABEL), anchor="ls")
            self._panel(sheet, draw, top + self.name, images[number * each : (number + 1) * each])
        return sheet

    def _panel(
        self, sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int, images: Sequence[Image.Image]
    ) -> None:
        below = top + self.head
        if self.columns.title:
            draw.text((self.left, top), self.columns.title, PALE, _font(AXIS))
        if self.rows.title:
            title = wrapped(self.rows.title, AXIS, ROW_WIDTH)[0]
            draw.text((self.left - GAP * 2, below - GAP), title, PALE, _font(AXIS), anchor="rd")
        for column, lines in enumerate(self.heads):
            centre = self.left + column * (self.cell[0] + GAP) + self.cell[0] // 2
            for i, line in enumerate(reversed(lines)):
                place = (centre, below - GAP - i * _height(LABEL))
                draw.text(place, line, INK, _font(LABEL), anchor="md")
        for row, lines in enumerate(self.sides):
            middle = below + row * (self.cell[1] + GAP) + self.cell[1] // 2
            for i, line in enumerate(lines):
                place = (self.left - GAP * 2, middle + int((i - (len(lines) - 1) / 2) * _height(LABEL)))
                draw.text(place, line, INK, _font(LABEL), anchor="rm")
        for index, image in enumerate(images):
            row, column = divmod(index, len(self.columns.labels))
            place = (self.left + column * (self.cell[0] + GAP), below + row * (self.cell[1] + GAP))
            _framed(sheet, draw, image, place, self.cell)


def captioned(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """One RGB picture, as square as it gets, of pictures of equal size, each under its own text."""
    scale = max(1, -(-SMALLEST // max(images[0].size)))
    width, height = (side * scale for side in images[0].size)
    lines = [wrapped(caption, LABEL, width) for caption in captions]
    room = max(map(len, lines)) * _height(LABEL)
    columns = math.ceil(math.sqrt(len(images)))
    step = (width + GAP * 2, room + height + GAP * 2)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (2 * MARGIN + columns * step[0], 2 * MARGIN + rows * step[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left, top = MARGIN + GAP + index % columns * step[0], MARGIN + index // columns * step[1]
        for i, line in enumerate(lines[index]):
            low = top + room - (len(lines[index]) - 1 - i) * _height(LABEL)
            draw.text((left + width // 2, low), line, INK, _font(LABEL), anchor="md")
        _framed(sheet, draw, image, (left, top + room + GAP // 2), (width, height))
    return sheet


def _framed(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    image: Image.Image,
    place: tuple[int, int],
    size: tuple[int, int],
) -> None:
    """Put a picture on the sheet, in a hairline that a white one is seen by."""
    left, top = place
    draw.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=HAIRLINE)
    sheet.paste(image.convert("RGB").resize(size, Image.Resampling.NEAREST), place)


@cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _length(text: str, size: int) -> int:
    return int(_font(size).getlength(text)) + 1 if text else 0


def _height(size: int) -> int:
    return round(size * 1.35)


def wrapped(text: str, size: int, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, three of them; what does not fit ends in dots."""
    lines: list[str] = []
    line = ""
    for word in text.split()[:200]:
        joined = f"{line} {word}".strip()
        if line and _length(joined, size) > width:
            lines.append(line)
            line = word
        else:
            line = joined
    lines += [line] if line else []
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"{lines[MAX_LINES - 1]} ..."]
    return [_cut(line, size, width) for line in lines]


def _cut(line: str, size: int, width: int) -> str:
    """The line, or as much of its start as there is room for."""
    if _length(line, size) <= width:
        return line
    short = line.removesuffix(" ...")[:400]
    while short and _length(f"{short}...", size) > width:
        short = short[:-1]
    return f"{short.rstrip()}..."
