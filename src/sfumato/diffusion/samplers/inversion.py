"""The way back: from a picture to the noise that a deterministic sampler makes it of (Song et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.prediction import Denoiser
from sfumato.diffusion.samplers.base import Noise, Step


@torch.no_grad()
def ddim_inversion(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, *, iterations: int = 1
) -> Iterator[Step]:
    """Undo DDIM (or Euler) step by step: from x at the last of `sigmas` up to the first.

    sigmas: descending, as for the sampler that is to be undone; noise is not drawn. The steps come from the
    end upwards, with target > sigma, and their `denoised` was evaluated at `target`. Each step asks for
    the x that a sampler's step from `target` would bring to where we are, by that many fixed-point
    iterations: 1 is DDIM inversion as it is commonly done; some more make the round trip exact (Pan et al.
    2023), with one evaluation each. `InputError` for fewer than 1.
    """
    if iterations < 1:
        raise errors.InputError(f"iterations is {iterations}; a step of the inversion takes at least 1")
    for index, (sigma, target) in enumerate(pairwise(reversed(sigmas))):
        ahead = x * math.sqrt((1 + target**2) / (1 + sigma**2))  # unchanged, to the network's eyes
        denoised = ahead
        for _ in range(iterations):
            denoised = denoise(ahead, target)
            ahead = x + (ahead - denoised) * ((target - sigma) / target)
        x = ahead
        yield Step(index, sigma, target, x, denoised)
