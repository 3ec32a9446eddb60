"""Restart sampling: go back up with fresh noise and come down again (Xu et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.prediction import Denoiser
from sfumato.diffusion.samplers.base import Noise, Step, noised
from sfumato.diffusion.samplers.runge_kutta import trapezoid

RESTARTS = ((10, 2, 0.1, 2.0),)  # Xu et al. 2023, appendix on Stable Diffusion: {[10, 2, 0.1, 2]}
RHO = 7.0  # Karras et al. 2022, table 1: the spacing inside a restart

Restarts = Sequence[tuple[int, int, float, float]]


@torch.no_grad()
def restart(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    restarts: Restarts | str = RESTARTS,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Heun's method with restarts (Xu et al. 2023, algorithm 1).

    restarts: (levels, count, low, high) each, the paper's [N, K, t_min, t_max], or text "10,2,0.1,2;...":
    when the level of `sigmas` nearest to `low` is reached, `count` times noise up to `high` is added and
    `levels` levels lead back, both ends among them. `high` is at most sigmas[0]; an interval without room is
    left out. The levels of `sigmas` get 2 evaluations each, every restart 2 * (levels - 1) more.

    More steps than pairs of `sigmas` are yielded, `index` counting on: after a step that ended at `low` comes
    one whose `sigma` is `high`, with no step for the way up.
    """
    for index, (low, high, target) in enumerate(_course(sigmas, parsed(restarts))):
        x = noised(x, noise, low, high, s_noise * math.sqrt(high**2 - low**2))
        denoised = denoise(x, high)
        x = trapezoid(denoise, x, denoised, high, target) if target > 0 else denoised
        yield Step(index, high, target, x, denoised)


def parsed(restarts: Restarts | str) -> Restarts:
    """Restart intervals from text, "levels,count,low,high" joined by ";", or as they are, checked.

    `InputError` for other text, fewer than 2 levels, a negative count, or not 0 < low < high.
    """
    if isinstance(restarts, str):
        return parsed([_interval(text) for text in restarts.split(";") if text.strip()])
    for row in restarts:
        if len(row) != 4 or row[0] < 2 or row[1] < 0 or not 0 < row[2] < row[3] < math.inf:
            raise _refused(row)
    return restarts


def _interval(text: str) -> tuple[int, int, float, float]:
    try:
        levels, count, low, high = text.split(",")
        return int(levels), int(count), float(low), float(high)
    except ValueError as error:
        raise _refused(text.strip()) from error


def _refused(row: object) -> errors.InputError:
    return errors.InputError(
        f"the restart interval is {row}; allowed are 2 or more levels, a count, and 0 < low < high",
        'Write "levels,count,low,high", for example "10,2,0.1,2", and ";" between intervals.',
    )


def _course(sigmas: Sequence[float], restarts: Restarts) -> Iterator[tuple[float, float, float]]:
    """(level that x is at, level to step from, level to step to) of every step, restarts included."""
    reached = [sigma for sigma in sigmas[1:] if sigma > 0]
    ways = [
        (min(reached, key=lambda level: abs(level - low)), min(high, sigmas[0]), levels, count)
        for levels, count, low, high in restarts
        if reached and low < sigmas[0]
    ]
    for sigma, target in pairwise(sigmas):
        yield sigma, sigma, target
        for bottom, top, levels, count in ways:
            if bottom == target and bottom < top:
                down = _descent(top, bottom, levels)
                for _ in range(count):
                    yield bottom, top, down[1]
                    yield from ((upper, upper, lower) for upper, lower in pairwise(down[1:]))


def _descent(high: float, low: float, levels: int) -> list[float]:
    """Levels from high to low, both given exactly, even in sigma^(1/rho) (Karras et al. 2022, eq. 5)."""
    start, end = high ** (1 / RHO), low ** (1 / RHO)
    inner = [(start + i / (levels - 1) * (end - start)) ** RHO for i in range(1, levels - 1)]
    return [high, *inner, low]
