"""Samplers of models distilled to a few steps: LCM (Luo et al. 2023) and TCD (Zheng et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.prediction import Denoiser
from sfumato.diffusion.samplers.base import Noise, Step, noised
from sfumato.diffusion.schedule import Schedule

SIGMA_DATA = 0.5  # Luo et al. 2023, appendix on the boundary condition, as Karras et al. 2022
TIMESTEP_SCALING = 10.0  # the same: c_skip falls from 1 to 0 within the first timesteps


@torch.no_grad()
def lcm(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, *, schedule: Schedule
) -> Iterator[Step]:
    """Multistep latent consistency sampling: jump to the end, add noise for the next level (algorithm 3).

    schedule: the network's, whose timesteps scale the jump. The consistency function's answer is the steps'
    `denoised`.
    """
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        scaled = schedule.timestep(sigma) * TIMESTEP_SCALING
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / math.sqrt(scaled**2 + SIGMA_DATA**2)
        denoised = c_out * denoise(x, sigma) + (c_skip / math.sqrt(1 + sigma**2)) * x
        x = noised(denoised, noise, sigma, target, target)
        yield Step(index, sigma, target, x, denoised)


@torch.no_grad()
def tcd(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    schedule: Schedule,
    gamma: float = 0.3,
) -> Iterator[Step]:
    """Strategic stochastic sampling: jump below the target and add noise up to it (Zheng et al. 2024).

    schedule: the network's. gamma: the part of the way from the target timestep to 0 that is overshot; 0 adds
    no noise, 1 renoises everything, as LCM does. `InputError` outside 0..1.
    """
    if not 0 <= gamma <= 1:
        raise errors.InputError(f"gamma is {gamma:g}; allowed is 0 (no noise) to 1 (all of it)")
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        down = target
        if gamma > 0:
            down = min(target, schedule.sigma(math.floor((1 - gamma) * schedule.timestep(target))))
        x = denoised + (x - denoised) * (down / sigma)
        x = noised(x, noise, sigma, target, math.sqrt(target**2 - down**2))
        yield Step(index, sigma, target, x, denoised)
