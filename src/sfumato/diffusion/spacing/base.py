"""What every spacing shares: the levels it gives, its row in the table, ranges and checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any

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


@dataclass(frozen=True)
class SpacingRow:
    """A row of `SPACINGS`: function(schedule, steps, *, options) and what a caller has to know about it.

    title: its name in other tools, "Schedule type" in AUTOMATIC1111's. source: where it comes from. whole: it
    visits whole timesteps, so that it has at most num_timesteps steps.
    """

    function: Callable[..., Spacing]
    title: str
    source: str
    whole: bool = False

    @property
    def options(self) -> dict[str, float | str | None]:
        """The options that a call may set, with their defaults; None is the schedule's own value."""
        parameters = signature(self.function).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}

    def __call__(self, schedule: Schedule, steps: int, **options: Any) -> Spacing:
        """The levels of `steps` steps; `InputError` for a number of them or an option that is not allowed."""
        values = {name: self._value(name, options[name]) for name in options}
        try:
            plan = self.function(schedule, steps, **values)
        except ArithmeticError:
            plan = None
        if plan is None or not descending(plan.sigmas):
            told = ", ".join(f"{name}={value}" for name, value in values.items()) or "this schedule"
            raise errors.InputError(
                f"the noise levels of {steps} steps of {self.title!r} with {told} do not descend",
                "Use fewer steps, or options nearer to their defaults.",
            )
        return plan

    def _value(self, name: str, value: float | str) -> float | str:
        if name not in self.options:
            hint = errors.nearest(name, self.options) if self.options else "It has no options."
            raise errors.InputError(f"the spacing {self.title!r} has no option {name!r}", hint)
        if isinstance(self.options[name], str):
            return str(value)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise errors.InputError(f"{name} is {value!r}; allowed is a finite number above 0")
        return number


def descending(sigmas: Sequence[float]) -> bool:
    """Whether these are the levels of a run: two or more, finite, each below the one before, none below 0."""
    return len(sigmas) > 1 and all(math.inf > high > low >= 0 for high, low in pairwise(sigmas))


def without_penultimate(plan: Spacing) -> Spacing:
    """The same run without its last level before the tail."""
    return Spacing([*plan.sigmas[:-2], plan.sigmas[-1]], plan.start_scale)


def to_zero(sigmas: list[float]) -> Spacing:
    """These levels and then 0, from noise of the first one's amplitude, as k-diffusion has it."""
    return Spacing([*sigmas, 0.0], sigmas[0])


def check(steps: int, most: int | None, name: str = "steps") -> None:
    """`InputError` unless `steps` lies in 1..most."""
    if steps < 1 or (most is not None and steps > most):
        allowed = "at least 1" if most is None else f"1 to {most} with this spacing and schedule"
        raise errors.InputError(f"{name} is {steps}; allowed is {allowed}")


def shares(steps: int) -> list[float]:
    """Even steps from 0 to 1; 0 alone for a single one."""
    check(steps, None)
    return [i / max(steps - 1, 1) for i in range(steps)]


def noise_range(schedule: Schedule, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """The lowest and the highest level: the schedule's own ones where not given."""
    low = schedule.sigma_min if sigma_min is None else sigma_min
    high = schedule.sigma_max if sigma_max is None else sigma_max
    if not low < high:
        raise errors.InputError(
            f"sigma_min is {low:g} and sigma_max {high:g}", "sigma_max has to be the greater one."
        )
    return low, high


def timestep_range(
    schedule: Schedule, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """The timesteps of the range, within the schedule."""
    low, high = (schedule.timestep(sigma) for sigma in noise_range(schedule, sigma_min, sigma_max))
    if low == high:
        raise errors.InputError(
            "sigma_min and sigma_max lie on one side of the schedule's noise levels",
            f"These run from {schedule.sigma_min:.4g} to {schedule.sigma_max:.4g}.",
        )
    return low, high
