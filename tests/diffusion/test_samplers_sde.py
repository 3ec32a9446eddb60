"""The SDE samplers: against the reference library, the equation they solve, and its moments."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from papers import BAR, EXACT, OPTIONS, SHAPE, Denoise, difference, draws, eps_of, play, vp
from theory import GAUSSIAN, MIXTURE, extrapolated, last, local_errors, moments, no_noise, rate, rho_grid

from sfumato.diffusion.brownian import BrownianNoise
from sfumato.diffusion.samplers import SAMPLERS, Sampler
from sfumato.diffusion.samplers.multistep import dpmpp_2m
from sfumato.diffusion.samplers.sde import dpmpp_2m_sde, dpmpp_2m_sde_heun, dpmpp_3m_sde, dpmpp_sde
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import karras
from sfumato.errors import InputError

SD1 = Schedule(ScheduleConfig())
SDE = {name: SAMPLERS[name] for name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")}


def exact(scheduler: Any, sigmas: Sequence[float]) -> Any:
    """A scheduler with float64 tables and these levels; its `step` still rounds x to float32 now and then."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize(
    ("function", "options", "reference"),
    [
        (dpmpp_2m_sde, {}, {"algorithm_type": "sde-dpmsolver++", "solver_type": "midpoint"}),
        (dpmpp_2m_sde_heun, {}, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
        (
            dpmpp_3m_sde,
            {"eta": 0.0, "curvature": 0.5},
            {"algorithm_type": "dpmsolver++", "solver_order": 3, "solver_type": "heun"},
        ),
    ],
)
def test_multistep_is_the_reference(
    function: Any, options: dict[str, Any], reference: dict[str, Any], mixture: Denoise
) -> None:
    noise = draws(21)
    sigmas = karras(SD1, 20).sigmas
    scheduler = exact(DPMSolverMultistepScheduler(**OPTIONS, **reference, lower_order_final=False), sigmas)
    x = noise[0].clone()
    for t, level, z in zip(scheduler.timesteps, sigmas[:-1], noise[1:], strict=True):
        x = scheduler.step(eps_of(mixture, x.double(), level), t, x, variance_noise=z).prev_sample
    start = noise[0] * math.sqrt(1 + sigmas[0] ** 2)
    got = last(function(mixture, start, sigmas, play(noise[1:]), **options)).x
    assert difference(got, x.double()) < BAR


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_dpmpp_sde_is_the_two_moves_of_the_paper(eta: float, mixture: Denoise) -> None:
    """Lu et al. 2022b, section 4.3 with k-diffusion's ancestral form, in lambda = log(alpha / sigma)."""
    sigmas = rho_grid(12.0, 0.05, 12)
    noise = BrownianNoise([4, 5], SHAPE[1:], low=0.05, high=12.0, device=torch.device("cpu"))

    def jump(x: Tensor, x0: Tensor, start: float, end: float) -> Tensor:
        (a_s, s_s), (a_t, s_t) = vp(start), vp(end)
        h = math.log(a_t / s_t) - math.log(a_s / s_s)
        up = eta * math.sqrt(1 - math.exp(-2 * h))  # the share of s_t that is drawn anew
        kept = math.sqrt(1 - up**2)
        return a_t * x0 + kept * s_t * (x - a_s * x0) / s_s + up * s_t * noise(start, end)

    x = draws(1)[0]
    for start, end in itertools.pairwise(sigmas):
        (a_s, s_s), (a_t, s_t) = vp(start), vp(end)
        middle = math.exp(-(math.log(a_s / s_s) + math.log(a_t / s_t)) / 2)
        first = mixture(x / a_s, start)
        halfway = jump(x, first, start, middle)
        x = jump(x, mixture(halfway / vp(middle)[0], middle), start, end)
    start_x = draws(1)[0] * math.sqrt(1 + sigmas[0] ** 2)
    got = last(dpmpp_sde(mixture, start_x, sigmas, noise, eta=eta)).x
    assert difference(got / math.sqrt(1 + sigmas[-1] ** 2), x) < 1e-6  # the path has float32 values


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize("curvature", [1.0, 0.5])
def test_dpmpp_3m_sde_is_the_variation_of_constants(eta: float, curvature: float, mixture: Denoise) -> None:
    """x' by Gauss-Legendre quadrature over the interpolating polynomial, and half its square term apart."""
    sigmas = rho_grid(12.0, 0.05, 10)
    noise = draws(11)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    x = noise[0] * 12
    history: list[tuple[float, Tensor]] = []
    for (start, end), z in zip(itertools.pairwise(sigmas), noise[1:], strict=True):
        history = [*history, (-math.log(start), mixture(x, start))][-3:]
        h = math.log(start / end)
        moved = math.exp(-(1 + eta) * h) * x
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            s = h * (1 + node) / 2
            value = lagrange(history, -math.log(start) + s)
            if len(history) == 3:
                value = value - (1 - curvature) * square_term(history) * s**2
            moved = moved + weight * h / 2 * (1 + eta) * math.exp(-(1 + eta) * (h - s)) * value
        x = moved + end * math.sqrt(1 - math.exp(-2 * eta * h)) * z
    got = last(dpmpp_3m_sde(mixture, noise[0] * 12, sigmas, play(noise[1:]), eta=eta, curvature=curvature)).x
    assert difference(got, x) < EXACT


