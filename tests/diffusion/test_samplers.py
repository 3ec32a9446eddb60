"""Samplers on distributions with known answers: orders, moments, and what every row of the table promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.diffusion.samplers import SAMPLERS, Step, ddpm, posterior, sampler, transition
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import SPACINGS, trailing
from sfumato.errors import InputError

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

    def flow(self, x: Tensor, sigma: float, target: float) -> Tensor:
        """The solution at `target` of dx/dsigma = (x - D(x, sigma)) / sigma through x at `sigma`."""
        variance = self.deviation**2
        return self.mean + (x - self.mean) * math.sqrt((variance + target**2) / (variance + sigma**2))


GAUSSIAN = Gaussian(mean=0.7, deviation=0.5)


def no_noise(sigma: float, target: float) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def last(steps: object) -> Step:
    return list(steps)[-1]  # pyright: ignore[reportArgumentType, reportCallIssue]


def rho_grid(high: float, low: float, steps: int) -> list[float]:
    """Karras spacing without the 0 at its end, so that the order of every step counts."""
    a, b = high ** (1 / 7), low ** (1 / 7)
    return [(a + i / steps * (b - a)) ** 7 for i in range(steps + 1)]


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if not row.stochastic])
def test_order_of_convergence(name: str) -> None:
    start = torch.tensor([[-9.0, 0.1, 14.0]], dtype=torch.float64)
    counts = [40, 80, 160, 320]
    found = []
    for count in counts:
        end = last(SAMPLERS[name](GAUSSIAN.denoise, start, rho_grid(10.0, 0.05, count), no_noise)).x
        found.append((end - GAUSSIAN.flow(start, 10.0, 0.05)).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(found)]
    assert orders[-1] == pytest.approx(SAMPLERS[name].order, abs=0.1), (found, orders)
    assert found[-1] < (1e-3 if SAMPLERS[name].order == 2 else 2e-2)


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


SIGMAS = st.lists(st.floats(1e-3, 200), min_size=2, max_size=12).map(
    lambda values: sorted({round(value, 3) for value in values}, reverse=True)
)


@settings(deadline=None)  # a busy machine is not a failure
@given(st.sampled_from(sorted(SAMPLERS)), SIGMAS, st.booleans())
def test_every_sampler_keeps_its_promises(name: str, positive: list[float], to_zero: bool) -> None:
    row = SAMPLERS[name]
    sigmas = [*positive, 0.0] if to_zero else positive
    evaluated: list[tuple[float, Tensor]] = []
    drawn: list[tuple[float, float]] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        assert isinstance(sigma, float)
        assert x.dtype == torch.float32
        evaluated.append((sigma, x / (1 + sigma**2)))
        return evaluated[-1][1]

    def noise(sigma: float, target: float) -> Tensor:
        drawn.append((sigma, target))
        return torch.ones(2, 3)

    start = torch.full((2, 3), positive[0])
    steps = list(row(denoise, start, sigmas, noise))
    pairs = list(itertools.pairwise(sigmas))
    assert [(step.sigma, step.target) for step in steps] == pairs
    assert [step.index for step in steps] == list(range(len(pairs)))
    assert all(sigma > 0 for sigma, _ in evaluated)
    assert len(evaluated) == row.evaluations * len(pairs) - (row.evaluations - 1) * to_zero
    assert drawn == ([pair for pair in pairs if pair[1] > 0] if row.stochastic else [])
    for step in steps:
        assert step.x.shape == start.shape
        assert step.x.dtype == torch.float32
        assert step.x.isfinite().all()
        assert any(step.denoised is answer for sigma, answer in evaluated if sigma == step.sigma)
    if to_zero:
        torch.testing.assert_close(steps[-1].x, steps[-1].denoised)
    assert torch.equal(start, torch.full((2, 3), positive[0]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_grad_mode_belongs_to_the_consumer(name: str) -> None:
    inside: list[bool] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        inside.append(torch.is_grad_enabled())
        return x * 0.5

    x = torch.ones(1, 2, requires_grad=True)
    with torch.enable_grad():
        steps = SAMPLERS[name](denoise, x, [4.0, 2.0, 1.0, 0.0], lambda s, t: torch.ones(1, 2))
        for step in itertools.islice(steps, 2):
            assert torch.is_grad_enabled()
            assert not step.x.requires_grad
        steps.close()  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.is_grad_enabled()
    with torch.no_grad():
        next(iter(SAMPLERS[name](denoise, x, [4.0, 2.0], lambda s, t: torch.ones(1, 2))))
        assert not torch.is_grad_enabled()
    assert inside
    assert not any(inside)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_global_noise_and_no_memory_between_runs(
    name: str, mixture: Callable[[Tensor, float], Tensor]
) -> None:
    def run() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        x = 10 * torch.randn(5, generator=generator)
        sigmas = SPACINGS["karras"](Schedule(ScheduleConfig()), 6).sigmas
        return last(SAMPLERS[name](mixture, x, sigmas, lambda s, t: torch.randn(5, generator=generator))).x

    before = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(run(), first)


@pytest.mark.parametrize(
    "sigmas", [[1.0, 1.0], [1.0, 2.0], [1.0, -0.1], [math.inf, 1.0], [math.nan, 1.0], [2.0, 0.0, 0.0]]
)
def test_refused_sigmas(sigmas: list[float]) -> None:
    with pytest.raises(InputError, match="descending"):
        SAMPLERS["euler"](lambda x, sigma: x, torch.ones(1), sigmas, no_noise)


def test_names_and_options() -> None:
    assert sampler("dpmpp_2m") is SAMPLERS["dpmpp_2m"]
    with pytest.raises(InputError, match="euler_a"):
        sampler("euler a")
    assert {name: row.options for name, row in SAMPLERS.items() if row.options} == {
        "ddpm": ("variance",),
        "ddim": ("eta",),
        "euler_a": ("eta",),
    }
    arguments = (lambda x, sigma: x, torch.ones(1), [1.0, 0.0], no_noise)
    with pytest.raises(InputError, match="no option 'eta'"):
        SAMPLERS["heun"](*arguments, eta=1.0)
    with pytest.raises(InputError, match="eta"):
        SAMPLERS["ddim"](*arguments, etta=1.0)
    with pytest.raises(InputError, match="large"):
        SAMPLERS["ddpm"](*arguments, variance="huge")
