"""Spacings that choose timesteps of the network (Song et al. 2021; Lin et al. 2024; k-diffusion)."""

from __future__ import annotations

import math

import numpy as np

from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.spacing.base import (
    Spacing,
    check,
    shares,
    timestep_range,
    to_zero,
    without_penultimate,
)

QUAD_SHARE = 0.8  # of the timesteps that LDM's "quad" discretisation reaches


def uniform(schedule: Schedule, steps: int) -> Spacing:
    """Timesteps evenly from the last to the first, both visited, and then 0 (k-diffusion's `get_sigmas`)."""
    return normal(schedule, steps)


def normal(
    schedule: Schedule, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> Spacing:
    """`uniform` between two noise levels: evenly in their timesteps, both visited, and then 0."""
    low, high = timestep_range(schedule, sigma_min, sigma_max)
    return to_zero([schedule.sigma(high + share * (low - high)) for share in shares(steps)])


def sgm_uniform(
    schedule: Schedule, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> Spacing:
    """`normal` of one step more, without its last level above 0 (Stability AI's generative-models)."""
    return without_penultimate(normal(schedule, steps + 1, sigma_min=sigma_min, sigma_max=sigma_max))


def leading(schedule: Schedule, steps: int) -> Spacing:
    """Timesteps 1, 1 + r, 1 + 2r ... with r = num_timesteps // steps, and then timestep 0 (LDM's DDIM).

    Where steps = num_timesteps leaves no room for the offset of 1, every timestep is visited, and then 0.
    Where steps does not divide num_timesteps, sampling starts well below the last timestep: `trailing` does
    not.
    """
    check(steps, schedule.num_timesteps)
    stride = schedule.num_timesteps // steps
    if steps == schedule.num_timesteps:
        return trailing(schedule, steps)
    sigmas = [schedule.sigma(1 + i * stride) for i in reversed(range(steps))]
    return Spacing([*sigmas, schedule.sigma_min], math.sqrt(1 + sigmas[0] ** 2))


def ddim_uniform(schedule: Schedule, steps: int) -> Spacing:
    """The timesteps of `leading`, and then 0, from noise of k-diffusion's amplitude."""
    return to_zero(leading(schedule, steps).sigmas[:-1])


def quad(schedule: Schedule, steps: int) -> Spacing:
    """Timesteps 1 + the squares of even steps up to 0.8 num_timesteps, and then timestep 0 (LDM's DDIM).

    Where squares round down to the same timestep, each moves up to the next free one. Sampling starts below
    the last timestep, with one step at timestep 1.
    """
    check(steps, schedule.num_timesteps)
    if steps == schedule.num_timesteps:
        return trailing(schedule, steps)
    roots = np.linspace(0, math.sqrt(QUAD_SHARE * schedule.num_timesteps), steps)
    timesteps: list[int] = []
    for square in (roots**2).astype(int).tolist():
        timesteps.append(1 + max(square, timesteps[-1] if timesteps else 0))
    sigmas = [schedule.sigma(t) for t in reversed(timesteps)]
    return Spacing([*sigmas, schedule.sigma_min], math.sqrt(1 + sigmas[0] ** 2))


def trailing(schedule: Schedule, steps: int) -> Spacing:
    """Timesteps evenly from the last downwards, then 0 (Lin et al. 2024, table 2); DDPM's chain if all."""
    check(steps, schedule.num_timesteps)
    timesteps = [round(schedule.num_timesteps * i / steps) - 1 for i in range(steps, 0, -1)]
    sigmas = [schedule.sigma(t) for t in timesteps]
    return Spacing([*sigmas, 0.0], math.sqrt(1 + sigmas[0] ** 2))


def simple(schedule: Schedule, steps: int) -> Spacing:
    """Every r-th timestep from the last downwards, rounded up, r = num_timesteps / steps, and then 0."""
    check(steps, schedule.num_timesteps)
    stride = schedule.num_timesteps / steps
    return to_zero([schedule.sigma(schedule.num_timesteps - 1 - int(i * stride)) for i in range(steps)])


def turbo(schedule: Schedule, steps: int, *, trained_steps: float = 4) -> Spacing:
    """The timesteps that a distilled student was trained on, taken evenly from the last, and then 0.

    trained_steps: how many there are: 4 for SD-Turbo, 999, 749, 499 and 249 (Sauer et al. 2024). With more
    steps than that, as many timesteps divided in the same way.
    """
    count = max(int(trained_steps), steps)
    check(steps, schedule.num_timesteps)
    check(count, schedule.num_timesteps, "trained_steps")
    kept = [count - i * count // steps for i in range(steps)]
    return to_zero([schedule.sigma(round(schedule.num_timesteps * i / count) - 1) for i in kept])


def lcm(schedule: Schedule, steps: int, *, trained_steps: float = 50) -> Spacing:
    """`turbo` for consistency models, which were trained on 50 timesteps of DDIM (Luo et al. 2023)."""
    sigmas = turbo(schedule, steps, trained_steps=trained_steps).sigmas
    return Spacing(sigmas, math.sqrt(1 + sigmas[0] ** 2))