def lagrange(points: Sequence[tuple[float, Tensor]], at: float) -> Tensor:
    total = torch.zeros_like(points[0][1])
    for place, value in points:
        others = [other for other, _ in points if other != place]
        total = total + value * math.prod((at - other) / (place - other) for other in others)
    return total


def square_term(points: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The coefficient of the square in the parabola through three points."""
    total = torch.zeros_like(points[0][1])
    for place, value in points:
        total = total + value / math.prod(place - other for other, _ in points if other != place)
    return total


@pytest.mark.parametrize("row", SDE.values(), ids=SDE)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_sde_mean_and_variance(row: Sampler, eta: float) -> None:
    """Extrapolated from 100, 200 and 400 steps they are exact, and so is what they are extrapolated from.

    Runs start at mean 0, which the equation brings towards the data's by the power below.
    """
    found = [moments(row, rho_grid(10.0, 0.05, steps), eta=eta) for steps in (100, 200, 400)]
    variance = GAUSSIAN.deviation**2 + 0.05**2
    power = 1 + (eta**2 if row.function is dpmpp_sde else eta)
    mean = GAUSSIAN.mean * (1 - (variance / (GAUSSIAN.deviation**2 + 100)) ** (power / 2))
    assert extrapolated([one.variance for one in found]) == pytest.approx(variance, rel=2e-3)
    assert extrapolated([one.mean for one in found]) == pytest.approx(mean, rel=1e-5)
    assert abs(found[2].variance - variance) < abs(found[0].variance - variance) / 2
    assert found[2].draws == 400 * row.evaluations


@pytest.mark.parametrize("row", SDE.values(), ids=SDE)
def test_s_noise_scales_the_noise(row: Sampler) -> None:
    """Without it the variance is too small; and with s_noise = 0 nothing is drawn."""
    sigmas = rho_grid(10.0, 0.05, 30)
    assert moments(row, sigmas, s_noise=0.5).variance < moments(row, sigmas).variance < 0.3
    for options in ({"s_noise": 0.0}, {"eta": 0.0}):
        last(row(MIXTURE.denoise, torch.zeros(1, 2), sigmas, no_noise, **options))


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("dpmpp_sde", {}, 3),
        ("dpmpp_sde", {"r": 0.3}, 3),
        ("dpmpp_2m_sde", {}, 3),
        ("dpmpp_2m_sde_heun", {}, 3),
        ("dpmpp_3m_sde", {}, 4),
        ("dpmpp_3m_sde", {"curvature": 0.5}, 3),
    ],
)
def test_order_of_one_step_without_noise(name: str, options: dict[str, Any], order: int) -> None:
    coarse, fine = local_errors(SDE[name], [0.01, 0.005], eta=0.0, **options)
    assert rate(coarse, fine) == pytest.approx(order, abs=0.2)


def test_without_noise_2m_sde_is_2m(mixture: Denoise) -> None:
    x = 14 * draws(1)[0]
    sigmas = karras(SD1, 9).sigmas
    got = last(dpmpp_2m_sde(mixture, x, sigmas, no_noise, eta=0.0)).x
    assert difference(got, last(dpmpp_2m(mixture, x, sigmas, no_noise)).x) < EXACT


def test_dpmpp_sde_draws_from_one_path(mixture: Denoise) -> None:
    calls: list[tuple[float, float]] = []

    def noise(sigma: float, target: float) -> Tensor:
        calls.append((sigma, target))
        return torch.zeros(SHAPE)

    list(dpmpp_sde(mixture, torch.ones(SHAPE), [4.0, 1.0, 0.0], noise))
    assert calls == [(4.0, 2.0), (4.0, 1.0)]


def test_unknown_solver_type(mixture: Denoise) -> None:
    with pytest.raises(InputError, match="'huen'") as caught:
        next(dpmpp_2m_sde(mixture, torch.ones(SHAPE), [1.0, 0.0], no_noise, solver_type="huen"))
    assert "heun" in str(caught.value.hint)
