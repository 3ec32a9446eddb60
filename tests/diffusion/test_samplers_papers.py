"""Samplers against their papers' updates, transcribed in the papers' variance-preserving coordinates.

x_t = alpha_t x0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1; they share no code with the samplers. Those of
other samplers are in test_samplers_sde and test_samplers_special.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.prediction import Predictor, Unguided
from sfumato.diffusion.samplers import SAMPLERS, Step
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import SPACINGS

Denoise = Callable[[Tensor, float], Tensor]
SD1 = Schedule(ScheduleConfig())
SHAPE = (2, 3, 4, 4)
EXACT = 1e-10  # of relative difference between two ways to write one update


def tape(steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The noise of a run: the start and one for every step."""
    return list(torch.randn(steps + 1, *SHAPE, generator=torch.Generator().manual_seed(7), dtype=dtype))


def play(tape: list[Tensor]) -> Callable[[float, float], Tensor]:
    values = iter(tape[1:])
    return lambda sigma, target: next(values)


def last(steps: Iterator[Step]) -> Step:
    return list(steps)[-1]


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    assert got.isfinite().all()
    return ((got - expected).abs().max() / expected.abs().max()).item()


def grid(name: str, steps: int = 20, end: float = 0.0) -> list[float]:
    """Levels of that many steps, the last one replaced."""
    return [*SPACINGS[name](SD1, steps).sigmas[:-1], end]


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2"])
def test_churn_is_the_algorithm_of_the_paper(name: str, mixture: Denoise) -> None:
    """Karras et al. 2022, algorithm 2, with its second-order correction, without it, or in the middle."""
    sigmas, noise = grid("karras"), tape(40)
    s_churn, s_tmin, s_tmax, s_noise = 7.0, 0.05, 9.0, 1.003
    draws = iter(noise[1:])
    x = noise[0] * sigmas[0]
    for t, t_next in pairwise(sigmas):
        inside = s_tmin <= t <= s_tmax
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if inside else 0.0
        t_hat = t + gamma * t
        if gamma > 0:
            x = x + math.sqrt(t_hat**2 - t**2) * s_noise * next(draws)
        d = (x - mixture(x, t_hat)) / t_hat
        if name == "dpm2" and t_next != 0:
            t_mid = math.exp((math.log(t_hat) + math.log(t_next)) / 2)
            x_mid = x + (t_mid - t_hat) * d
            x = x + (t_next - t_hat) * (x_mid - mixture(x_mid, t_mid)) / t_mid
            continue
        x_next = x + (t_next - t_hat) * d
        if name == "heun" and t_next != 0:
            d_next = (x_next - mixture(x_next, t_next)) / t_next
            x_next = x + (t_next - t_hat) * (d / 2 + d_next / 2)
        x = x_next
    options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    got = last(SAMPLERS[name](mixture, noise[0] * sigmas[0], sigmas, play(noise), **options)).x
    assert difference(got, x) < EXACT


def ancestral(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """k-diffusion's get_ancestral_step: (level to step to, noise to add)."""
    up = min(target, eta * (target**2 * (sigma**2 - target**2) / sigma**2) ** 0.5)
    return (target**2 - up**2) ** 0.5, up


@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.6, 1.01), (1.5, 1.0)])
def test_dpmpp_2s_a_is_the_update_of_the_paper(eta: float, s_noise: float, mixture: Denoise) -> None:
    """Lu et al. 2022b, algorithm 1, down to k-diffusion's level, and noise up from it."""
    sigmas, noise = grid("karras"), tape(20)
    draws = iter(noise[1:])
    r = 1 / 2
    x = noise[0] * sigmas[0]
    for sigma, target in pairwise(sigmas):
        down, up = ancestral(sigma, target, eta)
        denoised = mixture(x, sigma)
        if down == 0:
            x = denoised
        else:
            h = math.log(sigma / down)
            (a_s, b_s), (a_t, b_t) = preserving(sigma), preserving(down)
            middle = sigma * math.exp(-r * h)
            a_u, b_u = preserving(middle)
            u = b_u / b_s * (x * a_s) - a_u * (math.exp(-r * h) - 1) * denoised
            mixed = (1 - 1 / (2 * r)) * denoised + 1 / (2 * r) * mixture(u / a_u, middle)
            x = (b_t / b_s * (x * a_s) - a_t * (math.exp(-h) - 1) * mixed) / a_t
        if target > 0:
            x = x + next(draws) * s_noise * up
    got = SAMPLERS["dpmpp_2s_a"](mixture, noise[0] * sigmas[0], sigmas, play(noise), eta=eta, s_noise=s_noise)
    assert difference(last(got).x, x) < EXACT


