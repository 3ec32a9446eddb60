"""Multistep samplers: each step remembers the answers of earlier ones (Lu et al. 2022b)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.diffusion.prediction import Denoiser
from sfumato.diffusion.samplers.base import Noise, Step


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
