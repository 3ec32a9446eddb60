"""One-step samplers of second order: Heun's method and its relatives (Karras et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.diffusion.prediction import Denoiser
from sfumato.diffusion.samplers.base import Noise, Step


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
