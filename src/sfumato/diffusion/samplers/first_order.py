"""First-order samplers: Euler, Euler ancestral, DDIM, DDPM (Ho et al. 2020; Song et al. 2021).

In variance-exploding coordinates, x = x0 + sigma * noise, DDIM(eta) is Euler-ancestral(eta), and DDPM is the
same step with another amount of noise: one function and a noise rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.prediction import Denoiser
from sfumato.diffusion.samplers.base import Noise, Step, churn, noised

NoiseRule = Callable[[float, float], tuple[float, float]]
"""rule(sigma, target) -> (down, up): the level that is stepped down to, and the noise added after it."""


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
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    rule: NoiseRule,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Euler steps down to `rule`'s level and noise up to the target (k-diffusion's ancestral step)."""
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down, up = rule(sigma, target)
        x = denoised + (x - denoised) * (down / sigma)
        x = noised(x, noise, sigma, target, up * s_noise)
        yield Step(index, sigma, target, x, denoised)


@torch.no_grad()
def euler(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Euler's method on the probability-flow equation, with churn (Karras et al. 2022, algorithm 2)."""
    churned = churn(noise, len(sigmas) - 1, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        x, level = churned(x, sigma)
        denoised = denoise(x, level)
        x = denoised + (x - denoised) * (target / level)
        yield Step(index, sigma, target, x, denoised)


def euler_a(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Euler with ancestral noise, k-diffusion's "Euler a"; eta in 0..1 is its share, s_noise its scale."""
    return first_order(
        denoise, x, sigmas, noise, rule=lambda sigma, target: posterior(sigma, target, eta), s_noise=s_noise
    )


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
