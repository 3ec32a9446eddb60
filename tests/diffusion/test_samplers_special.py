"""Distilled, CFG++ and Restart samplers, inversion: against their papers and the reference library."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_tcd import TCDScheduler
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from papers import BAR, EXACT, OPTIONS, SHAPE, Denoise, difference, drawn_from, draws, eps_of, play, vp
from theory import GAUSSIAN, MIXTURE, extrapolated, last, moments, no_noise, rate, rho_grid

from sfumato.diffusion.prediction import Unguided
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.samplers.cfg_pp import dpmpp_2m_cfg_pp, euler_a_cfg_pp, euler_cfg_pp
from sfumato.diffusion.samplers.distilled import lcm, tcd
from sfumato.diffusion.samplers.first_order import ddim, euler, euler_a
from sfumato.diffusion.samplers.inversion import ddim_inversion
from sfumato.diffusion.samplers.multistep import dpmpp_2m
from sfumato.diffusion.samplers.restart import RESTARTS, parsed, restart
from sfumato.diffusion.samplers.runge_kutta import heun
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import karras, leading, trailing
from sfumato.errors import InputError

SD1 = Schedule(ScheduleConfig())


# --- distilled models


def run_distilled(
    monkeypatch: pytest.MonkeyPatch, scheduler: Any, denoise: Denoise, steps: int, **options: Any
) -> tuple[Tensor, list[float], list[Tensor]]:
    """(x0 or last x, levels, noise) of a diffusers loop in float64."""
    scheduler.alphas_cumprod = SD1.alphas_cumprod
    scheduler.set_timesteps(steps)
    noise = draws(steps + 1)
    drawn_from(monkeypatch, scheduler, noise[1:])
    x = noise[0]
    for t in scheduler.timesteps:
        x = scheduler.step(eps_of(denoise, x, SD1.sigma(int(t))), t, x, **options).prev_sample
    return x, [SD1.sigma(int(t)) for t in scheduler.timesteps], noise


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
def test_lcm_is_the_reference(monkeypatch: pytest.MonkeyPatch, steps: int, mixture: Denoise) -> None:
    scheduler = LCMScheduler(**OPTIONS, clip_sample=False)
    expected, levels, noise = run_distilled(monkeypatch, scheduler, mixture, steps)
    start = noise[0] * math.sqrt(1 + levels[0] ** 2)
    got = last(lcm(mixture, start, [*levels, 0.0], play(noise[1:]), schedule=SD1))
    assert difference(got.x, expected) < BAR


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0])  # whose products float32 holds exactly
def test_tcd_is_the_reference(
    monkeypatch: pytest.MonkeyPatch, steps: int, gamma: float, mixture: Denoise
) -> None:
    """The reference ends at timestep 0, and so does the run here."""
    scheduler = TCDScheduler(**OPTIONS, clip_sample=False)
    expected, levels, noise = run_distilled(monkeypatch, scheduler, mixture, steps, eta=gamma)
    start = noise[0] * math.sqrt(1 + levels[0] ** 2)
    sigmas = [*levels, SD1.sigma_min]
    got = last(tcd(mixture, start, sigmas, play(noise[1:]), schedule=SD1, gamma=gamma))
    assert difference(got.x / math.sqrt(1 + got.target**2), expected) < BAR


def test_lcm_is_the_update_of_the_paper(mixture: Denoise) -> None:
    """Luo et al. 2023, algorithm 3: z = f(x, t), then x = alpha z + sigma eps; f = c_skip x + c_out x0."""
    chain = [999, 759, 499, 259, 1]
    noise = draws(len(chain))
    x = z = noise[0]
    for place, t in enumerate(chain):
        alpha, sigma = SD1.alphas_cumprod[t].sqrt().item(), (1 - SD1.alphas_cumprod[t]).sqrt().item()
        x0 = (x - sigma * eps_of(mixture, x, SD1.sigma(t))) / alpha
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / math.sqrt((10 * t) ** 2 + 0.25)
        z = c_skip * x + c_out * x0
        if place + 1 < len(chain):
            after = SD1.alphas_cumprod[chain[place + 1]]
            x = after.sqrt() * z + (1 - after).sqrt() * noise[place + 1]
    sigmas = [*(SD1.sigma(t) for t in chain), 0.0]
    start = noise[0] * math.sqrt(1 + sigmas[0] ** 2)
    step = last(lcm(mixture, start, sigmas, play(noise[1:]), schedule=SD1))
    assert difference(step.x, z) < EXACT
    assert step.x is step.denoised


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_tcd_is_the_update_of_the_paper(gamma: float, mixture: Denoise) -> None:
    """Zheng et al. 2024, strategic stochastic sampling: to s = floor((1 - gamma) t'), then q(x_t' | x_s)."""
    chain = [999, 749, 499, 249, 0]
    noise = draws(len(chain))
    x = noise[0]
    for t, after, z in zip(chain[:-1], chain[1:], noise[1:], strict=True):
        s = math.floor((1 - gamma) * after)
        a_t, a_s, a_after = (SD1.alphas_cumprod[i].item() for i in (t, s, after))
        eps = eps_of(mixture, x, SD1.sigma(t))
        x_s = math.sqrt(a_s) * (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t) + math.sqrt(1 - a_s) * eps
        x = math.sqrt(a_after / a_s) * x_s + math.sqrt(1 - a_after / a_s) * z
    sigmas = [SD1.sigma(t) for t in chain]
    start = noise[0] * math.sqrt(1 + sigmas[0] ** 2)
    step = last(tcd(mixture, start, sigmas, play(noise[1:]), schedule=SD1, gamma=gamma))
    assert difference(step.x / math.sqrt(1 + step.target**2), x) < EXACT


def test_tcd_without_noise_is_euler(mixture: Denoise) -> None:
    x = 14 * draws(1)[0]
    sigmas = trailing(SD1, 7).sigmas
    got = last(tcd(mixture, x, sigmas, no_noise, schedule=SD1, gamma=0.0)).x
    assert difference(got, last(euler(mixture, x, sigmas, no_noise)).x) < EXACT


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_refused_gamma(gamma: float, mixture: Denoise) -> None:
    with pytest.raises(InputError, match="0 \\(no noise\\) to 1"):
        next(tcd(mixture, torch.ones(SHAPE), [1.0, 0.0], no_noise, schedule=SD1, gamma=gamma))


def test_distilled_samplers_end_at_the_answer(mixture: Denoise) -> None:
    x = 14 * draws(1)[0]
    for steps in (
        lcm(mixture, x, [14.0, 0.0], no_noise, schedule=SD1),
        tcd(mixture, x, [14.0, 0.0], no_noise, schedule=SD1),
    ):
        step = last(steps)
        assert torch.equal(step.x, step.denoised)
        torch.testing.assert_close(step.x, mixture(x, 14.0), rtol=0, atol=1e-7)


# --- CFG++


class Guided:
    """Guidance towards the right mode: x0 of a condition, mixed with the unconditional one by the scale."""

    def __init__(self, denoise: Denoise, scale: float) -> None:
        self.denoise, self.scale = denoise, scale

    def conditional(self, x: Tensor, sigma: float) -> Tensor:
        return (0.09 * x + sigma**2) / (0.09 + sigma**2)

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return self.parts(x, sigma)[0]

    def parts(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        unguided = self.denoise(x, sigma)
        return unguided + self.scale * (self.conditional(x, sigma) - unguided), unguided

    def rows(self, start: int, stop: int) -> Guided:
        return self


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_cfg_pp_is_the_ddim_update_of_the_paper(scale: float, eta: float, mixture: Denoise) -> None:
    """Chung et al. 2024, algorithm 2: x0 by the guided eps, renoised by the unconditional one."""
    guidance = Guided(mixture, scale)
    sigmas = leading(SD1, 20).sigmas
    noise = draws(len(sigmas))
    x = noise[0]
    for t, after, z in zip(sigmas[:-1], sigmas[1:], noise[1:], strict=True):
        (a_t, s_t), (a_after, s_after) = vp(t), vp(after)
        eps_null = eps_of(mixture, x, t)
        eps = eps_null + scale * (eps_of(guidance.conditional, x, t) - eps_null)
        x0 = (x - s_t * eps) / a_t
        fresh = eta * s_after / s_t * math.sqrt(1 - (a_t / a_after) ** 2)  # Song et al. 2021, eq. 16
        x = a_after * x0 + math.sqrt(s_after**2 - fresh**2) * eps_null + fresh * z
    start = noise[0] * math.sqrt(1 + sigmas[0] ** 2)
    step = last(euler_a_cfg_pp(guidance, start, sigmas, play(noise[1:]), eta=eta))
    assert difference(step.x / math.sqrt(1 + step.target**2), x) < EXACT
    if eta == 0:
        again = last(euler_cfg_pp(guidance, start, sigmas, no_noise))
        assert difference(again.x, step.x) < EXACT


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_dpmpp_2m_cfg_pp_is_the_solver_with_an_unguided_rest(scale: float, mixture: Denoise) -> None:
    """DPM-Solver++(2M) for the unconditional model, plus alpha times the change that guidance makes to x0."""
    guidance = Guided(mixture, scale)
    sigmas = [*rho_grid(14.0, 0.1, 9), 0.0]
    x = draws(1)[0]
    history: list[tuple[float, Tensor]] = []
    for t, after in itertools.pairwise(sigmas):
        (a_t, s_t), (a_after, s_after) = vp(t), vp(after)
        x0 = (x - s_t * eps_of(mixture, x, t)) / a_t
        x0_guided = x0 + scale * (guidance.conditional(x / a_t, t) - x0)
        d, shrink = x0, s_after / s_t * a_t / a_after  # exp(-h)
        history.append((math.log(a_t / s_t), x0))
        if len(history) > 1 and after > 0:
            h = math.log(a_after / s_after) - history[-1][0]
            r = (history[-1][0] - history[-2][0]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * history[-2][1]
        x = s_after / s_t * x + a_after * (1 - shrink) * d + a_after * (x0_guided - x0)
    start = draws(1)[0] * math.sqrt(1 + sigmas[0] ** 2)
    step = last(dpmpp_2m_cfg_pp(guidance, start, sigmas, no_noise))
    assert difference(step.x, x) < EXACT
    assert torch.equal(step.x, step.denoised)


def test_cfg_pp_without_guidance_is_the_plain_sampler(mixture: Denoise) -> None:
    x = 14 * draws(1)[0]
    sigmas = karras(SD1, 11).sigmas
    noise = draws(12)
    for special, plain in ((euler_cfg_pp, euler), (euler_a_cfg_pp, euler_a), (dpmpp_2m_cfg_pp, dpmpp_2m)):
        got = last(special(Unguided(mixture), x, sigmas, play(noise))).x
        assert difference(got, last(plain(Unguided(mixture), x, sigmas, play(noise))).x) < EXACT


# --- Restart


def test_restart_is_the_algorithm_of_the_paper(mixture: Denoise) -> None:
    """Xu et al. 2023, algorithm 1, with the slope (x - D) / t of Heun's method as in Karras et al. 2022."""
    sigmas = karras(SD1, 12).sigmas
    intervals = ((4, 2, 0.8, 3.0), (3, 1, 0.1, 0.7))
    noise = draws(4)
    tape = iter(noise[1:])

    def one_step(x: Tensor, t: float, after: float) -> Tensor:
        d = (x - mixture(x, t)) / t
        x_after = x + (after - t) * d
        if after == 0:
            return x_after
        d_after = (x_after - mixture(x_after, after)) / after
        return x + (after - t) * (d + d_after) / 2

    x = 14 * noise[0]
    for t, after in itertools.pairwise(sigmas):
        x = one_step(x, t, after)
        for n_restart, k, t_min, t_max in intervals:
            if after == min(sigmas[1:-1], key=lambda level: abs(level - t_min)):
                for _ in range(k):
                    x = x + math.sqrt(t_max**2 - after**2) * next(tape)
                    root = [t_max ** (1 / 7), after ** (1 / 7)]
                    inner = [
                        (root[0] + j / (n_restart - 1) * (root[1] - root[0])) ** 7 for j in range(n_restart)
                    ]
                    for upper, lower in itertools.pairwise(inner):
                        x = one_step(x, upper, lower)
    assert next(tape, None) is None
    got = last(restart(mixture, 14 * noise[0], sigmas, play(noise[1:]), restarts=intervals)).x
    assert difference(got, x) < EXACT


