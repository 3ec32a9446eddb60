"""One Brownian path per picture, whose increments are the noise of a run (Li et al. 2020, section 4).

A virtual Brownian tree: the path is never stored, every value of it is a function of the seed and the time.
Halving an interval again and again, each middle is drawn from the Brownian bridge between the two ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato import errors

# Halvings in log sigma: leaves of 4e-4 over Stable Diffusion's levels; 1000 steps are 4e-3 each.
DEPTH = 14
ROUNDING = 1e-6  # a spacing may compute the ends of its range this much outside
RECENT = 4  # times whose values are kept: an SDE step asks for three
MASK = 2**64 - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment, Steele et al. 2014


@dataclass(frozen=True)
class Span:
    """A part of the path between two known values; the halves of span n are 2n and 2n + 1."""

    number: int
    start: float
    end: float
    start_value: Tensor
    end_value: Tensor


class BrownianNoise:
    """The noise of one Brownian path per image, W(target) - W(sigma) over its deviation; sigma is the time.

    seeds: one per image, in -2^63 .. 2^64 - 1; row i depends on seeds[i], `shape`, `low` and `high` only, not
    on the batch, nor on which intervals were asked for and in which order. shape: of one image, without the
    sample axis. low, high: the noise levels between which it can be asked, 0 < low <= high, which are part
    of the path's identity: give the schedule's, and runs of other step counts draw from the same path.
    device: where the values go after being drawn on the CPU. `InputError` for other levels.

    Increments add up when an interval is divided, and every one has the right variance. Their covariance is
    right down to 2^-14 of the range in log sigma; two times that are nearer to each other share a draw.
    About 16 x 8 bytes per value of the batch are kept, and a step of a descending run costs some 10 draws.
    """

    def __init__(
        self, seeds: Sequence[int], shape: Sequence[int], *, low: float, high: float, device: torch.device
    ) -> None:
        if not 0 < low <= high < math.inf:
            raise errors.InputError(
                f"Brownian noise from {low:g} to {high:g} was asked for; allowed is 0 < low <= high",
                "Give the smallest and the largest noise level above 0 of the run or its schedule.",
            )
        self._seeds = [seed & MASK for seed in seeds]
        self._shape = tuple(shape)
        self._device = device
        self._low, self._high = float(low), float(high)
        self._generator = torch.Generator("cpu")
        origin = torch.zeros(len(self._seeds), *self._shape, dtype=torch.float64)
        end = origin + math.sqrt(self._high - self._low) * self._normal(0)
        self._path = [Span(1, self._low, self._high, origin, end)]
        self._recent = {self._low: origin, self._high: end}

    def __call__(self, sigma: float, target: float) -> Tensor:
        """Standard normal values of the step from sigma to target, (b, *shape) float32.

        The way back has the opposite sign, as in k-diffusion. `InputError` for equal levels and for those
        outside low .. high.
        """
        allowed = self._low * (1 - ROUNDING), self._high * (1 + ROUNDING)
        if sigma == target or not all(allowed[0] <= time <= allowed[1] for time in (sigma, target)):
            raise errors.InputError(
                f"Brownian noise was asked for from {sigma:g} to {target:g};"
                f" allowed are two different levels in {self._low:g} .. {self._high:g}"
            )
        increment = self._value(target) - self._value(sigma)
        return (increment / math.sqrt(abs(target - sigma))).to(torch.float32).to(self._device)

    def _value(self, time: float) -> Tensor:
        """W(time), (b, *shape) float64; W(low) is 0."""
        time = min(max(time, self._low), self._high)
        if time not in self._recent:
            while len(self._recent) >= RECENT:
                self._recent.pop(next(iter(self._recent)))
            self._recent[time] = self._bridge(self._leaf(time), time)
        return self._recent[time]

    def _leaf(self, time: float) -> Span:
        """The smallest span around `time`. The spans that lead to it stay, for the next time is near it."""
        while not self._path[-1].start <= time <= self._path[-1].end:
            self._path.pop()
        while len(self._path) <= DEPTH:
            span = self._path[-1]
            middle = math.sqrt(span.start) * math.sqrt(span.end)
            value = self._bridge(span, middle)
            if time <= middle:
                half = Span(2 * span.number, span.start, middle, span.start_value, value)
            else:
                half = Span(2 * span.number + 1, middle, span.end, value, span.end_value)
            self._path.append(half)
        return self._path[-1]

    def _bridge(self, span: Span, time: float) -> Tensor:
        """The path at a time in the span, given its ends. A span has one draw: values near it are near."""
        width = span.end - span.start
        if width == 0:
            return span.start_value
        share = min(max((time - span.start) / width, 0.0), 1.0)
        deviation = math.sqrt(width * share * (1 - share))
        mean = span.start_value * (1 - share) + span.end_value * share
        return mean + deviation * self._normal(span.number) if deviation > 0 else mean

    def _normal(self, number: int) -> Tensor:
        """The draw of a span, (b, *shape) float32. Hashed: torch reads 32 bits of a seed, and other noise
        of the same picture is drawn from the seed itself."""
        rows = [
            torch.randn(self._shape, generator=self._generator.manual_seed(mixed(seed, number)))
            for seed in self._seeds
        ]
        return torch.stack(rows)


def mixed(seed: int, number: int) -> int:
    """64 bits that depend on every bit of both, by two rounds of splitmix64 (Steele et al. 2014)."""
    return _finalize((_finalize((seed + GOLDEN_GAMMA) & MASK) + (number + 1) * GOLDEN_GAMMA) & MASK)


def _finalize(bits: int) -> int:
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & MASK
    return bits ^ (bits >> 31)
