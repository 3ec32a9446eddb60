"""Multistep samplers: each step remembers the answers of earlier ones.

Adams-Bashforth methods on eps = (x - D) / sigma, dx/dsigma = eps, differ in the variable in which eps is
taken to be a polynomial: sigma (LMS), log sigma (DEIS), the step's number (PLMS, iPNDM). (Katherine Crowson's
k-diffusion; Liu et al. 2022; Zhang and Chen 2023; DPM++ 2M, on x0: Lu et al. 2022b.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sfumato.diffusion.prediction import Denoiser
from sfumato.diffusion.samplers.base import Noise, Step, check_choice

Weights = Callable[[Sequence[float], float], Sequence[float]]
"""weights(levels, target): of the eps at each level, newest first, in the step from the newest to target."""

ADAMS_BASHFORTH = (  # Liu et al. 2022, eq. 9 and 12; each row sums to 1
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
# 16 points: exact to rounding for cubics, and for cubics times exp(u) over any range of log sigma in use.
POINTS, POINT_WEIGHTS = (row.tolist() for row in np.polynomial.legendre.leggauss(16))


def lagrange_integrals(nodes: Sequence[float], start: float, end: float, growth: float = 0.0) -> list[float]:
    """For each node, the integral from start to end of its Lagrange polynomial times exp(growth * u).

    The polynomial is 1 at its node and 0 at the others, so that these weigh values given at the nodes into
    the integral of the polynomial through them. By Gauss-Legendre quadrature in float64.
    """
    middle, half = (start + end) / 2, (end - start) / 2
    places = [middle + half * point for point in POINTS]
    factors = [
        half * weight * math.exp(growth * place) for weight, place in zip(POINT_WEIGHTS, places, strict=True)
    ]
    integrals = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        values = [math.prod((place - other) / (node - other) for other in others) for place in places]
        integrals.append(sum(factor * value for factor, value in zip(factors, values, strict=True)))
    return integrals


def in_sigma(levels: Sequence[float], target: float) -> list[float]:
    """Weights where eps is a polynomial in sigma: Adams-Bashforth for unequal steps."""
    return lagrange_integrals(levels, levels[0], target)


def in_log_sigma(levels: Sequence[float], target: float) -> list[float]:
    """Weights where eps is a polynomial in log sigma (Zhang and Chen 2023, section 3.3, with log rho)."""
    logs = [math.log(level / target) for level in levels]  # of the ratio: exp stays in range
    return [target * weight for weight in lagrange_integrals(logs, logs[0], 0.0, growth=1.0)]


def in_steps(levels: Sequence[float], target: float) -> list[float]:
    """Weights where eps is a polynomial in the number of the step: Adams-Bashforth for equal steps."""
    return [(target - levels[0]) * weight for weight in ADAMS_BASHFORTH[len(levels) - 1]]


@torch.no_grad()
def multistep(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, order: int, weights: Weights
) -> Iterator[Step]:
    """x' = x + the weighted sum of the last `order` eps, of as many as there are; an Euler step to 0."""
    history: list[tuple[float, Tensor]] = []
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        history = [(sigma, (x - denoised) / sigma), *history][:order]
        if target > 0:
            amounts = weights([level for level, _ in history], target)
            x = x + sum(amount * eps for amount, (_, eps) in zip(amounts, history, strict=True))
        else:
            x = denoised
        yield Step(index, sigma, target, x, denoised)


def lms(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 4
) -> Iterator[Step]:
    """Linear multistep, Adams-Bashforth in sigma, of order 1 to 4 (k-diffusion's `sample_lms`).

    k-diffusion takes the step to 0 in full order; here it is Euler's, as everywhere. iPNDM with variable
    steps is the same method: the code published for it departs from the integrals at orders 3 and 4.
    """
    check_choice("order", order, range(1, 5))
    return multistep(denoise, x, sigmas, order=order, weights=in_sigma)


def deis(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 3
) -> Iterator[Step]:
    """DEIS, tAB with log rho as time, of order 1 to 3 (Zhang and Chen 2023, section 3.3)."""
    check_choice("order", order, range(1, 4))
    return multistep(denoise, x, sigmas, order=order, weights=in_log_sigma)


def ipndm(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: int = 4
) -> Iterator[Step]:
    """Improved PNDM: PLMS's coefficients, 1 to 4 of them, started by Euler (Zhang and Chen 2023, appendix H).

    Of fourth order where steps in sigma are equal, and of second where they are not.
    """
    check_choice("order", order, range(1, 5))
    return multistep(denoise, x, sigmas, order=order, weights=in_steps)


@torch.no_grad()
def plms(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Pseudo linear multistep (Liu et al. 2022, eq. 9 and 12), as in latent diffusion's PLMSSampler.

    Warm-up: a pseudo improved Euler step, which evaluates twice, and then two and three coefficients; the
    paper's own is three Runge-Kutta steps. Of second order where steps in sigma are not equal.
    """
    history: list[Tensor] = []
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        history = [(x - denoised) / sigma, *history][:4]
        coefficients = ADAMS_BASHFORTH[len(history) - 1]
        eps = sum((c * past for c, past in zip(coefficients, history, strict=True)), torch.zeros_like(x))
        if index == 0 and target > 0:
            ahead = x + eps * (target - sigma)
            eps = (eps + (ahead - denoise(ahead, target)) / target) / 2
        x = x + eps * (target - sigma) if target > 0 else denoised
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
