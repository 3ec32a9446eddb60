"""Sizes of one area and many shapes, so that pictures are cut little (Podell et al. 2023, section 2.3)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.errors import InputError
from sfumato.training.data.dataset import Size


@dataclass(frozen=True)
class Buckets:
    """The sizes pictures may be shown in.

    Sides are multiples of `step` pixels from `least` to `most`; height times width is at most `area`.
    enlarge: whether pictures smaller than their bucket are; if not, they go to the largest size they fill.
    rarest: a size of fewer pictures is given up, and they go to the next nearest.
    """

    least: int
    most: int
    step: int
    area: int
    enlarge: bool = True
    rarest: int = 1

    def __post_init__(self) -> None:
        if self.least % self.step or self.most % self.step or self.least > self.most:
            raise InputError(
                f"data.buckets has sides from {self.least} to {self.most} in steps of {self.step}",
                "min and max are multiples of step, min the smaller one.",
            )
        if self.area < self.least**2:
            raise InputError(
                f"data.buckets.area is {self.area}, less than the smallest square's {self.least**2}",
                "Make the area larger or min smaller.",
            )


def sizes(buckets: Buckets) -> list[Size]:
    """Every (height, width), of each height the widest within the area, and the same turned; sorted."""
    found: set[Size] = set()
    for side in range(buckets.least, buckets.most + 1, buckets.step):
        other = min(buckets.most, buckets.area // side // buckets.step * buckets.step)
        if other >= buckets.least:
            found |= {(side, other), (other, side)}
    square = math.isqrt(buckets.area) // buckets.step * buckets.step
    if buckets.least <= square <= buckets.most:
        found.add((square, square))
    return sorted(found)


def nearest_size(original: Size, choices: Sequence[Size]) -> Size:
    """The choice of the most similar aspect ratio; of equals the larger, then the first."""
    wanted = math.log(original[0] / original[1])
    return min(choices, key=lambda size: (abs(math.log(size[0] / size[1]) - wanted), -size[0] * size[1]))


def assigned(originals: Sequence[Size | None], buckets: Buckets) -> list[Size | None]:
    """The size that each picture is shown in; None for one too small for any, where none is enlarged.

    originals: (height, width) each; None, of an unknown size, counts as a square one.
    """
    every = sizes(buckets)
    by_size: dict[Size, Size | None] = {}

    def chosen(original: Size) -> Size | None:
        if original not in by_size:
            by_size[original] = _chosen(original, every, buckets)
        return by_size[original]

    side = math.isqrt(buckets.area)
    filled = [(side, side) if original is None else original for original in originals]
    found = [chosen(original) for original in filled]
    return _without_rare(filled, found, buckets)


def _chosen(original: Size, every: Sequence[Size], buckets: Buckets) -> Size | None:
    near = nearest_size(original, every)
    if buckets.enlarge or _covers(original, near):
        return near
    # A size that the picture fills, in steps of its own: as much of it as there is.
    height, width = (min(side, buckets.most) // buckets.step * buckets.step for side in original)
    return (height, width) if min(height, width) >= buckets.least else None


def _covers(original: Size, size: Size) -> bool:
    return original[0] >= size[0] and original[1] >= size[1]


def _without_rare(originals: Sequence[Size], found: list[Size | None], buckets: Buckets) -> list[Size | None]:
    """The same without sizes of fewer than `rarest` pictures, the rarest given up first."""
    while True:
        counts = Counter(size for size in found if size is not None)
        rare = min(counts, key=lambda size: (counts[size], size), default=None)
        if rare is None or counts[rare] >= buckets.rarest or len(counts) == 1:
            return found
        others = sorted(counts.keys() - {rare})
        for index, size in enumerate(found):
            if size == rare:
                covered = [other for other in others if _covers(originals[index], other)]
                if buckets.enlarge or covered:
                    found[index] = nearest_size(originals[index], others if buckets.enlarge else covered)
                else:
                    found[index] = None
