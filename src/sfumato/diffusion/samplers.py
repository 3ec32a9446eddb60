"""Samplers as generator functions over noise levels (Ho et al. 2020; Song et al. 2021; Karras et al. 2022).

All work in variance-exploding coordinates, x = x0 + sigma * noise, on a denoiser D(x, sigma) -> x0. There
DDIM(eta) is Euler-ancestral(eta), and DDPM is the same step with another amount of noise: one function and
a noise rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.prediction import Denoiser

Noise = Callable[[float, float], Tensor]
"""noise(sigma, target) -> standard normal values shaped like x, for the step from sigma to target."""
NoiseRule = Callable[[float, float], tuple[float, float]]
"""rule(sigma, target) -> (down, up): the level that is stepped down to, and the noise added after it."""


@dataclass(frozen=True)
class Step:
    """One finished step: `denoised` (x0) was evaluated at `sigma`, and `x` is at the noise level `target`.

    A last target above 0 leaves noise in x: divide by sqrt(1 + target^2) for the network's coordinates.
    """

    index: int
    sigma: float
    target: float
    x: Tensor
    denoised: Tensor


def posterior(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """DDIM's noise: eta = 0 adds none, eta = 1 is the posterior q(x' | x, x0) (Song et al. 2021, eq. 16)."""
    share = min(1.0, eta * math.sqrt(1 - (target / sigma) ** 2))
    return target * math.sqrt(1 - share**2), target * share


def transition(sigma: float, target: float) -> tuple[float, float]:
    """DDPM's noise sqrt(beta) of the forward step, about the posterior's mean (Ho et al. 2020, section 3.2).

    It is right where steps are small, as the whole chain's are: `up` may exceed `target` on few steps. No
    noise is added on the way to 0.
    """
    if target == 0:
        return 0.0, 0.0
    up = math.sqrt((sigma**2 - target**2) * (1 + target**2) / (1 + sigma**2))
    return target**2 / sigma, up


@torch.no_grad()
def first_order(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, *, rule: NoiseRule
) -> Iterator[Step]:
    """Euler steps down to `rule`'s level and noise up to the target (k-diffusion's ancestral step)."""
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down, up = rule(sigma, target)
        x = denoised + (x - denoised) * (down / sigma)
        if up > 0:
            x = x + noise(sigma, target) * up
        yield Step(index, sigma, target, x, denoised)


def euler(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Euler's method on the probability-flow equation (Karras et al. 2022, algorithm 1, uncorrected)."""
    return ddim(denoise, x, sigmas, noise, eta=0.0)


def euler_a(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0
) -> Iterator[Step]:
    """Euler with ancestral noise, k-diffusion's "Euler a"; eta in 0..1 scales the noise."""
    return ddim(denoise, x, sigmas, noise, eta=eta)


def ddim(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0
) -> Iterator[Step]:
    """Denoising diffusion implicit models; eta from 0 (deterministic) to 1 (Song et al. 2021, eq. 12)."""
    return first_order(denoise, x, sigmas, noise, rule=lambda sigma, target: posterior(sigma, target, eta))


def ddpm(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, *, variance: str = "large"
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), meant for all timesteps of the schedule.

    variance: "large" adds sqrt(beta_t), the paper's and textbook choice; "small" the posterior's, which
    stays right when timesteps are left out. `InputError` for another word.
    """
    rules: dict[str, NoiseRule] = {"large": transition, "small": lambda s, t: posterior(s, t, eta=1.0)}
    if variance not in rules:
        raise errors.InputError(f"there is no variance {variance!r}", errors.nearest(variance, rules))
    return first_order(denoise, x, sigmas, noise, rule=rules[variance])


@torch.no_grad()
def heun(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Heun's second-order method; an Euler step where the target is 0 (Karras et al. 2022, algorithm 1)."""
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        ahead = x + slope * (target - sigma)
        if target > 0:
            slope = (slope + (ahead - denoise(ahead, target)) / target) / 2
            ahead = x + slope * (target - sigma)
        x = ahead
        yield Step(index, sigma, target, x, denoised)


@torch.no_grad()
def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2); its first and last step are Euler's."""
    previous: tuple[float, Tensor] | None = None
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        ahead = denoised
        if previous is not None and target > 0:
            ratio = math.log(sigma / target) / math.log(previous[0] / sigma)
            ahead = denoised + (denoised - previous[1]) * (ratio / 2)
        x = ahead + (x - ahead) * (target / sigma)
        previous = sigma, denoised
        yield Step(index, sigma, target, x, denoised)


@dataclass(frozen=True)
class Sampler:
    """A row of `SAMPLERS`: the sampler's function and what a caller has to know about it.

    order: of convergence to the equation it solves. evaluations: of the denoiser per step; a step to 0
    takes one. stochastic: whether it draws from `noise` unless an option says otherwise. spacing: its
    default in `SPACINGS`.
    """

    function: Callable[..., Iterator[Step]]
    order: int
    evaluations: int
    stochastic: bool
    spacing: str

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the options that a call may set."""
        parameters = signature(self.function).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)

    def __call__(
        self, denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, **options: float | str
    ) -> Iterator[Step]:
        """One `Step` per pair of `sigmas`, evaluated as the caller iterates.

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


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, order=1, evaluations=1, stochastic=True, spacing="trailing"),
    "ddim": Sampler(ddim, order=1, evaluations=1, stochastic=False, spacing="leading"),
    "euler": Sampler(euler, order=1, evaluations=1, stochastic=False, spacing="uniform"),
    "euler_a": Sampler(euler_a, order=1, evaluations=1, stochastic=True, spacing="uniform"),
    "heun": Sampler(heun, order=2, evaluations=2, stochastic=False, spacing="uniform"),
    "dpmpp_2m": Sampler(dpmpp_2m, order=2, evaluations=1, stochastic=False, spacing="karras"),
}


def sampler(name: str) -> Sampler:
    """The row of `SAMPLERS` with that name; `InputError` with the nearest name where there is none."""
    if name not in SAMPLERS:
        raise errors.InputError(f"there is no sampler {name!r}", errors.nearest(name, SAMPLERS))
    return SAMPLERS[name]