EDM = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
EDM_FINE = [(80 ** (1 / 7) + i / 35 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(36)]
IMAGENET = "4,1,19.35,40.79; 4,1,1.09,1.92; 4,5,0.59,1.09; 4,5,0.30,0.59; 6,6,0.06,0.30"


@pytest.mark.parametrize(
    ("sigmas", "restarts", "evaluations"), [(EDM, "3,2,0.06,0.30", 43), (EDM_FINE, IMAGENET, 203)]
)
def test_restart_costs_what_the_paper_says(sigmas: list[float], restarts: str, evaluations: int) -> None:
    """Xu et al. 2023: 43 evaluations in table 3 and 203 in table 5."""
    called: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        called.append(sigma)
        return x / (1 + sigma**2)

    list(
        restart(denoise, torch.ones(SHAPE), [*sigmas, 0.0], lambda s, t: torch.ones(SHAPE), restarts=restarts)
    )
    assert len(called) == evaluations


def test_restart_counts_its_steps_on(mixture: Denoise) -> None:
    sigmas = [8.0, 4.0, 1.0, 0.25, 0.0]
    drawn: list[tuple[float, float]] = []

    def noise(sigma: float, target: float) -> Tensor:
        drawn.append((sigma, target))
        return torch.ones(SHAPE)

    steps = list(restart(mixture, torch.ones(SHAPE), sigmas, noise, restarts=((3, 2, 0.9, 20.0),)))
    middle = ((8 ** (1 / 7) + 1) / 2) ** 7
    legs = [(8.0, middle), (middle, 1.0)]
    pairs = [(8.0, 4.0), (4.0, 1.0), *legs, *legs, (1.0, 0.25), (0.25, 0.0)]
    assert [(step.sigma, step.target) for step in steps] == [pytest.approx(pair) for pair in pairs]
    assert [step.index for step in steps] == list(range(8))
    assert drawn == [(1.0, 8.0), (1.0, 8.0)]


@pytest.mark.parametrize("restarts", [(), "", ((5, 0, 0.1, 2.0),), "5,3,2.0,3.0"])
def test_restart_without_room_is_heun(restarts: Any, mixture: Denoise) -> None:
    """No interval, none of its repeats, or one that lies above the noise of a run that starts low."""
    x = 1.5 * draws(1)[0]
    sigmas = [1.5, 0.7, 0.3, 0.0]
    got = last(restart(mixture, x, sigmas, no_noise, restarts=restarts)).x
    assert difference(got, last(heun(mixture, x, sigmas, no_noise)).x) < EXACT


def test_restart_keeps_the_variance() -> None:
    """Going up and down again leaves the distribution as it is."""
    row = SAMPLERS["restart"]
    found = [
        moments(row, rho_grid(10.0, 0.05, steps), restarts=((steps, 2, 0.1, 2.0), (steps, 1, 1.0, 5.0)))
        for steps in (50, 100, 200)
    ]
    assert found[2].draws == 3
    assert extrapolated([one.variance for one in found]) == pytest.approx(0.25 + 0.05**2, rel=1e-3)
    assert extrapolated([one.mean for one in found]) == pytest.approx(GAUSSIAN.mean, rel=1e-3)


def test_restarts_as_text() -> None:
    assert parsed("10, 2, 0.1, 2.0") == [*RESTARTS]
    assert parsed("3,1,0.5,1;4,2,1,7;") == [(3, 1, 0.5, 1.0), (4, 2, 1.0, 7.0)]
    assert parsed(RESTARTS) is RESTARTS


@pytest.mark.parametrize(
    "restarts",
    ["10,2,0.1", "a,2,0.1,2", "1,2,0.1,2", "3,-1,0.1,2", "3,1,2,0.1", "3,1,0,1", "3,1,1,inf", ((3, 1, 1.0),)],
)
def test_refused_restarts(restarts: Any) -> None:
    with pytest.raises(InputError, match="restart interval") as caught:
        parsed(restarts)
    assert "10,2,0.1,2" in str(caught.value.hint)


# --- inversion


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_inversion_is_the_reference(steps: int, mixture: Denoise) -> None:
    scheduler: Any = DDIMInverseScheduler(
        **OPTIONS, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.alphas_cumprod = SD1.alphas_cumprod
    scheduler.initial_alpha_cumprod = SD1.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    expected = draws(1)[0]
    for t in scheduler.timesteps:
        expected = scheduler.step(eps_of(mixture, expected, SD1.sigma(int(t))), t, expected).prev_sample
    sigmas = leading(SD1, steps).sigmas  # from timestep 0, as the reference is told to
    start = draws(1)[0] * math.sqrt(1 + sigmas[-1] ** 2)
    step = last(ddim_inversion(mixture, start, sigmas, no_noise))
    assert difference(step.x / math.sqrt(1 + step.target**2), expected) < BAR


def round_trip(sigmas: Sequence[float], iterations: int) -> float:
    """How far a picture is from what sampling makes of its inversion, relative to the data's size."""
    picture = torch.tensor([[1.2, 0.1], [-0.9, 0.9], [0.2, -1.4], [0.3, 0.2]], dtype=torch.float64)
    up = last(ddim_inversion(MIXTURE.denoise, picture, sigmas, no_noise, iterations=iterations))
    down = last(ddim(MIXTURE.denoise, up.x, sigmas, no_noise))
    return difference(down.x, picture)


def test_round_trip() -> None:
    """It converges with the steps as Euler does, and with the iterations at any number of steps."""
    trips = [round_trip([*rho_grid(14.0, 0.03, steps), 0.0], 1) for steps in (25, 50, 100, 200)]
    assert rate(trips[-2], trips[-1]) > 0.8
    assert trips[-1] < 0.05
    exact = [round_trip([*rho_grid(14.0, 0.03, 25), 0.0], iterations) for iterations in (1, 3, 6, 30)]
    assert exact[0] > 3 * exact[1] > 9 * exact[2]
    assert exact[3] < 1e-9


def test_inversion_goes_up(mixture: Denoise) -> None:
    sigmas = [5.0, 2.0, 0.5, 0.0]
    called: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        called.append(sigma)
        return mixture(x, sigma)

    steps = list(ddim_inversion(denoise, torch.ones(SHAPE), sigmas, no_noise, iterations=2))
    assert [(step.sigma, step.target) for step in steps] == [(0.0, 0.5), (0.5, 2.0), (2.0, 5.0)]
    assert [step.index for step in steps] == [0, 1, 2]
    assert called == [0.5, 0.5, 2.0, 2.0, 5.0, 5.0]
    with pytest.raises(InputError, match="at least 1"):
        next(ddim_inversion(mixture, torch.ones(SHAPE), sigmas, no_noise, iterations=0))
