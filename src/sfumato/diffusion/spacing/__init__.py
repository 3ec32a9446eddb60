"""Which noise levels a sampler visits, and from how much noise: one function each, one row in `SPACINGS`.

Those of k-diffusion and its relatives start from noise of the amplitude sigma_0 and end at 0. Those of DDPM
and DDIM (leading, quad, trailing, lcm) start from N(0, 1) in the network's coordinates: sqrt(1 + sigma_0^2)
here. Leading and quad end at timestep 0, all others at sigma 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sfumato import errors
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.spacing.base import Spacing, SpacingRow, descending, without_penultimate
from sfumato.diffusion.spacing.levels import (
    align_your_steps,
    beta,
    exponential,
    gits,
    karras,
    kl_optimal,
    polyexponential,
)
from sfumato.diffusion.spacing.timesteps import (
    ddim_uniform,
    lcm,
    leading,
    normal,
    quad,
    sgm_uniform,
    simple,
    trailing,
    turbo,
    uniform,
)

KARRAS = "Karras et al. 2022"
SABOUR = "Sabour et al. 2024"

SPACINGS: dict[str, SpacingRow] = {
    "uniform": SpacingRow(uniform, "Uniform", "k-diffusion"),
    "normal": SpacingRow(normal, "Normal", "k-diffusion"),
    "sgm_uniform": SpacingRow(sgm_uniform, "SGM Uniform", "generative-models"),
    "leading": SpacingRow(leading, "Leading", "Song et al. 2021", whole=True),
    "trailing": SpacingRow(trailing, "Trailing", "Lin et al. 2024", whole=True),
    "quad": SpacingRow(quad, "Quad", "Song et al. 2021", whole=True),
    "ddim_uniform": SpacingRow(ddim_uniform, "DDIM", "Song et al. 2021", whole=True),
    "simple": SpacingRow(simple, "Simple", "ComfyUI", whole=True),
    "karras": SpacingRow(karras, "Karras", KARRAS),
    "exponential": SpacingRow(exponential, "Exponential", "k-diffusion"),
    "polyexponential": SpacingRow(polyexponential, "Polyexponential", "k-diffusion"),
    "beta": SpacingRow(beta, "Beta", "Lee et al. 2024"),
    "kl_optimal": SpacingRow(kl_optimal, "KL Optimal", SABOUR),
    "align_your_steps": SpacingRow(align_your_steps, "Align Your Steps", SABOUR),
    "gits": SpacingRow(gits, "GITS", "Chen et al. 2024"),
    "turbo": SpacingRow(turbo, "Turbo", "Sauer et al. 2024", whole=True),
    "lcm": SpacingRow(lcm, "LCM", "Luo et al. 2023", whole=True),
}


def space(
    name: str,
    schedule: Schedule,
    steps: int,
    options: Mapping[str, float | str] | None = None,
    *,
    discard_penultimate: bool = False,
) -> Spacing:
    """The noise levels of `steps` steps by the row `name`, strictly descending.

    options: of that row, numbers above 0 (or texts that say one) or words. discard_penultimate: of one step
    more, without the last level above 0, for the samplers whose rows ask for it. `InputError` for a name,
    option, value or number of steps that is not allowed, and says which are.
    """
    row = spacing(name)
    more = 1 if discard_penultimate else 0
    if row.whole and steps + more > schedule.num_timesteps:
        who = "this spacing, schedule and sampler" if more else "this spacing and schedule"
        allowed = f"1 to {schedule.num_timesteps - more} with {who}"
        raise errors.InputError(f"steps is {steps}; allowed is {allowed}")
    if steps < 1:
        raise errors.InputError(f"steps is {steps}; allowed is at least 1")
    plan = row(schedule, steps + more, **(options or {}))
    return without_penultimate(plan) if discard_penultimate else plan


def spacing(name: str) -> SpacingRow:
    """The row of `SPACINGS` with that name; `InputError` with the nearest name where there is none."""
    if name not in SPACINGS:
        raise errors.InputError(f"there is no spacing {name!r}", errors.nearest(name, SPACINGS))
    return SPACINGS[name]


def custom(sigmas: Sequence[float]) -> Spacing:
    """Given noise levels, the tail included, from noise of the first one's amplitude.

    `InputError` unless they are two or more, finite, strictly descending, and all but the last above 0.
    """
    levels = [float(sigma) for sigma in sigmas]
    if not descending(levels):
        given = ", ".join(f"{sigma:g}" for sigma in levels[:12])
        raise errors.InputError(
            f"sigmas are {given or 'none'}; allowed are two or more that descend, the last 0 or more",
            "For example 14.6, 4, 1, 0.3, 0.",
        )
    return Spacing(levels, levels[0])
