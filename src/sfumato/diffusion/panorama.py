"""Samples larger than a network was trained for, denoised in overlapping windows (Bar-Tal et al. 2023).

The mean of the windows' x0 is MultiDiffusion with uniform weights, and Mixture of Diffusers (Jimenez 2023)
with Gaussian ones: at one x and sigma, means of x0, of eps and of v are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.prediction import GuidedDenoiser
from sfumato.errors import InputError, nearest

Weighting = Literal["uniform", "gaussian"]
WEIGHTINGS = ("uniform", "gaussian")
GAUSSIAN_VARIANCE = 0.01  # of a window's side squared; Mixture of Diffusers' code


@dataclass(frozen=True)
class Window:
    """A rectangle in a sample, in latents; it may go around the sample's edges where that is a circle."""

    top: int
    left: int
    height: int
    width: int

    def places(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The rows, (height, 1), and columns, (width,), of the window in a sample of that size."""
        rows = (torch.arange(self.height) + self.top) % height
        return rows[:, None], (torch.arange(self.width) + self.left) % width


@dataclass(frozen=True)
class Area:
    """One window: what denoises it, and how much it counts at every place, (height, width) from 0 up."""

    window: Window
    denoise: GuidedDenoiser
    weight: Tensor


@dataclass(frozen=True)
class Region:
    """A part of a sample with conditions of its own.

    denoise_at(window): the denoiser bound to them, for a window; most ignore where it is (see `cropped` for
    those with pictures among their conditions). mask: (height, width) of the sample, from 0 up: how much the
    region counts at each place.
    """

    denoise_at: Callable[[Window], GuidedDenoiser]
    mask: Tensor


def windows(
    height: int,
    width: int,
    window: tuple[int, int],
    overlap: int,
    *,
    wrap: tuple[bool, bool] = (False, False),
) -> list[Window]:
    """Windows of equal size that cover a sample of that size, evenly spread, row by row.

    window: (height, width) in latents, no more than the sample's is taken of it. overlap: latents that
    neighbours share at least. wrap: whether (y, x) are circles, on which windows go around the edge.
    Raises InputError for an overlap that is not smaller than the window.
    """
    sides = (min(window[0], height), min(window[1], width))
    if min(window) < 1 or not 0 <= overlap < min(window):
        raise InputError(
            f"windows of {window[1]}x{window[0]} latents cannot overlap by {overlap}",
            f"Give an overlap of 0 to {max(min(window) - 1, 0)}.",
        )
    tops = _starts(height, sides[0], overlap, wrap[0])
    lefts = _starts(width, sides[1], overlap, wrap[1])
    return [Window(top, left, *sides) for top in tops for left in lefts]


def window_weight(window: Window, weighting: Weighting = "uniform") -> Tensor:
    """How much each place of a window counts, (height, width): all alike, or the middle most."""
    if weighting not in WEIGHTINGS:
        raise InputError(f"there is no weighting {weighting!r}", nearest(weighting, WEIGHTINGS))
    if weighting == "uniform":
        return torch.ones(window.height, window.width)
    return torch.outer(_bell(window.height), _bell(window.width))


def panorama(
    regions: Sequence[Region],
    size: tuple[int, int],
    window: tuple[int, int],
    overlap: int,
    *,
    weighting: Weighting = "uniform",
    wrap: tuple[bool, bool] = (False, False),
) -> Mixture:
    """A denoiser of samples (b, c, height, width) of `size` = (height, width), window by window.

    regions: each is denoised in the windows where its mask is not 0 alone; for the same conditions everywhere
    give one with `everywhere(size)` as its mask. Every step costs an evaluation for each of `areas`. window,
    overlap, wrap: see `windows`. Raises InputError where no region covers a place.
    """
    areas = []
    for region in regions:
        if tuple(region.mask.shape) != size:
            given = tuple(region.mask.shape)
            raise InputError(f"a region's mask has shape {given}; the sample has {size}", "Resize it.")
        if not bool((region.mask >= 0).all()):
            raise InputError("a region's mask has values below 0, or that are no numbers", "Give 0 and more.")
        for one in windows(*size, window, overlap, wrap=wrap):
            weight = region.mask[one.places(*size)] * window_weight(one, weighting)
            if bool((weight > 0).any()):
                areas.append(Area(one, region.denoise_at(one), weight))
    return mixture(areas, size)


def everywhere(size: tuple[int, int]) -> Tensor:
    """The mask of a region that is the whole sample."""
    return torch.ones(size)


def box(size: tuple[int, int], top: int, left: int, height: int, width: int, feather: int = 0) -> Tensor:
    """The mask of a rectangle in latents: 1 inside, falling to 0 over `feather` latents around it."""
    rows, columns = torch.arange(size[0]), torch.arange(size[1])
    beyond_y = torch.maximum(top - rows, rows - (top + height - 1)).clamp_min(0)
    beyond_x = torch.maximum(left - columns, columns - (left + width - 1)).clamp_min(0)
    beyond = torch.maximum(beyond_y[:, None], beyond_x)
    return (1 - beyond / (feather + 1)).clamp_min(0)


def mixture(areas: Sequence[Area], size: tuple[int, int]) -> Mixture:
    """A denoiser of samples of `size` from denoisers of areas; InputError where none counts at a place."""
    total = torch.zeros(size)
    for area in areas:
        total[area.window.places(*size)] += area.weight
    if not bool((total > 0).all()):
        row, column = (int(place) for place in (total <= 0).nonzero()[0])
        raise InputError(
            f"nothing is asked for at row {row}, column {column} of {size[0]}x{size[1]} latents",
            "Give a region for the rest, with the mask of the whole sample.",
        )
    shares = [replace(area, weight=area.weight / total[area.window.places(*size)]) for area in areas]
    return Mixture(tuple(shares), size)


@dataclass(frozen=True)
class Mixture:
    """The denoisers of areas as one, a `GuidedDenoiser`; their weights sum to 1 at every place of `size`."""

    areas: tuple[Area, ...]
    size: tuple[int, int]

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor:
        """The x0 of the whole sample, like x."""
        return self._put(x, ((area, area.denoise(self._seen(x, area), sigma)) for area in self.areas))

    def parts(self, x: Tensor, sigma: float, /) -> tuple[Tensor, Tensor]:
        """(guided, unguided) x0."""
        both = [(area, *area.denoise.parts(self._seen(x, area), sigma)) for area in self.areas]
        guided = self._put(x, ((area, one) for area, one, _ in both))
        return guided, self._put(x, ((area, other) for area, _, other in both))

    def rows(self, start: int, stop: int, /) -> Mixture:
        """The same for the images start..stop of the batch alone."""
        return replace(
            self, areas=tuple(replace(each, denoise=each.denoise.rows(start, stop)) for each in self.areas)
        )

    def _seen(self, x: Tensor, area: Area) -> Tensor:
        if tuple(x.shape[2:]) != self.size:
            raise InputError(f"the sample has size {tuple(x.shape[2:])}; this denoiser takes {self.size}.")
        rows, columns = area.window.places(*self.size)
        return x[:, :, rows, columns]

    def _put(self, x: Tensor, denoised: Iterable[tuple[Area, Tensor]]) -> Tensor:
        result = torch.zeros_like(x)
        for area, values in denoised:
            rows, columns = area.window.places(*self.size)
            result[:, :, rows, columns] += area.weight.to(values) * values
        return result


def cropped(cond: Conditioning, window: Window, size: tuple[int, int]) -> Conditioning:
    """The conditions of a window: what lies at the sample's places (`concat`, `hints`) is cut out.

    Pictures `k` times as large as the sample, as control networks take, are cut at `k` times its places;
    tokens, (b, n, width), stay as they are. Raises InputError for maps of other sizes.
    """

    def cut(values: Tensor) -> Tensor:
        if values.ndim != 4:
            return values
        scale = values.shape[-1] // size[1]
        if scale < 1 or tuple(values.shape[2:]) != (scale * size[0], scale * size[1]):
            raise InputError(
                f"a map of {values.shape[-1]}x{values.shape[-2]} cannot be cut for windows of a sample of "
                f"{size[1]}x{size[0]}",
                "Leave T2I-Adapters out of large pictures: their features are those of the whole.",
            )
        large = Window(*(scale * side for side in (window.top, window.left, window.height, window.width)))
        rows, columns = large.places(scale * size[0], scale * size[1])
        return values[:, :, rows, columns]

    concat = None if cond.concat is None else cut(cond.concat)
    hints = None if cond.hints is None else tuple(map(cut, cond.hints))
    return replace(cond, concat=concat, hints=hints)


def _starts(length: int, side: int, overlap: int, wrap: bool) -> list[int]:
    """Where windows of a side begin on an axis."""
    if side >= length:
        return [0]
    overlap = min(overlap, side - 1)
    if wrap:
        count = -(-length // (side - overlap))
        return [index * length // count for index in range(count)]
    steps = -(-(length - side) // (side - overlap))
    return [round(index * (length - side) / steps) for index in range(steps + 1)]


def _bell(length: int) -> Tensor:
    """exp(-(x - middle)^2 / (2 * variance)) along a side of length 1."""
    places = (torch.arange(length, dtype=torch.float32) + 0.5) / length - 0.5
    return torch.exp(-places.square() / (2 * GAUSSIAN_VARIANCE))
