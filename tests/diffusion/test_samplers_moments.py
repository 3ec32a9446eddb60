"""Mean and variance of the first-order samplers' answers on the whole chain, and their noise rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.diffusion.samplers import (
    SAMPLERS,
    Step,
    ddpm,
    posterior,
    transition,
)
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import trailing

DDPM_CONFIG = ScheduleConfig("linear", 1000, 1e-4, 0.02)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal values N(mean, deviation^2)."""

    mean: float
    deviation: float

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """E[x0 | x0 + sigma * noise = x]."""
        variance = self.deviation**2
        return (variance * x + sigma**2 * self.mean) / (variance + sigma**2)


GAUSSIAN = Gaussian(mean=0.7, deviation=0.5)


def last(steps: object) -> Step:
    return list(steps)[-1]  # pyright: ignore[reportArgumentType, reportCallIssue]


def rho_grid(high: float, low: float, steps: int) -> list[float]:
    """Karras spacing without the 0 at its end, so that the order of every step counts."""
    a, b = high ** (1 / 7), low ** (1 / 7)
    return [(a + i / steps * (b - a)) ** 7 for i in range(steps + 1)]


def moments(
    run: Callable[[Tensor, Callable[[float, float], Tensor]], Tensor], steps: int, start_scale: float
) -> tuple[float, float]:
    """Mean and variance of a sampler's answer for a Gaussian, exactly: its steps are affine in every noise.

    Row 0 has no noise at all, row 1 a unit start, row k + 2 a unit noise in step k; the squares of the rows'
    answers less row 0's sum to the variance.
    """
    start = torch.zeros(steps + 2, dtype=torch.float64)
    start[1] = start_scale
    rows = iter(torch.eye(steps + 2, dtype=torch.float64)[2:])
    answers = run(start, lambda sigma, target: next(rows))
    return answers[0].item(), (answers[1:] - answers[0]).square().sum().item()


STOCHASTIC = [
    ("ddpm", {"variance": "large"}),
    ("ddpm", {"variance": "small"}),
    ("euler_a", {}),
    ("ddim", {"eta": 1.0}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {}),
]


@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
def test_mean_and_variance(name: str, options: dict[str, float | str]) -> None:
    def error(schedule: Schedule) -> tuple[float, float]:
        steps = schedule.num_timesteps
        spacing = trailing(schedule, steps)
        mean, variance = moments(
            lambda x, noise: last(SAMPLERS[name](GAUSSIAN.denoise, x, spacing.sigmas, noise, **options)).x,
            steps,
            spacing.start_scale,
        )
        return abs(mean - GAUSSIAN.mean), abs(variance / GAUSSIAN.deviation**2 - 1)

    coarse = error(Schedule(ScheduleConfig("linear", 250, 4e-4, 0.08)))
    fine = error(Schedule(DDPM_CONFIG))
    assert fine[0] < 0.01
    assert fine[1] < 0.03
    assert fine[1] < coarse[1] / 2  # a discretisation error, not a wrong variance


def test_large_variance_is_exact_for_standard_normal_data() -> None:
    """Where x0 is N(0, 1), so is every x_t with sqrt(beta) as noise (Ho et al. 2020, section 3.2)."""
    schedule = Schedule(DDPM_CONFIG)
    spacing = trailing(schedule, 1000)
    mean, variance = moments(
        lambda x, noise: last(ddpm(Gaussian(0.0, 1.0).denoise, x, spacing.sigmas, noise)).x,
        1000,
        spacing.start_scale,
    )
    assert mean == 0
    assert variance == pytest.approx(1 - schedule.betas[0].item(), abs=1e-12)


def test_sampled_moments_agree() -> None:
    generator = torch.Generator().manual_seed(4)
    x = 80 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    sigmas = [*rho_grid(80, 0.02, 500), 0.0]
    end = last(
        SAMPLERS["euler_a"](
            GAUSSIAN.denoise, x, sigmas, lambda s, t: torch.randn(x.shape, generator=generator).double()
        )
    ).x
    assert end.mean().item() == pytest.approx(GAUSSIAN.mean, abs=0.02)
    assert end.std().item() == pytest.approx(GAUSSIAN.deviation, rel=0.03)


@settings(deadline=None)  # a busy machine is not a failure
@given(st.floats(1e-3, 100), st.just(0.0) | st.floats(1e-4, 0.999))
def test_noise_rules(sigma: float, share: float) -> None:
    target = sigma * share
    down, up = posterior(sigma, target, 1.0)
    assert math.hypot(down, up) == pytest.approx(target, rel=1e-9, abs=1e-12)
    assert down == pytest.approx(target**2 / sigma, rel=1e-6, abs=1e-9)
    assert posterior(sigma, target, 0.0) == (target, 0)
    large_down, large_up = transition(sigma, target)
    assert large_down == pytest.approx(down, rel=1e-6, abs=1e-9)
    assert large_up == 0 if target == 0 else large_up >= up - 1e-9