def preserving(sigma: float) -> tuple[float, float]:
    """alpha and sigma of variance-preserving coordinates at a noise level."""
    return 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)


def dpm_solver(denoise: Denoise, x: Tensor, sigma: float, target: float, order: int, r1: float) -> Tensor:
    """DPM-Solver-1 to 3 as printed (Lu et al. 2022a, eq. 3.7, algorithms 4 and 5); x_t in and out."""
    r2 = 2 / 3
    h = math.log(sigma / target)

    def eps(x_t: Tensor, level: float) -> Tensor:
        alpha, beta = preserving(level)
        return (x_t - alpha * denoise(x_t / alpha, level)) / beta

    def along(level: float, length: float) -> Tensor:
        (a_s, _), (a_t, b_t) = preserving(sigma), preserving(level)
        return a_t / a_s * x - b_t * (math.exp(length) - 1) * start

    start = eps(x, sigma)
    b_t = preserving(target)[1]
    if order == 1:
        return along(target, h)
    s1, s2 = sigma * math.exp(-r1 * h), sigma * math.exp(-r2 * h)
    u1 = along(s1, r1 * h)
    d1 = eps(u1, s1) - start
    if order == 2:
        return along(target, h) - b_t / (2 * r1) * (math.exp(h) - 1) * d1
    b_2 = preserving(s2)[1]
    u2 = along(s2, r2 * h) - b_2 * r2 / r1 * ((math.exp(r2 * h) - 1) / (r2 * h) - 1) * d1
    d2 = eps(u2, s2) - start
    return along(target, h) - b_t / r2 * ((math.exp(h) - 1) / h - 1) * d2


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("evaluations", [5, 6, 7, 20])
def test_dpm_fast_is_the_algorithm_of_the_paper(evaluations: int, eta: float, mixture: Denoise) -> None:
    """Lu et al. 2022a, section 3.4, with k-diffusion's ancestral steps."""
    sigmas, noise = grid("karras", evaluations), tape(evaluations)
    high, low = sigmas[0], sigmas[-2]
    steps = evaluations // 3 + 1
    tail = {0: [3] * (steps - 2) + [2, 1], 1: [3] * (steps - 1) + [1], 2: [3] * (steps - 1) + [2]}
    draws = iter(noise[1:])
    x = noise[0] * high * preserving(high)[0]
    for i, order in enumerate(tail[evaluations % 3]):
        sigma, target = (math.exp(math.log(high) + j / steps * math.log(low / high)) for j in (i, i + 1))
        down = max(low, ancestral(sigma, target, eta)[0]) if eta else target
        x = dpm_solver(mixture, x, sigma, down, order, 1 / 2 if order == 2 else 1 / 3)
        up = math.sqrt(max(target**2 - down**2, 0.0))
        exploding = x / preserving(down)[0]
        if up > 1e-9:
            exploding = exploding + up * next(draws)
        x = exploding * preserving(target)[0]
    got = last(SAMPLERS["dpm_fast"](mixture, noise[0] * high, sigmas, play(noise), eta=eta))
    assert got.target == low
    assert difference(got.x * preserving(low)[0], x) < EXACT


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("p", "i", "d"), [(0.0, 1.0, 0.0), (0.2, 0.7, 0.05)])
def test_dpm_adaptive_is_the_algorithm_of_the_paper(
    p: float, i: float, d: float, order: int, eta: float, mixture: Denoise
) -> None:
    """Lu et al. 2022a, appendix C, with k-diffusion's PID control, one image after the other."""
    high, low, rtol, atol, safety = 10.0, 0.05, 0.02, 0.003, 0.81
    noise = tape(200)
    used = 0
    ends, levels = [], []
    for image in range(SHAPE[0]):
        rows = slice(image, image + 1)
        x = previous = noise[0][rows] * high
        s, h = -math.log(high), 0.9
        memory: list[float] = []
        while s < -math.log(low) - 1e-5:
            t = min(-math.log(low), s + h)
            sigma, target = math.exp(-s), math.exp(-t)
            down = max(low, ancestral(sigma, target, eta)[0]) if eta else target
            alpha, alpha_down = preserving(sigma)[0], preserving(down)[0]
            lower, higher = (
                dpm_solver(mixture, x * alpha, sigma, down, k, 1 / 3 if order == 3 else 1 / 2) / alpha_down
                for k in (order - 1, order)
            )
            delta = torch.maximum(lower.abs(), previous.abs()).mul(rtol).clamp(min=atol)
            error = torch.linalg.norm((lower - higher) / delta) / x.numel() ** 0.5
            inverse = 1 / (float(error) + 1e-8)
            memory = [inverse, memory[1], memory[2]] if memory else [inverse] * 3
            k = 1.5 if eta else order
            factor = memory[0] ** ((p + i + d) / k) * memory[1] ** (-(p + 2 * d) / k) * memory[2] ** (d / k)
            factor = 1 + math.atan(factor - 1)
            if factor >= safety:
                memory = [memory[0], memory[0], memory[1]]
                previous, x, s = lower, higher, t
                levels.append(target)
                if target > down * (1 + 1e-9):
                    used += 1
                    x = x + math.sqrt(target**2 - down**2) * noise[used][rows]
            h *= factor
        ends.append(x)
    found = list(
        SAMPLERS["dpm_adaptive"](
            Unguided(mixture),
            noise[0] * high,
            [high, 1.0, low, 0.0],
            play(noise),
            order=order,
            rtol=rtol,
            atol=atol,
            h_init=0.9,
            pcoeff=p,
            icoeff=i,
            dcoeff=d,
            eta=eta,
        )
    )
    assert [step.target for step in found] == pytest.approx(levels, rel=1e-9)
    assert difference(found[-1].x, torch.cat(ends)) < EXACT


