"""One-step samplers of second order: Heun, DPM2, DPM++ 2S a (Karras et al. 2022; Lu et al. 2022a and b)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.diffusion.prediction import Denoiser
from sfumato.diffusion.samplers.base import Noise, Step, churn, noised
from sfumato.diffusion.samplers.first_order import posterior

Advance = Callable[[Denoiser, Tensor, Tensor, float, float], Tensor]
"""advance(denoise, x, denoised, sigma, target) -> x at target, given x and D(x, sigma)."""


@torch.no_grad()
def churned_steps(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    advance: Advance,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
) -> Iterator[Step]:
    """Churn and then `advance`, for every pair of levels (Karras et al. 2022, algorithm 2)."""
    churned = churn(noise, len(sigmas) - 1, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        x, level = churned(x, sigma)
        denoised = denoise(x, level)
        x = advance(denoise, x, denoised, level, target) if target > 0 else denoised
        yield Step(index, sigma, target, x, denoised)


@torch.no_grad()
def ancestral_steps(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    advance: Advance,
    eta: float,
    s_noise: float,
) -> Iterator[Step]:
    """`advance` to the level below the target, and noise up to it (k-diffusion's ancestral step)."""
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down, up = posterior(sigma, target, eta)
        x = advance(denoise, x, denoised, sigma, down) if down > 0 else denoised
        x = noised(x, noise, sigma, target, up * s_noise)
        yield Step(index, sigma, target, x, denoised)


def trapezoid(denoise: Denoiser, x: Tensor, denoised: Tensor, sigma: float, target: float) -> Tensor:
    """The mean of the slopes at both ends (Karras et al. 2022, algorithm 1, lines 4 to 8)."""
    slope = (x - denoised) / sigma
    ahead = x + slope * (target - sigma)
    slope = (slope + (ahead - denoise(ahead, target)) / target) / 2
    return x + slope * (target - sigma)


def midpoint(denoise: Denoiser, x: Tensor, denoised: Tensor, sigma: float, target: float) -> Tensor:
    """The slope, noise as the network sees it, half way in log sigma (Lu et al. 2022a, algorithm 1)."""
    middle = math.sqrt(sigma * target)
    ahead = denoised + (x - denoised) * (middle / sigma)
    slope = (ahead - denoise(ahead, middle)) / middle
    return x + slope * (target - sigma)


def midpoint_x0(denoise: Denoiser, x: Tensor, denoised: Tensor, sigma: float, target: float) -> Tensor:
    """x0 as seen half way in log sigma, held for the whole step (Lu et al. 2022b, algorithm 1, r = 1/2)."""
    middle = math.sqrt(sigma * target)
    ahead = denoised + (x - denoised) * (middle / sigma)
    denoised = denoise(ahead, middle)
    return denoised + (x - denoised) * (target / sigma)


def heun(
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
    """Heun's second-order method, with churn; an Euler step to 0 (Karras et al. 2022, algorithm 2)."""
    return churned_steps(
        denoise,
        x,
        sigmas,
        noise,
        advance=trapezoid,
        s_churn=s_churn,
        s_tmin=s_tmin,
        s_tmax=s_tmax,
        s_noise=s_noise,
    )


def dpm2(
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
    """DPM-Solver-2, with churn; an Euler step to 0 (k-diffusion's `sample_dpm_2`)."""
    return churned_steps(
        denoise,
        x,
        sigmas,
        noise,
        advance=midpoint,
        s_churn=s_churn,
        s_tmin=s_tmin,
        s_tmax=s_tmax,
        s_noise=s_noise,
    )


def dpm2_a(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """DPM-Solver-2 with ancestral noise (k-diffusion's `sample_dpm_2_ancestral`); see `euler_a`."""
    return ancestral_steps(denoise, x, sigmas, noise, advance=midpoint, eta=eta, s_noise=s_noise)


def dpmpp_2s_a(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """DPM-Solver++(2S) with ancestral noise (k-diffusion's `sample_dpmpp_2s_ancestral`); see `euler_a`."""
    return ancestral_steps(denoise, x, sigmas, noise, advance=midpoint_x0, eta=eta, s_noise=s_noise)
