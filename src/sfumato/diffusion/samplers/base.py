"""What every sampler shares: the step it yields, the noise it asks for, churn, and its row in the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

from sfumato import errors

Noise = Callable[[float, float], Tensor]
"""noise(sigma, target) -> standard normal values shaped like x, for the step from sigma to target."""


Churn = Callable[[Tensor, float], tuple[Tensor, float]]
"""churned(x, sigma) -> (x, level): x with fresh noise added, and the level >= sigma that it is at then."""


@dataclass(frozen=True)
class Step:
    """One finished step: `denoised` (x0) was evaluated at `sigma`, and `x` is at the noise level `target`.

    With churn, `denoised` was evaluated at the level that churn raised `sigma` to.
    A last target above 0 leaves noise in x: divide by sqrt(1 + target^2) for the network's coordinates.
    """

    index: int
    sigma: float
    target: float
    x: Tensor
    denoised: Tensor


@dataclass(frozen=True)
class Sampler:
    """A row of `SAMPLERS`: the sampler's function and what a caller has to know about it.

    order: of its steps, whose local error is of order + 1. A multistep row starts, and some end, with
    steps of a lower order, so over a whole run it converges at least as order 2; a stochastic row's order
    is that without its noise, and up to 2 that of mean and variance. evaluations: of the denoiser per
    step; a step to 0 takes one. plms takes one more in its first step, dpm_adaptive that many per trial step,
    restart more steps. noise: which kind it draws, where it does: "fresh" values at every call, or increments
    of a "brownian" path, the same for an interval however it is divided. stochastic: whether it draws unless
    an option says otherwise. spacing: its default in `SPACINGS`. title: its name in other tools. paper: where
    it comes from. discard_penultimate: it is used without the last noise level above 0. ends_only: it reads
    only the largest and the smallest positive noise level, chooses its own between them and stops at the
    smallest; where there is but one, it takes one step to 0. guidance: the scale that is usual with it, where
    it is far from other samplers'.
    """

    function: Callable[..., Iterator[Step]]
    order: int
    evaluations: int
    stochastic: bool
    spacing: str
    title: str
    paper: str
    noise: Literal["fresh", "brownian"] = "fresh"
    discard_penultimate: bool = False
    ends_only: bool = False
    guidance: float | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the options that a call may set."""
        parameters = signature(self.function).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)

    def __call__(
        self, denoise: Any, x: Tensor, sigmas: Sequence[float], noise: Noise, **options: Any
    ) -> Iterator[Step]:
        """One `Step` per pair of `sigmas`, evaluated as the caller iterates.

        denoise: a `Denoiser`, or a `GuidedDenoiser` for the rows that ask for more than its answer.
        x: (b, ...) at the level sigmas[0]; sigmas: strictly descending, all but the last above 0.
        `InputError` for other sigmas or an unknown option.
        """
        if not all(math.inf > high > low >= 0 for high, low in pairwise(sigmas)):
            given = ", ".join(f"{sigma:g}" for sigma in sigmas)
            raise errors.InputError(
                f"sigmas are {given}; allowed are finite descending ones, the last 0 or more"
            )
        for name in options:
            if name not in self.options:
                hint = errors.nearest(name, self.options) if self.options else "It has no options."
                raise errors.InputError(f"this sampler has no option {name!r}", hint)
        return self.function(denoise, x, sigmas, noise, **options)


def noised(x: Tensor, noise: Noise, sigma: float, target: float, amount: float) -> Tensor:
    """x with the noise of the step from sigma to target, times `amount`; nothing is drawn where that is 0."""
    return x + noise(sigma, target) * amount if amount > 0 else x


def churn(noise: Noise, steps: int, *, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> Churn:
    """The noise raised before a step (Karras et al. 2022, algorithm 2, lines 4 to 6).

    s_churn: in all, over `steps` steps; 0 leaves x as it is and draws nothing. s_tmin, s_tmax: the levels
    between which it is done. s_noise: standard deviation of the noise, in units of the right one.
    """
    most = min(s_churn / max(steps, 1), math.sqrt(2) - 1)

    def churned(x: Tensor, sigma: float) -> tuple[Tensor, float]:
        if most <= 0 or not s_tmin <= sigma <= s_tmax:
            return x, sigma
        level = sigma * (1 + most)
        amount = s_noise * math.sqrt(level**2 - sigma**2)
        return noised(x, noise, level, sigma, amount), level

    return churned


def check_choice(option: str, value: object, choices: Collection[object]) -> None:
    """`InputError` unless `value` is one of the choices that `option` has."""
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise errors.InputError(f"the sampler's option {option} is {value!r}; allowed are {allowed}")
