"""Spacings that choose noise levels: by a formula (Karras et al. 2022) or from a published table."""

from __future__ import annotations

import math

from sfumato import errors
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.spacing.base import Spacing, check, noise_range, shares, timestep_range, to_zero
from sfumato.diffusion.spacing.tables import ALIGN_YOUR_STEPS, GITS
from sfumato.diffusion.special import beta_quantile


def karras(
    schedule: Schedule,
    steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Spacing:
    """Even in sigma^(1/rho) over the schedule's range, then 0 (Karras et al. 2022, eq. 5; rho: table 1)."""
    low, high = (sigma ** (1 / rho) for sigma in noise_range(schedule, sigma_min, sigma_max))
    return to_zero([(high + share * (low - high)) ** rho for share in shares(steps)])


def exponential(
    schedule: Schedule, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> Spacing:
    """Even in log sigma over the schedule's range, and then 0 (k-diffusion's `get_sigmas_exponential`)."""
    return polyexponential(schedule, steps, sigma_min=sigma_min, sigma_max=sigma_max)


def polyexponential(
    schedule: Schedule,
    steps: int,
    *,
    rho: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Spacing:
    """A power rho of even steps as log sigma, then 0 (k-diffusion's `get_sigmas_polyexponential`)."""
    low, high = (math.log(sigma) for sigma in noise_range(schedule, sigma_min, sigma_max))
    return to_zero([math.exp((1 - share) ** rho * (high - low) + low) for share in shares(steps)])


def beta(
    schedule: Schedule,
    steps: int,
    *,
    alpha: float = 0.6,
    beta: float = 0.6,
    axis: str = "sigma",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Spacing:
    """Quantiles of a beta distribution: more levels at both ends, and then 0 (Lee et al. 2024).

    axis: what the distribution lies over. "sigma": the range of noise levels, its ends included, as
    AUTOMATIC1111 and diffusers have it; "timestep": whole timesteps, as in ComfyUI, but fractional ones where
    these would repeat.
    """
    if axis == "sigma":
        low, high = noise_range(schedule, sigma_min, sigma_max)
        return to_zero([low + beta_quantile(1 - i, alpha, beta) * (high - low) for i in shares(steps)])
    if axis != "timestep":
        raise errors.InputError(f"there is no axis {axis!r}", errors.nearest(axis, ["sigma", "timestep"]))
    check(steps, None)
    low, high = timestep_range(schedule, sigma_min, sigma_max)
    exact = [low + beta_quantile(1 - i / steps, alpha, beta) * (high - low) for i in range(steps)]
    timesteps = [round(t) for t in exact]
    return to_zero([schedule.sigma(t) for t in (timesteps if len(set(timesteps)) == steps else exact)])


def kl_optimal(
    schedule: Schedule, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> Spacing:
    """Even in arctan(sigma): least divergence for Gaussian data (Sabour et al. 2024, theorem 3.1), then 0."""
    low, high = (math.atan(sigma) for sigma in noise_range(schedule, sigma_min, sigma_max))
    return to_zero([math.tan(high + share * (low - high)) for share in shares(steps)])


def align_your_steps(schedule: Schedule, steps: int, *, table: str = "sd1") -> Spacing:
    """The published ten steps, or as many interpolated in log sigma, then 0 (Sabour et al. 2024).

    table: "sd1" or "sdxl". Another schedule than theirs gives the levels of the same timesteps, scaled to its
    length.
    """
    if table not in ALIGN_YOUR_STEPS:
        raise errors.InputError(f"there is no table {table!r}", errors.nearest(table, ALIGN_YOUR_STEPS))
    timesteps = ALIGN_YOUR_STEPS[table]
    return _tabled([_part(schedule, t / timesteps[0]) for t in timesteps], steps)


def gits(schedule: Schedule, steps: int, *, coefficient: float = 1.2) -> Spacing:
    """The steps that best follow the bends of Stable Diffusion's trajectories, then 0 (Chen et al. 2024).

    coefficient: 0.8 to 1.5, the nearest multiple of 0.05; greater ones put more steps at low noise. The
    tables have 2 to 20 steps; what they lack is interpolated in log sigma from the next longer row, or the
    longest.
    """
    rows = GITS[min(GITS, key=lambda each: abs(each - coefficient))]
    row = rows[min((count for count in rows if count >= steps), default=max(rows))]
    return _tabled([_part(schedule, percent / 100) for percent in row], steps)


def _part(schedule: Schedule, share: float) -> float:
    return schedule.sigma(share * (schedule.num_timesteps - 1))


def _tabled(levels: list[float], steps: int) -> Spacing:
    """`levels` brought to steps + 1 by interpolation in log sigma; the last one becomes 0."""
    check(steps, None)
    places = [i * (len(levels) - 1) / steps for i in range(steps)]
    lows = [min(int(place), len(levels) - 2) for place in places]
    return to_zero(
        [
            levels[low] * (levels[low + 1] / levels[low]) ** (place - low)
            for low, place in zip(lows, places, strict=True)
        ]
    )
