"""Feature maps as rows that are computed when asked for, so that a large picture is never held whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BAND = 2**20  # values of a feature map computed at once: 4 MB in float32
MIN_ROWS = 4  # as many as a band reads into its neighbours, at least


@dataclass(frozen=True)
class Rows:
    """A feature map (b, channels, height, width): `get(top, bottom)` gives rows, (b, c, bottom - top, w).

    `stored` is the whole map where it lies in memory. `widest`: values that are held for each column and row
    while it is computed, the channels of the widest map on the way.
    """

    channels: int
    height: int
    width: int
    compute: Callable[[int, int], Tensor]
    stored: Tensor | None = None
    widest: int = 1

    def get(self, top: int, bottom: int) -> Tensor:
        """The rows top..bottom, not to be written to."""
        if self.stored is not None:
            return self.stored[:, :, top:bottom]
        return self.compute(top, bottom)

    def bands(self) -> list[tuple[int, int]]:
        """(top, bottom) of bands that are small enough to be computed at once."""
        rows = max(MIN_ROWS, BAND // (max(self.channels, self.widest) * self.width))
        return [(top, min(top + rows, self.height)) for top in range(0, self.height, rows)]


def stored(values: Tensor) -> Rows:
    """A map that lies in memory."""
    _, channels, height, width = values.shape
    return Rows(channels, height, width, lambda top, bottom: values[:, :, top:bottom], values)


def store(rows: Rows, into: Tensor | None = None) -> Rows:
    """The map computed, into new memory, or into that of the map which it is computed from.

    In place, a band is written when the next one has been computed: a band reads no further than into its
    neighbours.
    """
    waiting: tuple[int, int, Tensor] | None = None
    for top, bottom in rows.bands():
        band = rows.get(top, bottom)
        if into is None:
            into = band.new_empty(band.shape[0], rows.channels, rows.height, rows.width)
        if waiting is not None:
            into[:, :, waiting[0] : waiting[1]] = waiting[2]
        waiting = (top, bottom, band)
    assert into is not None and waiting is not None
    into[:, :, waiting[0] : waiting[1]] = waiting[2]
    return stored(into)


def convolved(rows: Rows, conv: nn.Conv2d, wrap: tuple[bool, bool] = (False, False)) -> Rows:
    """A convolution of odd width that keeps the sides; wrap: whether (y, x) are circles."""
    reach = conv.kernel_size[0] // 2

    def compute(top: int, bottom: int) -> Tensor:
        seen = padded(rows, top - reach, bottom + reach, (reach, reach), wrap)
        return F.conv2d(seen, conv.weight, conv.bias)

    return Rows(conv.out_channels, rows.height, rows.width, compute, widest=_widest(rows))


def strided(rows: Rows, conv: nn.Conv2d, wrap: tuple[bool, bool] = (False, False)) -> Rows:
    """A 3x3 convolution of stride 2 that is padded at right and bottom alone, as the encoders' are."""

    def compute(top: int, bottom: int) -> Tensor:
        return F.conv2d(padded(rows, 2 * top, 2 * bottom + 1, (0, 1), wrap), conv.weight, conv.bias, stride=2)

    widest = 4 * _widest(rows)
    return Rows(conv.out_channels, rows.height // 2, rows.width // 2, compute, widest=widest)


def pooled(rows: Rows) -> Rows:
    """The mean of 2x2 pixels."""
    return Rows(
        rows.channels,
        rows.height // 2,
        rows.width // 2,
        lambda top, bottom: F.avg_pool2d(rows.get(2 * top, 2 * bottom), 2),
        widest=4 * _widest(rows),
    )


def doubled(rows: Rows) -> Rows:
    """Every pixel twice in each direction."""

    def compute(top: int, bottom: int) -> Tensor:
        start = top // 2
        twice = F.interpolate(rows.get(start, (bottom + 1) // 2), scale_factor=2.0, mode="nearest")
        return twice[:, :, top - 2 * start : bottom - 2 * start]

    return Rows(rows.channels, 2 * rows.height, 2 * rows.width, compute, widest=_widest(rows))


def normed(rows: Rows, norm: nn.GroupNorm) -> Rows:
    """Group normalisation by the statistics of the whole map, then SiLU; one pass over the map for them."""
    mean, variance = statistics(rows, norm.num_groups)
    deviation = torch.rsqrt(variance + norm.eps)  # (b, groups)
    in_group = rows.channels // norm.num_groups
    scale = deviation.repeat_interleave(in_group, dim=1) * norm.weight.to(deviation.dtype)
    shift = norm.bias.to(deviation.dtype) - mean.repeat_interleave(in_group, dim=1) * scale
    scale, shift = scale[:, :, None, None], shift[:, :, None, None]

    def compute(top: int, bottom: int) -> Tensor:
        values = rows.get(top, bottom)
        changed = torch.addcmul(shift, values.to(scale.dtype), scale)
        return F.silu(changed, inplace=True).to(values.dtype)

    return Rows(rows.channels, rows.height, rows.width, compute, widest=_widest(rows))


def statistics(rows: Rows, groups: int) -> tuple[Tensor, Tensor]:
    """(mean, variance) of every group of channels, (b, groups) in float32 at least, of bands put together.

    Chan et al. 1979: squares are summed around each band's own mean, which loses no digits.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for top, bottom in rows.bands():
        values = rows.get(top, bottom)
        grouped = values.reshape(values.shape[0], groups, -1)
        wide = torch.promote_types(values.dtype, torch.float32)
        variance, own = torch.var_mean(grouped.to(wide), dim=-1, correction=0)
        number = grouped.shape[-1]
        if count == 0:
            count, mean, squares = number, own, variance * number
            continue
        difference, total = own - mean, count + number
        mean = mean + difference * (number / total)
        squares = squares + variance * number + difference.square() * (count * number / total)
        count = total
    return mean, squares / count


def added(first: Rows, second: Rows) -> Rows:
    """The sum of two maps."""
    return Rows(
        first.channels,
        first.height,
        first.width,
        lambda top, bottom: first.get(top, bottom) + second.get(top, bottom),
        widest=max(_widest(first), _widest(second)),
    )


def padded(rows: Rows, top: int, bottom: int, sides: tuple[int, int], wrap: tuple[bool, bool]) -> Tensor:
    """Rows top..bottom, which may lie beyond the map, with `sides` columns more at left and right.

    What lies beyond is zero, or the other end of the map where it wraps.
    """
    inside = rows.get(max(top, 0), min(bottom, rows.height))
    above, below = max(-top, 0), max(bottom - rows.height, 0)
    if wrap[0] and (above or below):
        parts = [inside]
        if above:
            parts.insert(0, rows.get(rows.height - above, rows.height))
        if below:
            parts.append(rows.get(0, below))
        inside, above, below = torch.cat(parts, dim=2), 0, 0
    if wrap[1] and max(sides):
        inside = F.pad(inside, (*sides, 0, 0), mode="circular")
        sides = (0, 0)
    return F.pad(inside, (*sides, above, below))


def _widest(rows: Rows) -> int:
    return max(rows.channels, rows.widest)
