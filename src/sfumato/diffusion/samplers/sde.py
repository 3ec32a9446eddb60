"""DPM-Solver++ for the stochastic differential equation (Lu et al. 2022b; Crowson's k-diffusion).

eta = 1 follows the reverse diffusion, eta = 0 the probability flow; in between, and above, the noise that is
added and the faster denoising that makes up for it are scaled. With h = log(sigma / target) and the denoised
picture D as a function of log sigma, one step solves

    x' = exp(-(1 + eta) h) x + (1 + eta) * integral of exp(-(1 + eta) (h - s)) D(s) ds over 0 .. h
       + target * sqrt(1 - exp(-2 eta h)) * noise,

and the samplers differ in what they take for D between the noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.prediction import Denoiser
from sfumato.diffusion.samplers.base import Noise, Step, noised
from sfumato.diffusion.samplers.first_order import posterior

SOLVER_TYPES = ("midpoint", "heun")


@torch.no_grad()
def dpmpp_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Iterator[Step]:
    """DPM-Solver++ (stochastic): a second evaluation the share r of the way to the target, in log sigma.

    Its two draws are increments of one path, from sigma to there and from sigma to the target.
    """

    def move(ahead: Tensor, sigma: float, target: float) -> Tensor:
        """`x` moved from sigma to target as if the denoised picture were `ahead` all the way."""
        down, up = posterior(sigma, target, eta)
        moved = ahead + (x - ahead) * (down / sigma)
        return noised(moved, noise, sigma, target, up * s_noise)

    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = ahead = denoise(x, sigma)
        if target > 0:
            middle = sigma ** (1 - r) * target**r
            halfway = denoise(move(denoised, sigma, middle), middle)
            ahead = denoised + (halfway - denoised) / (2 * r)
        x = move(ahead, sigma, target)
        yield Step(index, sigma, target, x, denoised)


@torch.no_grad()
def dpmpp_2m_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
) -> Iterator[Step]:
    """DPM-Solver++(2M) SDE: D is a line through the last two answers; the first and last step are Euler's.

    solver_type: "heun" integrates that line exactly, "midpoint" takes its value in the middle of the step:
    with eta = 0 that is DPM++ 2M. `InputError` for another word.
    """
    if solver_type not in SOLVER_TYPES:
        hint = errors.nearest(solver_type, SOLVER_TYPES)
        raise errors.InputError(f"there is no solver_type {solver_type!r}", hint)
    earlier: tuple[float, Tensor] | None = None
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = ahead = denoise(x, sigma)
        decay, up = _amounts(sigma, target, eta)
        if earlier is not None and target > 0:
            h = math.log(sigma / target)
            slope = (denoised - earlier[1]) * (h / math.log(earlier[0] / sigma))
            weight = _phi_2((1 + eta) * h) if solver_type == "heun" else (1 - decay) / 2
            ahead = denoised + slope * (weight / (1 - decay))
        x = ahead + (x - ahead) * decay
        x = noised(x, noise, sigma, target, up * s_noise)
        earlier = sigma, denoised
        yield Step(index, sigma, target, x, denoised)


def dpmpp_2m_sde_heun(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """`dpmpp_2m_sde` with solver_type "heun", under the name people choose it by."""
    return dpmpp_2m_sde(denoise, x, sigmas, noise, eta=eta, s_noise=s_noise, solver_type="heun")


@torch.no_grad()
def dpmpp_3m_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    curvature: float = 1.0,
) -> Iterator[Step]:
    """DPM-Solver++(3M) SDE: D is a parabola through the last three answers; the first step is Euler's.

    curvature: what the parabola's square term counts. 1 integrates it exactly, which third order needs;
    k-diffusion has 0.5, with which the sampler is of second order.
    """
    earlier: list[tuple[float, Tensor]] = []
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = ahead = denoise(x, sigma)
        decay, up = _amounts(sigma, target, eta)
        if earlier and target > 0:
            h = math.log(sigma / target)
            phi_2 = _phi_2((1 + eta) * h)
            slope, bend = _differences([*earlier, (sigma, denoised)], h)
            weighted = slope * phi_2
            if bend is not None:
                weighted = weighted + bend * (curvature * (1 - 2 * phi_2 / ((1 + eta) * h)))
            ahead = denoised + weighted / (1 - decay)
        x = ahead + (x - ahead) * decay
        x = noised(x, noise, sigma, target, up * s_noise)
        earlier = [*earlier, (sigma, denoised)][-2:]
        yield Step(index, sigma, target, x, denoised)


def _amounts(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """(exp(-(1 + eta) h), the noise to add) of a step; both are 0 where the target is."""
    ratio = target / sigma
    return ratio ** (1 + eta), target * math.sqrt(1 - ratio ** (2 * eta))


def _phi_2(length: float) -> float:
    """1 - (1 - exp(-length)) / length: what a step of that length makes of a D that grows from 0 to 1."""
    return 1 + math.expm1(-length) / length


def _differences(answers: list[tuple[float, Tensor]], h: float) -> tuple[Tensor, Tensor | None]:
    """(b, c) of D = a + b u + c u^2 through (sigma, D) pairs, u being 1 a step ahead; c needs three."""
    *older, (sigma_1, denoised_1), (sigma, denoised) = answers
    r_0 = math.log(sigma_1 / sigma) / h
    slope = (denoised - denoised_1) / r_0
    if not older:
        return slope, None
    sigma_2, denoised_2 = older[0]
    r_1 = math.log(sigma_2 / sigma_1) / h
    bend = (slope - (denoised_1 - denoised_2) / r_1) / (r_0 + r_1)
    return slope + bend * r_0, bend