def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """A fixed float64 network of two layers with a timestep embedding; it predicts nothing well."""
    generator = torch.Generator().manual_seed(11)
    first, second = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    hidden = torch.tanh(
        torch.einsum("ij,bjhw->bihw", first, x) + torch.sin(t.double() / 50)[:, None, None, None]
    )
    return 0.7 * x + 0.5 * torch.einsum("ij,bjhw->bihw", second, hidden)


@pytest.mark.parametrize(
    "config",
    [ScheduleConfig("linear", 200, 1e-4, 0.02), ScheduleConfig("linear", 1000, 1e-4, 0.02), ScheduleConfig()],
    ids=["short", "ddpm", "stable diffusion"],
)
def test_ddpm_is_the_printed_loop(config: ScheduleConfig) -> None:
    """Ho et al. 2020, algorithm 2, as textbooks print it: t from T - 1 to 0, and z = 0 at the end."""
    schedule = Schedule(config)
    steps = schedule.num_timesteps
    noise = tape(steps)
    values = iter(noise[1:])
    x_t = noise[0]
    for t_step in reversed(range(steps)):
        z = next(values) if t_step > 0 else 0
        alpha, beta, abar = (
            row[t_step] for row in (schedule.alphas, schedule.betas, schedule.alphas_cumprod)
        )
        eps = network(x_t, torch.full((SHAPE[0],), t_step), Conditioning())
        x_t = torch.sqrt(1 / alpha) * (x_t - (1 - alpha) * eps / torch.sqrt(1 - abar)) + torch.sqrt(beta) * z

    predictor = Predictor(network, schedule, "eps")
    row = SAMPLERS["ddpm"]
    spacing = SPACINGS[row.spacing](schedule, steps)
    got = last(
        row(
            lambda x, sigma: predictor(x, sigma, Conditioning()),
            noise[0] * spacing.start_scale,
            spacing.sigmas,
            play(noise),
        )
    ).x
    assert x_t.abs().max() > 0.5
    torch.testing.assert_close(got, x_t, rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_the_formula_of_latent_diffusion(eta: float) -> None:
    """Song et al. 2021, eq. 12 and 16, on timesteps 1, 1 + r ... and at timestep 0 after the last step."""
    steps = 40
    noise = tape(steps)
    values = iter(noise[1:])
    chain = [1 + 25 * i for i in range(steps)]
    before = [0, *chain[:-1]]
    x = noise[0]
    for t, t_before in zip(reversed(chain), reversed(before), strict=True):
        a, a_before = SD1.alphas_cumprod[t].item(), SD1.alphas_cumprod[t_before].item()
        eps = network(x, torch.full((SHAPE[0],), t), Conditioning())
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        deviation = eta * math.sqrt((1 - a_before) / (1 - a) * (1 - a / a_before))
        direction = math.sqrt(1 - a_before - deviation**2) * eps
        x = math.sqrt(a_before) * x0 + direction + deviation * next(values)

    predictor = Predictor(network, SD1, "eps")
    row = SAMPLERS["ddim"]
    spacing = SPACINGS[row.spacing](SD1, steps)
    start = noise[0] * spacing.start_scale
    step = last(
        row(lambda x, s: predictor(x, s, Conditioning()), start, spacing.sigmas, play(noise), eta=eta)
    )
    assert step.target == SD1.sigma_min
    torch.testing.assert_close(step.x / math.sqrt(1 + step.target**2), x, rtol=0, atol=1e-10)
