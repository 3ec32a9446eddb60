"""Which noise levels a sampler visits, and from how much noise (Karras et al. 2022; Lin et al. 2024).

Uniform and karras are k-diffusion's: the start noise has the amplitude sigma_0. Leading and trailing are
those of DDIM and DDPM, whose start is N(0, 1) in the network's coordinates: sqrt(1 + sigma_0^2) here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sfumato import errors
from sfumato.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Spacing:
    """The noise levels of one run.

    sigmas: steps + 1 strictly descending floats, the last one the tail, 0 or positive. start_scale: the
    standard deviation of the noise that sampling starts from. A run that ends at a positive tail has to
    divide its last x by sqrt(1 + tail^2) to be back in the coordinates of the data.
    """

    sigmas: list[float]
    start_scale: float


def uniform(schedule: Schedule, steps: int) -> Spacing:
    """Timesteps evenly from the last to the first, both visited, and then 0 (k-diffusion's `get_sigmas`)."""
    _check(steps, None)
    last = schedule.num_timesteps - 1
    timesteps = [last * (1 - i / max(steps - 1, 1)) for i in range(steps)]
    sigmas = [schedule.sigma(t) for t in timesteps]
    return Spacing([*sigmas, 0.0], sigmas[0])


def leading(schedule: Schedule, steps: int) -> Spacing:
    """Timesteps 1, 1 + r, 1 + 2r ... with r = num_timesteps // steps, and then timestep 0 (LDM's DDIM).

    Where steps = num_timesteps leaves no room for the offset of 1, every timestep is visited, and then 0.
    Where steps does not divide num_timesteps, sampling starts well below the last timestep: `trailing` does
    not.
    """
    _check(steps, schedule.num_timesteps)
    stride = schedule.num_timesteps // steps
    if steps == schedule.num_timesteps:
        return trailing(schedule, steps)
    sigmas = [schedule.sigma(1 + i * stride) for i in reversed(range(steps))]
    return Spacing([*sigmas, schedule.sigma_min], math.sqrt(1 + sigmas[0] ** 2))


def trailing(schedule: Schedule, steps: int) -> Spacing:
    """Timesteps evenly from the last downwards, then 0 (Lin et al. 2024, table 2); DDPM's chain if all."""
    _check(steps, schedule.num_timesteps)
    timesteps = [round(schedule.num_timesteps * i / steps) - 1 for i in range(steps, 0, -1)]
    sigmas = [schedule.sigma(t) for t in timesteps]
    return Spacing([*sigmas, 0.0], math.sqrt(1 + sigmas[0] ** 2))


def karras(schedule: Schedule, steps: int, rho: float = 7.0) -> Spacing:
    """Even in sigma^(1/rho) over the schedule's range, then 0 (Karras et al. 2022, eq. 5; rho: table 1)."""
    _check(steps, None)
    high, low = schedule.sigma_max ** (1 / rho), schedule.sigma_min ** (1 / rho)
    sigmas = [(high + i / max(steps - 1, 1) * (low - high)) ** rho for i in range(steps)]
    return Spacing([*sigmas, 0.0], sigmas[0])


SPACINGS: dict[str, Callable[[Schedule, int], Spacing]] = {
    "uniform": uniform,
    "leading": leading,
    "trailing": trailing,
    "karras": karras,
}


def spacing(name: str) -> Callable[[Schedule, int], Spacing]:
    """The row of `SPACINGS` with that name; `InputError` with the nearest name where there is none."""
    if name not in SPACINGS:
        raise errors.InputError(f"there is no spacing {name!r}", errors.nearest(name, SPACINGS))
    return SPACINGS[name]


def _check(steps: int, most: int | None) -> None:
    if steps < 1 or (most is not None and steps > most):
        allowed = "at least 1" if most is None else f"1 to {most} with this spacing and schedule"
        raise errors.InputError(f"steps is {steps}; allowed is {allowed}")
