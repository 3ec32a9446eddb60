"""A function of pictures applied to overlapping tiles, whose seams are faded into each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.errors import InputError


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut: sides and overlap in pixels of the picture, all multiples of `multiple`.

    side: of what each tile contributes. overlap: what a tile sees beyond that, on every side that has a
    neighbour; in the inner half of it two neighbours fade into each other, the outer half is only context.
    multiple: what the function's sides must be multiples of. Raises InputError for other numbers.
    """

    side: int
    overlap: int
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.multiple < 1 or self.side < 1 or self.side % self.multiple:
            raise InputError(f"a tile's side is {self.side}; it must be a multiple of {self.multiple}.")
        if self.overlap < 0 or self.overlap % self.multiple:
            raise InputError(f"the overlap is {self.overlap}; it must be 0 or a multiple of {self.multiple}.")
        if self.overlap > self.side:
            raise InputError(f"the overlap is {self.overlap}, more than a tile's side of {self.side}.")

    def count(self, height: int, width: int) -> int:
        """How many tiles a picture of this size is cut into."""
        return len(self.spans(height)) * len(self.spans(width))

    def spans(self, length: int) -> list[tuple[int, int]]:
        """(start, stop) of each tile's own share of an axis; a rest shorter than half joins the last one."""
        number = max(1, (length + self.side // 2) // self.side)
        edges = [index * self.side for index in range(number)] + [length]
        return list(pairwise(edges))


def tile_rows(
    function: Callable[[Tensor], Tensor], picture: Tensor, tiling: Tiling, *, up: int = 1, down: int = 1
) -> Iterator[Tensor]:
    """The rows of `function(picture)`, some at a time from the top: (b, c', rows, width * up // down).

    picture: (b, c, h, w), with sides that are multiples of `tiling.multiple`; a multiple of `down` it must be
    too. function: (b, c, h, w) -> (b, c', h * up // down, w * up // down), for any tile. Where it sees no
    further than half the overlap, the whole is what it gives for the whole picture; border effects included.
    Memory: a row of tiles.
    """
    height, width = picture.shape[-2:]
    rows, columns = tiling.spans(height), tiling.spans(width)
    left_over: Tensor | None = None
    for top, bottom in rows:
        band, margins = None, _window(top, bottom, height, tiling)
        for left, right in columns:
            sides = _window(left, right, width, tiling)
            seen = picture[..., margins.start : margins.stop, sides.start : sides.stop]
            made = function(seen)
            made = _cut(_cut(made, margins, -2, up, down), sides, -1, up, down)
            if band is None:
                band = made.new_zeros(*made.shape[:-1], width * up // down)
            begin = sides.first * up // down
            faded = made * _ramp(sides, made, up, down)
            band[..., begin : begin + made.shape[-1]] += faded
        assert band is not None
        weights = _ramp(margins, band.transpose(-1, -2), up, down)
        band = band * weights[:, None]
        if left_over is not None:
            band[..., : left_over.shape[-2], :] += left_over
        # What the next row of tiles fades into is kept until it has been added.
        kept = 2 * margins.fade_after * up // down
        done = band.shape[-2] - kept
        yield band[..., :done, :]
        left_over = band[..., done:, :].clone() if kept else None


def in_tiles(
    function: Callable[[Tensor], Tensor], picture: Tensor, tiling: Tiling, *, up: int = 1, down: int = 1
) -> Tensor:
    """`function(picture)` made of tiles, (b, c', h * up // down, w * up // down); see `tile_rows`."""
    return torch.cat(list(tile_rows(function, picture, tiling, up=up, down=down)), dim=-2)


@dataclass(frozen=True)
class _Window:
    """One tile on one axis: what it sees, start..stop, and what it gives, first..last, fading at its ends."""

    start: int
    stop: int
    first: int
    last: int
    fade_before: int
    fade_after: int


def _window(begin: int, end: int, length: int, tiling: Tiling) -> _Window:
    fade = tiling.overlap // 2 // tiling.multiple * tiling.multiple
    before, after = (fade if begin else 0), (fade if end < length else 0)
    start = max(0, begin - tiling.overlap)
    stop = min(length, end + tiling.overlap)
    return _Window(start, stop, begin - before, end + after, before, after)


def _cut(made: Tensor, window: _Window, axis: int, up: int, down: int) -> Tensor:
    first = (window.first - window.start) * up // down
    return made.narrow(axis, first, (window.last - window.first) * up // down)


def _ramp(window: _Window, like: Tensor, up: int, down: int) -> Tensor:
    """Weights along the last axis: 1, but rising over the 2 * fade pixels around a seam; both sum to 1."""
    weights = torch.ones(like.shape[-1], device=like.device, dtype=like.dtype)
    for fade, at_end in ((window.fade_before, False), (window.fade_after, True)):
        length = 2 * fade * up // down
        if length:
            rising = (torch.arange(length, device=like.device, dtype=torch.float32) + 0.5) / length
            place = slice(-length, None) if at_end else slice(0, length)
            weights[place] = (rising.flip(0) if at_end else rising).to(like.dtype)
    return weights
