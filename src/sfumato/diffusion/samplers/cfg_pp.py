"""CFG++ samplers: guided towards the picture, unguided in the noise that is put back (Chung et al. 2024).

The paper's DDIM step takes the guided x0 and adds the unguided eps again. A guidance scale of 0 to 1 does
there what 1 to about 12 does elsewhere. It depends on the number of steps: unlike the guidance of a
differential equation, the difference of the two is added whole at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.diffusion.prediction import GuidedDenoiser
from sfumato.diffusion.samplers.base import Noise, Step, noised
from sfumato.diffusion.samplers.first_order import posterior


@torch.no_grad()
def euler_a_cfg_pp(
    denoise: GuidedDenoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Euler ancestral with CFG++: algorithm 2 of Chung et al. 2024 with noise; eta in 0..1 scales it."""
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        guided, unguided = denoise.parts(x, sigma)
        down, up = posterior(sigma, target, eta)
        x = guided + (x - unguided) * (down / sigma)
        x = noised(x, noise, sigma, target, up * s_noise)
        yield Step(index, sigma, target, x, guided)


def euler_cfg_pp(denoise: GuidedDenoiser, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Euler's method with CFG++, which on DDIM's noise levels is the paper's DDIM (algorithm 2)."""
    return euler_a_cfg_pp(denoise, x, sigmas, noise, eta=0.0)


@torch.no_grad()
def dpmpp_2m_cfg_pp(
    denoise: GuidedDenoiser, x: Tensor, sigmas: Sequence[float], noise: Noise
) -> Iterator[Step]:
    """DPM-Solver++(2M) with CFG++: guided is only the x0 that the line starts from (Chung et al. 2024)."""
    earlier: tuple[float, Tensor] | None = None
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        guided, unguided = denoise.parts(x, sigma)
        ratio = target / sigma
        x = guided + (x - unguided) * ratio
        if earlier is not None and target > 0:
            growth = math.log(sigma / target) / math.log(earlier[0] / sigma)
            x = x + (unguided - earlier[1]) * ((1 - ratio) * growth / 2)
        earlier = sigma, unguided
        yield Step(index, sigma, target, x, guided)
